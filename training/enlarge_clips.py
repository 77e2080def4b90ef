"""Train the enlarger of clips: `python -m training.enlarge_clips training/recipes/motion-enlarger.toml --out runs/enlarger`.

It must not know which shape goes with which colour, or it makes that shape of whatever is vague: so things have other colours too,
and frames are shown with their channels in any order that makes no held-out pair.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.clips import COLOURS, HELD_OUT, OTHERS, Script, example
from training.enlarge import command, train_on

ORDERS = tuple(itertools.permutations(range(3)))
"""Orders of the three channels; the first is the plain one."""
APART = 60.0
"""How far, of 0..255 and three channels together, a colour must be from that of a held-out pair for its shape."""


def orders(script: Script) -> list[tuple[int, ...]]:
    """Return the orders of channels in which nothing in a scene looks like a held-out pair."""

    def fits(order: tuple[int, ...]) -> bool:
        for one in script.movers:
            seen = [(COLOURS | OTHERS)[one.colour][channel] for channel in order]
            if any(shape == one.shape and math.dist(seen, COLOURS[colour]) < APART for colour, shape in HELD_OUT):
                return False
        return True

    return [order for order in ORDERS if fits(order)]


def frames_of(
    seeds: range, world: str = "full", each: int = 4, *, others: float = 0.0, turned: bool = False
) -> Tensor:
    """Return `each` frames of the scene of every seed, uint8 [n, 3, 64, 64].

    Args:
        others: share of things in the colours `OTHERS`. turned: each frame with its channels in an order of its own, see `orders`.
    """
    found = []
    for seed in seeds:
        clip, _ = example(seed, world=world, others=others)
        frames = clip.frames[:: 16 // each]
        if turned:
            dice, ways = np.random.default_rng([seed, 1]), orders(clip.script)
            frames = np.stack([one[list(ways[int(dice.integers(len(ways)))])] for one in frames])
        found.append(frames)
    return torch.from_numpy(np.concatenate(found))


def train(recipe: dict[str, Any], out: Path, minutes: float | None = None) -> dict[str, float]:
    """Train on the recipe's count of scenes, and hold 32 others out; see `training.enlarge.train_on`."""
    run, data = recipe["run"], dict(recipe.get("data", {}))
    world = data.pop("world", "full")
    pixels = frames_of(range(run["seed"], run["seed"] + run["scenes"]), world, **data)
    return train_on(pixels, frames_of(range(10**9, 10**9 + 32), world), recipe, out, minutes)


def main() -> None:
    """Read the command line and train."""
    command(__doc__, train)


if __name__ == "__main__":
    main()
