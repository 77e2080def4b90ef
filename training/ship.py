"""Put a trained network and its codec together as a shipped model: a diffusers folder and its card.

`python -m training.ship RECIPE --transformer runs/emoji/transformer --codec runs/enlarger --out pipelines/checkpoints/emoji`
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit.codec import ResampleCodec
from dit.presets import backbone_class
from pipelines.text_to_image import MINILM, TextToImagePipeline
from training.data import STYLES, choose, load_pictures

EXAMPLES = ["dog, 3d render", "a red apple, cartoon", "rocket, flat illustration", "cat, black and white icon"]
LIMITS = (
    "No scenes, no lettering, no people, one thing at a time; what is not on the list comes out as its nearest kin."
)


def knowledge(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return what a model was shown: concepts in alphabetical order, style words, and counts."""
    data = recipe["data"]
    found = choose(
        load_pictures(Path(data["folder"]), size=64), **{key: data[key] for key in ("styles", "subgroups", "concepts")}
    )
    learnt = [row for row in found.rows if row["split"] == "train"]
    return {
        "concepts": sorted({row["concept"] for row in learnt}),
        "styles": {style: STYLES[style][0] for style in data["styles"]},
        "pictures": len(learnt),
        "held_out_pairs": sorted([row["concept"], row["style"]] for row in found.rows if row["split"] == "val_pair"),
    }


def card(recipe: dict[str, Any], seen: int, parameters: int) -> dict[str, Any]:
    """Return the card: the fields the pipelines read, then what people read."""
    known = knowledge(recipe)
    side, patch, scale = recipe["model"]["sample_size"], recipe["model"]["patch_size"], recipe["codec"]["scale"]
    words = ", ".join(known["styles"].values())
    return {
        "title": "emoji",
        "summary": f"One thing on white, {side * scale} px: {len(known['concepts'])} concepts in "
        f"{len(known['styles'])} styles ({words}).",
        "license": "Apache-2.0 (weights); credits of the training pictures: NOTICE",
        "task": "text-to-image",
        "dtype": "float32",
        "dtypes": {"cuda": "bfloat16"},
        "width": side * scale,
        "height": side * scale,
        "multiple": patch * scale,
        "low": side * scale,
        "high": side * scale,
        "steps": 28,
        "guidance": 3.0,
        "parameters": parameters,
        "samples_seen": seen,
        "examples": EXAMPLES,
        "limits": LIMITS,
        **known,
    }


def ship(recipe: dict[str, Any], transformer: Path, codec: Path | None, out: Path) -> None:
    """Write the folder beside its place, then put it there."""
    model = backbone_class(recipe["model"]["backbone"]).from_pretrained(transformer, torch_dtype=torch.bfloat16)
    enlarger = None if codec is None else ResampleCodec.from_pretrained(codec, torch_dtype=torch.bfloat16)
    pipeline = TextToImagePipeline(
        model, FlowMatchEulerDiscreteScheduler(), codec=enlarger, text_model=MINILM, text_length=64
    )
    draft = out.with_name(out.name + ".new")
    shutil.rmtree(draft, ignore_errors=True)
    pipeline.save_pretrained(draft, safe_serialization=True)
    progress = transformer.parent / "progress.json"
    seen = json.loads(progress.read_text())["seen"] if progress.is_file() else 0
    text = json.dumps(card(recipe, seen, sum(p.numel() for p in model.parameters())), indent=1, ensure_ascii=False)
    (draft / "card.json").write_text(text + "\n")
    for file in draft.rglob("*.safetensors"):
        file.chmod(0o644)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(draft, out)


def main() -> None:
    """Read the command line and ship."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    for name in ("transformer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--codec", type=Path, help="the codec's folder; none for a network that works on pixels")
    given = parser.parse_args()
    ship(tomllib.loads(given.recipe.read_text()), given.transformer, given.codec, given.out)


if __name__ == "__main__":
    main()
