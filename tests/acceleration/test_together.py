"""Every two accelerators: both have their effect in one run, or the two are refused in words at entry."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acceleration import Accelerator, Refused, RunReport, accelerated, refusal
from dit.backbones.mmdit import MMDiT
from dit.seams import announce
from dit.spec import kinds

STEPS = 8
FEW: dict[str, Any] = {"interval": 2, "warmup": 3, "final_full": 0}
SPARSE: dict[str, Any] = {"rows": 16, "block": 16, "min_tokens": 16, "dense_layers": 0, "measure": False}
# Of each method settings that show in a short run of a small model, and the letter that shows it.
SHOWN: dict[str, list[tuple[dict[str, Any], str]]] = {
    "adaspa": [(SPARSE | {"density": 0.4, "guard": 0.0}, "S")],
    "delta-cache": [(FEW | {"mode": "rear", "cached_fraction": 0.5}, "R")],
    "taylor-cache": [(FEW | {"fresh": 1}, "F"), (FEW | {"level": "modules"}, "F")],
    "guidance-skip": [({"interval": 2, "warmup": 2}, "R")],
    "step-forecast": [(FEW, "F")],
    "token-merge": [({"min_tokens": 16, "window": 16}, "M")],
    "xattention": [(SPARSE | {"threshold": 0.5, "stride": 2}, "S")],
}
# The pairs that decide about the same thing.
APART = {
    frozenset(pair)
    for group in (("adaspa", "token-merge", "xattention"), ("delta-cache", "step-forecast", "taylor-cache"))
    for pair in itertools.combinations(group, 2)
}
PAIRS = list(itertools.combinations(sorted(SHOWN), 2))


def small() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = MMDiT(
        sample_size=8, in_channels=4, patch_size=1, width=16, heads=4, dual_depth=2, single_depth=2,
        context_dim=8, pooled_dim=8,
    ).eval()  # fmt: skip
    for one in net.parameters():
        one.data.normal_(0, 0.2)
    given = {"hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 7, 8)}
    return net, given | {"pooled_projections": torch.randn(1, 8)}


@torch.no_grad()
def sample(
    net: Any, given: dict[str, Tensor], branches: tuple[str, ...] = ("cond", "uncond")
) -> list[Tensor]:
    """Call the model once a step and branch, as guidance does: the second branch has another prompt."""
    outputs = []
    for step in range(STEPS):
        for place, branch in enumerate(branches):
            announce(net, step=step, branch=branch)
            moved = {
                "hidden_states": given["hidden_states"] * (1 - step / 20),
                "encoder_hidden_states": given["encoder_hidden_states"] * (1 - place / 2),
            }
            time = torch.full((1,), 900.0 - 100 * step)
            outputs.append(net(**given | moved, timestep=time, return_dict=False)[0])
    return outputs


def methods_of(name: str) -> list[tuple[Accelerator, str]]:
    return [(kinds(Accelerator)[name](**settings), letter) for settings, letter in SHOWN[name]]


def took_effect(report: RunReport, method: Accelerator, letter: str) -> bool:
    """Whether a method's letter shows in the blocks; of those around whole forwards, in one that reached none."""
    if method.name == "guidance-skip":
        return any(cell.get("unconditional") == "reused" for cell in report.cells)
    if method.name == "step-forecast":
        return any(cell.get("step forecast") for cell in report.cells)
    return any(letter in cell["states"] and not cell.get("answered") for cell in report.cells)


def hung_on(net: nn.Module) -> list[dict[str, Any]]:
    return [
        {key: list(value) if isinstance(value, dict) else id(value) for key, value in one.__dict__.items()}
        for one in net.modules()
    ]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_two_compose_or_are_refused(pair: tuple[str, str]) -> None:
    net, given = small()
    plain, before = sample(net, given), hung_on(net)
    for (one, letter), (other, mark) in itertools.product(*map(methods_of, pair)):
        for methods in ((one, other), (other, one)):
            words = refusal(net, *methods)
            assert (words is not None) is (frozenset(pair) in APART), words
            if words is not None:
                assert "both decide about" in words
                with pytest.raises(Refused, match="choose one of them"), accelerated(net, *methods):
                    pass
                continue
            with accelerated(net, *methods, steps=STEPS) as run:
                first, second = sample(net, given), sample(net, given)
            report = run.report()
            for method, shown in ((one, letter), (other, mark)):
                assert took_effect(report, method, shown), f"{method} did nothing in {methods}"
            assert len(report.effective) == len(report.requested) == 2
            assert json.loads(json.dumps(report.to_dict()))["requested"] == [m.to_dict() for m in methods]
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            assert not all(torch.equal(a, b) for a, b in zip(plain, first, strict=True))
            assert hung_on(net) == before
            assert all(torch.equal(a, b) for a, b in zip(plain, sample(net, given), strict=True))
            if "guidance-skip" in pair:
                continue  # it takes two branches
            with accelerated(net, *methods, steps=STEPS):
                alone = sample(net, given, ("cond",))
            assert all(torch.equal(a, b) for a, b in zip(alone, first[::2], strict=True)), "branches mix"


def test_every_method_is_tried_with_every_other() -> None:
    assert set(kinds(Accelerator)) == set(SHOWN)
