"""What an attached accelerator costs when it changes nothing: `python -m benchmarks.overhead [--preset emoji]`.

The same forwards in the same process, plain and with a neutral DeltaCache, medians of interleaved rounds; and the bare
bookkeeping in microseconds, taken on blocks that do nothing, which a busy machine blurs less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from acceleration import DeltaCache, accelerated
from benchmarks.machine import RESULTS, interleaved, record, write_json

NEUTRAL = DeltaCache(interval=1)
STEPS = 28


class Idle(nn.Module):
    """A block that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(1, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Chain(nn.Module):
    """Blocks that do nothing, one after the other."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Idle() for _ in range(depth))

    def forward(self, hidden_states: Tensor, timestep: float) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def loop(transformer: nn.Module, given: dict[str, Any], attach: bool) -> Callable[[], None]:
    """Return a run of `STEPS` forwards, with or without a neutral accelerator (attached and taken off within it)."""

    def forwards() -> None:
        for step in range(STEPS):
            transformer(**given, timestep=torch.full((1,), 1000.0 * (1 - step / STEPS)))

    def run() -> None:
        with torch.no_grad():
            if not attach:
                forwards()
                return
            with accelerated(transformer, NEUTRAL, steps=STEPS):
                forwards()

    return run


def bookkeeping(rounds: int) -> dict[str, float]:
    """Return the microseconds that the seam itself takes for each call and for each block in it."""
    costs: dict[int, float] = {}
    x = torch.zeros(1, 4, 8)
    for depth in (1, 41):
        net, calls = Chain(depth), 100
        with torch.no_grad():

            def forwards(net: nn.Module = net, calls: int = calls) -> float:
                start = time.perf_counter()
                for step in range(calls):
                    net(x, timestep=float(calls - step))
                return (time.perf_counter() - start) / calls

            differences = []
            for _ in range(rounds):
                plain = forwards()
                with accelerated(net, NEUTRAL, steps=calls):
                    differences.append(forwards() - plain)
            costs[depth] = statistics.median(differences) * 1e6
    block = (costs[41] - costs[1]) / 40
    return {"microseconds_per_call": costs[1] - block, "microseconds_per_block": block}


def transformers(preset: str) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Return an untrained network of ours and a small one of diffusers, each with the inputs of a forward."""
    import diffusers

    from dit.presets import build

    torch.manual_seed(0)
    ours = build(preset).eval()
    size = ours.config.sample_size
    flux = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=8,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    prompt = {"encoder_hidden_states": torch.randn(1, 16, ours.config.context_dim)}
    pooled = {"pooled_projections": torch.randn(1, ours.config.pooled_dim)} if ours.config.pooled_dim else {}
    return {
        f"MMDiT {preset}": (ours, {"hidden_states": torch.randn(1, ours.config.in_channels, size, size)} | prompt | pooled),
        "FluxTransformer2DModel small": (
            flux,
            {
                "hidden_states": torch.randn(1, 256, 16), "encoder_hidden_states": torch.randn(1, 16, 64),
                "pooled_projections": torch.randn(1, 64), "img_ids": torch.zeros(256, 3), "txt_ids": torch.zeros(16, 3),
            },
        ),
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write benchmarks/results/overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="emoji", help="a text-to-image preset of dit.presets")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    figures: dict[str, Any] = {"bookkeeping": bookkeeping(given.rounds)}
    for name, (transformer, inputs) in transformers(given.preset).items():
        runs = {"plain": loop(transformer, inputs, False), "neutral": loop(transformer, inputs, True)}
        times = interleaved(runs, rounds=given.rounds, warmups=2)
        figures[name] = {
            "overhead_fraction": 1 / times["neutral"]["ratio"] - 1,
            "overhead_fraction_of_best": times["neutral"]["best"] / times["plain"]["best"] - 1,
            "seconds_for_a_forward": times["plain"]["median"] / STEPS,
            "seconds": times,
        }
    write_json(RESULTS / "overhead.json", record() | {"rounds": given.rounds, "forwards": STEPS} | figures)
    shown = {k: {a: b for a, b in v.items() if a != "seconds"} for k, v in figures.items()}
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
