"""Grids: one request with up to three things changed along axes, and seeds; every cell is an item of the job ledger.

A cell's name is made of its content key, so a grid that is started again, or made larger, makes only what is missing, and equal
cells are made once. Where accelerators change, the exact picture of every cell is made too: against it stand time and likeness.

Differs: cells are ordered by model and LoRA, so that nothing is loaded twice; an exact cell is never the first of its model, so
that what warms up counts against the accelerators.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipelines._grid_axes import Axis, Value, read_axis
from pipelines._grid_estimates import Estimate, estimate
from pipelines._jobs_keys import content_key, digests_of
from pipelines.request import LARGEST_SEED, Request, RequestError

if TYPE_CHECKING:
    from pipelines.jobs import Item, Job

__all__ = ["Axis", "Cell", "Estimate", "Grid", "Shown", "Table", "Value", "estimate", "read_axis", "table"]

AXES, SEEDS, CELLS = 3, 64, 2000
"""Most axes, seeds and cells."""
NAMES = ("x", "y", "z")
PROBLEMS = 12
"""Cells that cannot be, told in one error."""
VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One picture: its place (x, y, z, repeat), request and content key, and the key of its exact picture ("" for none)."""

    place: tuple[int, int, int, int]
    request: Request
    key: str
    exact: str = ""

    @property
    def id(self) -> str:
        """Its name in the ledger."""
        return f"cell-{self.key.partition(':')[2][:24]}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is asked for.

    Args:
        request: all that does not change. axes: one to three. seeds: how often every cell is made, with the next seed each time.
        references: make the exact picture of every cell too, where accelerators change.

    Raises:
        RequestError: no or too many axes, seeds or cells, or the same thing on two axes.
    """

    request: Request
    axes: tuple[Axis, ...]
    seeds: int = 1
    references: bool = True

    def __post_init__(self) -> None:
        fields = [axis.field for axis in self.axes]
        if not 1 <= len(fields) <= AXES or len(set(fields)) < len(fields):
            raise RequestError("axes", fields, f"1 to {AXES}, each for another field")
        if not isinstance(self.seeds, int) or isinstance(self.seeds, bool) or not 1 <= self.seeds <= SEEDS:
            raise RequestError("seeds", self.seeds, f"a whole number from 1 to {SEEDS}")
        if "seed" in fields and self.seeds > 1:
            raise RequestError("seeds", self.seeds, "1 where the seed is an axis")
        if math.prod(self.shape) > CELLS:
            raise RequestError("grid", " x ".join(map(str, self.shape)), f"at most {CELLS} cells")
        object.__setattr__(self, "request", self.request.replace(images=1))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """How many values each axis has, and how many seeds."""
        found = [len(axis.values) for axis in self.axes] + [1] * (AXES - len(self.axes))
        return found[0], found[1], found[2], self.seeds

    @property
    def accelerates(self) -> bool:
        """Whether accelerators change along an axis."""
        return any(axis.accelerates for axis in self.axes)

    def label(self, axis: int, place: int) -> str:
        """Return what stands beside a row, column or block; axes are counted from 0, and 3 are the seeds."""
        if axis < len(self.axes):
            return self.axes[axis].values[place].label
        return f"seed {self.request.seed + place}" if axis == AXES and self.seeds > 1 else ""

    def cells(self) -> tuple[Cell, ...]:
        """Return every cell, in the order of the axes. Raises: RequestError naming all cells that cannot be."""
        models: dict[str, str] = {}
        found: list[Cell] = []
        wrong: list[str] = []
        for place in _places(self.shape):
            try:
                request = self._request(place)
                exact = request.replace(accelerators=(), profile=None)
                key, other = (_key(one, models) for one in (request, exact))
                found.append(
                    Cell(place=place, request=request, key=key, exact=other if self._referred else "")
                )
            except RequestError as error:
                wrong.append(f"{self._where(place)}: {error}")
        if wrong:
            more = [f"and {len(wrong) - PROBLEMS} more"] if len(wrong) > PROBLEMS else []
            raise RequestError(
                "grid", f"{len(wrong)} cells that cannot be", "; ".join(wrong[:PROBLEMS] + more)
            )
        return tuple(found)

    def work(self) -> tuple[Cell, ...]:
        """Return the cells to make, equal ones once, exact references added, in the order in which they are made."""
        cells = self.cells()
        unique = {cell.key: cell for cell in reversed(cells)}
        for cell in cells:
            if cell.exact and cell.exact not in unique:
                plain = cell.request.replace(accelerators=(), profile=None)
                unique[cell.exact] = Cell(place=cell.place, request=plain, key=cell.exact, exact=cell.exact)
        order = sorted(unique.values(), key=lambda cell: cell.place)
        order.sort(
            key=lambda cell: (
                cell.request.model,
                str(cell.request.dtype),
                str(cell.request.device),
                _loras(cell),
            )
        )
        first: set[str] = set()
        for place, cell in enumerate(order):  # see Differs
            if cell.request.model not in first and cell.request.accelerators == () and cell.exact:
                later = next((i for i in range(place + 1, len(order)) if order[i].request.model == cell.request.model
                              and order[i].request.accelerators), None)  # fmt: skip
                if later is not None and _loras(order[later]) == _loras(cell):
                    order[place], order[later] = order[later], order[place]
            first.add(cell.request.model)
        return tuple(order)

    def check(self) -> None:
        """Hold every cell against its model's card, before anything loads. Raises: RequestError."""
        from pipelines import catalog
        from pipelines.generate import check

        cards: dict[str, Any] = {}
        for cell in self.cells():
            model = cell.request.model
            if model not in cards:
                source = catalog.find(model)
                cards[model] = None if source.folder is None else catalog.prepare(source)[1]
            if cards[model] is not None:
                check(cell.request, cards[model])

    def items(
        self,
        *,
        batch: str,
        owner: str = "",
        folder: str | Path = "",
        tags: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> list[Item]:
        """Return the cells as items of a ledger, files named after the cells."""
        from pipelines.jobs import Item

        return [
            Item(request=cell.request.to_dict(), id=cell.id, batch=batch, owner=owner, folder=str(folder),
                 output=f"{cell.id}.png", tags=dict(tags or {}), priority=priority)
            for cell in self.work()
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "leapfrog_grid": VERSION, "request": self.request.to_dict(), "axes": [axis.text for axis in self.axes],
            "seeds": self.seeds, "references": self.references,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read the JSON form. Raises: RequestError."""
        if not isinstance(values, Mapping) or values.get("leapfrog_grid") != VERSION:
            raise RequestError("grid", values, f"a grid of version {VERSION}")
        try:
            axes = tuple(read_axis(str(text)) for text in values["axes"])
            request = Request.from_dict(values["request"])
            return cls(
                request=request, axes=axes, seeds=values["seeds"], references=bool(values["references"])
            )
        except (KeyError, TypeError) as error:
            raise RequestError("grid", values, f"a whole grid ({error})") from None

    @property
    def _referred(self) -> bool:
        return self.references and self.accelerates

    def _request(self, place: Sequence[int]) -> Request:
        values = self.request.to_dict()
        repeat = place[AXES]
        chosen = [(axis, axis.values[at]) for axis, at in zip(self.axes, place, strict=False)]
        whole = any(axis.field in ("accelerators", "profile") for axis in self.axes)
        for axis, value in sorted(
            chosen, key=lambda one: bool(one[0].method)
        ):  # whole accelerators before their settings
            axis.put(values, value, alone=not whole)
        values["seed"] = int(values["seed"]) + repeat
        if values["seed"] > LARGEST_SEED:
            raise RequestError("seed", values["seed"], f"at most {LARGEST_SEED}")
        return Request.from_dict(values)

    def _where(self, place: Sequence[int]) -> str:
        return ", ".join(
            f"{axis.field}={axis.values[at].label}" for axis, at in zip(self.axes, place, strict=False)
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A cell with what came of it; `speedup` of denoising and `psnr` (dB) are to its exact picture, None where not known."""

    cell: Cell
    state: str = "waiting"
    file: Path | None = None
    job: str = ""
    error: str = ""
    seconds: float | None = None
    speedup: float | None = None
    psnr: float | None = None
    is_exact: bool = False

    @property
    def words(self) -> str:
        """What stands under the picture."""
        if self.state != "done":
            return self.error if self.state in ("failed", "poisoned") else self.state
        parts = [] if self.seconds is None else [f"{self.seconds:.2f} s"]
        if self.is_exact:
            return " · ".join([*parts, "exact"])
        parts += [] if self.speedup is None else [f"{self.speedup:.2f}x"]
        parts += (
            [] if self.psnr is None else ["identical" if math.isinf(self.psnr) else f"{self.psnr:.1f} dB"]
        )
        return " · ".join(parts)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A grid with what came of it, by place."""

    grid: Grid
    cells: dict[tuple[int, int, int, int], Shown]

    def dots(self) -> list[Any]:
        """Return a `pipelines.scatter.Dot` for each combination that is not exact: medians over its seeds."""
        from pipelines.scatter import Dot

        groups: dict[tuple[int, ...], list[Shown]] = {}
        for place, one in self.cells.items():
            if one.speedup is not None and one.psnr is not None and not one.is_exact:
                groups.setdefault(place[:AXES], []).append(one)
        dots = []
        for group, found in groups.items():
            label = ", ".join(self.grid.label(axis, group[axis]) for axis in range(len(self.grid.axes)))
            psnr = statistics.median(one.psnr or 0.0 for one in found)
            speedup = statistics.median(one.speedup or 0.0 for one in found)
            dots.append(Dot(label=label, speedup=speedup, psnr=psnr, pictures=len(found)))
        return dots

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; an infinite PSNR is null, and `identical` tells it."""
        rows = [
            {"place": list(place), "labels": [self.grid.label(axis, place[axis]) for axis in range(AXES + 1)],
             "id": one.cell.id, "state": one.state, "file": None if one.file is None else str(one.file), "error": one.error,
             "seed": one.cell.request.seed, "seconds_denoise": one.seconds, "speedup_denoise": one.speedup,
             "psnr_db": None if one.psnr is None or math.isinf(one.psnr) else round(one.psnr, 2),
             "identical": one.psnr is not None and math.isinf(one.psnr), "exact": one.is_exact}
            for place, one in self.cells.items()
        ]  # fmt: skip
        return self.grid.to_dict() | {"cells": rows, "front": [dot.to_dict() for dot in _front(self.dots())]}


def table(grid: Grid, jobs: Iterable[Job]) -> Table:
    """Join a grid with the jobs of its cells; pictures are read to measure likeness, each pair once."""
    by_key = {job.key: job for job in jobs}
    cells = {}
    for cell in grid.cells():
        job = by_key.get(cell.key)
        exact = by_key.get(cell.exact) if cell.exact else None
        cells[cell.place] = Shown(cell=cell) if job is None else _shown(cell, job, exact)
    return Table(grid=grid, cells=cells)


def _shown(cell: Cell, job: Job, exact: Job | None) -> Shown:
    plain = not cell.request.accelerators and cell.request.profile is None
    if job.state != "done" or not job.files:
        return Shown(cell=cell, state=job.state, job=job.name, error=job.error, is_exact=plain)
    seconds = job.report.get("timings", {}).get("denoise")
    speedup = psnr = None
    if exact is not None and exact.state == "done" and exact.files and not plain:
        other = exact.report.get("timings", {}).get("denoise")
        speedup = other / seconds if other and seconds else None
        from pipelines.likeness import psnr_of

        psnr = psnr_of(Path(job.files[0]), Path(exact.files[0]))
    failures = job.report.get("failures") or []
    return Shown(
        cell=cell, state="done", file=Path(job.files[0]), job=job.name, seconds=seconds, speedup=speedup, psnr=psnr,
        error="; ".join(map(str, failures)), is_exact=plain,
    )  # fmt: skip


def _front(dots: Sequence[Any]) -> list[Any]:
    from pipelines.pareto import front

    return front(dots)


def _places(shape: tuple[int, int, int, int]) -> Iterator[tuple[int, int, int, int]]:
    x, y, z, repeats = (range(count) for count in shape)
    return itertools.product(x, y, z, repeats)


def _key(request: Request, models: dict[str, str]) -> str:
    values = request.to_dict()
    return content_key(values, digests_of(values, models))


def _loras(cell: Cell) -> str:
    return json.dumps([one.to_dict() for one in cell.request.loras], sort_keys=True, default=str)
