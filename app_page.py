"""What happens on the page. No event runs a network: one submits a job, another watches it until it is over."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import app_form as form
import app_views as views
from app_jobs import Job, Jobs, QueueFull
from app_layout import Layout, speed_note
from app_serve import DAY, EVENTS
from pipelines.catalog import Card
from pipelines.request import Request, RequestError

Updates = dict[Any, Any]

WATCHED = 0.2
"""Seconds between two looks at a job."""
SMALL = 192
"""Pictures up to this width, in px, are shown enlarged."""
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}


class Page(Layout):
    """The page: its components, and what happens between them.

    Args:
        jobs: where requests go.
        cards: the models to choose from, by name.
    """

    def __init__(self, jobs: Jobs, cards: Mapping[str, Card]) -> None:
        super().__init__(cards)
        self.jobs = jobs

    def build(self) -> Any:
        """Return the page as gradio Blocks, with its own limits set; those of the server are in `app_serve`."""
        import gradio as gr

        with gr.Blocks(title="Leapfrog", analytics_enabled=False, delete_cache=(DAY, 7 * DAY)) as page:
            self.draw()
            self._connect(page)
        page.queue(max_size=EVENTS, api_open=False, default_concurrency_limit=None)
        return page

    def _connect(self, page: Any) -> None:
        inputs, parts = self.inputs, self.parts
        every = list(inputs.values())
        asked = [parts[name] for name in ("job", "remembered", "status", "generate", "stop", "compare")]
        shown = [parts[name] for name in _SHOWN]
        written = [parts["written"], inputs["seed"]]
        started = parts["generate"].click(
            self._submit, [parts["written"], *every], [*asked, *written], **_PRIVATE
        )
        started.then(self._watch, parts["job"], shown, **_PRIVATE)
        compared = parts["compare"].click(
            self._submit_comparison, [parts["written"], *every], [*asked, *written], **_PRIVATE
        )
        compared.then(self._watch, parts["job"], shown, **_PRIVATE)
        parts["stop"].click(self._stop, parts["job"], None, queue=False, **_PRIVATE)
        again = page.load(self._again, parts["remembered"], asked, **_PRIVATE)
        again.then(self._watch, parts["job"], shown, **_PRIVATE)

        restyle = [inputs["prompt"], inputs["style"], inputs["model"]]
        inputs["style"].input(self._restyle, restyle, inputs["prompt"], queue=False, **_PRIVATE)
        parts["examples"].click(
            self._example, [parts["examples"], inputs["model"]], restyle[:2], queue=False, **_PRIVATE
        )
        parts["concepts"].input(
            self._concept, [parts["concepts"], *restyle[1:]], inputs["prompt"], queue=False, **_PRIVATE
        )
        seeds = [inputs["seed"], inputs["new_seed"]]
        parts["die"].click(
            lambda: (str(secrets.randbelow(form.LARGEST_RANDOM_SEED)), False),
            None,
            seeds,
            queue=False,
            **_PRIVATE,
        )
        inputs["seed"].input(lambda: False, None, inputs["new_seed"], queue=False, **_PRIVATE)
        speed = [parts["methods"], parts["speed_note"], parts["compare"]]
        inputs["speed"].change(_speed_shown, inputs["speed"], speed, queue=False, **_PRIVATE)
        inputs["profile"].change(
            _profile_shown,
            [inputs["model"], inputs["profile"]],
            [parts["by_hand"], parts["profile_note"]],
            queue=False,
            **_PRIVATE,
        )
        for name in self.methods:
            chosen = [inputs[other] for other in self.methods if self.rivals(name, other)]
            if chosen:
                inputs[name].input(_only(chosen), inputs[name], chosen, queue=False, **_PRIVATE)
            inputs[name].change(_shown, inputs[name], parts[f"{name} settings"], queue=False, **_PRIVATE)
        of_model = [parts[name] for name in ("masthead", "about", "concepts", "examples", "example_box")]
        inputs["model"].input(self._model, inputs["model"], [*every, *of_model], queue=False, **_PRIVATE)
        reused = [*every, *of_model, parts["status"], parts["file"]]
        parts["file"].upload(self._reuse, parts["file"], reused, **_PRIVATE)

    def _submit(self, written: str | None, *values: Any) -> Updates:
        return self._asked(written, values, comparing=False)

    def _submit_comparison(self, written: str | None, *values: Any) -> Updates:
        return self._asked(written, values, comparing=True)

    def _asked(self, written: str | None, values: Sequence[Any], *, comparing: bool) -> Updates:
        parts = self.parts
        try:
            given = dict(zip(self.inputs, values, strict=True))
            takes_class = self.cards[given["model"]].takes_class
            request = form.request_of(given, self.methods, takes_class=takes_class, written=written)
            job = self.jobs.submit(request.one(0) if comparing else request, comparing=comparing)
        except (RequestError, QueueFull) as error:
            return {parts["job"]: "", parts["status"]: views.trouble(_sentence(error))}
        return {
            parts["job"]: job.name,
            parts["remembered"]: job.name,
            parts["status"]: views.progress(job),
            parts["written"]: str(request.seed),
            self.inputs["seed"]: str(request.seed),
        } | self._allowed(idle=False)

    def _allowed(self, *, idle: bool) -> Updates:
        """Let a run be started while nothing runs, and be stopped while something does."""
        import gradio as gr

        can = {"generate": idle, "compare": idle, "stop": not idle}
        return {self.parts[name]: gr.Button(interactive=on) for name, on in can.items()}

    async def _watch(self, name: str) -> AsyncIterator[Updates]:
        """Look at a job until it is over; closing the tab ends the looking, not the job."""
        import gradio as gr

        job, parts, last = self.jobs.get(name), self.parts, ""
        if job is None:
            yield {parts["stop"]: gr.Button(interactive=False)}
            return
        while not job.over:
            line = views.progress(job, self.jobs.ahead(job))
            if line != last:
                yield {parts["status"]: line}
            last = line
            await asyncio.sleep(WATCHED)
        shown = self._done(job) if job.state == "done" else {}
        yield {parts["status"]: views.ended(job)} | self._allowed(idle=True) | shown

    def _done(self, job: Job) -> Updates:
        import gradio as gr

        parts, words, several = (
            self.parts,
            job.request.prompt or f"class {job.request.class_label}",
            len(job.paths) > 1,
        )
        files = [_served(path) for path in job.paths]
        one, small = (
            None if several else files[0],
            ["small"] if job.report["effective"]["width"] <= SMALL else [],
        )
        captions = [f"{words} (seed {job.request.seed + place})" for place in range(len(files))]
        if job.measured is not None:
            captions = [f"{words}: {kind}" for kind in ("exact", "accelerated")]
        return {
            parts["empty"]: gr.HTML(visible=False),
            parts["example_box"]: gr.Column(visible=False),
            parts["picture"]: gr.Image(one, visible=not several, alt_text=words, elem_classes=small),
            parts["gallery"]: gr.Gallery(
                list(zip(files, captions, strict=True)) if several else None,
                visible=several,
                columns=3 if job.measured is None else 2,
            ),
            parts["report"]: views.report(job),
        }

    def _stop(self, name: str) -> None:
        self.jobs.cancel(name)

    def _again(self, name: str | None) -> Updates:
        """Take up the job that this browser asked for last, after a reload."""
        job, parts = self.jobs.get(name or ""), self.parts
        if job is None:
            return {parts["job"]: ""}
        return {parts["job"]: job.name} | self._allowed(idle=job.over)

    def _restyle(self, prompt: str, style: str, model: str) -> str:
        return form.restyled(prompt or "", style, form.styles_of(self.cards[model]))

    def _example(self, sample: Sequence[str], model: str) -> tuple[str, str]:
        return sample[0], form.style_in(sample[0], form.styles_of(self.cards[model]))

    def _concept(self, concept: str | None, style: str, model: str) -> Any:
        import gradio as gr

        return form.restyled(concept, style, form.styles_of(self.cards[model])) if concept else gr.skip()

    def _model(self, model: str) -> Updates:
        """Show what the model's card says, and its defaults."""
        import gradio as gr

        card, parts, inputs = self.cards[model], self.parts, self.inputs
        styles, concepts, examples = form.styles_of(card), form.concepts_of(card), form.examples_of(card)
        values = form.values_of(Request(model=model, prompt="-"), card, {})
        return {
            parts["masthead"]: views.masthead(card.title or card.name, card.summary),
            parts["about"]: form.about(card),
            parts["concepts"]: gr.Dropdown(concepts, value=None, visible=bool(concepts)),
            parts["examples"]: gr.Dataset(samples=examples),
            parts["example_box"]: gr.Column(visible=bool(examples)),
            inputs["prompt"]: gr.Textbox(visible=not card.takes_class),
            inputs["class_label"]: gr.Number(0, visible=card.takes_class),
            inputs["style"]: gr.Radio([form.ANY_STYLE, *styles], value=form.ANY_STYLE, visible=bool(styles)),
            inputs["size"]: gr.Dropdown(form.sizes(card), value=values["size"]),
            inputs["steps"]: gr.Slider(maximum=max(100, values["steps"]), value=values["steps"]),
            inputs["guidance"]: values["guidance"],
            inputs["profile"]: gr.Dropdown(**form.profile_choices(model)),
        }

    def _reuse(self, file: str) -> Updates:
        """Fill the form from a saved picture; nothing that the picture names is opened."""
        import gradio as gr

        parts, inputs = self.parts, self.inputs
        try:
            request = Request.from_file(file)
            if request.model not in self.cards:
                raise RequestError(
                    "model", request.model, f"one of {', '.join(self.cards)}, which this page has"
                )
        except RequestError as error:
            if str(error.given) == str(file):  # not where it lies on the server, which a cut of a long path would still show
                error = RequestError(error.field, Path(file).name, error.allowed)
            words = _sentence(error).replace(str(Path(file)), Path(file).name)
            return {parts["status"]: views.trouble(words), parts["file"]: None}
        card = self.cards[request.model]
        values = form.values_of(request, card, self.methods)
        updates = self._model(request.model) | {inputs[name]: value for name, value in values.items()}
        choices = form.sizes(card)
        if values["size"] not in (value for _, value in choices):
            choices.append((values["size"].replace("x", " × ") + " px", values["size"]))
        updates[inputs["size"]] = gr.Dropdown(choices, value=values["size"])
        updates[inputs["steps"]] = gr.Slider(maximum=max(100, values["steps"]), value=values["steps"])
        updates[inputs["style"]] = gr.Radio([form.ANY_STYLE, *form.styles_of(card)], value=values["style"])
        left_out = "; its starting picture is not filled in" if request.image else ""
        said = (
            f'<div class="pace" role="status">Filled in from {views.safe(Path(file).name)}{left_out}.</div>'
        )
        return updates | {parts["status"]: said, parts["file"]: None}


