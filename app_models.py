"""The tab Models: what is on this computer, whether it is whole and safe, what its adapters fit; open, download, put away.

Whoever may choose folders or fetch files must sit at the computer itself: through a password, a proxy or another address the tab
only shows. No network is asked before somebody presses the button that says so.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import gradio as gr

from app_model_views import about_view, adapters_of, download_view, list_view, offer_view
from app_page import NOBODY, House, sentence
from app_tables import facts, note, report, size, style
from app_views import trouble
from pipelines import catalog
from pipelines._serve_names import loopback
from pipelines.catalog import Card, Unavailable
from pipelines.library import Described, Download, Library, Offer
from pipelines.request import RequestError

EVERY = 1.0
"""Seconds between two looks at a download."""
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
_ELSEWHERE = (
    "Models are opened, downloaded and removed at the computer itself; from here they are only shown."
)


class Models:
    """Look at models, open one from a folder, download one, put a download into the trash."""

    label = "Models"

    def __init__(self, house: House, library: Library | None = None) -> None:
        self.house, self.library = house, library or Library()
        self.offers: dict[str, Offer] = {}
        self.download: Download | None = None
        self.parts: dict[str, Any] = {}

    def draw(self) -> None:
        """Make the components, inside the tab."""
        parts, choices = self.parts, self._choices()
        gr.HTML(style(), elem_classes="unseen")
        with gr.Row(elem_id="models-columns"):
            with gr.Column(scale=5, min_width=300):
                parts["model"] = gr.Dropdown(
                    choices,
                    value=choices[0][1],
                    label="Model",
                    filterable=False,
                    elem_id="models-chosen",
                )
                parts["list"] = gr.HTML("", elem_id="models-list")
                parts["said"] = gr.HTML("", elem_id="models-said")
                self._opening()
                self._downloading()
                with gr.Accordion("Does an adapter or LoRA fit?", open=False, elem_classes="folded"):
                    parts["adapter"] = gr.File(
                        label="Drop a safetensors file; only its header is read", file_types=[".safetensors"], height=110,
                        elem_id="models-adapter", elem_classes="drop",
                    )  # fmt: skip
                    parts["fits"] = gr.HTML("")
            with gr.Column(scale=6, min_width=300):
                with gr.Column(elem_classes="stage"):
                    parts["about"] = gr.HTML("", elem_id="models-about")
                    with gr.Row(visible=False) as parts["removing"]:
                        parts["sure"] = gr.Checkbox(False, label="Yes, put this model away", container=False)
                        parts["remove"] = gr.Button(
                            "Remove", size="sm", interactive=False, min_width=90, scale=0
                        )
        parts["timer"] = gr.Timer(EVERY, active=False)

    def _opening(self) -> None:
        parts = self.parts
        with gr.Accordion(
            "Open a model on this computer", open=False, elem_classes="folded", elem_id="models-open"
        ):
            parts["path"] = gr.Textbox(
                label="Folder of the model", placeholder="/models/some-pipeline", max_lines=1, max_length=1000
            )
            gr.Markdown("A folder in the layout of diffusers, with weights as safetensors. Pickles and code are refused.",
                        elem_classes="note")  # fmt: skip
            parts["open"] = gr.Button("Check and open", size="sm")

    def _downloading(self) -> None:
        parts = self.parts
        with gr.Accordion("Download a model", open=False, elem_classes="folded", elem_id="models-download"):
            parts["id"] = gr.Textbox(
                label="Name on the hub", placeholder="organisation/name", max_lines=1, max_length=200
            )
            gr.Markdown("The first button asks huggingface.co for licence and size; nothing is fetched before the second.",
                        elem_classes="note")  # fmt: skip
            parts["ask"] = gr.Button("Ask the hub for licence and size", size="sm")
            parts["offer"] = gr.HTML("", elem_id="models-offer")
            with gr.Row():
                parts["fetch"] = gr.Button(
                    "Download", variant="primary", size="sm", interactive=False, min_width=110
                )
                parts["halt"] = gr.Button("Stop the download", size="sm", interactive=False, min_width=110)

    def connect(self, page: gr.Blocks) -> None:
        """Wire the events."""
        parts = self.parts
        shown = [
            parts["list"],
            parts["about"],
            parts["removing"],
            parts["sure"],
            parts["remove"],
            parts["model"],
        ]
        self.house.entered.then(
            self._first, parts["model"], [*shown, parts["timer"], *self._others().values()], **_PRIVATE
        )
        parts["model"].change(self._show, parts["model"], shown, **_PRIVATE)
        changed = [parts["said"], *shown, *self._others().values()]
        opened = parts["open"].click(self._open, [parts["path"], parts["model"]], changed, **_PRIVATE)
        parts["sure"].input(
            lambda on: gr.Button(interactive=bool(on)),
            parts["sure"],
            parts["remove"],
            queue=False,
            **_PRIVATE,
        )
        removed = parts["remove"].click(self._remove, [parts["model"], parts["sure"]], changed, **_PRIVATE)
        offered = [parts["offer"], parts["fetch"]]
        parts["ask"].click(self._ask, parts["id"], offered, **_PRIVATE)
        fetching = [*offered, parts["halt"], parts["timer"]]
        parts["fetch"].click(self._fetch, parts["id"], fetching, **_PRIVATE)
        parts["halt"].click(self._halt, None, fetching, queue=False, **_PRIVATE)
        fetched = parts["timer"].tick(
            self._tick, parts["model"], [*fetching, *changed], queue=False, **_PRIVATE
        )
        create = getattr(self.house, "tabs", {}).get("Create")
        if create is not None:
            for event in (opened, removed, fetched):
                event.then(create.renewed, create.inputs["model"], create.renewing(), queue=False, **_PRIVATE)
        parts["adapter"].upload(self._fit, [parts["adapter"], parts["model"]], parts["fits"], **_PRIVATE)
        parts["adapter"].clear(lambda: "", None, parts["fits"], queue=False, **_PRIVATE)

    def _others(self) -> dict[str, Any]:
        """Return the choices of a model in other tabs, which learn of new ones; Create looks after its own."""
        tabs = getattr(self.house, "tabs", {})
        return {name: tabs[name].parts["model"] for name in ("Grid", "Tune", "System") if name in tabs}

    def _choices(self) -> list[tuple[str, str]]:
        names = dict.fromkeys([*self.house.models, *self.library.names()])
        return [(self._title(name), name) for name in names or self.house.cards]

    def _title(self, name: str) -> str:
        card = self.house.cards.get(name)
        return (card.title if card is not None else "") or Path(name).name

    def _first(self, request: gr.Request, name: str | None) -> dict[Any, Any]:
        """Show the tab to who comes (back), with models that came meanwhile in every tab, or a download that goes on."""
        for one, card in self.library.cards().items():
            if one not in self.house.cards:
                self._known(one, card)
        return (
            self._show(request, name)
            | {self.parts["timer"]: gr.Timer(active=not self._idle())}
            | self._offered()
        )

    def _show(self, request: gr.Request, name: str | None) -> dict[Any, Any]:
        """Show a model that was chosen; the choice itself is left alone while it stands, for it may be another one by now."""
        found = self._shown(name or next(iter(self.house.cards)), at_home(request))
        choices = self._choices()
        here = name is not None and name in [one for _, one in choices]
        return found | ({self.parts["model"]: gr.Dropdown(choices)} if here else {})

    def _shown(self, name: str, home: bool) -> dict[Any, Any]:
        parts, choices = self.parts, self._choices()
        name = name if name in (one for _, one in choices) else choices[0][1]
        found = {one: self._described(one) for _, one in choices}
        chosen = found[name]
        about = (
            note(NOBODY.summary)
            if name == NOBODY.name
            else trouble(chosen)
            if isinstance(chosen, str)
            else ""
        )
        removable = home and self.library.removable(name)
        return {
            parts["list"]: list_view([one for one in found.values() if isinstance(one, Described)], self._disk())
            + ("" if home else note(_ELSEWHERE)),
            parts["about"]: about if isinstance(chosen, str) else about_view(chosen, adapters_of(chosen)),
            parts["removing"]: gr.Row(visible=removable), parts["sure"]: False, parts["remove"]: gr.Button(interactive=False),
            parts["model"]: gr.Dropdown(choices, value=name),
        }  # fmt: skip

    def _described(self, name: str) -> Described | str:
        try:
            return self.library.describe(name)
        except (RequestError, OSError) as error:
            return sentence(error) if isinstance(error, RequestError) else f"{name} cannot be read."

    def _disk(self) -> str:
        place = self.library.place
        while not place.exists():
            place = place.parent
        trash = sum(file.stat().st_size for file in self.library.trash.rglob("*") if file.is_file())
        free = f"{size(shutil.disk_usage(place).free)} free on the disk"
        return free + (
            f"; {size(trash)} in the trash folder {self.library.trash}, which you may empty" if trash else ""
        )

    def _changed(self, words: str, name: str) -> dict[Any, Any]:
        """Return the updates of this tab and of the choices of a model in others."""
        return {self.parts["said"]: words} | self._shown(name, True) | self._offered()

    def _offered(self) -> dict[Any, Any]:
        """Let the other tabs offer the models that are here; the first one is chosen where that changes nobody's choice."""
        names, only = [(self._title(one), one) for one in self.house.cards], len(self.house.cards) == 1
        more: dict[str, Any] = {"value": names[0][1]} if only else {}
        return {
            one: gr.Dropdown(names, visible=len(names) > 1 or name == "System", **more)
            for name, one in self._others().items()
        }

    def _open(self, request: gr.Request, path: str, name: str | None) -> dict[Any, Any]:
        said = self.parts["said"]
        if not at_home(request):
            return {said: trouble(_ELSEWHERE)}
        try:
            opened, card = self.library.open(path)
        except (RequestError, OSError) as error:
            return {said: trouble(sentence(error))}
        self._known(opened, card)
        return self._changed(
            note(f"{card.title or opened} is open, and can be chosen where pictures are made."), opened
        )

    def _known(self, name: str, card: Card) -> None:
        """Let every tab choose a model."""
        self._unknown(NOBODY.name)
        self.house.cards[name] = card
        for tab in getattr(self.house, "tabs", {}).values():
            cards = getattr(tab, "cards", None)
            if isinstance(cards, dict):
                cards[name] = card

    def _unknown(self, name: str) -> None:
        for cards in (
            self.house.cards,
            *(getattr(tab, "cards", {}) for tab in getattr(self.house, "tabs", {}).values()),
        ):
            if isinstance(cards, dict):
                cards.pop(name, None)
                if not cards and name != NOBODY.name:
                    cards[NOBODY.name] = NOBODY

    def _remove(self, request: gr.Request, name: str, sure: bool) -> dict[Any, Any]:
        said = self.parts["said"]
        if not at_home(request) or not sure:
            return {said: trouble("Tick the box first." if at_home(request) else _ELSEWHERE)}
        try:
            place = self.library.remove(name)
        except (RequestError, OSError) as error:
            return {said: trouble(sentence(error))}
        self._unknown(name)
        return self._changed(note(f"It lies in the trash folder now: {place}"), next(iter(self.house.cards)))

    def _ask(self, request: gr.Request, model: str) -> tuple[str, Any]:
        if not at_home(request):
            return trouble(_ELSEWHERE), gr.Button(interactive=False)
        try:
            offer = self.library.offer(model)
        except (RequestError, Unavailable, OSError) as error:
            return trouble(sentence(error)), gr.Button(interactive=False)
        self.offers[offer.model] = offer
        return offer_view(offer), gr.Button(
            f"Download {size(offer.bytes)}", interactive=offer.fits and self._idle()
        )

    def _idle(self) -> bool:
        return self.download is None or self.download.state != "running"

    def _fetch(self, request: gr.Request, model: str) -> dict[Any, Any]:
        parts, offer = self.parts, self.offers.get(model.strip())
        if not at_home(request) or offer is None or not self._idle():
            words = (
                _ELSEWHERE
                if not at_home(request)
                else "Ask for licence and size first, and download one model at a time."
            )
            return {parts["offer"]: trouble(words), parts["fetch"]: gr.Button(interactive=False)}
        try:
            self.download = Download(self.library, offer).start()
        except RequestError as error:
            return {parts["offer"]: trouble(sentence(error))}
        return self._pace(self.download)

    def _halt(self, request: gr.Request) -> dict[Any, Any]:
        if self.download is None or not at_home(request):
            return {}
        self.download.stop()
        return self._pace(self.download)

    def _pace(self, download: Download) -> dict[Any, Any]:
        parts, busy = self.parts, download.state == "running"
        return {
            parts["offer"]: download_view(download), parts["fetch"]: gr.Button(interactive=False),
            parts["halt"]: gr.Button(interactive=busy), parts["timer"]: gr.Timer(active=busy),
        }  # fmt: skip

    def _tick(self, request: gr.Request, name: str | None) -> dict[Any, Any]:
        download = self.download
        if download is None:
            return {self.parts["timer"]: gr.Timer(active=False)}
        update = self._pace(download)
        if download.state != "done" or download.name in self.house.cards:
            return update
        self._known(download.name, self.library.cards()[download.name])
        return update | self._changed(note(f"{download.offer.model} is here."), download.name)

    def _fit(self, request: gr.Request, file: str, name: str) -> str:
        try:
            found = self._coverage(Path(file), name)
        except (RequestError, OSError) as error:
            words = sentence(error) if isinstance(error, RequestError) else "The file cannot be read."
            return trouble(words.replace(file, Path(file).name))
        return report(facts([("file", Path(file).name), *found.items()]))

    def _coverage(self, file: Path, name: str) -> dict[str, Any]:
        """Return what an adapter's file is, and how many of its keys find a place in the chosen model."""
        from pipelines._adapter_files import read_adapter
        from pipelines._steering_files import fit_among

        adapter = read_adapter(file)
        if not adapter.steers:
            return {"kind": "weights, but no adapter or LoRA"}
        folder = catalog.find(name).folder if name in (one for _, one in self._choices()) else None
        fits = fit_among(file, [folder] if folder is not None else [])
        told = {
            key: value
            for key, value in adapter.to_dict().items()
            if key in ("family", "rank", "tensors", "parameters")
        }
        return told | {"size": size(adapter.bytes)} | fits


def at_home(request: gr.Request) -> bool:
    """Whether a request comes from this computer's own browser: nothing guards the page, and nothing stands in between."""
    if any(os.environ.get(name) for name in ("LEAPFROG_AUTH", "LEAPFROG_TOKENS", "SPACE_ID")):
        return False
    inner = getattr(request, "request", request)
    client, headers = getattr(inner, "client", None), getattr(inner, "headers", {})
    state = getattr(inner, "scope", {}).get("state", {}) if hasattr(inner, "scope") else {}
    host, _, port = str(headers.get("host", "")).rpartition(":")
    host = host if port.isdigit() else f"{host}:{port}".lstrip(":")
    if (
        any(headers.get(name) for name in _FORWARDED)
        or getattr(request, "username", None)
        or dict(state).get("owner")
    ):
        return False
    return client is not None and loopback(str(client.host)) and loopback(host)
