"""Fit a step forecast to a checkpoint: which steps to compute, and how to make the others from them.

What is fitted: exact runs of some pictures give the guided velocity v_i of every step; only their inner products are needed.
A run of skipped steps between the full steps a and b must bring about the sum of the moves d_i v_i, and is given a linear
combination of the last two computed velocities that comes nearest to it in the mean. The full steps are chosen by dynamic
programming over pairs of neighbours.

That fit knows velocities of the exact path only, and a forecast run leaves that path. `refit` looks at runs that were made with
a forecast: each run of skipped steps is given the combination of the last computed velocities *of that run* that brings it back
to where the exact run stands, every picture counting by the share of its error, as in a mean of decibels. A few rounds of
running and fitting settle.

Paper: own; the choice of steps by shortest path is that of LeMiCa, Gao et al. 2025, arXiv:2511.00090, with another cost; weights
    that are fitted along the solver's own path are those of Bespoke Non-Stationary Solvers, Shaul et al. 2024, arXiv:2403.01329,
    there by gradients through the network, here by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from acceleration.step_forecast import MOST_WEIGHTS, StepForecast

_RIDGE = 1e-6
_REWEIGHTED = 4  # rounds of weighing pictures by their error


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Mean inner products of the velocities of a run's steps [n, n], and its noise levels [n + 1], the last one 0."""

    gram: Tensor
    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        steps = len(self.sigmas) - 1
        if self.gram.shape != (steps, steps) or steps < 1:
            shape = tuple(self.gram.shape)
            raise ValueError(
                f"{len(self.sigmas)} noise levels belong to inner products of {steps} steps, got {shape}"
            )
        if not self.gram.isfinite().all() or any(
            b >= a for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)
        ):
            raise ValueError("inner products must be finite and noise levels must fall from step to step")

    @property
    def steps(self) -> int:
        """Count of steps."""
        return len(self.sigmas) - 1


