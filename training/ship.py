"""Put a trained network and its codec together as a shipped model: a diffusers folder and its card.

`python -m training.ship RECIPE --transformer runs/emoji/transformer --codec runs/enlarger --out pipelines/checkpoints/emoji`

RECIPE is the one that the network was trained with, by `training.train` or, as a student, by `training.distill`; a student that is
given no codec takes its teacher's. `leapfrog generate --model FOLDER` opens what is written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit.codec import ResampleCodec
from dit.dense2moe import network_class
from pipelines.text_to_image import MINILM, TextToImagePipeline
from training.data import STYLES, choose, load_pictures

Ship = Callable[[dict[str, Any], Path, Path | None, Path], None]

EXAMPLES = [
    "dog, 3d render",
    "a red apple, cartoon",
    "rocket, flat illustration",
    "cat, black and white icon",
]
LIMITS = "No scenes, no lettering, no people, one thing at a time; what is not on the list comes out as its nearest kin."


def knowledge(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return what a model was shown: concepts in alphabetical order, style words, and counts."""
    data = recipe["data"]
    found = choose(
        load_pictures(Path(data["folder"]), size=64),
        **{key: data[key] for key in ("styles", "subgroups", "concepts")},
    )
    learnt = [row for row in found.rows if row["split"] == "train"]
    return {
        "concepts": sorted({row["concept"] for row in learnt}),
        "styles": {style: STYLES[style][0] for style in data["styles"]},
        "pictures": len(learnt),
        "held_out_pairs": sorted(
            [row["concept"], row["style"]] for row in found.rows if row["split"] == "val_pair"
        ),
    }


def card(recipe: dict[str, Any], name: str, network: Any) -> dict[str, Any]:
    """Return the card: the fields the pipelines read, then what people read."""
    known = knowledge(recipe)
    side, patch, scale = network.config["sample_size"], network.config["patch_size"], recipe["codec"]["scale"]
    words = ", ".join(known["styles"].values())
    return {
        "title": name,
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
        "examples": EXAMPLES,
        "limits": LIMITS,
        **known,
    }


def ship(recipe: dict[str, Any], transformer: Path, codec: Path | None, out: Path) -> None:
    """Write the folder beside its place, then put it there; weights are stored in bfloat16."""
    network = load_bfloat16(network_class(transformer), transformer)
    pipeline = TextToImagePipeline(
        network,
        FlowMatchEulerDiscreteScheduler(),
        codec=codec_of(recipe, codec),
        text_model=MINILM,
        text_length=64,
    )
    write(pipeline, card(recipe, out.name, network), transformer, out)


def load_bfloat16(kind: Any, folder: Path) -> Any:
    """Return the network or codec of a folder with its weights in bfloat16."""
    return kind.from_pretrained(folder, torch_dtype=torch.bfloat16)


def codec_of(recipe: dict[str, Any], folder: Path | None) -> ResampleCodec | None:
    """Return the codec of a folder, for a student by default its teacher's; None for a network that works on pixels.

    Raises: ValueError where the recipe's latents are not those of the codec.
    """
    if folder is None and "teacher" in recipe and (Path(recipe["teacher"]["folder"]) / "codec").is_dir():
        folder = Path(recipe["teacher"]["folder"]) / "codec"
    codec = None if folder is None else load_bfloat16(ResampleCodec, folder)
    scale = 1 if codec is None else codec.scale_factor
    if scale != recipe["codec"]["scale"]:
        raise ValueError(
            f"codec: the recipe has latents at 1/{recipe['codec']['scale']} of the size, got a codec for 1/{scale}"
        )
    return codec


def write(pipeline: Any, about: dict[str, Any], transformer: Path, out: Path) -> None:
    """Write a pipeline and its card, with the counts of parameters and samples, beside their place, then put them there."""
    draft = out.with_name(out.name + ".new")
    shutil.rmtree(draft, ignore_errors=True)
    pipeline.save_pretrained(draft, safe_serialization=True)
    progress = transformer.parent / "progress.json"
    counts = {
        "parameters": sum(one.numel() for one in pipeline.transformer.parameters()),
        "samples_seen": json.loads(progress.read_text())["seen"] if progress.is_file() else 0,
    }
    for file in draft.glob("*/config.json"):  # where a part lay before tells of the computer, not of the model
        told = json.loads(file.read_text())
        told.pop("_name_or_path", None)
        file.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    (draft / "card.json").write_text(json.dumps(about | counts, indent=1, ensure_ascii=False) + "\n")
    for file in draft.rglob("*.safetensors"):
        file.chmod(0o644)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(draft, out)


def command(about: str | None, made_by: Ship) -> None:
    """Read the command line of a shipper and ship."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    for name in ("transformer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument(
        "--codec", type=Path, help="the codec's folder; none for a network that works on pixels"
    )
    given = parser.parse_args()
    made_by(tomllib.loads(given.recipe.read_text()), given.transformer, given.codec, given.out)


def main() -> None:
    """Read the command line and ship."""
    command(__doc__, ship)


if __name__ == "__main__":
    main()
