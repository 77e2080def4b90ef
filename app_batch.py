"""The tab Batch: a manifest and its files go in, a plan comes back, and the batch runs in a process of its own.

The tab reads the batch's ledger; nothing is lost when the browser is closed, or the page stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from app_page import House, sentence, served
from app_tables import facts, note, report, size, span, style, table
from app_views import safe, trouble
from pipelines.background import WORKERS, Batches, Standing
from pipelines.jobs import LedgerError
from pipelines.manifest import ManifestError
from pipelines.request import RequestError

if TYPE_CHECKING:
    from pipelines._planning import Plan

EVERY = 2.0
"""Seconds between two looks at a batch."""
SHOWN = 200
"""Problems of a manifest that are shown."""
PICTURES = 12
"""Latest pictures that are shown."""
NEW = "a new batch"
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
_ENDINGS = [
    ".jsonl",
    ".ndjson",
    ".csv",
    ".parquet",
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".mp4",
    ".gif",
    ".txt",
    ".safetensors",
]
_WORDS = {
    "new": "Not begun", "starting": "Starting", "running": "Running", "paused": "Paused", "finished": "Finished",
    "broken": "It could not be begun",
}  # fmt: skip
_HELP = (
    "A manifest is a table with a row for each picture: JSON lines, CSV or Parquet. Its columns are the settings of a picture "
    "(`prompt`, `seed`, `steps`, `accelerators`, ...), and `id`, `n`, `seeds`, `tags`, `output`. Drop it together with the "
    "pictures and LoRA files that it names; it may name no others.\n\n"
    '```\n{"id": "dog", "prompt": "dog, cartoon", "n": 4}\n{"prompt": "a {red|green} apple", "matrix": true, "seed": 7}\n```'
)


class Batch:
    """Check a manifest, begin a batch, watch it, pause it, go on with it."""

    label = "Batch"

    def __init__(self, house: House) -> None:
        self.house = house
        self.batches = Batches(house.folder / "batches")
        self.parts: dict[str, Any] = {}

    def draw(self) -> None:
        """Make the components, inside the tab."""
        parts = self.parts
        gr.HTML(style(), elem_classes="unseen")
        parts["draft"], parts["shown"] = gr.State(None), gr.State(("", -1))
        with gr.Row(elem_id="batch-columns"):
            with gr.Column(scale=5, min_width=300):
                parts["files"] = gr.File(
                    label="Manifest, and the files that it names", file_count="multiple", file_types=_ENDINGS, height=150,
                    elem_id="batch-files", elem_classes="drop",
                )  # fmt: skip
                with gr.Row():
                    parts["into"] = gr.Dropdown(
                        [(NEW, "")], value="", label="Goes into", min_width=150, filterable=False
                    )
                    parts["workers"] = gr.Slider(
                        1,
                        WORKERS,
                        1,
                        step=1,
                        precision=0,
                        label="Worker processes",
                        min_width=150,
                        buttons=[],
                    )
                parts["plan"] = gr.HTML("", elem_id="batch-plan")
                parts["start"] = gr.Button(
                    "Start", variant="primary", size="lg", interactive=False, elem_id="batch-start"
                )
                with gr.Accordion("What a manifest looks like", open=False, elem_classes="folded"):
                    gr.Markdown(_HELP, elem_classes="note")
            with gr.Column(scale=6, min_width=300):
                with gr.Column(elem_classes="stage"):
                    self._standing()
        parts["timer"] = gr.Timer(EVERY, active=False)

    def _standing(self) -> None:
        parts = self.parts
        parts["batch"] = gr.Dropdown(
            [], value=None, label="Your batches", filterable=False, elem_id="batch-chosen", visible=False
        )
        parts["standing"] = gr.HTML(standing_view(None), elem_id="batch-standing")
        with gr.Row(visible=False, elem_id="batch-buttons", elem_classes="actions") as parts["buttons"]:
            for name, words in (
                ("pause", "Pause"), ("resume", "Go on"), ("cancel", "Cancel"), ("retry", "Retry failed"),
                ("export", "Export"),
            ):  # fmt: skip
                parts[name] = gr.Button(words, size="sm", min_width=84, elem_id=f"batch-{name}")
        parts["exported"] = gr.File(label="Exported", visible=False, file_count="multiple", interactive=False)
        parts["gallery"] = gr.Gallery(
            visible=False, show_label=False, label="Made last", columns=6, interactive=False, object_fit="contain", height="auto",
            buttons=["download", "fullscreen"], elem_id="batch-gallery", elem_classes="thumbs",
        )  # fmt: skip

    def connect(self, page: gr.Blocks) -> None:
        """Wire the events; none of them makes a picture."""
        parts = self.parts
        checked = [parts["draft"], parts["plan"], parts["start"]]
        parts["files"].upload(self._check, [parts["files"], parts["into"]], checked, **_PRIVATE)
        parts["files"].clear(_cleared, None, checked, queue=False, **_PRIVATE)
        parts["into"].input(self._check, [parts["files"], parts["into"]], checked, **_PRIVATE)
        look = [parts[name] for name in _SHOWN]
        started = [*checked, parts["files"], *look]
        parts["start"].click(self._start, [parts["draft"], parts["workers"]], started, **_PRIVATE)
        seen = [parts["batch"], parts["shown"]]
        parts["batch"].input(self._look, seen, look, queue=False, **_PRIVATE)
        parts["timer"].tick(self._look, seen, look, queue=False, **_PRIVATE)
        self.house.entered.then(self._first, None, look, queue=False, **_PRIVATE)
        given = [parts["batch"], parts["workers"], parts["shown"]]
        for name, does in (
            ("pause", self._pause),
            ("resume", self._resume),
            ("cancel", self._cancel),
            ("retry", self._retry),
        ):
            parts[name].click(does, given, look, **_PRIVATE)
        parts["export"].click(
            self._export, parts["batch"], [parts["exported"], parts["standing"]], **_PRIVATE
        )

    def _check(self, request: gr.Request, files: Sequence[str] | None, into: str | None) -> Any:
        owner = self.house.session(request)
        if not files:
            return _cleared()
        name = ""
        try:
            name, manifest = self.batches.receive(owner, [Path(file) for file in files], into or "")
            plan = self.batches.plan(name, owner, manifest, self.house.models)
        except ManifestError as error:
            return None, problems_view(error), gr.Button(interactive=False)
        except (RequestError, OSError, LedgerError) as error:
            return None, trouble(self._said(error, name)), gr.Button(interactive=False)
        draft = {"name": name, "manifest": str(manifest)} if plan.missing and plan.fits else None
        words = f"Start: make {len(plan.missing)}" if draft else "Start"
        return draft, plan_view(plan, self._seconds(plan)), gr.Button(words, interactive=draft is not None)

    def _said(self, error: Exception, name: str) -> str:
        return sentence(error).replace(str(self.batches.root / name), "this batch's folder")

    def _seconds(self, plan: Plan) -> float | None:
        """Return the work of one worker in s: by what the folder holds, or by what this page has made with such settings."""
        from pipelines._planning import seconds_of

        if plan.seconds is not None:
            return plan.seconds
        done = self.house.jobs.ledger.jobs(states=("done",), limit=100)
        return seconds_of(plan.missing, [job for job in done if job.item.kind == "generate"])

    def _start(self, request: gr.Request, draft: dict[str, str] | None, workers: float) -> Any:
        parts, owner = self.parts, self.house.session(request)
        if draft is None:
            return {parts["plan"]: trouble("Drop a manifest first.")}
        try:
            self.batches.start(draft["name"], owner, Path(draft["manifest"]), int(workers))
        except (RequestError, OSError, LedgerError) as error:
            return {parts["plan"]: trouble(self._said(error, draft["name"]))}
        cleared = dict(zip((parts["draft"], parts["plan"], parts["start"]), _cleared(), strict=True))
        return cleared | {parts["files"]: None} | self._shown(owner, draft["name"], ("", -1))

    def _first(self, request: gr.Request) -> Any:
        owner = self.house.session(request)
        mine = self.batches.mine(owner)
        return self._shown(owner, mine[0][0] if mine else "", ("", -1))

    def _look(self, request: gr.Request, name: str | None, shown: tuple[str, int]) -> Any:
        return self._shown(self.house.session(request), name or "", shown)

    def _shown(self, owner: str, name: str, shown: Sequence[Any], said: str = "") -> dict[Any, Any]:
        """Return all updates that show how a batch stands; pictures only where there are new ones."""
        parts, mine = self.parts, self.batches.mine(owner)
        names = [(f"{title} ({one})", one) for one, title in mine]
        name = name if name in (one for one, _ in mine) else ""
        update: dict[Any, Any] = {
            parts["batch"]: gr.Dropdown(names, value=name or None, visible=bool(names)),
            parts["into"]: gr.Dropdown([(NEW, ""), *names]),
            parts["buttons"]: gr.Row(visible=bool(name)),
        }
        if not name:
            return update | {
                parts["standing"]: standing_view(None, said),
                parts["timer"]: gr.Timer(active=False),
            }
        try:
            now = self.batches.look(name, owner)
            update |= self._pictures(owner, now, shown)
        except (RequestError, OSError, LedgerError) as error:
            return update | {parts["standing"]: trouble(self._said(error, name))}
        can = {
            "pause": now.state in ("running", "starting"), "resume": now.state == "paused",
            "cancel": bool(now.counts.get("waiting", 0) + now.counts.get("running", 0)),
            "retry": any(now.counts.get(one) for one in ("failed", "poisoned", "cancelled")), "export": bool(now.counts),
        }  # fmt: skip
        update |= {parts[one]: gr.Button(interactive=on) for one, on in can.items()}
        busy = now.state in ("running", "starting")
        return update | {parts["standing"]: standing_view(now, said), parts["timer"]: gr.Timer(active=busy)}

    def _pictures(self, owner: str, now: Standing, shown: Sequence[Any]) -> dict[Any, Any]:
        parts, state = self.parts, (now.name, now.counts.get("done", 0))
        if tuple(shown) == state:
            return {}
        update: dict[Any, Any] = {parts["shown"]: state}
        if shown[0] != now.name:
            update |= {parts["exported"]: gr.File(visible=False)}
        jobs = self.batches.latest(now.name, owner, PICTURES) if state[1] else []
        files = [
            (served(Path(job.files[0])), job.item.id)
            for job in jobs
            if job.files and Path(job.files[0]).is_file()
        ]
        return update | {parts["gallery"]: gr.Gallery(files or None, visible=bool(files))}

    def _pause(self, request: gr.Request, name: str | None, workers: float, shown: tuple[str, int]) -> Any:
        def pause(one: str, owner: str) -> str:
            return "Pausing: what runs is given back." if self.batches.pause(one, owner) else ""

        return self._done(request, name, shown, pause)

    def _resume(self, request: gr.Request, name: str | None, workers: float, shown: tuple[str, int]) -> Any:
        def resume(one: str, owner: str) -> None:
            self.batches.resume(one, owner, int(workers))

        return self._done(request, name, shown, resume)

    def _cancel(self, request: gr.Request, name: str | None, workers: float, shown: tuple[str, int]) -> Any:
        def cancel(one: str, owner: str) -> str:
            return f"{self.batches.cancel(one, owner)} items were cancelled."

        return self._done(request, name, shown, cancel)

    def _retry(self, request: gr.Request, name: str | None, workers: float, shown: tuple[str, int]) -> Any:
        def retry(one: str, owner: str) -> str:
            return f"{self.batches.retry(one, owner, int(workers))} items are tried again."

        return self._done(request, name, shown, retry)

    def _done(self, request: gr.Request, name: str | None, shown: tuple[str, int], does: Any) -> Any:
        """Do something with a batch and show how it stands then."""
        owner = self.house.session(request)
        try:
            said = does(name or "", owner) or ""
        except (RequestError, OSError, LedgerError) as error:
            said = self._said(error, name or "")
        return self._shown(owner, name or "", shown, said)

    def _export(self, request: gr.Request, name: str | None) -> Any:
        owner = self.house.session(request)
        try:
            files = self.batches.export(name or "", owner)
            now = self.batches.look(name or "", owner)
        except (RequestError, OSError, LedgerError) as error:
            return gr.File(visible=False), trouble(self._said(error, name or ""))
        copies = [Path(served(file)) for file in files]
        for one in copies:
            one.write_bytes(without_places(one.read_bytes(), now.folder))
        said = f"Written into the batch's folder: {', '.join(file.name for file in files)}."
        return gr.File([str(one) for one in copies], visible=True), standing_view(now, said)


_SHOWN = (
    "batch", "into", "buttons", "standing", "timer", "pause", "resume", "cancel", "retry", "export", "shown", "exported",
    "gallery",
)  # fmt: skip


def _cleared() -> tuple[None, str, Any]:
    return None, "", gr.Button("Start", interactive=False)


def problems_view(error: ManifestError) -> str:
    """Return every mistake of a manifest in a table, by line."""
    count, more = len(error.problems), len(error.problems) - SHOWN
    told = f"{count} mistake{'s' if count > 1 else ''} in {Path(str(error.given)).name}; nothing was begun."
    rows = [(one.line, one.field, one.given, one.allowed) for one in error.problems[:SHOWN]]
    tail = note(f"and {more} more") if more > 0 else ""
    return trouble(told) + report(table(("line", "field", "given", "allowed"), rows), tail)


def plan_view(plan: Plan, seconds: float | None) -> str:
    """Return what a run would do: items, what is there twice or made already, time and disk."""
    entries, twice = len(plan.manifest.entries), plan.manifest.repeated
    again = f", of them {twice} asked for twice and made once" if twice else ""
    unknown = "not known yet: nothing was made with such settings"
    told = [
        ("items", f"{entries + twice}{again}"), ("made already", plan.done), ("to make", len(plan.missing)),
        ("time", unknown if seconds is None else f"about {span(seconds)} for one worker (estimate)"),
        ("disk", f"about {size(plan.need)} (estimate), {size(plan.free)} free"),
    ]  # fmt: skip
    head = "Nothing is left to make." if not plan.missing else "The manifest is without mistakes."
    full = "" if plan.fits else trouble("There is too little room on the disk; nothing can be begun.")
    line = f'<p class="line" role="status">{head}</p>'
    return report(line, facts(told), *(note(one) for one in plan.remarks)) + full


def standing_view(now: Standing | None, said: str = "") -> str:
    """Return how a batch stands: a bar, counters, pace, workers and what failed."""
    if now is None:
        return (
            f'{note(said)}<div class="welcome"><h2>No batch yet</h2><p>Drop a manifest, look at the plan, press Start. A batch '
            "goes on when this page is closed, and is here again when you come back.</p></div>"
        )
    counts = now.counts
    failed = counts.get("failed", 0) + counts.get("poisoned", 0)
    done, items = counts.get("done", 0), max(1, now.items)
    told = [
        ("done", done),
        ("running", counts.get("running", 0)),
        ("waiting", counts.get("waiting", 0)),
        ("failed", failed),
    ]
    told += [("cancelled", counts["cancelled"])] if counts.get("cancelled") else []
    shown = "".join(
        f'<span class="chip"><b>{count}</b> <span class="name">{name}</span></span>' for name, count in told
    )
    pace = f"{now.pace * 60:.1f} a minute" if now.pace else ""
    left = f"about {span(now.left)} left" if now.left else ""
    clock = " · ".join(one for one in (pace, left) if one)
    busy = " busy" if now.state == "starting" else ""
    workers = table(
        ("worker", "item", "phase", "heard of"),
        [(name, item, phase, f"{heard:.0f} s ago") for name, item, phase, heard in now.workers],
    )
    lost = f"<h3>What failed</h3>{facts(now.failures)}" if now.failures else ""
    place = f'<p class="files">In {safe(now.folder)}; at a terminal: leapfrog batch status FOLDER</p>'
    return (
        f'{note(said)}<div class="pace"><div class="row"><span><b role="status">{_WORDS[now.state]}</b> '
        f'<span class="num">{done} of {now.items or "?"}</span></span><span class="num">{clock}</span></div>'
        f'<div class="bar{busy}" role="progressbar" aria-label="Progress of the batch" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{done / items * 100:.0f}"><i style="width:{done / items:.1%}"></i></div></div>'
        f'<div class="chiprow">{shown}</div>{trouble(now.error)}{report(workers, lost, place)}'
    )


def without_places(data: bytes, folder: str) -> bytes:
    """Return an export without where the page's folder lies."""
    return data.replace(json.dumps(folder)[1:-1].encode() + b"/", b"")
