"""Every accelerator on tiny random models of diffusers' own classes (`TABLE` in conftest.py): exact where it must be,
gone without a trace.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acceleration import Accelerator, Refused, RunReport, accelerated
from dit.seams import announce, blocks_of, observed
from dit.spec import kinds, parse

# diffusers' own Chroma imports a name that diffusers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")


def neutral(cls: type[Accelerator]) -> Accelerator:
    """Return the settings of a method that change nothing."""
    found = {
        "delta-cache": {"interval": 1},
        "taylor-cache": {"interval": 1},
        "adaspa": {"density": 1.0},
        "xattention": {"threshold": 1.0},
        "token-merge": {"ratio": 0.0},
        "guidance-skip": {"interval": 1},
        "step-forecast": {"interval": 1},
    }[cls.name]
    method = cls(**found)
    assert method.neutral
    return method


def eager(cls: type[Accelerator]) -> list[Accelerator]:
    """Return settings of a method that save much in few steps, one for each way it can work."""
    modes = ("stage", "rear", "front", "whole")
    few = {"interval": 3, "warmup": 1, "final_full": 1}
    found: dict[str, list[dict[str, Any]]] = {
        "delta-cache": [few | {"mode": mode} for mode in modes]
        + [{"mode": "whole", "warmup": 1, "gate": "first-block", "threshold": 5.0, "limit": 2}],
        "taylor-cache": [
            few | {"fresh": 0, "order": 0},
            few | {"variable": "sigma", "order": 2, "offload": True},
            {"warmup": 2, "gate": "confidence", "threshold": 5.0, "limit": 2},
            {"warmup": 2, "gate": "spectral", "threshold": 5.0, "limit": 2},
        ],
        "step-forecast": [few, few | {"order": 0, "variable": "index"}, few | {"order": 2, "variable": "logit"}],
    }
    # Methods that decide about something else than blocks are in test_sparse_accelerators.py.
    return [cls(**settings) for settings in found.get(cls.name, ())]


METHODS = list(kinds(Accelerator).values())
EAGER = [method for cls in METHODS for method in eager(cls)]


def state_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return all that hangs on the modules of a model, by identity, down to the entries of its hook tables."""
    return {
        name: {
            key: {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
            for key, value in module.__dict__.items()
        }
        for name, module in model.named_modules()
    }


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[list[str]]:
    """Count the forwards of blocks that really happen, below whatever an accelerator attaches."""
    calls: list[str] = []
    blocks = list(blocks_of(model))
    for block in blocks:
        inner = block.module.forward

        def forward(*args: Any, _path: str = block.path, _inner: Any = inner, **kwargs: Any) -> Any:
            calls.append(_path)
            return _inner(*args, **kwargs)

        block.module.__dict__["forward"] = forward
    try:
        yield calls
    finally:
        for block in blocks:
            del block.module.__dict__["forward"]


def check_tally(report: RunReport, calls: list[str]) -> None:
    letters = "".join(cell["states"] for cell in report.cells)
    assert report.computed == len(calls) == letters.count("C")
    assert report.reused == letters.count("R")
    assert report.forecast == letters.count("F")


def test_every_block_has_streams(tiny: Any) -> None:
    with observed(tiny.model) as visits:
        tiny.call(tiny.inputs(), 1.0)
    assert [visit.path for visit in visits if isinstance(visit.streams, str)] == []
    assert {visit.path for visit in visits} == {block.path for block in blocks_of(tiny.model)}
    forms = [{name: v.inputs[name] for name in v.streams.names if name} for v in visits]  # type: ignore[union-attr]
    joins = sum(not after.items() <= form.items() for form, after in itertools.pairwise(forms))
    assert joins == tiny.family.joins


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.name)
def test_neutral_is_bit_equal_and_nothing_stays(tiny: Any, cls: type[Accelerator]) -> None:
    given, before = tiny.inputs(), state_of(tiny.model)
    plain = tiny.sample(given)
    with accelerated(tiny.model, neutral(cls), steps=tiny.steps) as run:
        same = tiny.sample(given)
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    assert run.report().reused == run.report().forecast == 0
    assert state_of(tiny.model) == before


