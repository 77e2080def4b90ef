"""TD-LoRA: its formula at every time, its cost, its router, merging, and time as each transformer counts it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from control import Memory, Refused, Use, controlled, frozen
from control._files import load, save
from control.td_lora import TDLoRA, TDLoRAAdapter


def made(tiny: Any, seed: int = 0, **settings: Any) -> TDLoRAAdapter:
    """An adapter with random weights."""
    adapter = TDLoRA(**({"rank": 3} | settings)).build(tiny.model)
    generator = torch.Generator().manual_seed(seed)
    for one in adapter.parameters():
        one.data = torch.randn(one.shape, generator=generator) * 0.3
    adapter.requires_grad_(False)
    assert isinstance(adapter, TDLoRAAdapter)
    return adapter


def called(tiny: Any, *uses: Use, time: Any = 500.0, batch: int = 1, **about: Any) -> Tensor:
    times = torch.full((batch,), float(time)) if isinstance(time, float) else time
    with torch.no_grad(), controlled(tiny.model, *uses, **about):
        found: Tensor = tiny.model(**tiny.given(batch), timestep=times * tiny.scale, return_dict=False)[0]
    return found


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_a_layer_says_what_the_formula_says(make: Any) -> None:
    tiny = make("flux")
    adapter, path, time = made(tiny), "transformer_blocks.1.attn.to_q", 300.0
    layer, low = tiny.model.get_submodule(path), adapter.get_submodule(path)
    first, _, last = adapter.time_router
    angles = [time * 10000.0 ** (-i / 32) for i in range(32)]
    hidden = first(torch.tensor([[*map(math.cos, angles), *map(math.sin, angles)]]))
    gates = last(hidden * hidden.sigmoid())[0].exp()
    gates = gates / gates.sum()
    seen: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad(), controlled(tiny.model, Use(adapter, strength=0.4)):
        handle = layer.register_forward_hook(lambda _layer, args, y: seen.append((args[0], y)))
        tiny.call(tiny.given(), time)
        handle.remove()
    x, y = seen[0]
    change = sum(gate * (x @ low.down.T @ up.T) for gate, up in zip(gates, low.ups, strict=True))
    assert apart(y, layer(x) + 0.4 * change) < 1e-5
    assert float(change.abs().max()) > 0.1


def test_untrained_it_changes_nothing(tiny: Any) -> None:
    assert apart(called(tiny, Use(TDLoRA().build(tiny.model))), called(tiny)) == 0


def test_at_one_time_it_merges_exactly(tiny: Any) -> None:
    adapter = made(tiny)
    base = {key: x.clone() for key, x in tiny.model.state_dict().items()}
    other = copy.copy(tiny)
    other.model = copy.deepcopy(tiny.model)
    for time in (900.0, 100.0):
        other.model.load_state_dict(adapter.merged(tiny.model, time * tiny.scale, 0.8), strict=False)
        found = called(tiny, Use(adapter, strength=0.8), time=time)
        assert apart(called(other, time=time), found) < 2e-5
        assert apart(called(other, time=500.0), called(tiny, Use(adapter, strength=0.8))) > 1e-4, (
            "at another it is another"
        )
    assert all(torch.equal(x, base[key]) for key, x in tiny.model.state_dict().items())


def test_every_sample_has_its_own_time(tiny: Any) -> None:
    adapter, times = made(tiny), torch.tensor([900.0, 20.0, 400.0])
    found = called(tiny, Use(adapter), time=times, batch=3)
    for place, time in enumerate(times):
        alone = called(tiny, Use(adapter), time=torch.full((3,), float(time)), batch=3)
        assert apart(found[place], alone[place]) < 2e-5


def test_a_time_is_the_same_however_a_family_counts_it(make: Any) -> None:
    flux, mmdit = made(make("flux")), made(make("mmdit"))
    assert (flux.control.span, mmdit.control.span) == (1.0, 1000.0)
    mmdit.time_router.load_state_dict(flux.time_router.state_dict())
    assert apart(flux.gates(torch.tensor([0.25, 1.0])), mmdit.gates(torch.tensor([250.0, 1000.0]))) < 1e-4
    gates = mmdit.gates(torch.linspace(0, 1000, 11))
    assert torch.allclose(gates.sum(-1), torch.ones(11))
    assert float((gates[1:] - gates[:-1]).abs().max(-1).values.min()) > 1e-3, (
        "every time has gates of its own"
    )


def test_experts_come_apart_in_training(make: Any) -> None:
    """From maps of 0; with a router of 0 too they would stay equal, which is why it begins random."""
    tiny = make("mmdit")

    def trained(equal: bool) -> tuple[TDLoRAAdapter, list[float]]:
        torch.manual_seed(0)
        adapter = TDLoRA(rank=4).build(tiny.model)
        assert isinstance(adapter, TDLoRAAdapter)
        if equal:
            torch.nn.init.zeros_(adapter.time_router[2].weight)
            torch.nn.init.zeros_(adapter.time_router[2].bias)
        optimizer, losses = torch.optim.Adam(adapter.parameters(), lr=2e-2), []
        goals = {900.0: tiny.draw(1, 4, 8, 12, seed=3), 50.0: tiny.draw(1, 4, 8, 12, seed=4)}
        for _ in range(10):
            optimizer.zero_grad()
            with frozen(tiny.model), controlled(tiny.model, Use(adapter)):
                loss = sum(
                    (tiny.call(tiny.given(), time) - goal).square().mean() for time, goal in goals.items()
                )
                loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return adapter, losses

    def spread(adapter: TDLoRAAdapter) -> float:
        return max(float(adapter.get_submodule(path).ups.detach().std(0).max()) for path in adapter.layers)

    adapter, losses = trained(equal=False)
    assert losses[-1] < 0.9 * losses[0]
    assert spread(adapter) > 1e-3
    assert spread(trained(equal=True)[0]) < 1e-6
    assert any(one.grad is not None and bool(one.grad.any()) for one in adapter.time_router.parameters())


@pytest.mark.parametrize("name", ["dit-xl/2", "mmdit-sd3", "mmdit-flux"])
def test_it_costs_at_most_one_and_a_half_percent(name: str) -> None:
    from dit.presets import build

    with torch.device("meta"):
        model = build(name)
        adapter = TDLoRA().build(model)
    layers = [model.get_submodule(path) for path in adapter.layers]
    own = sum(one.numel() for one in adapter.parameters())
    router = 64 * 32 + 32 + 32 * 4 + 4
    assert own == router + sum(4 * one.in_features + 4 * 4 * one.out_features for one in layers)
    assert own <= 0.015 * sum(one.numel() for one in model.parameters())


def test_a_condition_is_changed_as_at_time_0(make: Any, easy: Any) -> None:
    """So that what was computed of a picture in one step serves the next."""
    tiny = make("flux")
    adapter, picture, memory = made(tiny), easy(make("flux")), Memory()
    for uses in ((Use(adapter), picture), (picture, Use(adapter))):
        first = called(tiny, *uses, time=900.0, memory=memory)
        kept = called(tiny, *uses, time=100.0, memory=memory)
        assert torch.equal(kept, called(tiny, *uses, time=100.0))
        assert torch.equal(first, called(tiny, *uses, time=900.0))
    other = copy.copy(tiny)
    other.model = copy.deepcopy(tiny.model)
    other.model.load_state_dict(adapter.merged(tiny.model, 0.0), strict=False)
    given = tiny.given()
    with torch.no_grad(), controlled(other.model, picture):
        expected = other.call(given, 0.0)
    with torch.no_grad(), controlled(tiny.model, picture, Use(adapter)):
        assert apart(tiny.call(given, 0.0), expected) < 2e-5


def test_saved_with_the_span_it_was_made_for(make: Any, tmp_path: Path) -> None:
    tiny = make("flux")
    again = load(save(made(tiny), tmp_path / "one.safetensors", tiny.model), tiny.model)
    assert isinstance(again.control, TDLoRA)
    assert again.control.span == 1.0


def test_what_cannot_work_is_refused(make: Any) -> None:
    tiny = make("mmdit")
    adapter = made(tiny)
    with pytest.raises(Refused, match="one a token cannot be served"):
        called(tiny, Use(adapter), time=torch.full((1, 24), 500.0))
    with pytest.raises(Refused, match=r"timestep is 500, allowed is 0 to span=1$"):
        called(tiny, Use(made(tiny, span=1.0)), time=500.0)
    with pytest.raises(Refused, match="allowed is 0 to span=1000"):
        adapter.merged(tiny.model, -1.0)
    with pytest.raises(Refused, match="takes no condition"), controlled(tiny.model, Use(adapter, "a")):
        pass
    flux = make("flux")
    model = copy.deepcopy(flux.model)
    model.enable_gradient_checkpointing()
    own = made(flux).requires_grad_(True)
    with pytest.raises(Refused, match="do not know the time"), controlled(model, Use(own)):
        pass
    with pytest.raises(ValueError, match="targets must be names"):
        TDLoRA(targets=())
