"""Exact runs are recorded as their scheduler sees them, and a forecast fitted to them serves the pipeline it came from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from acceleration.fitting import Course, Gram, distance, fit, settled
from acceleration.step_forecast import StepForecast
from pipelines.generate import Cancelled, generate
from pipelines.request import Request
from pipelines.schedulers import watched
from pipelines.trajectories import courses, recording

STEPS = 6


def asked(model: Any, **changes: Any) -> Request:
    return Request(model=str(model), prompt="dog", steps=STEPS, guidance=2.0, **changes)


def test_every_step_of_a_guided_run_is_recorded(tiny: str) -> None:
    gram = Gram()
    with recording(gram):
        generate(asked(tiny))
        generate(asked(tiny, seed=1))
    found = gram.trajectory()
    assert gram.pictures == 2
    assert found.gram.shape == (STEPS, STEPS)
    assert found.sigmas[0] == pytest.approx(1.0)
    assert found.sigmas[-1] == 0.0
    assert torch.linalg.eigvalsh(found.gram).min() > -1e-6  # inner products of real vectors
    assert (found.gram.diagonal() > 0).all()


def test_recording_changes_no_picture(tiny: str) -> None:
    plain = generate(asked(tiny))
    with recording(Gram()):
        seen = generate(asked(tiny))
    assert plain.images[0].tobytes() == seen.images[0].tobytes()


def test_fitted_forecast_skips_steps_of_the_model_it_was_fitted_to(tiny: str) -> None:
    gram = Gram()
    with recording(gram):
        for seed in range(3):
            generate(asked(tiny, seed=seed))
    method = fit(gram.trajectory(), 3)
    made = generate(asked(tiny, accelerators=(method,)))
    run = made.report["run"]
    assert method.mask is not None
    assert run["fraction"] == pytest.approx(0.5)
    assert [bool(cell.get("step forecast")) for cell in run["cells"]].count(True) % 3 == 0


def test_courses_hold_every_latent_and_a_refit_brings_runs_nearer(tiny: str) -> None:
    def made(*methods: StepForecast) -> list[Course]:
        with courses() as found:
            for seed in range(3):
                generate(asked(tiny, seed=seed, accelerators=methods))
        return found

    exact, gram = made(), Gram()
    assert len(exact) == 3
    for one in exact:
        moves = torch.tensor(one.sigmas).diff().view(-1, *[1] * (one.velocities.ndim - 1)) * one.velocities
        torch.testing.assert_close(one.places[1:] - one.places[:-1], moves, atol=1e-5, rtol=1e-4)
        gram.add([velocity[None] for velocity in one.velocities], one.sigmas)
    method = fit(gram.trajectory(), 2)
    better = settled(method, exact, made)
    assert better.mask == method.mask
    assert distance(exact, made(better)) < distance(exact, made(method))


def test_other_schedulers_and_runs_cut_short_are_left_out(tiny: str) -> None:
    gram = Gram()
    with recording(gram):
        generate(asked(tiny, scheduler="heun"))
        with pytest.raises(Cancelled):
            generate(asked(tiny), on_step=lambda progress: progress.step < 2)
    assert gram.pictures == 0


def test_watching_ends_with_its_block(tiny: str) -> None:
    seen: list[Any] = []
    with watched(seen.append):
        generate(asked(tiny))
    generate(asked(tiny))
    assert len(seen) == 1
