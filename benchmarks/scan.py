"""How the time of LinGen's mixer grows with the length of a clip, and what each part costs: `python -m benchmarks.scan`.

Softmax attention stands beside it. Times are process CPU time on one thread (on a GPU: the clock, synchronised), the median over
rounds that go through all lengths in turns, of `--blocks` blocks one after the other, four being a whole cycle of scans. A slope
is that of the straight line through log time over log tokens: 1 is linear, 2 quadratic. Grids are 16 x 16 tokens by as many
frames as it takes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.machine import RESULTS, record, write_json
from dit.grid import Grid
from dit.ledger import macs_of
from dit.mixers.full import Full, Mixer
from dit.mixers.lingen import LinGen
from dit.model import Context

SIDE = 16
LIMIT = 1.1  # the slope to stay under

ABLATIONS: dict[str, LinGen] = {
    "default": LinGen(),
    "without windows": LinGen(windows=False),
    "without the scan": LinGen(mamba=False),
    "without rotary major scan": LinGen(scan="rows"),
    "zigzag scan": LinGen(scan="zigzag"),
    "without review tokens": LinGen(review=0),
    "one direction": LinGen(both_ends=False),
    "one set of weights": LinGen(shared=True),
}


class Blocks:
    """The mixers of some blocks in a row."""

    def __init__(self, mixer: Mixer, count: int, given: argparse.Namespace) -> None:
        self.device = torch.device(given.device)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.now: Callable[[], float] = time.process_time if self.device.type == "cpu" else self._settled
        torch.manual_seed(0)
        self.modules: list[Any] = [
            mixer.at(i).build(given.width, given.heads).to(self.device, self.dtype).eval()
            for i in range(count)
        ]
        self.width = given.width

    def seconds(self, tokens: int) -> float:
        """Return the time of one block at a clip of so many tokens."""
        grid = grid_of(tokens)
        x = torch.randn(1, tokens, self.width, device=self.device, dtype=self.dtype)
        context = Context(grid, x[:, 0])
        start = self.now()
        for module in self.modules:
            x = module(hidden_states=x, context=context)
        return (self.now() - start) / len(self.modules)

    def macs(self, tokens: int) -> float:
        """Return the multiply-accumulates of one block."""
        grid = grid_of(tokens)
        return sum(macs_of(module, tokens, 0, grid) for module in self.modules) / len(self.modules)

    def _settled(self) -> float:
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def grid_of(tokens: int) -> Grid:
    return Grid(tokens // SIDE**2, SIDE, SIDE)


def slope(times: Mapping[int, float]) -> float | None:
    """Return the slope of log time over log tokens by least squares, None for fewer than two lengths."""
    if len(times) < 2:
        return None
    line = [(math.log(tokens), math.log(taken)) for tokens, taken in times.items()]
    mean = [statistics.fmean(part) for part in zip(*line, strict=True)]
    over = sum((x - mean[0]) * (y - mean[1]) for x, y in line)
    return over / sum((x - mean[0]) ** 2 for x, _ in line)


def growth(blocks: Blocks, lengths: list[int], rounds: int) -> dict[str, Any]:
    """Time every length in turns, and fit."""
    blocks.seconds(lengths[0])  # to warm up
    taken: dict[int, list[float]] = {tokens: [] for tokens in lengths}
    for turn in range(rounds):
        for tokens in lengths if turn % 2 == 0 else lengths[::-1]:
            taken[tokens].append(blocks.seconds(tokens))
            print(f"  {tokens} tokens: {taken[tokens][-1]:.3f} s a block", flush=True)
    times = {tokens: statistics.median(found) for tokens, found in taken.items()}
    return {
        "seconds": times,
        "slope": slope(times),
        "slope_of_operations": slope({tokens: blocks.macs(tokens) for tokens in lengths}),
    }


def ablations(given: argparse.Namespace) -> dict[str, Any]:
    """Time LinGen without each of its parts, as a ratio to the whole in the same round."""
    all_blocks = {name: Blocks(mixer, given.blocks, given) for name, mixer in ABLATIONS.items()}
    taken: dict[str, list[float]] = {name: [] for name in ABLATIONS}
    for turn in range(given.rounds + 1):
        for name in list(taken)[:: 1 if turn % 2 else -1]:
            found = all_blocks[name].seconds(given.ablation_tokens)
            if turn:  # the first is to warm up
                taken[name].append(found)
    whole = all_blocks["default"].macs(given.ablation_tokens)
    return {
        name: {
            "seconds": statistics.median(found),
            "time": statistics.median(a / b for a, b in zip(found, taken["default"], strict=True)),
            "operations": all_blocks[name].macs(given.ablation_tokens) / whole,
        }
        for name, found in taken.items()
    }


def crossover(ours: Mapping[int, float], softmax: Mapping[int, float]) -> int | None:
    """Return the first length from which LinGen's mixer takes less time at all lengths that both were timed at."""
    faster = None
    for tokens in sorted(set(ours) & set(softmax), reverse=True):
        if ours[tokens] >= softmax[tokens]:
            break
        faster = tokens
    return faster


def main() -> None:
    """Measure, print, and write benchmarks/results/scan.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--least", type=int, default=4096, help="tokens of the shortest clip")
    parser.add_argument("--most", type=int, default=65536, help="tokens of the longest clip")
    parser.add_argument("--softmax-most", type=int, default=32768, help="longest clip for softmax attention")
    parser.add_argument("--ablation-tokens", type=int, default=16384)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if not SIDE**2 <= given.least < given.most or given.rounds < 1 or given.blocks < 1:
        parser.error(
            f"lengths go from --least (at least {SIDE**2}) up to --most; rounds and blocks are at least 1"
        )
    torch.set_num_threads(1)
    doublings = int(math.log2(given.most / given.least))
    lengths = [grid_of(given.least).tokens * 2**i for i in range(doublings + 1)]
    short = [tokens for tokens in lengths if tokens <= given.softmax_most]
    found: dict[str, Any] = {}
    with torch.no_grad():
        print("lingen", flush=True)
        found["lingen"] = growth(Blocks(LinGen(), given.blocks, given), lengths, given.rounds)
        if short:
            print("softmax", flush=True)
            found["softmax"] = growth(
                Blocks(Full(), 1, given), short, 1 if given.device == "cpu" else given.rounds
            )
            found["crossover"] = crossover(found["lingen"]["seconds"], found["softmax"]["seconds"])
        found["ablations"] = ablations(given)
    found["reached"] = found["lingen"]["slope"] <= LIMIT
    for name in ("lingen", "softmax"):
        print(name, {k: v for k, v in found.get(name, {}).items() if k != "seconds"})
    print(
        f"reached a slope of at most {LIMIT}: {found['reached']}; faster than softmax from {found.get('crossover')} tokens on"
    )
    for name, row in found["ablations"].items():
        print(f"  {name}: {row['time']:.3f} of the time, {row['operations']:.3f} of the operations")
    name = "scan.json" if given.device == "cpu" else f"scan-{given.device.replace(':', '-')}.json"
    write_json(RESULTS / name, record(given.device) | vars(given) | {"limit": LIMIT} | found)


if __name__ == "__main__":
    main()
