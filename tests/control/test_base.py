"""The with-block: what a use may ask for, what is refused, when it is off, and that it leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acceleration.base import accelerated
from acceleration.delta_cache import DeltaCache
from acceleration.taylor_cache import TaylorCache
from control._memory import Memory, mark, probe
from control._residual import residual_after
from control.base import (
    Control,
    ControlAdapter,
    ControlRun,
    Refused,
    Untouched,
    Use,
    controlled,
    frozen,
    refusal,
)
from dit.seams import announce, blocks_of
from dit.spec import knob, spec


class Waves(Control):
    """A family of its own, so that the test's adapters stay out of the registry of the real ones."""

    __slots__ = ()


@spec("wave")
class Wave(Waves):
    """Adds a picture-sized wave after some blocks."""

    place: int = knob(0, "Block", low=0)

    def build(self, transformer: nn.Module) -> WaveAdapter:
        return WaveAdapter(self, transformer)


class WaveAdapter(ControlAdapter):
    control: Wave

    def __init__(self, control: Wave, transformer: nn.Module) -> None:
        super().__init__(control)
        self.size = nn.Parameter(torch.linspace(-1, 1, 24))  # a constant would be lost in the norms

    @contextlib.contextmanager
    def attached(self, transformer: nn.Module, use: Use, run: ControlRun) -> Iterator[None]:
        def residual(_place: int, _inputs: dict[str, Tensor], image: Tensor) -> Tensor | None:
            strength = run.strength(use)
            if not strength or use.condition is None:
                return None
            run.account(use).acted += 1
            return strength * self.size * use.condition * torch.linspace(-1, 1, image.shape[1])[:, None]

        with residual_after(transformer, {self.control.place: None}, residual):
            yield


class Silent(WaveAdapter):
    @contextlib.contextmanager
    def attached(self, transformer: nn.Module, use: Use, run: ControlRun) -> Iterator[None]:
        yield


def wave(tiny: Any, place: int = 0, **about: Any) -> Use:
    return Use(Wave(place=place).build(tiny.model).requires_grad_(False), 1.0, **about)


def ran(tiny: Any, *uses: Use, steps: int | None = 4) -> list[Tensor]:
    given = tiny.given()
    with torch.no_grad(), controlled(tiny.model, *uses, steps=steps):
        found: list[Tensor] = tiny.run(given)
    return found


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"strength": -1.0}, "strength must be numbers of at least 0, got -1.0"),
        ({"strength": float("nan")}, "strength"),
        ({"strength": ()}, "strength"),
        ({"strength": (1.0, "x")}, "strength"),
        ({"strength": True}, "strength"),
        ({"start": 0.5, "end": 0.5}, "start < end"),
        ({"end": 1.5}, "end=1.5"),
        ({"region": torch.zeros(2)}, r"region must be a tensor \[H, W\] or \[B, H, W\], got shape \(2,\)"),
        ({"region": "left"}, "got str"),
        ({"region": torch.full((2, 2), 2.0)}, "numbers from 0 to 1, got 2 to 2"),
        ({"region": torch.full((2, 2), float("nan"))}, "numbers from 0 to 1"),
        ({"region_text": 2.0}, "region_text"),
    ],
)
def test_bad_uses_are_refused_at_once(make: Any, about: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words):
        wave(make("mmdit"), **about)


def test_strength_over_the_steps(make: Any) -> None:
    tiny = make("mmdit")
    assert [wave(tiny, strength=(0.0, 1.0)).strength_at(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [wave(tiny, strength=[3.0, 1.0, 2.0]).strength_at(i, 3) for i in range(3)] == [3, 1, 2]
    assert wave(tiny, strength=(0.5,)).strength_at(0, 1) == 0.5
    assert wave(tiny, strength=lambda fraction: 1 - fraction).strength_at(1, 4) == 0.75
    assert [wave(tiny, start=0.25, end=0.75).strength_at(i, 4) for i in range(4)] == [0, 1, 1, 0]
    with pytest.raises(Refused, match=r"at 0\.5 of the run is -1"):
        wave(tiny, strength=lambda _: -1.0).strength_at(2, 4)
    assert wave(tiny, strength=(0, 0.0)).off
    assert not wave(tiny, strength=(0, 1)).off


def test_off_attaches_nothing_and_on_detaches_everything(tiny: Any) -> None:
    given = tiny.given()
    with torch.no_grad():
        plain = tiny.run(given)
    held = {name: dict(module.__dict__) for name, module in tiny.model.named_modules()}
    with torch.no_grad(), controlled(tiny.model, wave(tiny, strength=0)):
        assert {name: dict(module.__dict__) for name, module in tiny.model.named_modules()} == held
    found = ran(tiny, wave(tiny))
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in zip(found, plain, strict=True))
    with contextlib.suppress(ZeroDivisionError), controlled(tiny.model, wave(tiny)):
        raise ZeroDivisionError
    assert {name: dict(module.__dict__) for name, module in tiny.model.named_modules()} == held
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(tiny.run(given), plain, strict=True))


