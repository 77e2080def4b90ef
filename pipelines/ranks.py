"""One picture or clip over several processes: what `torchrun` has started makes one request together, and rank 0 saves it.

Every rank loads the model and walks through the whole request; inside the network each has a share of the tokens
(`dit.context_parallel`). So the pixels are those of one process within rounding, and a request does not say how it was made.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from pipelines.request import Request, RequestError

HOWS = ("ulysses", "ring")
# Accelerators whose schedule is known before: all ranks leave out the same. Gates that measure may differ from rank to rank.
SCHEDULED = ("delta-cache", "taylor-cache", "step-forecast", "guidance-skip")


@dataclasses.dataclass(frozen=True, slots=True)
class Together:
    """The ranks that make a request together: how, which this is, of how many, and diffusers' mesh of them."""

    how: str
    rank: int
    size: int
    mesh: Any


_NOW: ContextVar[Together | None] = ContextVar("together", default=None)


@contextlib.contextmanager
def together(how: str) -> Iterator[Together]:
    """Let every `generate` inside be made by all ranks of `torchrun` together.

    Args:
        how: "ulysses" (each rank answers for all tokens with its share of the heads) or "ring" (keys and values go round).

    Raises:
        RequestError: another `how`, or processes that were not started by `torchrun`, or a single one.
    """
    if how not in HOWS:
        raise RequestError("context_parallel", how, " or ".join(HOWS))
    size, local = _started(how)
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(local % torch.cuda.device_count())
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    shape = (size, 1) if how == "ring" else (1, size)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("ring", "ulysses"))
    token = _NOW.set(Together(how, dist.get_rank(), size, mesh))
    try:
        yield Together(how, dist.get_rank(), size, mesh)
    finally:
        _NOW.reset(token)
        if ours:
            dist.destroy_process_group()


def alone() -> bool:
    """Whether this process makes its requests by itself."""
    return _NOW.get() is None


def saves() -> bool:
    """Whether this process is the one that saves: rank 0, or one by itself."""
    now = _NOW.get()
    return now is None or now.rank == 0


def check(request: Request) -> None:
    """Refuse what ranks cannot do together, before any weights load. Raises: RequestError."""
    if alone():
        return
    for one in request.accelerators:
        name, gate = one.name, getattr(one, "gate", "interval")
        if name not in SCHEDULED or gate not in ("interval", "mask"):
            allowed = (
                f"{', '.join(SCHEDULED)} with a schedule (gate interval or mask) under context parallelism: what others"
                " leave out depends on what a rank sees of the tokens"
            )
            raise RequestError("accelerators", str(one), allowed)
    for field in ("controls", "panels", "profile"):
        value = getattr(request, field)
        if value is not None and value != ():
            raise RequestError(field, value, "left out under context parallelism")


@contextlib.contextmanager
def shared_networks(pipeline: Any) -> Iterator[None]:
    """Share the sequences of a pipeline's networks between the ranks, if there are several. Raises: RequestError."""
    now = _NOW.get()
    if now is None:
        yield
        return
    from dit.context_parallel import Unshareable, shared
    from pipelines.networks import networks_of

    networks = networks_of(pipeline)
    if not networks:
        allowed = f"left out: {type(pipeline).__name__} has no transformer"
        raise RequestError("context_parallel", now.how, allowed)
    try:
        with contextlib.ExitStack() as stack:
            for network in networks.values():
                stack.enter_context(shared(network, now.how, now.mesh))
            yield
    except Unshareable as error:
        raise RequestError("context_parallel", now.how, f"left out here: {error}") from error


def unshareable(error: Exception) -> bool:
    """Whether an error says that ranks cannot share a sequence: `shared_networks` turns it into one of the request."""
    from dit.context_parallel import Unshareable

    return isinstance(error, Unshareable)


def noted() -> dict[str, Any]:
    """Return what a report says of the ranks."""
    now = _NOW.get()
    return {} if now is None else {"context_parallel": {"how": now.how, "ranks": now.size}}


def add_option(one: argparse.ArgumentParser) -> None:
    """Add the option that lets ranks make a request together."""
    one.add_argument(
        "--context-parallel", choices=HOWS, help="share one picture or clip between the processes that torchrun has started"
        " (torchrun --nproc-per-node 2 -m pipelines.cli generate ...); the pixels are the same",
    )  # fmt: skip


def command(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Return a command that all ranks run where it was asked for; one of them speaks."""

    def over_ranks(options: argparse.Namespace) -> int:
        if options.context_parallel is None:
            return run(options)
        for name, found in (
            ("latents", options.latents),
            ("prompt", options.prompt if options.prompt == "-" else None),
        ):
            if found is not None:
                raise RequestError(
                    name, found, "given otherwise under --context-parallel: all ranks read it at once"
                )
        with together(options.context_parallel) as now:
            try:
                return 0 if now.rank and options.dry_run else run(options)
            except RequestError:
                if now.rank == 0:
                    raise
                return 1  # rank 0 has the same to say

    return over_ranks


def _started(how: str) -> tuple[int, int]:
    """Return how many ranks torchrun has started, and which this is on its computer. Raises: RequestError."""
    try:
        size, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    except (KeyError, ValueError):
        size, local = 1, 0
    if size < 2:
        allowed = "given to 2 or more processes: torchrun --nproc-per-node 2 -m pipelines.cli generate ..."
        raise RequestError("context_parallel", how, allowed)
    return size, local
