"""What the tab Models shows: the list, one model with its parts and adapters, an offer of a hub, a download on its way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app_tables import facts, note, report, size, table
from app_views import safe, trouble
from pipelines import controls
from pipelines.library import Described, Download, Offer
from pipelines.request import RequestError


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
    return report(
        table(("model", "from", "dtype", "size", "check"), rows), f'<p class="files">{safe(disk)}</p>'
    )


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
    own = table(("adapter", "family", "size", "keys that fit"), adapters) or note(
        "It has no adapters of its own."
    )
    return (
        report(f'<p class="line">{safe(model.title)}</p>', facts(told.items()))
        + trouble(model.refused)
        + report(
            "<h3>Parts</h3>",
            table(("part", "state", "class", "dtype", "size"), rows),
            "<h3>Adapters</h3>",
            own,
        )
    )


def offer_view(offer: Offer) -> str:
    """Return what would be downloaded: licence, size, room, commit."""
    told = [
        ("model", offer.model), ("licence", offer.license or "not told: look at its page before you use it"),
        ("size", f"{size(offer.bytes)} in {len(offer.files)} files, settings and safetensors only"),
        ("free on the disk", size(offer.free)), ("commit", offer.commit),
    ]  # fmt: skip
    return report(facts(told)) + (
        "" if offer.fits else trouble("There is too little room on the disk for it.")
    )


def download_view(download: Download) -> str:
    """Return how far a download is."""
    if download.state == "failed":
        return trouble(f"{download.error[:1].upper()}{download.error[1:]}. Nothing of it was kept.")
    words = {
        "running": "Downloading",
        "done": "Downloaded and checked",
        "stopped": "Stopped; nothing was kept",
    }[download.state]
    share = 1.0 if download.state == "done" else min(1.0, download.fetched / max(1, download.offer.bytes))
    return (
        f'<div class="pace"><div class="row"><b role="status">{words}</b><span class="num">{size(share * download.offer.bytes)} of '
        f'{size(download.offer.bytes)}</span></div><div class="bar" role="progressbar" aria-label="Download" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{share * 100:.0f}"><i style="width:{share:.1%}"></i></div></div>'
    )
