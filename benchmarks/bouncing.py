"""What attention over time is worth, at a size that trains in minutes: `python -m benchmarks.bouncing [--seeds 3]`.

A ball between walls, 16 frames of 16 x 16; one small VDT learns every task by its mask. The same without attention over time (the
ablation) and with full attention over all of a clip have as many parameters, the same clips, steps and seeds. Beside them: copying,
straight lines, blending, and real clips. Finished runs are kept, so that a second call goes on where the first was stopped.

Paper: VDT, Lu et al. 2023, arXiv:2305.13311.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks._bouncing_data import (
    FRAMES,
    RADIUS,
    SIDE,
    Balls,
    errors,
    first_hidden,
    found,
    passes,
    straight_on,
    throw,
    turns,
)  # fmt: skip
from benchmarks._motion_eyes import Frames
from benchmarks.machine import RESULTS, commit, interleaved, record, write_json
from benchmarks.motion import sheet
from benchmarks.segments import missing
from dit.backbones.vdt import VDT
from dit.clip_masks import blend, draw_mask, task_mask
from training.attention import quick_backward
from training.objectives import Denoiser, FlowMatching, euler
from training.optimizers import Master

VARIANTS: dict[str, dict[str, Any]] = {
    "time, then frame": {"width": 64, "mixer": {"name": "spacetime", "qk_norm": True}},
    "no attention over time": {
        "width": 72,
        "mixer": {"name": "spacetime", "temporal": False, "qk_norm": True},
    },
    "full attention": {"width": 72, "mixer": {"name": "full", "qk_norm": True}},
}
"""Widths make their parameters alike: the first has more maps in a block."""
SIZE = {
    "in_channels": 1, "patch_size": 4, "sample_size": SIDE, "frames": FRAMES, "depth": 3, "heads": 2,
    "prediction_type": "sample", "clean_time": True, "position": "both",
}  # fmt: skip
OBJECTIVE, SHIFT = FlowMatching(mean=1.0, std=1.5, floor=0.4), 4.0
MUON = {"name": "muon", "rate": 2e-3, "matrix_rate": 4e-3, "decay": 0.01, "ema": 0.998}
BATCH = 8
"""Clips a step: small, for more steps from as many clips."""
GIVEN, EVERY, HIDDEN_GIVEN = 8, 4, 4
TEST_SEED = 10**9
"""Of the clips that are judged; runs learn from clips of seeds from 0 on."""


# Learning


@quick_backward(torch.device("cpu"), torch.bfloat16)
def trained(variant: str, seed: int, samples: int, batch: int = BATCH) -> tuple[VDT, dict[str, float]]:
    """Return a variant trained on `samples` clips, in its averaged weights, and what that took."""
    torch.manual_seed(seed)
    network: Any = VDT(**SIZE, **VARIANTS[variant])
    master = Master(network, **MUON)
    network.to(torch.bfloat16).compile_repeated_blocks()
    dice, steps = torch.Generator().manual_seed(seed), max(1, samples // batch)
    loss = 0.0
    began = time.perf_counter()
    for step in range(steps):
        clips = throw(batch, dice).clips
        mask = torch.stack([draw_mask(FRAMES, SIDE, SIDE, dice, patch=4) for _ in range(batch)])
        noise = torch.randn(clips.shape, generator=dice)
        times = OBJECTIVE.times(batch, dice)
        error = OBJECTIVE.losses(_denoiser(network, clips, mask), clips, noise, times, mask).mean()
        error.backward()
        tail = (step / steps - 0.6) / 0.4
        master.step(min(1.0, (step + 1) / 50) * max(0.02, 1 - max(tail, 0.0) ** 0.5), 1.0)
        loss += (float(error.detach()) - loss) / min(step + 1, 100)
    learnt = VDT(**SIZE, **VARIANTS[variant])  # not compiled: it is asked for clips of many counts
    learnt.load_state_dict(master.averaged())
    took = {"samples": steps * batch, "steps": steps, "seconds": time.perf_counter() - began, "loss": loss}
    return learnt.eval(), took


def made_by(network: VDT, truth: Balls, mask: Tensor, seed: int, steps: int = 25) -> Tensor:
    """Return clips whose open sites by `mask` [F, H, W] a network has made; the others are bit for bit those of `truth`."""
    clean = truth.clips
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return blend(clean, euler(_denoiser(network, clean, mask), noise, steps, shift=SHIFT), mask)


def _denoiser(network: VDT, clean: Tensor, mask: Tensor) -> Denoiser:
    """Return the velocity by time of `network`, to which the sites of `clean` that `mask` gives are told."""

    def denoise(noisy: Tensor, times: Tensor) -> Tensor:
        told: Tensor = network(
            blend(clean, noisy, mask), times * 1000, mask=mask, clean=clean, return_dict=False
        )[0]
        return told

    return denoise


# Judging


def judged(make: Callable[[Balls, Tensor], Tensor], count: int) -> dict[str, float]:
    """Return every figure of one way to make clips, `make(truth, mask)`, from `count` clips a task; errors of centres in px."""
    figures: dict[str, float] = {}
    dice = torch.Generator().manual_seed(TEST_SEED)
    bare = without_bars(count, dice)
    for name, task, settings in (
        ("predict", "predict", {"given": GIVEN}),
        ("backward", "backward", {"given": GIVEN}),
        ("interpolate", "interpolate", {"every": EVERY}),
        ("image", "image", {}),
    ):
        mask = task_mask(task, FRAMES, SIDE, SIDE, **settings)
        made = make(bare, mask)
        open_ = mask[:, 0, 0] > 0
        distance = errors(made, bare)
        figures[f"{name}_mse"] = float((made - bare.clips)[:, :, open_].square().mean())
        figures[f"{name}_px"] = float(distance[:, open_].mean())
        figures[f"{name}_given_changed"] = float((made != bare.clips)[:, :, ~open_].sum())
        if name == "predict":
            turned = turns(bare, GIVEN)
            figures["next_frame_px"] = float(distance[:, GIVEN].mean())
            figures["predict_turning_px"] = float(distance[turned][:, open_].mean())
            figures["predict_straight_px"] = float(distance[~turned][:, open_].mean())
    free = make(bare, task_mask("unconditional", FRAMES, SIDE, SIDE))
    figures |= _free(free)
    box = task_mask("region", FRAMES, SIDE, SIDE, box=(0, 0, SIDE, SIDE // 2))
    figures["region_mse"] = float((make(bare, box) - bare.clips)[:, :, box > 0].square().mean())
    out = _hidden(make, behind_bars(max(2, count // 2), dice))
    return figures | {
        "comes_out_px": float(out.mean()),
        "comes_out_in_place": float((out < 2).float().mean()),
    }


def without_bars(count: int, dice: torch.Generator) -> Balls:
    """Draw `count` clips that have no bar."""
    kept: list[Balls] = []
    while sum(map(len, kept)) < count:
        drawn = throw(4 * count, dice)
        kept.append(drawn.only(~drawn.barred))
    return Balls.joined(kept).only(torch.arange(count))


def behind_bars(count: int, dice: torch.Generator) -> list[Balls]:
    """Draw `count` clips, one at a time, whose ball is seen, goes behind the bar and comes out again."""
    kept: list[Balls] = []
    while len(kept) < count:
        drawn = throw(2000, dice)
        kept += [drawn.only(place[None]) for place in torch.nonzero(passes(drawn, HIDDEN_GIVEN)).flatten()]
    return kept[:count]


def _hidden(make: Callable[[Balls, Tensor], Tensor], behind: Sequence[Balls]) -> Tensor:
    """Return how far from its place the ball is in the last two frames, [B, 2], from the frames up to its first hidden one."""
    last = []
    for known in sorted({first_hidden(one) + 1 for one in behind}):  # one call for all that are given as much
        some = Balls.joined([one for one in behind if first_hidden(one) + 1 == known])
        made = make(some, task_mask("predict", FRAMES, SIDE, SIDE, given=known))
        last.append(errors(made, some)[:, -2:])
    return torch.cat(last)


def _free(clips: Tensor) -> dict[str, float]:
    """Return of clips from nothing: frames with one ball inside the walls, and how even its speed is where it does not turn."""
    centres, seen = found(clips)
    inside = ((centres > RADIUS - 1) & (centres < SIDE - RADIUS + 1)).all(-1) & seen
    speeds = centres.diff(dim=1).abs()  # of each axis: a wall turns its sign alone
    uneven = (speeds.diff(dim=1)).abs().mean(dim=(1, 2))
    return {"free_inside": float(inside.float().mean()), "free_uneven_px": float(uneven.mean())}


def trivial(count: int) -> dict[str, dict[str, float]]:
    """Return the figures of ways that need no network: copying, blending, straight lines, and the real clips."""

    def held(truth: Balls, mask: Tensor) -> Tensor:
        known = torch.nonzero(mask[:, 0, 0] == 0).flatten()
        if not len(known):
            return truth.clips.flip(0)
        nearest = (torch.arange(FRAMES)[:, None] - known).abs().argmin(1)
        return torch.where(mask > 0, truth.clips[:, :, known[nearest]], truth.clips)

    def blended(truth: Balls, mask: Tensor) -> Tensor:
        known = torch.nonzero(mask[:, 0, 0] == 0).flatten()
        if not len(known):
            return truth.clips.flip(0)
        at = torch.arange(FRAMES)
        before = known[(torch.searchsorted(known, at, right=True) - 1).clamp(0)]
        after = known[torch.searchsorted(known, at).clamp_max(len(known) - 1)]
        share = ((at - before) / (after - before).clamp_min(1)).clamp(0, 1)[:, None, None]
        return truth.clips[:, :, before] * (1 - share) + truth.clips[:, :, after] * share

    return {
        "nearest given frame": judged(held, count),
        "blending": judged(blended, count),
        "real clips": judged(lambda truth, _: truth.clips, count),
        **{
            name: _lines(count, walls=walls)
            for name, walls in (("straight line", False), ("line that turns", True))
        },
    }


def _lines(count: int, *, walls: bool) -> dict[str, float]:
    bare = without_bars(count, torch.Generator().manual_seed(TEST_SEED))
    distance = (
        (straight_on(bare, GIVEN, walls=walls) - bare.centres).norm(dim=-1).clamp_max(SIDE / 2)[:, GIVEN:]
    )
    turned = turns(bare, GIVEN)
    return {
        "predict_px": float(distance.mean()), "next_frame_px": float(distance[:, 0].mean()),
        "predict_turning_px": float(distance[turned].mean()), "predict_straight_px": float(distance[~turned].mean()),
    }  # fmt: skip


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return every variant's figures as [mean, lowest, highest] over its seeds."""
    over: dict[str, dict[str, list[float]]] = {}
    for variant in dict.fromkeys(run["variant"] for run in runs):
        rows = [run["figures"] for run in runs if run["variant"] == variant]
        over[variant] = {
            name: [statistics.fmean(values), min(values), max(values)]
            for name in rows[0]
            for values in [[row[name] for row in rows]]
        }
    return over


