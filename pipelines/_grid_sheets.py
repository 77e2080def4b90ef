"""A finished grid as files: PNG sheets with the labels baked in, above a size an HTML page, and the scatter as an SVG.

Differs: pictures stand on the sheet pixel for pixel (small ones enlarged by whole numbers), so what is compared was not scaled.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.grid import AXES, Shown, Table
from pipelines.scatter import ordered, scatter
from pipelines.timeline import safe

if TYPE_CHECKING:
    from PIL import ImageDraw
    from PIL.Image import Image

TILE_PIXELS, TILE_SIDE, TILES = 24_000_000, 12_000, 9
"""Most pixels and the longest side of one sheet, and most sheets; above that only the page is written."""
SMALL, MARGIN, GAP, LINE = 160, 16, 8, 18
"""Pictures narrower than `SMALL` are enlarged; the others are px on the sheet."""
LABEL = 190
KEY = "leapfrog-grid"
INK, PALE, PAPER = "#1c1917", "#57534e", "#ffffff"

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 20px; color: #1c1917; background: #fff; }
.sheet { overflow: auto; max-height: 92vh; border: 1px solid #d6d3d1; }
table { border-collapse: separate; border-spacing: 0; }
th, td { padding: 6px 8px; border-bottom: 1px solid #e7e5e4; vertical-align: top; text-align: left; background: #fff; }
thead th { position: sticky; top: 0; z-index: 2; } th.row { position: sticky; left: 0; z-index: 1; max-width: 240px; }
thead th:first-child { left: 0; z-index: 3; } img { display: block; max-width: 320px; min-width: 96px; image-rendering: auto; }
small { color: #57534e; } .failed { color: #7f1d1d; max-width: 220px; display: block; }
"""


def export(table: Table, folder: Path) -> list[Path]:
    """Write what shows a grid into its folder and return the files: sheets or a page, and the scatter where there is one.

    Raises:
        SaveError: nothing can be written there.
    """
    from pipelines.result import write_file

    for old in [*folder.glob("grid*.png"), *folder.glob("grid.html"), *folder.glob("grid-scatter.svg")]:
        old.unlink()
    files: dict[str, bytes] = {}
    layout = _Layout(table)
    tiles = layout.tiles()
    for number, (rows, columns) in enumerate(tiles if len(tiles) <= TILES else [], start=1):
        name = "grid.png" if len(tiles) == 1 else f"grid-{number}.png"
        files[name] = _png(layout.draw(rows, columns), table)
    if len(tiles) > TILES:
        files["grid.html"] = _page(table, folder).encode()
    dots = table.dots()
    if dots:
        caption = (
            "One run of each: times are rough"
            if table.grid.seeds == 1
            else f"Median of {table.grid.seeds} seeds"
        )
        files["grid-scatter.svg"] = scatter(dots, caption=caption).encode()
    for name, data in files.items():
        write_file(folder / name, data, overwrite=True)
    return [folder / name for name in files]


def rows_of(table: Table) -> list[tuple[int, int]]:
    """Return the rows of a grid as (z, y), top to bottom."""
    return list(itertools.product(range(table.grid.shape[2]), range(table.grid.shape[1])))


def columns_of(table: Table) -> list[tuple[int, int]]:
    """Return its columns as (x, repeat), left to right."""
    return list(itertools.product(range(table.grid.shape[0]), range(table.grid.shape[3])))


