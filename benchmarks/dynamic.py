"""Does time follow the multiply-accumulates where DyDiT leaves out heads, channels and tokens? `python -m benchmarks.dynamic`.

One block of a DiT at several sizes, in evaluation: the complete block and compact ones with a share of heads, channels and
tokens on, in turns; processor time of one thread, medians. `excess` is the share of time over the share of the cost: of
attention and perceptron, as the paper counts; `excess_of_all` over that of all that the counter sees (modulation and gates,
which no route makes smaller). `excess_of_routed` leaves out of both times what a block does beside attention and perceptron
(norms, modulation, gates, sums), measured by the block without the two: whether what is off is really not computed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import record, write_json
from dit.backbones.dit import DiTBlock
from dit.experts.dynamic import Dynamic, complete
from dit.grid import Grid
from dit.ledger import counted
from dit.mixers.full import Full
from dit.model import Context
from dit.modulation import AdaLNZero
from dit.seams import patched

SIZES = {"S": (384, 6), "B": (768, 12), "XL": (1152, 16)}
SHARES = (0.75, 0.5, 0.25)
KINDS = ("complete", "compact", "complete beside", "compact beside")


def block(width: int, heads: int, share: float) -> tuple[DiTBlock, float, float]:
    """Return a block whose width gates leave about `share`, with the shares of heads and channels that are really on."""
    torch.manual_seed(0)
    slots: dict[str, Any] = {"hidden": 4 * width, "mixer": Full(qk_norm=False), "modulation": AdaLNZero(bias=True)}
    made = DiTBlock(width, heads, experts=_experts(), **slots).eval()
    on = max(1, round(share * heads))
    for gate in (made.router.heads, made.router.groups):
        nn.init.zeros_(gate.weight)
        gate.bias.data = torch.where(torch.randperm(heads - 1) < on - 1, 1.0, -1.0)
    return made, on / heads, on / heads


def _experts() -> Dynamic:
    from dit.experts.dense import Experts
    from dit.spec import parse

    found = parse(Experts, "dynamic")
    assert isinstance(found, Dynamic)
    return found


def measure(name: str, tokens: int, share: float, repeats: int) -> dict[str, Any]:
    """Return one row: cost and time of the compact block against the complete one."""
    width, heads = SIZES[name]
    made, some_heads, some_groups = block(width, heads, share)
    side = int(tokens**0.5)
    x, emb = torch.randn(1, side * side, width), torch.randn(1, width)
    context = Context(Grid(1, side, side), emb, time=emb, timestep=torch.zeros(1))
    gate = made.ff.tokens
    with torch.no_grad():  # the token gate: as many tokens as the share, by the order of its logits
        attended = _logits(made, x, emb, context)
        gate[2].bias -= attended.flatten().quantile(1 - share)
    kept = float((_logits(made, x, emb, context) > 0).float().mean())
    attention = side * side * 4 * width**2 + 2 * (side * side) ** 2 * width
    perceptron = 8 * side * side * width**2
    cost = (some_heads * attention + some_groups * kept * perceptron) / (attention + perceptron)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(repeats + 1):
        for kind in KINDS:
            with torch.no_grad(), as_kind(made, kind):
                began = time.process_time()
                made(x, emb, context)
                if turn:
                    times[kind].append(time.process_time() - began)
    taken = {kind: statistics.median(found) for kind, found in times.items()}
    macs = {kind: _macs(made, kind, x, emb, context) for kind in KINDS[:2]}
    ratio, all_of_it = taken["compact"] / taken["complete"], macs["compact"] / macs["complete"]
    routed = (taken["compact"] - taken["compact beside"]) / (taken["complete"] - taken["complete beside"])
    return {
        "size": name, "tokens": side * side, "heads": some_heads, "channels": some_groups, "tokens_kept": round(kept, 3),
        "share_of_macs": round(cost, 4), "share_of_all_macs": round(all_of_it, 4), "share_of_time": round(ratio, 4),
        "excess": round(ratio / cost, 3), "excess_of_all": round(ratio / all_of_it, 3),
        "excess_of_routed": round(routed / cost, 3), "seconds": taken,
    }  # fmt: skip


@contextmanager
def as_kind(made: DiTBlock, kind: str) -> Iterator[None]:
    """Let the block be complete or compact inside; "beside": without its attention and perceptron, but with their gates."""

    def gate_alone(hidden_states: Tensor, context: Context) -> Tensor:
        if not made.ff.complete:
            made.ff.choose(made.ff.tokens(context.residual))
        return hidden_states

    with ExitStack() as stack:
        if kind.startswith("complete"):
            stack.enter_context(complete(made))
        if kind.endswith("beside"):
            stack.enter_context(patched(made.attn, "forward", lambda hidden_states, context: hidden_states))
            stack.enter_context(patched(made.ff, "forward", gate_alone))
        yield


def _macs(made: DiTBlock, kind: str, x: Tensor, emb: Tensor, context: Context) -> int:
    given = {"hidden_states": x, "temb": emb, "context": context}
    with as_kind(made, kind):
        return counted(made, given, tokens=x.shape[1]).macs


def _logits(made: DiTBlock, x: Tensor, emb: Tensor, context: Context) -> Tensor:
    seen: list[Tensor] = []
    handle = made.ff.tokens.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        made(x, emb, context)
    handle.remove()
    return seen[0]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dynamic.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(name, tokens, share, given.repeats) for name in SIZES for tokens in given.tokens for share in SHARES
    ]
    for row in rows:
        print(f"{row['size']:>3} {row['tokens']:5d} tokens: MACs {row['share_of_macs']:.2f}, time {row['share_of_time']:.2f}, "
              f"excess {row['excess']:.2f}, of all {row['excess_of_all']:.2f}, "
              f"of the routed {row['excess_of_routed']:.2f}")  # fmt: skip
    write_json(given.out, {"machine": record(), "threads": 1, "clock": "process time", "rows": rows})


if __name__ == "__main__":
    main()