@pytest.mark.parametrize("method", EAGER, ids=str)
def test_saves_repeats_and_restores(tiny: Any, method: Accelerator) -> None:
    given, before = tiny.inputs(), state_of(tiny.model)
    plain = tiny.sample(given)
    with counted(tiny.model) as calls:
        with accelerated(tiny.model, method, steps=tiny.steps) as run:
            first, half = tiny.sample(given), len(calls)
            second = tiny.sample(given)  # a new run: the time has turned back
        report = run.report()
        check_tally(report, calls)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(calls) == 2 * half < 2 * tiny.steps * report.blocks
    assert not all(torch.equal(a, b) for a, b in zip(plain, first, strict=True))
    assert [cell["step"] for cell in report.cells] == [*range(tiny.steps)] * 2
    assert report.bytes > 0
    assert json.loads(json.dumps(report.to_dict()))["requested"] == [method.to_dict()]
    assert state_of(tiny.model) == before
    assert all(torch.equal(a, b) for a, b in zip(plain, tiny.sample(given), strict=True))


@pytest.mark.parametrize("method", EAGER, ids=str)
def test_identical_inputs_give_no_error(tiny: Any, method: Accelerator) -> None:
    given = tiny.inputs()
    plain = tiny.call(given, 1.0)
    for injected in ({}, tiny.residuals() if tiny.family.residuals else None):
        if injected is None:
            continue
        exact = tiny.call(given | injected, 1.0)
        assert not injected or not torch.allclose(exact, plain, atol=1e-3)
        with accelerated(tiny.model, method, steps=tiny.steps) as run:
            for step in range(tiny.steps):
                announce(tiny.model, step=step)
                error = (tiny.call(given | injected, 1.0) - exact).norm() / exact.norm()
                assert error < 3e-6, (step, list(injected))
        assert run.report().reused + run.report().forecast > 0


@pytest.mark.parametrize("method", EAGER, ids=str)
def test_a_run_cut_short_leaves_nothing_behind(tiny: Any, method: Accelerator) -> None:
    small, large, before = tiny.inputs(rows=4), tiny.inputs(rows=8), state_of(tiny.model)
    with accelerated(tiny.model, method, steps=tiny.steps):
        expected = tiny.sample(large)
    with accelerated(tiny.model, method, steps=tiny.steps):
        tiny.sample(small, stop=4)
        after_cut = tiny.sample(large)
    assert all(torch.equal(a, b) for a, b in zip(expected, after_cut, strict=True))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def interrupted() -> None:
        with accelerated(tiny.model, method, steps=tiny.steps):
            tiny.sample(small, stop=3)
            last.register_forward_pre_hook(interrupt)
            tiny.sample(small)

    last = list(blocks_of(tiny.model))[-1].module
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    last._forward_pre_hooks.clear()
    assert state_of(tiny.model) == before


@pytest.mark.parametrize("method", EAGER, ids=str)
def test_guidance_branches_do_not_mix(tiny: Any, method: Accelerator) -> None:
    cond, free = tiny.inputs(), tiny.inputs()
    outputs: dict[str, list[Tensor]] = {}
    for name, given in (("cond", cond), ("free", free)):
        with accelerated(tiny.model, method, steps=tiny.steps):
            outputs[name] = tiny.sample(given)

    first = next(iter(cond))
    for skipped in ((), (3, 4), (0, 1, 2)):  # guidance switched off for these steps
        with accelerated(tiny.model, method, steps=tiny.steps):
            for step in range(tiny.steps):
                scale, time = 1 - step / (2 * tiny.steps), 1 - step / tiny.steps
                for given, name in ((free, "free"), (cond, "cond")):
                    if name == "free" and step in skipped:
                        continue
                    x = given[first]
                    moved = [one * scale for one in x] if isinstance(x, list) else x * scale
                    output = tiny.call(given | {first: moved}, time)
                    if name == "cond" or not skipped:
                        assert torch.equal(output, outputs[name][step]), (name, step, skipped)


