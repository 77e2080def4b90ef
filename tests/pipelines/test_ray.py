"""The engine `ray`: what a dead node had in hand is made again, every wait ends in words; on a stand-in and on Ray itself."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import _ray, batch, cli, machine
from pipelines._batch_folder import BATCH, Folder
from pipelines._ray import RayEngine
from pipelines.catalog import Unavailable
from pipelines.generate import Cancelled, Progress, generate
from pipelines.jobs import Job
from pipelines.request import Request


def _beside(name: str) -> types.ModuleType:
    place = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert place is not None
    assert place.loader is not None
    made = importlib.util.module_from_spec(place)
    place.loader.exec_module(made)
    return made


batches, clusters = _beside("batches"), _beside("clusters")
ROOT, Bench, whole = batches.ROOT, batches.Bench, batches.whole

MEMORY = 80 * 2**20
real = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install leapfrog-dit[ray]"
    ),
    pytest.mark.skipif(sys.platform == "win32", reason="kills processes"),
    # Ray leaves some of its own processes and sockets to the garbage collector
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A folder whose stand-in for a model is found in this process, and in every process that is started from it."""
    made = Bench(tmp_path, step=0.0)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return made


Cluster = Callable[..., Any]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Make a cluster that stands in for Ray."""
    made: list[Any] = []
    for name, seconds in (("LOOK", 0.0), ("GRACE", 0.5), ("ANSWER", 0.2), ("BEAT", 0.02)):
        monkeypatch.setattr(_ray, name, seconds)

    def make(nodes: int = 1, **more: Any) -> Any:
        made.append(clusters.install(monkeypatch, clusters.Cluster(nodes, **more)))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Maker:
    """A make for the threads of the stand-in: items wait in the middle of their work until they may go on."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        (bench.folder / "maker.py").write_text("make = None\n")
        self.module = types.ModuleType("maker")
        self.module.make = self.make  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "maker", self.module)
        place = importlib.util.spec_from_file_location("fake_model", bench.folder / "fake_model.py")
        assert place is not None
        assert place.loader is not None
        self.inner = importlib.util.module_from_spec(place)
        place.loader.exec_module(self.inner)
        self.held: set[str] = set()
        self.go = threading.Event()
        self.entered: dict[str, str] = {}

    def make(self, request: Request, *, on_step: Any) -> Any:
        self.entered[request.prompt] = sys.modules["ray"].get_runtime_context().get_node_id()
        more = True
        while more and request.prompt in self.held and not self.go.wait(0.01):
            more = on_step(Progress(1, 3, "denoise", 0.0))
        if not (more and on_step(Progress(2, 3, "denoise", 0.0))):  # cancelled, or on a node that is gone
            raise Cancelled("stopped")
        return self.inner.make(request, on_step)