def test_windows_and_schedules_need_the_steps_and_hear_announcements(tiny: Any) -> None:
    given, use = tiny.given(), wave(tiny, start=0.5)
    with torch.no_grad():
        plain = tiny.run(given)
        with controlled(tiny.model, use) as run:
            announce(tiny.model, steps=4)
            found = tiny.run(given)
            assert run.moment is None, "between calls there is no moment"
            assert run.strength(use) == 0
    assert [torch.equal(a, b) for a, b in zip(found, plain, strict=True)] == [True, True, False, False]
    assert run.report().uses[0]["calls"] == 2
    with pytest.raises(Refused, match="number of steps"):
        ran(tiny, use, steps=None)


def test_an_announcement_reaches_control_and_acceleration(make: Any) -> None:
    tiny = make("mmdit")
    given, use = tiny.given(), wave(tiny, start=0.5)
    with torch.no_grad(), controlled(tiny.model, use) as run, accelerated(tiny.model) as inner:
        announce(tiny.model, steps=2)
        for step in range(2):
            announce(tiny.model, step=step)
            tiny.call(given)
    assert run.report().uses[0]["calls"] == 1
    assert inner.report().steps == 2


def test_guidance_branches_are_one_step(make: Any) -> None:
    tiny = make("mmdit")
    use = wave(tiny, end=0.5)
    one, two = tiny.given(seed=1), tiny.given(seed=2)
    with torch.no_grad(), controlled(tiny.model, use, steps=4) as run:
        for time in (1000.0, 750.0, 500.0, 250.0):
            tiny.call(one, time)
            tiny.call(two, time)
    assert run.report().uses[0]["calls"] == 4
    assert run.calls == 8


def test_refusals_in_words(make: Any) -> None:
    tiny = make("mmdit")
    use = wave(tiny)
    assert "takes a transformer" in str(refusal(object(), use))
    assert "takes Use(adapter, ...), got str" in str(refusal(tiny.model, "edges"))
    assert "takes Use(adapter, ...), got Use" in str(refusal(tiny.model, Use(None, 1.0)))  # type: ignore[arg-type]
    assert "needs a condition" in str(refusal(tiny.model, Use(use.adapter)))
    assert refusal(tiny.model, use) is None
    with pytest.raises(Refused, match="steps must be a whole number"), controlled(tiny.model, use, steps=0):
        pass
    with controlled(tiny.model), pytest.raises(Refused, match="there is no block 9"):
        with controlled(tiny.model, wave(tiny, place=9)):
            pass
    with torch.no_grad(), accelerated(tiny.model):
        with pytest.raises(Refused, match=r"controlled\(\) goes outside"), controlled(tiny.model, use):
            pass
    with pytest.raises(Refused, match="already controlled"), torch.no_grad():
        with controlled(tiny.model, use), controlled(tiny.model, use):
            pass
    assert "_leapfrog_control" not in tiny.model.__dict__


def test_what_changes_nothing_is_told(make: Any) -> None:
    tiny = make("mmdit")
    use = Use(Silent(Wave(), tiny.model), 1.0)
    with pytest.raises(Untouched, match="wave changed nothing in 4 calls of MMDiT"):
        ran(tiny, use)
    with controlled(tiny.model, use):
        pass  # no call, nothing to complain about


def test_a_report_says_what_was_asked_and_what_took_effect(make: Any) -> None:
    tiny = make("mmdit")
    uses = (wave(tiny, strength=(0.0, 1.0)), wave(tiny, strength=0.0))
    with torch.no_grad(), controlled(tiny.model, *uses, steps=4) as run:
        tiny.run(tiny.given())
        run.note("once")
        run.note("once")
    report = json.loads(json.dumps(run.report().to_dict()))
    assert report["calls"] == 4
    assert report["notes"] == ["once"]
    first, second = report["uses"]
    assert first["control"] == {"name": "wave", "place": 0}
    assert (first["calls"], first["acted"], first["effective"][1]) == (3, 3, 1.0)
    assert (second["calls"], second["effective"]) == (0, None)


