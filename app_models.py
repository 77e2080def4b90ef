"""The tab Models: what is on this computer, whether it is whole and safe, what its adapters fit; open, download, put away.

Whoever may choose folders or fetch files must sit at the computer itself: through a password, a proxy or another address the tab
only shows. No network is asked before somebody presses the button that says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from app_page import House, sentence
from app_tables import facts, note, report, size, style, table
from app_views import safe, trouble
from pipelines import catalog, controls
from pipelines._serve_names import loopback
from pipelines.catalog import Card, Unavailable
from pipelines.library import Described, Download, Library, Offer
from pipelines.request import RequestError

EVERY = 1.0
"""Seconds between two looks at a download."""
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
_ELSEWHERE = "Models are opened, downloaded and removed at the computer itself; from here they are only shown."


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
        parts = self.parts
        gr.HTML(style(), elem_classes="unseen")
        with gr.Row(elem_id="models-columns"):
            with gr.Column(scale=5, min_width=300):
                parts["model"] = gr.Dropdown(
                    self._choices(), value=next(iter(self.house.cards)), label="Model", filterable=False, elem_id="models-chosen"
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
                        parts["remove"] = gr.Button("Remove", size="sm", interactive=False, min_width=90, scale=0)
        parts["timer"] = gr.Timer(EVERY, active=False)

    def _opening(self) -> None:
        parts = self.parts
        with gr.Accordion("Open a model on this computer", open=False, elem_classes="folded", elem_id="models-open"):
            parts["path"] = gr.Textbox(
                label="Folder of the model", placeholder="/models/some-pipeline", max_lines=1, max_length=1000
            )
            gr.Markdown("A folder in the layout of diffusers, with weights as safetensors. Pickles and code are refused.",
                        elem_classes="note")  # fmt: skip
            parts["open"] = gr.Button("Check and open", size="sm")

    def _downloading(self) -> None:
        parts = self.parts
        with gr.Accordion("Download a model", open=False, elem_classes="folded", elem_id="models-download"):
            parts["id"] = gr.Textbox(label="Name on the hub", placeholder="organisation/name", max_lines=1, max_length=200)
            gr.Markdown("The first button asks huggingface.co for licence and size; nothing is fetched before the second.",
                        elem_classes="note")  # fmt: skip
            parts["ask"] = gr.Button("Ask the hub for licence and size", size="sm")
            parts["offer"] = gr.HTML("", elem_id="models-offer")
            with gr.Row():
                parts["fetch"] = gr.Button("Download", variant="primary", size="sm", interactive=False, min_width=110)
                parts["halt"] = gr.Button("Stop the download", size="sm", interactive=False, min_width=110)

    def connect(self, page: gr.Blocks) -> None:
        """Wire the events."""
        parts = self.parts
        shown = [parts["list"], parts["about"], parts["removing"], parts["sure"], parts["remove"], parts["model"]]
        self.house.entered.then(self._first, parts["model"], [*shown, parts["timer"]], **_PRIVATE)
        parts["model"].input(self._show, parts["model"], shown, **_PRIVATE)
        changed = [parts["said"], *shown, *self._others()]
        parts["open"].click(self._open, [parts["path"], parts["model"]], changed, **_PRIVATE)
        parts["sure"].input(lambda on: gr.Button(interactive=bool(on)), parts["sure"], parts["remove"], queue=False, **_PRIVATE)
        parts["remove"].click(self._remove, [parts["model"], parts["sure"]], changed, **_PRIVATE)
        offered = [parts["offer"], parts["fetch"]]
        parts["ask"].click(self._ask, parts["id"], offered, **_PRIVATE)
        fetching = [*offered, parts["halt"], parts["timer"]]
        parts["fetch"].click(self._fetch, parts["id"], fetching, **_PRIVATE)
        parts["halt"].click(self._halt, None, fetching, queue=False, **_PRIVATE)
        parts["timer"].tick(self._tick, parts["model"], [*fetching, *changed], queue=False, **_PRIVATE)
        parts["adapter"].upload(self._fit, [parts["adapter"], parts["model"]], parts["fits"], **_PRIVATE)
        parts["adapter"].clear(lambda: "", None, parts["fits"], queue=False, **_PRIVATE)

    def _others(self) -> list[Any]:
        """Return the choices of a model in other tabs, which learn of new ones."""
        tabs = getattr(self.house, "tabs", {})
        found = [getattr(tab, "inputs", {}).get("model") for tab in tabs.values() if tab is not self]
        return [one for one in found if one is not None]

    def _choices(self) -> list[tuple[str, str]]:
        names = dict.fromkeys([*self.house.cards, *self.library.names()])
        return [(self._title(name), name) for name in names]

    def _title(self, name: str) -> str:
        card = self.house.cards.get(name)
        return (card.title if card is not None else "") or Path(name).name

    def _first(self, request: gr.Request, name: str | None) -> dict[Any, Any]:
        """Show the tab to who comes (back), with a model that was downloaded meanwhile, or a download that goes on."""
        for one, card in self.library.cards().items():
            if one not in self.house.cards:
                self._known(one, card)
        return self._show(request, name) | {self.parts["timer"]: gr.Timer(active=not self._idle())}

    def _show(self, request: gr.Request, name: str | None) -> dict[Any, Any]:
        return self._shown(name or next(iter(self.house.cards)), at_home(request))

    def _shown(self, name: str, home: bool) -> dict[Any, Any]:
        parts, choices = self.parts, self._choices()
        name = name if name in (one for _, one in choices) else next(iter(self.house.cards))
        found = {one: self._described(one) for _, one in choices}
        chosen = found[name]
        removable = home and self.library.removable(name)
        return {
            parts["list"]: list_view([one for one in found.values() if isinstance(one, Described)], self._disk())
            + ("" if home else note(_ELSEWHERE)),
            parts["about"]: trouble(chosen) if isinstance(chosen, str) else about_view(chosen, adapters_of(chosen)),
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
        return free + (f"; {size(trash)} in the trash folder {self.library.trash}, which you may empty" if trash else "")

    def _changed(self, words: str, name: str) -> dict[Any, Any]:
        """Return the updates of this tab and of the choices of a model in others."""
        update = {self.parts["said"]: words} | self._shown(name, True)
        names = [(self._title(one), one) for one in self.house.cards]
        return update | {other: gr.Dropdown(names, visible=len(names) > 1) for other in self._others()}

    def _open(self, request: gr.Request, path: str, name: str | None) -> dict[Any, Any]:
        said = self.parts["said"]
        if not at_home(request):
            return {said: trouble(_ELSEWHERE)}
        try:
            opened, card = self.library.open(path)
        except (RequestError, OSError) as error:
            return {said: trouble(sentence(error))}
        self._known(opened, card)
        return self._changed(note(f"{card.title or opened} is open, and can be chosen where pictures are made."), opened)

    def _known(self, name: str, card: Card) -> None:
        """Let every tab choose a model."""
        self.house.cards[name] = card
        for tab in getattr(self.house, "tabs", {}).values():
            cards = getattr(tab, "cards", None)
            if isinstance(cards, dict):
                cards[name] = card

    def _unknown(self, name: str) -> None:
        for cards in (self.house.cards, *(getattr(tab, "cards", {}) for tab in getattr(self.house, "tabs", {}).values())):
            if isinstance(cards, dict):
                cards.pop(name, None)

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
        return offer_view(offer), gr.Button(f"Download {size(offer.bytes)}", interactive=offer.fits and self._idle())

    def _idle(self) -> bool:
        return self.download is None or self.download.state != "running"

    def _fetch(self, request: gr.Request, model: str) -> dict[Any, Any]:
        parts, offer = self.parts, self.offers.get(model.strip())
        if not at_home(request) or offer is None or not self._idle():
            words = _ELSEWHERE if not at_home(request) else "Ask for licence and size first, and download one model at a time."
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
        told = {key: value for key, value in adapter.to_dict().items() if key in ("family", "rank", "tensors", "parameters")}
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
    if any(headers.get(name) for name in _FORWARDED) or getattr(request, "username", None) or dict(state).get("owner"):
        return False
    return client is not None and loopback(str(client.host)) and loopback(host)


def adapters_of(model: Described) -> list[tuple[str, ...]]:
    """Return a model's own adapters: name, family, size, coverage."""
    if model.refused or model.folder is None:
        return []
    from pipelines._adapter_files import adapters_in
    from pipelines._steering_files import fit_among

    rows: list[tuple[str, ...]] = []
    for name, path in adapters_in(model.folder).items():
        try:
            about = controls.described(path) or {"family": "no adapter"}
            fits = fit_among(path, [model.folder])
            covered = fits.get("coverage") or next(iter(fits.values()))
            rows.append((name, str(about.get("family", "")), size(path.stat().st_size), covered))
        except (RequestError, OSError) as error:
            rows.append((name, "refused", size(path.stat().st_size), str(error)))
    return rows


