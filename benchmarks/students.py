"""What small trained networks are worth beside the plain one: `python -m benchmarks.students lit=FOLDER [--plain emoji]`.

Every folder is a shipped pipeline (`training.ship`). Each sits the exam of `benchmarks.quality` with the same prompts and seeds as
the plain network, in one process; what a picture costs is processor time of one thread, in turns, and the multiply-accumulates of
the network. Rows are put into benchmarks/results/students.json by name, so that networks can be judged one after the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.exam import Exam, set_exam
from benchmarks.machine import RESULTS, ROOT, record, write_json
from benchmarks.quality import asked_of, load_pipeline, maker
from dit.ledger import activated_of, extra_flops, parameters_of
from training.judge import Court, load_judge

FIGURES = ("concept_top5", "concept_top1", "style_top1")
DOWN = 0.9
"""A tenth below the plain network counts as reached."""


def answers_of(
    pipeline: Any, known: dict[str, Any], court: Court, exam: Exam, given: argparse.Namespace
) -> dict[str, Any]:
    """Return what the judge finds in a network's pictures of the held-out and the learnt pairs, and its size."""
    make = maker(
        pipeline, steps=known.get("steps"), guidance=known.get("guidance"), batch=given.batch, reports=[]
    )
    held = exam.held_out.rows * given.seeds
    seeds = [seed for seed in range(given.seeds) for _ in exam.held_out.rows]
    made = make([row["caption"] for row in held], seeds)
    learnt = make([row["caption"] for row in exam.learnt.rows], [0] * len(exam.learnt))
    return {
        "held_out": court.accuracy(made, held),
        "learnt": court.accuracy(learnt, exam.learnt.rows),
        "parameters": parameters_of(pipeline.transformer),
        "activated": activated_of(pipeline.transformer),
        "digest": known["digest"],
    }


def beside(ours: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Return a network's figures as shares of the plain one's, over all pairs of both kinds, and whether a tenth is kept."""

    def right(row: dict[str, Any], figure: str) -> float:
        parts = [row["held_out"], row["learnt"]]
        return float(
            sum(one[figure] * one["pictures"] for one in parts) / sum(one["pictures"] for one in parts)
        )

    shares = {figure: right(ours, figure) / max(right(plain, figure), 1e-9) for figure in FIGURES}
    return {
        "figures": {figure: right(ours, figure) for figure in FIGURES},
        "plain_figures": {figure: right(plain, figure) for figure in FIGURES},
        "share_of_plain": shares,
        "within_a_tenth": min(shares[FIGURES[0]], shares[FIGURES[2]]) >= DOWN,
    }


def picture(pipeline: Any, seed: int, steps: int, guidance: float) -> None:
    """Make the picture that costs are taken from."""
    settings = {"num_inference_steps": steps, "guidance_scale": guidance}
    pipeline(["dog, cartoon"], seeds=[seed], output_type="pt", **settings)


def seconds(pipelines: dict[str, Any], steps: int, guidance: float, rounds: int) -> dict[str, float]:
    """Return the processor time of one picture for each network, in turns, medians."""
    taken: dict[str, list[float]] = {name: [] for name in pipelines}
    for turn in range(rounds + 1):
        for name in list(pipelines)[:: 1 if turn % 2 else -1]:
            began = time.process_time()
            picture(pipelines[name], turn, steps, guidance)
            if turn:  # the first is a warm-up
                taken[name].append(time.process_time() - began)
    return {name: statistics.median(one) for name, one in taken.items()}


def macs(pipeline: Any, steps: int, guidance: float) -> int:
    """Return the multiply-accumulates of a network for one picture, guidance included; text encoder and codec left out."""
    counter = FlopCounterMode(display=False, custom_mapping=extra_flops())
    with counter:
        picture(pipeline, 0, steps, guidance)
    return sum(counter.get_flop_counts()[type(pipeline.transformer).__name__].values()) // 2


def main() -> None:
    """Read the command line, judge, and write students.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("students", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument(
        "--plain", default="emoji", help="the network to compare with: a shipped name or a folder"
    )
    parser.add_argument("--recipe", type=Path, default=ROOT / "training" / "recipes" / "emoji.toml")
    parser.add_argument("--judge", type=Path, default=ROOT / "benchmarks" / "judge")
    parser.add_argument("--data", type=Path, help="folder of the pictures, instead of the recipe's")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each held-out pair")
    parser.add_argument("--learnt", type=int, default=68, help="learnt pairs beside the held-out ones")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="pictures timed of each network")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    named = dict(one.partition("=")[::2] for one in given.students)
    if not all(named.values()) or "plain" in named:
        parser.error(f"students are NAME=FOLDER, none of them called plain, got {' '.join(given.students)}")
    torch.set_num_threads(1)
    loaded = {name: load_pipeline(folder, None) for name, folder in ({"plain": given.plain} | named).items()}
    pictures, styles = asked_of(dict(loaded["plain"][1]), given.recipe, given.data)
    exam, court = set_exam(pictures, styles, learnt=given.learnt), load_judge(given.judge)
    settings = {name: loaded["plain"][1].get(name) for name in ("steps", "guidance")}
    found = {}
    for name, (pipeline, known) in loaded.items():
        found[name] = answers_of(pipeline, known | settings, court, exam, given)
        print(name, json.dumps(found[name]), flush=True)
    pipelines = {name: pipeline for name, (pipeline, _) in loaded.items()}
    run = (settings["steps"] or 28, settings["guidance"] or 3.0)
    taken = seconds(pipelines, *run, given.rounds)
    work = {name: macs(pipeline, *run) for name, pipeline in pipelines.items()}
    file = given.out / "students.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else {}
    for name in named:
        rows[name] = {
            "plain": Path(loaded["plain"][1]["model"]).name,  # of a folder its name, not where it lies
            **record(),
            **settings,
            "seeds": given.seeds,
            "judge": court.digest,
            **found[name],
            **beside(found[name], found["plain"]),
            "plain_parameters": found["plain"]["parameters"],
            "macs_a_picture": work[name],
            "plain_macs_a_picture": work["plain"],
            "seconds_a_picture": taken[name],
            "plain_seconds_a_picture": taken["plain"],
            "times_as_fast": taken["plain"] / taken[name],
        }
        print(
            name,
            json.dumps(
                {key: rows[name][key] for key in ("share_of_plain", "within_a_tenth", "times_as_fast")}
            ),
        )
    write_json(file, {"rows": rows})


if __name__ == "__main__":
    main()
