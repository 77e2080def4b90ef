"""Train a codec's enlarger: `python -m training.enlarge training/recipes/emoji-enlarger.toml --out runs/enlarger`."""

from __future__ import annotations

import argparse
import json
import math
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dit.codec import ResampleCodec
from training.data import choose, load_pictures


def edge_loss(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the differences between neighbouring pixels, for pictures [B, C, H, W]."""
    rows = (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()
    return rows + (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean()


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, in float64, of pictures in -1..1."""
    error = (a.double().clamp(-1, 1) - b.double()).square().mean().item()
    return 10 * math.log10(4 / max(error, 1e-12))


def train(recipe: dict[str, Any], out: Path, minutes: float | None) -> None:
    """Train, print held-out PSNR beside that of bilinear enlargement, and save the codec."""
    run, goal = recipe["run"], recipe["objective"]
    torch.manual_seed(run["seed"])
    pictures = choose(load_pictures(Path(recipe["data"]["folder"])), styles=recipe["data"]["styles"], subgroups=[], concepts=[])
    held = pictures.only([r["split"] != "train" for r in pictures.rows]).pixels.float() / 127.5 - 1
    pixels = pictures.only([r["split"] == "train" for r in pictures.rows]).pixels
    codec = ResampleCodec(**recipe["codec"]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=run["rate"], betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    plain = psnr(codec(held), held)
    total, began = run["samples"] // run["batch"], time.monotonic()
    bar = tqdm(range(total), mininterval=5)
    for i in bar:
        share = (time.monotonic() - began) / 60 / minutes if minutes else i / total
        if share >= 1:
            break
        optimizer.param_groups[0]["lr"] = run["rate"] * min(1.0, (i + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * share))
        picture = pixels[torch.randint(len(pixels), (run["batch"],))].float() / 127.5 - 1
        latent = codec.encode(picture)
        spread = torch.rand(len(latent), 1, 1, 1) * goal["noise"] * (torch.rand(len(latent), 1, 1, 1) < 0.5)
        with torch.autocast("cpu", dtype=getattr(torch, run["precision"])):
            made = codec.decode(latent + spread * torch.randn_like(latent)).float()
        loss = (made - picture).abs().mean() + goal["edges"] * edge_loss(made, picture)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    with torch.no_grad():
        reached = psnr(torch.cat([codec(part) for part in held.split(64)]), held)
    codec.to(torch.bfloat16).save_pretrained(out)
    figures = {"held_out_psnr_db": reached, "bilinear_psnr_db": plain, "seconds": time.monotonic() - began}
    (out / "figures.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    given = parser.parse_args()
    train(tomllib.loads(given.recipe.read_text()), given.out, given.minutes)


if __name__ == "__main__":
    main()
