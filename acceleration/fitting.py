"""Fit a step forecast to a checkpoint: which steps to compute, and how to make the others from them.

What is fitted: exact runs of some pictures give the guided velocity v_i of every step; only their inner products are needed.
A run of skipped steps between the full steps a and b must bring about the sum of the moves d_i v_i, and is given a linear
combination of the last two computed velocities that comes nearest to it in the mean. The full steps are chosen by dynamic
programming over pairs of neighbours.

Paper: own; the choice of steps by shortest path is that of LeMiCa, Gao et al. 2025, arXiv:2511.00090, with another cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from acceleration.step_forecast import StepForecast

_RIDGE = 1e-6


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Mean inner products of the velocities of a run's steps [n, n], and its noise levels [n + 1], the last one 0."""

    gram: Tensor
    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        steps = len(self.sigmas) - 1
        if self.gram.shape != (steps, steps) or steps < 1:
            shape = tuple(self.gram.shape)
            raise ValueError(f"{len(self.sigmas)} noise levels belong to inner products of {steps} steps, got {shape}")
        if not self.gram.isfinite().all() or any(b >= a for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
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
        rows = torch.stack([one.detach().flatten(1) for one in velocities], dim=1).double().cpu()  # [B, n, values]
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
    steps = trajectory.steps
    if isinstance(full_steps, bool) or not isinstance(full_steps, int) or not 1 <= full_steps <= steps:
        raise ValueError(f"full_steps must be a whole number from 1 to {steps}, got {full_steps!r}")
    chosen = _path(trajectory, full_steps)
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


def _path(trajectory: Trajectory, full_steps: int) -> list[int]:
    """The full steps whose segments err least in sum; the first is always one of them."""
    steps = trajectory.steps

    @cache
    def cost(before: int, at: int, end: int) -> float:
        return _segment(trajectory, [at] if before < 0 else [before, at], end)[1]

    best: dict[tuple[int, int], tuple[float, list[int]]] = {(-1, 0): (0.0, [0])}
    for _ in range(full_steps - 1):
        found: dict[tuple[int, int], tuple[float, list[int]]] = {}
        for (before, at), (spent, path) in best.items():
            for end in range(at + 1, steps):
                total = spent + cost(before, at, end)
                if total < found.get((at, end), (math.inf, []))[0]:
                    found[at, end] = (total, [*path, end])
        best = found
    return min(((spent + cost(before, at, steps), path) for (before, at), (spent, path) in best.items()), key=lambda one: one[0])[1]
