from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from acceleration import StepForecast, accelerated
from acceleration.fitting import Course, Gram, Trajectory, distance, error, fit, refit, settled
from acceleration.step_forecast import _gaps, _read

STEPS = 8


def levels(steps: int = STEPS) -> list[float]:
    return [(1 - i / steps) ** 1.5 for i in range(steps + 1)]


def curves(steps: int = STEPS, pictures: int = 4, seed: int = 0) -> list[Tensor]:
    """Velocities that bend along the run, another way for each picture: [steps] of [pictures, 6]."""
    draw = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(pictures, 6, generator=draw) for _ in range(3))
    return [a + b * level + c * torch.sin(torch.tensor(5.0 * level)) for level in levels(steps)[:-1]]


def recorded(**given: Any) -> Trajectory:
    gram = Gram()
    gram.add(curves(**given), levels(given.get("steps", STEPS)))
    return gram.trajectory()


def end(velocities: list[Tensor], method: StepForecast) -> Tensor:
    """Where Euler's method arrives from 0 with the forecast, worked out here by hand."""
    at, kept, sigmas = torch.zeros_like(velocities[0]), [], levels(len(velocities))
    rows = dict(
        zip((first for first, _ in _gaps(method.mask or "")), _read("", method.weights or "0"), strict=False)
    )
    made = None
    for step, velocity in enumerate(velocities):
        if method.skips(step, len(velocities)):
            if step in rows:
                made = sum(w * v for w, v in zip(rows[step], kept[-len(rows[step]) :], strict=True))
            used = made
        else:
            kept.append(velocity)
            used = velocity
        at = at + (sigmas[step + 1] - sigmas[step]) * used
    return at


def test_full_steps_leave_nothing_to_forecast() -> None:
    method = fit(recorded(), STEPS)
    assert method.mask == "1" * STEPS
    assert method.weights is None
    assert method.neutral


@pytest.mark.parametrize("full", [2, 3, 5])
def test_fit_is_the_best_choice_of_steps(full: int) -> None:
    trajectory = recorded()
    method = fit(trajectory, full)
    assert method.mask is not None
    assert method.mask.count("1") == full
    others = [
        "1" + "".join("1" if i in chosen else "0" for i in range(1, STEPS))
        for chosen in itertools.combinations(range(1, STEPS), full - 1)
    ]
    best = min(error(trajectory, mask) for mask in others)
    assert error(trajectory, method.mask) == pytest.approx(best, rel=1e-9)


def test_estimated_error_is_the_real_one_where_segments_are_alone() -> None:
    """With one full step the whole run is one segment: its squared error is that of the end."""
    velocities, trajectory = curves(), recorded()
    method = fit(trajectory, 1)
    exact = sum((b - a) * v for a, b, v in zip(levels(), levels()[1:], velocities, strict=False))
    real = float((end(velocities, method) - exact).square().mean())
    assert real == pytest.approx(error(trajectory, method.mask or ""), rel=1e-3)


def test_more_full_steps_come_nearer_also_on_other_pictures() -> None:
    trajectory, other = recorded(pictures=64), curves(pictures=16, seed=9)
    exact = sum((b - a) * v for a, b, v in zip(levels(), levels()[1:], other, strict=False))
    gaps = [float((end(other, fit(trajectory, full)) - exact).norm()) for full in (1, 2, 4, 6)]
    assert max(gaps[1:3]) < 0.2 * gaps[0]
    assert gaps[3] < 0.3 * min(gaps[1:3])


