"""The engine `ray`: one task an item on the machines of a Ray cluster; this process alone holds the ledger and writes the files.

Ray's own retries are off: what a dead node lost is put back by the ledger, which counts tries and knows what is finished.
Leapfrog must be installed on every machine, and files that requests name must lie under the same path there.

Differs: Ray may lose a call of a killed node without ever saying so (seen with retries on); so every task tells a board which node
it began on, and what was on a node that is gone is begun again even if no error came. Ray also waits for ever for a cluster that
does not answer, or ends the process; here every wait has an end, and the end has words.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines._batch_folder import BATCH
from pipelines._engines import FULL
from pipelines.catalog import Unavailable

if TYPE_CHECKING:
    from pipelines._batch_folder import Folder
    from pipelines.jobs import Job, Ledger
    from pipelines.manifest import Entry

LEASE = 60.0
"""How long an item is this driver's without a heartbeat, in s."""
BEAT = 5.0
"""Between heartbeats, in s."""
GRACE = 15.0
"""How long Ray has to tell what became of the tasks of a dead node, in s."""
LOOK = 1.0
"""Between two looks at the nodes and the room of the cluster, in s."""
ANSWER = 10.0
"""How long the board, and the address of a cluster, may take to answer, in s."""
FETCH = 120.0
"""How long a finished file may take to come here from its node, in s; then it counts as lost with it."""
PATIENCE = 180.0
"""How long the cluster may take to start its first process, have no room at all, or answer nothing, in s."""
HUNG = 3600.0
"""How long one step may take before its task counts as hung, in s."""
MAKE = "pipelines.generate:generate"
"""What a task calls to make a result of a request."""


class Board:
    """An actor beside the driver: tasks say where they run and how far they are, and hear whether to go on."""

    def __init__(self) -> None:
        self.nodes: dict[str, str] = {}
        self.steps: dict[str, dict[str, Any]] = {}
        self.off: set[str] = set()

    def told(self, name: str, node: str, progress: dict[str, Any]) -> bool:
        """Note where a task stands; False asks it to stop."""
        self.nodes[name], self.steps[name] = node, progress
        return name not in self.off

    def look(self) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """Return the nodes and the progress of tasks by name."""
        return self.nodes, self.steps

    def stop(self, names: list[str]) -> None:
        """Ask tasks to stop at their next step."""
        self.off.update(names)

    def forget(self, name: str) -> None:
        """Drop a task that is over."""
        self.nodes.pop(name, None)
        self.steps.pop(name, None)


def make(request: dict[str, Any], name: str, ending: str, board: Any, maker: str = MAKE) -> dict[str, Any]:
    """Make one item on some node: {"files": bytes by ending, "report"}, or {"error", "again"}, or {"stopped"}. Runs in a task."""
    import ray

    from pipelines.generate import Cancelled, Progress
    from pipelines.request import Request, RequestError

    node = ray.get_runtime_context().get_node_id()

    def tell(progress: dict[str, Any]) -> bool:
        try:
            return bool(ray.get(board.told.remote(name, node, progress), timeout=ANSWER))
        except ray.exceptions.GetTimeoutError:  # a busy board is no reason to stop; one that is gone is
            return True
        except ray.exceptions.RayError:
            return False

    def on_step(progress: Progress) -> bool:
        return tell(dataclasses.asdict(progress))

    try:
        if not tell({"phase": "load"}):  # which node it is must be known before anything can take long
            return {"stopped": True}
        module, _, function = maker.partition(":")
        result = getattr(importlib.import_module(module), function)(
            Request.from_dict(request), on_step=on_step
        )
        with tempfile.TemporaryDirectory() as folder:
            paths = result.save(Path(folder) / f"item{ending}")
            both = (
                paths[0],
                paths[0].with_suffix(".json"),
            )  # the second is not there where no metadata is wanted
            files = {path.suffix: path.read_bytes() for path in both if path.exists()}
        return {"files": files, "report": result.report}
    except Cancelled:
        return {"stopped": True}
    except RequestError as error:
        return {"error": str(error), "again": False}
    except Exception as error:  # noqa: BLE001 - one bad item must not stop the others
        return {"error": f"{type(error).__name__}: {error}"[:1000], "again": True}


@dataclasses.dataclass(eq=False, slots=True)
class Task:
    """A leased item and the call that makes it; when it was begun, last beaten, and last heard of with something new."""

    job: Job
    call: Any
    begun: float
    beaten: float
    heard: float
    seen: dict[str, Any] | None = None


