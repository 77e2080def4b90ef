"""What sparse attention saves and changes in clips, end to end: `python -m benchmarks.sparse_clips --model FOLDER`.

The model is a trained network with full attention over all of a clip, 4,096 tokens a layer (`training/recipes/motion-full.toml`
says how it is made). Clips are made from text and from their first half, by the exact run and by each method in turns. Told are the
time of the denoising loop and of the whole request as ratios to the exact run of the same clip, the difference from it (PSNR in
float64, SSIM, latent error), and what the generator's truth says of both. `random-tiles` keeps as many tiles as AdaSpa, but any.

Paper: AdaSpa, Xia et al. 2025, arXiv:2502.21079; XAttention, Xu et al. 2025, arXiv:2503.16428.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from acceleration import Accelerator, AdaSpa
from acceleration.adaspa import Chosen
from benchmarks._motion_eyes import Frames, centre_errors, judge
from benchmarks._motion_tasks import GIVEN, MISSING, drawn
from benchmarks.machine import RESULTS, record, write_json
from benchmarks.measures import relative_error
from benchmarks.motion import card_of, sheet
from dit.spec import parse
from pipelines._kept import Latents
from pipelines.compare import difference_of_clips
from pipelines.generate import generate
from pipelines.request import Request
from pipelines.result import Result
from training.clips import Clip

SEED = 8_000_000
METHODS = (
    "adaspa:density=0.5", "adaspa:density=0.3", "adaspa:density=0.15", "random-tiles:density=0.3",
    "xattention:threshold=0.95", "xattention:threshold=0.9", "xattention:threshold=0.8",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomTiles(AdaSpa):
    """Keep as many tiles as AdaSpa would, whatever they hold: the control of this benchmark, which no registry lists."""

    name: ClassVar[str] = "random-tiles"

    def chosen(self, mass: Tensor, queries: Tensor, columns: Tensor) -> Chosen:
        """Choose tiles by lot; what they hold of the mass [B, K, P, Q] is told."""
        counted = AdaSpa.chosen(self, mass, queries, columns)
        lots = torch.rand(mass.shape, generator=torch.Generator().manual_seed(mass.shape[2])).to(mass.device)
        lots = lots.masked_fill(columns, 2.0)
        counts = counted.kept.sum(-1, keepdim=True)  # [B, K, P, 1]
        places = lots.argsort(dim=-1, descending=True).argsort(dim=-1)
        kept = places < counts
        recall = (mass * kept).sum((-1, -2)) / mass.sum((-1, -2)).clamp_min(1e-20)
        return replace(counted, kept=kept, recall=recall)


def method_of(text: str) -> Accelerator:
    """Read a method of the command line; `random-tiles` has AdaSpa's settings."""
    kind, _, settings = text.partition(":")
    if kind != RandomTiles.name:
        return parse(Accelerator, text)
    like = parse(Accelerator, f"{AdaSpa.name}:{settings}")
    return RandomTiles(**{one.name: getattr(like, one.name) for one in fields(like)})


def frames_of(result: Result) -> Frames:
    """Return the clip of a result, uint8 [F, 3, H, W]."""
    return np.stack([np.asarray(one.convert("RGB")).transpose(2, 0, 1) for one in result.clips[0]])


def made(request: Request) -> tuple[Result, Tensor]:
    """Make a clip the way every door does; return it with its final latent."""
    with tempfile.TemporaryDirectory() as folder:
        result = generate(request, keep=Latents(Path(folder)))
        (file,) = Path(folder).glob("*.safetensors")
        return result, load_file(file)["latents"]


def asked(task: str, clip: Clip, request: Request, folder: Path) -> Request:
    """Return the exact request of a task: "text", or "prediction" from the first frames of the real clip."""
    if task == "text":
        return request
    real = folder / f"{request.seed}.frames"
    real.mkdir()
    for place, frame in enumerate(clip.frames):
        Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))).save(real / f"{place:04d}.png")
    return request.replace(clip=str(real), task="predict", given=GIVEN, guidance=1.0)


def truth(task: str, clip: Clip, frames: Frames) -> float:
    """Return 1 where all that the caption tells is right, else 0; of a prediction the mean centre error in px."""
    if task == "text":
        return float(judge(frames, clip.script)["all"])
    seen = clip.visible[GIVEN:] > 0.5
    errors = centre_errors(frames[GIVEN:], clip.script, clip.centres[GIVEN:], MISSING)
    return float(errors[seen].mean()) if seen.any() else 0.0


