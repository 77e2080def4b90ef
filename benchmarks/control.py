"""Whether trained adapters steer: `python -m benchmarks.control --edges FILE [--masks FILE] [--subject FILE]`.

Held-out pictures give the conditions, their captions are the prompts. Every score stands beside that of no control, that of another
picture's condition, and that of the real pictures through the model's codec, the best there can be. Then two conditions at once,
adapters swapped, strengths, the judge's words on style and concept, other schedulers and counts of steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._control_scores import SCORES, preferred, rising, score
from benchmarks.machine import RESULTS, ROOT, record, write_json
from benchmarks.quality import sheet, to_bytes
from control import Memory, Refused, Use, controlled, load
from control._files import read
from control._instructed import Instructed
from control.base import ControlAdapter
from pipelines.schedulers import scheduler_for
from training.bases import Base, load_base
from training.data import STYLES, Pictures, load_pictures
from training.judge import Court, load_judge
from training.scenes import made_of

STRENGTHS = (0.0, 0.03, 0.1, 0.3, 1.0)
GOALS = {
    "share_of_ceiling": ("at least", 0.8), "times_without": ("at least", 3.0), "two_at_once_loss": ("at most", 0.1),
    "swapped_loss": ("at least", 0.3), "style_change": ("at least", -0.05), "concept_change": ("at least", -0.05),
    "subject_preferred": ("at least", 0.9), "monotone": ("at least", 1.0),
}  # fmt: skip
Steering = Sequence[tuple[ControlAdapter, Tensor, float]]
"""Adapters, each with condition pictures uint8 [n, 3, H, W] and a strength."""


class Bench:
    """A model, its held-out pictures and their conditions; makes the same prompts and seeds under any steering."""

    def __init__(self, base: Base, pictures: Pictures, *, steps: int, guidance: float, batch: int) -> None:
        self.base, self.pictures = base, pictures
        self.steps, self.guidance, self.batch = steps, guidance, batch
        self.prompts = [row["caption"] for row in pictures.rows]
        self.made = 0

    def make(
        self,
        steering: Steering = (),
        *,
        prompts: Sequence[str] | None = None,
        steps: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return pictures uint8 [n, 3, H, W] of all prompts, each with its own seed; `size`: height and width in px."""
        height, width = size or (None, None)
        asked, steps = list(self.prompts if prompts is None else prompts), steps or self.steps
        found = []
        for i in range(0, len(asked), self.batch):
            rows = slice(i, i + self.batch)
            uses = [self.use(adapter, pictures[rows], strength) for adapter, pictures, strength in steering]
            with controlled(self.base.transformer, *uses, steps=steps, memory=Memory()):
                images = self.base.pipeline(
                    asked[rows], seeds=range(len(asked))[rows], num_inference_steps=steps, guidance_scale=self.guidance,
                    output_type="pt", height=height, width=width,
                ).images  # fmt: skip
            found.append((images.float().cpu().clamp(0, 1) * 255).round().byte())
            self.made += len(images)
        return torch.cat(found)

    def use(self, adapter: ControlAdapter, pictures: Tensor, strength: float) -> Use:
        """Return an adapter in use with condition pictures."""
        latents = self.base.pictures(pictures)
        if adapter.control.name != "unic-adapter":
            return Use(adapter, latents, strength=strength)
        told = self.base.texts([getattr(adapter, "instruction", "")], 12)
        return Use(
            adapter,
            Instructed(latents, told["encoder_hidden_states"], told.get("pooled_projections")),
            strength=strength,
        )

    def ceiling(self) -> Tensor:
        """Return the real pictures through the codec."""
        return to_bytes(self.base.decoded(self.base.pictures(self.pictures.pixels)))


def alone(
    bench: Bench, kind: str, adapter: ControlAdapter, plain: Tensor, real: Tensor, court: Court
) -> dict[str, Any]:
    """Return the figures of one spatial condition by itself."""
    conditions = made_of(bench.pictures.pixels, kind)
    other = conditions.roll(1, 0)
    steered = bench.make([(adapter, conditions, 1.0)])
    sweep = {
        strength: score(kind, bench.make([(adapter, conditions, strength)]), conditions)
        for strength in STRENGTHS[:-1]
    }
    sweep[1.0] = score(kind, steered, conditions)
    row: dict[str, Any] = {
        "without": score(kind, plain, conditions),
        "shuffled": score(kind, bench.make([(adapter, other, 1.0)]), conditions),
        "adapter": sweep[1.0],
        "ceiling": score(kind, real, conditions),
        "strengths": sweep,
        "monotone": float(rising(list(sweep.values()))),
    }
    row["share_of_ceiling"] = row["adapter"] / row["ceiling"]
    row["times_without"] = row["adapter"] / max(row["without"], 1e-9)
    # Things in the middle of a white picture fit each other by chance; this is what the adapter adds, of what there is to add.
    row["gap_closed"] = (row["adapter"] - row["without"]) / max(row["ceiling"] - row["without"], 1e-9)
    rows = bench.pictures.rows
    before, after = court.accuracy(plain, rows), court.accuracy(steered, rows)
    row |= {"judge_without": before, "judge": after}
    row |= {f"{name}_change": after[f"{name}_top1"] - before[f"{name}_top1"] for name in ("style", "concept")}
    return row | {"other_runs": elsewhere(bench, kind, adapter, conditions), "pictures": steered}


