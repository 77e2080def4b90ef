"""How far two pictures are apart, in float64: PSNR, SSIM and a verdict in words.

Paper: Image Quality Assessment: From Error Visibility to Structural Similarity, Wang et al. 2004 (SSIM, Gaussian window of
11 pixels, deviation 1.5).
Differs: nothing is subtracted in 8 bits, where differences would wrap around.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """Distance of a picture from another: `psnr` in dB (infinite if equal), `ssim` up to 1, `largest` in grey levels."""

    psnr: float
    ssim: float
    largest: int

    @property
    def verdict(self) -> str:
        """The distance in words."""
        if self.largest == 0:
            return "identical"
        if self.largest <= 1:
            return "within rounding"
        return "small" if self.psnr >= 35 else "visible" if self.psnr >= 20 else "a different picture"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; an infinite PSNR is null."""
        psnr = None if math.isinf(self.psnr) else round(self.psnr, 2)
        return {
            "psnr_db": psnr,
            "ssim": round(self.ssim, 5),
            "largest": self.largest,
            "verdict": self.verdict,
        }

    def __str__(self) -> str:
        return (
            "identical"
            if self.largest == 0
            else f"PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.3f}: {self.verdict}"
        )


def difference(a: Image, b: Image) -> Difference:
    """Compare two pictures of one size. Raises: ValueError where the sizes differ."""
    return difference_of_clips([a], [b])


def difference_of_clips(a: Sequence[Image], b: Sequence[Image]) -> Difference:
    """Compare two clips frame by frame: PSNR of the error over all frames, mean SSIM. Raises: ValueError, see `difference`."""
    if len(a) != len(b) or not a:
        raise ValueError(f"clips of {len(a)} and {len(b)} frames cannot be compared")
    errors, similar, largest = [], [], 0
    for one, other in zip(a, b, strict=True):
        if one.size != other.size:
            raise ValueError(f"pictures of {one.size} and {other.size} px cannot be compared")
        x, y = (np.asarray(picture.convert("RGB"), dtype=np.float64) for picture in (one, other))
        errors.append(float(np.mean((x - y) ** 2)))
        similar.append(ssim(np.moveaxis(x, -1, 0), np.moveaxis(y, -1, 0)))
        largest = max(largest, int(np.abs(x - y).max()))
    return Difference(psnr(float(np.mean(errors))), float(np.mean(similar)), largest)


def psnr(error: float, span: float = 255.0) -> float:
    """Return the peak signal-to-noise ratio in dB for a mean squared error of values that span `span`."""
    return math.inf if error == 0 else 10 * math.log10(span**2 / error)


def ssim(x: Array, y: Array, span: float = 255.0) -> float:
    """Return the mean structural similarity over full windows, every plane by itself: [..., H, W] in float64.

    Raises:
        ValueError: a side is smaller than the window of 11.
    """
    offset = np.arange(11) - 5
    weights = np.exp(-(offset**2) / (2 * 1.5**2))
    weights /= weights.sum()

    def blurred(z: Array) -> Array:
        rows = sum(w * z[..., i : z.shape[-2] - 10 + i, :] for i, w in enumerate(weights))
        return np.asarray(sum(w * rows[..., i : z.shape[-1] - 10 + i] for i, w in enumerate(weights)))

    if min(x.shape[-2:]) < 11:
        raise ValueError(
            f"SSIM needs pictures with sides of 11 px or more, got {x.shape[-1]} x {x.shape[-2]}"
        )
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))
