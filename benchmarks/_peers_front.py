"""Fronts, bounds and levels: what `benchmarks.peers` makes of its points.

The rule for a speed-up at a level of quality: take the points of one method that no other point of it beats in both speed and
mean PSNR (its front); between the two neighbours whose PSNR lies on both sides of the level, read the speed-up off the
straight line. Nothing is read off beyond the last point: then the level is not reached.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pipelines.pareto import front


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One setting: how much faster, and the mean PSNR in dB."""

    speedup: float
    psnr: float
    words: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """A speed-up at a level; `between` names the settings it was read off. `beyond` says why there is none."""

    speed: float | None
    between: tuple[str, ...] = ()
    beyond: str = ""


def at_level(points: Sequence[Point], level: float) -> Reading:
    """Return the speed-up of a method at a mean PSNR of `level` dB, by the rule above."""
    known = front(points)
    if not known:
        return Reading(None, beyond="not measured")
    if known[0].psnr < level:
        return Reading(None, beyond=f"not reached: {known[0].psnr:.1f} dB at most")
    if known[-1].psnr > level:
        last = known[-1]
        return Reading(
            None, beyond=f"not reached: still {last.psnr:.1f} dB at {last.speedup:.2f}x, its fastest setting"
        )
    for slow, fast in zip(known, known[1:] or known, strict=False):
        if slow.psnr >= level >= fast.psnr:
            if slow.psnr == fast.psnr:
                return Reading(slow.speedup, (slow.words,))
            share = (slow.psnr - level) / (slow.psnr - fast.psnr)
            return Reading(slow.speedup + share * (fast.speedup - slow.speedup), (slow.words, fast.words))
    raise AssertionError("the front has no gap")


def bound(fraction: float, cost: float) -> float:
    """Return the greatest speed-up where a fraction of the blocks' work is done and an empty call costs `cost` of a full one."""
    return 1 / (fraction + (1 - fraction) * cost)


def delta_formula(interval: int, cached: int, blocks: int) -> float:
    """Return Delta-cache's speed-up for `cached` of `blocks` blocks left out in all but every `interval`-th step."""
    return 1 / (1 - (interval - 1) / interval * cached / blocks)


def ahead(ours: Reading, peers: Sequence[Reading]) -> float | None:
    """Return how many times as fast ours is as the best peer at one level; None where either does not reach it."""
    best = max((one.speed for one in peers if one.speed is not None), default=None)
    return None if ours.speed is None or best is None else ours.speed / best
