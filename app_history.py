"""The tab Queue & History: all that a session asked for, waiting, running and done; and the settings inside of dropped files.

Everything stands in the ledgers; this tab lists, moves, cancels and repeats, and hands settings to the tab Create.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

import app_views as views
from app_page import House, sentence, served
from app_records import DATES, Entry, Records, Search, matched
from app_tables import facts, note, report, span, style
from app_views import safe, trouble
from pipelines.jobs import STATES, LedgerError
from pipelines.metadata import read_metadata
from pipelines.request import Request, RequestError, accelerator_kinds

ANY, EXACT = "any", "exact"
_HEADS = ("number", "state", "what", "model", "speed", "from", "asked", "took")
_WIDTHS = ("90px", "110px", "355px", "120px", "150px", "110px", "130px", "85px")
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}


class History:
    """List what was asked for, look at it, change its place in the queue, do it again."""

    label = "Queue & History"

    def __init__(self, house: House) -> None:
        self.house, self.records = house, Records(house)
        self.parts: dict[str, Any] = {}

    def draw(self) -> None:
        """Make the components, inside the tab."""
        parts = self.parts
        gr.HTML(style(), elem_classes="unseen")
        parts["dropped"] = gr.State(None)
        self._filters()
        parts["table"] = gr.Dataframe(
            headers=list(_HEADS), value=[], interactive=False, show_search="none", wrap=False, max_height=420,
            column_widths=list(_WIDTHS), label="Everything you asked for", elem_id="history-table", show_label=False, buttons=[],
        )  # fmt: skip
        parts["told"] = gr.HTML("", elem_id="history-told")
        with gr.Row(elem_id="history-columns"):
            with gr.Column(scale=6, min_width=300, elem_classes="stage"):
                parts["chosen"] = gr.Dropdown([], value=None, label="Choose one", elem_id="history-chosen")
                parts["about"] = gr.HTML(note("Choose a row above, or one here."), elem_id="history-about")
                self._buttons()
                parts["pictures"] = gr.Gallery(
                    visible=False, show_label=False, label="Result", columns=2, interactive=False, object_fit="contain",
                    height="auto", buttons=["download", "fullscreen"], elem_id="history-pictures", elem_classes="big",
                )  # fmt: skip
                parts["clip"] = gr.Video(
                    visible=False, label="Clip", interactive=False, elem_id="history-clip"
                )
                parts["files"] = gr.File(
                    visible=False, label="Original files", file_count="multiple", interactive=False
                )
                parts["report"] = gr.HTML("", elem_id="history-report")
            with gr.Column(scale=5, min_width=300):
                parts["file"] = gr.File(
                    label="Drop a PNG, MP4, GIF or JSON made by Leapfrog", file_types=[".png", ".mp4", ".gif", ".json"],
                    height=150, elem_id="history-drop", elem_classes="drop",
                )  # fmt: skip
                parts["embedded"] = gr.HTML("", elem_id="history-embedded")
                parts["take"] = gr.CheckboxGroup(
                    [], label="Take these over", visible=False, elem_id="history-take"
                )
                parts["apply"] = gr.Button(
                    "Fill in Create with them", visible=False, size="sm", elem_id="history-apply"
                )

    def _filters(self) -> None:
        parts = self.parts
        with gr.Row(elem_id="history-filters"):
            parts["text"] = gr.Textbox(
                "", label="Search", placeholder="prompts, names", max_lines=1, min_width=150
            )
            parts["state"] = gr.Dropdown(
                list(STATES), value=[], multiselect=True, label="States (none: any)", min_width=140
            )
            parts["model"] = gr.Dropdown(
                [(ANY, ANY)], value=ANY, label="Model", min_width=120, filterable=False
            )
            parts["speed"] = gr.Dropdown(
                [ANY, EXACT, *sorted(accelerator_kinds())],
                value=ANY,
                label="Accelerator",
                min_width=130,
                filterable=False,
            )
            parts["date"] = gr.Dropdown(list(DATES), value=ANY, label="When", min_width=120, filterable=False)
            parts["refresh"] = gr.Button(
                "Look again", size="sm", scale=0, min_width=100, elem_id="history-refresh"
            )

    def _buttons(self) -> None:
        with gr.Row(visible=False, elem_id="history-buttons", elem_classes="actions") as self.parts[
            "buttons"
        ]:
            for name, words in (
                ("first", "First"), ("earlier", "Earlier"), ("later", "Later"), ("cancel", "Cancel"), ("retry", "Do it again"),
                ("send", "Settings to Create"),
            ):  # fmt: skip
                self.parts[name] = gr.Button(words, size="sm", min_width=84, elem_id=f"history-{name}")

    def connect(self, page: gr.Blocks) -> None:
        """Wire the events; none of them makes a picture."""
        parts = self.parts
        search = [parts[name] for name in ("text", "state", "model", "speed", "date")]
        listed = [parts[name] for name in ("table", "chosen", "model", "told")]
        shown = [parts[name] for name in _SHOWN]
        self.house.entered.then(self._list, search, listed, queue=False, **_PRIVATE)
        for one in (parts["text"].submit, parts["refresh"].click, *(part.input for part in search[1:])):
            one(self._list, search, listed, queue=False, **_PRIVATE)
        opened = getattr(self.house, "opened", {}).get("History")
        if opened is not None:
            opened.select(self._list, search, listed, queue=False, **_PRIVATE)
        parts["table"].select(self._select, None, [parts["chosen"], *shown], **_PRIVATE)
        parts["chosen"].input(self._show, parts["chosen"], shown, **_PRIVATE)
        for name in ("first", "earlier", "later", "cancel", "retry"):
            parts[name].click(self._doing(name), [parts["chosen"], *search], [*listed, *shown], **_PRIVATE)
        create = self.house.tabs.get("Create")
        if create is None or not hasattr(create, "reuse"):
            return
        form = list(create.inputs.values())
        of_create = [*form, *(one for one in create.parts.values() if hasattr(one, "_id"))]
        of_create = list({one._id: one for one in of_create}.values())
        drop = [parts[name] for name in ("dropped", "embedded", "take", "apply")]
        parts["file"].upload(self._dropped, [parts["file"], *form], drop, **_PRIVATE)
        parts["file"].clear(_nothing, None, drop, queue=False, **_PRIVATE)
        sent = parts["send"].click(
            self._send, [parts["chosen"], *form], [parts["told"], *of_create], **_PRIVATE
        )
        taken = parts["apply"].click(
            self._apply, [parts["dropped"], parts["take"], *form], [parts["embedded"], *of_create], **_PRIVATE
        )
        for one in (sent, taken):
            one.success(None, None, None, js=_TO_CREATE, **_PRIVATE)

    def _list(self, request: gr.Request, *search: Any) -> dict[Any, Any]:
        return self._listed(self.house.session(request), search)

    def _listed(self, owner: str, search: Sequence[Any], said: str = "") -> dict[Any, Any]:
        parts = self.parts
        try:
            found = self.records.find(owner, Search.of(*search))
            models = sorted({one.model for one in self.records.find(owner, Search())})
        except (RequestError, LedgerError, OSError) as error:
            return {parts["told"]: trouble(sentence(error))}
        words = said or ("" if found else "Nothing here yet." if search[0] == "" else "Nothing is like that.")
        return {
            parts["table"]: gr.Dataframe([row_of(one, self._title(one.model)) for one in found]),
            parts["chosen"]: gr.Dropdown([(f"{one.number} {one.state}: {one.words[:60]}", one.name) for one in found]),
            parts["model"]: gr.Dropdown([(ANY, ANY), *((self._title(one), one) for one in models)]),
            parts["told"]: note(words),
        }  # fmt: skip

    def _title(self, model: str) -> str:
        card = self.house.cards.get(model)
        return (card.title if card is not None else "") or Path(model).name

    def _select(self, request: gr.Request, event: gr.SelectData) -> dict[Any, Any]:
        owner, number = self.house.session(request), str((event.row_value or [""])[0])
        found = next((one for one in self.records.find(owner, Search()) if one.number == number), None)
        if found is None:
            return {self.parts["told"]: note("It is not there any more: look again.")}
        return {self.parts["chosen"]: found.name} | self._shown(found)

    def _show(self, request: gr.Request, name: str | None) -> dict[Any, Any]:
        return self._shown(self.records.get(self.house.session(request), name or ""))

    def _shown(self, entry: Entry | None) -> dict[Any, Any]:
        """Return everything that shows one entry: what it is, its pictures as the bytes that were saved, its report."""
        parts = self.parts
        if entry is None:
            update = {parts[name]: gr.skip() for name in _SHOWN}
            return update | {
                parts["about"]: note("Choose a row above, or one here."),
                parts["buttons"]: gr.Row(visible=False),
            }
        job, paths = entry.job, [Path(file) for file in entry.job.files]
        copies = [Path(served(path)) for path in paths if path.is_file()]
        lost = [path.name for path in paths if not path.exists()]
        clips = [str(one) for one in copies if one.suffix == ".mp4"]
        pictures = [(str(one), entry.words) for one in copies if one.suffix != ".mp4"]
        waiting, going = entry.state == "waiting", entry.state in ("waiting", "running")
        told = [
            ("state", entry.state + (f", {job.phase}" if job.phase else "")), ("prompt", entry.words),
            ("model", self._title(entry.model)), ("speed", entry.speed), ("seed", job.item.request.get("seed")),
            ("from", entry.source),
            ("asked", _clock(job.created)), ("took", span(job.ended - job.started) if job.ended and job.started else "–"),
            ("files", ", ".join(path.name for path in paths) or "none"),
        ]  # fmt: skip
        trouble_told = "".join(
            trouble(words)
            for words in (job.error, f"Not there any more: {', '.join(lost)}." if lost else "")
            if words
        )
        again = not going and (entry.state != "done" or bool(lost))
        buttons = {
            "first": waiting,
            "earlier": waiting,
            "later": waiting,
            "cancel": going,
            "retry": again,
            "send": True,
        }
        return {
            parts["about"]: report(facts(told)) + trouble_told, parts["buttons"]: gr.Row(visible=True),
            parts["pictures"]: gr.Gallery(pictures or None, visible=bool(pictures), columns=min(2, max(1, len(pictures)))),
            parts["clip"]: gr.Video(clips[0] if clips else None, visible=bool(clips)),
            parts["files"]: gr.File([str(one) for one in copies] or None, visible=bool(copies)),
            parts["report"]: views.report(entry.whole) if job.report else "",
        } | {parts[name]: gr.Button(interactive=on) for name, on in buttons.items()}  # fmt: skip

    def _doing(self, what: str) -> Any:
        def does(request: gr.Request, name: str | None, *search: Any) -> dict[Any, Any]:
            owner, said = self.house.session(request), ""
            try:
                said = self.records.do(what, owner, name or "")
            except (RequestError, LedgerError, OSError) as error:
                said = sentence(error)
            return self._listed(owner, search, said) | self._shown(self.records.get(owner, name or ""))

        return does

    def _send(self, request: gr.Request, name: str | None, *values: Any) -> dict[Any, Any]:
        entry = self.records.get(self.house.session(request), name or "")
        if entry is None:
            raise gr.Error("Choose a row first.", duration=6)
        found, missing = matched(entry.job.item.request, entry.job.report, self.house.cards)
        if found is None:
            raise gr.Error(safe(" ".join(missing)), duration=10)
        pending = self.house.tabs["Create"].reuse._pending(found, f"number {entry.number}", values)
        return {self.parts["told"]: note(" ".join(missing))} | pending

    def _dropped(self, file: str | None, *values: Any) -> Any:
        """Read what is inside a file; nothing that it names is opened."""
        if not file:
            return _nothing()
        try:
            inside = read_metadata(file)
            given = Request.from_dict(inside["request"])
        except RequestError as error:
            if str(error.given) == file:
                error = RequestError(error.field, Path(file).name, error.allowed)
            return None, trouble(sentence(error).replace(file, Path(file).name)), *_nothing()[2:]
        found, missing = matched(given.to_dict(), inside["report"], self.house.cards)
        if found is None:
            return None, trouble(" ".join(missing)) + report(facts(told_of(given))), *_nothing()[2:]
        rows = self.house.tabs["Create"].reuse.differences(found, values)
        names = [label for label, _, _ in rows]
        words = (
            f"{Path(file).name} would change {len(rows)} settings of Create."
            if rows
            else "Create stands just so already."
        )
        head = f'<p class="line" role="status">{safe(words)}</p>'
        table = views.differences(Path(file).name, rows, []) if rows else ""
        shown = "".join(note(one) for one in missing) + report(head) + table
        dropped = {"request": found.to_dict(), "from": Path(file).name}
        return (
            dropped,
            shown,
            gr.CheckboxGroup(names, value=names, visible=bool(rows)),
            gr.Button(visible=bool(rows)),
        )

    def _apply(self, dropped: dict[str, Any] | None, take: Sequence[str], *values: Any) -> dict[Any, Any]:
        """Fill the form of Create with what was chosen of a dropped file."""
        create = self.house.tabs["Create"]
        if not dropped or not take:
            raise gr.Error("Drop a file and choose what to take over.", duration=6)
        now = dict(zip(create.inputs, values, strict=True))
        labels = {name: str(component.label) for name, component in create.inputs.items()}
        request = dict(dropped["request"])
        if labels["model"] not in take:
            request["model"] = now["model"]
        update = create.reuse.apply({"request": request, "from": dropped["from"]})
        left = {
            create.inputs[name]._id
            for name, label in labels.items()
            if label not in take and name != "new_seed"
        }
        kept = {part: value for part, value in update.items() if part._id not in left}
        return {self.parts["embedded"]: note(f"{len(take)} settings were filled in.")} | kept


_SHOWN = (
    "about", "buttons", "pictures", "clip", "files", "report", "first", "earlier", "later", "cancel", "retry", "send",
)  # fmt: skip
_TO_CREATE = "() => { document.querySelector('#tab-create-button')?.click(); window.scrollTo(0, 0); }"


def row_of(entry: Entry, model: str) -> list[str]:
    """Return an entry as a row of the table."""
    job = entry.job
    took = span(job.ended - job.started) if job.ended and job.started else ""
    step = (
        f" {job.progress['step']}/{job.progress['steps']}"
        if job.progress.get("steps") and not job.over
        else ""
    )
    return [
        entry.number,
        entry.state + step,
        entry.words[:120],
        model,
        entry.speed,
        entry.source,
        _clock(job.created),
        took,
    ]


def told_of(request: Request) -> list[tuple[str, object]]:
    """Return the settings of a request that are not its defaults."""
    from pipelines.request import settings

    changed = {
        one.name: getattr(request, one.name)
        for one in settings()
        if getattr(request, one.name) != one.default
    }
    return [
        (name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, tuple) else value)
        for name, value in changed.items()
    ]


def _nothing() -> tuple[None, str, Any, Any]:
    return None, "", gr.CheckboxGroup([], value=[], visible=False), gr.Button(visible=False)


def _clock(seconds: float) -> str:
    return time.strftime("%d %b %H:%M", time.localtime(seconds)) if seconds else "–"
