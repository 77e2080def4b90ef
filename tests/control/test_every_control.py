"""The contract of every way to steer, run over the registry: a method that is added is tested by being there.

A method whose condition is no plain picture, or whose defaults do not fit networks of 24 channels, gets a row in `ROWS`; one
that needs no condition and has no row is given none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import control
from acceleration import DeltaCache, accelerated
from control import Memory, Use, controlled, frozen
from control._files import load, save
from dit.seams import announce


def _instructed(tiny: Any, seed: int) -> Any:
    from control.unic_adapter import Instructed

    return Instructed(
        tiny.condition(seed=seed), tiny.draw(1, 5, 16, seed=seed + 1), tiny.draw(1, 12, seed=seed + 2)
    )


Row = tuple[dict[str, Any], Callable[[Any, int], Any]]
ROWS: dict[str, Row] = {
    "diffscaler": ({"tasks": ("one", "two"), "rank": 4}, lambda tiny, seed: "two"),
    "relactrl": ({"heads": 1}, lambda tiny, seed: tiny.condition(seed=seed)),
    "unic-adapter": ({}, _instructed),
}
METHODS = sorted(control.methods())
KINDS = ("flux", "mmdit", "mmdit-dual", "sd3.5")


def use_of(tiny: Any, method: str, seed: int = 1, **about: Any) -> Use:
    """A use of an adapter with random weights that do something."""
    settings, condition = ROWS.get(method, ({}, lambda tiny, seed: tiny.condition(seed=seed)))
    made = control.methods()[method](**settings)
    reason = made.refuses(tiny.model)
    if reason is not None:
        pytest.skip(f"{method}: {reason}")
    torch.manual_seed(seed)
    adapter = made.build(tiny.model)
    generator = torch.Generator().manual_seed(seed)
    for one in adapter.parameters():
        one.data = one.data + torch.randn(one.shape, generator=generator).to(one) * 0.1
    adapter.requires_grad_(False)
    return Use(adapter, condition(tiny, seed + 50) if adapter.needs_condition or method in ROWS else None, **about)


@pytest.fixture(params=KINDS)
def tiny(request: pytest.FixtureRequest, make: Any) -> Any:
    return make(request.param)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ran(tiny: Any, *uses: Use, memory: Memory | None = None) -> list[Tensor]:
    given = tiny.given()
    with torch.no_grad(), controlled(tiny.model, *uses, steps=4, memory=memory):
        found: list[Tensor] = tiny.run(given)
    return found


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def held(tiny: Any) -> dict[str, Any]:
    return {
        name: (dict(one.__dict__), len(one._forward_hooks), len(one._forward_pre_hooks))
        for name, one in tiny.model.named_modules()
    }


def test_off_on_and_taken_off_again(tiny: Any, method: str) -> None:
    use, before, plain = use_of(tiny, method), held(tiny), ran(tiny)
    with controlled(tiny.model, Use(use.adapter, use.condition, strength=0.0)):
        assert held(tiny) == before, "strength 0 attaches nothing"
    whole = ran(tiny, use)
    assert apart(whole, plain) > 1e-4
    assert ran(tiny, use)[0].equal(whole[0]), "a second run equals the first"
    half = ran(tiny, Use(use.adapter, use.condition, strength=0.5))
    assert apart(half, plain) > 1e-5
    assert apart(half, whole) > 1e-5
    with contextlib.suppress(ZeroDivisionError), torch.no_grad(), controlled(tiny.model, use):
        tiny.call(tiny.given())
        raise ZeroDivisionError
    assert held(tiny) == before
    assert apart(ran(tiny), plain) == 0


def test_outside_of_its_window_it_is_not_there(tiny: Any, method: str) -> None:
    use, plain = use_of(tiny, method), ran(tiny)
    found = ran(tiny, Use(use.adapter, use.condition, start=0.25, end=0.5))
    assert [torch.equal(a, b) for a, b in zip(found, plain, strict=True)] == [True, False, True, True]


def test_what_is_kept_gives_what_is_made_anew(tiny: Any, method: str) -> None:
    use, memory = use_of(tiny, method), Memory()
    found = ran(tiny, use, memory=memory)
    assert apart(found, ran(tiny, use, memory=Memory(entries=0))) == 0
    assert apart(found, ran(tiny, use, memory=memory)) == 0, "and so does what an earlier block has left"


@pytest.mark.parametrize("other", METHODS)
def test_two_at_once(tiny: Any, method: str, other: str) -> None:
    one, two = use_of(tiny, method), use_of(tiny, other, 2)
    both = ran(tiny, one, two)
    assert apart(both, ran(tiny, one)) > 1e-4
    assert apart(both, ran(tiny, two)) > 1e-4
    with torch.no_grad(), controlled(tiny.model, one, two) as run:
        tiny.call(tiny.given())
    assert all(row["acted"] for row in run.report().uses)


def test_beneath_an_accelerator_equal_steps_have_no_error(tiny: Any, method: str) -> None:
    given = tiny.given()
    with torch.no_grad(), controlled(tiny.model, use_of(tiny, method)):
        exact = tiny.call(given)
        with accelerated(tiny.model, DeltaCache(), steps=8) as run:
            for step in range(8):
                announce(tiny.model, step=step)
                assert float((tiny.call(given) - exact).abs().max()) < 2e-6 * max(
                    1.0, float(exact.abs().max())
                )
    assert run.report().reused > 0


def test_training_reaches_its_weights_alone(tiny: Any, method: str) -> None:
    use = use_of(tiny, method)
    use.adapter.requires_grad_(True)
    tiny.model.requires_grad_(True)
    before = {name: x.clone() for name, x in tiny.model.state_dict().items()}
    optimizer = torch.optim.SGD(use.adapter.parameters(), lr=1e-3)
    try:
        with frozen(tiny.model), controlled(tiny.model, use):
            losses = []
            for _ in range(2):
                optimizer.zero_grad()
                loss = tiny.call(tiny.given()).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        assert losses[1] != losses[0], "a step has changed what it does"
        assert any(one.grad is not None and bool(one.grad.any()) for one in use.adapter.parameters())
        assert all(one.grad is None and one.requires_grad for one in tiny.model.parameters())
        assert all(torch.equal(x, before[name]) for name, x in tiny.model.state_dict().items())
    finally:
        tiny.model.requires_grad_(False)


def test_saved_and_loaded_it_does_the_same(tiny: Any, method: str, tmp_path: Path) -> None:
    use = use_of(tiny, method)
    again = load(save(use.adapter, tmp_path / "one.safetensors", tiny.model), tiny.model)
    assert again.control == use.adapter.control
    assert apart(ran(tiny, Use(again, use.condition)), ran(tiny, use)) == 0
