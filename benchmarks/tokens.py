"""Time per token of the mixers from 1k to 16k tokens: `python -m benchmarks.tokens [--width 384] [--sides 32 64 96 128]`.

Each mixer runs by itself on a square grid, one picture, on one thread, and is charged the time of the process and not that of the
clock, so a busy machine blurs it less; rounds take turns. Linear attention is flat if no length is further than 15 % from the
median of them all; softmax grows, and the crossover is the length from which linear attention is the cheaper one.
With --device cuda the clock of the device is taken, and 64k tokens are added.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.machine import RESULTS, record, write_json
from dit.grid import Grid
from dit.mixers.full import Mixer
from dit.model import Context
from dit.spec import parse

MIXERS = {
    "softmax": "full",
    "linear": "linear:heads=2,kernel=0",
    "linear, convolution": "linear:heads=2,kernel=5",
    "gated": "gated:scan=column",
}
"""Name -> the mixer under test; softmax comes first and is what the others are set against."""

SHORT = (8, 12, 16, 20, 24)
"""Sides below the main range, where the crossover lies."""


def seconds(run: Callable[[], object], device: str) -> float:
    """Return what one call costs: time of the process, or of the device."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begun = time.process_time()
    run()
    return time.process_time() - begun


def measure(width: int, heads: int, side: int, rounds: int, device: str) -> dict[str, float]:
    """Return microseconds a token for every mixer, the best of `rounds`, at side x side tokens."""
    grid = Grid(1, side, side)
    torch.manual_seed(0)
    x = torch.randn(1, grid.tokens, width, device=device)
    context = Context(grid, torch.zeros(1, width, device=device))
    modules: dict[str, nn.Module] = {
        name: parse(Mixer, text).build(width, heads).to(device).eval() for name, text in MIXERS.items()
    }
    spent: dict[str, list[float]] = {name: [] for name in modules}
    with torch.inference_mode():
        for turn in range(rounds + 1):  # the first round is a warm-up
            for name in modules if turn % 2 else reversed(modules):
                module = modules[name]
                taken = seconds(lambda module=module: module(hidden_states=x, context=context), device)
                spent[name] += [taken] * (turn > 0)
    return {name: min(taken) / grid.tokens * 1e6 for name, taken in spent.items()}


def crossover(rows: dict[int, dict[str, float]], name: str) -> int | None:
    """Return the smallest length from which on a mixer is cheaper than softmax, None where it never is."""
    found = None
    for tokens in sorted(rows, reverse=True):
        if rows[tokens][name] >= rows[tokens]["softmax"]:
            break
        found = tokens
    return found


def flatness(values: list[float]) -> float:
    """Return how far the furthest value is from the median, as a fraction of it."""
    middle = statistics.median(values)
    return max(abs(value - middle) for value in values) / middle


def summary(rows: dict[int, dict[str, float]], least: int) -> dict[str, Any]:
    """Return flatness from `least` tokens on and crossover of every mixer, and what softmax costs against it at the most tokens."""
    long = [tokens for tokens in rows if tokens >= least]
    return {
        name: {
            "furthest_from_median": flatness([rows[tokens][name] for tokens in long]),
            "cheaper_than_softmax_from_tokens": crossover(rows, name) if name != "softmax" else None,
            "softmax_times_at_most_tokens": rows[max(rows)]["softmax"] / rows[max(rows)][name],
        }
        for name in MIXERS
    }


def main() -> None:
    """Measure, print, and write benchmarks/results/tokens.json (tokens-cuda.json on a GPU)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6, help="of softmax and gated attention")
    parser.add_argument("--sides", type=int, nargs="+", help="sides of the square grids of the main range")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    sides = given.sides or ([32, 48, 64, 96, 128] + [256] * (given.device == "cuda"))
    rows: dict[int, dict[str, float]] = {}
    for side in sorted({*SHORT, *sides}):
        rows[side**2] = measure(given.width, given.heads, side, given.rounds, given.device)
        print(side**2, json.dumps({name: round(cost, 2) for name, cost in rows[side**2].items()}), flush=True)
    found = {
        "width": given.width, "heads": given.heads, "rounds": given.rounds, "mixers": MIXERS,
        "microseconds_per_token": {str(tokens): row for tokens, row in rows.items()},
        "summary": summary(rows, min(sides) ** 2),
    }  # fmt: skip
    name = "tokens.json" if given.device == "cpu" else "tokens-cuda.json"
    write_json(RESULTS / name, record(given.device) | found)
    print(json.dumps(found["summary"], indent=1))


if __name__ == "__main__":
    main()
