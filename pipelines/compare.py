"""How far two pictures are apart, in float64: PSNR, SSIM and a verdict in words.

Paper: Image Quality Assessment: From Error Visibility to Structural Similarity, Wang et al. 2004 (SSIM, Gaussian window of
11 pixels, deviation 1.5).
Differs: nothing is subtracted in 8 bits, where differences would wrap around.
"""

from __future__ import annotations

import dataclasses
import math
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
    if a.size != b.size:
        raise ValueError(f"pictures of {a.size} and {b.size} px cannot be compared")
    x, y = (np.asarray(one.convert("RGB"), dtype=np.float64) for one in (a, b))
    error = float(np.mean((x - y) ** 2))
    psnr = math.inf if error == 0 else 10 * math.log10(255.0**2 / error)
    return Difference(psnr, ssim(x, y), int(np.abs(x - y).max()))


def ssim(x: Array, y: Array) -> float:
    """Mean structural similarity of two pictures [H, W, 3] in 0..255, over full windows."""
    offset = np.arange(11) - 5
    weights = np.exp(-(offset**2) / (2 * 1.5**2))
    weights /= weights.sum()

    def blurred(z: Array) -> Array:
        rows = sum(w * z[i : z.shape[0] - 10 + i] for i, w in enumerate(weights))
        return np.asarray(sum(w * rows[:, i : z.shape[1] - 10 + i] for i, w in enumerate(weights)))

    if min(x.shape[:2]) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11 x 11 px, got {x.shape[1]} x {x.shape[0]}")
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))
