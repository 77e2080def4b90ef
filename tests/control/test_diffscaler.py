"""DiffScaler: its formula, tasks that share nothing, a task for each sample, merging where it is exact, and bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from control import Memory, Refused, Use, controlled, frozen
from control._files import load, save
from control.diffscaler import DiffScaler, DiffScalerAdapter, joined
from control.lora import LoRA

TASKS = ("cats", "dogs")


def made(tiny: Any, seed: int = 0, **settings: Any) -> DiffScalerAdapter:
    """An adapter of two tasks with random weights."""
    adapter = DiffScaler(**({"tasks": TASKS, "rank": 3} | settings)).build(tiny.model)
    generator = torch.Generator().manual_seed(seed)
    for one in adapter.parameters():
        one.data = torch.randn(one.shape, generator=generator) * 0.2
    adapter.requires_grad_(False)
    assert isinstance(adapter, DiffScalerAdapter)
    return adapter


def called(tiny: Any, *uses: Use, batch: int = 1, **about: Any) -> Tensor:
    with torch.no_grad(), controlled(tiny.model, *uses, **about):
        found: Tensor = tiny.call(tiny.given(batch))
    return found


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_a_layer_says_what_the_formula_says(make: Any) -> None:
    tiny = make("sd3")
    adapter, path = made(tiny), "transformer_blocks.1.attn.to_q"
    layer, part = tiny.model.get_submodule(path), adapter.part(path, "dogs")
    seen = []
    with torch.no_grad(), controlled(tiny.model, Use(adapter, "dogs", strength=0.4)):
        handle = layer.register_forward_hook(lambda _layer, args, y: seen.append((args[0], y)))
        tiny.call(tiny.given())
        handle.remove()
    x, y = seen[0]
    low = (x @ part.down.weight.T).relu() @ part.up.weight.T
    change = part.scale * (x @ layer.weight.T) + part.shift + low
    assert apart(y, layer(x) + 0.4 * change) < 1e-5
    assert float(change.abs().max()) > 0.1


def test_untrained_it_changes_nothing(tiny: Any) -> None:
    adapter = DiffScaler(tasks=TASKS).build(tiny.model)
    found = called(tiny, Use(adapter, "cats"))
    assert apart(found, called(tiny)) == 0


def test_tasks_are_switched_and_mixed(tiny: Any) -> None:
    adapter, plain = made(tiny), called(tiny)
    cats, dogs = (called(tiny, Use(adapter, one)) for one in TASKS)
    assert apart(cats, plain) > 1e-2
    assert apart(dogs, cats) > 1e-2
    assert torch.equal(called(tiny, Use(adapter, "cats")), cats), "and nothing of the other is left"
    assert torch.equal(called(tiny, Use(adapter, {"cats": 1, "dogs": 0})), cats)
    both = called(tiny, Use(adapter, {"cats": 0.5, "dogs": 0.5}))
    assert min(apart(both, cats), apart(both, dogs)) > 1e-3
    assert (
        apart(called(tiny, Use(adapter, {"cats": 0.5})), called(tiny, Use(adapter, "cats", strength=0.5)))
        < 1e-5
    )


def test_every_sample_of_a_batch_may_have_its_own_task(tiny: Any) -> None:
    adapter, mixed = made(tiny), {"cats": 0.3, "dogs": 0.6}
    tasks = ["dogs", None, "cats", mixed]
    found = called(tiny, Use(adapter, tasks), batch=4)
    for place, task in enumerate(tasks):
        uses = [] if task is None else [Use(adapter, task)]
        assert apart(found[place], called(tiny, *uses, batch=4)[place]) < 2e-5
    assert apart(found[0], called(tiny, Use(adapter, "cats"), batch=4)[0]) > 1e-2
    # Both halves of a guided batch have the pictures in the same order.
    halves = called(tiny, Use(adapter, ["dogs", "cats"]), batch=4)
    for place, task in enumerate(("dogs", "cats", "dogs", "cats")):
        assert apart(halves[place], called(tiny, Use(adapter, task), batch=4)[place]) < 2e-5


def test_one_task_is_trained_without_touching_another(make: Any) -> None:
    tiny = make("mmdit")
    adapter = made(tiny).requires_grad_(True)
    before = {key: x.clone() for key, x in adapter.state_dict().items()}
    base = {key: x.clone() for key, x in tiny.model.state_dict().items()}
    # Decay and momentum reach every weight that has a gradient, even one of 0.
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-3, weight_decay=0.1)
    goal, losses = tiny.draw(1, 4, 8, 12, seed=3), []
    for _ in range(12):
        optimizer.zero_grad()
        with frozen(tiny.model), controlled(tiny.model, Use(adapter, "dogs")):
            loss = (tiny.call(tiny.given()) - goal).square().mean()
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    after = adapter.state_dict()
    assert all(torch.equal(after[key], x) for key, x in before.items() if ".cats." in key)
    assert not any(torch.equal(after[key], x) for key, x in before.items() if ".dogs.scale" in key)
    assert all(torch.equal(x, base[key]) for key, x in tiny.model.state_dict().items())


def test_gradients_are_the_same_where_blocks_are_computed_again(make: Any) -> None:
    tiny = copy.copy(make("flux"))
    tiny.model = copy.deepcopy(tiny.model)
    adapter = made(tiny).requires_grad_(True)

    def gradients() -> list[Tensor]:
        adapter.zero_grad()
        with frozen(tiny.model), controlled(tiny.model, Use(adapter, ["dogs", "cats"])):
            tiny.call(tiny.given(2)).square().mean().backward()
        return [one.grad.clone() for one in adapter.parameters() if one.grad is not None]

    expected = gradients()
    tiny.model.enable_gradient_checkpointing()
    found = gradients()
    assert len(found) == len(expected) == len(list(adapter.parameters()))
    scale = max(float(one.abs().max()) for one in expected)
    assert max(apart(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5 * scale


def test_merging_is_exact_where_there_is_no_part_behind_a_relu(tiny: Any) -> None:
    adapter, choice = made(tiny, rank=0, targets=("to_q", "to_out.0")), {"cats": 0.5, "dogs": 0.8}
    base = {key: x.clone() for key, x in tiny.model.state_dict().items()}
    other = copy.copy(tiny)
    other.model = copy.deepcopy(tiny.model)
    biased = all(tiny.model.get_submodule(path).bias is not None for path in adapter.layers)
    if not biased:
        with pytest.raises(Refused, match="has no bias that could take the shift"):
            adapter.merged(tiny.model, choice)
        for key, one in adapter.named_parameters():
            if key.endswith("shift"):
                one.data.zero_()
    weights = adapter.merged(tiny.model, choice, strength=0.7)
    assert set(weights) <= set(base)
    other.model.load_state_dict(weights, strict=False)
    found = called(tiny, Use(adapter, choice, strength=0.7))
    assert apart(called(other), found) < 1e-5
    assert apart(found, called(tiny)) > 1e-3
    assert all(torch.equal(x, base[key]) for key, x in tiny.model.state_dict().items())


def test_merging_is_refused_where_it_is_not_exact(make: Any) -> None:
    tiny = make("flux")
    adapter = made(tiny)
    with pytest.raises(Refused, match="behind a ReLU is not linear"):
        adapter.merged(tiny.model, "cats")
    with pytest.raises(Refused, match="one task, not one for each sample"):
        adapter.merged(tiny.model, ["cats", "dogs"])


def test_tasks_trained_apart_are_joined(make: Any, tmp_path: Path) -> None:
    tiny = make("mmdit")
    one, two = made(tiny, 1, tasks=("cats",)), made(tiny, 2, tasks=("dogs",))
    both = joined(tiny.model, one, two)
    again = load(save(both, tmp_path / "both.safetensors", tiny.model), tiny.model)
    assert str(again.coverage) == f"{len(both.state_dict())}/{len(both.state_dict())} keys"
    assert torch.equal(called(tiny, Use(again, "cats")), called(tiny, Use(one)))
    assert torch.equal(called(tiny, Use(again, "dogs")), called(tiny, Use(two)))
    with pytest.raises(Refused, match="two tasks have one name"):
        joined(tiny.model, one, one)
    with pytest.raises(Refused, match="differ in more than their tasks"):
        joined(tiny.model, one, made(tiny, tasks=("dogs",), rank=4))


def test_what_is_kept_of_a_condition_knows_the_task(make: Any, easy: Any) -> None:
    """Keys and values of a picture are computed through the same layers, so another task needs others."""
    tiny, memory = make("mmdit"), Memory()
    adapter, picture = made(tiny), easy(make("mmdit"))
    cats = called(tiny, Use(adapter, "cats"), picture, memory=memory)
    dogs = called(tiny, Use(adapter, "dogs"), picture, memory=memory)
    assert torch.equal(dogs, called(tiny, Use(adapter, "dogs"), picture))
    assert torch.equal(cats, called(tiny, Use(adapter, "cats"), picture, memory=memory))
    with (
        pytest.raises(Refused, match="easycontrol runs its condition through the same layers"),
        controlled(tiny.model, Use(adapter, ["cats", "dogs"]), picture),
    ):
        pass


def test_beside_a_lora(make: Any) -> None:
    tiny = make("flux")
    lora = LoRA(rank=2).build(tiny.model)
    for one in lora.parameters():
        one.data = torch.randn(one.shape, generator=torch.Generator().manual_seed(1)) * 0.2
    adapter = made(tiny, rank=0)
    found = called(tiny, Use(lora), Use(adapter, "cats"))
    other = copy.copy(tiny)
    other.model = copy.deepcopy(tiny.model)
    other.model.load_state_dict(lora.merged(tiny.model), strict=False)
    assert apart(found, called(other, Use(adapter, "cats"))) < 2e-5, (
        "it scales what the layer says with the LoRA"
    )


BAD: dict[str, tuple[Any, str]] = {
    "none of two": (None, "must name a task, one of cats, dogs"),
    "unknown": ("birds", "no task 'birds'; there are: cats, dogs"),
    "unknown of one sample": (["cats", "birds"], "no task 'birds'"),
    "a number": (3, "must be the name of a task"),
    "nothing": ([], "must be the name of a task"),
    "a number of one sample": ([3], "must be a name, weights by name or none"),
    "no weight": ({"cats": "much"}, "must be a number, got 'much'"),
    "NaN": ({"cats": float("nan")}, "must be a number, got nan"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_conditions_are_refused_at_entry(make: Any, case: str) -> None:
    tiny, (condition, words) = make("mmdit"), BAD[case]
    before = dict(tiny.model.__dict__)
    with pytest.raises(Refused, match=words), controlled(tiny.model, Use(made(tiny), condition)):
        pass
    assert tiny.model.__dict__ == before


def test_other_bad_input(make: Any) -> None:
    tiny = make("mmdit")
    with pytest.raises(Refused, match="3 tasks for a batch of 2"):
        called(tiny, Use(made(tiny), ["cats", "dogs", "cats"]), batch=2)
    with pytest.raises(Refused, match="cannot be held to a region"):
        called(tiny, Use(made(tiny), "cats", region=torch.ones(2, 2)))
    for settings, words in (
        ({"tasks": ("a", "a")}, "different names"), ({"tasks": ("a.b",)}, "different names"), ({"tasks": ()}, "different names"),
        ({"affine": False, "rank": 0}, "rank must be at least 1"), ({"targets": ()}, "targets must be names"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            DiffScaler(**settings)
