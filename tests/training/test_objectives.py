"""Flow matching: the perfect denoiser has no loss, time goes from noise to picture, and Euler walks straight lines exactly."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from training.objectives import FlowMatching, euler, stable_target


def some(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_the_true_velocity_has_no_loss() -> None:
    pictures, noise = some(5, 0), some(5, 1)
    times = torch.linspace(0.01, 1, 5)
    losses = FlowMatching().losses(lambda noisy, _: noise - pictures, pictures, noise, times)
    assert losses.shape == (5,)
    assert losses.abs().max() == 0


def test_the_denoiser_sees_the_picture_at_0_and_noise_at_1() -> None:
    pictures, noise = some(3, 0), some(3, 1)
    seen: list[tuple[Tensor, Tensor]] = []

    def denoiser(noisy: Tensor, times: Tensor) -> Tensor:
        seen.append((noisy, times))
        return torch.zeros_like(noisy)

    FlowMatching().losses(denoiser, pictures, noise, torch.tensor([0.0, 0.25, 1.0]))
    noisy, times = seen[0]
    assert torch.equal(noisy[0], pictures[0])
    torch.testing.assert_close(noisy[1], 0.75 * pictures[1] + 0.25 * noise[1])
    assert torch.equal(noisy[2], noise[2])
    assert times.tolist() == [0.0, 0.25, 1.0]


def test_of_clips_only_generated_sites_are_noisy_and_count() -> None:
    clips, noise = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 4, 4, 4)
    mask = torch.ones(2, 4, 4, 4)
    mask[0, :3], mask[1, :, :, 2:] = 0, 0
    times = torch.tensor([0.5, 0.9])
    seen: list[Tensor] = []

    def wrong_where_given(noisy: Tensor, times: Tensor) -> Tensor:
        seen.append(noisy)
        return noise - clips + torch.where(mask[:, None] > 0, 2.0, 50.0)

    losses = FlowMatching().losses(wrong_where_given, clips, noise, times, mask)
    torch.testing.assert_close(losses, torch.tensor([4.0, 4.0]))
    assert torch.equal(seen[0][0, :, :3], clips[0, :, :3])
    torch.testing.assert_close(seen[0][1, ..., :2], (0.1 * clips + 0.9 * noise)[1, ..., :2])
    everywhere = FlowMatching().losses(wrong_where_given, clips, noise, times)
    assert everywhere[0] == pytest.approx((3 * 2500 + 4) / 4)


def test_a_target_of_its_own_is_learnt_from_the_same_noisy_pictures() -> None:
    pictures, noise, target = some(4, 0), some(4, 1), some(4, 2)
    times = torch.tensor([0.1, 0.5, 0.9, 1.0])
    seen: list[Tensor] = []

    def to_target(noisy: Tensor, times: Tensor) -> Tensor:
        seen.append(noisy)
        return (noisy - target) / times.reshape(-1, 1, 1, 1)

    assert FlowMatching().losses(to_target, pictures, noise, times, target=target).max() < 1e-9
    assert FlowMatching().losses(to_target, pictures, noise, times).min() > 0.1
    assert torch.equal(seen[0], seen[1])


def test_a_stable_target_is_the_posterior_mean_over_its_candidates() -> None:
    candidates = torch.stack([torch.full((2, 3), value) for value in (-1.0, 0.5, 1.0)])
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for time in (0.3, 0.7, 0.95, 1.0):
        noisy = (1 - time) * candidates[1] + time * noise
        chances = [
            math.exp(-sum((float(a) - (1 - time) * value) ** 2 for a in noisy.flatten()) / (2 * time**2))
            for value in (-1.0, 0.5, 1.0)
        ]
        mean = (-chances[0] + 0.5 * chances[1] + chances[2]) / sum(chances)
        torch.testing.assert_close(stable_target(noisy, time, candidates), torch.full((2, 3), mean))
    torch.testing.assert_close(stable_target(noisy, 1.0, candidates), candidates.mean(0))
    torch.testing.assert_close(stable_target(0.99 * candidates[1], 0.01, candidates), candidates[1])


def test_on_average_a_stable_target_is_what_the_picture_itself_is() -> None:
    candidates, dice = torch.tensor([[-1.0], [0.2], [1.0]]), torch.Generator().manual_seed(0)
    plain, stable = [], []
    for _ in range(6000):
        source = int(torch.randint(3, (), generator=dice))
        noisy = 0.4 * candidates[source] + 0.6 * torch.randn(1, generator=dice)
        if 0.2 < float(noisy) < 0.6:  # given what the network sees
            plain.append(candidates[source])
            stable.append(stable_target(noisy, 0.6, candidates))
    plain_mean, stable_mean = torch.stack(plain).mean(), torch.stack(stable).mean()
    assert float(stable_mean) == pytest.approx(float(plain_mean), abs=0.06)
    assert torch.stack(stable).std() < 0.3 * torch.stack(plain).std()


def test_the_weight_is_held_below_the_floor_only() -> None:
    pictures, noise = torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1)
    losses = FlowMatching(floor=0.2).losses(
        lambda noisy, _: torch.zeros_like(noisy), pictures, noise, torch.tensor([0.1, 0.2, 0.9])
    )
    assert losses.tolist() == pytest.approx([0.25, 1.0, 1.0])


def test_a_predicted_picture_weighs_the_same_at_every_low_time() -> None:
    pictures, noise = torch.zeros(4, 1, 1, 1), torch.ones(4, 1, 1, 1)

    def off_by_one(noisy: Tensor, times: Tensor) -> Tensor:
        level = times.reshape(-1, 1, 1, 1)
        return (noisy - (pictures + 1)) / level

    losses = FlowMatching(floor=0.1).losses(off_by_one, pictures, noise, torch.tensor([0.01, 0.05, 0.1, 0.2]))
    assert losses.tolist() == pytest.approx([100, 100, 100, 25], rel=1e-4)


def test_times_are_logit_normal_and_repeat() -> None:
    objective = FlowMatching(mean=0.5, std=0.8)
    times = objective.times(20_000, torch.Generator().manual_seed(0))
    assert 0 < times.min() < times.max() < 1
    logits = torch.logit(times.double())
    assert float(logits.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(logits.std()) == pytest.approx(0.8, abs=0.02)
    assert torch.equal(times, objective.times(20_000, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_is_exact_on_straight_lines(steps: int) -> None:
    pictures, noise = some(2, 0), some(2, 1)
    torch.testing.assert_close(euler(lambda *_: noise - pictures, noise, steps), pictures)


def test_euler_goes_down_from_1_and_never_asks_at_0() -> None:
    asked: list[float] = []

    def denoiser(noisy: Tensor, times: Tensor) -> Tensor:
        assert times.shape == (2,)
        asked.append(float(times[0]))
        return -noisy

    found = euler(denoiser, torch.ones(2, 1, 1, 1), 4)
    assert asked == [1.0, 0.75, 0.5, 0.25]
    asked.clear()
    euler(denoiser, torch.ones(2, 1, 1, 1), 4, shift=3.0)
    known = FlowMatchEulerDiscreteScheduler(shift=3.0)
    known.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert asked == pytest.approx(known.sigmas[:-1].tolist())
    assert found.flatten().tolist() == pytest.approx([1.25**4] * 2)
    assert math.isclose(float(euler(denoiser, torch.ones(2, 1, 1, 1), 1000)[0]), math.e, rel_tol=1e-2)
