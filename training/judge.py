"""Train the network that judges generated pictures: `python -m training.judge training/recipes/judge.toml --out benchmarks/judge`.

It names style and concept of a picture, each by a tower of its own, and its features are what the Frechet distance is
measured in. It sees real pictures only, and never those held out; what it reaches on these is saved beside its weights, as the
ceiling of every figure it gives.

Paper: Identity Mappings in Deep Residual Networks, He et al. 2016, arXiv:1603.05027; mixup, Zhang et al. 2018, arXiv:1710.09412.
Differs: group instead of batch normalisation, so that a picture's verdict does not depend on its batch and the weights can be
averaged; the weights of convolutions are matrices, which Muon moves.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import sys
import time
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from training.data import STYLES, Pictures, choose, load_pictures
from training.optimizers import Master

GROUPS = 8


class Convolution(nn.Module):
    """A 3 x 3 convolution without bias whose weight is the matrix [out, in * 9]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs * 9) * (inputs * 9) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W] -> [B, D', H, W]."""
        return F.conv2d(x, self.weight.unflatten(1, (-1, 3, 3)), padding=1)


class Residual(nn.Module):
    """x + conv(ReLU(norm(conv(ReLU(norm(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, width), Convolution(width, width)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, width), Convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W] -> [B, D, H, W]."""
        inner = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(inner)))


class Tower(nn.Module):
    """Pictures [B, 3, 64, 64] in -1..1 -> features [B, D] -> logits [B, classes]."""

    def __init__(self, widths: list[int], depth: int, classes: int) -> None:
        super().__init__()
        self.conv_in = Convolution(12, widths[0])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Residual(width) for _ in range(depth))) for width in widths
        )
        self.downs = nn.ModuleList(Convolution(a, b) for a, b in itertools.pairwise(widths))
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1])
        self.embed_classes = nn.Linear(widths[-1], classes)

    def features(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D], averaged over the places of the last stage."""
        x = self.conv_in(F.pixel_unshuffle(pictures.to(self.conv_in.weight.dtype), 2))
        x = self.stages[0](x)
        for down, stage in zip(self.downs, list(self.stages)[1:], strict=True):
            x = stage(F.avg_pool2d(down(x), 2))
        return F.relu(self.norm_out(x)).mean(dim=(2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, classes]."""
        return self.embed_classes(self.features(pictures))


class Judge(nn.Module):
    """Two towers that share nothing: a shallow one that sees small neighbourhoods for the style, a deep one for the concept."""

    def __init__(self, model: dict[str, dict[str, Any]], styles: int, concepts: int) -> None:
        super().__init__()
        self.style = Tower(**model["style"], classes=styles)
        self.concept = Tower(**model["concept"], classes=concepts)

    def features(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D], those of both towers."""
        return torch.cat([self.style.features(pictures), self.concept.features(pictures)], dim=1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> ([B, styles], [B, concepts])."""
        return self.style(pictures), self.concept(pictures)


