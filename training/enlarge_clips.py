"""Train the enlarger of clips: `python -m training.enlarge_clips training/recipes/motion-enlarger.toml --out runs/enlarger`."""

from __future__ import annotations

import argparse
import json
import math
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dit.codec import ResampleCodec
from training.clips import example
from training.enlarge import edge_loss, psnr


def frames_of(seeds: range, each: int = 4) -> Tensor:
    """Return `each` frames of the scene of every seed, [n, 3, 64, 64] in -1..1."""
    found = [example(seed)[0].frames[:: 16 // each] for seed in seeds]
    return torch.from_numpy(np.concatenate(found)).float() / 127.5 - 1


def train(recipe: dict[str, Any], out: Path, minutes: float | None = None) -> dict[str, float]:
    """Train, save the codec, and return its PSNR on scenes it never saw beside that of bilinear enlargement, in dB."""
    run, goal = recipe["run"], recipe["objective"]
    torch.manual_seed(run["seed"])
    held = frames_of(range(10**9, 10**9 + 32))
    pixels = frames_of(range(run["seed"], run["seed"] + run["scenes"]))
    codec = ResampleCodec(**recipe["codec"]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=run["rate"], betas=(0.9, 0.99), weight_decay=0.0)
    plain = psnr(codec(held), held)
    total, began = run["samples"] // run["batch"], time.monotonic()
    bar = tqdm(range(total), mininterval=5)
    for i in bar:
        share = (time.monotonic() - began) / 60 / minutes if minutes else i / total
        if share >= 1:
            break
        optimizer.param_groups[0]["lr"] = (
            run["rate"] * min(1.0, (i + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * share))
        )
        picture = pixels[torch.randint(len(pixels), (run["batch"],))]
        latent = codec.encode(picture)
        spread = torch.rand(len(latent), 1, 1, 1) * goal["noise"] * (torch.rand(len(latent), 1, 1, 1) < 0.5)
        made = codec.decode(latent + spread * torch.randn_like(latent))
        loss = (made - picture).abs().mean() + goal["edges"] * edge_loss(made, picture)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    with torch.no_grad():
        reached = psnr(torch.cat([codec(part) for part in held.split(64)]), held)
    codec.save_pretrained(out)
    figures = {"held_out_psnr_db": reached, "bilinear_psnr_db": plain, "seconds": time.monotonic() - began}
    (out / "figures.json").write_text(json.dumps(figures, indent=1))
    return figures


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    given = parser.parse_args()
    print(json.dumps(train(tomllib.loads(given.recipe.read_text()), given.out, given.minutes)))


if __name__ == "__main__":
    main()
