"""Stories of a few small scenes whose every pixel follows from a few numbers, and the eyes that read these numbers back.

A scene shows one square that moves up and down. Its caption names a colour and a side of the picture; how large the square is, no
caption says: all scenes of a story share it, which makes it the identity that has to survive a cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
PLACES = ("left", "right")
SIDES = (2, 3, 4)
"""Sides of the square in px: the identities."""
SCENES, FRAMES, SIZE = 3, 4, 8
"""Scenes of a story as trained, frames of a scene, px of a frame's side."""
PURE, NEAR = 0.75, 0.5
"""Share of a scene's coloured pixels that must agree on colour and place; how far in px a side may be from an identity's."""

CODES = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1))
PALETTE = 2.0 * torch.tensor([*CODES, (0, 0, 0)]) - 1  # [7, 3]: the colours, and the black behind them
TRIPLES = torch.cartesian_prod(*[torch.arange(len(COLOURS))] * SCENES)  # [216, 3]
NEVER = (TRIPLES * torch.tensor([1, 2, 3])).sum(1) % 5 == 0
"""Which triples of colours no training ever sees: a fifth; every colour is still trained in every scene."""


@dataclass(frozen=True, slots=True)
class Stories:
    """What is in a batch of stories of S scenes, and nothing else decides their pixels.

    Attributes:
        colours, places: places in `COLOURS` and `PLACES` that the captions name, [B, S].
        sides: place in `SIDES`, [B, S]; the same in all scenes of a real story.
        starts: where in its half, and where on its way up and down, a square starts: shares [B, S, 2].
    """

    colours: Tensor
    places: Tensor
    sides: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.colours)

    def scenes(self, first: int, last: int) -> Stories:
        """Return the scenes from `first` up to before `last` as stories of their own."""
        return Stories(*(one[:, first:last] for one in self._all()))

    def rows(self, which: Tensor) -> Stories:
        """Return some of the stories."""
        return Stories(*(one[which] for one in self._all()))

    def recaptioned(self, scene: int) -> Stories:
        """Return the same stories with another colour and the other place in one scene."""
        here = torch.arange(self.colours.shape[1]) == scene
        colours = torch.where(here, (self.colours + 1) % len(COLOURS), self.colours)
        return Stories(colours, torch.where(here, 1 - self.places, self.places), self.sides, self.starts)

    def film(self, frames: Sequence[int] | None = None) -> Tensor:
        """Return the clips [B, 3, F, 8, 8] in -1..1, of `frames` frames a scene."""
        lengths = torch.tensor(frames or [FRAMES] * self.colours.shape[1])
        scene = torch.arange(len(lengths)).repeat_interleave(lengths)  # [F]
        step = torch.cat([torch.arange(n) for n in lengths.tolist()])
        side = torch.tensor(SIDES)[self.sides[:, scene]]  # [B, F]
        free = SIZE - side
        way = ((self.starts[:, scene, 1] * 2 * free).long() + step) % (2 * free)
        row = torch.where(way > free, 2 * free - way, way)
        half = SIZE // 2
        column = (self.starts[:, scene, 0] * (half - side + 1)).long() + half * self.places[:, scene]
        lattice = torch.arange(SIZE)
        down, across = (
            (lattice >= first[..., None]) & (lattice < (first + side)[..., None]) for first in (row, column)
        )  # [B, F, 8]
        inside = (down[..., :, None] & across[..., None, :])[:, None]
        ink = PALETTE[self.colours[:, scene]].permute(0, 2, 1)[..., None, None]  # [B, 3, F, 1, 1]
        return torch.where(inside, ink, PALETTE[-1].reshape(1, 3, 1, 1, 1))

    def words(self, *, ids: bool = False) -> Tensor:
        """Return the captions as text tokens [B, 2 S, 11]: a colour and a place each, orthogonal; `ids` adds which scene's."""
        batch, scenes = self.colours.shape
        width = len(COLOURS) + len(PLACES) + SCENES
        rows = torch.eye(width) * width**0.5
        told = torch.stack([rows[self.colours], rows[len(COLOURS) + self.places]], dim=2)  # [B, S, 2, 11]
        if ids:
            told = told + rows[len(COLOURS) + len(PLACES) + torch.arange(scenes)][:, None]
        return told.reshape(batch, 2 * scenes, width)

    def _all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.colours, self.places, self.sides, self.starts


