"""The head of every tab: which model, which device, what waits; and a Stop that is there while something of mine runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gradio as gr

import app_views as views
from pipelines import machine

if TYPE_CHECKING:
    from app_page import House

EVERY = 2.0
"""Seconds between two looks at the queue."""


class Header:
    """Chips and Stop, drawn once above the tabs."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.parts: dict[str, Any] = {}

    def draw(self) -> None:
        """Make the components, inside `gr.Blocks`."""
        with gr.Row(elem_id="head"):
            self.parts["masthead"] = gr.HTML(views.masthead(), elem_id="mast")
            self.parts["chips"] = gr.HTML(self.chips(""), elem_id="chips")
            self.parts["stop"] = gr.Button(
                "Stop", size="sm", elem_id="stop-all", visible=False, scale=0, min_width=76
            )
        self.parts["timer"] = gr.Timer(EVERY)

    def connect(self, page: gr.Blocks) -> None:
        """Look at the queue every few seconds."""
        shown = [self.parts["chips"], self.parts["stop"]]
        private = {"api_visibility": "private", "show_progress": "hidden"}
        self.parts["timer"].tick(self._look, None, shown, queue=False, **private)
        self.house.entered.then(self._look, None, shown, queue=False, **private)
        self.parts["stop"].click(self._stop, None, shown, queue=False, **private)

    def chips(self, owner: str) -> str:
        """Return the chips as a session sees them."""
        waiting = self.house.jobs.ledger.counts()
        mine = self.house.jobs.ledger.counts(owner=owner) if owner else {"waiting": 0, "running": 0}
        loaded = _loaded()
        first = next(iter(self.house.cards.values()))
        later = "loads with the first picture" if self.house.models else "open or download one"
        model = ("Model", loaded or first.title or first.name, "" if loaded else later)
        return views.chips(
            [model, ("Device", *_device()), ("Queue", *_queue(waiting, mine))], self.house.jobs.problem
        )

    def _look(self, request: gr.Request) -> tuple[str, Any]:
        owner = self.house.known(request)  # a look that comes too early must not take a thread from who comes in
        busy = bool(owner) and self.house.jobs.busy(owner)
        return self.chips(owner), gr.Button(visible=busy)

    def _stop(self, request: gr.Request) -> tuple[str, Any]:
        owner = self.house.session(request)
        self.house.jobs.ledger.cancel(owner=owner)
        return self._look(request)


def _loaded() -> str:
    """Return what the model in memory is called, the one used last."""
    from pipelines import catalog

    known = list(catalog._loaded.values())
    return (known[-1].card.title or known[-1].card.name) if known else ""


def _device() -> tuple[str, str]:
    """Return name and free memory of where pictures are made."""
    from pipelines import catalog

    try:
        device = catalog.device_for("auto")
        if device.startswith("cuda"):
            import torch

            return machine.device_name(device), f"{torch.cuda.mem_get_info(device)[0] / 1e9:.1f} GB free"
        import psutil

        return device.upper(), f"{psutil.virtual_memory().available / 1e9:.1f} GB free"
    except Exception:  # noqa: BLE001 - a device that cannot be asked is no reason for a page without a head
        return "unknown", ""


def _queue(waiting: Mapping[str, int], mine: Mapping[str, int]) -> tuple[str, str]:
    running, rest = waiting["running"], waiting["waiting"]
    if not running and not rest:
        return "empty", ""
    words = ", ".join(f"{count} {name}" for count, name in ((running, "running"), (rest, "waiting")) if count)
    yours = mine["running"] + mine["waiting"]
    return words, f"{yours} of them yours" if yours != running + rest else ""
