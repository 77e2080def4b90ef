"""A run as a drawing: steps across, blocks down, one band for each guidance branch; patterns tell the states without colour too.

`timeline` is the piece of HTML that the page shows, `drawing` a whole SVG file.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

STATES = {"C": "computed", "S": "sparse", "M": "merged", "R": "reused", "F": "forecast"}
"""What the letters of a run's cells mean."""
FILLS = {"C": "#047857", "S": "url(#sparse)", "M": "url(#merged)", "R": "url(#reused)", "F": "url(#forecast)"}
LEFT = 52.0  # px, for the numbers of the blocks

# Solid, hatched across, in rings, striped aslant, dotted: told apart by the pattern, and from dark to light by the ink alone.
_PATTERNS = (
    '<pattern id="sparse" width="4" height="4" patternUnits="userSpaceOnUse">'
    '<rect class="mid" width="4" height="4" fill="#99f6e4"/>'
    '<path class="weave" d="M0 1H4M1 0V4" stroke="#0f766e" stroke-width="1.3"/></pattern>'
    '<pattern id="merged" width="6" height="6" patternUnits="userSpaceOnUse">'
    '<rect class="light" width="6" height="6" fill="#dbeafe"/>'
    '<ellipse class="rings" cx="3" cy="3" rx="1.9" ry="1.9" fill-opacity="0" stroke="#1d4ed8" stroke-width="1.2"/></pattern>'
    '<pattern id="reused" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect class="paper" width="5" height="5" fill="#fde9c8"/>'
    '<line class="ink" y2="5" stroke="#b45309" stroke-width="2.4"/></pattern>'
    '<pattern id="forecast" width="5" height="5" patternUnits="userSpaceOnUse">'
    '<rect class="pale" width="5" height="5" fill="#ede9fe"/>'
    '<circle class="dots" cx="2.5" cy="2.5" r="1.3" fill="#6d28d9"/></pattern>'
)
_TEMPLATE_SIGNS = str.maketrans({sign: f"&#{ord(sign)};" for sign in "{}$`@"})


def safe(value: object) -> str:
    """Return text for use in HTML and SVG; gradio's own template signs are written as entities too."""
    return html.escape(str(value), quote=True).translate(_TEMPLATE_SIGNS)


def timeline(run: Mapping[str, Any]) -> str:
    """Return a run (a report's `run`) as an SVG with a legend under it, for a page that styles the class `timeline`.

    Equal neighbours of one step are one bar; `data-` attributes hold the counts.
    """
    cells = _counted(run)
    if not cells:
        return '<p class="note">No blocks were counted in this run.</p>'
    width, height, parts = _bands(cells)
    counts = _counts(cells)
    legend = "".join(
        f'<svg width="15" height="11" aria-hidden="true">{_swatch(state, 0, 0, 15, 11)}</svg>'
        f"&nbsp;{count} {STATES[state]}&ensp; "
        for state, count in _shown(counts)
    )
    return (
        f'<svg class="timeline" viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width * 1.15:.0f}px" '
        f"{_about(counts)}><defs>{_PATTERNS}</defs>{''.join(parts)}</svg>"
        f'<div class="timeline legend">{legend}</div>'
    )


def drawing(run: Mapping[str, Any], title: str = "") -> str:
    """Return a run as an SVG file of its own, with its title and legend inside.

    Raises:
        ValueError: no blocks were counted in the run.
    """
    cells = _counted(run)
    if not cells:
        raise ValueError("no blocks were counted in this run")
    width, height, parts = _bands(cells)
    counts = _counts(cells)
    width, head = max(width, 420.0, 6.5 * len(title)), 22.0 if title else 0.0
    legend, x = [], 0.0
    for state, count in _shown(counts):
        words = f"{count} {STATES[state]}"
        legend.append(
            _swatch(state, x, height, 15, 11) + f'<text x="{x + 20:.0f}" y="{height + 10:.0f}">{words}</text>'
        )
        x += 20 + 6.5 * len(words) + 18
    named = f'<text y="12" font-weight="bold">{safe(title)}</text>' if title else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -8 {width + 16:.0f} {head + height + 32:.0f}" '
        f'width="{width + 16:.0f}" font-family="sans-serif" font-size="11" {_about(counts)}>'
        f'<defs>{_PATTERNS}</defs><rect x="-8" y="-8" width="100%" height="100%" fill="#fff"/>{named}'
        f'<g transform="translate(0 {head:.0f})">{"".join(parts)}{"".join(legend)}</g></svg>\n'
    )


