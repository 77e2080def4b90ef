from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from acceleration import Accelerator, DeltaCache, Refused, TaylorCache, accelerated
from acceleration._latents import latents_of, relative, wiener
from acceleration.calibrate import Profile, calibrate, calibrated
from acceleration.gates import Gate, Judge, Sight, gate_for
from dit.seams import announce
from dit.spec import kinds, parse


def cells(toy: Any, method: Any, steps: int = 10) -> list[dict[str, Any]]:
    with accelerated(toy.model, method, steps=steps) as run:
        toy.run(steps)
    return run.report().cells


@pytest.mark.parametrize("name", sorted(kinds(Gate)))
def test_a_method_resolves_every_gate_from_plain_knobs(name: str) -> None:
    more = ",mask=1110" if name == "mask" else ""
    method = parse(Accelerator, f"taylor-cache:gate={name}{more}")
    assert isinstance(method, TaylorCache)
    assert method.gating().name == name
    assert parse(Accelerator, str(method)) == method


def test_knobs_reach_the_gate() -> None:
    gate: Any = TaylorCache(gate="confidence", threshold=0.03, limit=2, budget=4.0, order=2).gating()
    assert (gate.threshold, gate.limit, gate.budget, gate.order) == (0.03, 2, 4.0, 2)
    assert gate.bounds() == (0.03, 2, 0.12)
    assert gate_for(TaylorCache(warmup=4, interval=3), offset=3).plans(4)


@pytest.mark.parametrize("mask", [None, "", "10x"])
def test_a_wrong_mask_is_refused(mask: Any) -> None:
    with pytest.raises(ValueError, match="must be a row of 1"):
        TaylorCache(gate="mask", mask=mask)


@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"limit": 0}])
@pytest.mark.parametrize("gate", ["confidence", "first-block", "spectral"])
def test_gates_that_never_open_are_neutral(toy: Any, gate: str, settings: Any) -> None:
    plain = toy.run()
    with accelerated(toy.model, TaylorCache(gate=gate, **settings), steps=10):
        assert all(torch.equal(a, b) for a, b in zip(plain, toy.run(), strict=True))


def test_a_mask_is_followed_and_steps_beyond_it_are_full(toy: Any) -> None:
    found = cells(toy, TaylorCache(gate="mask", mask="1110010"))
    assert "".join(cell["states"][-1] for cell in found) == "CCCFFCFCCC"
    assert "signal" not in found[3]


@pytest.mark.parametrize("gate", ["confidence", "first-block", "spectral"])
def test_signal_threshold_and_decision_stand_in_the_report(toy: Any, gate: str) -> None:
    found = cells(toy, TaylorCache(gate=gate, threshold=9.0, limit=2, budget=100.0))
    assert "".join(cell["states"][-1] for cell in found) == "CCCFFCFFCC"
    assert found[0]["signal"] is None
    assert all(math.isfinite(cell["signal"]) for cell in found[1:])
    assert {cell["threshold"] for cell in found} == {9.0}
    assert found[3]["decision"] == "shortened: below the threshold"
    assert found[5]["decision"] == "full: too many steps since the last full one"
    assert found[9]["decision"] == "full: full by plan"
    assert [cell["states"][0] for cell in found] == ["C"] * 10  # the first block always


def test_a_gate_that_stays_shut_says_so_and_does_not_fail(toy: Any) -> None:
    found = cells(toy, TaylorCache(gate="first-block", threshold=1e-9))
    assert {cell["states"] for cell in found} == {"CCCCCC"}
    assert found[4]["decision"] == "full: above the threshold"


def test_delta_cache_takes_a_gate(toy: Any) -> None:
    found = cells(toy, DeltaCache(mode="whole", gate="first-block", threshold=9.0, limit=3))
    assert "".join(cell["states"][-1] for cell in found) == "CCRRRCRRRC"
    assert found[2]["states"] == "CRRRRR"


def test_the_errors_that_add_up_are_bounded() -> None:
    gate: Any = TaylorCache(gate="first-block", threshold=0.1, budget=1.5).gating()
    judge, x = Judge(gate), torch.ones(1, 2, 2)
    shortened = [
        judge.decide(Sight(step, step, {}, None, x * 0, x * size), None).shorten
        for step, size in enumerate((1.0, 1.08, 1.06, 1.06, 1.14))
    ]
    assert shortened == [False, True, True, False, True]


def test_the_sample_that_changed_most_decides() -> None:
    x = torch.ones(4, 3, 2)
    y = x.clone()
    y[2] *= 1.5
    assert relative(y, x) == pytest.approx(0.5)
    assert relative(x * 0, x * 0) == 0.0
    assert math.isnan(relative(y * math.nan, x))


def test_what_is_not_finite_is_computed() -> None:
    gate: Any = TaylorCache(gate="first-block", threshold=9.0).gating()
    judge, x = Judge(gate), torch.ones(1, 2, 2)
    judge.decide(Sight(0, 0, {}, None, x * 0, x), None)
    verdict = judge.decide(Sight(1, 1, {}, None, x * 0, x * math.nan), None)
    assert (verdict.shorten, verdict.signal) == (False, None)