class RayEngine:
    """Keeps as many tasks in flight as the cluster has room for; a thread of its own submits, beats and collects.

    Args:
        workers: most tasks at once; 0 for one on every GPU, or on every processor where there is no GPU.
        make: "module:function" in the place of `generate`, importable on every node.

    Raises:
        Unavailable: Ray is not installed, or no cluster answers.
    """

    def __init__(self, workers: int = 0, *, make: str = MAKE) -> None:
        try:
            import ray
        except ImportError:
            raise Unavailable("the engine ray needs Ray: pip install leapfrog-dit[ray]") from None
        self.ray: Any = ray
        self.workers, self.make = workers, make
        self.tasks: dict[str, Task] = {}
        self.dead: dict[str, float] = {}
        self.room = 0
        self._broken, self._ours = "", False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def share(self, folder: Folder, missing: Sequence[Entry], entries: Sequence[Entry]) -> Sequence[Entry]:
        """Return all that is missing: the driver alone has a ledger."""
        return missing

    def start(self, ledger: Ledger) -> None:
        """Join the cluster of RAY_ADDRESS, or start one on this machine, and begin. Raises: Unavailable."""
        ray = self.ray
        if not ray.is_initialized():
            _reach(os.environ.get("RAY_ADDRESS", ""))
            try:
                ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise Unavailable(f"no Ray cluster could be joined or started: {error}") from None
            self._ours = True
        self.ledger = ledger
        self.name = f"ray-{os.uname().nodename if hasattr(os, 'uname') else 'driver'}-{os.getpid()}"
        kind = "GPU" if ray.cluster_resources().get("GPU", 0) >= 1 else "CPU"
        needs = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
        self.kind = kind
        self.remote = ray.remote(max_retries=0, **needs)(make)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self.board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
        try:
            ray.get(self.board.look.remote(), timeout=PATIENCE)
        except ray.exceptions.RayError as error:
            self.stop(ANSWER)
            words = f"the Ray cluster started no process within {PATIENCE:.0f} s ({type(error).__name__})"
            raise Unavailable(f"{words}; `ray status` and the logs in its session folder tell more") from None
        self._alive = self._roomy = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="leapfrog-ray", daemon=True)
        self._thread.start()

    def turn(self) -> str:
        """Return why the engine can do no more, or nothing."""
        if not self._broken and time.monotonic() - self._alive > PATIENCE:
            return f"the Ray cluster has answered nothing for {PATIENCE:.0f} s"
        return self._broken

    def stop(self, seconds: float) -> None:
        """Stop every task within its step and give its item back; leave the cluster as it was found."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(seconds)
        tasks, self.tasks = dict(self.tasks), {}
        for task in tasks.values():  # before Ray is asked for anything: it may not answer any more
            self.ledger.give_back(task.job)
        leaving = threading.Thread(target=self._leave, args=(tasks, seconds / 2), daemon=True)
        leaving.start()
        leaving.join(2 * seconds)

    def _leave(self, tasks: dict[str, Task], seconds: float) -> None:
        calls = [task.call for task in tasks.values()]
        with contextlib.suppress(Exception):
            self.ray.get(self.board.stop.remote(list(tasks)), timeout=1)
            self.ray.wait(calls, num_returns=len(calls), timeout=seconds)
        for call in calls:
            with contextlib.suppress(Exception):
                self.ray.cancel(call, force=True)
        with contextlib.suppress(Exception):
            self.ray.kill(self.board)
        if self._ours:
            self.ray.shutdown()

    def _work(self) -> None:
        looked = -LOOK
        try:
            while not self._ended.wait(0.05):
                if time.monotonic() - looked > LOOK:
                    looked = time.monotonic()
                    self._look()
                self._submit()
                self._collect()
                self._beat()
                self._alive = time.monotonic()
        except Exception as error:  # noqa: BLE001 - told by `turn`, the items go back
            self._broken = f"Ray stopped working ({type(error).__name__}: {str(error)[:300]})"

    def _look(self) -> None:
        """Look what room there is, and begin again what ran on nodes that are gone."""
        self.room = int(self.ray.cluster_resources().get(self.kind, 0))
        now = time.monotonic()
        if self.room or self.tasks:
            self._roomy = now
        elif now - self._roomy > PATIENCE:
            self._broken = f"no node of the Ray cluster has offered a {self.kind} for {PATIENCE:.0f} s"
        for node in self.ray.nodes():
            if not node["Alive"]:
                self.dead.setdefault(node["NodeID"], now)
        self._mourn(now)

    def _submit(self) -> None:
        most = min(self.workers, self.room) if self.workers else self.room
        while len(self.tasks) < most:
            job = self.ledger.lease(self.name, seconds=LEASE, batch=BATCH)
            if job is None:
                return
            now = time.monotonic()
            ending = Path(job.item.output).suffix
            name = f"{job.name}.{job.lease}"
            call = self.remote.remote(job.item.request, name, ending, self.board, self.make)
            self.tasks[name] = Task(job, call, now, now, now)

    def _collect(self) -> None:
        """Take what is finished; a call that Ray lost counts as a try of its item."""
        calls = {task.call: name for name, task in self.tasks.items()}
        if not calls:
            return
        ready, _ = self.ray.wait(list(calls), num_returns=len(calls), timeout=0.05)
        for call in ready:
            name = calls[call]
            job = self.tasks[name].job
            try:
                made = self.ray.get(call, timeout=FETCH)
            except self.ray.exceptions.RayError as error:
                made = {
                    "error": f"its node or process ended in the middle of it ({type(error).__name__})",
                    "again": True,
                }
            if "files" in made:
                self._commit(job, made)
            elif "error" in made:
                self.ledger.failed(job, made["error"], again=made["again"])
            else:
                self.ledger.give_back(job)
            self._drop(name)

    def _commit(self, job: Job, made: dict[str, Any]) -> None:
        """Write the files beside their final names, and publish them while the lease is held."""
        from pipelines._jobs_saving import is_full, staging
        from pipelines.request import RequestError
        from pipelines.result import write_file

        first = next(iter(made["files"]))
        wished = Path(job.item.folder) / job.item.output
        wished = wished if wished.suffix.lower() == first.lower() else wished.with_name(wished.name + first)
        try:
            final = self.ledger.target(job, [wished])
            if final is None:
                return
            final.parent.mkdir(parents=True, exist_ok=True)
            with staging(job) as folder:
                drafts = {}
                for ending, data in reversed(made["files"].items()):  # the picture appears last
                    write_file(folder / f"item{ending}", data, draft=True)
                    drafts[folder / f"item{ending}"] = final.with_suffix(ending)
                self.ledger.done(job, [final], made["report"], staged=drafts)
        except RequestError as error:
            self.ledger.failed(job, str(error), again=False)
        except OSError as error:
            if is_full(error):
                self.ledger.give_back(job)
                self._broken = f"{FULL}: make room and start again, finished items are safe"
            else:
                self.ledger.failed(job, str(error))

    def _beat(self) -> None:
        now = time.monotonic()
        late = {name: task for name, task in self.tasks.items() if now - task.beaten > BEAT}
        if not late:
            return
        nodes, steps = self._told() or ({}, {})
        lost = []
        for name, task in late.items():
            task.beaten = now
            if steps.get(name, task.seen) != task.seen:
                task.seen, task.heard = steps[name], now
            if not self.ledger.beat(task.job, task.seen, seconds=LEASE):  # cancelled, or another's by now
                lost.append(name)
            elif name in nodes and now - task.heard > HUNG:
                self.ledger.failed(task.job, f"one step took more than {HUNG:.0f} s")
                self._end(name)
        if lost:
            self.board.stop.remote(lost)
            for name in lost:
                self._drop(name)

    def _told(self) -> tuple[dict[str, str], dict[str, dict[str, Any]]] | None:
        """Return the nodes and the progress of tasks; None where the board is too busy to answer just now."""
        try:
            nodes, steps = self.ray.get(self.board.look.remote(), timeout=ANSWER)
        except self.ray.exceptions.GetTimeoutError:
            return None
        return nodes, steps

    def _mourn(self, now: float) -> None:
        """Begin again what ran on nodes that are gone, or was on its way to one, where Ray says nothing."""
        waiting = {node: since for node, since in self.dead.items() if now - since > GRACE}
        last = max(waiting.values(), default=0.0)
        if not any(task.begun <= last for task in self.tasks.values()):
            return
        told = self._told()
        if told is None:
            return
        for name, task in list(self.tasks.items()):
            if told[0].get(name) in waiting:
                self.ledger.failed(task.job, "its node is gone and Ray said nothing of it")
            elif name not in told[0] and task.begun <= last:
                self.ledger.give_back(task.job)  # it had not begun: no try was lost
            else:
                continue
            self._end(name)

    def _end(self, name: str) -> None:
        """End the process of a task that hears nothing any more."""
        with contextlib.suppress(Exception):
            self.ray.cancel(self.tasks[name].call, force=True)
        self._drop(name)

    def _drop(self, name: str) -> None:
        self.tasks.pop(name, None)
        self.board.forget.remote(name)


def _reach(address: str) -> None:
    """Look whether anything listens at a cluster's address: Ray itself ends the process where nothing does. Raises: Unavailable."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
    except (OSError, OverflowError) as error:
        words = f"no Ray cluster answers at {address}, which RAY_ADDRESS names ({error})"
        raise Unavailable(f"{words}; start one there with `ray start --head`, or unset RAY_ADDRESS") from None
