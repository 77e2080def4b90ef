"""Train the enlarger of clips: `python -m training.enlarge_clips training/recipes/motion-enlarger.toml --out runs/enlarger`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.clips import example
from training.enlarge import command, train_on


def frames_of(seeds: range, world: str = "full", each: int = 4) -> Tensor:
    """Return `each` frames of the scene of every seed, uint8 [n, 3, 64, 64]."""
    found = [example(seed, world=world)[0].frames[:: 16 // each] for seed in seeds]
    return torch.from_numpy(np.concatenate(found))


def train(recipe: dict[str, Any], out: Path, minutes: float | None = None) -> dict[str, float]:
    """Train on the recipe's count of scenes, and hold 32 others out; see `training.enlarge.train_on`."""
    run = recipe["run"]
    world = recipe.get("data", {}).get("world", "full")
    pixels = frames_of(range(run["seed"], run["seed"] + run["scenes"]), world)
    return train_on(pixels, frames_of(range(10**9, 10**9 + 32), world), recipe, out, minutes)


def main() -> None:
    """Read the command line and train."""
    command(__doc__, train)


if __name__ == "__main__":
    main()