def elsewhere(
    bench: Bench, kind: str, adapter: ControlAdapter, conditions: Tensor
) -> dict[str, dict[str, float]]:
    """Return the score, and that without control, with schedulers, counts of steps and an aspect that training did not use."""
    pipeline, found = bench.base.pipeline, {}
    own = pipeline.scheduler
    for name, steps in (("dpm++2m", bench.steps), ("heun", bench.steps), ("euler", max(4, bench.steps // 2))):
        pipeline.scheduler = scheduler_for(name, copy.deepcopy(own))
        try:
            found[f"{name}, {steps} steps"] = {
                "without": score(kind, bench.make(steps=steps), conditions),
                "adapter": score(kind, bench.make([(adapter, conditions, 1.0)], steps=steps), conditions),
            }
        finally:
            pipeline.scheduler = own
    rest = bench.pictures.pixels.shape[2] // 4  # white above and below
    tall = torch.nn.functional.pad(bench.pictures.pixels, (0, 0, rest, rest), value=255)
    height, width = tall.shape[2:]
    conditions = made_of(tall, kind)
    found[f"{width}x{height} px"] = {
        "without": score(kind, bench.make(size=(height, width)), conditions),
        "adapter": score(kind, bench.make([(adapter, conditions, 1.0)], size=(height, width)), conditions),
    }
    return found


def together(
    bench: Bench, adapters: dict[str, ControlAdapter], single: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the figures of both spatial conditions at once, right way round and with their adapters swapped."""
    kinds = [kind for kind in SCORES if kind in adapters]
    given = {kind: made_of(bench.pictures.pixels, kind) for kind in kinds}
    both = bench.make([(adapters[kind], given[kind], 1.0) for kind in kinds])
    swapped = bench.make(
        [(adapters[kind], given[other], 1.0) for kind, other in zip(kinds, kinds[::-1], strict=True)]
    )
    found: dict[str, Any] = {}
    for kind in kinds:
        right, wrong = (score(kind, one, given[kind]) for one in (both, swapped))
        found[kind] = {
            "both": right, "swapped": wrong,
            "two_at_once_loss": 1 - right / single[kind]["adapter"], "swapped_loss": 1 - wrong / right,
        }  # fmt: skip
    return found


def subject(bench: Bench, adapter: ControlAdapter, court: Court) -> dict[str, Any]:
    """Return how often the judge takes what was made for the given thing and not for another of the same style.

    The prompts name the style alone.
    """
    rows, pixels = bench.pictures.rows, bench.pictures.pixels
    order = sorted(range(len(rows)), key=lambda i: rows[i]["style"])
    other = torch.empty(len(rows), dtype=torch.long)
    for i, place in enumerate(
        order
    ):  # the next of the same style; the last of a style takes the one before it
        after = order[(i + 1) % len(order)]
        other[place] = after if rows[after]["style"] == rows[place]["style"] else order[i - 1]
    prompts = [STYLES[row["style"]][0] for row in rows]
    given = made_of(pixels, "subject")
    steered = bench.make([(adapter, given, 1.0)], prompts=prompts)
    plain = bench.make(prompts=prompts)
    shuffled = bench.make([(adapter, given[other], 1.0)], prompts=prompts)
    found = {name: preferred(court, made, pixels, pixels[other]) for name, made in
             (("subject_preferred", steered), ("without", plain), ("shuffled", shuffled))}  # fmt: skip
    named = {
        name: court.accuracy(made, rows) for name, made in (("judge", steered), ("judge_without", plain))
    }
    return found | named | {"pictures": steered}


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every goal beside what was reached."""
    found = []
    for part, rows in figures.items():
        for kind, row in rows.items() if part != "subject" else [("subject", rows)]:
            for name, (way, goal) in GOALS.items():
                if name in row:
                    met = row[name] >= goal if way == "at least" else row[name] <= goal
                    found.append(
                        {
                            "what": f"{kind}: {name}",
                            "reached": row[name],
                            "goal": f"{way} {goal:g}",
                            "met": met,
                        }
                    )
    return found


def table(figures: dict[str, Any]) -> str:
    """Return the figures as Markdown, for the README."""
    lines = [
        "| condition | no control | another's condition | adapter | real pictures | share of ceiling | both at once | swapped |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = {"edges": "edges, F1 within 2 px", "masks": "masks, IoU"}
    for kind, row in figures.get("alone", {}).items():
        pair = figures.get("together", {}).get(kind, {})
        cells = [row[name] for name in ("without", "shuffled", "adapter", "ceiling")]
        cells += [row["share_of_ceiling"], pair.get("both"), pair.get("swapped")]
        lines.append(
            "| " + " | ".join([names[kind], *("" if one is None else f"{one:.3f}" for one in cells)]) + " |"
        )
    if "subject" in figures:
        row = figures["subject"]
        cells = [f"{row[name]:.3f}" for name in ("without", "shuffled", "subject_preferred")]
        lines.append("| " + " | ".join(["subject, judge's preference", *cells, "1", "", "", ""]) + " |")
    sweeps = [(kind, row["strengths"]) for kind, row in figures.get("alone", {}).items()]
    if sweeps:
        lines += [
            "",
            "| strength | " + " | ".join(f"{one:g}" for one in STRENGTHS) + " |",
            "| --- " * (len(STRENGTHS) + 1) + "|",
        ]
        lines += [
            f"| {kind} | " + " | ".join(f"{one:.3f}" for one in sweep.values()) + " |"
            for kind, sweep in sweeps
        ]
    return "\n".join(lines)


def examine(
    bench: Bench, adapters: dict[str, ControlAdapter], court: Court
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return every figure, and the pictures made under each adapter."""
    figures: dict[str, Any] = {}
    spatial = [kind for kind in SCORES if kind in adapters]
    if spatial:
        plain, real = bench.make(), bench.ceiling()
        figures["alone"] = {kind: alone(bench, kind, adapters[kind], plain, real, court) for kind in spatial}
    if len(spatial) > 1:
        figures["together"] = together(bench, adapters, figures["alone"])
    if "subject" in adapters:
        figures["subject"] = subject(bench, adapters["subject"], court)
    shown = {kind: row.pop("pictures") for kind, row in figures.get("alone", {}).items()}
    if "subject" in figures:
        shown["subject"] = figures["subject"].pop("pictures")
    return figures, shown


def adapter_of(kind: str, file: Path, base: Base) -> ControlAdapter:
    """Return the adapter of a file. Raises: Refused for a file that was trained for another condition, or that cannot be used."""
    about = json.loads(read(file).metadata.get("about") or "{}")
    if about.get("condition", kind) != kind:
        raise Refused(f"{file.name} was trained for {about['condition']}, and it is given as --{kind}")
    adapter: Any = load(file, base.transformer).eval()
    adapter.instruction = about.get("recipe", {}).get("condition", {}).get("instruction", "")
    return adapter


def main() -> int:
    """Read the command line, measure, print tables and goals, and write control.json with a sheet for each adapter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for kind in (*SCORES, "subject"):
        parser.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"adapter for {kind}")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/emoji64")
    parser.add_argument("--judge", type=Path, default=ROOT / "benchmarks" / "judge")
    parser.add_argument("--count", type=int, default=68, help="held-out pictures")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=17)
    parser.add_argument("--name", default="control", help="stem of the results file")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    files = {kind: getattr(given, kind) for kind in (*SCORES, "subject") if getattr(given, kind) is not None}
    if not files:
        parser.error("give at least one of --edges, --masks, --subject")
    base = load_base(given.model)
    adapters = {kind: adapter_of(kind, file, base) for kind, file in files.items()}
    court = load_judge(given.judge)
    pictures = load_pictures(given.data)
    kept = [
        row["split"] == "val_pair" and row["style"] in court.styles and row["concept"] in court.concepts
        for row in pictures.rows
    ]
    held = pictures.only(kept)
    held = held.only([i < given.count for i in range(len(held))])
    bench = Bench(base, held, steps=given.steps, guidance=given.guidance, batch=given.batch)
    with torch.no_grad():
        figures, shown = examine(bench, adapters, court)
    reached = goals(figures)
    print(table(figures), *(f"{'met   ' if one['met'] else 'MISSED'} {one['what']}: {one['reached']:.3f} ({one['goal']})"
                            for one in reached), sep="\n")  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    for kind, made in shown.items():
        sheet(made, held.rows).save(given.out / f"{given.name}-{kind}.png")
    asked = {name: getattr(given, name) for name in ("model", "count", "steps", "guidance")}
    about = {
        kind: {"control": one.control.to_dict(), "file": files[kind].name} for kind, one in adapters.items()
    }
    write_json(given.out / f"{given.name}.json",
               record() | {"asked": asked, "adapters": about, "judge": court.digest, "goals": reached} | figures)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
