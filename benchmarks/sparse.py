"""How long sparse attention takes against dense attention, tile for tile: `python -m benchmarks.sparse`.

The time at density rho beside rho times the dense time (`cost`: 1 is perfect), over random tiles and over tiles chosen by
AdaSpa for inputs whose weight is gathered in places; and what one search for the tiles costs.
"""

from __future__ import annotations

import argparse
import functools
import json
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from acceleration import AdaSpa
from acceleration._sparse import block_mass, sparse_attention, tiles
from benchmarks.machine import RESULTS, interleaved, record, write_json

LIMIT = 1.25  # the figure to reach on a CPU from 8k tokens


def inputs(
    tokens: int, heads: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return q, k, v [1, K, N, D] in which neighbours share a theme, as neighbours in a clip do."""
    draw = torch.Generator().manual_seed(0)
    themes = torch.randn(1, heads, 12, size, generator=draw).repeat_interleave(-(-tokens // 12), 2)[
        :, :, :tokens
    ]
    q, k = (themes * 0.8 + torch.randn(1, heads, tokens, size, generator=draw) for _ in range(2))
    v = torch.randn(1, heads, tokens, size, generator=draw)
    return tuple(x.to(device, dtype) for x in (q, k, v))


def masks(q: Tensor, k: Tensor, density: float, rows: int, block: int) -> dict[str, Tensor]:
    """Return kept tiles of one density: anywhere, and where the weight is."""
    P, Q = tiles(q.shape[2], rows), tiles(k.shape[2], block)
    count = max(1, round(density * Q))
    places = torch.rand(1, q.shape[1], P, Q, generator=torch.Generator().manual_seed(1)).topk(count).indices
    random = torch.zeros(1, q.shape[1], P, Q, dtype=torch.bool).scatter_(-1, places, True).to(q.device)
    none = [torch.zeros(n, dtype=torch.bool, device=q.device) for n in (P, Q)]
    method = AdaSpa(density=density, rows=rows, block=block, guard=0.0)
    return {"random": random, "adaspa": method.chosen(block_mass(q, k, rows, block)[0], *none).kept}


def measure(given: argparse.Namespace, tokens: int, size: int, rows: int) -> dict[str, Any]:
    """Time dense and sparse attention of one shape in turns."""
    device = torch.device(given.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, k, v = inputs(tokens, given.heads, size, device, dtype)

    def done(compute: Any) -> Any:
        def run() -> None:
            compute()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    runs = {"dense": done(lambda: F.scaled_dot_product_attention(q, k, v))}
    densities: dict[str, float] = {}
    for density in given.density:
        for name, kept in masks(q, k, density, rows, given.block).items():
            key = f"{name} {density:g}"
            densities[key] = float(kept.float().mean())
            runs[key] = done(functools.partial(sparse_attention, q, k, v, kept, rows, given.block))
    if given.search:
        runs["search"] = done(lambda: block_mass(q, k, rows, given.block))
    times = interleaved(runs, rounds=given.rounds)
    cost = {key: 1 / times[key]["ratio"] / part for key, part in densities.items()}
    return {
        "tokens": tokens, "head_size": size, "heads": given.heads, "rows": rows, "block": given.block,
        "dtype": str(dtype).removeprefix("torch."), "density": densities, "cost": cost,
        "reached": all(one <= LIMIT for one in cost.values()) if tokens >= 8192 else None,
        "search_of_dense": 1 / times["search"]["ratio"] if given.search else None, "seconds": times,
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write benchmarks/results/sparse.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="head sizes")
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 256], help="queries of a tile")
    parser.add_argument("--block", type=int, default=64, help="keys of a tile")
    parser.add_argument("--density", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--search", action="store_true", help="time the search for the tiles too")
    given = parser.parse_args()
    cases = []
    with torch.no_grad():
        for tokens in given.tokens:
            for size in given.sizes:
                for rows in given.rows:
                    cases.append(measure(given, tokens, size, rows))
                    shown = {
                        k: v
                        for k, v in cases[-1].items()
                        if k in ("tokens", "head_size", "rows", "cost", "reached", "search_of_dense")
                    }
                    print(json.dumps(shown), flush=True)
    file = RESULTS / (
        "sparse.json" if given.device == "cpu" else f"sparse-{given.device.replace(':', '-')}.json"
    )
    write_json(file, record(given.device) | {"limit": LIMIT, "rounds": given.rounds, "cases": cases})


if __name__ == "__main__":
    main()
