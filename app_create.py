"""The tab Create: from a form to pictures. No event runs a network: one submits a job, another watches it until it is over."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr

import app_form as form
import app_given as given
import app_shown as shown
import app_speed as speed
import app_tasks as tasks
import app_tokens as tokens
import app_views as views
from app_jobs import QueueFull
from app_layout import Layout
from app_page import House, Presses, sentence, served
from app_reuse import Reuse
from app_settings import folder_of, models_update
from pipelines import catalog
from pipelines.request import Request, RequestError

Updates = dict[Any, Any]

WATCHED = 0.2
"""Seconds between two looks at a job."""
_FORGET = """(shown) => (shown ?? "").includes('role="alert"') ? "" : shown"""
"""Takes an error away when something new is asked for: the same words once more would be no news to anybody."""
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_QUICK: dict[str, Any] = _PRIVATE | {"queue": False}


class Create(Layout):
    """Ask for pictures, watch them being made, and see how they were made."""

    label = "Create"

    def __init__(self, house: House) -> None:
        super().__init__(house.cards)
        self.house, self.jobs = house, house.jobs
        self.uploads = given.Uploads(house.jobs.ledger.path.parent / "uploads" / "page")
        self.uploads.sweep()
        self.output = house.folder.name
        fresh = set(house.models) <= set(catalog.shipped()) and not self.jobs.ledger.counts()["done"]
        self.newcomer = fresh or not house.models
        self.reuse, self.presses = Reuse(self), Presses()

    def connect(self, page: gr.Blocks) -> None:
        """Connect what is pressed, typed and dropped with what happens then."""
        self._connect_runs(page)
        self._connect_form()
        self._connect_notes()
        self._connect_first()
        self.given.connect()
        self.reuse.connect(self._model_parts())

    def _connect_runs(self, page: gr.Blocks) -> None:
        inputs, parts = self.inputs, self.parts
        every = [parts["written"], *inputs.values()]
        asked = [parts[name] for name in ("job", "remembered", "status", "generate", "stop", "written")] + [
            inputs["seed"]
        ]
        seen = [parts[name] for name in (*shown.PARTS, "status", "preview", "generate", "stop")]
        for name in ("generate", "measure", "compare", "queue"):  # first: what one press does is done one after the other
            parts[name].click(None, parts["status"], parts["status"], js=_FORGET, **_PRIVATE)
        for name, event in (("generate", self._submit), ("measure", self._measure)):
            started = parts[name].click(event, every, asked, **_PRIVATE)
            started.then(self._watch, parts["job"], seen, **_PRIVATE)
        compared = parts["compare"].click(self._compare, parts["job"], asked, **_PRIVATE)
        compared.then(self._watch, parts["job"], seen, **_PRIVATE)
        parts["queue"].click(
            self._add, every, [parts["status"], parts["written"], inputs["seed"]], **_PRIVATE
        )
        parts["stop"].click(self._stop, parts["job"], None, **_QUICK)
        again = self.house.entered.then(self._again, parts["remembered"], asked, **_PRIVATE)
        again.then(self._watch, parts["job"], seen, **_PRIVATE)
        parts["onward"].click(
            self._onward, [parts["job"], inputs["model"]], [inputs["image"], inputs["task"]], **_PRIVATE
        )

    def _connect_form(self) -> None:
        inputs, parts = self.inputs, self.parts
        restyle = [inputs["prompt"], inputs["style"], inputs["model"]]
        inputs["style"].input(self._restyle, restyle, inputs["prompt"], **_QUICK)
        parts["examples"].click(self._example, [parts["examples"], inputs["model"]], restyle[:2], **_QUICK)
        put = [inputs["prompt"], parts["concepts"]]
        parts["concepts"].input(self._concept, [parts["concepts"], *restyle[1:]], put, **_QUICK)
        seeds = [inputs["seed"], inputs["new_seed"]]
        parts["die"].click(
            lambda: (str(secrets.randbelow(form.LARGEST_RANDOM_SEED)), False), None, seeds, **_QUICK
        )
        inputs["seed"].input(lambda: False, None, inputs["new_seed"], **_QUICK)
        inputs["profile"].change(
            _profile_shown,
            [inputs["model"], inputs["profile"]],
            [parts["by_hand"], parts["profile_note"]],
            **_QUICK,
        )
        for name in self.methods:
            chosen = [inputs[other] for other in self.methods if self.rivals(name, other)]
            if chosen:
                inputs[name].input(_only(chosen), inputs[name], chosen, **_QUICK)
            inputs[name].change(_shown, inputs[name], parts[f"{name} settings"], **_QUICK)
        # not `input`: a list says that whenever it loses the focus, and what was typed since would be lost
        inputs["model"].change(
            self._other_model, [inputs["model"], parts["form_of"]], self._model_parts(), **_QUICK
        )

    def _connect_notes(self) -> None:
        """Keep the lines about tokens, speed and time true while the form changes."""
        inputs, parts = self.inputs, self.parts
        written = [inputs[name] for name in ("prompt", "model", "style", "task")]
        gr.on(
            [inputs["prompt"].change, inputs["task"].change], self._prompted, written, [parts["tokens"], inputs["style"]],
            trigger_mode="always_last", **_QUICK,
        )  # fmt: skip
        noted = [parts[name] for name in ("methods", "speed_note", "measure", "estimate")]
        names = ("model", "size", "steps", "images", "speed", "frames", "profile", "scheduler", "guidance")
        asked = [inputs[name] for name in names]
        changes = [one.change for one in asked]
        gr.on(changes, self._notes, asked, noted, trigger_mode="always_last", **_QUICK)
        self.house.entered.then(self._notes, asked, noted, **_QUICK)
        parts["report"].change(self._notes, asked, noted, **_QUICK)  # a finished run has taught something

    def _connect_first(self) -> None:
        self.house.entered.then(self.renewed, self.inputs["model"], self.renewing(), **_QUICK)
        self._connect_cards()

    def _connect_cards(self) -> None:
        """Let the cards of the first screen choose the built-in model, or lead to the tab Models."""
        self.first_screen.connect()
        chosen = [*self._model_parts(), self.parts["first_box"]]
        used = self.first_screen.parts["builtin"].click(self._builtin, None, chosen, **_QUICK)
        used.then(
            None, None, None, js="() => document.querySelector('#prompt textarea')?.focus()", **_PRIVATE
        )

    def request_of(self, values: Sequence[Any], owner: str, written: str | None = None) -> Request:
        """Return the request that the form stands for. Raises: RequestError."""
        told = dict(zip(self.inputs, values, strict=True))
        card = self.house.card(told["model"])
        more = given.fields_of(told, card, self.uploads.of(owner))
        request = form.request_of(
            told, self.methods, takes_class=card.takes_class, written=written, more=more
        )
        if told["speed"] in speed.PLAIN:
            request = request.replace(**speed.choose(told["speed"], request, card).fields())
        given.check(request, card)
        return request

    def _submit(self, browser: gr.Request, written: str | None, *values: Any) -> Updates:
        return self._asked(browser, written, values)

    def _measure(self, browser: gr.Request, written: str | None, *values: Any) -> Updates:
        """Compare what the speed stands for with exact; without a prompt, on an example of the model."""
        told = dict(zip(self.inputs, values, strict=True))
        card = self.cards.get(told["model"], self.first)
        if not card.takes_class and not (told["prompt"] or "").strip():
            told["prompt"] = next((row[0] for row in form.examples_of(card)), "a picture")
        return self._asked(browser, written, tuple(told.values()), comparing=True)

    def _asked(
        self, browser: gr.Request, written: str | None, values: Sequence[Any], *, comparing: bool = False
    ) -> Updates:
        parts, owner = self.parts, self.house.session(browser)
        try:
            request = self.request_of(values, owner, written)
            one, ending = request.one(0) if comparing else request, self._ending(request, values)
            job = self.presses.once(
                owner, (written, tuple(values), comparing),
                lambda: self.jobs.submit(one, owner=owner, comparing=comparing, ending=ending, **self._saving(values)),
                lambda job: self.jobs.refresh(job).over,
            )  # fmt: skip
        except (RequestError, QueueFull) as error:
            return {parts["job"]: "", parts["status"]: views.trouble(sentence(error))}
        seed = str(job.request.seed)
        return self._begun(job) | {parts["written"]: seed, self.inputs["seed"]: seed}

    def _compare(self, browser: gr.Request, name: str) -> Updates:
        """Make the shown picture exactly too, with the same seed, and measure both."""
        owner = self.house.session(browser)
        job = self.jobs.get(name, owner)
        if job is None or not job.over:
            return {self.parts["status"]: views.trouble("There is no finished picture to compare.")}
        try:
            return self._begun(self.jobs.submit(job.request.one(0), owner=owner, comparing=True))
        except (RequestError, QueueFull) as error:
            return {self.parts["status"]: views.trouble(sentence(error))}

    def _add(self, browser: gr.Request, written: str | None, *values: Any) -> Updates:
        """Put a request in the queue without watching it."""
        parts, owner = self.parts, self.house.session(browser)
        try:
            request = self.request_of(values, owner, written)
            self.jobs.submit(
                request, owner=owner, ending=self._ending(request, values), **self._saving(values)
            )
        except (RequestError, QueueFull) as error:
            return {parts["status"]: views.trouble(sentence(error))}
        what = "One picture was" if request.images == 1 else f"{request.images} pictures were"
        gr.Info(f"{what} added to the queue.")
        return {parts["written"]: str(request.seed), self.inputs["seed"]: str(request.seed)}

    def _ending(self, request: Request, values: Sequence[Any]) -> str:
        """Return the file type that was chosen for a clip; "" for a picture."""
        clip = tasks.TASKS[tasks.task_of(request, self.cards[request.model])].clip
        return str(dict(zip(self.inputs, values, strict=True))["file_type"]) if clip else ""

    def _saving(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the folder that was chosen, and whether the picture is to be seen while it is made. Raises: RequestError."""
        told = dict(zip(self.inputs, values, strict=True))
        return {
            "folder": folder_of(self.jobs.folder, told["folder"]),
            "tags": {"preview": bool(told["preview"])},
        }

    def _begun(self, job: Any) -> Updates:
        parts = self.parts
        begun = {parts["job"]: job.name, parts["remembered"]: job.name, parts["status"]: views.progress(job)}
        return begun | self._allowed(idle=job.over)

    def _allowed(self, *, idle: bool) -> Updates:
        """Let a run be started while nothing runs, and be stopped while something does."""
        can = {"generate": idle, "stop": not idle}
        return {self.parts[name]: gr.Button(interactive=on) for name, on in can.items()}

    async def _watch(self, browser: gr.Request, name: str) -> AsyncIterator[Updates]:
        """Look at a job until it is over; closing the tab ends the looking, not the job."""
        parts, last, painted = self.parts, "", ""
        job = await asyncio.to_thread(self.jobs.get, name, self.house.session(browser))
        if job is None:
            yield self._allowed(idle=True)
            return
        while not job.over:
            line = views.progress(job, await asyncio.to_thread(self.jobs.ahead, job))
            picture = views.preview(job)
            if (line, picture) != (last, painted):
                yield {parts["status"]: line} | ({parts["preview"]: picture} if picture != painted else {})
            last, painted = line, picture
            await asyncio.sleep(WATCHED)
            await asyncio.to_thread(self.jobs.refresh, job)
        found = shown.updates(job, parts, self.cards.get(job.request.model)) if job.state == "done" else {}
        yield {parts["status"]: views.ended(job), parts["preview"]: ""} | self._allowed(idle=True) | found

    def _stop(self, browser: gr.Request, name: str) -> None:
        self.jobs.cancel(name, self.house.session(browser))

    def _again(self, browser: gr.Request, name: str | None) -> Updates:
        """Take up the job that this browser asked for last, after a reload."""
        job = self.jobs.get(name or "", self.house.session(browser))
        if job is None:
            return {self.parts["job"]: ""} | self._allowed(idle=True)
        return {self.parts["job"]: job.name} | self._allowed(idle=job.over)

    def _onward(self, browser: gr.Request, name: str, model: str) -> Updates:
        """Put the shown picture where a picture to start from is asked for."""
        job = self.jobs.get(name, self.house.session(browser))
        task = "animate" if self.cards[model].task == "text-to-video" else "image"
        if job is None or not job.paths or tasks.possible(self.cards[model])[task]:
            return {self.inputs["task"]: gr.skip()}
        return {self.inputs["image"]: served(job.paths[-1]), self.inputs["task"]: task}

    def _prompted(self, prompt: str, model: str, style: str, task: str) -> tuple[str, Any]:
        """Count a prompt, or each scene of a story, and let the choice of a style follow what is written."""
        card = self.cards.get(model, self.first)
        found = form.style_in(prompt or "", form.styles_of(card))
        return tokens.line(prompt, card, story=task == "story"), gr.skip() if found == style else found

    def _notes(self, *values: Any) -> Updates:
        """Return what is shown for a speed, the sentence about it, and how long a run will take."""
        parts = self.parts
        model, size, steps, images, chosen, frames, name, scheduler, guidance = values
        if model not in self.house.models:
            return {parts["estimate"]: "", parts["measure"]: gr.Button(visible=False)}
        card = self.cards[model]
        width, _, height = str(size or "").partition("x")
        try:
            request = Request(
                model=model, prompt="" if card.takes_class else "-", class_label=0 if card.takes_class else None,
                width=int(width) if width else None, height=int(height) if height else None, steps=int(steps), images=int(images),
                scheduler=scheduler, guidance=guidance,
                frames=int(frames) if frames and card.task == "text-to-video" else None,
            )  # fmt: skip
        except (RequestError, ValueError, TypeError):  # half typed
            return {parts["estimate"]: ""}
        choice = speed.Choice(speed.CUSTOM) if chosen == speed.CUSTOM else speed.choose(chosen, request, card)
        words, open_question = speed.sentence(choice, request, card, self.jobs.ledger)
        asked = request if chosen == speed.EXACT else request.replace(**choice.fields())
        time = "" if chosen == speed.CUSTOM and not name else speed.estimate(asked, card, self.jobs.ledger)
        return {
            parts["methods"]: gr.Column(visible=chosen == speed.CUSTOM),
            parts["speed_note"]: views.note(words),
            parts["measure"]: gr.Button(visible=open_question),
            parts["estimate"]: views.note(time),
        }

    def _restyle(self, prompt: str, style: str, model: str) -> str:
        return form.restyled(prompt or "", style, form.styles_of(self.cards[model]))

    def _example(self, sample: Sequence[str], model: str) -> tuple[str, str]:
        return sample[0], form.style_in(sample[0], form.styles_of(self.cards[model]))

    def _concept(self, concept: str | None, style: str, model: str) -> tuple[Any, Any]:
        """Put a thing into the prompt, once: the list chooses nothing afterwards."""
        if not concept:
            return gr.skip(), gr.skip()
        return form.restyled(concept, style, form.styles_of(self.cards[model])), None

    def _model_parts(self) -> list[Any]:
        """Return the components that another model changes."""
        names = ("about", "concepts", "examples", "example_box", "refused", "tokens", "form_of")
        return [*self.inputs.values(), *(self.parts[name] for name in names)]

    def _other_model(self, model: str, known: str) -> Updates:
        """Show what a chosen model's card says, unless the form is this model's already."""
        return {self.parts["form_of"]: gr.skip()} if model == known else self._model(model)

    def _model(self, model: str) -> Updates:
        """Show what the model's card says, and its defaults."""
        card, parts, inputs = self.cards[model], self.parts, self.inputs
        styles, concepts, examples = form.styles_of(card), form.concepts_of(card), form.examples_of(card)
        values = form.values_of(Request(model=model, prompt="-"), card, {})
        return self.given.of_model(card) | {
            parts["form_of"]: model,
            parts["about"]: form.about(card),
            parts["concepts"]: gr.Dropdown(concepts, value=None, visible=bool(concepts)),
            parts["examples"]: gr.Dataset(samples=examples),
            parts["example_box"]: gr.Column(visible=bool(examples)),
            parts["tokens"]: tokens.line("", card),
            inputs["prompt"]: gr.Textbox(visible=not card.takes_class),
            inputs["class_label"]: gr.Number(0, visible=card.takes_class),
            inputs["style"]: gr.Radio([form.ANY_STYLE, *styles], value=form.ANY_STYLE, visible=bool(styles)),
            inputs["size"]: gr.Dropdown(form.sizes(card), value=values["size"]),
            inputs["steps"]: gr.Slider(maximum=max(100, values["steps"]), value=values["steps"]),
            inputs["guidance"]: values["guidance"],
            inputs["profile"]: gr.Dropdown(**form.profile_choices(model)),
        }

    def renewed(self, model: str | None) -> Updates:
        """Offer the models that are here now; one that is gone gives way to the first, with its form."""
        if model in self.house.models or not self.house.models:
            return {self.inputs["model"]: models_update(self.cards)}
        first = self.house.models[0]
        shown = {
            self.inputs["model"]: models_update(self.cards, first),
            self.parts["first_box"]: gr.Column(visible=False),
        }
        return self._model(first) | shown | {self.parts["empty"]: views.empty()}

    def renewing(self) -> list[Any]:
        """Return the components that `renewed` changes."""
        return [*self._model_parts(), self.parts["first_box"], self.parts["empty"]]

    def _builtin(self) -> Updates:
        name = next((one for one in self.cards if one in catalog.shipped()), None)
        if name is None:
            return {self.parts["first_box"]: gr.Column(visible=True)}
        return self._model(name) | {
            self.inputs["model"]: name,
            self.parts["first_box"]: gr.Column(visible=False),
        }


def _only(others: Sequence[Any]) -> Callable[[bool], Any]:
    """Return the event of a method's switch: turned on, it turns off the `others`, which cannot work beside it."""

    def turn_off(on: bool) -> Any:
        updates = [False if on else gr.skip() for _ in others]
        return updates if len(updates) > 1 else updates[0]

    return turn_off


def _shown(on: bool) -> Any:
    return gr.Column(visible=on)


def _profile_shown(model: str, name: str | None) -> tuple[Any, Any]:
    note = form.profile_note(model, name or "")
    return gr.Column(visible=not name), gr.Markdown(note, visible=bool(note))