@pytest.mark.parametrize("method", [DeltaCache(), DeltaCache(mode="front"), TaylorCache()])
def test_a_residual_counts_once_in_accelerators(tiny: Any, method: Any) -> None:
    given, last = tiny.given(), len(blocks_of(tiny.model)) - 1
    uses = [wave(tiny, place) for place in (0, 1, last)]
    with torch.no_grad(), controlled(tiny.model, *uses):
        exact = tiny.call(given)
        with accelerated(tiny.model, method, steps=8) as run:
            for step in range(8):
                announce(tiny.model, step=step)
                assert float((tiny.call(given) - exact).abs().max()) < 2e-6 * max(
                    1.0, float(exact.abs().max())
                )
    assert run.report().reused + run.report().forecast > 0


@pytest.mark.parametrize("inside", [True, False], ids=["switched on inside", "switched on before"])
def test_a_residual_counts_once_in_caches_of_diffusers(make: Any, inside: bool) -> None:
    from diffusers import FirstBlockCacheConfig

    tiny = copy.deepcopy(make("flux"))  # diffusers leaves a bound method in each block it has held
    given, uses = tiny.given(), [wave(tiny, place) for place in (0, 2, 3)]
    exact = ran(tiny, *uses)[0]
    with torch.no_grad():
        plain = tiny.call(given, 1000.0)
    if not inside:
        tiny.model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    with torch.no_grad(), controlled(tiny.model, *uses) as run:
        if inside:
            tiny.model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        with tiny.model.cache_context("cond"):
            found = [tiny.call(given, 1000.0) for _ in range(3)]
        if inside:
            tiny.model.disable_cache()
    assert [row["acted"] for row in run.report().uses] == [3, 1, 1], "later blocks were skipped"
    assert all(float((x - exact).abs().max()) < 1e-5 for x in found)
    assert tiny.model.is_cache_enabled is not inside
    if not inside:
        tiny.model.disable_cache()
    with torch.no_grad():
        assert torch.equal(tiny.call(given, 1000.0), plain)


def test_memory_forgets_the_least_lately_used() -> None:
    memory, made = Memory(2), []

    def take(key: str, *tensors: Tensor) -> str:
        return memory.recall(key, tensors, lambda: made.append(key) or key, lambda _: 10)

    for key in ("a", "b", "a", "c", "a", "b"):
        assert take(key) == key
    assert made == ["a", "b", "c", "b"]
    assert (memory.bytes, memory.hits, memory.misses) == (20, 2, 4)
    x = torch.ones(2)
    take("x", x)
    take("x", x.clone())  # another tensor of equal content
    assert made.count("x") == 1
    x.add_(1)
    take("x", x)
    assert made.count("x") == 2
    with torch.inference_mode():
        y = torch.ones(3)
        take("y", y)
        take("y", y)
        y.add_(1)  # torch keeps no count of this, so contents are compared
        take("y", y)
    assert made.count("y") == 2
    memory.turn()
    take("y", y)
    memory.turn()
    assert memory.bytes == 10, "the other was not asked for in between"
    memory.clear()
    assert memory.bytes == 0
    for about in ({"storage": "int4"}, {"place": "disk"}, {"entries": -1}):
        with pytest.raises(ValueError, match="Memory"):
            Memory(**about)


def test_marks_and_probes_see_writes_exchanges_and_adapters(make: Any) -> None:
    from peft import LoraConfig

    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    first = mark(module)
    assert mark(module) == first
    with torch.no_grad():
        module[0].weight.add_(1)
    assert mark(module) != first
    seen = probe(module)
    module[1].weight.data += 1  # as merging an adapter does, past the version counter
    assert probe(module) != seen
    model = make("mmdit").model
    before = mark(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    try:
        live = mark(model)
        model.set_adapters("default", 0.5)
        assert len({before, live, mark(model)}) == 3
    finally:
        model.unload_lora()
        model.requires_grad_(False)


def test_frozen_gives_back_what_was_trainable() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    with contextlib.suppress(ZeroDivisionError), frozen(module):
        assert not any(one.requires_grad for one in module.parameters())
        raise ZeroDivisionError
    assert [one.requires_grad for one in module.parameters()] == [True, True, False, False]


def test_control_and_acceleration_do_not_know_each_other() -> None:
    import ast
    from pathlib import Path

    root = Path(__file__).parents[2]
    for package, other in (("control", "acceleration"), ("acceleration", "control")):
        for file in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [one.name for one in node.names] if isinstance(node, ast.Import) else []
                assert not any(name.split(".")[0] in (other, "pipelines", "app") for name in names), file
