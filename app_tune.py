"""The tab Tune: a wish in words or numbers and a time to spend; a search in the queue, its curve as it grows, and the profile.

The search is a job of the ledger, so it waits its turn, has the computer for itself, is stopped like any other, and is found again
after a reload.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any

import gradio as gr

import app_form as form
import app_rooms as rooms
import app_settings as controls
import app_views as views
from app_given import whole
from app_jobs import QueueFull
from app_page import House, sentence
from app_speed import CUSTOM
from pipelines._tuning import item
from pipelines.jobs import Job as Row
from pipelines.request import Request, RequestError
from pipelines.scatter import Dot, ordered, scatter
from pipelines.timeline import safe

WATCHED = 1.0
"""Seconds between two looks at a search."""
OWN = "own"
WISHES = {
    "psnr>=45": "Indistinguishable: 45 dB",
    "psnr>=40": "Tiny difference: 40 dB",
    "psnr>=35": "Small difference: 35 dB",
    "psnr>=28": "Visible, but alike: 28 dB",
    "speedup>=2": "Twice as fast, as like as can be",
    OWN: "My own",
}
MINUTES = (2, 10, 30, 60)
SEARCHES = 2
"""Searches of one session that wait or run."""
NOTHING = '<div class="room"><p class="hint">The curve of speed against likeness grows here while the search runs.</p></div>'
_ASKED = ("model", "size", "steps", "guidance", "wish", "own", "minutes", "prompts")


class Tune:
    """Ask for a search, watch its curve, use what it found."""

    label = "Tune"

    def __init__(self, house: House) -> None:
        self.house = house
        self.parts: dict[str, Any] = {}
        self._watching: dict[str, str] = {}

    def draw(self) -> None:
        """Make the components, inside a tab."""
        parts, card = self.parts, next(iter(self.house.cards.values()))
        parts["job"] = gr.BrowserState("", storage_key="leapfrog-tune", secret="not a secret")
        gr.Markdown(
            "Searches the accelerators that are fastest at the likeness you wish, on this computer, and keeps them as a profile: "
            "settings that act only where they were measured.", elem_classes="note",
        )  # fmt: skip
        with gr.Row():
            parts["model"] = controls.model_control(self.house.cards, min_width=140)
            sizes = form.sizes(card)
            parts["size"] = controls.Choice(
                sizes,
                value=sizes[0][1],
                label="Size",
                min_width=140,
                filterable=False,
                visible=len(sizes) > 1,
            )
            parts["steps"], parts["guidance"] = controls.number_controls(card, elem_id="tune-steps")
        parts["wish"] = gr.Radio(
            [(words, value) for value, words in WISHES.items()], value="psnr>=35", label="How much may the picture differ?",
            elem_classes="chips",
        )  # fmt: skip
        parts["own"] = gr.Textbox(
            "",
            label="My own wish",
            placeholder="psnr>=32 or speedup>=2.5",
            visible=False,
            elem_id="tune-own",
            max_lines=1,
        )
        parts["minutes"] = gr.Radio(
            [(f"{one} min", one) for one in MINUTES], value=10, label="Time to spend", elem_classes="chips"
        )
        with gr.Accordion("What to draw while searching", open=False, elem_classes="folded"):
            parts["prompts"] = gr.Textbox(
                "", lines=3, max_lines=12, label="One prompt a line; nothing takes the model's own examples",
                elem_id="tune-prompts", visible=not card.takes_class,
            )  # fmt: skip
        with gr.Row():
            parts["start"] = gr.Button("Search", variant="primary", elem_id="tune-start")
            parts["stop"] = gr.Button("Stop", visible=False, elem_id="tune-stop")
        parts["status"] = gr.HTML("", elem_id="tune-status")
        parts["curve"] = gr.HTML(NOTHING, elem_id="tune-curve")
        parts["found"] = gr.State({})
        parts["use"] = gr.Button("Use it in Create", visible=False, elem_id="tune-use")

    def connect(self, page: gr.Blocks) -> None:
        """Let the parts do something."""
        parts = self.parts
        rooms.connect(page)
        given = [parts[name] for name in _ASKED]
        shown = [parts[name] for name in ("status", "curve", "stop", "use", "found")]
        parts["wish"].change(
            lambda wish: gr.Textbox(visible=wish == OWN),
            parts["wish"],
            parts["own"],
            queue=False,
            **rooms.PRIVATE,
        )
        started = parts["start"].click(self._start, given, [parts["job"], *shown], **rooms.PRIVATE)
        started.then(self._watch, parts["job"], shown, **rooms.PRIVATE)
        parts["stop"].click(self._stop, parts["job"], None, queue=False, **rooms.PRIVATE)
        parts["model"].change(
            self._model,
            parts["model"],
            [parts[name] for name in ("size", "steps", "guidance", "prompts")],
            queue=False,
            **rooms.PRIVATE,
        )
        self.house.entered.then(self._watch, parts["job"], shown, **rooms.PRIVATE)
        create = self.house.tabs.get("Create")
        if create is not None:
            taken = [
                create.inputs[name] for name in ("model", "size", "steps", "guidance", "speed", "profile")
            ] + [create.parts["form_of"]]
            parts["use"].click(
                self._use, parts["found"], [*taken, parts["status"]], queue=False, **rooms.PRIVATE
            )

    def asked(self, values: Mapping[str, Any]) -> tuple[Request, str, float, list[str]]:
        """Return settings, wish, minutes and prompts that the controls stand for. Raises: RequestError."""
        card = self.house.card(values["model"])
        if values["wish"] not in WISHES:
            raise RequestError("wish", values["wish"], f"one of {', '.join(WISHES)}")
        if values["minutes"] not in MINUTES:
            raise RequestError("minutes", values["minutes"], f"one of {', '.join(map(str, MINUTES))}")
        width, _, height = str(values["size"] or "").partition("x")
        for side in (width, height):
            if side and not side.isdecimal():
                raise RequestError("size", values["size"], "one of those in the list")
        settings = Request(
            prompt="-", model=values["model"], width=int(width) if width else None, height=int(height) if height else None,
            steps=whole(values["steps"]), guidance=values["guidance"],
        )  # fmt: skip
        prompts = [one.strip() for one in str(values["prompts"] or "").splitlines() if one.strip()]
        if card.takes_class:
            settings, prompts = settings.replace(prompt="", class_label=0), []
        for one in prompts:
            settings.replace(prompt=one)
        wish = str(values["own"] or "") if values["wish"] == OWN else values["wish"]
        return settings, wish, float(values["minutes"]), prompts[:100]

    def _start(self, request: gr.Request, *values: Any) -> tuple[Any, ...]:
        ledger, owner = self.house.jobs.ledger, self.house.session(request)
        try:
            settings, wish, minutes, prompts = self.asked(dict(zip(_ASKED, values, strict=True)))
            busy = [
                row
                for row in ledger.jobs(owner=owner, states=("waiting", "running"))
                if row.item.kind == "tune"
            ]
            if len(busy) >= SEARCHES:
                raise QueueFull(
                    f"{len(busy)} searches of yours are waiting or running already; stop one, or wait."
                )
            (row,) = ledger.add([item(settings, wish, minutes, owner=owner, prompts=prompts)])
            self.house.jobs.start()
        except (RequestError, QueueFull) as error:
            return gr.skip(), views.trouble(sentence(error)), gr.skip(), gr.skip(), gr.skip(), gr.skip()
        return row.name, progress(row), NOTHING, gr.Button(visible=True), gr.Button(visible=False), {}

    async def _watch(self, request: gr.Request, name: str | None) -> AsyncIterator[tuple[Any, ...]]:
        """Look at a search until it is over; closing the browser ends the looking, not the search."""
        owner, ledger = self.house.session(request), self.house.jobs.ledger
        row = ledger.get(name, owner) if name else None
        if row is None or row.item.kind != "tune":
            yield gr.skip(), gr.skip(), gr.Button(visible=False), gr.skip(), gr.skip()
            return
        me, session = secrets.token_hex(6), str(request.session_hash)
        last: object = None
        self._watching[session] = me
        while row is not None and not row.over and self._watching.get(session) == me:
            dots, said = dots_of(row), progress(row)
            if (said, dots) != last:
                yield said, drawn(dots, row), gr.Button(visible=True), gr.Button(visible=False), gr.skip()
            last = (said, dots)
            await asyncio.sleep(WATCHED)
            row = ledger.get(row.name, owner)
        if row is not None and row.over:
            found = row.report.get("profile") if row.state == "done" else None
            known = (
                {
                    "name": row.report.get("name"),
                    "profile": found,
                    "guidance": row.item.request.get("guidance"),
                }
                if found
                else {}
            )
            yield (
                ended(row),
                drawn(dots_of(row), row),
                gr.Button(visible=False),
                gr.Button(visible=bool(known)),
                known,
            )
        if self._watching.get(session) == me:
            del self._watching[session]

    def _stop(self, request: gr.Request, name: str | None) -> None:
        if name:
            self.house.jobs.ledger.cancel(name=name, owner=self.house.session(request))

    def _model(self, model: str) -> tuple[Any, Any, Any, Any]:
        card = self.house.cards[model]
        sizes = form.sizes(card)
        return (
            gr.Dropdown(sizes, value=sizes[0][1], visible=len(sizes) > 1), *controls.numbers_of(card),
            gr.Textbox(visible=not card.takes_class),
        )  # fmt: skip

    def _use(self, found: Mapping[str, Any]) -> tuple[Any, ...]:
        """Put a profile, and what it was measured for, into the form of Create."""
        name, one = str(found.get("name") or ""), found.get("profile") or {}
        model = str(one.get("model") or "")
        choices = form.profile_choices(model) if model in self.house.cards else {"choices": []}
        if name not in [value for _, value in choices["choices"]]:
            gone = views.trouble(
                "The profile is not there any more, or was made for a model that this page does not have."
            )
            return (*(gr.skip() for _ in range(7)), gone)
        place = one["range"]
        size = f"{place['width']}x{place['height']}" if place.get("width") else ""
        sizes = [value for _, value in form.sizes(self.house.cards[model])]
        said = f'<div class="pace" role="status">Create now uses {safe(name)}: open that tab and press Generate.</div>'
        guidance = found.get("guidance")
        return (
            model, size if size in sizes else gr.skip(), place["steps"], gr.skip() if guidance is None else guidance,
            CUSTOM, gr.Dropdown(**choices | {"value": name}), model, said,
        )  # fmt: skip


def dots_of(row: Row) -> tuple[Dot, ...]:
    """Return the points of a search so far, or at its end."""
    points = row.report.get("curve") if row.state == "done" else row.progress.get("curve")
    return tuple(
        Dot(label=" + ".join(map(str, one["accelerators"])), speedup=float(one["speedup_denoise"]), psnr=float(one["psnr_db"]),
            pictures=int(one["pictures"]), measured=one["speedup_is"] == "measured")
        for one in points or []
    )  # fmt: skip


def drawn(dots: tuple[Dot, ...], row: Row) -> str:
    """Return the curve with the list of its front; the wish is a line."""
    if not dots:
        return NOTHING
    budget = str(row.item.tags.get("budget", ""))
    wish = float(budget.partition(">=")[2]) if budget.startswith("psnr") else None
    rows = "".join(
        f"<tr><td>{number}</td><td>{one.speedup:.2f}x{'' if one.measured else ' estimated'}</td><td>{one.psnr:.1f} dB</td>"
        f"<td class='long'>{safe(one.label)}</td></tr>"
        for number, one, best in ordered(dots) if best
    )  # fmt: skip
    heads = "".join(
        f'<th scope="col">{words}</th>' for words in ("", "speed-up of denoising", "PSNR, mean", "settings")
    )
    return (
        f'<div class="room" data-dots="{len(dots)}"><h3>Speed against likeness</h3>{scatter(dots, wish=wish)}'
        '<p class="hint">Full marks are beaten by no other. Estimated speeds come from the block calls computed.</p>'
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></div>'
    )


def progress(row: Row) -> str:
    """Return the line of a search that waits or runs."""
    minutes = float(row.item.tags.get("minutes", 0))
    if row.state == "waiting":
        return f'<div class="pace" role="status"><b>Waiting</b> for its turn; then it takes up to {minutes:g} min.</div>'
    note, tried = str(row.progress.get("note") or "loading the model"), len(row.progress.get("curve") or [])
    more = f" · {tried} settings on the curve" if tried else ""
    return (
        f'<div class="pace"><div class="row"><span><b role="status">{safe(note[:1].upper() + note[1:])}</b>{more}</span>'
        f'<span class="num">up to {minutes:g} min</span></div><div class="bar busy" role="progressbar" aria-label="Search">'
        '<i style="width:30%"></i></div></div>'
    )


def ended(row: Row) -> str:
    """Return what came of a search."""
    if row.state == "cancelled":
        return '<div class="pace" role="status">Stopped. What was tried is kept, and a new search goes on from it.</div>'
    if row.state != "done":
        return views.trouble(row.error or "The search failed.")
    report = row.report
    runs = f"{report.get('runs')} runs in {float(report.get('seconds', 0)) / 60:.1f} min"
    if report.get("profile"):
        words = f"Profile {report['name']}: {report['summary']}. {runs}."
        return f'<div class="pace" role="status"><b>Found.</b> {safe(words)}</div>'
    reason = str(report.get("reason") or "No profile was found")
    reason = re.sub(
        r"psnr>=([\d.]+)", r"a PSNR of \1 dB", re.sub(r"speedup>=([\d.]+)", r"a speed-up of \1x", reason)
    )
    return f'<div class="trouble caution" role="status">{safe(reason[:1].upper() + reason[1:])}. {safe(runs)}.</div>'
