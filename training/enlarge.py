"""Train a codec's enlarger: `python -m training.enlarge training/recipes/emoji-enlarger.toml --out runs/enlarger`.

`training.enlarge_clips` does the same with frames of clips.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dit.codec import ResampleCodec
from training.data import choose, load_pictures

Train = Callable[[dict[str, Any], Path, float | None], dict[str, float]]


def edge_loss(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the differences between neighbouring pixels, for pictures [B, C, H, W]."""
    rows = (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()
    return rows + (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean()


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, in float64, of pictures in -1..1."""
    error = (a.double().clamp(-1, 1) - b.double()).square().mean().item()
    return 10 * math.log10(4 / max(error, 1e-12))


def train(recipe: dict[str, Any], out: Path, minutes: float | None = None) -> dict[str, float]:
    """Train on the recipe's pictures; see `train_on`."""
    data = recipe["data"]
    pictures = choose(load_pictures(Path(data["folder"])), styles=data["styles"], subgroups=[], concepts=[])
    held = pictures.only([row["split"] != "train" for row in pictures.rows])
    learnt = pictures.only([row["split"] == "train" for row in pictures.rows])
    return train_on(learnt.pixels, held.pixels, recipe, out, minutes)


def train_on(
    pixels: Tensor, held: Tensor, recipe: dict[str, Any], out: Path, minutes: float | None
) -> dict[str, float]:
    """Train a codec, save it in the recipe's precision, and return its PSNR on held-out pictures beside the bilinear one, in dB.

    Args:
        pixels, held: pictures to learn and pictures it never sees, uint8 [n, 3, H, W].
        minutes: the end by the clock; None for the recipe's count of samples.
    """
    run = recipe["run"]
    torch.manual_seed(run["seed"])
    codec = ResampleCodec(**recipe["codec"]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        codec.parameters(), lr=run["rate"], betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    clean = scaled(held)
    plain = psnr(codec(clean), clean)
    total, began = run["samples"] // run["batch"], time.monotonic()
    bar = tqdm(range(total), mininterval=5)
    for i in bar:
        share = (time.monotonic() - began) / 60 / minutes if minutes else i / total
        if share >= 1:
            break
        cooling = 0.5 + 0.5 * math.cos(math.pi * share)
        optimizer.param_groups[0]["lr"] = run["rate"] * min(1.0, (i + 1) / 50) * cooling
        loss = loss_of(codec, scaled(pixels[torch.randint(len(pixels), (run["batch"],))]), recipe)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    with torch.no_grad():
        reached = psnr(torch.cat([codec(part) for part in clean.split(64)]), clean)
    codec.to(precision_of(recipe)).save_pretrained(out)
    figures = {"held_out_psnr_db": reached, "bilinear_psnr_db": plain, "seconds": time.monotonic() - began}
    (out / "figures.json").write_text(json.dumps(figures, indent=1))
    return figures


def loss_of(codec: ResampleCodec, picture: Tensor, recipe: dict[str, Any]) -> Tensor:
    """Return how far decoded latents, noise on half of them, are from their pictures [B, 3, H, W]: pixels and edges."""
    goal, precision = recipe["objective"], precision_of(recipe)
    latent = codec.encode(picture)
    spread = torch.rand(len(latent), 1, 1, 1) * goal["noise"] * (torch.rand(len(latent), 1, 1, 1) < 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        made = codec.decode(latent + spread * torch.randn_like(latent)).float()
    loss: Tensor = (made - picture).abs().mean() + goal["edges"] * edge_loss(made, picture)
    return loss


def precision_of(recipe: dict[str, Any]) -> torch.dtype:
    """Return the type that a recipe's codec is computed and stored in, float32 where it names none."""
    found: torch.dtype = getattr(torch, recipe["run"].get("precision", "float32"))
    return found


def scaled(pixels: Tensor) -> Tensor:
    """Pictures uint8 -> float32 in -1..1."""
    return pixels.float() / 127.5 - 1


def command(about: str | None, trained_by: Train) -> None:
    """Read the command line of an enlarger's trainer and train."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    given = parser.parse_args()
    print(json.dumps(trained_by(tomllib.loads(given.recipe.read_text()), given.out, given.minutes)))


def main() -> None:
    """Read the command line and train."""
    command(__doc__, train)


if __name__ == "__main__":
    main()
