"""What a condition costs a step: `python -m benchmarks.easycontrol [--rounds 5] [--tokens 1024]`.

A FLUX transformer of the released shapes at a reduced width, random weights (arithmetic does not depend on them), with none, one
and two conditions of as many tokens as the picture; each with the keys and values kept, and with the pass made in every step
(which is what a sequence that carries the condition along has to compute). Linear FLOPs are counted, those of attention
follow from the lengths; times are of one process, in turns.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import RESULTS, interleaved, record, write_json
from control._memory import Memory
from control.base import Use, controlled
from control.easycontrol import EasyControl

WIDTH, HEADS, DUAL, SINGLE, TEXT, RANK = 512, 8, 2, 4, 128, 21  # rank: 128 of 3072, in proportion
KEPT, ANEW = "kept", "anew in every step"


def network() -> Any:
    """A narrow FLUX with random weights."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    made = FluxTransformer2DModel(
        in_channels=64, num_layers=DUAL, num_single_layers=SINGLE, attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS, joint_attention_dim=256, pooled_projection_dim=64, axes_dims_rope=(8, 28, 28),
    )  # fmt: skip
    return made.eval().requires_grad_(False)


def inputs(side: int) -> dict[str, Any]:
    """The arguments of a forward for a picture of `side` x `side` tokens, without the time."""
    axis = torch.arange(float(side))
    return {
        "hidden_states": torch.randn(1, side * side, 64), "encoder_hidden_states": torch.randn(1, TEXT, 256),
        "pooled_projections": torch.randn(1, 64), "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), axis, axis),
    }  # fmt: skip


def candidates(model: Any, side: int) -> dict[str, tuple[list[Use], Memory]]:
    """Name every way to make a step: its conditions, and where their keys and values are kept."""
    found: dict[str, tuple[list[Use], Memory]] = {"no condition": ([], Memory())}
    for count in (1, 2):
        uses = [
            Use(EasyControl(rank=RANK).build(model), torch.randn(1, 16, 2 * side, 2 * side))
            for _ in range(count)
        ]
        for way, entries in ((KEPT, 8), (ANEW, 0)):
            found[f"{count} condition{'s' * (count > 1)}, {way}"] = (uses, Memory(entries))
    return found


def bytes_of(conditions: int, side: int) -> int:
    """Return what is kept by formula: keys and values, of each block, token and channel, four bytes each."""
    return conditions * 2 * (DUAL + SINGLE) * side * side * WIDTH * 4


@torch.no_grad()
def main() -> None:
    """Measure and print; write the figures with --write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.easycontrol", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tokens", type=int, default=1024, help="tokens of the picture and of each condition, a square"
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/easycontrol.json")
    given = parser.parse_args()
    side = math.isqrt(given.tokens)
    model, arguments = network(), inputs(side)
    step = {"timestep": torch.full((1,), 0.5), "return_dict": False}
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}

    for name, (uses, memory) in candidates(model, side).items():

        def run(uses: list[Use] = uses, memory: Memory = memory) -> None:
            with controlled(model, *uses, memory=memory):
                model(**arguments, **step)

        run()  # what is kept is kept from here on
        with FlopCounterMode(display=False) as counter:
            run()
        linear = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
        own, keys = side * side + TEXT, side * side + TEXT + len(uses) * side * side
        heard = 4 * own * keys * WIDTH * (DUAL + SINGLE)
        alone = 4 * side**4 * WIDTH * (DUAL + SINGLE - 1) * len(uses) if memory.entries == 0 else 0
        rows[name] = {
            "linear GFLOPs": linear / 1e9,
            "attention GFLOPs": (heard + alone) / 1e9,
            "bytes": memory.bytes,
            "bytes by formula": bytes_of(len(uses), side) if memory.entries else 0,
        }
        runs[name] = run
        assert memory.bytes == rows[name]["bytes by formula"], (name, rows[name])
    for name, timed in interleaved(runs, rounds=given.rounds).items():
        rows[name] |= {"seconds": timed["median"], "ratio": timed["ratio"]}

    def attach() -> None:
        with controlled(model, *candidates_of_one):
            pass

    candidates_of_one = [Use(EasyControl(rank=RANK).build(model), torch.randn(1, 16, 2 * side, 2 * side))]
    attaching = interleaved({"attach and detach": attach}, rounds=20)["attach and detach"]["median"]
    for name, row in rows.items():
        whole = row["linear GFLOPs"] + row["attention GFLOPs"]
        print(
            f"{name:<36} {row['linear GFLOPs']:>8.2f} linear + {row['attention GFLOPs']:>6.2f} attention = {whole:>7.2f} GFLOPs"
            f"  {row['bytes'] / 1e6:>6.1f} MB  {row['seconds'] * 1e3:>7.1f} ms  {1 / row['ratio']:.2f} of none"
        )
    for count in (1, 2):
        stem = f"{count} condition{'s' * (count > 1)}, "
        for what in ("linear GFLOPs", "seconds"):
            saved = 1 - rows[stem + KEPT][what] / rows[stem + ANEW][what]
            print(f"{count} kept instead of anew: {saved:.0%} fewer {what}")
    print(f"attach and detach: {attaching * 1e3:.2f} ms")
    if given.write:
        shape = {
            "width": WIDTH,
            "dual": DUAL,
            "single": SINGLE,
            "text": TEXT,
            "rank": RANK,
            "tokens": side * side,
        }
        figures = {"shape": shape, "rows": rows, "attach_seconds": attaching}
        write_json(RESULTS / "easycontrol.json", record() | figures)


if __name__ == "__main__":
    main()