def list_view(models: list[Described], disk: str) -> str:
    """Return all models in a table."""
    rows = [
        (one.title, one.source, one.dtypes, size(one.bytes), "refused" if one.refused else "safe")
        for one in models
    ]  # fmt: skip
    return report(table(("model", "from", "dtype", "size", "check"), rows), f'<p class="files">{safe(disk)}</p>')


def about_view(model: Described, adapters: list[tuple[str, ...]]) -> str:
    """Return what is known of one model: facts, parts, safety, adapters."""
    safety = "refused" if model.refused else "safetensors only, headers checked, no code"
    told: Mapping[str, Any] = {
        "pipeline": model.pipeline, "licence": model.license or "not told", "parameters": f"{model.parameters:,}",
        "dtype": model.dtypes, "size": size(model.bytes), "digest": model.digest or "none", "safety": safety,
    }  # fmt: skip
    rows = [
        (part.name, part.state, part.kind, ", ".join(part.dtypes), size(part.bytes) if part.bytes else "")
        for part in model.parts
    ]
    own = table(("adapter", "family", "size", "keys that fit"), adapters) or note("It has no adapters of its own.")
    return (
        report(f'<p class="line">{safe(model.title)}</p>', facts(told.items()))
        + trouble(model.refused)
        + report("<h3>Parts</h3>", table(("part", "state", "class", "dtype", "size"), rows), "<h3>Adapters</h3>", own)
    )


