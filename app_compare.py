"""The tab Compare: two results side by side, on their original bytes, with what differs in numbers and in words.

Differs: nothing is converted on the way to the eye; what is shown are served copies of the files themselves.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

import app_rooms as rooms
import app_views as views
from app_compare_views import numbers, viewer
from app_jobs import QueueFull
from app_page import House, sentence
from app_pairs import Newest, Pairs
from app_settings import Choice
from pipelines.jobs import Job as Row
from pipelines.metadata import read_metadata
from pipelines.request import Request, RequestError

LISTED = 100
"""Newest results to choose from."""
WATCHED = 0.3
"""Seconds between two looks at a job."""
AT_ONCE = 2
"""Comparisons measured at the same time."""
SMALL = 192
"""Pictures up to this width, in px, are enlarged without smoothing."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".mp4", ".gif")
NOTHING = '<div class="room"><p class="hint">Choose two results, or bring your own files.</p></div>'
FILMS = (".mp4",)
_ASK = "(a, b, uploads) => [a, b, uploads, window.leapfrogAsked = (window.leapfrogAsked ?? 0) + 1]"
"""Counts what a page asks for, in the page itself: what reaches the server in another order is still known by its number."""


class Compare:
    """Choose two results and look at what differs."""

    label = "Compare"

    def __init__(self, house: House) -> None:
        self.house = house
        self.parts: dict[str, Any] = {}
        self.pairs, self.newest = Pairs(), Newest()

    def draw(self) -> None:
        """Make the components, inside a tab."""
        parts = self.parts
        parts["uploads"] = gr.State({})
        parts["asked"] = gr.Number(0, visible=False, precision=0)
        parts["job"] = gr.State("")
        gr.Markdown(
            "Two results of the same size, beside each other on their original bytes.", elem_classes="note"
        )
        with gr.Row():
            for side in "ab":
                with gr.Column(min_width=280):
                    parts[side] = Choice(
                        [], label=f"Result {side.upper()}", elem_id=f"compare-{side}", value=None
                    )
                    parts[f"upload {side}"] = gr.UploadButton(
                        f"Bring a file for {side.upper()}",
                        file_types=list(ENDINGS),
                        size="sm",
                        elem_id=f"compare-upload-{side}",
                    )
        with gr.Row():
            parts["refresh"] = gr.Button("Look for new results", size="sm")
            parts["exact"] = gr.Button("A against its exact twin", size="sm", elem_id="compare-exact")
            parts["stop"] = gr.Button("Stop", size="sm", visible=False)
        parts["status"] = gr.HTML("", elem_id="compare-status")
        parts["view"] = gr.HTML(NOTHING, elem_id="compare-view")
        parts["numbers"] = gr.HTML("", elem_id="compare-numbers")

    def connect(self, page: gr.Blocks) -> None:
        """Let the parts do something."""
        parts = self.parts
        rooms.connect(page)
        sides, lists = [parts["a"], parts["b"]], [parts["a"], parts["b"], parts["uploads"]]
        shown = [parts["status"], parts["view"], parts["numbers"]]
        # A choice is told twice, and again whenever the list loses the focus; what is chosen meanwhile must be heard too.
        compare: dict[str, Any] = {
            "fn": self._compare, "inputs": [*lists, parts["asked"]], "outputs": shown, "js": _ASK, "trigger_mode": "multiple",
            "concurrency_limit": AT_ONCE, "concurrency_id": "compare", **rooms.PRIVATE,
        }  # fmt: skip
        then = {key: value for key, value in compare.items() if key != "trigger_mode"}
        looks = [parts["refresh"].click, *(parts[side].focus for side in "ab"), self.house.entered.then]
        if "Compare" in self.house.opened:
            looks.append(self.house.opened["Compare"].select)
        for look in looks:
            look(self._choices, lists, sides, queue=False, **rooms.PRIVATE)
        for side in "ab":
            parts[side].input(**compare)
            brought = parts[f"upload {side}"].upload(
                self._brought(side),
                [parts[f"upload {side}"], *lists],
                [*lists, parts["status"]],
                queue=False,
                **rooms.PRIVATE,
            )
            brought.then(**then)
        asked = [parts["job"], parts["status"], parts["stop"]]
        started = parts["exact"].click(self._exact, lists, asked, **rooms.PRIVATE)
        watched = started.then(
            self._watch,
            [parts["job"], *lists],
            [*sides, parts["status"], parts["stop"]],
            **rooms.PRIVATE,
        )
        watched.then(**then)
        parts["stop"].click(self._stop, parts["job"], None, queue=False, **rooms.PRIVATE)

    def results(self, owner: str) -> list[tuple[str, str, Path, Row]]:
        """Return the newest results of a session: label, name, file and row."""
        found = []
        for row in self.house.jobs.ledger.jobs(owner=owner, states=("done",), limit=LISTED):
            for place, file in enumerate(row.files):
                found.append((label_of(row, place), f"{row.name}/{place}", Path(file), row))
        return found[:LISTED]

    def _choices(
        self,
        request: gr.Request,
        a: str | None,
        b: str | None,
        uploads: Mapping[str, str],
        chosen: Mapping[str, str | None] | None = None,
    ) -> tuple[Any, Any]:
        """Offer what there is now; a side that is named in `chosen` is given that result.

        What stands there stays, unless it is gone: the answer may be later than a choice.
        """
        known = [
            (label, name)
            for label, name, file, _ in self.results(self.house.session(request))
            if file.exists()
        ]
        known += [(f"{Path(path).name} (yours)", name) for name, path in uploads.items()]
        names = {name for _, name in known}
        sides = {side: None for side, one in (("a", a), ("b", b)) if one and one not in names} | dict(
            chosen or {}
        )
        return tuple(
            gr.Dropdown(known, value=sides[side]) if side in sides else gr.Dropdown(known) for side in "ab"
        )

    def _brought(self, side: str) -> Any:
        def bring(
            request: gr.Request, file: str | None, a: str | None, b: str | None, uploads: Mapping[str, str]
        ) -> tuple[Any, Any, dict[str, str], str]:
            if not file:
                return gr.skip(), gr.skip(), dict(uploads), ""
            if Path(file).suffix.lower() not in ENDINGS:
                words = sentence(
                    RequestError(
                        "file", Path(file).name, f"a picture or clip that ends in {', '.join(ENDINGS)}"
                    )
                )
                return gr.skip(), gr.skip(), dict(uploads), views.trouble(words)
            name = f"yours-{secrets.token_urlsafe(8)}"
            now = dict(uploads) | {name: file}
            return (*self._choices(request, a, b, now, {side: name}), now, "")

        return bring

    def _file(self, owner: str, name: str, uploads: Mapping[str, str]) -> tuple[Path, Row | None]:
        """Return the file behind a choice: an upload of this session, or one of its own results. Raises: RequestError."""
        if name in uploads:
            return Path(uploads[name]), None
        job, _, place = name.partition("/")
        row = self.house.jobs.ledger.get(job, owner)
        if row is None or not place.isdecimal() or int(place) >= len(row.files):
            raise RequestError("result", name[:40], "one of those in the list")
        return Path(row.files[int(place)]), row

    def _compare(
        self, request: gr.Request, a: str | None, b: str | None, uploads: Mapping[str, str], number: float
    ) -> tuple[Any, Any, Any]:
        """Show what differs, unless this page has asked for another pair since: a slow answer never wins over a newer one."""
        page = str(getattr(request, "session_hash", None) or "")
        self.newest.asked(page, number)
        found = self._compared(request, a, b, uploads)
        return (gr.skip(), gr.skip(), gr.skip()) if self.newest.over(page, number) else found

    def _compared(
        self, request: gr.Request, a: str | None, b: str | None, uploads: Mapping[str, str]
    ) -> tuple[Any, Any, Any]:
        if not a or not b:
            return gr.skip(), NOTHING, ""
        try:
            owner = self.house.session(request)
            (left, first), (right, second) = (self._file(owner, one, uploads) for one in (a, b))
            found, heat = self.pairs.measured(left, right)
            told = [known(path, row) for path, row in ((left, first), (right, second))]
            floor = self._floor(owner, told, [first, second])
            small, films = found.size[0] <= SMALL, _films(left, right)
            view = viewer(rooms.address(left), rooms.address(right), heat, found, small=small, films=films)
            return "", view, numbers(found, told, floor, _measured(first, second))
        except (RequestError, OSError) as error:
            words = (
                sentence(error)
                if isinstance(error, RequestError)
                else "One of the files is not there any more."
            )
            return views.trouble(words), NOTHING, ""

    def _floor(
        self, owner: str, told: Sequence[Mapping[str, Any]], rows: Sequence[Row | None]
    ) -> float | None:
        """Return the PSNR in dB of an exact run against itself, as a comparison of this session measured it, or None."""
        here = _measured(*rows)
        if here is None:
            like = [one["request"].get("model") for one in told if one["request"]]
            for row in self.house.jobs.ledger.jobs(owner=owner, states=("done",), limit=LISTED):
                if (
                    row.item.kind == "compare"
                    and row.item.request.get("model") in like
                    and row.report.get("measured")
                ):
                    here = row.report["measured"]
                    break
        return floor_of(here)

    def _exact(
        self, request: gr.Request, a: str | None, b: str | None, uploads: Mapping[str, str]
    ) -> tuple[Any, Any, Any]:
        """Submit a comparison of result A with its exact twin."""
        try:
            if not a:
                raise RequestError("result A", a, "chosen first")
            owner = self.house.session(request)
            path, row = self._file(owner, a, uploads)
            asked = Request.from_dict(
                row.item.request if row is not None else known(path, None)["request"] or {}
            )
            if row is None and (asked.model not in self.house.cards or _names_files(asked)):
                raise RequestError(
                    "result A", path.name, "made here by a model of this page, without files of its own"
                )
            if not asked.accelerators and asked.profile is None:
                raise RequestError("result A", path.name, "an accelerated one: this one is exact already")
            if row is not None and row.item.kind == "compare":
                raise RequestError(
                    "result A",
                    path.name,
                    "one that was not compared yet; both of its pictures are in the list",
                )
            job = self.house.jobs.submit(asked.replace(images=1), owner=owner, comparing=True)
        except (RequestError, QueueFull) as error:
            return "", views.trouble(sentence(error)), gr.Button(visible=False)
        return job.name, views.progress(job), gr.Button(visible=True)

    async def _watch(
        self, request: gr.Request, name: str, a: str | None, b: str | None, uploads: Mapping[str, str]
    ) -> AsyncIterator[tuple[Any, Any, Any, Any]]:
        """Look at a comparison until it is over, then choose its two pictures."""
        owner, jobs = self.house.session(request), self.house.jobs
        job, last = jobs.get(name, owner) if name else None, ""
        if job is None:
            yield gr.skip(), gr.skip(), gr.skip(), gr.Button(visible=False)
            return
        while not job.over:
            line = views.progress(job, jobs.ahead(job))
            if line != last:
                yield gr.skip(), gr.skip(), line, gr.skip()
            last = line
            await asyncio.sleep(WATCHED)
            jobs.refresh(job)
        if job.state == "done":
            left, right = self._choices(request, a, b, uploads, {"a": f"{name}/0", "b": f"{name}/1"})
            yield left, right, "", gr.Button(visible=False)
        else:
            yield gr.skip(), gr.skip(), views.ended(job), gr.Button(visible=False)

    def _stop(self, request: gr.Request, name: str) -> None:
        if name:
            self.house.jobs.cancel(name, self.house.session(request))