def drawn(count: int, dice: torch.Generator, *, held_out: bool = False, scenes: int = SCENES) -> Stories:
    """Draw stories with triples of colours that are trained, or with those that never are.

    Raises: ValueError unless `scenes` is a multiple of three.
    """
    if scenes < 1 or scenes % SCENES:
        raise ValueError(f"scenes are drawn in threes, got {scenes}")
    triples = TRIPLES[held_out == NEVER]
    which = torch.randint(len(triples), (count, scenes // SCENES), generator=dice)
    shape = (count, scenes)
    return Stories(
        triples[which].flatten(1),
        torch.randint(len(PLACES), shape, generator=dice),
        torch.randint(len(SIDES), (count, 1), generator=dice).expand(shape),
        torch.rand(*shape, 2, generator=dice),
    )


@dataclass(frozen=True, slots=True)
class Seen:
    """What the eyes find in each scene, [B, S]: places in `COLOURS`, `PLACES` and `SIDES`, or -1; the side in px, which is the
    root of the coloured area; and the share of frames that show exactly a square of an identity's size.
    """

    colours: Tensor
    places: Tensor
    sides: Tensor
    px: Tensor
    squares: Tensor


def look(clips: Tensor, frames: Sequence[int] | None = None) -> Seen:
    """Read clips [B, 3, F, 8, 8]: every pixel is the colour it is nearest to, and most of a scene's must agree."""
    frames = frames or [FRAMES] * (clips.shape[2] // FRAMES)
    pixels = clips.float().permute(0, 2, 3, 4, 1)
    nearest = torch.cdist(pixels.flatten(0, 3), PALETTE).argmin(1).reshape(pixels.shape[:-1])  # [B, F, 8, 8]
    found = []
    for scene in nearest.split(list(frames), dim=1):
        votes = torch.stack([(scene == colour).flatten(1).sum(1) for colour in range(len(COLOURS))], dim=1)
        inked = (scene < len(COLOURS)).sum(dim=(1, 2))  # by column, [B, 8]
        count = inked.sum(1)
        left = inked[:, : SIZE // 2].sum(1)
        px = (count / scene.shape[1]).sqrt()
        apart, side = (px[:, None] - torch.tensor(SIDES)).abs().min(dim=1)
        found.append(
            (
                _agreed(votes, count),
                _agreed(torch.stack([left, count - left], dim=1), count),
                torch.where(apart < NEAR, side, -1),
                px,
                _square(scene < len(COLOURS)).float().mean(1),
            )
        )
    return Seen(*(torch.stack(parts, dim=1) for parts in zip(*found, strict=True)))


def _agreed(votes: Tensor, count: Tensor) -> Tensor:
    """Return what most pixels say, [B], or -1 where too few agree."""
    most, which = votes.max(dim=1)
    return torch.where(most >= PURE * count.clamp_min(1), which, -1)


def _square(inked: Tensor) -> Tensor:
    """Return which frames [B, F, 8, 8] show one filled square of an identity's side, [B, F]."""
    lattice = torch.arange(SIZE)
    spans = []
    for lines in (inked.any(-1), inked.any(-2)):  # rows, columns [B, F, 8]
        last = torch.where(lines, lattice, -1).amax(-1)
        spans.append(last - torch.where(lines, lattice, SIZE).amin(-1) + 1)
    filled = inked.sum(dim=(-2, -1)) == spans[0] * spans[1]
    return filled & (spans[0] == spans[1]) & torch.isin(spans[0], torch.tensor(SIDES))


def scored(seen: Seen, asked: Stories, *, first: int = 0) -> dict[str, float]:
    """Return the shares of scenes from `first` on that are right, and of whole stories.

    `colour` and `place` are what the caption names, `caption` is both, `story` that of all scenes; `identity` is the size of the
    scene before any cut met again, asked of later scenes alone; `square` is the share of frames whose drawing is exact.
    """
    colour, place = (
        (mine == theirs)[:, first:]
        for mine, theirs in ((seen.colours, asked.colours), (seen.places, asked.places))
    )
    later = seen.sides[:, max(1, first) :]
    both = colour & place
    same = (later == seen.sides[:, :1]) & (later >= 0)
    return {
        name: float(right.float().mean())
        for name, right in (
            ("colour", colour),
            ("place", place),
            ("caption", both),
            ("story", both.all(dim=1)),
            ("identity", same),
            ("square", seen.squares[:, first:]),
        )
    }


def baselines(stories: Stories, dice: torch.Generator) -> dict[str, dict[str, float]]:
    """Return the figures of real stories, and of real ones that are wrong in a known way.

    `real` is the ceiling; `another request` shows the story of other captions; `scenes in any order` knows the captions but not
    whose they are; `unrelated scenes` has every caption right and draws the size anew in every scene. `chance` is arithmetic.
    """
    count, scenes = stories.colours.shape
    order = torch.rand(count, scenes, generator=dice).argsort(dim=1)
    colours, places, sides = (
        one.gather(1, order) for one in (stories.colours, stories.places, stories.sides)
    )
    anew = torch.randint(len(SIDES), (count, scenes), generator=dice)
    ways = {
        "real": stories,
        "another request": stories.rows(torch.arange(count).roll(1)),
        "scenes in any order": Stories(colours, places, sides, stories.starts),
        "unrelated scenes": Stories(stories.colours, stories.places, anew, stories.starts),
    }
    found = {name: scored(look(one.film()), stories) for name, one in ways.items()}
    caption = 1 / (len(COLOURS) * len(PLACES))
    chance = {"colour": 1 / len(COLOURS), "place": 1 / len(PLACES), "identity": 1 / len(SIDES)}
    return found | {"chance": chance | {"caption": caption, "story": caption**scenes}}
