"""What the tab Compare shows: the viewer of two files, and what differs in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.likeness import HEAT, STOPS, Likeness, changed
from pipelines.timeline import safe


def viewer(
    a: str, b: str, heat: str, found: Likeness, *, small: bool, films: tuple[bool, bool] = (False, False)
) -> str:
    """Return the viewer: slider, flicker, side by side and difference of two files at their addresses."""
    modes = "".join(
        f'<button type="button" data-to="{name}" aria-pressed="{str(name == "slider").lower()}">{words}</button>'
        for name, words in (
            ("slider", "Slider"),
            ("side", "Side by side"),
            ("flicker", "Flicker"),
            ("heat", "Difference"),
        )
    )
    zooms = "".join(
        f'<button type="button" data-zoom="{factor}" aria-label="{words}">{sign}</button>'
        for factor, words, sign in (
            (0.6667, "Smaller", "−"),
            (1.5, "Larger", "+"),
            (0.01, "Whole picture", "⤢"),
        )
    )
    panes = "".join(
        f'<figure class="pane {side}">{_picture(source, f"Result {side.upper()}", film)}'
        f"<figcaption>{side.upper()}</figcaption></figure>"
        for side, source, film in (("a", a, films[0]), ("b", b, films[1]))
    )
    colours = ", ".join(f"rgb{colour} {stop:.0%}" for stop, colour in zip(STOPS, HEAT, strict=True))
    frame = f" of frame {found.worst + 1}, the worst" if found.is_clip else ""
    return (
        f'<div class="room viewer{" pixels" if small else ""}" data-mode="slider" data-shown="a" data-small="{int(small)}">'
        f'<div class="tools"><span class="modes" role="group" aria-label="How to compare">{modes}</span>'
        f'<span class="zoom" role="group" aria-label="Zoom">{zooms} <span class="factor">1.0x</span></span>'
        '<span class="now" role="status"></span></div>'
        '<div class="panes" tabindex="0" role="group" '
        'aria-label="Two results; space swaps them, plus and minus zoom, arrows move">'
        f'{panes}<figure class="pane heat"><img src="{safe(heat)}" alt="Where the results differ{frame}" draggable="false">'
        "</figure></div>"
        '<input class="wipe" type="range" min="0" max="100" value="50" aria-label="How much of A is shown">'
        f'<div class="scale"><span>0</span><i style="background:linear-gradient(to right, {colours})"></i>'
        f"<span>{found.scale} grey levels of 255 or more{frame}</span></div>"
        '<p class="hint">Space swaps A and B; + and − zoom, as does a wheel with Ctrl; dragging moves both.</p></div>'
    )


def numbers(
    found: Likeness,
    told: Sequence[Mapping[str, Any]],
    floor: float | None,
    measured: Mapping[str, Any] | None = None,
) -> str:
    """Return what differs, settings first, then the verdict and every number beside the noise floor.

    Args:
        told: name, request and report of A and B. floor: see `floor_of`. measured: the comparison that made both, if one did.
    """
    rows = changed(told[0]["request"], told[1]["request"]) if all(one["request"] for one in told) else []
    told_rows = "".join(
        f"<tr><th scope='row'>{safe(name)}</th><td>{safe(a)}</td><td>{safe(b)}</td></tr>"
        for name, a, b in rows
    )
    if rows:
        settings = (
            "<h3>Settings that differ</h3><div class='scroll'><table class='params'><thead><tr><th></th><th scope='col'>A</th>"
            f"<th scope='col'>B</th></tr></thead><tbody>{told_rows}</tbody></table></div>"
        )
    elif all(one["request"] for one in told):
        settings = "<h3>Settings that differ</h3><p class='hint'>None: both were asked for alike.</p>"
    else:
        settings = "<p class='hint'>One of the files tells no settings, so they cannot be compared.</p>"
    verdict = found.verdict(floor)
    return (
        f'<div class="room" data-verdict="{safe(verdict)}">{settings}<h3>How far they are apart</h3>'
        f'<p class="verdict">{safe(_sentence(verdict))}</p><div class="scroll"><table><thead><tr><th></th>'
        '<th scope="col">A to B</th><th scope="col">exact to itself</th></tr></thead>'
        f"<tbody>{_metrics(found, floor, measured)}</tbody></table></div>"
        f'<p class="hint">{safe(_floor_words(floor))} One pair of results: this picture only.</p></div>'
    )


def _metrics(found: Likeness, floor: float | None, measured: Mapping[str, Any] | None) -> str:
    noise = ((measured or {}).get("floor") or [{}])[0]
    difference = found.difference
    like = noise.get("ssim")
    if (
        like is None and floor is not None and math.isinf(floor)
    ):  # it repeats bit for bit, and so by every measure
        like, noise = 1.0, {"largest": 0}
    rows = [
        ("PSNR", _decibels(difference.psnr), "not measured" if floor is None else _decibels(floor)),
        ("SSIM", f"{difference.ssim:.4f}", "not measured" if like is None else f"{like:.4f}"),
        ("largest difference", _levels(difference.largest), _levels(noise.get("largest"))),
    ]
    errors = [one for one in (measured or {}).get("latent_errors") or [] if one is not None]
    rows += (
        [("latent error", f"{sum(errors) / len(errors):.2%}", "0 where it repeats bit for bit")]
        if errors
        else []
    )
    if found.is_clip and found.motions is not None and found.flicker is not None:
        worst = f"{_decibels(found.frames[found.worst])} (frame {found.worst + 1} of {len(found.frames)})"
        rows += [
            ("worst frame", worst, "–"), ("flicker between them", f"{found.flicker:.2f} grey levels a frame", "–"),
            ("motion", _motion(found.motions), "–"),
        ]  # fmt: skip
    speed = (measured or {}).get("speedup")
    if speed:
        rows.append(
            ("speed-up, denoising / end to end", f"{speed['denoise']:.2f}x / {speed['end_to_end']:.2f}x", "1")
        )
    return "".join(
        f"<tr><th scope='row'>{safe(a)}</th><td>{safe(b)}</td><td>{safe(c)}</td></tr>" for a, b, c in rows
    )


def _sentence(verdict: str) -> str:
    return {
        "identical": "Identical, bit for bit.",
        "within noise": "Within noise: no further apart than two exact runs.",
        "small": "A small difference.",
        "visible": "A visible difference.",
        "different picture": "A different picture.",
    }.get(verdict, verdict)


def _floor_words(floor: float | None) -> str:
    if floor is None:
        return "The noise floor is not measured for this model here; “A against its exact twin” measures it."
    return (
        "The exact run repeats bit for bit here, so its noise floor is zero."
        if math.isinf(floor)
        else "The floor is what an exact run does when it is repeated."
    )


def _motion(motions: tuple[float, float]) -> str:
    a, b = motions
    share = f", B has {b / a:.0%} of it" if a > 0 else ""
    return f"A {a:.2f}, B {b:.2f} grey levels a frame{share}"


def _decibels(value: float) -> str:
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def _levels(value: Any) -> str:
    return "not measured" if value is None else f"{value} of 255"


def _picture(source: str, words: str, film: bool) -> str:
    if film:
        return f'<video src="{safe(source)}" muted loop playsinline preload="auto" aria-label="{safe(words)}"></video>'
    return f'<img src="{safe(source)}" alt="{safe(words)}" draggable="false">'
