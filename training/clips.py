"""Captioned moving scenes, drawn exactly: what was asked for, every wording of it, and where everything is in every frame.

Coloured shapes move, bounce, fall, pass behind a wall or behind each other, or stand before a moving camera. A seed gives a scene;
pairs of colour and shape in `HELD_OUT` are never drawn for training.

Paper: VDT, Lu et al. 2023, arXiv:2305.13311 (tasks on simple moving scenes); Mask^2DiT, Qi et al. 2025, arXiv:2503.19881
(stories of unrelated scenes joined at random teach which caption is which scene's).
Differs: the truth of every frame comes along (place, size, visible share), so what a model makes is judged without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
SIDE = 64
"""Pixels of a frame's side."""
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 45), "orange": (245, 145, 30), "yellow": (245, 225, 70), "green": (50, 165, 80),
    "blue": (50, 100, 225), "purple": (150, 70, 190),
}  # fmt: skip
OTHERS: dict[str, tuple[int, int, int]] = {
    "pink": (245, 140, 185), "cyan": (80, 205, 215), "brown": (125, 80, 45), "lime": (165, 220, 95), "navy": (35, 45, 120),
    "salmon": (235, 125, 100), "teal": (15, 115, 120), "olive": (120, 130, 45), "magenta": (225, 40, 150), "beige": (225, 200, 155),
    "maroon": (105, 20, 45), "lavender": (185, 165, 240),
}  # fmt: skip
"""Colours for training alone, each with every shape: what is learnt of shapes with them holds for any colour."""
SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "ball", "disc"), "square": ("square", "box", "block"), "triangle": ("triangle",),
    "cross": ("cross", "plus sign"),
}  # fmt: skip
"""Shapes and what people call them."""
HELD_OUT = tuple((colour, list(SHAPES)[place % len(SHAPES)]) for place, colour in enumerate(COLOURS))
"""Pairs of colour and shape that no training scene has: one of every colour."""
BACKGROUNDS = ((24, 26, 34), (96, 100, 108))
WALL = (236, 236, 238)
SPEEDS = {"slow": 1.0, "medium": 1.75, "fast": 2.75}
"""Pixels a frame; medium goes unsaid."""
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CAMERAS = ("fixed", "pan left", "pan right", "pan up", "pan down", "zoom in")
PAN, ZOOM, GRAVITY, RESTITUTION = (
    1.5,
    0.03,
    0.35,
    0.85,
)  # px a frame, share a frame, px a frame^2, share of speed kept
LINES = 16.0  # px between the faint lines of the ground


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What may happen, and how often.

    Attributes:
        kinds: how often a scene is plain, has a wall, a moving camera, a fall. things: how often it has one, two or three.
        radii: px from centre to edge by size; medium goes unsaid. hidden: speeds of what passes behind a wall.
        ink: how much lighter the lines of the ground are, of 0..255; 0 for none.
    """

    kinds: dict[str, float]
    things: tuple[float, ...]
    radii: dict[str, float]
    hidden: tuple[str, ...]
    ink: float


WORLDS = {
    "full": World(
        kinds={"plain": 0.61, "wall": 0.13, "camera": 0.13, "fall": 0.13}, things=(0.55, 0.33, 0.12),
        radii={"small": 5.0, "medium": 7.0, "large": 10.0}, hidden=("medium", "fast"), ink=14.0,
    ),
    "small": World(
        kinds={"plain": 0.72, "wall": 0.14, "fall": 0.14}, things=(0.8, 0.2),
        radii={"small": 7.5, "medium": 9.5, "large": 12.0}, hidden=("fast",), ink=0.0,
    ),
}  # fmt: skip
"""Everything, and what a network learns that trains on a processor: larger things, mostly one, and a camera that rests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mover:
    """One thing, its colour one of `COLOURS` or `OTHERS`: "motion" is one of `DIRECTIONS`, "still" or "fall"; `bounces` where it
    turns back at the frame's edge; not `named` where captions leave its colour out.
    """

    colour: str
    shape: str
    size: str = "medium"
    motion: str = "still"
    speed: str = "medium"
    bounces: bool = False
    named: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What a scene shows, all that a caption may tell: things, the camera, whether a wall hides part of the way; in which world."""

    movers: tuple[Mover, ...]
    camera: str = "fixed"
    wall: bool = False
    world: str = "full"


@dataclass(frozen=True, slots=True)
class Clip:
    """A scene as it was drawn.

    Attributes:
        frames: uint8 [F, 3, 64, 64].
        centres: x and y of every thing in every frame, px from the upper left corner, [F, K, 2]. radii: px, [F, K].
        visible: share of each thing that is in view and not hidden, [F, K].
        script: what was asked for, or one script a scene of a story. background: index of `BACKGROUNDS`.
    """

    frames: NDArray[np.uint8]
    centres: Array
    radii: Array
    visible: Array
    script: Script
    background: int


# What to show


def write_script(
    dice: np.random.Generator,
    *,
    held_out: bool = False,
    single: bool = False,
    world: str = "full",
    others: float = 0.0,
    unnamed: float = 0.0,
) -> Script:
    """Draw a script; all things in it are learnt pairs, or with `held_out` the first is a held-out one.

    Args:
        single: one thing. world: one of `WORLDS`. others: share of things that have one of the colours `OTHERS`, with any shape.
        unnamed: share of things that have one of these too, and no caption names it.
    """
    rules = WORLDS[world]
    kind = str(dice.choice(list(rules.kinds), p=list(rules.kinds.values())))
    alone = single or kind in ("wall", "camera")
    count = 1 if alone else int(dice.choice(np.arange(len(rules.things)) + 1, p=rules.things))
    colours = dice.permutation(list(COLOURS))[:count]
    movers = []
    for place, colour in enumerate(map(str, colours)):
        learnt = [shape for shape in SHAPES if ((colour, shape) in HELD_OUT) == (held_out and place == 0)]
        movers.append(_mover(dice, colour, str(dice.choice(learnt)), kind if place == 0 else "plain", rules))
    camera = str(dice.choice(CAMERAS[1:])) if kind == "camera" else "fixed"
    if others or unnamed:  # no chance is drawn without: scenes of a seed stay what they are
        inks = map(str, dice.permutation(list(OTHERS)))
        for place, one in enumerate(movers):
            chance = dice.random()
            if chance < others + unnamed:
                shape = str(dice.choice(list(SHAPES)))
                movers[place] = replace(one, colour=next(inks), shape=shape, named=chance >= unnamed)
    return Script(movers=tuple(movers), camera=camera, wall=kind == "wall", world=world)


def _mover(dice: np.random.Generator, colour: str, shape: str, kind: str, rules: World) -> Mover:
    size = str(dice.choice(list(rules.radii), p=[0.3, 0.4, 0.3]))
    speed = str(dice.choice(list(SPEEDS), p=[0.3, 0.4, 0.3]))
    if kind == "camera":
        return Mover(colour=colour, shape=shape, size=size)
    if kind == "fall":
        return Mover(colour=colour, shape=shape, size=size, motion="fall")
    if kind == "wall":
        motion, speed = str(dice.choice(["left", "right"])), str(dice.choice(rules.hidden))
        return Mover(colour=colour, shape=shape, size="small", motion=motion, speed=speed)
    motion = str(dice.choice([*DIRECTIONS, "still"], p=[0.23, 0.23, 0.22, 0.22, 0.1]))
    if motion == "still":
        return Mover(colour=colour, shape=shape, size=size)
    bounces = bool(dice.random() < 0.25)
    return Mover(colour=colour, shape=shape, size=size, motion=motion, speed=speed, bounces=bounces)


# How to say it

_VERBS = {
    "slow": ("moves slowly", "drifts", "slowly slides"), "medium": ("moves", "slides", "travels", "goes"),
    "fast": ("moves fast", "quickly moves", "speeds", "rushes"),
}  # fmt: skip
_TO = {
    "left": ("to the left", "left", "leftwards"), "right": ("to the right", "right", "rightwards"),
    "up": ("up", "upwards", "towards the top"), "down": ("down", "downwards", "towards the bottom"),
}  # fmt: skip
_EDGE = {"left": "left edge", "right": "right edge", "up": "top", "down": "bottom"}
_SIZES = {"small": ("small", "little"), "medium": ("",), "large": ("large", "big")}
_PANS = {
    "pan left": ("the camera pans left", "the camera moves to the left"),
    "pan right": ("the camera pans right", "the camera moves to the right"),
    "pan up": ("the camera pans up", "the camera moves up"),
    "pan down": ("the camera pans down", "the camera moves down"),
    "zoom in": ("the camera zooms in", "the camera moves closer"),
}


def write_caption(script: Script, dice: np.random.Generator) -> str:
    """Draw one way to say what a script shows."""
    clauses = [_clause(one, script, dice) for one in script.movers]
    joined = _one(dice, (" and ", ", ", " while ")).join(clauses) if len(clauses) < 3 else ", ".join(clauses)
    if script.camera != "fixed":
        said = _one(dice, _PANS[script.camera])
        joined = f"{said}, {joined}" if dice.random() < 0.3 else f"{joined}, {said}"
    return joined


def _clause(mover: Mover, script: Script, dice: np.random.Generator) -> str:
    colour = mover.colour if mover.named else ""
    words = [_one(dice, _SIZES[mover.size]), colour, _one(dice, SHAPES[mover.shape])]
    noun = " ".join(filter(None, words))
    noun = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    if mover.motion == "still":
        return (
            noun
            if script.camera != "fixed"
            else f"{noun} {_one(dice, ('stays still', 'does not move', 'rests'))}"
        )
    if mover.motion == "fall":
        return f"{noun} {_one(dice, ('falls and bounces', 'drops and bounces on the floor', 'falls to the floor and bounces'))}"
    verb, to = _one(dice, _VERBS[mover.speed]), _one(dice, _TO[mover.motion])
    if script.wall:
        return f"{noun} {verb} {to} {_one(dice, ('behind a white wall', 'and passes behind a wall', 'behind a wall'))}"
    if mover.bounces:
        turn = _one(dice, ("bounces off", "bounces back from", "turns back at"))
        return f"{noun} {verb} {to} and {turn} the {_EDGE[mover.motion]}"
    return f"{noun} {verb} {to}"


def _one(dice: np.random.Generator, ways: Sequence[str]) -> str:
    return ways[int(dice.integers(len(ways)))]


# Where things are


def film(
    script: Script,
    dice: np.random.Generator,
    *,
    frames: int = 16,
    background: int | None = None,
    still: int | None = None,
) -> Clip:
    """Draw one scene of a script: places, exact sizes and the ground are drawn from `dice`. `still`: this one frame alone."""
    ground = int(dice.integers(len(BACKGROUNDS))) if background is None else background
    scale = 1 + (ZOOM * np.arange(frames) if script.camera == "zoom in" else np.zeros(frames))
    travel = _travel(script.camera, frames)
    rules = WORLDS[script.world]
    sizes = [rules.radii[one.size] + dice.uniform(-0.4, 0.4) for one in script.movers]
    radii = np.stack([radius * scale for radius in sizes], 1).astype(np.float32)  # [F, K]
    paths = [_path(one, size, script, frames, dice) for one, size in zip(script.movers, sizes, strict=True)]
    centres = np.stack(paths, 1)  # [F, K, 2]
    if script.camera == "zoom in":
        centres = SIDE / 2 + (centres - SIDE / 2) * scale[:, None, None]
    wall = _wall(script.movers[0], sizes[0], centres[:, 0, 0], dice) if script.wall else None
    offset = dice.uniform(0, LINES, 2)
    if still is not None:
        centres, radii, travel, scale = (one[still : still + 1] for one in (centres, radii, travel, scale))
    pixels, visible = _drawn(script, centres.astype(np.float32), radii, ground, travel + offset, scale, wall)
    return Clip(pixels, centres.astype(np.float32), radii, visible, script, ground)


def _wall(mover: Mover, radius: float, along: Array, dice: np.random.Generator) -> tuple[float, float]:
    """Return middle and half the width of a wall halfway, in px: wide enough to hide a thing, and it comes out on both sides."""
    room = max(SPEEDS[mover.speed] * (len(along) - 1) / 2 - 2 * radius, 0.0)
    return float(along.mean() + dice.uniform(-0.15, 0.15) * room), radius + 0.6 * room


def _travel(camera: str, frames: int) -> Array:
    """Return how far the camera has moved, [F, 2]."""
    direction = DIRECTIONS.get(camera.removeprefix("pan "), (0, 0))
    return (np.arange(frames)[:, None] * PAN * np.asarray(direction)).astype(np.float32)


def _path(mover: Mover, radius: float, script: Script, frames: int, dice: np.random.Generator) -> Array:
    """Return the places of one thing on the screen, [F, 2]; those before a zoom are places in the scene."""
    time, low, high = np.arange(frames, dtype=np.float32), radius, SIDE - radius
    across = dice.uniform(low, high)
    if mover.motion == "fall":
        return np.stack(
            [_folded(across + dice.uniform(-0.8, 0.8) * time, low, high), _fall(radius, frames, dice)], 1
        )
    if mover.motion == "still" and script.camera in ("fixed", "zoom in"):
        if script.camera == "zoom in":
            reach = SIDE / 2 / (1 + ZOOM * (frames - 1)) - radius
            low, high = SIDE / 2 - reach, SIDE / 2 + reach
        return np.repeat(dice.uniform(low, high, (1, 2)), frames, 0).astype(np.float32)
    if mover.motion == "still":  # what the camera passes goes the other way
        direction, speed = -np.asarray(DIRECTIONS[script.camera.removeprefix("pan ")]), PAN
    else:
        direction, speed = np.asarray(DIRECTIONS[mover.motion]), SPEEDS[mover.speed]
    axis, sign = int(np.flatnonzero(direction)[0]), int(direction.sum())
    length = speed * (frames - 1)
    if mover.bounces:
        before = speed * dice.uniform(0.35, 0.65) * (frames - 1)  # how far it still has to the edge
        along = _folded(high - min(before, high - low) + speed * time, low, high)
    else:
        along = dice.uniform(low, max(low, high - length)) + speed * time
    along = along if sign > 0 else SIDE - along
    found = np.full((frames, 2), across, np.float32)
    found[:, axis] = along
    return found


def _folded(x: NDArray[np.floating], low: float, high: float) -> Array:
    """Reflect a straight way at two walls."""
    width = high - low
    turned = np.mod(x - low, 2 * width)
    return (low + np.minimum(turned, 2 * width - turned)).astype(np.float32)


def _fall(radius: float, frames: int, dice: np.random.Generator) -> Array:
    floor, y, speed, steps = SIDE - radius, dice.uniform(radius, 0.45 * SIDE), 0.0, 16
    found = []
    for _ in range(frames):
        found.append(y)
        for _ in range(steps):
            speed += GRAVITY / steps
            y += speed / steps
            if y > floor:
                y, speed = 2 * floor - y, -RESTITUTION * speed
    return np.asarray(found, np.float32)


# Drawing

_AT = np.arange(SIDE, dtype=np.float32) + 0.5


def coverage(shape: str, centre: Array, radius: Array) -> Array:
    """Return which share of every pixel a shape covers, [..., 64, 64], for centres [..., 2] and radii [...]."""
    x = _AT - centre[..., 0, None, None]
    y = _AT[:, None] - centre[..., 1, None, None]
    r = radius[..., None, None]
    if shape == "circle":
        distance = np.sqrt(x * x + y * y) - r
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.9 * r
    elif shape == "triangle":  # upright: from (0, -r) down to (-r, r) and (r, r)
        distance = np.maximum((2 * np.abs(x) - y - r) / np.float32(5**0.5), y - r)
    else:
        wide, tall = np.abs(x), np.abs(y)
        distance = np.minimum(np.maximum(wide - r, tall - r / 3), np.maximum(wide - r / 3, tall - r))
    return np.clip(0.5 - distance, 0, 1)


def _drawn(
    script: Script,
    centres: Array,
    radii: Array,
    ground: int,
    travel: NDArray[np.floating],
    scale: NDArray[np.floating],
    wall: tuple[float, float] | None,
) -> tuple[NDArray[np.uint8], Array]:
    """Return frames uint8 [F, 3, 64, 64] and visible shares [F, K]; later things stand before earlier ones."""
    frames = len(centres)
    picture = _ground(ground, travel, scale, WORLDS[script.world].ink)  # [F, 64, 64, 3]
    layers = []
    for place, mover in enumerate(script.movers):
        part = coverage(mover.shape, centres[:, place], radii[:, place])
        layers.append((part, (COLOURS | OTHERS)[mover.colour]))
    if wall is not None:
        part = np.clip(0.5 - (np.abs(_AT - wall[0]) - wall[1]), 0, 1)
        layers.append((np.broadcast_to(part, (frames, SIDE, SIDE)), WALL))
    for part, colour in layers:
        picture += part[..., None] * (np.asarray(colour, np.float32) - picture)
    visible = []
    for place, mover in enumerate(script.movers):
        part = layers[place][0]
        for other, _ in layers[place + 1 :]:
            part = part * (1 - other)
        size = radii[:, place]
        whole = {"circle": np.pi, "square": 3.24, "triangle": 2.0, "cross": 20 / 9}[mover.shape] * size * size
        visible.append(np.minimum(part.sum((1, 2)) / whole, 1))
    pixels = np.rint(picture).astype(np.uint8).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels), np.stack(visible, 1).astype(np.float32)


def _ground(ground: int, travel: NDArray[np.floating], scale: NDArray[np.floating], ink: float) -> Array:
    """Return the ground with its faint lines, fixed in the scene, [F, 64, 64, 3]; without ink there are none."""
    bare = np.asarray(BACKGROUNDS[ground], np.float32)
    if not ink:
        return np.tile(bare, (len(scale), SIDE, SIDE, 1))
    marks = []
    for axis in range(2):
        at = (_AT - SIDE / 2) / scale[:, None] + SIDE / 2 + travel[:, axis, None]  # [F, 64]
        marks.append(np.clip(1.5 - np.abs(np.mod(at, LINES) - LINES / 2), 0, 1))
    lines = np.maximum(marks[0][:, None, :], marks[1][:, :, None]).astype(np.float32)
    return bare + ink * lines[..., None]


# Stories


def film_story(scripts: Sequence[Script], dice: np.random.Generator, *, frames: int = 8) -> list[Clip]:
    """Draw scenes of `frames` frames each, one a script, on one ground that no caption names."""
    ground = int(dice.integers(len(BACKGROUNDS)))
    return [film(script, dice, frames=frames, background=ground) for script in scripts]


def example(
    seed: int,
    *,
    frames: int = 16,
    held_out: bool = False,
    single: bool = False,
    world: str = "full",
    others: float = 0.0,
) -> tuple[Clip, str]:
    """Return the scene of a seed and a caption of it, see `write_script`."""
    dice = np.random.default_rng(seed)
    script = write_script(dice, held_out=held_out, single=single, world=world, others=others)
    caption = write_caption(script, dice)
    return film(script, dice, frames=frames), caption
