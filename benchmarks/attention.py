"""Training through attention in bfloat16 on a processor, fused or written out: `python -m benchmarks.attention`.

As many tokens in every row, cut into sequences of so many keys: frames of a clip, windows, or whole pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, interleaved, record, write_json
from dit.attention import attend
from training.attention import quick_backward

KEYS = (16, 64, 256, 1024, 4096)
TOKENS, HEADS, SIZE = 4096, 2, 64


def main() -> None:
    """Read the command line, time both in turns, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "attention.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [timed(keys, masked, given.rounds) for keys in KEYS for masked in (False, True)]
    setting = {"tokens": TOKENS, "heads": HEADS, "head_size": SIZE, "dtype": "bfloat16", "threads": 1}
    write_json(given.out, record() | {"settings": setting, "rows": rows})
    for row in rows:
        print(row)


def timed(keys: int, masked: bool, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of both ways, and how many times as fast the second is."""
    parts = torch.randn(3, TOKENS // keys, keys, HEADS, SIZE).bfloat16()
    mask = torch.rand(TOKENS // keys, 1, 1, keys) < 0.8 if masked else None
    found = interleaved(
        {"fused": _step(parts, mask, torch.float32), "written out": _step(parts, mask, torch.bfloat16)},
        rounds=rounds,
    )
    return {
        "keys": keys,
        "masked": masked,
        "milliseconds": {name: round(1000 * one["median"], 2) for name, one in found.items()},
        "times_as_fast": round(found["written out"]["ratio"], 2),
    }


def _step(parts: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Callable[[], None]:
    def step() -> None:
        q, k, v = (one.detach().requires_grad_() for one in parts)
        with quick_backward(torch.device("cpu"), dtype):  # nothing where training is said to be in float32
            attend(q, k, v, mask).float().square().sum().backward()

    return step


if __name__ == "__main__":
    main()