# Looking


def drawn_sheet(networks: dict[str, VDT], rows: int = 3, enlarge: int = 3) -> Image.Image:
    """Return the same clips continued, filled in and seen again behind the bar, real and by every network, frame beside frame."""
    dice = torch.Generator().manual_seed(TEST_SEED + 1)
    bare = without_bars(rows, dice)
    parts = [
        ("given 8 of 16", bare, task_mask("predict", FRAMES, SIDE, SIDE, given=GIVEN)),
        ("given every fourth", bare, task_mask("interpolate", FRAMES, SIDE, SIDE, every=EVERY)),
    ]
    for one in behind_bars(rows, dice):
        known = first_hidden(one) + 1
        parts.append((f"given {known}", one, task_mask("predict", FRAMES, SIDE, SIDE, given=known)))
    lines: list[tuple[str, Frames]] = []
    for title, truth, mask in parts:
        made = {"real": truth.clips} | {
            name: made_by(network, truth, mask, 5) for name, network in networks.items()
        }
        for place in range(len(truth)):
            lines += [(f"{name}: {title}", _pixels(clips[place], enlarge)) for name, clips in made.items()]
    return sheet(lines)


def _pixels(clip: Tensor, enlarge: int) -> Frames:
    """Return a clip [1, F, H, W] in -1..1 as uint8 [F, 3, H, W], every pixel `enlarge` times as high and wide."""
    grey = ((clip.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, 0)  # [F, 1, H, W]
    large = grey.repeat_interleave(enlarge, dim=-1).repeat_interleave(enlarge, dim=-2)
    found: Frames = large.expand(-1, 3, -1, -1).numpy()
    return found


# The whole


def main() -> None:
    """Read the command line, train what is not trained yet, judge, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each variant")
    parser.add_argument("--samples", type=int, default=32_000, help="clips that a training sees")
    parser.add_argument("--count", type=int, default=96, help="clips that a figure is taken from")
    parser.add_argument("--out", type=Path, default=RESULTS / "bouncing.json")
    given = parser.parse_args()
    settings = {
        "samples": given.samples, "batch": BATCH, "count": given.count, "given": GIVEN, "every": EVERY, "variants": VARIANTS,
        "size": SIZE, "objective": dataclasses.asdict(OBJECTIVE), "shift": SHIFT, "optimizer": MUON,
    }  # fmt: skip
    kept = json.loads(given.out.read_text()) if given.out.is_file() else {}
    runs: list[dict[str, Any]] = kept.get("runs", []) if kept.get("settings") == settings else []
    result = record() | {"settings": settings, "trivial": trivial(given.count), "runs": runs}
    networks: dict[str, VDT] = {}
    for variant, seed in missing(runs, given.seeds, list(VARIANTS)):
        network, took = trained(variant, seed, given.samples)
        figures = judged(lambda truth, mask, made=network: made_by(made, truth, mask, seed), given.count)  # noqa: B023 - called at once
        runs.append({"variant": variant, "seed": seed, "commit": commit(), "figures": figures} | took)
        networks[variant] = network
        write_json(given.out, result | {"summary": summary(runs)})
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    if len(networks) == len(VARIANTS):
        drawn_sheet(networks).save(given.out.with_suffix(".png"), optimize=True)
    write_json(given.out, result | {"summary": summary(runs), "networks": sizes()})


def sizes() -> dict[str, dict[str, float]]:
    """Return parameters and the time of one evaluation on 8 clips, in turns, against the first."""
    clips, times = throw(8, torch.Generator().manual_seed(0)).clips, torch.full((8,), 500.0)
    networks: dict[str, Any] = {name: VDT(**SIZE, **variant).eval() for name, variant in VARIANTS.items()}

    def evaluate(network: Any) -> Callable[[], object]:
        return torch.no_grad()(lambda: network(clips, times, return_dict=False))

    timed = interleaved({name: evaluate(network) for name, network in networks.items()}, rounds=20, warmups=3)
    return {
        name: {
            "parameters": sum(one.numel() for one in network.parameters()),
            "milliseconds": 1000 * timed[name]["median"],
            "times_as_fast_as_first": timed[name]["ratio"],
        }
        for name, network in networks.items()
    }


if __name__ == "__main__":
    main()
