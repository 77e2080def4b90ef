"""Speed against likeness as an SVG: a mark for each setting, and the front of those that no other beats.

Marks on the front are full and joined, others hollow; every mark has a number, so nothing is told by colour alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from pipelines.timeline import safe

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 560.0, 300.0, 62.0, 46.0, 44.0
"""The field of the drawing and what lies around it, in px."""
HIGHEST = 100.0
"""PSNR in dB that identical pictures are counted as."""
NUMBERED = 40
"""Most marks with a number."""
_SPEEDS = (0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One setting: how many times as fast its denoising is, and the PSNR to the exact picture in dB (infinite if identical)."""

    label: str
    speedup: float
    psnr: float
    pictures: int = 1
    measured: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; an infinite PSNR is null."""
        return {
            "label": self.label, "speedup_denoise": round(self.speedup, 3),
            "psnr_db": None if math.isinf(self.psnr) else round(self.psnr, 2), "pictures": self.pictures,
            "speedup_is": "measured" if self.measured else "estimated",
        }  # fmt: skip


def scatter(dots: Sequence[Dot], *, wish: float | None = None, caption: str = "") -> str:
    """Return the drawing as a whole SVG, for a file or for a page that styles the class `scatter`; nothing for no dots.

    Args:
        wish: a PSNR in dB that is drawn as a line.
    """
    if not dots:
        return ""
    from pipelines.pareto import front

    best = front(dots)
    order = sorted(dots, key=lambda one: (one not in best, one.speedup))
    low, high, slow, fast = _limits(dots, wish)

    def at(speedup: float, decibels: float) -> tuple[float, float]:
        across = math.log(min(max(speedup, slow), fast) / slow) / math.log(fast / slow)
        up = (min(max(decibels, low), high) - low) / (high - low)
        return LEFT + WIDTH * across, TOP + HEIGHT * (1 - up)

    parts = _axes(at, low, high, slow, fast, _identical(dots))
    if wish is not None:
        y = at(1, wish)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="#b45309" stroke-dasharray="7 4"/>')
        parts.append(
            f'<text x="{LEFT + WIDTH - 4}" y="{y - 5:.1f}" text-anchor="end">wished: {wish:g} dB</text>'
        )
    places = [at(one.speedup, min(one.psnr, HIGHEST)) for one in best]
    if len(best) > 1:
        parts.append(f'<polyline class="front" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}" '
                     'fill="none" stroke="#047857" stroke-width="2"/>')  # fmt: skip
    for number, one in enumerate(order, start=1):
        parts += _mark(number, one, one in best, *at(one.speedup, min(one.psnr, HIGHEST)))
    told = f"{len(dots)} settings by speed and likeness, {len(best)} of them beaten by no other"
    head = f'<text x="0" y="14" font-weight="bold">{safe(caption)}</text>' if caption else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="scatter" '
        f'viewBox="-6 0 {LEFT + WIDTH + 24:.0f} {TOP + HEIGHT + BOTTOM:.0f}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{safe(told)}" data-dots="{len(dots)}" '
        f'data-front="{len(best)}"><rect class="paper" x="-6" width="100%" height="100%" fill="#fff"/>{head}{"".join(parts)}</svg>'
    )


def ordered(dots: Sequence[Dot]) -> list[tuple[int, Dot, bool]]:
    """Return number, dot and whether it is on the front, as the drawing numbers them."""
    from pipelines.pareto import front

    best = front(dots)
    order = sorted(dots, key=lambda one: (one not in best, one.speedup))
    return [(number, one, one in best) for number, one in enumerate(order, start=1)]


def _limits(dots: Sequence[Dot], wish: float | None) -> tuple[float, float, float, float]:
    """Return lowest and highest PSNR, slowest and fastest speed-up of the field; identical pictures stand on its upper edge."""
    levels = [one.psnr for one in dots if one.psnr < HIGHEST] + ([] if wish is None else [wish])
    low, high = (
        5 * math.floor(min(levels, default=35) / 5 - 0.2),
        5 * math.ceil(max(levels, default=35) / 5 + 0.2),
    )
    high = max(high, low + 10) + (5 if _identical(dots) else 0)
    speeds = [one.speedup for one in dots if one.speedup > 0] or [1.0]
    return low, high, min(0.95, 0.92 * min(speeds)), max(2.0, 1.15 * max(speeds))


def _identical(dots: Sequence[Dot]) -> bool:
    return any(one.psnr >= HIGHEST for one in dots)


def _axes(at: Any, low: float, high: float, slow: float, fast: float, identical: bool) -> list[str]:
    parts = []
    step = 5 if high - low <= 45 else 10
    for level in range(int(high), int(low) - 1, -step):
        y = at(1, level)[1]
        words = "identical" if identical and level > high - step else f"{level}"
        parts.append(f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="#e7e5e4"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{words}</text>')
    last = -math.inf
    for speed in _SPEEDS:
        x = at(speed, low)[0]
        if slow <= speed <= fast and x - last > 40:
            last = x
            dash = "" if speed == 1 else ' stroke-dasharray="2 3"'
            parts.append(f'<path d="M{x:.1f} {TOP}v{HEIGHT}" stroke="#a8a29e"{dash}/>')
            parts.append(f'<text x="{x:.1f}" y="{TOP + HEIGHT + 17}" text-anchor="middle">{speed:g}x</text>')
    parts.append(
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#78716c"/>'
    )
    middle = LEFT + WIDTH / 2
    parts.append(
        f'<text x="{middle}" y="{TOP + HEIGHT + 36}" text-anchor="middle">speed-up of denoising</text>'
    )
    parts.append(f'<text x="0" y="{TOP - 20}">PSNR to the exact picture, dB</text>')
    return parts


def _mark(number: int, one: Dot, best: bool, x: float, y: float) -> list[str]:
    like = "identical" if one.psnr >= HIGHEST else f"{one.psnr:.1f} dB"
    kind = "" if one.measured else ", estimated"
    about = f"{number}: {one.label}: {one.speedup:.2f}x{kind}, {like}"
    fill, dash = ("#047857", "") if best else ("#fff", "" if one.measured else ' stroke-dasharray="2 2"')
    shape = (
        f'<circle class="dot{" best" if best else ""}" cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="#047857" '
        f'stroke-width="1.6"{dash}/>'
    )
    words = f'<text x="{x + 8:.1f}" y="{y - 6:.1f}">{number}</text>' if number <= NUMBERED else ""
    return [f"<g><title>{safe(about)}</title>{shape}{words}</g>"]
