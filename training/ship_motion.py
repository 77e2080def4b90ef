"""Put the trained network of clips and its enlarger together as a shipped model: a diffusers folder and its card.

`python -m training.ship_motion RECIPE --transformer RUN/transformer --codec ENLARGER --out pipelines/checkpoints/motion`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from dit.dense2moe import network_class
from pipelines.text_to_image import MINILM
from pipelines.text_to_video import TextToVideoPipeline
from training.clips import COLOURS, HELD_OUT, SHAPES, SIDE
from training.ship import codec_of, command, load_bfloat16, write

EXAMPLES = [
    "a red ball moves to the right", "a large blue square falls and bounces",
    "a small yellow cross moves left behind a white wall", "a green triangle moves up and a purple circle moves down",
]  # fmt: skip
LIMITS = {
    "full": "Six colours, four shapes, two plain grounds; up to three things that move straight, bounce, fall, rest or pass behind "
    "a wall; a camera that pans or zooms.",
    "small": "Six colours (and twelve that were not judged, pink or teal say), four shapes, two plain grounds; one thing, seldom "
    "two, that move straight, bounce, fall, rest or pass behind a white wall, before a camera that rests. Drawn at 16 px and "
    "enlarged: corners are a little soft. A small cross in a colour it was never taught with may become a disc.",
}
"""What a model has learnt, by its world."""


def card(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the card: the fields the pipelines read, then what people read."""
    model, data = recipe["model"], recipe["data"]
    return {
        "title": name,
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
        "scenes": data["scenes"],
        "scene_frames": data["scene_frames"],
        "fps": 8,
        "steps": 24,
        "guidance": recipe["sampling"].get("guidance", 3.0),
        "examples": EXAMPLES,
        "limits": LIMITS[data.get("world", "full")]
        + " What is not on the list comes out as its nearest kin.",
        "colours": list(COLOURS),
        "world": data.get("world", "full"),
        "shapes": {shape: list(words) for shape, words in SHAPES.items()},
        "held_out_pairs": [list(pair) for pair in HELD_OUT],
    }


def ship(recipe: dict[str, Any], transformer: Path, codec: Path | None, out: Path) -> None:
    """Write the folder beside its place, then put it there; weights are stored in bfloat16."""
    pipeline = TextToVideoPipeline(
        load_bfloat16(network_class(transformer), transformer),
        FlowMatchEulerDiscreteScheduler(shift=recipe["sampling"]["shift"]),
        codec=codec_of(recipe, codec),
        text_model=MINILM,
        text_length=recipe["data"]["text_tokens"],
    )
    write(pipeline, card(recipe, out.name), transformer, out)


def main() -> None:
    """Read the command line and ship."""
    command(__doc__, ship)


if __name__ == "__main__":
    main()