def table_html(table: Table, picture: Callable[[Shown], str]) -> str:
    """Return the grid as an HTML table with row and column headings.

    Args:
        picture: returns the HTML of a finished cell's picture.
    """
    grid, columns = table.grid, columns_of(table)
    titles = [axis.title for axis in grid.axes]
    corner = " / ".join(reversed(titles[:2]))
    heads = "".join(
        f'<th scope="col">{safe(grid.label(0, x))}<br><small>{safe(grid.label(AXES, repeat))}</small></th>'
        for x, repeat in columns
    )
    body = []
    for z, y in rows_of(table):
        if len(grid.axes) > 2 and y == 0:
            words = f"{titles[2]}: {grid.label(2, z)}"
            body.append(
                f'<tr class="block"><th scope="rowgroup" colspan="{len(columns) + 1}">{safe(words)}</th></tr>'
            )
        cells = "".join(_cell(table.cells[(x, y, z, repeat)], picture) for x, repeat in columns)
        body.append(f'<tr><th scope="row" class="row">{safe(grid.label(1, y))}</th>{cells}</tr>')
    return (
        f"<table><thead><tr><th>{safe(corner)}</th>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def dots_html(table: Table) -> str:
    """Return the marks of the scatter as a list: number, setting, speed-up, likeness."""
    rows = [
        f"<tr{' class=best' if best else ''}><td>{number}</td><td class='long'>{safe(dot.label)}</td><td>{dot.speedup:.2f}x</td>"
        f"<td>{'identical' if math.isinf(dot.psnr) else f'{dot.psnr:.1f} dB'}</td><td>{'yes' if best else ''}</td></tr>"
        for number, dot, best in ordered(table.dots())
    ]
    heads = "".join(
        f'<th scope="col">{one}</th>' for one in ("", "setting", "speed-up", "PSNR", "on the front")
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""


def headline(table: Table) -> str:
    """Return in one line what does not change in a grid."""
    request = table.grid.request
    changing = {axis.field for axis in table.grid.axes}
    parts = [] if "prompt" in changing else [request.words]
    parts += [] if "model" in changing else [Path(request.model).name]
    for name in ("steps", "guidance", "width", "height"):
        value = getattr(request, name)
        if value is not None and name not in changing and "size" not in changing:
            parts.append(f"{name} {value:g}")
    if not table.grid.accelerates and request.accelerators:
        parts.append(" + ".join(map(str, request.accelerators)))
    return " · ".join([*parts, f"seed {request.seed}"])


class _Layout:
    """Where everything stands on the sheets: all cells have one size."""

    def __init__(self, table: Table) -> None:
        self.table, self.rows, self.columns = table, rows_of(table), columns_of(table)
        sizes = [_size(one.file) for one in table.cells.values() if one.file is not None]
        wide = max((one[0] for one in sizes), default=128)
        self.zoom = max(1, math.ceil(SMALL / wide)) if wide < SMALL else 1
        self.width, self.height = wide * self.zoom, max((one[1] for one in sizes), default=128) * self.zoom
        self.letters = max(10, self.width // 8)
        several = table.grid.seeds > 1
        self.above = LINE * (
            max(len(_wrapped(table.grid.label(0, x), self.letters)) for x, _ in self.columns) + several
        )
        self.below = LINE * max((len(self.caption(one)) for one in table.cells.values()), default=1)
        labels = len(table.grid.axes) > 1
        self.left = LABEL if labels else 0

    def caption(self, one: Shown) -> list[str]:
        return _wrapped(one.words, self.letters)[:4]

    def size(self, rows: Sequence[tuple[int, int]], columns: Sequence[tuple[int, int]]) -> tuple[int, int]:
        wide = 2 * MARGIN + self.left + len(columns) * (self.width + GAP)
        blocks = len({z for z, _ in rows}) if len(self.table.grid.axes) > 2 else 0
        head = LINE * (len(self.head(wide)) + 1)
        high = (
            2 * MARGIN
            + head
            + self.above
            + len(rows) * (self.height + self.below + GAP)
            + blocks * (LINE + GAP)
        )
        return max(wide, 320), high

    def head(self, wide: int) -> list[str]:
        lines = _wrapped(headline(self.table), max(20, (max(wide, 320) - 2 * MARGIN) // 8))
        across = [f"across: {self.table.grid.axes[0].title}"]
        across += [f"down: {self.table.grid.axes[1].title}"] if len(self.table.grid.axes) > 1 else []
        return [*lines, *_wrapped("; ".join(across), max(20, (max(wide, 320) - 2 * MARGIN) // 8))]

    def tiles(self) -> list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
        """Return the parts of the table that fit on a sheet each."""
        wide = _pieces(self.columns, lambda part: self.size(self.rows[:1], part)[0] <= TILE_SIDE)
        found = []
        for columns in wide:

            def fits(part: Sequence[tuple[int, int]], columns: Sequence[tuple[int, int]] = columns) -> bool:
                width, height = self.size(part, columns)
                return height <= TILE_SIDE and width * height <= TILE_PIXELS

            found += [(rows, columns) for rows in _pieces(self.rows, fits)]
        return found

    def draw(self, rows: Sequence[tuple[int, int]], columns: Sequence[tuple[int, int]]) -> Image:
        """Return one sheet."""
        from PIL import Image, ImageDraw

        size, grid = self.size(rows, columns), self.table.grid
        sheet = Image.new("RGB", size, PAPER)
        pen = ImageDraw.Draw(sheet)
        y = MARGIN
        for place, line in enumerate(self.head(size[0])):
            _write(pen, MARGIN, y, line, INK if place == 0 else PALE)
            y += LINE
        y += LINE // 2
        for place, (column, repeat) in enumerate(columns):
            x = self._x(place)
            lines = _wrapped(grid.label(0, column), self.letters) + [
                one for one in [grid.label(AXES, repeat)] if one
            ]
            for number, line in enumerate(lines):
                _write(pen, x, y + number * LINE, line, INK)
        y += self.above
        last = None
        for z, row in rows:
            if len(grid.axes) > 2 and z != last:
                _write(pen, MARGIN, y, f"{grid.axes[2].title}: {grid.label(2, z)}", INK)
                y, last = y + LINE + GAP, z
            for number, line in enumerate(
                _wrapped(grid.label(1, row), (LABEL - GAP) // 8) if self.left else []
            ):
                _write(pen, MARGIN, y + number * LINE, line, INK)
            for place, (column, repeat) in enumerate(columns):
                self._cell(sheet, pen, self._x(place), y, self.table.cells[(column, row, z, repeat)])
            y += self.height + self.below + GAP
        return sheet

    def _x(self, place: int) -> int:
        return MARGIN + self.left + place * (self.width + GAP)

    def _cell(self, sheet: Image, pen: ImageDraw.ImageDraw, x: int, y: int, one: Shown) -> None:
        from PIL import Image

        if one.file is not None:
            picture = _middle(one.file)
            size = (picture.width * self.zoom, picture.height * self.zoom)
            sheet.paste(picture.resize(size, Image.Resampling.NEAREST) if self.zoom > 1 else picture, (x, y))
        else:
            pen.rectangle((x, y, x + self.width - 1, y + self.height - 1), outline="#a8a29e")
            pen.line((x, y, x + self.width - 1, y + self.height - 1), fill="#d6d3d1")
        for number, line in enumerate(self.caption(one)):
            _write(pen, x, y + self.height + 2 + number * LINE, line, PALE)


def _cell(one: Shown, picture: Callable[[Shown], str]) -> str:
    words = one.words or one.state
    if one.state != "done":
        kind = "failed" if one.state in ("failed", "poisoned") else "hint"
        return f'<td data-state="{safe(one.state)}"><span class="{kind}">{safe(words)}</span></td>'
    more = f'<span class="failed">{safe(one.error)}</span>' if one.error else ""
    return f'<td data-state="done">{picture(one)}<small>{safe(words)}</small>{more}</td>'


def _page(table: Table, folder: Path) -> str:
    """Return the grid as an HTML file whose pictures are the originals beside it."""

    def picture(one: Shown) -> str:
        assert one.file is not None
        place = Path(os.path.relpath(one.file, folder)).as_posix()
        alt = one.cell.request.prompt or "picture"
        return f'<a href="{safe(place)}"><img src="{safe(place)}" loading="lazy" alt="{safe(alt)}"></a>'

    dots = table.dots()
    drawn = (
        f'<h2>Speed against likeness</h2><div style="max-width:700px">{scatter(dots)}</div>{dots_html(table)}'
        if dots
        else ""
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Leapfrog: a grid</title><style>{STYLE}</style>'
        f'<h1>{safe(headline(table))}</h1><div class="sheet">{table_html(table, picture)}</div>{drawn}</html>\n'
    )


def _png(sheet: Image, table: Table) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(KEY, json.dumps(table.grid.to_dict()))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def _size(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as opened:
        return opened.size


def _middle(path: Path) -> Image:
    """Return a picture; of a clip the frame in its middle."""
    from PIL import Image

    with Image.open(path) as opened:
        opened.seek(getattr(opened, "n_frames", 1) // 2)
        return opened.convert("RGB")


def _write(pen: ImageDraw.ImageDraw, x: int, y: int, text: str, ink: str) -> None:
    from PIL import ImageFont

    pen.text((x, y), text, fill=ink, font=ImageFont.load_default(13))


def _wrapped(text: str, letters: int) -> list[str]:
    return textwrap.wrap(text, max(8, letters), break_long_words=True) or [""]


def _pieces(whole: Sequence[Any], fits: Callable[[Sequence[Any]], bool]) -> list[list[Any]]:
    """Return the whole in as few pieces as fit, each with at least one part."""
    return list(_cut(whole, fits))


def _cut(whole: Sequence[Any], fits: Callable[[Sequence[Any]], bool]) -> Iterator[list[Any]]:
    piece: list[Any] = []
    for one in whole:
        if piece and not fits([*piece, one]):
            yield piece
            piece = []
        piece.append(one)
    yield piece
