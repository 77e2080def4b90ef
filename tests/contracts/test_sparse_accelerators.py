"""Sparse attention on tiny random models of diffusers' own classes: with effect or refused in words, and gone without a trace."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from acceleration import Accelerator, AdaSpa, DeltaCache, Untouched, XAttention, accelerated, refusal

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

# Small tiles for small models; nothing is timed, so the outcome is the same on every machine.
SMALL: dict[str, Any] = {"min_tokens": 16, "dense_layers": 0, "measure": False}
METHODS = [
    AdaSpa(density=0.4, rows=8, block=4, guard=0.0, **SMALL),
    XAttention(threshold=0.5, stride=2, rows=16, block=16, **SMALL),
]
NO_SELF_ATTENTION = ("SanaTransformer2DModel",)  # its self-attention is linear


def state_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {
            key: {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
            for key, value in module.__dict__.items()
        }
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_runs_with_effect_or_says_why_not(tiny: Any, method: Accelerator) -> None:
    given, before = tiny.inputs(rows=16), state_of(tiny.model)
    plain = tiny.sample(given)
    if type(tiny.model).__name__ in NO_SELF_ATTENTION:
        with (
            pytest.raises(Untouched, match="cross-attention"),
            accelerated(tiny.model, method, steps=tiny.steps),
        ):
            tiny.sample(given)
        assert state_of(tiny.model) == before
        return
    with accelerated(tiny.model, method, steps=tiny.steps) as run:
        first, second = tiny.sample(given), tiny.sample(given)
    report = run.report()
    assert state_of(tiny.model) == before
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, tiny.sample(given), strict=True))
    letters = "".join(cell["states"] for cell in report.cells)
    assert report.sparse == letters.count("S") > 0
    assert report.computed == len(letters)
    thinned = [row for row in report.attention if row["sparse"]]
    assert thinned
    assert all(0 < row["density"] < 1 and 0 < row["recall"] <= 1 for row in thinned)
    assert not all(torch.equal(a, b) for a, b in zip(plain, first, strict=True))
    assert torch.equal(plain[0], first[0])  # the warm-up is dense
    assert report.bytes > 0 or isinstance(method, XAttention)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_branches_do_not_mix(tiny: Any, method: Accelerator) -> None:
    if type(tiny.model).__name__ in NO_SELF_ATTENTION:
        assert refusal(tiny.model, method) is None
        return
    cond, free = tiny.inputs(rows=8), tiny.inputs(rows=8)
    alone = []
    for given in (cond, free):
        with contextlib.suppress(Untouched), accelerated(tiny.model, method, steps=tiny.steps):
            alone.append(tiny.sample(given))
    name = next(iter(cond))
    with contextlib.suppress(Untouched), accelerated(tiny.model, method, steps=tiny.steps):
        for step in range(tiny.steps):
            scale, time = 1 - step / (2 * tiny.steps), 1 - step / tiny.steps
            for given, expected in ((cond, alone[0]), (free, alone[1])):
                x = given[name]
                moved = [one * scale for one in x] if isinstance(x, list) else x * scale
                assert torch.equal(tiny.call(given | {name: moved}, time), expected[step])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_goes_with_a_cache_around_the_blocks(tiny: Any, method: Accelerator) -> None:
    if type(tiny.model).__name__ in NO_SELF_ATTENTION:
        return
    given, before = tiny.inputs(rows=16), state_of(tiny.model)
    with accelerated(
        tiny.model, DeltaCache(mode="rear", warmup=3, cached_fraction=0.5), method, steps=tiny.steps
    ) as run:
        tiny.sample(given)
    letters = "".join(cell["states"] for cell in run.report().cells)
    assert letters.count("S") > 0
    assert letters.count("R") > 0
    assert state_of(tiny.model) == before
