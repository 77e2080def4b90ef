"""What the tab Grid shows: what may change, how a grid stands, its table and its scatter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import app_form as form
import app_rooms as rooms
from pipelines.catalog import Card
from pipelines.grid import Table
from pipelines.jobs import Job as Row
from pipelines.request import RequestError
from pipelines.scatter import scatter
from pipelines.timeline import safe

SMALL = 192
"""Pictures up to this width, in px, are enlarged without smoothing."""
FIELDS = (
    "steps", "guidance", "accelerators", "prompt", "negative_prompt", "seed", "size", "scheduler", "guidance_mode", "frames",
    "model",
)  # fmt: skip
"""Fields of a request that a browser may change along an axis: none of them names a file."""
EXAMPLES = {
    "steps": "10, 20, 28", "guidance": "1, 3, 5", "accelerators": "none, delta-cache:interval=2, delta-cache:interval=3",
    "prompt": "a dog | a cat", "negative_prompt": "blurred | dark", "seed": "1, 2, 3", "scheduler": "euler, heun",
    "guidance_mode": "batched, sequential", "frames": "8, 16",
}  # fmt: skip


def fields_for(cards: Mapping[str, Card]) -> list[tuple[str, str]]:
    """Return what may change along an axis here, as (label, name): nothing that names a file of another's choice."""
    from pipelines import controls

    found = [(name.replace("_", " "), name) for name in FIELDS if name != "model" or len(cards) > 1]
    for model in cards:
        try:
            own = [one.name for one in controls.adapters(model) if one.kind == "lora"]
        except RequestError:
            own = []
        found += [(f"weight of {name}", f"lora:{name}") for name in own]
    for method, settings in form.methods().items():
        found += [(f"{method}: {one.label}", f"{method}:{one.name}") for one in settings]
    return list(dict.fromkeys(found))


def counted(rows: Sequence[Row]) -> str:
    """Return how a grid stands, as a line with a bar."""
    done = sum(row.state == "done" for row in rows)
    parts = [f"{done} of {len(rows)} made"]
    for words, states in (
        ("running", ("running",)),
        ("waiting", ("waiting",)),
        ("failed", ("failed", "poisoned")),
        ("stopped", ("cancelled",)),
    ):
        count = sum(row.state in states for row in rows)
        parts += [f"{count} {words}"] if count else []
    times = [row.ended - row.started for row in rows if row.state == "done"]
    left = sum(not row.over for row in rows)
    about = f"about {max(1, round(sum(times) / len(times) * left))} s left" if times and left else ""
    share = done / len(rows)
    return (
        f'<div class="pace"><div class="row"><span role="status">{safe(", ".join(parts))}</span>'
        f'<span class="num">{about}</span></div>'
        f'<div class="bar" role="progressbar" aria-label="Progress of the grid" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{share * 100:.0f}"><i style="width:{share:.1%}"></i></div></div>'
    )


def sheet(found: Table) -> str:
    """Return the table of a grid, whose headings stay in sight; pictures are copies of the original bytes."""
    from pipelines._grid_sheets import headline, table_html

    def picture(one: Any) -> str:
        try:
            source = safe(rooms.address(one.file))
        except OSError:
            return '<span class="failed">its file is gone</span>'
        report = one.cell.request
        small = ' class="small"' if (report.width or _width(one.file)) <= SMALL else ""
        shown = f'<img src="{source}"{small} loading="lazy" alt="{safe(report.prompt or "picture")}">'
        return f'<a href="{source}" target="_blank" rel="noopener">{shown}</a>'

    return (
        f'<div class="room"><p class="hint">{safe(headline(found))}</p><div class="sheet" tabindex="0" role="region" '
        f'aria-label="Grid">{table_html(found, picture)}</div></div>'
    )


def drawn(found: Table) -> str:
    """Return speed against likeness of a grid, where accelerators change; nothing before something was measured."""
    from pipelines._grid_sheets import dots_html

    dots = found.dots()
    if not dots:
        return ""
    rounds = "one run of each" if found.grid.seeds == 1 else f"medians of {found.grid.seeds} seeds"
    return (
        f'<div class="room"><h3>Speed against likeness</h3>{scatter(dots)}<p class="hint">Measured while the grid was made, '
        f"{rounds}: times are rough where other work ran too. Full marks are beaten by no other.</p>"
        f'<div class="scroll">{dots_html(found)}</div></div>'
    )


def place_of(found: Table, place: Sequence[int]) -> str:
    """Return where a cell stands, in words."""
    return ", ".join(
        found.grid.label(axis, place[axis]) for axis in range(4) if found.grid.label(axis, place[axis])
    )


def example(field: str) -> str:
    """Return values to begin with for what changes along an axis."""
    if field.startswith("lora:"):
        return "0, 0.5, 1"
    if ":" in field:
        name, _, setting = field.partition(":")
        one = next((one for one in form.methods().get(name, ()) if one.name == setting), None)
        return example_of(one) if one is not None else ""
    return EXAMPLES.get(field, "")


def example_of(one: Any) -> str:
    """Return values to begin with for a setting of an accelerator."""
    if one.choices:
        return ", ".join(map(str, one.choices[:4]))
    if one.kind == "switch":
        return "yes, no"
    if one.kind not in ("integer", "number") or one.low is None or one.high is None:
        return ""
    start = one.default if one.default is not None else one.low
    step = one.step or 0.05
    values = [start + place * step for place in (0, 1, 2)]
    return ", ".join(f"{value:g}" for value in values if value <= one.high)


def _width(path: Path) -> int:
    from PIL import Image

    with Image.open(path) as opened:
        return opened.width