def _counted(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cell for cell in run.get("cells", []) if cell.get("states")]


def _counts(cells: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts = dict.fromkeys(STATES, 0)
    for cell in cells:
        for state in cell["states"]:
            counts[state] = counts.get(state, 0) + 1
    return counts


def _shown(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(state, counts[state]) for state in STATES if counts[state] or state == "C"]


def _about(counts: Mapping[str, int]) -> str:
    told = ", ".join(f"{count} {STATES.get(state, state)}" for state, count in counts.items() if count)
    data = " ".join(f'data-{STATES.get(state, "other")}="{count}"' for state, count in counts.items())
    return f'role="img" aria-label="{safe(f"Block calls by step: {told}")}" {data}'


def _swatch(state: str, x: float, y: float, width: float, height: float) -> str:
    fill, kind = FILLS.get(state, "none"), safe(state)
    return f'<g fill="{fill}"><rect class="{kind}" width="{width:.0f}" height="{height:.0f}" rx="2" x="{x:.0f}" y="{y:.0f}"/></g>'


def _bands(cells: Sequence[Mapping[str, Any]]) -> tuple[float, float, list[str]]:
    """Return width, height and parts of the drawing of all cells."""
    bands: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        bands.setdefault(str(cell.get("branch", "")), []).append(cell)
    columns = max(map(len, bands.values()))
    width = max(6.0, min(26.0, 560 / columns))
    top, parts = 6.0, []
    for branch, band in bands.items():
        blocks = max(len(cell["states"]) for cell in band)
        height = max(3.0, min(16.0, 200 / blocks))
        if len(bands) > 1:
            parts.append(f'<text x="{LEFT}" y="{top + 11}">{safe(branch)}</text>')
            top += 17
        parts += [_column(cell, LEFT + place * width, top, width, height) for place, cell in enumerate(band)]
        parts.append(f'<text x="0" y="{top + 10}">block 0</text>')
        if blocks > 2:
            parts.append(f'<text x="0" y="{top + blocks * height - 1:.1f}">block {blocks - 1}</text>')
        top += blocks * height + 8
    right = LEFT + columns * width
    parts.append(f'<text x="{LEFT}" y="{top + 8}">step 1</text>')
    if columns > 3:
        last = cells[-1]["step"] + 1
        parts.append(f'<text x="{right:.1f}" y="{top + 8}" text-anchor="end">step {last}</text>')
    return right + 2, top + 14, parts


def _column(cell: Mapping[str, Any], x: float, y: float, width: float, height: float) -> str:
    bars, first = [], 0
    gap, side = min(1.5, height / 4), width - min(1.5, width / 5)
    for state, same in groupby(cell["states"]):
        count = len(list(same))
        where = f"blocks {first} to {first + count - 1}" if count > 1 else f"block {first}"
        each = 1 if height > 4 else count  # thin rows are drawn as one bar
        rectangles = "".join(
            f'<rect class="{safe(state)}" x="{x:.1f}" y="{y + row * height:.1f}" width="{side:.1f}" '
            f'height="{each * height - gap:.1f}" rx="1.5"/>'
            for row in range(first, first + count, each)
        )
        about = f"step {cell['step'] + 1}, {where}: {STATES.get(state, state)}"
        bars.append(f'<g fill="{FILLS.get(state, "none")}"><title>{safe(about)}</title>{rectangles}</g>')
        first += count
    return "".join(bars)