@dataclass(frozen=True, slots=True)
class Court:
    """A judge and the names that its answers stand for."""

    judge: Judge
    styles: list[str]
    concepts: list[str]
    digest: str = ""

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Return the features [n, D] of pictures uint8 [n, 3, 64, 64]."""
        return torch.cat([self.judge.features(part.float() / 127.5 - 1) for part in pixels.split(64)])

    @torch.no_grad()
    def verdicts(self, pixels: Tensor) -> tuple[list[str], list[list[str]]]:
        """Return each picture's style, and the five concepts it is most likely of, best first; uint8 [n, 3, 64, 64]."""
        if not len(pixels):
            return [], []
        pairs = [self.judge(part.float() / 127.5 - 1) for part in pixels.split(64)]
        styles = torch.cat([style.argmax(dim=1) for style, _ in pairs]).tolist()
        best = torch.cat([concept.topk(min(5, concept.shape[1])).indices for _, concept in pairs]).tolist()
        return [self.styles[i] for i in styles], [[self.concepts[i] for i in row] for row in best]

    def accuracy(self, pixels: Tensor, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Return the shares of pictures whose style, concept, and concept among five are those of their rows."""
        styles, concepts = self.verdicts(pixels)
        count = max(len(rows), 1)
        return {
            "pictures": len(rows),
            "style_top1": sum(a == row["style"] for a, row in zip(styles, rows, strict=True)) / count,
            "concept_top1": sum(a[0] == row["concept"] for a, row in zip(concepts, rows, strict=True))
            / count,
            "concept_top5": sum(row["concept"] in a for a, row in zip(concepts, rows, strict=True)) / count,
        }


def augment(pictures: Tensor, settings: dict[str, Any], dice: torch.Generator) -> Tensor:
    """Shift, scale, turn, mirror, blur, drain, tint and partly cover pictures [B, 3, H, W] in -1..1; what comes in is white."""
    count, _, height, width = pictures.shape

    def spread(limit: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=dice) * 2 - 1) * limit

    def some(share: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=dice) < share

    angle, size = spread(math.radians(settings["turn"])), torch.exp(spread(settings["scale"]))
    mirror = 1 - 2 * (torch.rand(count, generator=dice) < settings["mirror"]).float()
    shift = spread(2 * settings["shift"] / width, 2)
    cos, sin = angle.cos() / size, angle.sin() / size
    matrix = torch.stack([cos * mirror, -sin, shift[:, 0], sin * mirror, cos, shift[:, 1]], dim=1).reshape(
        -1, 2, 3
    )
    places = F.affine_grid(matrix, [count, 3, height, width], align_corners=False)
    x = F.grid_sample(pictures - 1, places, align_corners=False) + 1
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
    x = torch.where(some(settings["blur"]), soft, x)
    x = torch.where(some(settings["grey"]), x.mean(dim=1, keepdim=True), x)
    x = x * (1 + spread(settings["light"], 3, 1, 1)) + spread(settings["light"], 3, 1, 1) * some(0.5)
    cover = [
        torch.randint(-settings["cut"] // 2, side, (count, 1), generator=dice) for side in (height, width)
    ]
    inside = [
        (torch.arange(side) >= low) & (torch.arange(side) < low + settings["cut"])
        for side, low in zip((height, width), cover, strict=True)
    ]
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :] & some(0.5)
    x = x.masked_fill(square, 0.0)
    level = torch.rand(count, 1, 1, 1, generator=dice) * settings["noise"] * some(0.5)
    return (x + level * torch.randn(x.shape, generator=dice)).clamp(-1, 1)


class Lessons:
    """Training pictures with their labels; every (concept, style) pair is drawn equally often."""

    def __init__(self, pictures: Pictures, key: str, names: list[str]) -> None:
        self.pixels, self.classes = pictures.pixels, len(names)
        self.labels = torch.tensor([names.index(row[key]) for row in pictures.rows])
        counts = Counter((row["style"], row["concept"]) for row in pictures.rows)
        self.weights = torch.tensor([1 / counts[row["style"], row["concept"]] for row in pictures.rows])

    def draw(self, count: int, dice: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return pictures [B, 3, H, W] in -1..1 and their labels [B]."""
        pick = torch.multinomial(self.weights, count, replacement=True, generator=dice)
        return self.pixels[pick].float() / 127.5 - 1, self.labels[pick]


def lessons_for(pictures: Pictures, styles: list[str], concepts: list[str]) -> dict[str, Lessons]:
    """Return what each tower learns from: the judged concepts in every style there is, for the concept; the judged styles of
    every concept but those with a held-out picture, for the style. Rows of the training split alone.

    A tower that had seen these concepts in all styles but the held-out one would learn that they never have that style.
    """
    asked = {row["concept"] for row in pictures.rows if row["split"] == "val_pair"} & set(concepts)
    learnt = pictures.only([row["split"] == "train" for row in pictures.rows])
    return {
        "style": Lessons(
            learnt.only([row["style"] in styles and row["concept"] not in asked for row in learnt.rows]),
            "style",
            styles,
        ),
        "concept": Lessons(
            learnt.only([row["concept"] in concepts for row in learnt.rows]), "concept", concepts
        ),
    }


def mixed(pictures: Tensor, share: float, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mix a share of pictures [B, 3, H, W] with their neighbours in the batch; return them and each own part [B], half to 1."""
    own = 0.5 + 0.5 * torch.rand(len(pictures), generator=dice)
    own = torch.where(torch.rand(len(pictures), generator=dice) < share, own, 1.0)
    part = own.reshape(-1, 1, 1, 1)
    return part * pictures + (1 - part) * pictures.roll(1, 0), own


def train(
    recipe: dict[str, Any],
    styles: list[str],
    concepts: list[str],
    pictures: Pictures,
    minutes: float | None = None,
) -> Court:
    """Train both towers on rows of the training split, by the recipe's counts of samples or by the clock."""
    judge = Judge(recipe["model"], len(styles), len(concepts))
    for name, lessons in lessons_for(pictures, styles, concepts).items():
        torch.manual_seed(recipe["run"]["seed"])
        tower = Tower(**recipe["model"][name], classes=lessons.classes)
        share = recipe["run"][f"{name}_samples"] / sum(
            recipe["run"][f"{one}_samples"] for one in recipe["model"]
        )
        train_tower(tower, lessons, recipe, name, minutes and minutes * share)
        setattr(judge, name, tower)
    return Court(judge.eval().requires_grad_(False), styles, concepts)


def train_tower(
    tower: Tower, lessons: Lessons, recipe: dict[str, Any], name: str, minutes: float | None
) -> None:
    """Train one tower and leave its averaged weights in it, in float32."""
    run, settings, changes = recipe["run"], recipe["optimizer"], recipe["augment"][name]
    dice = torch.Generator().manual_seed(run["seed"])
    master = Master(tower, **{k: settings[k] for k in ("name", "rate", "matrix_rate", "decay", "ema")})
    tower.to(getattr(torch, run["precision"]))
    total, began = -(-run[f"{name}_samples"] // run["batch"]), time.monotonic()
    for i in (bar := tqdm(range(total), desc=name, mininterval=5)):
        share = (time.monotonic() - began) / 60 / minutes if minutes else i / total
        if share >= 1:
            break
        real, wanted = lessons.draw(run["batch"], dice)
        seen, own = mixed(augment(real, changes, dice), changes["mix"], dice)
        answers = tower(seen.contiguous(memory_format=torch.channels_last))
        loss = _loss(answers, wanted, own, recipe["objective"]["smoothing"])
        loss.backward()
        cooling = min(1.0, (1 - share) / settings["cooldown"])
        master.step(min(1.0, (i + 1) / settings["warmup"]) * max(cooling, 0.01), settings["clip"])
        if i % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    tower.float().load_state_dict(master.averaged())


def _loss(answers: Tensor, wanted: Tensor, own: Tensor, smoothing: float) -> Tensor:
    both = [
        F.cross_entropy(answers.float(), target, label_smoothing=smoothing, reduction="none")
        for target in (wanted, wanted.roll(1, 0))
    ]
    return (own * both[0] + (1 - own) * both[1]).mean()


def held_out(court: Court, pictures: Pictures) -> dict[str, dict[str, float]]:
    """Return the accuracy on held-out and learnt pictures of the judged styles, and that of concepts in the other drawn ones."""

    def on(split: str, styles: list[str]) -> dict[str, float]:
        part = pictures.only(
            [
                row["split"] == split and row["style"] in styles and row["concept"] in court.concepts
                for row in pictures.rows
            ]
        )
        return court.accuracy(part.pixels, part.rows)

    others = on("val_pair", [style for style in STYLES if style not in (*court.styles, "photo")])
    del others["style_top1"]
    return {
        "held_out": on("val_pair", court.styles),
        "held_out_other_styles": others,
        "learnt": on("train", court.styles),
    }


def save_judge(court: Court, folder: Path, record: dict[str, Any]) -> None:
    """Write weights in bfloat16 and names, settings and accuracy, each under its final name only when whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.to(torch.bfloat16).contiguous() for name, value in court.judge.state_dict().items()
    }
    save_file(tensors, folder / "judge.safetensors.new")
    os.replace(folder / "judge.safetensors.new", folder / "judge.safetensors")
    whole = record | {"styles": court.styles, "concepts": court.concepts}
    (folder / "judge.json.new").write_text(json.dumps(whole, indent=1) + "\n")
    os.replace(folder / "judge.json.new", folder / "judge.json")


def load_judge(folder: Path) -> Court:
    """Return a saved judge, in float32. Raises: FileNotFoundError where there is none."""
    known = json.loads((folder / "judge.json").read_text())
    judge = Judge(known["recipe"]["model"], len(known["styles"]), len(known["concepts"]))
    judge.load_state_dict(
        {name: value.float() for name, value in load_file(folder / "judge.safetensors").items()}
    )
    digest = hashlib.sha256((folder / "judge.safetensors").read_bytes()).hexdigest()
    return Court(judge.eval().requires_grad_(False), known["styles"], known["concepts"], f"sha256:{digest}")


def concepts_of(judged: dict[str, Any], pictures: Pictures) -> list[str]:
    """Return the concepts that a model's recipe chooses."""
    chosen = choose(pictures, **{key: judged["data"][key] for key in ("styles", "subgroups", "concepts")})
    return sorted({row["concept"] for row in chosen.rows})


def main() -> None:
    """Read the command line, train, measure and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for judge.safetensors and judge.json")
    parser.add_argument("--data", type=Path, help="folder of the pictures, instead of the recipe's")
    parser.add_argument(
        "--minutes", type=float, help="end by the clock, with the whole schedule in that time"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=JSON",
        help="change one setting of the recipe",
    )
    given = parser.parse_args()
    recipe = tomllib.loads(given.recipe.read_text())
    for change in given.set:
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        recipe[section][name] = json.loads(value)
    judged = tomllib.loads((given.recipe.parent / recipe["data"]["concepts_of"]).read_text())
    pictures = load_pictures(given.data or Path(recipe["data"]["folder"]))
    concepts = concepts_of(judged, pictures)
    began = time.monotonic()
    trained = train(recipe, judged["data"]["styles"], concepts, pictures, given.minutes)
    seconds = time.monotonic() - began
    save_judge(trained, given.out, {"recipe": recipe, "seconds": round(seconds)})
    accuracy = held_out(load_judge(given.out), pictures)
    save_judge(trained, given.out, {"recipe": recipe, "seconds": round(seconds), "accuracy": accuracy})
    print(json.dumps(accuracy, indent=1))
    print(
        f"{sum(p.numel() for p in trained.judge.parameters()):,} parameters, {seconds:.0f} s", file=sys.stderr
    )


if __name__ == "__main__":
    main()
