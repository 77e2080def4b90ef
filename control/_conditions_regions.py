"""Conditions of colours and places: palette, segments, the thing in the picture as a mask or as boxes, masks to be filled.

Things are told from their ground by colour alone (k-means, Otsu): no weights, and right where the ground is plain.

Paper: A Threshold Selection Method from Gray-Level Histograms; Otsu; 1979; doi:10.1109/TSMC.1979.4310076.
Differs: k-means starts from the farthest points and not from random ones, so that one picture has one answer.
"""

from __future__ import annotations

import colorsys

import numpy as np
from scipy import ndimage

from control._conditions import Array, Condition, grey_of, resized
from control._conditions_edges import spread, tiles
from dit.spec import knob, spec

_SAMPLES = 4096  # points that k-means looks at; all others take the nearest centre


@spec("palette")
class Palette(Condition):
    """Large tiles of few colours: which colours, and roughly where."""

    about = "Few colours in large tiles"
    instruction = "Generate image from color palette"

    colours: int = knob(default=6, label="Colours", low=2, high=64)
    cells: int = knob(default=8, label="Tiles along the longer side", low=1, high=256)

    def made(self, picture: Array) -> Array:
        height, width = picture.shape[:2]
        side = -(-max(height, width) // self.cells)
        means = tiles(picture, side)
        points = means.reshape(-1, 3)
        centres = centres_of(points, self.colours)
        return spread(centres[nearest_of(points, centres)].reshape(means.shape), height, width, side)


@spec("segments")
class Segments(Condition):
    """Surfaces of one colour each."""

    about = "Surfaces of one colour"
    instruction = "Generate image from segmentation map"

    segments: int = knob(default=6, label="Kinds of surface", low=2, high=64)
    smoothing: float = knob(
        default=1.0, label="Blur before surfaces are looked for", low=0.0, high=50.0, unit="px"
    )
    nearness: float = knob(
        default=0.2, label="How much places near each other belong together", low=0.0, high=4.0
    )
    colours: str = knob(
        default="mean",
        label="Colour of a surface: its own mean, or one of a fixed list",
        choices=("mean", "list"),
    )

    def made(self, picture: Array) -> Array:
        height, width = picture.shape[:2]
        smooth = np.asarray(
            ndimage.gaussian_filter(picture, (self.smoothing, self.smoothing, 0), mode="nearest")
        )
        rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
        points = np.dstack([smooth, self.nearness * rows, self.nearness * columns]).reshape(-1, 5)
        labels = nearest_of(points, centres_of(points, self.segments))
        counts = np.maximum(np.bincount(labels, minlength=self.segments), 1)
        colours = picture.reshape(-1, 3).astype(np.float64)
        means = np.stack(
            [np.bincount(labels, colours[:, i], minlength=self.segments) / counts for i in range(3)], axis=1
        )
        if self.colours == "list":
            order = np.argsort(np.argsort(grey_of(means), kind="stable"), kind="stable")
            means = listed(self.segments)[order]
        return means[labels].reshape(height, width, 3).astype(np.float32)


@spec("mask")
class Mask(Condition):
    """The thing in the picture, white on black: what differs in colour from the border."""

    about = "The thing in the picture, white on black"
    instruction = "Generate image from segmentation map"

    threshold: float | None = knob(
        default=None,
        label="Least difference from the border's colour (none: where it parts best)",
        low=0.0,
        high=1.0,
    )
    least: float = knob(default=0.002, label="Smallest thing, of the picture's area", low=0.0, high=1.0)
    inverted: bool = knob(default=False, label="The ground in place of the thing")

    def made(self, picture: Array) -> Array:
        found = things(picture, self.threshold, self.least) > 0
        return (found ^ self.inverted).astype(np.float32)


@spec("subject")
class Subject(Condition):
    """The thing in the picture cut out, in the middle of a white picture: what it is, and not where."""

    about = "The thing in the picture, cut out and centred on white"
    instruction = "Generate image from subject"

    size: float = knob(default=0.9, label="Longest side of the thing, of the picture's", low=0.1, high=1.0)
    threshold: float = knob(
        default=0.0765, label="Least difference from the border's colour", low=0.0, high=1.0
    )

    def made(self, picture: Array) -> Array:
        found = things(picture, self.threshold, 0.0) > 0
        if not found.any():
            return picture
        rows, columns = (np.flatnonzero(found.any(axis=axis)) for axis in (1, 0))
        cut = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = picture.shape[:2]
        scale = self.size * min(height / cut.shape[0], width / cut.shape[1])
        high, wide = (max(1, int(side * scale)) for side in cut.shape[:2])
        board = np.ones_like(picture)
        top, left = (height - high) // 2, (width - wide) // 2
        board[top : top + high, left : left + wide] = resized(cut, wide, high)
        return board


@spec("boxes")
class Boxes(Condition):
    """The smallest upright box around each thing, white on black."""

    about = "Boxes around things, white on black"
    instruction = "Generate image from bounding box"

    most: int = knob(default=8, label="Most boxes, the largest things first", low=1, high=256)
    line: int = knob(default=0, label="Width of the outline (0: filled)", low=0, high=64, unit="px")
    threshold: float | None = knob(
        default=None,
        label="Least difference from the border's colour (none: where it parts best)",
        low=0.0,
        high=1.0,
    )
    least: float = knob(default=0.002, label="Smallest thing, of the picture's area", low=0.0, high=1.0)

    def made(self, picture: Array) -> Array:
        labels = things(picture, self.threshold, self.least)
        drawn = np.zeros(labels.shape, dtype=np.float32)
        sizes = np.bincount(labels.ravel())[1:]
        places = ndimage.find_objects(labels)
        for index in np.argsort(-sizes, kind="stable")[: self.most]:
            box = places[index]
            inside = np.zeros_like(drawn)
            inside[box] = 1
            if self.line:
                rows, columns = (
                    slice(one.start + self.line, max(one.start + self.line, one.stop - self.line))
                    for one in box
                )
                inside[rows, columns] = 0
            drawn = np.maximum(drawn, inside)
        return drawn


@spec("holes")
class Holes(Condition):
    """A mask to be filled: boxes and strokes at places of a seed; of the picture only the size counts."""

    about = "Boxes and strokes to be filled, white on black"
    instruction = "Image completion through outpainting"

    share: float = knob(default=0.3, label="Least share of the area", low=0.01, high=0.9)
    seed: int = knob(default=0, label="Seed of the places", low=0, high=2**31 - 1)

    def made(self, picture: Array) -> Array:
        height, width = picture.shape[:2]
        draw = np.random.Generator(np.random.PCG64(self.seed))
        rows, columns = np.mgrid[0:height, 0:width]
        mask = np.zeros((height, width), dtype=bool)
        while mask.mean() < self.share:
            ends = draw.random((2, 2)) * (height, width)
            if draw.random() < 0.5:
                low, high = ends.min(axis=0), ends.max(axis=0)
                mask |= (rows >= low[0]) & (rows <= high[0]) & (columns >= low[1]) & (columns <= high[1])
            else:
                mask |= distance_to(rows, columns, ends[0], ends[1]) <= max(1.0, 0.05 * min(height, width))
        mask[0, 0] &= not mask.all()  # a mask of everything would keep nothing
        return mask.astype(np.float32)


def things(picture: Array, threshold: float | None, least: float) -> Array:
    """[H, W, 3] -> 0 on the ground and 1, 2, ... on things that hang together, their holes filled, in int32 [H, W]."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    apart = np.abs(picture - np.median(border, axis=0)).max(axis=2)
    level = otsu(apart) if threshold is None else threshold
    filled = ndimage.binary_fill_holes(apart > level)
    labels, count = ndimage.label(filled, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    kept = sizes >= max(1.0, least * labels.size)
    kept[0] = False
    return (np.cumsum(kept) * kept)[labels].astype(np.int32)


def otsu(plane: Array) -> float:
    """Return the level that parts values from 0 to 1 into two groups of least variance within."""
    counts, edges = np.histogram(plane, bins=256, range=(0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts).astype(np.float64)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1 + int(np.argmax(np.nan_to_num(between)))])


def centres_of(points: Array, count: int) -> Array:
    """[P, D] -> the centres [count, D] of k-means that starts from the point nearest the mean and then the farthest ones."""
    some = points[:: max(1, len(points) // _SAMPLES)].astype(np.float64)
    centres = [some[int(np.argmin(((some - some.mean(axis=0)) ** 2).sum(axis=1)))]]
    nearest = ((some - centres[0]) ** 2).sum(axis=1)
    for _ in range(count - 1):
        centres.append(some[int(np.argmax(nearest))])
        nearest = np.minimum(nearest, ((some - centres[-1]) ** 2).sum(axis=1))
    found = np.stack(centres)
    for _ in range(20):
        labels = nearest_of(some, found)
        sizes = np.bincount(labels, minlength=count)
        sums = np.stack(
            [np.bincount(labels, some[:, i], minlength=count) for i in range(some.shape[1])], axis=1
        )
        moved = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], found)
        if np.allclose(moved, found, atol=1e-6):
            break
        found = moved
    return found


def nearest_of(points: Array, centres: Array) -> Array:
    """[P, D], [K, D] -> the place of the nearest centre [P], the first of equals."""
    best = np.full(len(points), np.inf)
    labels = np.zeros(len(points), dtype=np.int64)
    for place, centre in enumerate(centres):  # one centre at a time: P x K distances may not fit
        distance = ((points - centre) ** 2).sum(axis=1)
        closer = distance < best
        best[closer], labels[closer] = distance[closer], place
    return labels


def listed(count: int) -> Array:
    """Return `count` colours that lie far apart, always the same, [count, 3]."""
    golden = 0.61803398875
    return np.array(
        [colorsys.hsv_to_rgb((i * golden) % 1, 0.75, 1.0 - 0.4 * (i % 3) / 2) for i in range(count)]
    )


def distance_to(rows: Array, columns: Array, one: Array, two: Array) -> Array:
    """Return how far each place [H, W] is from the line between two points (row, column), in px."""
    along = two - one
    length = float((along**2).sum())
    at = (
        ((rows - one[0]) * along[0] + (columns - one[1]) * along[1]) / length
        if length
        else np.zeros(rows.shape)
    )
    at = at.clip(0, 1)
    return np.hypot(rows - one[0] - at * along[0], columns - one[1] - at * along[1])
