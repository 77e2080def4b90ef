"""Schedulers by short name, made from the one that a model came with; a pair that does not fit is refused in words.

Paper: DPM-Solver++, Lu et al. 2022, arXiv:2211.01095; UniPC, Zhao et al. 2023, arXiv:2302.04867; DDIM, Song et al. 2020,
arXiv:2010.02502; DDPM, Ho et al. 2020, arXiv:2006.11239; flow matching, Lipman et al. 2022, arXiv:2210.02747.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pipelines.request import RequestError

FLOW = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
EPSILON = {
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
}


_WATCH: ContextVar[Callable[[Any], None] | None] = ContextVar("watch", default=None)


@contextmanager
def watched(watch: Callable[[Any], None]) -> Iterator[None]:
    """Show every scheduler made inside, by this thread, to `watch` before it is used."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler serves flow-matching models."""
    config = scheduler.config
    named = type(scheduler).__name__.startswith(("FlowMatch", "LCMFlow", "SCM"))
    return bool(named or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction")


def scheduler_for(name: str, current: Any) -> Any:
    """Return a fresh scheduler of the kind `name` with the settings of the model's own. Raises: RequestError."""
    made = _made(name, current)
    watch = _WATCH.get()
    if watch is not None:
        watch(made)
    return made


def _made(name: str, current: Any) -> Any:
    import diffusers

    if name == "default":
        return type(current).from_config(current.config)
    flow = is_flow(current)
    table = FLOW if flow else EPSILON
    if name not in table:
        kind = "flow-matching" if flow else "noise-predicting"
        raise RequestError("scheduler", name, f"one of default, {', '.join(table)} for this {kind} model")
    cls = getattr(diffusers, table[name])
    # Without its list of untouched defaults, so that they are kept too: schedulers differ in theirs (noise range).
    config = {key: value for key, value in current.config.items() if key != "_use_default_values"}
    if isinstance(current, cls):
        return cls.from_config(config)
    return cls.from_config(config, **(_flow_settings(name, current) if flow else _settings(name)))


def _flow_settings(name: str, current: Any) -> dict[str, Any]:
    shift = current.config.get("shift") or current.config.get("flow_shift") or 1.0
    if name in ("euler", "heun"):
        return {"shift": shift}
    return {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}


def _settings(name: str) -> dict[str, Any]:
    return {} if name == "ddpm" else {"variance_type": None}
