from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from acceleration import Refused, StepForecast, TaylorCache, Untouched, accelerated
from acceleration.step_forecast import _read
from dit.seams import announce
from dit.spec import parse

STEPS = 10


def states(run: Any) -> list[bool]:
    return [bool(cell.get("step forecast")) for cell in run.report().cells]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "1101010101"),
        ({"interval": 3}, "1100100101"),
        ({"interval": 4, "warmup": 1, "final_full": 0}, "1000100010"),
        ({"mask": "1000010000"}, "1000010000"),
    ],
)
def test_steps_follow_interval_or_mask(toy: Any, settings: dict[str, Any], expected: str) -> None:
    method = StepForecast(**settings)
    with accelerated(toy.model, method, steps=STEPS) as run:
        toy.run(STEPS)
    assert "".join("0" if skipped else "1" for skipped in states(run)) == expected
    report = run.report()
    assert report.forecast == 6 * expected.count("0")
    assert report.computed == 6 * expected.count("1")
    assert report.predicted_speedup == pytest.approx(STEPS / expected.count("1"))


@pytest.mark.parametrize("order", [0, 1, 2])
@torch.no_grad()
def test_polynomials_of_the_order_are_forecast_exactly(toy: Any, order: int) -> None:
    class Curve(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = toy.model.blocks

        def forward(self, hidden_states: Tensor, timestep: float) -> Tensor:
            x = hidden_states
            for block in self.blocks:
                x = block(x, temb=torch.ones(1, 1, 1))
            return x * (1 + sum((3 * timestep) ** k for k in range(1, order + 1)))

    model, x = Curve(), torch.randn(1, 3, 8)

    def run() -> list[Tensor]:
        return [model(x, 1 - step / STEPS) for step in range(STEPS)]

    exact = run()
    with accelerated(model, StepForecast(order=order, warmup=3, interval=2), steps=STEPS):
        made = run()
    for a, b in zip(made, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_weights_give_one_answer_for_a_run_of_steps(toy: Any) -> None:
    exact = toy.run(STEPS)
    method = StepForecast(mask="1100010000", weights="-0.5/1.5_2")
    with accelerated(toy.model, method, steps=STEPS) as run:
        made = toy.run(STEPS)
    assert sum(states(run)) == 7
    for step in (2, 3, 4):
        torch.testing.assert_close(made[step], -0.5 * exact[0] + 1.5 * exact[1])
    for step in (6, 7, 8, 9):
        torch.testing.assert_close(made[step], 2 * exact[5])
    assert made[2] is not made[3]  # a pipeline may write into what it is given


def test_the_weights_are_read_once_a_run(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method = StepForecast(mask="1100010000", weights="-0.5/1.5_2")
    assert method.rows() == {2: (-0.5, 1.5), 3: (-0.5, 1.5), 4: (-0.5, 1.5), 6: (2.0,), 7: (2.0,), 8: (2.0,), 9: (2.0,)}
    assert StepForecast(mask="1100010000").rows() == {}
    texts: list[str] = []

    def reading(name: str, weights: str) -> list[tuple[float, ...]]:
        texts.append(weights)
        return _read(name, weights)

    monkeypatch.setattr("acceleration.step_forecast._read", reading)
    with accelerated(toy.model, method, steps=STEPS):
        toy.run(STEPS)
    assert texts == ["-0.5/1.5_2"]


def test_branches_do_not_mix(toy: Any) -> None:
    other = torch.randn_like(toy.x)

    @torch.no_grad()
    def run(branches: tuple[str, ...]) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {name: [] for name in branches}
        for step in range(STEPS):
            for name in branches:
                announce(toy.model, step=step, branch=name)
                x = toy.x if name == "cond" else other
                found[name].append(toy.model(x * (1 + step / 9), 1 - step / STEPS))
        return found

    with accelerated(toy.model, StepForecast(), steps=STEPS):
        both = run(("cond", "uncond"))
    with accelerated(toy.model, StepForecast(), steps=STEPS):
        alone = run(("uncond",))
    assert all(torch.equal(a, b) for a, b in zip(both["uncond"], alone["uncond"], strict=True))


def test_another_size_or_another_run_starts_anew(toy: Any) -> None:
    with accelerated(toy.model, StepForecast(), steps=STEPS) as run, torch.no_grad():
        first = toy.run(STEPS)
        for step in range(4):  # cut short
            toy.model(toy.x * (1 + step / 9), 1 - step / STEPS)
        run.begin(STEPS)
        toy.x = torch.cat([toy.x, toy.x], dim=1)
        toy.run(STEPS)
        run.begin(STEPS)
        toy.x = toy.x[:, :5]
        again = toy.run(STEPS)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_mask_for_other_steps_is_no_silent_exact_run(toy: Any) -> None:
    with pytest.raises(Untouched, match="mask is of 4 steps, the run has 10"), accelerated(
        toy.model, StepForecast(mask="1010"), steps=STEPS
    ):
        toy.run(STEPS)


def test_caches_of_blocks_are_another_way_to_do_the_same(toy: Any) -> None:
    with pytest.raises(Refused, match="choose one of them"), accelerated(toy.model, StepForecast(), TaylorCache()):
        pass


def test_report_and_text_form(toy: Any) -> None:
    method = StepForecast(mask="1100010000", weights="-0.5/1.5_2")
    from acceleration import Accelerator

    assert parse(Accelerator, str(method)) == method
    assert parse(Accelerator, json.loads(json.dumps(method.to_dict()))) == method
    with accelerated(toy.model, method, steps=STEPS) as run:
        toy.run(STEPS)
    report = run.report()
    assert "7 of 10 calls" in report.effective[0]
    assert report.bytes == 2 * toy.x.numel() * 4
    assert json.loads(json.dumps(report.to_dict()))["cells"][2]["states"] == "FFFFFF"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask": "0110"}, "begins with 1"),
        ({"mask": "1a"}, "row of 1 and 0"),
        ({"weights": "1/2"}, "belong to the steps of a mask"),
        ({"mask": "1010", "weights": "1"}, "2 runs of forecast steps, weights are given for 1"),
        ({"mask": "1011", "weights": "1/2"}, "fewer full steps"),
        ({"mask": "111101", "weights": "1/2/3/4"}, "one to 3 finite"),
        ({"mask": "11011", "weights": "1/nan"}, "one to 3 finite"),
        ({"mask": "11011", "weights": "x"}, "numbers a/b"),
        ({"variable": "time"}, "one of sigma, logit, index"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StepForecast(**settings)