def test_the_filter_keeps_coarse_forms_and_drops_noise() -> None:
    rows = torch.arange(32).float()
    wave = torch.cos(2 * math.pi * rows / 32).expand(1, 1, 32, 32)
    noise = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    kept = wiener(wave, 0.8, 2.0).norm() / wave.norm()
    left = wiener(noise, 0.8, 2.0).norm() / noise.norm()
    assert kept > 2 * left
    clean = wiener(noise, 0.0, 2.0)
    assert torch.allclose(clean, noise, atol=1e-2)


def test_tokens_are_laid_out_by_their_positions() -> None:
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(2.0), torch.arange(3.0), indexing="ij"), -1)
    tokens = torch.arange(6.0).reshape(1, 6, 1)
    (grid,) = latents_of({"hidden_states": tokens, "img_ids": ids.reshape(6, 3)})
    assert grid.tolist() == [[[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]]]
    assert latents_of({"hidden_states": torch.zeros(1, 5, 2)})[0].shape == (1, 2, 1, 5)


@pytest.mark.parametrize("gate", ["confidence", "first-block", "spectral"])
def test_calibration_is_exact_and_its_threshold_does_what_was_wished(
    toy: Any, gate: str, tmp_path: Path
) -> None:
    plain, method = toy.run(20), TaylorCache(gate=gate)
    played: list[Any] = []
    about = {"digest": "d", "scheduler": "euler", "steps": 20}
    profile = calibrate(toy.model, method, lambda: played.extend(toy.run(20)), **about)
    assert all(torch.equal(a, b) for a, b in zip(plain, played, strict=True))
    assert [row["step"] for row in profile.trace] == list(range(20))
    assert all(row["error"] is not None for row in profile.trace[1:])
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    tuned = profile.tuned(**about, speedup=1.3)
    with accelerated(toy.model, tuned, steps=20) as run:
        toy.run(20)
    assert run.report().fraction <= 1 / 1.2
    assert profile.threshold(error=0.0) <= profile.threshold(error=1.0)
    with pytest.raises(ValueError, match="speedup must be at most"):
        profile.threshold(speedup=99)
    with pytest.raises(ValueError, match="profile is for steps 20, got 28"):
        profile.tuned(**about | {"steps": 28}, speedup=1.3)


def test_a_calibration_is_stored_for_its_checkpoint_scheduler_and_steps(toy: Any, tmp_path: Path) -> None:
    played: list[int] = []

    def threshold(method: TaylorCache, steps: int = 20, speedup: float = 1.3, **about: str) -> Any:
        def play() -> None:
            played.append(steps)
            toy.run(steps)

        known = {"digest": "a", "scheduler": "euler"} | about
        return calibrated(
            toy.model, method, play, folder=tmp_path / "new", steps=steps, speedup=speedup, **known
        ).threshold  # type: ignore[arg-type]

    method = TaylorCache(gate="confidence")
    first = threshold(method)
    assert threshold(method) == first == threshold(method.replace(threshold=0.7))
    assert threshold(method, speedup=1.6) >= first
    assert played == [20]  # once, whatever is wished for
    threshold(method, digest="b")
    threshold(method, scheduler="heun")
    threshold(method, steps=12)
    threshold(method.replace(gate="first-block"))
    threshold(method.replace(order=1))
    assert played == [20, 20, 20, 12, 20, 20]
    stored = sorted((tmp_path / "new").iterdir())
    assert len(stored) == 6
    assert {one.suffix for one in stored} == {".json"}
    for one in stored:
        one.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is no calibration profile"):
        threshold(method)


@pytest.mark.parametrize("gate", ["confidence", "first-block", "spectral"])
def test_one_sample_that_jumps_makes_the_whole_call_full(toy: Any, gate: str) -> None:
    """Seven samples stand still: by their mean the call would be shortened, by the one that moves it may not."""
    x = toy.x.expand(8, -1, -1).clone()
    found = {}
    for jumps in (False, True):
        with (
            torch.no_grad(),
            accelerated(toy.model, TaylorCache(gate=gate, threshold=0.3, fresh=1, order=0), steps=8) as run,
        ):
            for step in range(8):
                moved = x.clone()
                moved[5] *= 3.0 if jumps and step >= 5 else 1.0
                announce(toy.model, step=step)
                toy.model(moved, 0.5)
        found[jumps] = run.report().cells
    assert [cell["states"][-1] for cell in found[False]] == list("CCCFFFFC")
    assert [cell["states"][-1] for cell in found[True]][:6] == list("CCCFFC")
    assert found[True][5]["decision"] == "full: above the threshold"
    assert found[True][5]["signal"] > 0.3 > found[True][5]["signal"] / 8  # the mean lies below


def test_a_plan_cannot_be_calibrated(toy: Any) -> None:
    with pytest.raises(Refused, match="only a gate that measures"):
        calibrate(toy.model, TaylorCache(), toy.run, steps=10)
