"""The engines of a batch: worker processes of this computer, ranks of torchrun or `accelerate launch`, a Ray cluster.

Every engine takes items by leases from a ledger and is asked a few times a second whether it can go on.

Differs: Accelerate splits a list between ranks once and for all; here ranks share one ledger, so a slow or dead one is relieved by
the others, and only where they see no common folder does each take every n-th item.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pipelines._batch_folder import Folder
from pipelines.manifest import Entry
from pipelines.request import RequestError

if TYPE_CHECKING:
    from pipelines.jobs import Ledger

FULL = "the disk is full"
"""Words in the reason of an engine that found no room."""
WORKERS = 256
"""Most workers of a run."""


class Engine(Protocol):
    """What `pipelines.batch.run` needs of an engine."""

    def share(self, folder: Folder, missing: Sequence[Entry], entries: Sequence[Entry]) -> Sequence[Entry]:
        """Return the entries that this process puts in its ledger: what is missing, or of all entries its own part."""

    def start(self, ledger: Ledger) -> None:
        """Begin to lease and make items. Raises: Unavailable."""

    def turn(self) -> str:
        """Keep going; return why the engine can do no more, or nothing."""

    def stop(self, seconds: float) -> None:
        """End within some seconds, leases given back."""


def engine_for(name: str | Engine, workers: int) -> Engine:
    """Return an engine by its name. Raises: RequestError. Unavailable: it is not installed."""
    if not isinstance(name, str):
        return name
    low = 0 if name == "ray" else 1
    if isinstance(workers, bool) or not isinstance(workers, int) or not low <= workers <= WORKERS:
        raise RequestError("workers", workers, f"a whole number from {low} to {WORKERS}")
    if name == "local":
        return LocalEngine(workers)
    if name == "accelerate":
        return RankEngine()
    if name == "ray":
        from pipelines._ray import RayEngine

        return RayEngine(workers)
    raise RequestError("engine", name, "one of local, ray, accelerate")


class LocalEngine:
    """Worker processes of this computer, each with its model loaded; one that dies is replaced.

    Args:
        make, environment: see `pipelines.workers.Pool`.
    """

    def __init__(
        self, workers: int, *, make: str | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.workers, self.make, self.environment = workers, make, environment
        self._pool: Any = None

    def share(self, folder: Folder, missing: Sequence[Entry], entries: Sequence[Entry]) -> Sequence[Entry]:
        """Return all that is missing."""
        return missing

    def start(self, ledger: Ledger) -> None:
        """Start the processes."""
        from pipelines.workers import Pool

        # not bound to the batch: such workers would look for the single files of what is in shards already
        self._pool = Pool(ledger.path, make=self.make, environment=self.environment)
        self._pool.start(self.workers)

    def turn(self) -> str:
        """Return why no worker goes on, or nothing; the pool replaces its own dead."""
        problem = str(self._pool.problem)
        if FULL in problem or not self._pool.working():
            return problem or "no worker is left"
        return ""

    def stop(self, seconds: float) -> None:
        """Stop the processes."""
        if self._pool is not None:
            self._pool.stop(seconds)
            self._pool.ledger.close()


class RankEngine(LocalEngine):
    """One rank of `torchrun` or `accelerate launch`, with one worker on the device of its LOCAL_RANK.

    Raises:
        RequestError: RANK and WORLD_SIZE are not set.
    """

    def __init__(self, *, make: str | None = None, environment: Mapping[str, str] | None = None) -> None:
        super().__init__(1, make=make, environment=environment)
        try:
            self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            self.local = int(os.environ.get("LOCAL_RANK", self.rank))
        except (KeyError, ValueError):
            allowed = "started by torchrun or accelerate launch, which set RANK and WORLD_SIZE"
            raise RequestError("engine", "accelerate", allowed) from None

    def share(self, folder: Folder, missing: Sequence[Entry], entries: Sequence[Entry]) -> Sequence[Entry]:
        """Return all that is missing where all ranks see one folder, else every n-th entry; the ranks ask each other."""
        if self._together(folder):
            return missing
        wanted = {entry.id for entry in missing}
        return [entry for entry in entries[self.rank :: self.world] if entry.id in wanted]

    def start(self, ledger: Ledger) -> None:
        """Start the worker, which sees only the device of this rank."""
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = devices.split(",") if devices else [str(number) for number in range(_devices())]
        if names:
            os.environ["CUDA_VISIBLE_DEVICES"] = names[self.local % len(names)]
        super().start(ledger)

    def _together(self, folder: Folder) -> bool:
        """Tell whether every rank finds in its folder what rank 0 wrote into its own."""
        if self.world == 1:
            return True
        import torch.distributed as dist

        ours = not dist.is_initialized()
        if ours:
            dist.init_process_group("gloo")
        try:
            token = [secrets.token_hex(8)]
            dist.broadcast_object_list(token, src=0)
            path = folder.state / f"ranks-{token[0]}"
            if self.rank == 0:
                path.touch()
            dist.barrier()
            seen: list[bool] = [False] * self.world
            dist.all_gather_object(seen, path.exists())
            dist.barrier()
            if self.rank == 0:
                path.unlink(missing_ok=True)
        finally:
            if ours:  # from here on no rank waits for another: a dead one holds nobody up
                dist.destroy_process_group()
        return all(seen)


def _devices() -> int:
    import torch

    return torch.cuda.device_count()
