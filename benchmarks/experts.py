"""What experts save of a perceptron's time: `python -m benchmarks.experts [--rounds N]`, a few minutes.

Process time of one thread, dense against 1S12E2A (1.5 parts of 4), forward, without gradients, at 1k and 4k tokens and several
widths; `realised` is the share of the saved multiply-accumulates that became saved time. On a GPU (`--device cuda`) it is
the time between two synchronisations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import nn

from benchmarks.machine import RESULTS, record, write_json
from dit.experts.dense import Dense
from dit.experts.mixture import Mixture
from dit.ledger import activated_of, macs_of, parameters_of

WIDTHS = (256, 384, 768, 1152)
TOKENS = (1024, 4096)


def layers(width: int, settings: Mixture, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """Return the dense perceptron of a width and the mixture of as many hidden channels, its router with opinions."""
    torch.manual_seed(0)
    dense, mixture = Dense().build(width, 4 * width), settings.build(width, 4 * width)
    nn.init.normal_(mixture.get_submodule("gate").weight, std=0.05)
    return {name: one.to(device, dtype).eval() for name, one in (("dense", dense), ("mixture", mixture))}


def seconds(layer: nn.Module, x: torch.Tensor, repeats: int) -> float:
    """Return the time of one call."""
    clock = time.perf_counter if x.is_cuda else time.process_time
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    start = clock()
    for _ in range(repeats):
        layer(x)
    synchronize()
    return (clock() - start) / repeats


@torch.no_grad()
def measure(width: int, tokens: int, given: argparse.Namespace) -> dict[str, Any]:
    """Time both layers in turns and return medians, their ratio and what the books say."""
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    pair = layers(width, Mixture(active=given.active), dtype, given.device)
    x = torch.randn(1, tokens, width, device=given.device, dtype=dtype)
    repeats = max(1, int(given.work / (8 * width * width * tokens)))
    times: dict[str, list[float]] = {name: [] for name in pair}
    for turn in range(given.rounds + 1):
        for name in list(pair)[:: 1 if turn % 2 else -1]:
            taken = seconds(pair[name], x, repeats)
            if turn:  # the first round warms up
                times[name].append(taken)
    ratio = statistics.median(b / a for a, b in zip(times["dense"], times["mixture"], strict=True))
    macs = {name: macs_of(one, tokens) for name, one in pair.items()}
    share = macs["mixture"] / macs["dense"]
    return {
        "width": width, "tokens": tokens, "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {name: round(1000 * statistics.median(taken), 4) for name, taken in times.items()},
        "time_ratio": round(ratio, 4), "macs_ratio": round(share, 4), "realised": round((1 - ratio) / (1 - share), 4),
        "parameters": {name: parameters_of(one) for name, one in pair.items()},
        "activated": activated_of(pair["mixture"]),
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write benchmarks/results/experts.json (experts-cuda.json on a GPU)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=float, default=2e10, help="multiply-accumulates timed in a row")
    parser.add_argument("--active", type=int, default=2, help="routed experts a token uses")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for width in given.widths:
        for tokens in TOKENS:
            rows.append(measure(width, tokens, given))
            print(json.dumps(rows[-1]), flush=True)
    name = "experts.json" if given.device == "cpu" else "experts-cuda.json"
    write_json(
        RESULTS / name, record(given.device) | {"experts": str(Mixture(active=given.active)), "rows": rows}
    )


if __name__ == "__main__":
    main()
