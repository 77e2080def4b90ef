"""Conditions of shape and light: Canny and soft edges, line art, blur, grey, low resolution, and the picture as it is.

Paper: A Computational Approach to Edge Detection; Canny; 1986; doi:10.1109/TPAMI.1986.4767851. XDoG: An eXtended
    Difference-of-Gaussians Compendium; Winnemoeller, Kyprianidis, Olsen; 2012; doi:10.1016/j.cag.2012.03.004 (line art).
Differs: line art keeps the dark side of an edge alone and fills no dark surfaces, so that black pictures have lines too.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from control._conditions import Array, Condition, grey_of
from dit.spec import knob, spec


@spec("picture")
class Picture(Condition):
    """The picture as it is: a subject, a style, a picture to restore."""

    about = "The picture as it is"
    instruction = "Generate image from style image"

    def made(self, picture: Array) -> Array:
        return picture


@spec("canny", paper="Canny 1986, doi:10.1109/TPAMI.1986.4767851")
class Canny(Condition):
    """Thin edges, white on black."""

    about = "Thin edges, white on black"
    instruction = "Generate image from canny edge"

    low: float = knob(default=0.06, label="Weakest slope that continues an edge, a pixel", low=0.0, high=1.0)
    high: float = knob(default=0.14, label="Weakest slope that begins an edge, a pixel", low=0.0, high=1.0)
    sigma: float = knob(default=1.0, label="Blur before edges are looked for", low=0.0, high=20.0, unit="px")

    def check(self) -> None:
        """Raises: ValueError if low is above high."""
        if self.low > self.high:
            raise ValueError(
                f"{self.name}: low must be at most high, got low={self.low:g}, high={self.high:g}"
            )

    def made(self, picture: Array) -> Array:
        # Two colours of one brightness have an edge too: the steepest colour decides.
        planes = np.stack([slopes(picture[..., i], self.sigma) for i in range(3)])
        steepest = np.hypot(planes[:, 0], planes[:, 1]).argmax(axis=0)
        down, right = np.take_along_axis(planes, steepest[None, None], axis=0)[0]
        strength = np.hypot(down, right)
        thin = np.where(crests(strength, down, right), strength, 0)
        weak = thin > self.low
        labels, count = ndimage.label(weak, structure=np.ones((3, 3)))
        kept = np.zeros(count + 1, dtype=bool)
        kept[np.unique(labels[weak & (thin > self.high)])] = True
        kept[0] = False
        return kept[labels].astype(np.float32)


@spec("soft-edge")
class SoftEdge(Condition):
    """How steep the picture is at each place, the steepest white."""

    about = "Soft edges, white on black"
    instruction = "Generate image from hed edge"

    sigma: float = knob(default=1.0, label="Blur before edges are looked for", low=0.0, high=20.0, unit="px")
    gamma: float = knob(default=0.7, label="Below 1 weak edges come out stronger", low=0.1, high=4.0)

    def made(self, picture: Array) -> Array:
        steep = np.max([np.hypot(*slopes(picture[..., i], self.sigma)) for i in range(3)], axis=0)
        return (steep / max(float(steep.max()), 1e-6)) ** np.float32(self.gamma)


@spec("line-art", paper="XDoG, doi:10.1016/j.cag.2012.03.004")
class LineArt(Condition):
    """Lines where the picture is darker than what is around them."""

    about = "Black lines on white"
    instruction = "Generate image from sketch"

    width: float = knob(default=1.0, label="Width of the lines", low=0.3, high=20.0, unit="px")
    strength: float = knob(default=8.0, label="How strongly weak contrasts become lines", low=0.5, high=100.0)
    inverted: bool = knob(default=False, label="White lines on black")

    def made(self, picture: Array) -> Array:
        grey = grey_of(picture)
        near, far = (ndimage.gaussian_filter(grey, self.width * wide, mode="nearest") for wide in (1.0, 1.6))
        lines = np.clip(self.strength * (far - near), 0, 1)
        return lines if self.inverted else 1 - lines


@spec("blur")
class Blur(Condition):
    """The picture out of focus: its colours and large shapes."""

    about = "The picture out of focus"
    instruction = "Image restoration"

    sigma: float = knob(default=4.0, label="Blur", low=0.3, high=200.0, unit="px")

    def made(self, picture: Array) -> Array:
        return np.asarray(ndimage.gaussian_filter(picture, (self.sigma, self.sigma, 0), mode="nearest"))


@spec("grey")
class Grey(Condition):
    """Brightness without colour."""

    about = "Brightness without colour"
    instruction = "Transform gray image to color image"

    def made(self, picture: Array) -> Array:
        return grey_of(picture)


@spec("low-resolution")
class LowResolution(Condition):
    """Means of square tiles, as a small picture shown large."""

    about = "The picture in few large pixels"
    instruction = "Image restoration"

    factor: int = knob(default=4, label="Side of a tile", low=2, high=256, unit="px")

    def made(self, picture: Array) -> Array:
        return spread(tiles(picture, self.factor), picture.shape[0], picture.shape[1], self.factor)


def slopes(plane: Array, sigma: float) -> tuple[Array, Array]:
    """[H, W] -> how much it rises downwards and to the right for one pixel, after a blur."""
    smooth = (
        ndimage.gaussian_filter(plane.astype(np.float32), sigma, mode="nearest", truncate=2)
        if sigma
        else plane
    )
    # A Sobel filter adds four differences of pixels that are two apart.
    down, right = (ndimage.sobel(smooth, axis, mode="nearest") / 8 for axis in (0, 1))
    return down, right


def crests(strength: Array, down: Array, right: Array) -> Array:
    """Whether a place [H, W] is the strongest of three along the slope, which is taken in one of four directions."""
    padded = np.pad(strength, 1)
    rows, columns = strength.shape

    def beside(row: int, column: int) -> Array:
        return padded[1 + row : 1 + row + rows, 1 + column : 1 + column + columns]

    steep, wide = np.abs(down), np.abs(right)
    # tan 22.5 degrees: half way between a side and a corner
    level, upright = steep <= 0.41421356 * wide, wide <= 0.41421356 * steep
    falling = (down * right > 0) & ~level & ~upright
    found = np.zeros(strength.shape, dtype=bool)
    for chosen, (row, column) in (
        (level, (0, 1)), (upright & ~level, (1, 0)), (falling, (1, 1)), (~(level | upright | falling), (1, -1)),
    ):  # fmt: skip
        # Of two equal neighbours one is kept.
        top = (strength > beside(-row, -column)) & (strength >= beside(row, column))
        found |= chosen & top
    return found & (strength > 0)


def tiles(picture: Array, side: int) -> Array:
    """[H, W, C] -> means of tiles [ceil(H / side), ceil(W / side), C]; the last ones may be narrower."""
    rows, columns = (np.arange(0, length, side) for length in picture.shape[:2])
    sums = np.add.reduceat(np.add.reduceat(picture.astype(np.float64), rows, axis=0), columns, axis=1)
    heights, widths = (
        np.diff([*starts, length]) for starts, length in zip((rows, columns), picture.shape[:2], strict=True)
    )
    return (sums / (heights[:, None, None] * widths[None, :, None])).astype(np.float32)


def spread(means: Array, height: int, width: int, side: int) -> Array:
    """The inverse shape: each tile's colour on all its pixels, [H, W, C]."""
    return np.repeat(np.repeat(means, side, axis=0), side, axis=1)[:height, :width]
