"""The networks of a pipeline that accelerators take hold of: its transformer, and the second one where there are two (Wan 2.2)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.calls import default_of
from pipelines.request import Request, RequestError

if TYPE_CHECKING:
    from acceleration.base import RunReport

NAMES = ("transformer", "transformer_2")


def networks_of(pipeline: Any) -> dict[str, Any]:
    """Return the networks that denoise, by name, in the order of their use."""
    found = {name: getattr(pipeline, name, None) for name in NAMES}
    return {name: network for name, network in found.items() if network is not None}


def check_accelerators(request: Request, pipeline: Any) -> None:
    """Refuse accelerators that cannot work in a pipeline. Raises: RequestError."""
    if not request.accelerators:
        return
    from acceleration.base import refusal

    networks = networks_of(pipeline)
    reason = None if networks else f"{type(pipeline).__name__} has no transformer"
    for name, network in networks.items():
        words = refusal(network, *request.accelerators)
        if reason is None and words is not None:
            reason = words if name == NAMES[0] else f"{name}: {words}"
    if reason is not None:
        methods = [str(one) for one in request.accelerators]
        raise RequestError("accelerators", methods, f"ones that can work here: {reason}")


@contextlib.contextmanager
def accelerated_networks(pipeline: Any, request: Request, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the runs that count (and save) the work of the networks, by name; those that cannot be counted are left out.

    Raises: RequestError as soon as it shows that an accelerator has no effect.
    """
    from acceleration.base import Untouched, accelerated, refusal
    from dit.seams import patched

    steps = given.get("num_inference_steps", default_of(pipeline, "num_inference_steps"))
    networks = networks_of(pipeline)
    methods: Any = request.accelerators
    try:
        with contextlib.ExitStack() as stack:
            runs: dict[str, Any] = {}
            for name, network in networks.items():
                if not request.accelerators and refusal(network) is not None:
                    continue
                # which of two networks takes which steps is not known before: the steps of each are counted as they come
                count = steps if len(networks) == 1 else None
                runs[name] = stack.enter_context(accelerated(network, *methods, steps=count))
            if len(networks) == 1 and hasattr(pipeline, "get_timesteps"):
                stack.enter_context(patched(pipeline, "get_timesteps", _told(pipeline, *networks.values())))
            yield runs
    except Untouched as error:  # it would have none the next time either
        named = [str(one) for one in methods]
        raise RequestError("accelerators", named, f"ones that can work here: {error}") from error


def _told(pipeline: Any, network: Any) -> Callable[..., Any]:
    """Return the pipeline's choice of timesteps, which also tells the network how many are left where a picture is given."""
    from dit.seams import announce

    inner = pipeline.get_timesteps

    def get_timesteps(*args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        left = found[1] if isinstance(found, tuple) and len(found) == 2 else None
        if isinstance(left, int) and left > 0:
            announce(network, steps=left)
        return found

    return get_timesteps


def reported(runs: dict[str, Any], calls: int) -> dict[str, Any]:
    """Return the part of a picture's report about its networks: the first one's `run`, `run_2` of a second, and one line of all."""
    reports = [one.report() for one in runs.values()]
    if not reports:
        return {"run": {"calls": calls}, "summary": f"exact - {calls} calls"}
    found = {"run": reports[0].to_dict(), "summary": "; ".join(one.summary() for one in reports)}
    found |= {"run_2": reports[1].to_dict()} if len(reports) > 1 else {}
    return found | {"warnings": _idle(runs, reports)}


def _idle(runs: dict[str, Any], reports: Sequence[RunReport]) -> list[str]:
    """Return in words that accelerators were on and saved nothing, as a warm-up of all steps does."""
    saved = any(one.reused or one.forecast or one.sparse or one.merged for one in reports)
    on = any(not method.neutral for one in runs.values() for method in one.methods)
    if saved or not on:
        return []
    steps = sum(one.steps for one in reports)
    told = dict.fromkeys(line for one in reports for line in one.effective)
    return [f"nothing was saved in {steps} step{'s' * (steps != 1)}: {'; '.join(told)}"]
