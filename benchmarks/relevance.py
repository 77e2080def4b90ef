"""How much each block of a model matters for its pictures: `python -m benchmarks.relevance [MODEL] [--chart FILE.svg]`.

Every block is left out in turn; the pictures are compared with the plain ones by pixels and by the Hausdorff distance of their
edges. Writes results/relevance.json, from which `control.relevance.Relevance.read` places adapters.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import sobel
from scipy.spatial.distance import directed_hausdorff
from torch import Tensor

from benchmarks.machine import RESULTS, record, write_json
from control.relevance import Relevance, relevance_of_blocks
from pipelines import catalog
from pipelines.generate import generate
from pipelines.request import Request

PROMPTS = ("red apple, 3d render", "dog, cartoon", "blue heart, 3d render", "cactus, cartoon")
EDGE = 0.5  # of the steepest slope in a picture


def pixels(plain: Tensor, without: Tensor) -> float:
    """Return the root mean square of the differences of pictures [B, H, W, C], of 1."""
    return float((plain - without).square().mean().sqrt())


def edges(plain: Tensor, without: Tensor) -> float:
    """Return the Hausdorff distance of the edges, in pixels, in the mean over pictures [B, H, W, C]."""
    found = []
    for one, two in zip(plain.numpy(), without.numpy(), strict=True):
        a, b = outline(one), outline(two)
        found.append(max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0]))
    return float(np.mean(found))


def outline(picture: np.ndarray) -> np.ndarray:
    """Return the places [M, 2] where a picture [H, W, C] is steep; its middle where it is flat."""
    grey = picture.mean(axis=2)
    slope = np.hypot(sobel(grey, 0), sobel(grey, 1))
    places = np.argwhere(slope > EDGE * slope.max())
    return places if len(places) else np.array([[len(grey) // 2, len(grey[0]) // 2]])


def pictures(model: str, steps: int, seeds: int) -> Tensor:
    """Generate the same pictures every time, [B, H, W, C] from 0 to 1."""
    made = [
        generate(Request(prompt=prompt, model=model, seed=seed, steps=steps)).images[0]
        for prompt in PROMPTS
        for seed in range(seeds)
    ]
    return torch.from_numpy(
        np.stack([np.asarray(one.convert("RGB"), dtype=np.float32) / 255 for one in made])
    )


def main() -> None:
    """Measure a model, write the figures, print the scores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--chosen", type=int, default=4, help="places drawn darker")
    parser.add_argument("--chart", type=Path, help="write the bar chart here")
    parser.add_argument("--out", type=Path, default=RESULTS / "relevance.json")
    given = parser.parse_args()
    transformer = catalog.load(given.model).pipeline.transformer
    found: Relevance = relevance_of_blocks(
        transformer,
        lambda: pictures(given.model, given.steps, given.seeds),
        {"pixels, rms": pixels, "edges, Hausdorff px": edges},
    )
    about = {"model": given.model, "steps": given.steps, "pictures": given.seeds * len(PROMPTS)}
    write_json(given.out, record() | about | found.to_dict())
    if given.chart is not None:
        given.chart.write_text(found.chart(found.chosen(given.chosen)), encoding="utf-8")
    print(
        json.dumps(
            {str(place): round(score, 3) for place, score in zip(found.places, found.scores, strict=True)}
        )
    )


if __name__ == "__main__":
    main()