def offer_view(offer: Offer) -> str:
    """Return what would be downloaded: licence, size, room, commit."""
    told = [
        ("model", offer.model), ("licence", offer.license or "not told: look at its page before you use it"),
        ("size", f"{size(offer.bytes)} in {len(offer.files)} files, settings and safetensors only"),
        ("free on the disk", size(offer.free)), ("commit", offer.commit),
    ]  # fmt: skip
    return report(facts(told)) + ("" if offer.fits else trouble("There is too little room on the disk for it."))


def download_view(download: Download) -> str:
    """Return how far a download is."""
    if download.state == "failed":
        return trouble(f"{download.error[:1].upper()}{download.error[1:]}. Nothing of it was kept.")
    words = {"running": "Downloading", "done": "Downloaded and checked", "stopped": "Stopped; nothing was kept"}[download.state]
    share = 1.0 if download.state == "done" else min(1.0, download.fetched / max(1, download.offer.bytes))
    return (
        f'<div class="pace"><div class="row"><b role="status">{words}</b><span class="num">{size(share * download.offer.bytes)} of '
        f'{size(download.offer.bytes)}</span></div><div class="bar" role="progressbar" aria-label="Download" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{share * 100:.0f}"><i style="width:{share:.1%}"></i></div></div>'
    )


class FirstScreen:
    """Three cards for a page without a loaded model, for the tab Create: `draw` makes them, `connect` makes their buttons work.

    The first presses `on_builtin`; the others show the tab Models, with the right part of it opened.
    """

    def __init__(self, cards: Mapping[str, Card]) -> None:
        self.cards, self.parts = cards, dict[str, Any]()

    def draw(self) -> None:
        """Make the cards, inside a column."""
        own = next((card for name, card in self.cards.items() if name in catalog.shipped()), None)
        knows = own.summary if own is not None else "None is shipped here."
        with gr.Row(elem_id="first-screen"):
            for name, head, words, button in (
                ("builtin", "Try the built-in model", f"Already here, and quick on a processor. {knows}", "Use it"),
                ("open", "Open a model on this computer", "A folder in the layout of diffusers, safetensors only.", "Open"),
                ("download", "Download a model", "Licence, size and free disk are shown first.", "Choose"),
            ):
                with gr.Column(min_width=180, elem_classes="stage"):
                    gr.HTML(f"<h3>{head}</h3><p class='note'>{safe(words)}</p>")
                    self.parts[name] = gr.Button(button, size="sm", interactive=name != "builtin" or own is not None)
        gr.HTML('<p class="quiet">Nothing leaves this computer.</p>')

    def connect(self) -> None:
        """Let the second and third card lead to the tab Models."""
        for name, place in (("open", "models-open"), ("download", "models-download")):
            self.parts[name].click(None, None, None, js=_LEADS.replace("PLACE", place), **_PRIVATE)


_LEADS = """() => { document.querySelector('#tab-models-button')?.click(); setTimeout(() => {
  const button = document.querySelector('#PLACE > button'); if (button && !button.classList.contains('open')) button.click();
  button?.focus(); }, 300); }"""
