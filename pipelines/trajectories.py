"""Record runs: the latent and the guided prediction of every step, as its scheduler is given them, for `acceleration.fitting`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from acceleration.fitting import Course, Gram
from pipelines.schedulers import watched

FITTED = "FlowMatchEulerDiscreteScheduler"
"""The scheduler whose picture moves by the sum of its velocities times the changes of the noise level."""


class Recorder:
    """What one scheduler is given and returns, step by step."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.places: list[Tensor] = []
        self.velocities: list[Tensor] = []
        inner = scheduler.step

        @functools.wraps(inner)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            made = inner(model_output, timestep, sample, *args, **kwargs)
            end = made[0] if isinstance(made, tuple) else made.prev_sample
            self.places += [sample.detach().clone()] if not self.places else []
            self.places.append(end.detach().clone())
            self.velocities.append(model_output.detach().clone())
            return made

        self.step = step
        """What to put in the place of the scheduler's own step."""

    def courses(self) -> list[Course]:
        """Return the course of each picture of the batch; none where the run was cut short."""
        levels = tuple(float(one) for one in getattr(self.scheduler, "sigmas", []))
        if not self.velocities or len(levels) != len(self.velocities) + 1:
            return []
        places, velocities = torch.stack(self.places, 1), torch.stack(self.velocities, 1)
        return [Course(*both, levels) for both in zip(places, velocities, strict=True)]


@contextmanager
def courses() -> Iterator[list[Course]]:
    """Gather the course of every whole run inside, from its end on; runs of other schedulers than `FITTED` are left out."""
    found: list[Course] = []
    runs: list[Recorder] = []

    def watch(scheduler: Any) -> None:
        if type(scheduler).__name__ == FITTED:
            runs.append(Recorder(scheduler))
            scheduler.step = runs[-1].step

    with watched(watch):
        yield found
    for run in runs:
        found += run.courses()


@contextmanager
def recording(gram: Gram) -> Iterator[None]:
    """Add every whole run inside to `gram`; runs of other schedulers than `FITTED`, and runs cut short, are left out."""
    with courses() as found:
        yield
    for one in found:
        gram.add([velocity[None] for velocity in one.velocities], one.sigmas)
