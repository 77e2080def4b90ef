"""Find the things of `training.clips` in frames, by their known colours, and say what they are and do: no model judges here.

Differs: what is real scores by the same functions, so every figure has its ceiling beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from training.clips import COLOURS, DIRECTIONS, SHAPES, Mover, Script, coverage

Frames = NDArray[np.uint8]
NEAR, SMALLEST = 55.0, 12
"""How far from a thing's colour a pixel may be (of 0..255, three channels together); fewest pixels of a thing."""
MOVED, STILL, GROWN = 4.0, 3.0, 1.25
"""Pixels from which something moved, up to which it did not, and from what share of its area on it came closer."""


@dataclass(frozen=True, slots=True)
class Track:
    """One thing through a clip: centres [F, 2] in px (NaN where it is not seen), areas [F] in px, masks [F, 64, 64]."""

    centres: NDArray[np.float64]
    areas: NDArray[np.int64]
    masks: NDArray[np.bool_]

    @property
    def seen(self) -> NDArray[np.bool_]:
        """In which frames it is there, [F]."""
        return self.areas >= SMALLEST


def track(frames: Frames, colour: str) -> Track:
    """Follow the largest patch of a colour through frames uint8 [F, 3, H, W]."""
    want = np.asarray(COLOURS[colour], np.float32)[:, None, None]
    near = np.sqrt(((frames.astype(np.float32) - want) ** 2).sum(1)) < NEAR
    centres = np.full((len(frames), 2), np.nan)
    areas, masks = np.zeros(len(frames), np.int64), np.zeros_like(near)
    for place, one in enumerate(near):
        labels, count = ndimage.label(one)
        if not count:
            continue
        sizes = np.bincount(labels.ravel())[1:]
        masks[place] = labels == sizes.argmax() + 1
        areas[place] = sizes.max()
        if areas[place] >= SMALLEST:
            y, x = np.nonzero(masks[place])
            centres[place] = _middle(x), _middle(y)
    return Track(centres, areas, masks)


def _middle(at: NDArray[np.int64]) -> float:
    """Return the middle of a thing's box, px: of a triangle, too, that is its centre in `training.clips`."""
    return float(at.min() + at.max() + 1) / 2


def colours_in(frames: Frames) -> set[str]:
    """Return the colours that are seen in at least a third of the frames."""
    return {colour for colour in COLOURS if track(frames, colour).seen.mean() >= 1 / 3}


def shape_of(mask: NDArray[np.bool_]) -> str:
    """Return which shape covers a mask [64, 64] best, each laid into the mask's box."""
    y, x = np.nonzero(mask)
    centre = np.asarray([_middle(x), _middle(y)], np.float32)
    half = (x.max() - x.min() + y.max() - y.min() + 2) / 4
    scores = {}
    for shape in SHAPES:
        radius = np.float32(half / (0.9 if shape == "square" else 1.0) + 0.2)
        drawn = coverage(shape, centre, np.asarray(radius)) > 0.5
        scores[shape] = (drawn & mask).sum() / (drawn | mask).sum()
    return max(scores, key=lambda shape: scores[shape])


def shape_seen(found: Track) -> str | None:
    """Return what most of the five frames with most of it show, or None where it is never seen."""
    best = np.argsort(-found.areas, kind="stable")[:5]
    votes = [shape_of(found.masks[place]) for place in best if found.areas[place] >= SMALLEST]
    return max(votes, key=votes.count) if votes else None


def does(found: Track, mover: Mover, camera: str = "fixed") -> bool:
    """Say whether a thing moves as its script says: the way it first goes, a fall, rest, or what the camera does to it."""
    seen = np.flatnonzero(found.seen)
    if len(seen) < 3:
        return False
    centres, areas = found.centres[seen], found.areas[seen]
    change = centres - centres[0]
    if camera == "zoom in":
        return bool(areas[-2:].mean() >= GROWN * areas[:2].mean())
    if mover.motion == "still" and camera == "fixed":
        return bool(np.abs(change).max() <= STILL)
    if mover.motion == "fall":
        return bool(change[:, 1].max() >= MOVED)
    name = camera.removeprefix("pan ") if mover.motion == "still" else mover.motion
    way = np.asarray(DIRECTIONS[name]) * (-1 if mover.motion == "still" else 1)
    axis = int(np.flatnonzero(way)[0])
    forth = change[:, axis] * way[axis]
    furthest = int(forth.argmax())
    straight = np.abs(change[: furthest + 1, 1 - axis]).max() < max(forth[furthest], STILL)
    first = furthest > 0 and forth[: furthest + 1].min() > -STILL
    return bool(forth[furthest] >= MOVED * min(1.0, len(found.areas) / 16) and straight and first)


def judge(frames: Frames, script: Script) -> dict[str, bool]:
    """Say what of a script a clip uint8 [F, 3, H, W] shows: all colours and no other, all shapes, all motions, and all of that."""
    tracks = {mover.colour: track(frames, mover.colour) for mover in script.movers}
    colour = colours_in(frames) == set(tracks)
    shape = all(shape_seen(tracks[mover.colour]) == mover.shape for mover in script.movers)
    motion = all(does(tracks[mover.colour], mover, script.camera) for mover in script.movers)
    return {"colour": colour, "shape": shape, "motion": motion, "all": colour and shape and motion}


def centre_errors(
    frames: Frames, script: Script, centres: NDArray[np.floating], missing: float
) -> NDArray[np.float64]:
    """Return the distance in px of every thing from its true place [F, K, 2]; `missing` where it is not seen: [F, K]."""
    found = np.stack([track(frames, mover.colour).centres for mover in script.movers], 1)
    distance = np.linalg.norm(found - centres, axis=-1)
    return np.where(np.isnan(distance), missing, np.minimum(distance, missing))


def straight_on(centres: NDArray[np.floating], given: int) -> NDArray[np.float64]:
    """Continue places [F, K, 2] from the last two of `given` at the same speed: what linear extrapolation says of all frames."""
    steps = np.arange(len(centres))[:, None, None] - (given - 1)
    last = centres[given - 1].astype(np.float64)
    return last + np.maximum(steps, 0) * (last - centres[given - 2])


def change(frames: Frames) -> float:
    """Return the mean absolute change from frame to frame, of 0..255: how much moves or flickers."""
    return float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean())


def flicker(frames: Frames) -> float:
    """Return the mean absolute change of the change from frame to frame, of 0..255: steady motion has little of it."""
    return float(np.abs(np.diff(frames.astype(np.float32), n=2, axis=0)).mean())
