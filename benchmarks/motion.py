"""Judge the shipped clip model by the truth of its scenes: `python -m benchmarks.motion [--model pipelines/checkpoints/motion]`.

Captions of held-out pairs, prediction, interpolation, a thing behind a wall, stories; beside copying, straight lines, blending,
and real clips through the codec. `--also NAME=FOLDER` judges another trained transformer in the same pipeline: the same recipe
without temporal attention (the ablation), or with full attention over all of a clip. Sheets of frames lie beside the figures.

Paper: VDT, Lu et al. 2023, arXiv:2305.13311; Mask^2DiT, Qi et al. 2025, arXiv:2503.19881.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks._motion_eyes import Frames
from benchmarks._motion_tasks import (
    GIVEN,
    SCENE,
    Maker,
    captions_right,
    drawn,
    hidden,
    interpolated,
    predicted,
    stories,
)
from benchmarks.machine import RESULTS, ROOT, record, write_json

SEED = 7_000_000
"""Scenes from here on; training draws from other streams."""


def load(model: Path, transformer: Path | None = None) -> Any:
    """Return a pipeline in float32, with another transformer where one is given."""
    from dit.backbones.vdt import VDT
    from pipelines.text_to_video import TextToVideoPipeline

    parts = {} if transformer is None else {"transformer": VDT.from_pretrained(transformer)}
    pipeline: Any = TextToVideoPipeline.from_pretrained(model, **parts, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def card_of(model: Path) -> dict[str, Any]:
    """Return the card of a shipped model: the world it has learnt, its steps and its guidance."""
    card: dict[str, Any] = json.loads((model / "card.json").read_text(encoding="utf-8"))
    return {"world": "full"} | card


def judged(maker: Maker, count: int, sheets: Path | None = None, world: str = "full") -> dict[str, Any]:
    """Return every figure of a model from about `count` clips a task of a `world`; draw sheets where a folder is given."""
    figures: dict[str, Any] = {}
    for name, kind, held_out in (
        ("held_out", "single", True),
        ("learnt", "single", False),
        ("several", "any", True),
    ):
        clips, captions = drawn(count, SEED, kind=kind, held_out=held_out, world=world)
        figures[name], made = captions_right(maker, clips, captions, SEED)
        _told(name, figures[name])
        if sheets is not None:
            sheet([(caption, one) for caption, one in zip(captions, made, strict=True)][:12]).save(
                sheets / f"{name}.png"
            )
    tasks = (
        ("prediction", predicted, "any"),
        ("turning", predicted, "turn"),
        ("interpolation", interpolated, "any"),
        ("wall", hidden, "wall"),
    )
    for name, task, kind in tasks:
        clips, captions = drawn(max(2, count // 2), SEED + 1_000_000, kind=kind, world=world)
        figures[name], made = task(maker, clips, captions, SEED)
        _told(name, figures[name])
        if sheets is not None:
            pairs = zip(clips, captions, made, strict=True)
            rows = [
                row
                for clip, caption, one in pairs
                for row in ((f"real: {caption}", clip.frames), ("made", one))
            ]
            sheet(rows[:16]).save(sheets / f"{name}.png")
    figures["stories"], made, texts = stories(maker, max(2, count // 4), SEED, world=world)
    _told("stories", figures["stories"])
    if sheets is not None:
        sheet([(" | ".join(text), one) for text, one in zip(texts, made, strict=True)][:8], every=2).save(
            sheets / "stories.png"
        )
    return figures


def goals(figures: dict[str, Any]) -> dict[str, bool]:
    """Say which of the goals the figures reach."""
    ahead, turning, between = figures["prediction"], figures["turning"], figures["interpolation"]
    held, story, px = figures["held_out"]["model"], figures["stories"]["model"], "centre_px_turning"
    return {
        "colour, shape and motion right in 90 % of held-out captions": min(held.values()) >= 0.9,
        "centre error under half of copy-last": ahead["model"]["centre_px"]
        < ahead["copy-last"]["centre_px"] / 2,
        "centre error under a straight line's where things turn": turning["model"][px]
        < turning["linear"][px],
        "interpolation 6 dB above blending where things move": between["model"]["psnr_db_moving"]
        >= between["blending"]["psnr_db_moving"] + 6,
        "a hidden thing comes out in its place in 90 %": figures["wall"]["model"]["in_place"] >= 0.9,
        "scene i shows the colour and shape of caption i in 90 %": min(story["colour"], story["shape"])
        >= 0.9,
        "change from frame to frame within 10 % of real": abs(figures["learnt"]["of_real"]["change"] - 1)
        <= 0.1,
    }


def seconds(pipeline: Any, clips: int = 4) -> float:
    """Return the processor seconds of one evaluation of the network for a clip."""
    network, config = pipeline.transformer, pipeline.transformer.config
    noisy = torch.randn(clips, config.in_channels, config.frames, config.sample_size, config.sample_size)
    given = {
        "timestep": torch.full((clips,), 500.0),
        "encoder_hidden_states": torch.randn(clips, 24, config.context_dim),
    }
    times = []
    with torch.no_grad():
        for _ in range(4):
            start = time.process_time()
            network(noisy, **given)
            times.append(time.process_time() - start)
    return min(times[1:]) / clips


def sheet(rows: Sequence[tuple[str, Frames]], every: int = 1) -> Image.Image:
    """Return clips uint8 [F, 3, H, W] as one picture, a row a clip, its words above."""
    height, words = rows[0][1].shape[-2], 12
    width = max(one[::every].shape[0] for _, one in rows) * (rows[0][1].shape[-1] + 1)
    board = Image.new("RGB", (width, len(rows) * (height + words)), "white")
    draw = ImageDraw.Draw(board)
    for place, (text, one) in enumerate(rows):
        top = place * (height + words)
        draw.text((1, top), text[: width // 6], fill="black")
        for column, frame in enumerate(one[::every]):
            board.paste(
                Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))),
                (column * (frame.shape[-1] + 1), top + words),
            )
    return board


def _told(name: str, figures: dict[str, Any]) -> None:
    print(name, json.dumps(figures), file=sys.stderr, flush=True)


def main() -> None:
    """Read the command line, judge, write figures and sheets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "pipelines" / "checkpoints" / "motion")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another transformer, by its folder",
    )
    parser.add_argument("--count", type=int, default=64, help="clips of a task")
    parser.add_argument("--steps", type=int, help="as the model's card says, unless given")
    parser.add_argument("--guidance", type=float, help="as the model's card says, unless given")
    parser.add_argument("--out", type=Path, default=RESULTS / "motion.json")
    parser.add_argument("--sheets", type=Path, default=RESULTS / "motion")
    given = parser.parse_args()
    given.sheets.mkdir(parents=True, exist_ok=True)
    card = card_of(given.model)
    settings = {
        "count": given.count,
        "steps": card["steps"] if given.steps is None else given.steps,
        "guidance": card["guidance"] if given.guidance is None else given.guidance,
        "given": GIVEN,
        "scene_frames": SCENE,
        "world": card["world"],
    }
    result: dict[str, Any] = record() | {"settings": settings, "models": {}}
    others = dict(one.partition("=")[::2] for one in given.also)
    for name, folder in {"motion": None, **others}.items():
        pipeline = load(given.model, None if folder is None else Path(folder))
        maker = Maker(pipeline, settings["steps"], settings["guidance"])
        figures = judged(maker, given.count, given.sheets if folder is None else None, settings["world"])
        size = {
            "parameters": sum(one.numel() for one in pipeline.transformer.parameters()),
            "seconds": seconds(pipeline),
        }
        result["models"][name] = size | {"figures": figures, "goals": goals(figures)}
        write_json(given.out, result)
    print(json.dumps(result["models"]["motion"]["goals"], indent=1))


if __name__ == "__main__":
    main()
