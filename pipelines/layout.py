"""Where the panels of a set lie in one canvas: rows and columns with gutters, put together and cut apart again exactly.

Paper: In-Context LoRA for Diffusion Transformers, Huang et al. 2024, arXiv:2410.23775 (a set of pictures is one canvas).
Differs: gutters between panels, which are made along and thrown away; sides that do not fit a model are refused, never resized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from pipelines.request import LAYOUTS, RequestError

MOST_PANELS = 16
MOST_TOKENS = 16_384
"""Most tokens of a canvas: attention grows with the square of their number."""
_SIDE = 16_384
_FIELDS = ("rows", "columns", "height", "width", "gutter")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Panels of `height` x `width` px in rows and columns, read like a page, `gutter` px apart.

    Raises:
        RequestError: no panels, too many, or sides and gutters that are no whole numbers of pixels.
    """

    rows: int
    columns: int
    height: int
    width: int
    gutter: int = 0

    def __post_init__(self) -> None:
        for name in _FIELDS:
            value, low = getattr(self, name), 0 if name == "gutter" else 1
            high = MOST_PANELS if name in ("rows", "columns") else _SIDE
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise RequestError(f"layout {name}", value, f"a whole number from {low} to {high}")
        if self.count > MOST_PANELS:
            raise RequestError("panels", self.count, f"a whole number from 1 to {MOST_PANELS}")

    @classmethod
    def of(cls, count: int, height: int, width: int, *, arrangement: str = "grid", gutter: int = 0) -> Layout:
        """Arrange `count` panels: in a row, in a column, or in the grid nearest to a square that they fill (a prime count: a row).

        Raises:
            RequestError: a count out of 1 to `MOST_PANELS`, or no such arrangement.
        """
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_PANELS:
            raise RequestError("panels", count, f"a whole number from 1 to {MOST_PANELS}")
        if arrangement not in LAYOUTS:
            raise RequestError("layout", arrangement, f"one of {', '.join(LAYOUTS)}")
        rows = {"row": 1, "column": count}.get(arrangement)
        if rows is None:
            rows = max(one for one in range(1, int(count**0.5) + 1) if count % one == 0)
        return cls(rows=rows, columns=count // rows, height=height, width=width, gutter=gutter)

    @property
    def count(self) -> int:
        """How many panels there are."""
        return self.rows * self.columns

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the canvas."""
        return (
            self.rows * self.height + (self.rows - 1) * self.gutter,
            self.columns * self.width + (self.columns - 1) * self.gutter,
        )

    def boxes(self) -> tuple[tuple[slice, slice], ...]:
        """Return the rows and columns of the canvas that each panel takes."""
        down, right = self.height + self.gutter, self.width + self.gutter
        return tuple(
            (slice(row * down, row * down + self.height), slice(column * right, column * right + self.width))
            for row in range(self.rows)
            for column in range(self.columns)
        )

    def divided(self, by: int) -> Layout:
        """Return the same layout in units of `by` px: latent pixels, tokens. Raises: RequestError where it does not divide."""
        for name in ("height", "width", "gutter"):
            if getattr(self, name) % by:
                field = name if name != "gutter" else "layout gutter"
                raise RequestError(field, getattr(self, name), f"a multiple of {by} px for this model")
        return dataclasses.replace(
            self, height=self.height // by, width=self.width // by, gutter=self.gutter // by
        )

    def check(self, multiple: int, *, tokens: int = MOST_TOKENS, side: int | None = None) -> None:
        """Check that a model can make the canvas.

        Args:
            multiple: px of a token's side. tokens: most tokens of a canvas. side: most tokens along a side, where there is a most.

        Raises:
            RequestError: a side that does not divide, or a canvas of too many tokens.
        """
        height, width = self.divided(multiple).canvas
        told = f"{self.canvas[1]}x{self.canvas[0]} px, {height * width} tokens"
        fewer = "make fewer or smaller panels"
        if height * width > tokens:
            raise RequestError("panels", told, f"a canvas of at most {tokens} tokens: {fewer}")
        if side is not None and max(height, width) > side:
            raise RequestError(
                "panels", told, f"a canvas of at most {side * multiple} px a side for this model: {fewer}"
            )

    def joined(self, panels: Tensor | Sequence[Tensor], *, fill: float = 1.0) -> Tensor:
        """Put panels [..., n, C, height, width] into one canvas [..., C, H, W]; gutters hold `fill`.

        Raises:
            RequestError: another count of panels, or a panel of another size.
        """
        each = list(panels.unbind(-4)) if isinstance(panels, Tensor) else list(panels)
        if len(each) != self.count:
            raise RequestError("panels", len(each), f"as many as the layout has, {self.count}")
        for place, one in enumerate(each):
            if tuple(one.shape[-2:]) != (self.height, self.width):
                got = f"{one.shape[-1]}x{one.shape[-2]}"
                raise RequestError(f"panel {place + 1}", got, f"{self.width}x{self.height} px as every panel")
        canvas = torch.full((*each[0].shape[:-2], *self.canvas), fill).to(each[0])
        for (rows, columns), one in zip(self.boxes(), each, strict=True):
            canvas[..., rows, columns] = one
        return canvas

    def cut(self, canvas: Tensor) -> Tensor:
        """Cut a canvas [..., C, H, W] into its panels [..., n, C, height, width]; gutters are thrown away.

        Raises:
            RequestError: a canvas of another size.
        """
        if tuple(canvas.shape[-2:]) != self.canvas:
            got, wanted = (f"{w}x{h}" for h, w in (canvas.shape[-2:], self.canvas))
            raise RequestError("canvas", got, f"{wanted} px for this layout")
        return torch.stack([canvas[..., rows, columns] for rows, columns in self.boxes()], dim=-4)

    def mask(self, panels: Sequence[int]) -> Tensor:
        """Return where the panels of these numbers (from 0) lie on the canvas, bool [H, W]."""
        found, boxes = torch.zeros(self.canvas, dtype=torch.bool), self.boxes()
        for place in panels:
            found[boxes[place]] = True
        return found

    def to_dict(self) -> dict[str, int]:
        """Return the JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read the JSON form. Raises: RequestError for another one."""
        if not isinstance(values, Mapping) or set(values) != set(_FIELDS):
            raise RequestError("layout", values, f"a dictionary of {', '.join(_FIELDS)}")
        return cls(**values)
