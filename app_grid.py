"""The tab Grid: settings along up to three axes, made by the queue, shown in a table whose labels stay in sight.

All grids of a session are one batch of the ledger, so a cell that another grid has made already is not made again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

import app_form as form
import app_rooms as rooms
import app_settings as settings
import app_views as views
from app_given import whole
from app_grid_views import EXAMPLES, counted, drawn, example, fields_for, place_of, sheet
from app_jobs import TOTAL, QueueFull
from app_page import House, sentence, served
from pipelines import grid as grids
from pipelines.grid import Axis, Table, estimate, read_axis, table
from pipelines.jobs import Job as Row
from pipelines.request import LARGEST_SEED, Request, RequestError
from pipelines.timeline import safe

WATCHED = 0.7
"""Seconds between two looks at a grid."""
MOST = 256
"""Most pictures of a grid of the page."""
BEHIND = -1
"""Priority of cells: a single picture that somebody waits for goes first."""
EARLIER = 500
"""Finished jobs that an estimate looks at."""
LATEST = 2**62
NOTHING = ""
_ASKED = ("model", "prompt", "class_label", "steps", "guidance", "seed", "seeds", "exact")


class Grid:
    """Say what changes, see what it would take, make it, look at it."""

    label = "Grid"

    def __init__(self, house: House) -> None:
        self.house = house
        self.parts: dict[str, Any] = {}
        self._watching: dict[str, str] = {}

    def draw(self) -> None:
        """Make the components, inside a tab."""
        parts, card = self.parts, next(iter(self.house.cards.values()))
        parts["made"] = gr.BrowserState("", storage_key="leapfrog-grid", secret="not a secret")
        gr.Markdown(
            "One request, changed along up to three axes: every combination becomes a picture.",
            elem_classes="note",
        )
        with gr.Row():
            parts["model"] = settings.model_control(self.house.cards, min_width=140)
            parts["prompt"] = gr.Textbox(
                "; ".join(one[0] for one in form.examples_of(card)[:1]), label="Prompt", scale=3, min_width=240,
                visible=not card.takes_class,
                elem_id="grid-prompt",
            )  # fmt: skip
            parts["class_label"] = gr.Number(
                0, label="Class number", precision=0, minimum=0, visible=card.takes_class
            )
            parts["steps"], parts["guidance"] = settings.number_controls(card)
            parts["seed"] = gr.Number(
                1, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, min_width=90
            )
        choices = fields_for(self.house.cards)
        for name, words, start in (
            ("x", "Across", "steps"),
            ("y", "Down", "accelerators"),
            ("z", "In blocks", ""),
        ):
            with gr.Row():
                parts[f"{name} field"] = gr.Dropdown(
                    [("nothing", ""), *choices],
                    value=start,
                    label=words,
                    min_width=180,
                    scale=1,
                    elem_id=f"grid-{name}-field",
                )
                parts[f"{name} values"] = gr.Textbox(
                    EXAMPLES.get(start, ""), label=f"{words}: values", min_width=220, scale=3, elem_id=f"grid-{name}-values",
                    placeholder="divided by commas; prompts by |",
                )  # fmt: skip
        with gr.Row():
            parts["seeds"] = gr.Slider(
                1, 8, 1, step=1, precision=0, label="Seeds for each cell", buttons=[], min_width=180
            )
            parts["exact"] = gr.Checkbox(True, label="Make exact pictures to measure against", min_width=180)
        with gr.Row():
            parts["dry"] = gr.Button("What would it take?", elem_id="grid-dry")
            parts["start"] = gr.Button("Start or resume", variant="primary", elem_id="grid-start")
            parts["stop"] = gr.Button("Stop", visible=False, elem_id="grid-stop")
        parts["status"] = gr.HTML("", elem_id="grid-status")
        parts["table"] = gr.HTML("", elem_id="grid-table")
        with gr.Row(visible=False) as parts["failures"]:
            parts["failed"] = gr.Dropdown([], label="Failed cells", min_width=220, scale=3)
            parts["retry"] = gr.Button("Try it again", min_width=120)
            parts["retry all"] = gr.Button("Try all again", min_width=120)
        parts["scatter"] = gr.HTML("", elem_id="grid-scatter")
        with gr.Row(visible=False) as parts["after"]:
            parts["export"] = gr.Button("Export as picture", size="sm", elem_id="grid-export")
        parts["files"] = gr.File(
            visible=False, label="Exported", file_count="multiple", interactive=False, elem_id="grid-files"
        )

    def connect(self, page: gr.Blocks) -> None:
        """Let the parts do something."""
        parts = self.parts
        rooms.connect(page)
        axes = [parts[f"{name} {what}"] for name in "xyz" for what in ("field", "values")]
        given = [*(parts[name] for name in _ASKED), *axes]
        shown = [
            parts[name] for name in ("status", "table", "scatter", "failures", "failed", "after", "stop")
        ]
        for name in "xyz":
            parts[f"{name} field"].change(
                example, parts[f"{name} field"], parts[f"{name} values"], queue=False, **rooms.PRIVATE
            )
        parts["dry"].click(self._dry, given, parts["status"], **rooms.PRIVATE)
        started = parts["start"].click(
            self._start, given, [parts["made"], parts["status"], parts["stop"]], **rooms.PRIVATE
        )
        started.then(self._watch, parts["made"], shown, **rooms.PRIVATE)
        parts["stop"].click(self._stop, parts["made"], None, queue=False, **rooms.PRIVATE)
        for button, cell in (("retry", parts["failed"]), ("retry all", None)):
            inputs = [parts["made"], *([cell] if cell is not None else [])]
            again = parts[button].click(self._retry, inputs, parts["status"], **rooms.PRIVATE)
            again.then(self._watch, parts["made"], shown, **rooms.PRIVATE)
        parts["export"].click(
            self._export,
            parts["made"],
            [parts["files"], parts["status"]],
            concurrency_limit=1,
            **rooms.PRIVATE,
        )
        parts["model"].change(
            self._model,
            parts["model"],
            [parts[name] for name in ("prompt", "class_label", "steps", "guidance")],
            queue=False,
            **rooms.PRIVATE,
        )
        self.house.entered.then(self._watch, parts["made"], shown, **rooms.PRIVATE)

    def asked(self, values: Sequence[Any]) -> grids.Grid:
        """Return the grid that the controls stand for, checked against the models' cards. Raises: RequestError."""
        given = dict(zip(_ASKED, values, strict=False))
        card = self.house.card(given["model"])
        pairs = list(zip(values[len(_ASKED) :: 2], values[len(_ASKED) + 1 :: 2], strict=True))
        texts = [(field, text) for field, text in pairs if field]
        if not texts:
            raise RequestError("axes", "nothing", "at least one thing that changes")
        axes = tuple(self._axis(str(field), str(text or "")) for field, text in texts)
        prompts = next((axis for axis in axes if axis.field == "prompt"), None)
        prompt = str(given["prompt"] or "") if prompts is None else str(prompts.values[0].given)
        request = Request(
            model=given["model"], prompt="" if card.takes_class else prompt, steps=whole(given["steps"]),
            seed=whole(given["seed"]),
            class_label=whole(given["class_label"]) if card.takes_class else None, guidance=given["guidance"],
        )  # fmt: skip
        grid = grids.Grid(
            request=request, axes=axes, seeds=whole(given["seeds"]), references=bool(given["exact"])
        )
        self._check(grid)
        return grid

    def _axis(self, field: str, text: str) -> Axis:
        if field not in [
            value for _, value in fields_for(self.house.cards)
        ]:  # a browser chooses among these, and opens no file
            raise RequestError("axis", field, "one of those in the list")
        axis = read_axis(f"{field}={text}")
        wrong = (
            [one.given for one in axis.values if one.given not in self.house.models]
            if field == "model"
            else []
        )
        if wrong:
            raise RequestError("axis model", wrong[0], f"one of {', '.join(self.house.models)}")
        return axis

    def _check(self, grid: grids.Grid) -> None:
        count = len(grid.work())
        if count > MOST:
            raise RequestError(
                "grid", f"{count} pictures", f"at most {MOST} here; the command line makes larger ones"
            )
        grid.check()

    def _grid(self, made: str | None) -> grids.Grid | None:
        """Return the grid that a browser remembers, held to the same rules as one that is asked for."""
        if not made or len(made) > 50_000:
            return None
        try:
            grid = grids.Grid.from_dict(json.loads(made))
            for axis in grid.axes:
                self._axis(axis.field, axis.text.partition("=")[2])
            request = grid.request
            files = any(
                getattr(request, name)
                for name in ("image", "last_image", "clip", "mask", "controls", "loras", "profile")
            )
            if request.model not in self.house.models or files:
                return None
            self._check(grid)
        except (ValueError, RecursionError):
            return None
        return grid

    def _dry(self, *values: Any) -> str:
        try:
            grid = self.asked(values)
            told = estimate(grid.work(), self.house.jobs.ledger.jobs(states=("done",), limit=EARLIER))
        except (RequestError, OSError) as error:
            return views.trouble(_told(error))
        cells = {cell.key for cell in grid.cells()}
        extra = len(grid.work()) - len(cells)
        more = f" {extra} of them are exact pictures to measure against." if extra else ""
        return f'<div class="pace" role="status">{safe(f"{told}.{more}")}</div>'

    def _start(self, request: gr.Request, *values: Any) -> tuple[Any, str, Any]:
        """Put the cells into the queue; those that are there stay, those that were stopped go on."""
        ledger, owner = self.house.jobs.ledger, self.house.session(request)
        try:
            grid = self.asked(values)
            items = grid.items(
                batch=batch_of(owner),
                owner=owner,
                folder=self._folder(owner),
                tags={"source": "grid"},
                priority=BEHIND,
            )
            if ledger.counts()["waiting"] + len(items) > TOTAL:
                raise QueueFull(
                    f"{ledger.counts()['waiting']} pictures are waiting already; try again when some are done."
                )
            ledger.verify(batch_of(owner))
            rows = ledger.add(items)
            for row in rows:
                if row.state == "cancelled":
                    ledger.retry(name=row.name, states=("cancelled",))
            self.house.jobs.start()
        except (RequestError, QueueFull, OSError) as error:
            return gr.skip(), views.trouble(_told(error)), gr.skip()
        return json.dumps(grid.to_dict()), "", gr.Button(visible=True)

    async def _watch(self, request: gr.Request, made: str | None) -> AsyncIterator[dict[Any, Any]]:
        """Look at the cells until all are over; closing the browser ends the looking, not the work."""
        owner, ledger = self.house.session(request), self.house.jobs.ledger
        grid = await asyncio.to_thread(self._grid, made)
        if grid is None:
            yield {self.parts["stop"]: gr.Button(visible=False)}
            return
        me, session = secrets.token_hex(6), str(request.session_hash)
        self._watching[session] = me
        wanted = {cell.key for cell in grid.work()}
        since = ledger.changes(LATEST, owner=owner)[0]
        rows = {
            row.key: row
            for row in ledger.jobs(batch=batch_of(owner), owner=owner, limit=-1)
            if row.key in wanted
        }
        seen: object = None
        while self._watching.get(session) == me:
            state = sorted((key, row.state) for key, row in rows.items())
            if state != seen:
                found = await asyncio.to_thread(table, grid, list(rows.values()))
                yield self._shown(found, rows)
            seen = state
            if all(row.over for row in rows.values()):
                break
            await asyncio.sleep(WATCHED)
            since, changed = ledger.changes(since, owner=owner)
            rows |= {
                row.key: row for row in changed if row.key in wanted and row.item.batch == batch_of(owner)
            }
        if self._watching.get(session) == me:
            del self._watching[session]

    def _shown(self, found: Table, rows: Mapping[str, Row]) -> dict[Any, Any]:
        parts = self.parts
        failed = [(f"{place_of(found, place)}: {one.error[:80]}", one.job) for place, one in found.cells.items()
                  if one.state in ("failed", "poisoned")]  # fmt: skip
        over = all(row.over for row in rows.values())
        return {
            parts["status"]: counted(list(rows.values())) if rows else "",
            parts["table"]: sheet(found) if rows else "",
            parts["scatter"]: drawn(found),
            parts["failures"]: gr.Row(visible=bool(failed)),
            parts["failed"]: gr.Dropdown(failed, value=failed[0][1] if failed else None),
            parts["after"]: gr.Row(visible=any(one.state == "done" for one in found.cells.values())),
            parts["stop"]: gr.Button(visible=not over),
        }

    def _stop(self, request: gr.Request, made: str | None) -> None:
        owner, grid = self.house.session(request), self._grid(made)
        for row in self._rows(owner, grid):
            if not row.over:
                self.house.jobs.ledger.cancel(name=row.name, owner=owner)

    def _retry(self, request: gr.Request, made: str | None, job: str | None = None) -> str:
        owner, again = self.house.session(request), 0
        for row in self._rows(owner, self._grid(made)):
            if row.state in ("failed", "poisoned") and job in (None, row.name):
                again += self.house.jobs.ledger.retry(name=row.name)
        return "" if again else views.trouble("There is nothing to try again.")

    def _export(self, request: gr.Request, made: str | None) -> tuple[Any, str]:
        from pipelines._grid_sheets import export
        from pipelines.result import SaveError

        owner, grid = self.house.session(request), self._grid(made)
        rows = self._rows(owner, grid)
        if grid is None or not rows:
            return gr.skip(), views.trouble("There is no grid to export yet.")
        folder = Path(self._folder(owner))
        try:
            files = export(table(grid, rows), folder)
        except SaveError as error:
            return gr.skip(), views.trouble(_told(error))
        names = ", ".join(one.name for one in files)
        said = f"Saved as {names} in {folder.parent.name}/{folder.name} of the output folder."
        return gr.File(
            [served(one) for one in files], visible=True
        ), f'<div class="pace" role="status">{safe(said)}</div>'

    def _rows(self, owner: str, grid: grids.Grid | None) -> list[Row]:
        if grid is None:
            return []
        wanted = {cell.key for cell in grid.work()}
        found = self.house.jobs.ledger.jobs(batch=batch_of(owner), owner=owner, limit=-1)
        return [row for row in found if row.key in wanted]

    def _folder(self, owner: str) -> str:
        return str(self.house.folder / "grids" / hashlib.sha256(owner.encode()).hexdigest()[:12])

    def _model(self, model: str) -> tuple[Any, Any, Any, Any]:
        card = self.house.cards[model]
        prompt, number = gr.Textbox(visible=not card.takes_class), gr.Number(visible=card.takes_class)
        return prompt, number, *settings.numbers_of(card)


def batch_of(owner: str) -> str:
    """Return what all grids of a session are called together."""
    return f"grid-{hashlib.sha256(owner.encode()).hexdigest()[:24]}"


def _told(error: Exception) -> str:
    return sentence(error) if isinstance(error, RequestError | QueueFull) else str(error)
