"""Which steps to compute: the effect of each single shortened step is measured, and the best rows of steps are worked out.

Paper: none; the choice of full steps is a quadratic problem once the effects are known. The sketch is the count sketch of
    Finding Frequent Items in Data Streams, Charikar et al. 2002.
Differs: published schedules are even, or follow a threshold; these are searched for one model, scheduler and step count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH = 512
"""Numbers that stand for a picture's difference."""
PEAK = 20 * math.log10(255)


def sketch(difference: Array) -> Array:
    """Return `WIDTH` numbers for a difference of two pictures in grey levels; inner products are kept, up to a few percent.

    The square of its length is the mean square of the difference exactly.
    """
    values = np.asarray(difference, dtype=np.float64).ravel()
    places, signs = _hashes(values.size)
    found = np.bincount(places, weights=values * signs, minlength=WIDTH)
    length, wanted = float(np.linalg.norm(found)), math.sqrt(float(np.mean(values**2)))
    return found * (wanted / length) if length else found


@functools.lru_cache(maxsize=2)
def _hashes(size: int) -> tuple[Array, Array]:
    random = np.random.default_rng(20020401)
    return random.integers(0, WIDTH, size), random.integers(0, 2, size) * 2.0 - 1.0


def every(interval: int, steps: int) -> str:
    """Return the row that computes every n-th step, as text: 1 full, 0 shortened."""
    return "".join("1" if step % interval == 0 else "0" for step in range(steps))


class Effects:
    """What each single shortened step does to the picture, and from that an estimate of what several do together.

    The error of a shortened step is taken to grow with its distance from the full steps it is made from, and errors to add
    up as vectors: right for small ones, too dark for large ones, so what is proposed here is measured afterwards.

    Args:
        sketches: for each picture [steps, WIDTH], row t from a run in which only step t was shortened.
        order: of the forecast; 0 reuses.
        fixed: so many steps at the start stay full.
    """

    def __init__(self, sketches: Sequence[Array], order: int = 0, fixed: int = 1) -> None:
        self.order, self.steps, self.fixed = order, len(sketches[0]), fixed
        self._products = [one @ one.T for one in sketches]

    def predicted(self, rows: Iterable[str]) -> Array:
        """Estimate the mean PSNR in dB for each row of steps."""
        weights = np.stack([self._weights(row) for row in rows])
        squares = [
            np.maximum(np.einsum("ms,st,mt->m", weights, one, weights), 1e-9) for one in self._products
        ]
        found: Array = PEAK - np.mean([10 * np.log10(one) for one in squares], axis=0)
        return found

    def _weights(self, row: str) -> Array:
        """Return how far each shortened step is from what it is made of, 1 where all steps before it are full."""
        found, anchors = np.zeros(self.steps), [0]
        for step, letter in enumerate(row):
            if letter == "1":
                anchors = [step, *[one for one in anchors if one != step]][: self.order + 1]
            else:
                found[step] = math.prod(step - one for one in anchors) / math.factorial(len(anchors))
        return found

    def best(self, full: int, starts: Sequence[str] = ()) -> str:
        """Return the row with `full` full steps that promises the best picture: exchange two steps while that helps."""
        known = [one for one in starts if one.count("1") == full] + [even(full, self.steps, self.fixed)]
        row = max(known, key=lambda one: float(self.predicted([one])[0]))
        best = float(self.predicted([row])[0])
        while others := exchanges(row, self.fixed):
            values = self.predicted(others)
            place = int(values.argmax())
            if values[place] <= best + 1e-9:
                break
            row, best = others[place], float(values[place])
        return row

    def ladder(self) -> dict[int, str]:
        """Return a row for every number of full steps, most first; each begins from the one before."""
        found: dict[int, str] = {}
        starts: list[str] = []
        for full in range(self.steps - 1, self.fixed - 1, -1):
            found[full] = self.best(full, starts)
            starts = _without_one(found[full], self.fixed)
        return found


def even(full: int, steps: int, fixed: int = 1) -> str:
    """Return a row of steps with `full` of them full: the first `fixed`, the others as evenly as can be."""
    start = fixed - 1
    chosen = {
        *range(start),
        *(start + place * (steps - start) // (full - start) for place in range(full - start)),
    }
    return "".join("1" if step in chosen else "0" for step in range(steps))


def exchanges(row: str, fixed: int = 1) -> list[str]:
    """Return all rows in which a full step and a shortened one have changed places; the first `fixed` stay full."""
    full = [step for step, letter in enumerate(row) if letter == "1" and step >= fixed]
    short = [step for step, letter in enumerate(row) if letter == "0"]
    return [_swapped(row, a, b) for a in full for b in short]


def shifts(row: str, fixed: int = 1) -> list[str]:
    """Return all rows in which one full step has moved by one; the first `fixed` stay full."""
    return [
        _swapped(row, a, b)
        for a in range(fixed, len(row))
        for b in (a - 1, a + 1)
        if row[a] == "1" and b < len(row) and row[b] == "0"
    ]


def _without_one(row: str, fixed: int) -> list[str]:
    full = [step for step, letter in enumerate(row) if letter == "1" and step >= fixed]
    return [row[:step] + "0" + row[step + 1 :] for step in full]


def _swapped(row: str, a: int, b: int) -> str:
    letters = list(row)
    letters[a], letters[b] = letters[b], letters[a]
    return "".join(letters)