@pytest.fixture
def maker(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Maker:
    return Maker(bench, monkeypatch)


def run(bench: Bench, prompts: list[str], tell: Any = None, **more: Any) -> batch.Outcome:
    planned = batch.plan(bench.manifest(*prompts), bench.output)
    return batch.run(planned, engine=RayEngine(make="maker:make"), tell=tell, **more)


def jobs(bench: Bench) -> dict[str, Job]:
    with Folder(bench.output).ledger() as ledger:
        return {job.item.id: job for job in ledger.jobs(batch=BATCH)}


@pytest.mark.parametrize("told", [True, False], ids=["told", "silent"])
def test_what_a_dead_node_had_in_hand_is_made_again_elsewhere(
    told: bool, bench: Bench, cluster: Cluster, maker: Maker
) -> None:
    nodes, prompts = cluster(2, told=told), [f"cat {i}" for i in range(6)]
    maker.held = {"cat 0"}
    lost: list[str] = []

    def tell(counts: dict[str, int], _seconds: float) -> None:
        if not lost and counts["done"] >= 2 and "cat 0" in maker.entered:
            lost.append(maker.entered["cat 0"])
            nodes.kill(lost[0])
            maker.held = set()

    outcome = run(bench, prompts, tell)
    assert lost
    assert outcome.counts["done"] == 6
    assert maker.entered["cat 0"] != lost[0]
    assert set(bench.calls()) == set(prompts)
    assert bench.calls()["cat 0"] == 1, "its first try never came to its picture"
    tries = {name: job.tries for name, job in jobs(bench).items()}
    assert tries == {name: 2 if name == "i0" else 1 for name in tries}
    whole(bench.output, 6)
    assert batch.verify(bench.output) == []


def test_a_call_that_never_began_is_given_back_when_a_node_dies(
    bench: Bench, cluster: Cluster, maker: Maker
) -> None:
    nodes = cluster(2, told=False)
    nodes.swallow = 1
    killed: list[int] = []

    def tell(counts: dict[str, int], _seconds: float) -> None:
        if not killed and counts["done"] == 2:
            killed.append(1)
            nodes.kill("n1")

    outcome = run(bench, ["cat", "dog", "cow"], tell)
    assert killed
    assert outcome.complete
    assert {job.tries for job in jobs(bench).values()} == {1}, "it cost no try"
    whole(bench.output, 3)


def test_a_busy_board_stops_nobody(bench: Bench, cluster: Cluster, maker: Maker) -> None:
    nodes = cluster(1)
    maker.held = {"cat"}

    def tell(_counts: dict[str, int], _seconds: float) -> None:
        if "cat" in maker.entered:
            nodes.deaf.set()
            maker.go.set()

    outcome = run(bench, ["cat", "dog"], tell)
    assert nodes.deaf.is_set()
    assert (outcome.complete, outcome.broken) == (True, "")


def test_a_cancelled_item_ends_within_its_step(bench: Bench, cluster: Cluster, maker: Maker) -> None:
    cluster(1)
    maker.held = {"cat"}

    def tell(_counts: dict[str, int], _seconds: float) -> None:
        if "cat" in maker.entered:
            with Folder(bench.output).ledger() as ledger:
                ledger.cancel(batch=BATCH)

    outcome = run(bench, ["cat"], tell)
    assert outcome.counts["cancelled"] == 1
    assert not bench.calls()


def test_a_step_that_never_ends_is_told(
    bench: Bench, cluster: Cluster, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster(1)
    monkeypatch.setattr(_ray, "HUNG", 0.2)
    hang = threading.Event()
    monkeypatch.setattr(maker.module, "make", lambda _request, on_step: hang.wait(60))
    outcome = run(bench, ["cat"], lambda counts, _: hang.set() if counts["poisoned"] else None)
    assert outcome.counts["poisoned"] == 1
    assert "one step took more than" in jobs(bench)["i0"].error


def test_clusters_without_room_or_answer_are_told_and_items_go_back(
    bench: Bench, cluster: Cluster, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ray, "PATIENCE", 0.5)
    outcome = (cluster(0), run(bench, ["cat"]))[1]
    assert "no node of the Ray cluster has offered a CPU" in outcome.broken
    nodes = cluster(1)
    maker.held = {"cat"}

    def tell(_counts: dict[str, int], _seconds: float) -> None:
        if "cat" in maker.entered:
            nodes.stuck.set()

    monkeypatch.setattr("pipelines.batch._finish", lambda *_: None)
    inner = RayEngine.stop
    monkeypatch.setattr(RayEngine, "stop", lambda self, _seconds: inner(self, 0.5))
    outcome = run(bench, ["cat"], tell)
    assert "answered nothing" in outcome.broken
    assert (outcome.counts["waiting"], jobs(bench)["i0"].tries) == (1, 0)
    nodes = cluster(1)
    nodes.deaf.set()
    with pytest.raises(Unavailable, match="started no process within"):
        run(bench, ["cat"])


def test_an_address_where_nothing_listens_is_told_before_ray_starts(
    bench: Bench, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(socket.socket()) as taken:  # bound, and listening to nobody
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        cluster(1)
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(sys.modules["ray"], "is_initialized", lambda: False)
        monkeypatch.setattr(machine, "strangers", list)
        given = ["batch", "run", str(bench.manifest("cat")), "--output", str(bench.output), "--engine", "ray"]
        assert cli.main([*given, "--json"]) == 3
    told = capsys.readouterr()
    assert f"no Ray cluster answers at {address}" in json.loads(told.out)["error"]["message"]
    assert "ray start --head" in told.err


class TestRay:
    """Ray itself, in its own processes."""

    pytestmark = real

    @pytest.fixture(autouse=True)
    def ended(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield
        import ray

        ray.shutdown()

    def test_one_node_of_this_computer(self, bench: Bench) -> None:
        planned = batch.plan(bench.manifest("cat", "bad", "dog"), bench.output)
        outcome = batch.run(planned, engine=RayEngine(make="fake_model:make"))
        assert (outcome.counts["done"], outcome.counts["poisoned"]) == (2, 1)
        assert bench.calls() == {"cat": 1, "dog": 1, "bad": 3}
        import ray

        assert not ray.is_initialized(), "the cluster that it began is gone"
        assert "a bad item" in jobs(bench)["i1"].error

    @pytest.mark.slow
    def test_a_node_that_is_killed_costs_no_item(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        import ray
        from ray.cluster_utils import Cluster

        monkeypatch.setenv("STEP", "0.3")
        prompts = [f"cat {i}" for i in range(16)]
        planned = batch.plan(bench.manifest(*prompts), bench.output)
        head = {"num_cpus": 1, "object_store_memory": MEMORY, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        node: Any = cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        caught: list[str] = []
        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
            engine = RayEngine(make="fake_model:make")

            def tell(counts: dict[str, int], _seconds: float) -> None:
                if caught or not counts["done"]:
                    return
                nodes = ray.get(engine.board.look.remote(), timeout=60)[0]
                here = [name for name in list(engine.tasks) if nodes.get(name) == node.node_id]
                if here and len(set(nodes.values())) == 2:
                    caught.extend(here)
                    cluster.remove_node(node, allow_graceful=False)

            outcome = batch.run(planned, engine=engine, tell=tell)
        finally:
            ray.shutdown()
            cluster.shutdown()
        assert caught, "a node was killed while it made something"
        assert outcome.counts["done"] == len(prompts)
        whole(bench.output, len(prompts))
        assert batch.verify(bench.output) == []
        calls = bench.calls()
        assert set(calls) == set(prompts)
        assert calls.total() <= len(prompts) + 1, "what the node had in hand was made again, and nothing else"

    @pytest.mark.slow
    def test_pictures_are_those_of_one_process(self, tiny: str, bench: Bench) -> None:
        planned = batch.plan(
            bench.manifest("a red cat", "a dog"), bench.output, defaults={"model": tiny, "steps": 3}
        )
        assert batch.run(planned, engine="ray", workers=1).complete
        whole(bench.output, 2)
        for job in jobs(bench).values():
            here = generate(Request.from_dict(job.item.request))
            assert here.report["pixels"] == job.report["pixels"]
