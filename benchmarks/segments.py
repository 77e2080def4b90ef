"""Does scene i show what caption i names? `python -m benchmarks.segments [--seeds 3] [--steps 1500]`.

Networks of one size learn the same small stories in the same order for as many steps: with Mask2DiT's symmetric mask, without a
mask (then nothing says which caption is whose), and without a mask but with every text token saying by a number which scene it
belongs to (the fair control). Rotary positions, as in the paper, tell only how far apart two frames are; the last control has a
table that says which frame is which, the most help that a network without a mask can get. The generator's truth judges them
half-way and at the end, on triples of colours that no training saw. The file is written after every run; a second call with the
same settings goes on where the first one stopped.

Paper: Mask^2DiT, Qi et al. 2025, arXiv:2503.19881.
Differs: pixels instead of latents, rectified flow instead of v-prediction, and given scenes may be any first ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from benchmarks._segments_data import COLOURS, FRAMES, PALETTE, SCENES, SIZE, Stories, baselines, drawn
from benchmarks._segments_tasks import SAMPLING, TEST, Maker, exam, figures_of, generated, held_out, times_of
from benchmarks.machine import RESULTS, commit, record, write_json
from dit.backbones.mask2dit import Mask2DiT
from dit.ledger import parameters_of
from training.attention import quick_backward
from training.objectives import FlowMatching
from training.optimizers import Master


@dataclass(frozen=True, slots=True)
class Variant:
    """What differs between the networks: who hears whom, whether captions name their scene, and how places are told."""

    mixer: str
    ids: bool = False
    position: Literal["rope", "sincos"] = "rope"


VARIANTS = {
    "mask": Variant("scenes"),
    "no mask": Variant("full"),
    "no mask, scene ids": Variant("full", ids=True),
    "no mask, scene ids, frame table": Variant("full", ids=True, position="sincos"),
}
NETWORK: dict[str, Any] = {
    "in_channels": 3, "patch_size": 2, "sample_height": SIZE, "sample_width": SIZE, "frames": FRAMES, "scenes": SCENES,
    "width": 64, "depth": 3, "heads": 4, "time_dim": 32, "context_dim": 11, "caption_length": 2,
}  # fmt: skip
OPTIMIZER: dict[str, Any] = {"name": "muon", "rate": 3e-3, "matrix_rate": 6e-3, "decay": 0.01, "ema": 0.99}
OBJECTIVE = {"mean": 1.0, "std": 1.0, "floor": 0.05}
WARMUP, CLIP, GIVEN = 50, 1.0, 0.5
"""Steps of rising rate, which then stays, so that half-way is what a run of half the steps would be; the most a gradient's norm
may be; the share of samples whose first scenes are given."""
PARTS, LEARNT = 15, 0.9
"""Parts of a run after each of which held-out captions are asked; the share of them that counts as learnt."""


class Learner:
    """One training: the network in bfloat16, its master weights, and the stream of stories, the same for every variant."""

    def __init__(self, variant: Variant, seed: int, batch: int) -> None:
        torch.manual_seed(seed)
        self.variant, self.batch = variant, batch
        self.network = Mask2DiT(mixer=variant.mixer, position=variant.position, **NETWORK)
        self.master = Master(self.network, **OPTIMIZER)
        self.network = self.network.to(torch.bfloat16).train()
        self.objective, self.dice = FlowMatching(**OBJECTIVE), torch.Generator().manual_seed(seed)
        self.seconds = 0.0

    @quick_backward(torch.device("cpu"), torch.bfloat16)
    def step(self) -> float:
        """Draw stories, move the weights once; return the loss."""
        began = time.process_time()
        stories = drawn(self.batch, self.dice)
        clean = stories.film()
        noise = torch.randn(clean.shape, generator=self.dice)
        times = self.objective.times(self.batch, self.dice)
        given = torch.randint(1, SCENES, (self.batch,), generator=self.dice)
        given = torch.where(torch.rand(self.batch, generator=self.dice) < GIVEN, given, 0)
        words = stories.words(ids=self.variant.ids)

        def denoise(noisy: Tensor, times: Tensor) -> Tensor:
            return self.network(noisy, times_of(times, given, SCENES), words, return_dict=False)[0]

        loss = self.objective.losses(
            denoise, clean, noise, times, generated(given, (FRAMES,) * SCENES)
        ).mean()
        loss.backward()
        self.master.step(min(1.0, (self.master.steps + 1) / WARMUP), CLIP)
        self.seconds += time.process_time() - began
        return float(loss.detach())

    def maker(self) -> Maker:
        """Return what makes stories with the averaged weights, in float32."""
        network = Mask2DiT.from_config(self.network.config).eval()
        network.load_state_dict(self.master.averaged())
        return Maker(network.requires_grad_(False), ids=self.variant.ids)


def run(
    name: str, seed: int, *, steps: int, batch: int, count: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train one variant; return its figures half-way and at the end, and clips of the end."""
    learner, figures = Learner(VARIANTS[name], seed, batch), {}
    clips: dict[str, Tensor] = {}
    stops = {max(1, steps // 2): "half", steps: "end"}
    marks = {max(1, steps * part // PARTS) for part in range(1, PARTS + 1)}
    losses: list[float] = []
    curve: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        losses.append(learner.step())
        if step in marks:
            curve.append({"step": step} | held_out(learner.maker(), max(1, count // 3)))
        if step in stops:
            found, clips = figures_of(learner.maker(), count)
            loss = statistics.fmean(losses[-100:])
            figures[stops[step]] = {"loss": loss, "seconds": learner.seconds, **found}
            told = {key: found[key] for key in ("held_out", "learnt", "extension")}
            print(f"{name}, seed {seed}, step {step}: {json.dumps(told)}", file=sys.stderr, flush=True)
    row = {"variant": name, "seed": seed, "commit": commit(), "parameters": parameters_of(learner.network)}
    return row | {"seconds": learner.seconds, "curve": curve, "figures": figures}, clips


def gathered(trees: Sequence[Any]) -> Any:
    """Return mean and standard deviation over runs of every number in trees of one form; of yes and no, whether all say yes."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: gathered([tree[key] for tree in trees]) for key in first}
    if isinstance(first, bool):
        return all(trees)
    if any(tree is None for tree in trees):
        return {"each": list(trees)}
    if isinstance(first, list):
        parts = [gathered(list(each)) for each in zip(*trees, strict=True)]
        return {key: [part[key] for part in parts] for key in parts[0]}
    return {"mean": statistics.fmean(trees), "spread": statistics.stdev(trees) if len(trees) > 1 else 0.0}


def steps_to_learn(curve: Sequence[dict[str, float]]) -> float | None:
    """Return after how many steps nine tenths of held-out captions were right for the first time, or None."""
    return next((one["step"] for one in curve if one["caption"] >= LEARNT), None)


def summarised(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return every figure of every variant over its seeds, and what may be claimed of them."""
    by_name = {name: [one for one in runs if one["variant"] == name] for name in VARIANTS}
    over = {
        name: {"seeds": [one["seed"] for one in rows], "parameters": rows[0]["parameters"]}
        | gathered([{"steps_to_learn": steps_to_learn(one["curve"]), **one["figures"]} for one in rows])
        for name, rows in by_name.items()
        if rows
    }
    return {"over_seeds": over, "claims": claims(by_name) if len(over) == len(VARIANTS) else {}}


def claims(runs: dict[str, list[dict[str, Any]]]) -> dict[str, bool]:
    """Say which claims the runs bear out: of the worst seed with the mask against the best without one."""

    def each(name: str, task: str, figure: str, when: str = "end") -> list[float]:
        return [float(one["figures"][when][task][figure]) for one in runs[name]]

    def parted(when: str, *controls: str) -> bool:
        others = [value for name in controls for value in each(name, "held_out", "caption", when)]
        return min(each("mask", "held_out", "caption", when)) > max(others)

    def gap(when: str) -> float:
        ours, fair = (each(name, "held_out", "caption", when) for name in ("mask", "no mask, scene ids"))
        return statistics.fmean(ours) - statistics.fmean(fair)

    alike, helped = ("no mask", "no mask, scene ids"), "no mask, scene ids, frame table"
    return {
        "scene i shows caption i in 90 % of held-out scenes": min(each("mask", "held_out", "caption"))
        >= LEARNT,
        "all scenes are right in 90 % of held-out stories": min(each("mask", "held_out", "story")) >= LEARNT,
        "every seed above both controls with its positions at half of the steps": parted("half", *alike),
        "every seed above both controls with its positions at the end": parted("end", *alike),
        "every seed above the control with a table of frames at half of the steps": parted("half", helped),
        "every seed above the control with a table of frames at the end": parted("end", helped),
        "the control with scene ids is nearer at the end than at half": gap("end") < gap("half"),
        "later scenes keep the first one's size in 90 %": min(each("mask", "held_out", "identity")) >= LEARNT,
        "given scenes come out bit for bit": all(
            value for name in VARIANTS for value in each(name, "extension", "given_unchanged")
        ),
        "in the first block a scene hears its own caption alone": all(each("mask", "gradient", "own_only")),
    }


def sheet(stories: Stories, clips: Tensor, enlarge: int = 4) -> Image.Image:
    """Return clips [B, 3, F, 8, 8] as one picture, a row a story, before every scene what its caption names."""
    swatches = _swatches(stories)  # [B, 3, S, 8, 8]
    gap = torch.ones(len(stories), 3, SIZE, 1)
    columns: list[Tensor] = []
    for scene, frames in enumerate(clips.split(FRAMES, dim=2)):
        for one in (swatches[:, :, scene], *frames.unbind(2)):
            columns += [one, gap]
        columns += [gap] * 3
    rows = torch.nn.functional.pad(torch.cat(columns, dim=3), (1, 0, 1, 0), value=1.0)  # [B, 3, 9, W]
    board = ((rows.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).flatten(0, 1)
    picture = Image.fromarray(board.contiguous().numpy())
    return picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)


def _swatches(stories: Stories) -> Tensor:
    """Half a grey picture, the other half in a caption's colour on its side: [B, 3, S, 8, 8]."""
    right = (torch.arange(SIZE) >= SIZE // 2).long()
    inked = (right == stories.places[..., None])[:, None, :, None, :]
    ink = PALETTE[stories.colours].movedim(2, 1)[..., None, None]
    return torch.where(inked, ink, torch.full((), 0.6)).expand(-1, -1, -1, SIZE, -1)


def write_sheets(file: Path, name: str, count: int, clips: dict[str, Tensor]) -> None:
    """Draw the first held-out stories of a variant, and stories told on, beside the results."""
    file.parent.mkdir(parents=True, exist_ok=True)
    held, _, longer = exam(count)
    stem = f"{file.stem}-{name.replace(',', '').replace(' ', '-')}"
    for task, stories, rows in (("held_out", held, 8), ("told_on", longer, 4)):
        some = torch.arange(min(rows, count))
        sheet(stories.rows(some), clips[task][some]).save(file.with_name(f"{stem}-{task}.png"))


def earlier(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs that a results file holds already.

    Raises:
        ValueError: the file was made by other settings, which are named.
    """
    if not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    other = [key for key in settings if found["settings"].get(key) != settings[key]]
    if other:
        was = ", ".join(f"{key} {found['settings'].get(key)} and not {settings[key]}" for key in other)
        raise ValueError(f"{file} holds runs of {was}; give another --out, or delete it")
    return list(found["runs"])


def missing(runs: Sequence[dict[str, Any]], seeds: int, names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield what is still to be trained, all variants of a seed before the next."""
    done = {(one["variant"], one["seed"]) for one in runs}
    yield from ((name, seed) for seed in range(seeds) for name in names if (name, seed) not in done)


def main(train: Callable[..., tuple[dict[str, Any], dict[str, Tensor]]] = run) -> None:
    """Read the command line, train what is missing, write figures and sheets after every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each variant")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=24, help="stories of a step")
    parser.add_argument("--count", type=int, default=64, help="test stories of a task")
    parser.add_argument("--only", action="append", choices=list(VARIANTS), help="train these variants alone")
    parser.add_argument("--out", type=Path, default=RESULTS / "segments.json")
    given = parser.parse_args()
    if min(given.seeds, given.batch, given.count) < 1 or given.steps < 2:
        parser.error("seeds, batch and count are at least 1 and steps at least 2")
    asked = {key: getattr(given, key) for key in ("steps", "batch", "count")}
    settings = asked | {
        "variants": {name: dataclasses.asdict(one) for name, one in VARIANTS.items()},
        "network": NETWORK, "optimizer": OPTIMIZER, "objective": OBJECTIVE, "sampling_steps": SAMPLING,
        "warmup": WARMUP, "clip": CLIP, "given": GIVEN, "colours": len(COLOURS),
    }  # fmt: skip
    try:
        runs = earlier(given.out, settings)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    dice = torch.Generator().manual_seed(TEST)
    trivial = baselines(drawn(1000, dice, held_out=True), dice)
    for name, seed in missing(runs, given.seeds, given.only or list(VARIANTS)):
        row, clips = train(name, seed, **asked)
        runs.append(row)
        if seed == 0:
            write_sheets(given.out, name, given.count, clips)
        write_json(
            given.out,
            record() | {"settings": settings, "baselines": trivial, **summarised(runs), "runs": runs},
        )
    print(json.dumps(summarised(runs)["claims"], indent=1))


if __name__ == "__main__":
    main()