def label_of(row: Row, place: int) -> str:
    """Return how a result is called in a list."""
    request = row.item.request
    words = request.get("prompt") or request.get("prompts") or f"class {request.get('class_label')}"
    kind = "exact"
    if (request.get("accelerators") or request.get("profile")) and not (
        row.item.kind == "compare" and place > 0
    ):
        asked = Request.from_dict(request)
        kind = " + ".join(map(str, asked.accelerators)) or f"profile {Path(asked.profile or '').stem}"
    steps = row.report.get("effective", {}).get("steps") or request.get("steps")
    return f"{str(words)[:60]} · {steps} steps · seed {request.get('seed')} · {kind[:60]} · {Path(row.files[place]).name[-14:]}"


def known(path: Path, row: Row | None) -> dict[str, Any]:
    """Return name, request and report of a result: out of its own file, or nothing for a stranger's picture."""
    try:
        found = read_metadata(path)
        return {"name": path.name, "request": found["request"], "report": found["report"]}
    except RequestError:
        request = {} if row is None else row.item.request
        return {"name": path.name, "request": request, "report": {} if row is None else row.report}


def floor_of(measured: Mapping[str, Any] | None) -> float | None:
    """Return the noise floor of a comparison as a PSNR in dB, infinite where the exact run repeats bit for bit."""
    rows = (measured or {}).get("floor") or []
    if not rows:
        return None
    levels = [math.inf if one.get("psnr_db") is None else float(one["psnr_db"]) for one in rows]
    return min(levels)


def _films(a: Path, b: Path) -> tuple[bool, bool]:
    return a.suffix.lower() in FILMS, b.suffix.lower() in FILMS


def _measured(*rows: Row | None) -> dict[str, Any] | None:
    """Return what a comparison measured, where both results are its own."""
    first, second = rows if len(rows) == 2 else (None, None)
    if first is None or second is None or first.name != second.name:
        return None
    found = first.report.get("measured")
    return found if isinstance(found, dict) else None


def _names_files(request: Request) -> bool:
    """Whether a request opens files; what a browser brings may not choose them."""
    return any(
        getattr(request, name)
        for name in ("image", "last_image", "clip", "mask", "controls", "loras", "profile")
    )
