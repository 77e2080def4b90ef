"""Still scenes whose truth is known exactly: coloured shapes with their edges, masks, depth, boxes, subject crops and captions;
and what real pictures of objects on white give as conditions.

A picture is sampled three times finer than its pixels, and the middle sample of each pixel decides what the pixel belongs to: so
the picture is smooth and every map is exact. A scene follows from its seed and number alone, at any size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from control.conditions import Condition
from dit.spec import parse
from training.data import Pictures

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 50, 47), "orange": (244, 140, 40), "yellow": (246, 211, 60), "green": (60, 160, 75), "blue": (52, 101, 200),
    "purple": (130, 70, 170), "pink": (240, 130, 175), "brown": (130, 85, 55), "black": (30, 30, 34), "cyan": (70, 200, 220),
}  # fmt: skip
GROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (150, 150, 155), "beige": (224, 208, 180), "teal": (70, 140, 140), "navy": (35, 45, 80), "mint": (190, 228, 205),
    "white": (255, 255, 255),
}  # fmt: skip
PATTERNS = ("plain", "fading", "striped", "chequered")
FINE = 3  # samples along a side of a pixel; odd, so that one of them is the pixel's middle

Floats = NDArray[np.float64]
Inside = Callable[[Floats, Floats], NDArray[np.bool_]]


def _polygon(corners: int, turn: float = 0.0, inner: float | None = None) -> Inside:
    """A regular polygon, or a star whose inner corners lie at `inner` of the radius: inside by the sign of each side."""
    angles = np.arange(corners * (2 if inner else 1)) * 2 * np.pi / (corners * (2 if inner else 1)) + turn
    radii = np.where(np.arange(len(angles)) % 2, inner or 1.0, 1.0)
    xs, ys = radii * np.sin(angles), -radii * np.cos(angles)

    def inside(y: Floats, x: Floats) -> NDArray[np.bool_]:
        found = np.zeros(x.shape, bool)
        for i in range(len(xs)):
            j = i - 1
            crosses = (ys[i] > y) != (ys[j] > y)
            with np.errstate(divide="ignore", invalid="ignore"):
                at = (xs[j] - xs[i]) * (y - ys[i]) / (ys[j] - ys[i]) + xs[i]
            found ^= crosses & (x < at)
        return found

    return inside


KINDS: dict[str, Inside] = {
    "circle": lambda y, x: x * x + y * y < 0.8,
    "oval": lambda y, x: x * x + (y / 0.6) ** 2 < 1,
    "square": lambda y, x: (abs(x) < 0.75) & (abs(y) < 0.75),
    "bar": lambda y, x: (abs(x) < 0.95) & (abs(y) < 0.35),
    "triangle": _polygon(3),
    "hexagon": _polygon(6),
    "star": _polygon(5, inner=0.42),
    "ring": lambda y, x: (x * x + y * y < 0.9) & (x * x + y * y > 0.3),
    "cross": lambda y, x: ((abs(x) < 0.3) & (abs(y) < 0.95)) | ((abs(y) < 0.3) & (abs(x) < 0.95)),
    "half-moon": lambda y, x: (x * x + y * y < 0.9) & ((x - 0.45) ** 2 + y * y > 0.5),
}
"""Shape -> whether points (y down, x right), in radii from its middle, lie inside."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One thing: kind and colour by name, middle (y, x) and radius as fractions of the picture's side, angle in radians."""

    kind: str
    colour: str
    middle: tuple[float, float]
    radius: float
    angle: float

    def inside(self, y: Floats, x: Floats) -> NDArray[np.bool_]:
        """Return which points, in fractions of the side, belong to it."""
        y, x = (y - self.middle[0]) / self.radius, (x - self.middle[1]) / self.radius
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return KINDS[self.kind](cos * y - sin * x, sin * y + cos * x)


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes from the furthest to the nearest, on a ground."""

    shapes: tuple[Shape, ...]
    ground: str
    pattern: str

    @property
    def caption(self) -> str:
        """Say what is there, the nearest thing first."""
        things = [
            f"{'an' if one.colour[0] in 'aeiou' else 'a'} {one.colour} {one.kind}"
            for one in self.shapes[::-1]
        ]
        return f"{' in front of '.join(things)}, on a {self.pattern} {self.ground} ground"


@dataclass(frozen=True, slots=True)
class Truth:
    """A drawn scene, side S.

    Attributes:
        pixels: uint8 [S, S, 3]. labels: uint8 [S, S], 0 the ground, i + 1 what is seen of shape i.
        whole: bool [n, S, S], each shape as if nothing stood before it.
    """

    scene: Scene
    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    whole: NDArray[np.bool_]

    @property
    def edges(self) -> NDArray[np.bool_]:
        """Where one of the four neighbours lies further back: a line one pixel wide, on the nearer side, [S, S]."""
        labels = self.labels.astype(int)
        padded = np.pad(labels, 1, mode="edge")
        around = [padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]]
        return np.minimum.reduce(around) < labels

    @property
    def masks(self) -> NDArray[np.bool_]:
        """What is seen of each shape, [n, S, S]."""
        return np.stack([self.labels == i + 1 for i in range(len(self.scene.shapes))])

    @property
    def depth(self) -> NDArray[np.float32]:
        """Nearness from 0 (the ground) to 1 (the nearest shape), even steps, [S, S]."""
        return (self.labels / len(self.scene.shapes)).astype(np.float32)

    def box(self, shape: int) -> tuple[int, int, int, int] | None:
        """Return top, left, bottom and right (not included) of what is seen of a shape, None where it is hidden."""
        rows, columns = np.nonzero(self.labels == shape + 1)
        if not len(rows):
            return None
        return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1

    def subject(self, shape: int = -1, size: int | None = None) -> NDArray[np.uint8]:
        """Return one whole shape alone on white, upright and filling the picture: what a subject adapter is given."""
        shape = range(len(self.scene.shapes))[shape]
        one = self.scene.shapes[shape]
        alone = Scene((Shape(one.kind, one.colour, (0.5, 0.5), 0.46, 0.0),), "white", "plain")
        return draw(alone, size or len(self.labels)).pixels


def scene(seed: int, number: int, *, most: int = 3) -> Scene:
    """Return scene `number` of a seed: one to `most` shapes of different colours, each at least partly seen."""
    dice = np.random.default_rng((seed, number))
    count = int(dice.integers(1, most + 1))
    colours = dice.choice(list(COLOURS), count, replace=False)
    shapes = tuple(
        Shape(
            str(dice.choice(list(KINDS))),
            str(colour),
            (float(dice.uniform(0.25, 0.75)), float(dice.uniform(0.25, 0.75))),
            float(dice.uniform(0.14, 0.34)),
            float(dice.uniform(0, 2 * np.pi)),
        )
        for colour in colours
    )
    shapes = tuple(
        sorted(shapes, key=lambda one: -one.radius)
    )  # the small before the large, so that none is hidden
    return Scene(shapes, str(dice.choice(list(GROUNDS))), str(dice.choice(PATTERNS)))


def draw(what: Scene, size: int) -> Truth:
    """Draw a scene at `size` px. Raises: ValueError for fewer than 8 px."""
    if size < 8:
        raise ValueError(f"size must be at least 8 px, got {size}")
    axis = (np.arange(size * FINE) + 0.5) / (size * FINE)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    fine = _ground(what, y, x)
    labels = np.zeros((size, size), np.uint8)
    whole, middle = [], slice(FINE // 2, None, FINE)
    for number, shape in enumerate(what.shapes):
        inside = shape.inside(y, x)
        fine[inside] = COLOURS[shape.colour]
        whole.append(inside[middle, middle])
        labels[whole[-1]] = number + 1
    smooth = fine.reshape(size, FINE, size, FINE, 3).mean(axis=(1, 3))
    return Truth(what, smooth.round().astype(np.uint8), labels, np.stack(whole))


def _ground(what: Scene, y: Floats, x: Floats) -> Floats:
    colour = np.array(GROUNDS[what.ground], float)
    light = {
        "plain": np.ones_like(x),
        "fading": 1.08 - 0.25 * y,
        "striped": np.where((x * 6).astype(int) % 2, 1.06, 0.92),
        "chequered": np.where(((x * 5).astype(int) + (y * 5).astype(int)) % 2, 1.06, 0.92),
    }[what.pattern]
    return np.clip(colour * light[..., None], 0, 255)


def truths(count: int, *, seed: int = 0, size: int = 64, first: int = 0, most: int = 3) -> list[Truth]:
    """Return `count` drawn scenes from number `first` on."""
    return [draw(scene(seed, first + i, most=most), size) for i in range(count)]


def as_pictures(found: list[Truth], split: str = "train") -> Pictures:
    """Return drawn scenes as the trainers take pictures; concept and style are those of the nearest shape and the ground."""
    rows: list[dict[str, Any]] = [
        {
            "id": f"scene-{i}", "caption": one.scene.caption, "concept": one.scene.shapes[-1].kind, "style": "scene",
            "keywords": None, "subgroup": "scene", "split": split,
        }
        for i, one in enumerate(found)
    ]  # fmt: skip
    pixels = torch.from_numpy(np.stack([one.pixels for one in found]))
    return Pictures(pixels.permute(0, 3, 1, 2).contiguous(), rows)


def exact_conditions(found: list[Truth], kind: str) -> Tensor:
    """Return the true condition pictures of scenes, uint8 [n, 3, S, S]. Raises: ValueError for a kind there is none of."""
    makers: dict[str, Callable[[Truth], NDArray[Any]]] = {
        "edges": lambda one: one.edges * 255.0,
        "masks": lambda one: (one.labels > 0) * 255.0,
        "depth": lambda one: one.depth * 255.0,
        "subject": lambda one: one.subject(),
    }
    if kind not in makers:
        raise ValueError(f"condition of scenes must be one of {', '.join(makers)}, got {kind!r}")
    made = [np.asarray(makers[kind](one)).round().astype(np.uint8) for one in found]
    stacked = torch.from_numpy(
        np.stack([np.repeat(x[..., None], 3, axis=2) if x.ndim == 2 else x for x in made])
    )
    return stacked.permute(0, 3, 1, 2).contiguous()


PREPROCESSORS = {"edges": "canny", "masks": "mask:threshold=0.0765", "subject": "subject"}
"""Name of a condition -> how it is made of a real picture (`control.conditions`): in training and in use alike."""


def made_of(pixels: Tensor, kind: str) -> Tensor:
    """Return the condition pictures of real ones, uint8 [n, 3, H, W] -> the same; black where nothing is found.

    Raises: ValueError for a kind that no preprocessor makes.
    """
    if kind not in PREPROCESSORS:
        raise ValueError(f"condition of pictures must be one of {', '.join(PREPROCESSORS)}, got {kind!r}")
    maker: Condition = parse(Condition, PREPROCESSORS[kind])  # type: ignore[type-abstract,unused-ignore]
    made = []
    for picture in pixels.permute(0, 2, 3, 1).numpy().astype(np.float32) / 255:
        found = np.asarray(maker.made(picture))
        found = np.repeat(found[..., None], 3, axis=2) if found.ndim == 2 else found
        made.append(torch.from_numpy((found.clip(0, 1) * 255).round().astype(np.uint8)))
    return torch.stack(made).permute(0, 3, 1, 2).contiguous()


def turned(subjects: Tensor, *, seed: int, turn: float = 20.0, mirror: float = 0.5) -> Tensor:
    """Turn subjects uint8 [n, 3, H, W] on white by up to `turn` degrees and mirror some: they tell what is there, not how."""
    dice, made = np.random.default_rng(seed), []
    for picture in subjects.permute(0, 2, 3, 1).numpy():
        image = Image.fromarray(np.ascontiguousarray(picture))
        image = image.rotate(dice.uniform(-turn, turn), Image.Resampling.BICUBIC, fillcolor="white")
        image = ImageOps.mirror(image) if dice.random() < mirror else image
        made.append(torch.from_numpy(np.array(image)))
    return torch.stack(made).permute(0, 3, 1, 2).contiguous()
