"""Record exact runs: the guided prediction of every step, as its scheduler is given it, for `acceleration.fitting`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from acceleration.fitting import Gram
from pipelines.schedulers import watched

FITTED = "FlowMatchEulerDiscreteScheduler"
"""The scheduler whose picture moves by the sum of its velocities times the changes of the noise level."""


@contextmanager
def recording(gram: Gram) -> Iterator[None]:
    """Add every whole run inside to `gram`; runs of other schedulers than `FITTED`, and runs cut short, are left out."""
    runs: list[tuple[Any, list[Tensor]]] = []

    def watch(scheduler: Any) -> None:
        if type(scheduler).__name__ != FITTED:
            return
        inner = scheduler.step
        seen: list[Tensor] = []
        runs.append((scheduler, seen))

        @functools.wraps(inner)
        def step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(model_output.detach().clone())
            return inner(model_output, *args, **kwargs)

        scheduler.step = step

    with watched(watch):
        yield
    for scheduler, seen in runs:
        levels = [float(one) for one in getattr(scheduler, "sigmas", [])]
        if seen and len(levels) == len(seen) + 1:
            gram.add(seen, levels)