class Gram:
    """Inner products of velocities, added up picture by picture."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._sigmas: tuple[float, ...] = ()
        self.pictures = 0

    def add(self, velocities: Sequence[Tensor], sigmas: Sequence[float]) -> None:
        """Take one run: the velocity of every step [B, ...] and the noise levels, one more. Raises: ValueError."""
        rows = (
            torch.stack([one.detach().flatten(1) for one in velocities], dim=1).double().cpu()
        )  # [B, n, values]
        found = torch.einsum("bnv,bmv->nm", rows, rows) / rows.shape[2]
        levels = tuple(float(one) for one in sigmas)
        if self._sum is not None and (levels != self._sigmas or found.shape != self._sum.shape):
            raise ValueError("all runs of a fit have the same noise levels")
        self._sum = found if self._sum is None else self._sum + found
        self._sigmas = levels
        self.pictures += len(rows)

    def trajectory(self) -> Trajectory:
        """Return the mean. Raises: ValueError if nothing was added."""
        if self._sum is None:
            raise ValueError("no run was recorded")
        return Trajectory(self._sum / self.pictures, self._sigmas)


def fit(trajectory: Trajectory, full_steps: int) -> StepForecast:
    """Return the step forecast with this count of full steps that errs least on the recorded runs.

    Raises: ValueError for a count below 1 or above that of all steps.
    """
    return fits(trajectory, [full_steps])[full_steps]


def fits(trajectory: Trajectory, counts: Sequence[int]) -> dict[int, StepForecast]:
    """Return for each count of full steps what `fit` returns, in hardly more time than for the largest alone."""
    steps = trajectory.steps
    for full in counts:
        if isinstance(full, bool) or not isinstance(full, int) or not 1 <= full <= steps:
            raise ValueError(f"full_steps must be a whole number from 1 to {steps}, got {full!r}")
    paths = _paths(trajectory, max(counts, default=0))
    return {full: _forecast(trajectory, paths[full]) for full in counts}


def _forecast(trajectory: Trajectory, chosen: Sequence[int]) -> StepForecast:
    """The forecast with these full steps and the best weights."""
    steps = trajectory.steps
    mask = "".join("1" if step in chosen else "0" for step in range(steps))
    rows = []
    for place, step in enumerate(chosen):
        after = chosen[place + 1] if place + 1 < len(chosen) else steps
        if after > step + 1:
            anchors = chosen[max(0, place - 1) : place + 1]
            weights, _ = _segment(trajectory, anchors, after)
            left = weights.clone()
            left[-1] -= trajectory.sigmas[step + 1] - trajectory.sigmas[step]  # the full step itself has moved by its own
            span = trajectory.sigmas[after] - trajectory.sigmas[step + 1]
            rows.append("/".join(f"{float(one) / span:.6g}" for one in left))
    settings: dict[str, Any] = {"mask": mask, "weights": "_".join(rows) if rows else None}
    return StepForecast(**settings)


def error(trajectory: Trajectory, mask: str) -> float:
    """Return the estimated squared error of the last picture, per value, for the full steps of a mask and the best weights."""
    chosen = [step for step, mark in enumerate(mask) if mark == "1"]
    ends = [*chosen[1:], trajectory.steps]
    return sum(
        _segment(trajectory, chosen[max(0, place - 1) : place + 1], end)[1] for place, end in enumerate(ends)
    )


@dataclass(frozen=True, slots=True)
class Course:
    """One run of one picture: its latent before every step and at the end [n + 1, ...], and the velocity of each step [n, ...]."""

    places: Tensor
    velocities: Tensor
    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        steps = len(self.sigmas) - 1
        found = (len(self.places), len(self.velocities))
        if steps < 1 or found != (steps + 1, steps) or self.places.shape[1:] != self.velocities.shape[1:]:
            raise ValueError(
                f"a course of {steps} steps has {steps + 1} places and {steps} velocities, got {found}"
            )


    @property
    def bytes(self) -> int:
        """Size of its tensors."""
        return sum(one.numel() * one.element_size() for one in (self.places, self.velocities))

    def cpu(self) -> Course:
        """Return it in main memory."""
        return Course(self.places.cpu(), self.velocities.cpu(), self.sigmas)


def refit(method: StepForecast, exact: Sequence[Course], made: Sequence[Course]) -> StepForecast:
    """Return a forecast with the same full steps whose weights bring the runs made with `method` back to the exact ones.

    Args:
        exact, made: runs of the same pictures in the same order, made plainly and with `method`.

    Raises: ValueError where they do not belong together, or the forecast has no mask.
    """
    if method.mask is None or not made or len(exact) != len(made):
        raise ValueError("a refit takes a forecast with a mask and as many runs made with it as exact ones")
    if any(
        one.sigmas != exact[0].sigmas or len(one.sigmas) != len(method.mask) + 1 for one in (*exact, *made)
    ):
        raise ValueError("all runs of a refit have the noise levels of the mask's steps")
    sigmas = exact[0].sigmas
    chosen = [step for step, mark in enumerate(method.mask) if mark == "1"]
    rows = []
    for place, step in enumerate(chosen):
        after = chosen[place + 1] if place + 1 < len(chosen) else len(method.mask)
        if after == step + 1:
            continue
        anchors = chosen[max(0, place + 1 - MOST_WEIGHTS) : place + 1]
        span = sigmas[after] - sigmas[step + 1]
        moves = (
            torch.stack([one.velocities[anchors].flatten(1) for one in made]).double() * span
        )  # [P, k, values]
        left = torch.stack([a.places[after] - b.places[step + 1] for a, b in zip(exact, made, strict=True)])
        rows.append("/".join(f"{float(one):.6g}" for one in _combination(moves, left.flatten(1).double())))
    return StepForecast(mask=method.mask, weights="_".join(rows) if rows else None)


def settled(
    method: StepForecast,
    exact: Sequence[Course],
    make: Callable[[StepForecast], Sequence[Course]],
    rounds: int = 3,
) -> StepForecast:
    """Return the best of a forecast and its refits, by the distance of the runs that `make` makes with each from the exact ones."""
    found: list[tuple[float, StepForecast]] = []
    for _ in range(rounds + 1):
        made = make(method)
        found.append((distance(exact, made), method))
        method = refit(method, exact, made)
    return min(found, key=lambda one: one[0])[1]


def distance(exact: Sequence[Course], made: Sequence[Course]) -> float:
    """Return the mean over pictures of the log of the mean squared error at the end: 10 / ln 10 times it is minus a mean of dB."""
    ends = [
        (a.places[-1].double() - b.places[-1].double()).square().mean()
        for a, b in zip(exact, made, strict=True)
    ]
    return float(torch.stack(ends).clamp_min(1e-20).log().mean())


def _combination(parts: Tensor, whole: Tensor) -> Tensor:
    """The weights [k] of parts [P, k, values] that come nearest to whole [P, values] in the mean of the logs of the errors."""
    grams, aims = torch.einsum("pkv,plv->pkl", parts, parts), torch.einsum("pkv,pv->pk", parts, whole)
    size = whole.square().sum(1)
    share = torch.ones(len(whole), dtype=parts.dtype) / len(whole)
    for _ in range(1 + _REWEIGHTED):
        gram = torch.einsum("p,pkl->kl", share, grams)
        gram = gram + _RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        weights = torch.linalg.solve(gram, share @ aims)
        errors = size - 2 * aims @ weights + torch.einsum("pkl,k,l->p", grams, weights, weights)
        share = 1 / errors.clamp_min(_RIDGE * float(size.mean()) + 1e-30)
        share = share / share.sum()
    return weights


def _segment(trajectory: Trajectory, anchors: Sequence[int], end: int) -> tuple[Tensor, float]:
    """The weights of the anchors' velocities that make up the moves from the last anchor to `end`, and the squared error."""
    first = anchors[-1]
    gram = trajectory.gram
    moves = torch.zeros(trajectory.steps, dtype=gram.dtype)
    for step in range(first, end):
        moves[step] = trajectory.sigmas[step + 1] - trajectory.sigmas[step]
    if end == first + 1:
        weights = torch.zeros(len(anchors), dtype=gram.dtype)
        weights[-1] = moves[first]
        return weights, 0.0
    places = torch.tensor(list(anchors))
    own = gram[places][:, places]
    own = own + _RIDGE * own.trace() / len(anchors) * torch.eye(len(anchors), dtype=gram.dtype)
    weights = torch.linalg.solve(own, gram[places] @ moves)
    rest = moves.clone()
    rest[places] -= weights
    return weights, max(0.0, float(rest @ gram @ rest))


def _paths(trajectory: Trajectory, most: int) -> dict[int, list[int]]:
    """For each count up to `most`, the full steps whose segments err least in sum; the first step is always one of them."""
    steps = trajectory.steps

    @cache
    def cost(before: int, at: int, end: int) -> float:
        return _segment(trajectory, [at] if before < 0 else [before, at], end)[1]

    best: dict[tuple[int, int], tuple[float, list[int]]] = {(-1, 0): (0.0, [0])}
    paths: dict[int, list[int]] = {}
    for full in range(1, most + 1):
        ends = ((spent + cost(before, at, steps), path) for (before, at), (spent, path) in best.items())
        paths[full] = min(ends, key=lambda one: one[0])[1]
        found: dict[tuple[int, int], tuple[float, list[int]]] = {}
        for (before, at), (spent, path) in best.items():
            for end in range(at + 1, steps):
                total = spent + cost(before, at, end)
                if total < found.get((at, end), (math.inf, []))[0]:
                    found[at, end] = (total, [*path, end])
        best = found
    return paths