def measured(
    task: str, methods: Sequence[str], plain: Request, count: int, world: str
) -> tuple[dict[str, Any], list[tuple[str, Frames]]]:
    """Make `count` clips by the exact run and every method in turns; return figures and rows of a sheet."""
    clips, captions = drawn(count, SEED, kind="single" if task == "text" else "any", world=world)
    names = ["exact", *methods]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    shown: list[tuple[str, Frames]] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
            exact = asked(task, clip, plain.replace(prompt=caption, seed=SEED + turn), Path(folder))
            requests = {name: exact if name == "exact" else exact.replace(accelerators=(method_of(name),)) for name in names}
            if turn == 0:  # loads the model; does not count
                made(exact)
            done = {name: made(requests[name]) for name in (names if turn % 2 == 0 else names[::-1])}
            result, latent = done["exact"]
            for name in names:
                own, own_latent = done[name]
                apart = difference_of_clips(own.clips[0], result.clips[0])
                times, other = own.report["timings"], result.report["timings"]
                rows[name].append(
                    {
                        "denoise": times["denoise"],
                        "denoise_ratio": other["denoise"] / times["denoise"],
                        "end_to_end_ratio": spent(other) / spent(times),
                        "psnr_db": apart.psnr,
                        "ssim": apart.ssim,
                        "latent_relative_error": relative_error(own_latent, latent),
                        "truth": truth(task, clip, frames_of(own)),
                        **sparsity(own.report["run"]["attention"]),
                    }
                )
                if turn < 3:
                    shown.append((f"{name}: {caption}", frames_of(own)))
            print(task, turn + 1, "of", count, file=sys.stderr, flush=True)
    return {name: summed(rows[name], name == "exact") for name in names}, shown


def spent(timings: dict[str, float]) -> float:
    """Return the seconds of a request whose model is loaded."""
    return sum(timings[phase] for phase in ("encode", "denoise", "decode"))


def sparsity(attention: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the share of self-attention calls that were sparse, and the density and recall of these."""
    own = [row for row in attention if row["kind"] != "cross"]
    calls, sparse = (sum(row[name] for row in own) for name in ("calls", "sparse"))
    weighed = [row["recall"] for row in own if row["sparse"] and row["recall"] is not None]
    return {
        "sparse_calls": sparse / max(1, calls),
        "density": sum(row["density"] * row["sparse"] for row in own) / sparse if sparse else 1.0,
        "recall": statistics.mean(weighed) if weighed else 1.0,
    }


def summed(rows: Sequence[dict[str, Any]], exact: bool) -> dict[str, Any]:
    """Return medians over clips; the worst PSNR beside the median one, the mean of what the truth says."""
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name != "truth"}
    found = {
        "clips": len(rows),
        "denoise_seconds": middle.pop("denoise"),
        "truth": statistics.mean(row["truth"] for row in rows),
    }
    if exact:
        return found
    worst = min(row["psnr_db"] for row in rows)
    told = found | middle | {"worst_psnr_db": worst}
    return {name: None if value == math.inf else value for name, value in told.items()}  # equal: no PSNR


def main() -> None:
    """Read the command line, measure, write figures and sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--accelerate", action="append", metavar="METHOD", help="instead of the usual list; repeatable")
    parser.add_argument("--count", type=int, default=16, help="clips of a task")
    parser.add_argument("--steps", type=int, help="as the model's card says, unless given")
    parser.add_argument("--min-tokens", type=int, default=1024, help="from how many tokens on attention is thinned out")
    parser.add_argument("--out", type=Path, default=RESULTS / "sparse_clips.json")
    given = parser.parse_args()
    card = card_of(given.model)
    methods = [f"{one},min_tokens={given.min_tokens}" for one in given.accelerate or METHODS]
    plain = Request(prompt="a clip", model=str(given.model.resolve()), steps=given.steps or card["steps"])
    settings = {"count": given.count, "steps": plain.steps, "guidance": card["guidance"], "given": GIVEN}
    result: dict[str, Any] = record() | {"model": given.model.name, "settings": settings, "tasks": {}}
    for task in ("text", "prediction"):
        result["tasks"][task], shown = measured(task, methods, plain, given.count, card["world"])
        write_json(given.out, result)
        sheet(shown, every=2).save(given.out.with_name(f"{given.out.stem}-{task}.png"))
    print(json.dumps(result["tasks"], indent=1))


if __name__ == "__main__":
    main()
