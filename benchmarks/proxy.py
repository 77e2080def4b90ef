"""What proxies and windows cost against full attention: `python -m benchmarks.proxy`.

For each grid and window: the share of full attention's operations by the paper's formula and by a counter, the share of its
time, both of the attention calls alone and of the whole mixer with its projections (and norms, copies and sums, which no
counter sees). Times are process CPU time on one thread (on a GPU: the clock, synchronised), taken in turns with full attention
in the same process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import RESULTS, record, write_json
from dit.grid import Grid
from dit.ledger import macs_of
from dit.mixers.full import Full, Mixer
from dit.mixers.proxy import Proxy
from dit.model import Context
from dit.seams import Attending, attention_seam

CASES = ((64, 8), (64, 16), (96, 8), (96, 16), (128, 8), (128, 16))
"""Tokens along a side, and along a side of a window; 64 with 8 and 128 with 16 are the paper's at 1024 and 2048 px."""
LIMIT = 1.2  # the figure to reach: time share by operation share, from 4096 tokens on


class Stopwatch:
    """Runs a mixer and says how long it took, and how much of that its attention calls took, in seconds."""

    def __init__(self, mixer: Mixer, given: argparse.Namespace, grid: Grid) -> None:
        self.device = torch.device(given.device)
        self.now: Callable[[], float] = time.process_time if self.device.type == "cpu" else self._settled
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        torch.manual_seed(0)
        self.module = mixer.build(given.width, given.heads).to(self.device, dtype).eval()
        self.x = torch.randn(1, grid.tokens, given.width).to(self.device, dtype)
        self.context = Context(grid, self.x[:, 0])

    def whole(self) -> float:
        start = self.now()
        self.module(hidden_states=self.x, context=self.context)
        return self.now() - start

    def attention(self) -> float:
        spent = 0.0

        def around(call: Attending) -> torch.Tensor:
            nonlocal spent
            start = self.now()
            out = call.exact()
            spent += self.now() - start
            return out

        with attention_seam(self.module, around):
            self.module(hidden_states=self.x, context=self.context)
        return spent

    def _settled(self) -> float:
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def operations(mixer: Mixer, given: argparse.Namespace, grid: Grid) -> tuple[int, int]:
    """Count the multiply-accumulates of a mixer: of its attention calls, and of all of it."""
    with torch.device("meta"):
        module: nn.Module = mixer.build(given.width, given.heads)
        x = torch.empty(1, grid.tokens, given.width)
        with FlopCounterMode(display=False) as counter:
            module(hidden_states=x, context=Context(grid, x[:, 0]))
    counts = counter.get_flop_counts()["Global"]
    inner = sum(count for op, count in counts.items() if "bmm" in str(op) or "attention" in str(op))
    assert macs_of(module, grid.tokens, 0, grid) * 2 == counter.get_total_flops()
    return inner // 2, counter.get_total_flops() // 2


def measure(given: argparse.Namespace, side: int, window: int) -> dict[str, Any]:
    """Compare one window on one grid with full attention."""
    grid, settings = Grid(1, side, side), Proxy(height=window, width=window)
    full_ops, ops = operations(Full(), given, grid), operations(settings, given, grid)
    full, ours = Stopwatch(Full(), given, grid), Stopwatch(settings, given, grid)
    shares: dict[str, list[float]] = {"attention": [], "whole": []}
    seconds: dict[str, list[float]] = {"full": [], "proxy": []}
    for turn in range(given.rounds + 1):
        for name, found in shares.items():
            took = [getattr(one, name)() for one in ((full, ours) if turn % 2 else (ours, full))]
            both = took if turn % 2 else took[::-1]
            if turn:  # the first is to warm up
                found.append(both[1] / both[0])
                if name == "whole":
                    seconds["full"].append(both[0])
                    seconds["proxy"].append(both[1])
    formula, timed = settings.share(grid.tokens), statistics.median(shares["attention"])
    whole = ops[1] / full_ops[1]
    return {
        "tokens": grid.tokens, "window": window, "formula": formula, "counted": ops[0] / full_ops[0], "timed": timed,
        "timed_by_formula": timed / formula, "reached": timed / formula <= LIMIT,
        "mixer_operations": whole, "mixer_timed": statistics.median(shares["whole"]),
        "mixer_timed_by_operations": statistics.median(shares["whole"]) / whole,
        "mixer_reached": statistics.median(shares["whole"]) / whole <= LIMIT,
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write benchmarks/results/proxy.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    with torch.no_grad():
        for side, window in CASES:
            cases.append(measure(given, side, window))
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in cases[-1].items()}, flush=True)
    settings = {"width": given.width, "heads": given.heads, "rounds": given.rounds, "limit": LIMIT}
    name = "proxy.json" if given.device == "cpu" else f"proxy-{given.device.replace(':', '-')}.json"
    write_json(RESULTS / name, record(given.device) | settings | {"cases": cases})


if __name__ == "__main__":
    main()
