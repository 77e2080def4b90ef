"""Settings from a picture: what it would change in the form is shown first. Nothing that it names is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

import app_form as form
import app_given as given
import app_views as views
from app_page import sentence
from app_records import matched
from app_speed import CUSTOM
from pipelines.metadata import read_metadata
from pipelines.request import WITHHELD, Request, RequestError

if TYPE_CHECKING:
    from app_create import Create

_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_SAID = ("new_seed", "style", "profile", "file_type", "folder", "preview")
"""Controls that no picture tells of."""


class Reuse:
    """The drop box, the table of differences and the two buttons below it.

    Args:
        create: the tab, with its inputs and parts.
    """

    def __init__(self, create: Create) -> None:
        self.create = create

    def connect(self, of_model: list[Any]) -> None:
        """Connect drop, "Reuse settings", "Apply all" and "Leave as it is"."""
        parts, values = self.create.parts, list(self.create.inputs.values())
        shown = [parts[name] for name in ("pending", "diff_box", "diff", "status", "file")]
        parts["file"].upload(self.dropped, [parts["file"], *values], shown, **_PRIVATE)
        parts["again"].click(self.same, [parts["job"], *values], shown, **_PRIVATE)
        changed = [*of_model, parts["pending"], parts["diff_box"], parts["status"]]
        parts["apply"].click(self.apply, parts["pending"], changed, **_PRIVATE)
        parts["leave"].click(
            lambda: (None, gr.Column(visible=False)),
            None,
            [parts["pending"], parts["diff_box"]],
            queue=False,
            **_PRIVATE,
        )

    def dropped(self, file: str | None, *values: Any) -> dict[Any, Any]:
        """Read a file that was dropped, and show what it would change."""
        parts = self.create.parts
        if not file:
            return {parts["file"]: None}
        try:
            request = Request.from_file(file)
            if (
                request.model not in self.create.cards
            ):  # a file calls a folder by its name alone: its weights tell
                request = (
                    matched(request.to_dict(), read_metadata(file)["report"], self.create.cards)[0] or request
                )
            self._check(request)
        except RequestError as error:
            if str(error.given) == str(
                file
            ):  # not where it lies on the server, which a cut of a long path would still show
                error = RequestError(error.field, Path(file).name, error.allowed)
            words = sentence(error).replace(str(Path(file)), Path(file).name)
            return {parts["status"]: views.trouble(words), parts["file"]: None}
        return self._pending(request, Path(file).name, values) | {parts["file"]: None}

    def same(self, browser: gr.Request, name: str, *values: Any) -> dict[Any, Any]:
        """Show what the settings of the shown job would change."""
        job = self.create.jobs.get(name, self.create.house.session(browser))
        if job is None:
            return {self.create.parts["diff_box"]: gr.Column(visible=False)}
        return self._pending(job.request, "this result", values)

    def apply(self, pending: dict[str, Any] | None) -> dict[Any, Any]:
        """Fill the form."""
        create = self.create
        parts, inputs = create.parts, create.inputs
        if not pending:
            return {parts["diff_box"]: gr.Column(visible=False)}
        request = Request.from_dict(pending["request"])
        self._check(request)
        card = create.cards[request.model]
        values = form.values_of(request, card, create.methods)
        untold = ("folder", "preview", *(name for name, value in values.items() if value == WITHHELD))
        values = {name: value for name, value in values.items() if name not in untold}
        updates = create._model(request.model) | {inputs[name]: value for name, value in values.items()}
        choices = form.sizes(card)
        if values["size"] not in (value for _, value in choices):
            choices.append((values["size"].replace("x", " × ") + " px", values["size"]))
        updates[inputs["size"]] = gr.Dropdown(choices, value=values["size"])
        updates[inputs["steps"]] = gr.Slider(maximum=max(100, values["steps"]), value=values["steps"])
        updates[inputs["style"]] = gr.Radio([form.ANY_STYLE, *form.styles_of(card)], value=values["style"])
        missing = given.left_out(request, card)
        more = f"; to be given again: {', '.join(missing)}" if missing else ""
        said = f'<div class="pace" role="status">Filled in from {views.safe(pending["from"] + more)}.</div>'
        return updates | {
            parts["status"]: said,
            parts["pending"]: None,
            parts["diff_box"]: gr.Column(visible=False),
        }

    def _check(self, request: Request) -> None:
        cards = self.create.cards
        if request.model not in cards:
            raise RequestError("model", request.model, f"one of {', '.join(cards)}, which this page has")

    def _pending(self, request: Request, source: str, values: tuple[Any, ...]) -> dict[Any, Any]:
        parts, card = self.create.parts, self.create.cards[request.model]
        rows = self.differences(request, values)
        missing = given.left_out(request, card)
        return {
            parts["pending"]: {"request": request.to_dict(), "from": source},
            parts["diff_box"]: gr.Column(visible=True),
            parts["diff"]: views.differences(source, rows, missing),
            parts["status"]: "",
        }

    def differences(self, request: Request, values: tuple[Any, ...]) -> list[tuple[str, str, str]]:
        """Return (control, value now, value in the file) of every control that would change."""
        create = self.create
        now = dict(zip(create.inputs, values, strict=True))
        then = form.values_of(request, create.cards[request.model], create.methods)
        rows = []
        for name, component in create.inputs.items():
            method = name.partition(".")[0]
            unused = method in create.methods and not (now[method] and now["speed"] == CUSTOM)
            unused = unused and not (then[method] and then["speed"] == CUSTOM)
            if name in _SAID or unused or then[name] == WITHHELD or _words(now[name]) == _words(then[name]):
                continue
            if then[name] is None and now[name]:  # a file that was given stays out of a picture's settings
                continue
            rows.append((component.label, _words(now[name]) or "empty", _words(then[name]) or "empty"))
        return rows


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return f"{value:g}" if abs(value) < 1e6 else str(int(value))
    return "" if value is None else str(value)