@pytest.mark.parametrize("method", EAGER, ids=str)
def test_a_shrinking_batch_starts_anew(tiny: Any, method: Accelerator) -> None:
    two, one = tiny.inputs(images=2), tiny.inputs(images=1)
    first = next(iter(two))
    with accelerated(tiny.model, method, steps=tiny.steps) as run:
        for step in range(tiny.steps):
            given = two if step < tiny.steps // 2 else one
            tiny.call(given | {first: given[first]}, 1 - step / tiny.steps)
    states = [cell["states"] for cell in run.report().cells]
    assert set(states[tiny.steps // 2]) == {"C"}
    assert any(set(cell) != {"C"} for cell in states)


@pytest.mark.parametrize("method", EAGER, ids=str)
@pytest.mark.parametrize("told", [False, True], ids=["by-timestep", "announced"])
def test_two_evaluations_a_step(tiny: Any, method: Accelerator, told: bool) -> None:
    """Heun: t0, t1, t1, t2, t2, ...; no corrector is approximated after an approximated predictor."""
    given = tiny.inputs()
    first, calls = next(iter(given)), 2 * tiny.steps - 1
    outputs = []
    with accelerated(tiny.model, method, steps=tiny.steps) as run:
        for _ in range(2):
            for index in range(calls):
                if told:
                    announce(tiny.model, step=index // 2)
                scale = 1 - (index + 1) // 2 / (2 * tiny.steps) + index % 2 / 100
                x = given[first]
                moved = [one * scale for one in x] if isinstance(x, list) else x * scale
                outputs.append(tiny.call(given | {first: moved}, 1 - (index + 1) // 2 / tiny.steps))
    cells = run.report().cells
    steps = [index // 2 if told else (index + 1) // 2 for index in range(calls)]
    assert [cell["step"] for cell in cells] == steps * 2
    shortened = ["R" in cell["states"] or "F" in cell["states"] for cell in cells]
    assert any(shortened)
    pairs = [(index, index + 1) for index in range(0, calls - 1, 2)]  # predictor, its corrector
    assert not any(shortened[predictor] and shortened[corrector] for predictor, corrector in pairs)
    assert all(torch.equal(a, b) for a, b in zip(outputs[:calls], outputs[calls:], strict=True))


@pytest.mark.parametrize("method", EAGER[:1], ids=str)
def test_diffusers_own_hooks_stay_in_force(tiny: Any, method: Accelerator) -> None:
    """Weights kept in a small dtype and cast at each use, by hooks that replace the same forwards."""
    given = tiny.inputs()
    tiny.model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    plain, before = tiny.sample(given), state_of(tiny.model)
    with accelerated(tiny.model, method, steps=tiny.steps) as run:
        found = tiny.sample(given)
    assert run.report().reused + run.report().forecast > 0
    assert torch.equal(found[0], plain[0])
    assert state_of(tiny.model) == before
    assert all(torch.equal(a, b) for a, b in zip(plain, tiny.sample(given), strict=True))


@pytest.mark.parametrize("method", EAGER[:1], ids=str)
def test_cache_context_names_the_branches(tiny: Any, method: Accelerator) -> None:
    if not hasattr(tiny.model, "cache_context"):
        with accelerated(tiny.model, method):
            assert "cache_context" not in tiny.model.__dict__
        return
    given = tiny.inputs()
    with tiny.model.cache_context("cond"):
        before = tiny.call(given, 1.0)
    before_state = state_of(tiny.model)
    with accelerated(tiny.model, method, steps=tiny.steps) as run:
        for name in ("cond", "uncond"):
            with tiny.model.cache_context(name):
                assert torch.equal(tiny.call(given, 1.0), before)
    assert [cell["branch"] for cell in run.report().cells] == ["cond", "uncond"]
    assert state_of(tiny.model) == before_state


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.name)
def test_settings_make_the_round_trip(cls: type[Accelerator]) -> None:
    for method in (cls(), neutral(cls), *eager(cls)):
        assert parse(Accelerator, json.loads(json.dumps(method.to_dict()))) == method
        assert parse(Accelerator, str(method)) == method


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.name)
def test_what_has_no_blocks_is_refused_in_words(cls: type[Accelerator]) -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert "no stack of repeated blocks" in (cls().refuses(plain) or "")
    with pytest.raises(Refused, match=f"{cls.name}: Sequential has no stack"), accelerated(plain, cls()):
        pass
    assert "_leapfrog_run" not in plain.__dict__
