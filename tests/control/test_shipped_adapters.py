"""The shipped adapters steer: what is made by the edges or the mask of a drawn shape has them, and not those of another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks._control_scores import Flags, edge_f1, overlap
from pipelines.generate import generate
from pipelines.request import Request
from training.scenes import made_of

FILL, LINE = (225, 150, 60), (70, 40, 25)
SHAPES: dict[str, Callable[[Any], None]] = {  # thing -> its picture, never round and in the middle, as what is made freely
    "hot dog": lambda pen: pen.ellipse((4, 24, 60, 42), fill=FILL, outline=LINE),
    "bottle with popping cork": lambda pen: pen.rounded_rectangle((24, 3, 40, 61), 6, fill=FILL, outline=LINE),
    "pizza": lambda pen: pen.polygon([(6, 8), (58, 12), (30, 60)], fill=FILL, outline=LINE),
    "ball": lambda pen: pen.ellipse((2, 2, 36, 36), fill=FILL, outline=LINE),
}  # fmt: skip
STEPS = 8


def condition(picture: Image.Image, kind: str) -> Flags:
    """The edges or the mask of a picture as the adapter's training made them, [H, W]."""
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)[None]
    found: Flags = (made_of(pixels, kind)[0, 0] > 127).numpy()
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, found = tmp_path_factory.mktemp("shapes"), []
    for number, draw in enumerate(SHAPES.values()):
        picture = Image.new("RGB", (64, 64), "white")
        draw(ImageDraw.Draw(picture))
        found.append(folder / f"{number}.png")
        picture.save(found[-1])
    return found


def scores(files: list[Path], kind: str, likeness: Callable[[Flags, Flags], float]) -> dict[str, float]:
    """Mean likeness to the condition of each shape: of what is made by it, by that of the next shape, and by none."""
    found: dict[str, list[float]] = {"own": [], "another's": [], "none": []}
    for number, name in enumerate(SHAPES):
        wanted = condition(Image.open(files[number]), kind)
        given = {"own": [files[number]], "another's": [files[(number + 1) % len(files)]], "none": []}
        for way, pictures in given.items():
            controls = tuple(f"{kind}={one}" for one in pictures)
            request = Request(
                prompt=f"{name}, flat illustration",
                model="emoji",
                steps=STEPS,
                seed=3 + number,
                controls=controls,
            )
            found[way].append(likeness(condition(generate(request).images[0], kind), wanted))
    return {way: sum(values) / len(values) for way, values in found.items()}


def test_what_is_made_follows_the_edges_that_were_given(files: list[Path]) -> None:
    """0.44 against 0.25 without and 0.21 with another shape's: flat shapes at the side are unlike what it was trained with (the
    held-out pictures of its training's kind come out at 0.89), so what counts is how far it stands above both.
    """
    found = scores(files, "edges", edge_f1)
    assert found["own"] > 1.4 * found["none"], found
    assert found["own"] > 1.4 * found["another's"], found
    assert found["own"] > 0.35, found


def test_what_is_made_fills_the_mask_that_was_given(files: list[Path]) -> None:
    """0.80 against 0.38 without and 0.32 with another shape's."""
    found = scores(files, "masks", overlap)
    assert found["own"] > 1.4 * found["none"], found
    assert found["own"] > 1.4 * found["another's"], found
    assert found["own"] > 0.6, found
