"""Control under acceleration: every adapter under every accelerator, on our MMDiT.

Neutral settings are bit-equal to the controlled run; where every step has the same inputs, what is reused or forecast is without
error; a block that is left out neither hears nor writes anything; pairs that cannot work are refused in words.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import control
from acceleration import (
    Accelerator,
    DeltaCache,
    GuidanceSkip,
    StepForecast,
    TaylorCache,
    TokenMerge,
    Untouched,
    accelerated,
)
from acceleration import Refused as RefusedByAccelerator
from control import Memory, Refused, Use, controlled
from dit.seams import announce
from dit.spec import kinds

STEPS = 8
BRANCHES = ("cond", "uncond")
SETTINGS: dict[str, dict[str, Any]] = {
    "diffscaler": {"tasks": ("one", "two"), "rank": 4}, "relactrl": {"heads": 1}, "lora": {"rank": 4}, "easycontrol": {"rank": 4},
}  # fmt: skip
NEUTRAL: dict[str, dict[str, Any]] = {
    "delta-cache": {"interval": 1}, "taylor-cache": {"interval": 1}, "adaspa": {"density": 1.0}, "xattention": {"threshold": 1.0},
    "token-merge": {"ratio": 0.0}, "guidance-skip": {"interval": 1}, "step-forecast": {"interval": 1},
}  # fmt: skip
few = {"interval": 3, "warmup": 1, "final_full": 1}
EAGER: list[Accelerator] = [
    *(DeltaCache(**few, mode=mode) for mode in ("rear", "whole")),
    DeltaCache(mode="whole", warmup=1, gate="first-block", threshold=5.0, limit=2),
    TaylorCache(**few, fresh=0, order=1), TaylorCache(**few, order=2, variable="sigma"),
    StepForecast(**few), GuidanceSkip(**few), GuidanceSkip(**few, mode="forecast"),
]  # fmt: skip
METHODS = sorted(control.methods())
ACCELERATORS = sorted(kinds(Accelerator))


@pytest.fixture
def tiny(make: Callable[[str], Any]) -> Any:
    return make("mmdit")


@pytest.fixture(params=METHODS)
def use(request: pytest.FixtureRequest, tiny: Any) -> Use:
    """A use of an adapter with random weights that do something."""
    made = control.methods()[request.param](**SETTINGS.get(request.param, {}))
    adapter = made.build(tiny.model)
    draw = torch.Generator().manual_seed(1)
    for one in adapter.parameters():
        one.data = one.data + torch.randn(one.shape, generator=draw).to(one) * 0.1
    adapter.requires_grad_(False)
    condition: Any = "two" if request.param == "diffscaler" else None
    if adapter.needs_condition:
        condition = tiny.condition()
        if request.param == "unic-adapter":
            condition = control.unic_adapter.Instructed(
                condition, tiny.draw(1, 5, 16, seed=6), tiny.draw(1, 12, seed=7)
            )  # type: ignore[attr-defined]
    return Use(adapter, condition)


def called(tiny: Any, step: int, branch: str, given: dict[str, Any], time: float = 500.0) -> Tensor:
    announce(tiny.model, step=step, branch=branch)
    found: Tensor = tiny.call(given, time)
    return found


def sampled(tiny: Any, times: Callable[[int], float] = lambda step: 1000.0 - 100 * step) -> list[Tensor]:
    """Both guidance branches of every step, at times that fall."""
    given = {branch: tiny.given(seed=seed) for seed, branch in enumerate(BRANCHES)}
    return [
        called(tiny, step, branch, given[branch], times(step))
        for step, branch in itertools.product(range(STEPS), BRANCHES)
    ]


def held(tiny: Any) -> dict[str, Any]:
    return {
        name: (dict(one.__dict__), len(one._forward_hooks), len(one._forward_pre_hooks))
        for name, one in tiny.model.named_modules()
    }


@pytest.mark.parametrize("name", ACCELERATORS)
def test_neutral_is_bit_equal_to_the_controlled_run(tiny: Any, use: Use, name: str) -> None:
    method, before = kinds(Accelerator)[name](**NEUTRAL[name]), held(tiny)
    assert method.neutral
    with torch.no_grad(), controlled(tiny.model, use, steps=STEPS):
        wanted = sampled(tiny)
    with (
        torch.no_grad(),
        controlled(tiny.model, use, steps=STEPS),
        accelerated(tiny.model, method, steps=STEPS),
    ):
        found = sampled(tiny)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert held(tiny) == before


@pytest.mark.parametrize("method", EAGER, ids=str)
def test_identical_inputs_give_no_error_and_what_is_left_out_acts_on_nothing(
    tiny: Any, use: Use, method: Accelerator
) -> None:
    given = {branch: tiny.given(seed=seed) for seed, branch in enumerate(BRANCHES)}
    memory = Memory()
    with torch.no_grad(), controlled(tiny.model, use, memory=memory) as run:
        exact, acts = {}, {}
        for branch in BRANCHES:
            before = run.account(use).acted
            exact[branch] = tiny.call(given[branch])
            acts[branch] = run.account(use).acted - before
        with accelerated(tiny.model, method, steps=STEPS) as sped:
            spared = 0
            for step, branch in itertools.product(range(STEPS), BRANCHES):
                before, written = run.account(use).acted, memory.misses
                error = (called(tiny, step, branch, given[branch]) - exact[branch]).norm() / exact[
                    branch
                ].norm()
                assert error < 3e-6, (step, branch, float(error))
                states = sped.report().cells[-1]["states"]
                acted, left_out = (
                    run.account(use).acted - before,
                    sum(one in "RF" for one in states) or not states,
                )
                if left_out:
                    spared += 1
                    assert memory.misses == written, "a block that is left out writes nothing"
                    assert acted <= acts[branch]
                    assert acted == 0 or set(states) != {"R"}, "and where all are left out nothing acts"
                else:
                    assert acted == acts[branch]
    assert spared > 0


@pytest.mark.parametrize("method", EAGER, ids=str)
def test_what_was_stored_beside_an_adapter_is_not_used_without_it(
    tiny: Any, use: Use, method: Accelerator
) -> None:
    """Where every step has the same inputs there are two right answers: with the adapter inside its window, and without."""
    given = {branch: tiny.given(seed=seed) for seed, branch in enumerate(BRANCHES)}
    part = Use(use.adapter, use.condition, start=0.25, end=0.625)
    with torch.no_grad():
        plain = {branch: tiny.call(given[branch]) for branch in BRANCHES}
        with controlled(tiny.model, use):
            steered = {branch: tiny.call(given[branch]) for branch in BRANCHES}
        assert all((plain[one] - steered[one]).norm() > 1e-3 * plain[one].norm() for one in BRANCHES)
        with controlled(tiny.model, part, steps=STEPS), accelerated(tiny.model, method, steps=STEPS) as run:
            for step, branch in itertools.product(range(STEPS), BRANCHES):
                wanted = (steered if 2 <= step < 5 else plain)[branch]
                error = (called(tiny, step, branch, given[branch]) - wanted).norm() / wanted.norm()
                assert error < 3e-6, (step, branch, float(error))
    report = run.report()
    assert any("adapters changed" in note for note in report.notes)
    assert any(set(cell["states"]) != {"C"} for cell in report.cells), "and steps are still spared"


def test_a_doubled_batch_is_halved_with_what_belongs_to_its_pictures(tiny: Any, use: Use) -> None:
    """Guidance in one call, of which the accelerator computes one half: each picture keeps its own time, condition and task."""
    given = {name: torch.cat([x, x * 0.5]) for name, x in tiny.given(batch=2).items()}
    adapter, condition = use.adapter, use.condition
    if adapter.control.name == "diffscaler":
        condition = ["two", "one"]
    elif isinstance(condition, Tensor):
        condition = tiny.condition(batch=2)
    both = Use(adapter, condition)
    time = torch.tensor([700.0, 300.0, 700.0, 300.0])
    with torch.no_grad(), controlled(tiny.model, both, steps=STEPS):
        exact = tiny.model(**given, timestep=time, return_dict=False)[0]
        with accelerated(tiny.model, GuidanceSkip(**few), steps=STEPS) as run:
            for step in range(STEPS):
                announce(tiny.model, step=step, branch="uncond+cond")
                found = tiny.model(**given, timestep=time, return_dict=False)[0]
                assert (found - exact).norm() < 3e-6 * exact.norm(), step
    assert run.report().reused > 0


def test_a_block_that_is_reused_hears_nothing(tiny: Any, use: Use) -> None:
    """What an adapter does in a call shrinks with the blocks that are computed."""
    with torch.no_grad(), controlled(tiny.model, use, steps=STEPS) as run:
        with accelerated(
            tiny.model, DeltaCache(**few, mode="rear", cached_fraction=0.5), steps=STEPS
        ) as sped:
            counts = []
            given = tiny.given()
            for step in range(STEPS):
                before = run.account(use).acted
                called(tiny, step, "cond", given, 1000.0 - 100 * step)
                counts.append((sped.report().cells[-1]["states"].count("R"), run.account(use).acted - before))
    full = [acted for reused, acted in counts if not reused]
    short = [acted for reused, acted in counts if reused]
    assert len(set(full)) == 1
    assert short
    assert max(short) <= full[0]
    if use.adapter.control.name not in (
        "controlnet",
        "relactrl",
    ):  # whose places may all lie in the blocks that are computed
        assert max(short) < full[0]


def test_an_accelerated_run_repeats_and_restores(tiny: Any, use: Use) -> None:
    before = held(tiny)
    method = TaylorCache(**few, fresh=0, order=1)
    runs = []
    for _ in range(2):
        with (
            torch.no_grad(),
            controlled(tiny.model, use, steps=STEPS),
            accelerated(tiny.model, method, steps=STEPS) as run,
        ):
            runs.append(sampled(tiny))
        assert run.report().forecast > 0
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert held(tiny) == before


MERGING = [
    TokenMerge(ratio=0.5, min_tokens=4, window=4, warmup=0, queries=queries) for queries in (True, False)
]


@pytest.mark.parametrize("method", MERGING, ids=str)
def test_merged_tokens_work_or_are_refused_in_words(tiny: Any, use: Use, method: Accelerator) -> None:
    before, words = held(tiny), ""
    with torch.no_grad(), controlled(tiny.model, use, steps=STEPS):
        wanted = sampled(tiny)
    try:
        with (
            torch.no_grad(),
            controlled(tiny.model, use, steps=STEPS),
            accelerated(tiny.model, method, steps=STEPS),
        ):
            found = sampled(tiny)
        assert all(torch.isfinite(one).all() for one in found)
        assert not torch.equal(found[-1], wanted[-1])
    except (Refused, RefusedByAccelerator, Untouched) as error:
        words = str(error)
        assert len(words) > 20
    assert held(tiny) == before
    if use.adapter.control.name != "relactrl":
        assert not words


def test_the_other_way_round_is_refused(tiny: Any, use: Use) -> None:
    with accelerated(tiny.model, DeltaCache(interval=1), steps=STEPS):
        with pytest.raises(Refused, match="controlled\\(\\) goes outside and accelerated\\(\\) inside"):
            with controlled(tiny.model, use, steps=STEPS):
                pass


def test_a_window_under_an_accelerator_acts_in_its_steps_alone(tiny: Any, use: Use) -> None:
    part = Use(use.adapter, use.condition, end=0.5)
    with torch.no_grad(), controlled(tiny.model, part, steps=STEPS) as run:
        with accelerated(tiny.model, DeltaCache(interval=2, warmup=1, mode="rear"), steps=STEPS):
            found = sampled(tiny)
    assert run.report().uses[0]["calls"] == STEPS // 2 * len(BRANCHES)
    with torch.no_grad(), accelerated(tiny.model, DeltaCache(interval=2, warmup=1, mode="rear"), steps=STEPS):
        plain = sampled(tiny)
    assert not torch.equal(found[0], plain[0])
    assert torch.equal(found[-2], plain[-2]), "the last step is computed in full, without the adapter"
