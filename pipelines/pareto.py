"""Points of speed against likeness, and which of them no other beats."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

from pipelines.trials import Methods


class Placed(Protocol):
    """What can stand on a front: how many times as fast, and how like the exact picture (PSNR in dB)."""

    @property
    def speedup(self) -> float: ...

    @property
    def psnr(self) -> float: ...


One = TypeVar("One", bound=Placed)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Accelerators with what was measured on `pictures` pictures; the speed-up is the denoising loop's.

    Until it was `timed`, it is an estimate from the block calls computed.
    """

    methods: Methods
    speedup: float
    psnr: float
    ssim: float
    fraction: float
    pictures: int
    timed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "accelerators": [str(one) for one in self.methods], "speedup_denoise": round(self.speedup, 3),
            "speedup_is": "measured" if self.timed else "estimated", "psnr_db": round(self.psnr, 2),
            "ssim": round(self.ssim, 5), "computed": round(self.fraction, 4), "pictures": self.pictures,
        }  # fmt: skip


def front(points: Iterable[One]) -> list[One]:
    """Return the points that no other beats in both speed-up and PSNR, slowest first."""
    found: list[One] = []
    for one in sorted(points, key=lambda one: (-one.speedup, -one.psnr)):
        if not found or one.psnr > found[-1].psnr:
            found.append(one)
    return found[::-1]


def layers(points: Sequence[Point], count: int) -> list[Point]:
    """Return at least `count` points, as far as there are: the front, then the front of the rest, and so on."""
    rest = list(points)
    found: list[Point] = []
    while rest and len(found) < count:
        layer = front(rest)
        found += layer
        rest = [one for one in rest if one not in layer]
    return found
