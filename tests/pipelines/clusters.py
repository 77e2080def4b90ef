"""A cluster in this process that stands in for Ray: nodes of threads that can be killed, lose calls, or answer nothing."""

from __future__ import annotations

import importlib.machinery
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

_node = threading.local()


class RayError(Exception):
    """What Ray's errors have in common."""


class GetTimeoutError(RayError, TimeoutError):
    """Nothing came in time."""


class NodeDiedError(RayError):
    """The node of a call is gone."""


class Call:
    """What a call will return, or nothing for ever."""

    def __init__(self) -> None:
        self.over, self.value, self.error = threading.Event(), None, None  # type: threading.Event, Any, Exception | None

    def end(self, value: Any = None, error: Exception | None = None) -> Call:
        self.value, self.error = value, error
        self.over.set()
        return self


class Cluster:
    """Nodes with room for one call each.

    Args:
        told: whether a killed node's calls end in an error; otherwise nobody ever hears of them.
    """

    def __init__(self, nodes: int = 1, *, told: bool = True) -> None:
        self.told, self.alive = told, {f"n{i}": True for i in range(nodes)}
        self.free, self.lock = threading.Condition(), threading.RLock()
        self.busy: set[str] = set()
        self.running: dict[str, list[Call]] = {name: [] for name in self.alive}
        self.deaf = threading.Event()
        """Set: the board answers nothing."""
        self.stuck = threading.Event()
        """Set: looking at calls never ends, until it is cleared again."""
        self.swallow = 0
        """So many of the next calls never begin."""
        self.threads: list[threading.Thread] = []

    def kill(self, node: str) -> None:
        """End a node in the middle of its calls."""
        with self.free:
            self.alive[node] = False
            self.free.notify_all()
        for call in self.running[node]:
            if self.told:
                call.end(error=NodeDiedError(node))

    def close(self) -> None:
        """Let every thread end."""
        self.stuck.clear()
        for node in self.alive:
            self.kill(node)
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()

    def submit(self, function: Callable[..., Any], given: tuple[Any, ...]) -> Call:
        call = Call()
        if self.swallow:
            self.swallow -= 1
            return call
        thread = threading.Thread(target=self._run, args=(call, function, given), daemon=True)
        self.threads.append(thread)
        thread.start()
        return call

    def _run(self, call: Call, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
        with self.free:
            while not (places := [n for n, alive in self.alive.items() if alive and n not in self.busy]):
                if not any(self.alive.values()):
                    return
                self.free.wait(0.05)
            node = places[0]
            self.busy.add(node)
            self.running[node].append(call)
        _node.name = node
        made = function(*given)
        with self.free:
            if call in self.running[node] and self.alive[node]:
                call.end(made)
        self.cancel(call)

    def cancel(self, call: Call, **_options: Any) -> None:
        """End the process of a call: its node has room again."""
        with self.free:
            for node, calls in self.running.items():
                if call in calls:
                    calls.remove(call)
                    self.busy.discard(node)
            self.free.notify_all()

    def module(self) -> types.ModuleType:
        """Return what `import ray` shall give."""
        ray = types.ModuleType("ray")
        ray.__spec__ = importlib.machinery.ModuleSpec("ray", None)
        strategies = types.SimpleNamespace(NodeAffinitySchedulingStrategy=lambda *_, **__: None)
        parts = {
            "exceptions": types.SimpleNamespace(RayError=RayError, GetTimeoutError=GetTimeoutError),
            "util": types.SimpleNamespace(scheduling_strategies=strategies),
            "is_initialized": lambda: True,
            "cluster_resources": lambda: {"CPU": float(sum(self.alive.values()))},
            "nodes": lambda: [{"NodeID": name, "Alive": alive} for name, alive in self.alive.items()],
            "get_runtime_context": lambda: types.SimpleNamespace(get_node_id=lambda: getattr(_node, "name", "driver")),
            "get": self._get, "wait": self._wait, "remote": self._remote,
            "cancel": self.cancel, "kill": lambda *_: None, "shutdown": lambda: None,
        }  # fmt: skip
        for name, part in parts.items():
            setattr(ray, name, part)
        return ray

    def _get(self, call: Call, timeout: float | None = None) -> Any:
        if not call.over.wait(timeout):
            raise GetTimeoutError("nothing came")
        if call.error is not None:
            raise call.error
        return call.value

    def _wait(self, calls: list[Call], num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        while self.stuck.is_set():
            threading.Event().wait(0.01)
        if calls:
            calls[0].over.wait(timeout)
        ready = [one for one in calls if one.over.is_set()]
        return ready, [one for one in calls if one not in ready]

    def _remote(self, what: Any = None, **_options: Any) -> Any:
        if what is None:
            return self._remote
        if not isinstance(what, type):
            return types.SimpleNamespace(remote=lambda *given: self.submit(what, given))
        return types.SimpleNamespace(
            options=lambda **_: types.SimpleNamespace(remote=lambda: Handle(self, what()))
        )


class Handle:
    """An actor: its methods are called one at a time, never from a dead node."""

    def __init__(self, cluster: Cluster, actor: Any) -> None:
        self._cluster, self._actor = cluster, actor

    def __getattr__(self, name: str) -> Any:
        def remote(*given: Any) -> Call:
            if not self._cluster.alive.get(getattr(_node, "name", ""), True):
                return Call().end(error=NodeDiedError(name))
            if self._cluster.deaf.is_set():
                return Call()
            with self._cluster.lock:
                value = getattr(self._actor, name)(*given)
            return Call().end(tuple(map(dict, value)) if isinstance(value, tuple) else value)

        return types.SimpleNamespace(remote=remote)


def install(monkeypatch: Any, cluster: Cluster) -> Cluster:
    """Let `import ray` find this cluster."""
    monkeypatch.setitem(sys.modules, "ray", cluster.module())
    return cluster