_SHOWN = ("status", "empty", "example_box", "picture", "gallery", "report", "generate", "stop", "compare")


def _only(others: Sequence[Any]) -> Callable[[bool], Any]:
    """Return the event of a method's switch: turned on, it turns off the `others`, which cannot work beside it."""

    def turn_off(on: bool) -> Any:
        import gradio as gr

        updates = [False if on else gr.skip() for _ in others]
        return updates if len(updates) > 1 else updates[0]

    return turn_off


def _shown(on: bool) -> Any:
    import gradio as gr

    return gr.Column(visible=on)


def _speed_shown(speed: str) -> tuple[Any, str, Any]:
    import gradio as gr

    on = speed == form.ACCELERATED
    return gr.Column(visible=on), speed_note(speed), gr.Button(visible=on)


def _profile_shown(model: str, name: str | None) -> tuple[Any, Any]:
    import gradio as gr

    note = form.profile_note(model, name or "")
    return gr.Column(visible=not name), gr.Markdown(note, visible=bool(note))


def _sentence(error: Exception) -> str:
    text = str(error)
    if isinstance(error, RequestError):
        text = error.field.replace("_", " ") + text.removeprefix(error.field)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _served(path: Path) -> str:
    """Copy a file under gradio's own folder, in a place that nobody can guess, and return that: the same bytes are served."""
    from gradio.utils import get_upload_folder

    target = Path(get_upload_folder(), secrets.token_urlsafe(16), path.name)
    target.parent.mkdir(parents=True)
    shutil.copyfile(path, target)
    return str(target)