def test_fitted_weights_do_in_a_run_what_they_promise(toy: Any) -> None:
    class Given(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = toy.model.blocks

        def forward(self, hidden_states: Tensor, timestep: Any) -> Tensor:
            return self.blocks[0](hidden_states, temb=torch.as_tensor(timestep).reshape(1, 1, 1))

    model, x = Given().eval(), torch.randn(1, 5, 8)

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [model(x * (1 + step / 4), 1 - step / STEPS) for step in range(STEPS)]

    exact = run()
    gram = Gram()
    gram.add(exact, levels())
    method = fit(gram.trajectory(), 4)
    with accelerated(model, method, steps=STEPS) as tally:
        made = run()
    assert tally.report().forecast == STEPS - 4
    for step, (a, b) in enumerate(zip(made, exact, strict=True)):
        assert torch.equal(a, b) is not method.skips(step, STEPS)
    moved = sum((b - a) * v for a, b, v in zip(levels(), levels()[1:], made, strict=False))
    torch.testing.assert_close(moved, end(exact, method), atol=1e-5, rtol=1e-4)


def test_recordings_add_up_picture_by_picture() -> None:
    parts, whole = Gram(), Gram()
    velocities = curves(pictures=5)
    whole.add(velocities, levels())
    parts.add([one[:2] for one in velocities], levels())
    parts.add([one[2:] for one in velocities], levels())
    assert parts.pictures == whole.pictures == 5
    torch.testing.assert_close(parts.trajectory().gram, whole.trajectory().gram)


def test_what_cannot_be_fitted_is_said() -> None:
    gram = Gram()
    with pytest.raises(ValueError, match="no run"):
        gram.trajectory()
    gram.add(curves(), levels())
    with pytest.raises(ValueError, match="same noise levels"):
        gram.add(curves(), [2 * one for one in levels()])
    for bad in (0, STEPS + 1, True, 2.0):
        with pytest.raises(ValueError, match="full_steps must be"):
            fit(gram.trajectory(), bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="belong to inner products"):
        Trajectory(torch.eye(3), (1.0, 0.0))
    with pytest.raises(ValueError, match="must fall"):
        Trajectory(torch.eye(2), (1.0, 1.0, 0.0))


def bent(x: Tensor, level: float) -> Tensor:
    """A velocity that depends on where the picture stands, so that a forecast run leaves the exact path."""
    turn = torch.randn(x.shape[-1], x.shape[-1], generator=torch.Generator().manual_seed(7))
    return torch.tanh(2 * x @ turn) * (1 + level) - x * torch.cos(torch.tensor(4 * level))


def driven(method: StepForecast | None = None, pictures: int = 24, seed: int = 0) -> list[Course]:
    """Euler's method over `bent`, exact or with a forecast, worked out here by hand."""
    draw, sigmas = torch.Generator().manual_seed(seed), levels()
    at = torch.randn(pictures, 6, generator=draw)
    places, moves, kept = [at], [], []
    rows = {} if method is None else method.rows()
    for step in range(STEPS):
        if step in rows:
            used = sum(w * v for w, v in zip(rows[step], kept[-len(rows[step]) :], strict=True))
        else:
            used = bent(at, sigmas[step])
            kept.append(used)
        at = at + (sigmas[step + 1] - sigmas[step]) * used
        places.append(at)
        moves.append(used)
    return [
        Course(*one, tuple(sigmas)) for one in zip(torch.stack(places, 1), torch.stack(moves, 1), strict=True)
    ]


def fitted(full: int, exact: list[Course]) -> StepForecast:
    gram = Gram()
    for one in exact:
        gram.add([velocity[None] for velocity in one.velocities], one.sigmas)
    return fit(gram.trajectory(), full)


@pytest.mark.parametrize("full", [2, 3, 4])
def test_a_refit_follows_the_path_that_the_forecast_takes(full: int) -> None:
    exact, other = driven(), driven(seed=5)
    method = fitted(full, exact)
    found = settled(method, exact, driven)
    assert found.mask == method.mask
    assert distance(exact, driven(found)) < distance(exact, driven(method)) - 0.05
    assert distance(other, driven(found, seed=5)) < distance(other, driven(method, seed=5))


def test_a_refit_of_the_last_steps_is_the_best_combination() -> None:
    """Whatever is added to its weights, the mean of the logs of the errors grows."""
    exact = driven()
    method = fitted(3, exact)
    for _ in range(6):
        method = refit(method, exact, driven(method))
    best = distance(exact, driven(method))
    *before, last = (method.weights or "").split("_")
    weights = [float(one) for one in last.split("/")]
    assert len(weights) == 3, "the last run of forecast steps combines three computed velocities"
    for place in range(3):
        for sign in (-0.05, 0.05):
            moved = [w + sign * (place == i) for i, w in enumerate(weights)]
            row = "/".join(map(str, moved))
            changed = StepForecast(mask=method.mask, weights="_".join([*before, row]))
            assert distance(exact, driven(changed)) > best


def test_settled_never_returns_a_worse_forecast() -> None:
    exact = driven()
    method = fitted(3, exact)
    spoiled = [Course(one.places * 0 + 9, one.velocities, one.sigmas) for one in exact]
    runs = iter([driven(method), *[spoiled] * 3])
    assert settled(method, exact, lambda _: next(runs)) == method


def test_what_does_not_belong_together_is_refused() -> None:
    exact = driven()
    method = fitted(3, exact)
    made = driven(method)
    for wrong in (
        lambda: refit(method, exact, made[1:]),
        lambda: refit(StepForecast(interval=2), exact, made),
        lambda: refit(StepForecast(mask="10", weights="1"), exact, made),
        lambda: refit(method, [], []),
        lambda: Course(made[0].places[1:], made[0].velocities, made[0].sigmas),
    ):
        with pytest.raises(ValueError, match=r"refit|course"):
            wrong()


def test_one_full_step_and_all_of_them() -> None:
    exact = driven()
    assert refit(fitted(STEPS, exact), exact, driven()).neutral
    one = settled(fitted(1, exact), exact, driven)
    assert (one.weights or "").count("/") == 0
