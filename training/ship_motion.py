"""Put the trained network of clips and its enlarger together as a shipped model: a diffusers folder and its card.

`python -m training.ship_motion RECIPE --transformer RUN/transformer --codec ENLARGER --out pipelines/checkpoints/motion`
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
from pipelines.text_to_image import MINILM
from pipelines.text_to_video import TextToVideoPipeline
from training.clips import COLOURS, HELD_OUT, SHAPES, SIDE

EXAMPLES = [
    "a red ball moves to the right", "a large blue square falls and bounces",
    "a small yellow cross moves left behind a white wall", "a green triangle moves up and a purple circle moves down",
]  # fmt: skip
LIMITS = (
    "Six colours, four shapes, two plain grounds; up to three things that move straight, bounce, fall, rest or pass behind a wall; "
    "a camera that pans or zooms. What is not on the list comes out as its nearest kin."
)


def card(recipe: dict[str, Any], seen: int, parameters: int) -> dict[str, Any]:
    """Return the card: the fields the pipelines read, then what people read."""
    model, data = recipe["model"], recipe["data"]
    return {
        "title": "motion",
        "summary": f"Moving coloured shapes, {SIDE} px, {data['frames']} frames: from text, from given frames, stories.",
        "license": "Apache-2.0 (weights); trained on scenes that this project draws",
        "task": "text-to-video",
        "dtype": "float32",
        "width": SIDE,
        "height": SIDE,
        "multiple": model["patch_size"] * recipe["codec"]["scale"],
        "low": SIDE,
        "high": SIDE,
        "frames": data["frames"],
        "fps": 8,
        "steps": 24,
        "guidance": 3.0,
        "parameters": parameters,
        "samples_seen": seen,
        "examples": EXAMPLES,
        "limits": LIMITS,
        "colours": list(COLOURS),
        "shapes": {shape: list(words) for shape, words in SHAPES.items()},
        "held_out_pairs": [list(pair) for pair in HELD_OUT],
    }


def ship(recipe: dict[str, Any], transformer: Path, codec: Path | None, out: Path) -> None:
    """Write the folder beside its place, then put it there; weights are stored in bfloat16."""
    model = backbone_class(recipe["model"]["backbone"]).from_pretrained(
        transformer, torch_dtype=torch.bfloat16
    )
    enlarger = None if codec is None else ResampleCodec.from_pretrained(codec, torch_dtype=torch.bfloat16)
    pipeline = TextToVideoPipeline(
        model,
        FlowMatchEulerDiscreteScheduler(),
        codec=enlarger,
        text_model=MINILM,
        text_length=recipe["data"]["text_tokens"],
    )
    draft = out.with_name(out.name + ".new")
    shutil.rmtree(draft, ignore_errors=True)
    pipeline.save_pretrained(draft, safe_serialization=True)
    progress = transformer.parent / "progress.json"
    seen = json.loads(progress.read_text())["seen"] if progress.is_file() else 0
    text = json.dumps(
        card(recipe, seen, sum(p.numel() for p in model.parameters())), indent=1, ensure_ascii=False
    )
    (draft / "card.json").write_text(text + "\n")
    for file in draft.rglob("*.safetensors"):
        file.chmod(0o644)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(draft, out)


def main() -> None:
    """Read the command line and ship."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    for name in ("transformer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument(
        "--codec", type=Path, help="the enlarger's folder; none for a network that works on pixels"
    )
    given = parser.parse_args()
    ship(tomllib.loads(given.recipe.read_text()), given.transformer, given.codec, given.out)


if __name__ == "__main__":
    main()
