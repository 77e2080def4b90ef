"""Worker processes: signals, kills at any time, full disks and broken ledgers, and the pool that keeps them alive."""

from __future__ import annotations

import importlib.util
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import workers
from pipelines.jobs import Item, Ledger
from pipelines.workers import Pool, Worker

_place = importlib.util.spec_from_file_location("working", Path(__file__).with_name("working.py"))
assert _place is not None
assert _place.loader is not None
working = importlib.util.module_from_spec(_place)
_place.loader.exec_module(working)
ROOT, drawn, items, ledger = working.ROOT, working.drawn, working.items, working.ledger
fake, process, wait_for, check_whole = working.fake, working.process, working.wait_for, working.check_whole


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the size of files")
def test_a_worker_process_with_a_file_size_limit_ends_with_its_code(
    ledger: Ledger, fake: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ledger.add(items(out, 2))
    ledger._store.writing  # noqa: B018 - opened, so that the process only adds to it
    for job in ledger.jobs():
        assert job.state == "waiting"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))

    ran = process(ledger, "--until-empty", preexec_fn=limit, stderr=subprocess.PIPE, text=True)
    _, told = ran.communicate(timeout=300)
    assert ran.returncode == 4
    assert "make room and start again" in told
    assert not list(out.rglob("*.png")) if out.exists() else True
    assert ledger.counts()["done"] == 0
    ledger._set("state = 'running'", [], {"deadline": 0.0})
    assert process(ledger, "--until-empty").wait(timeout=300) == 0
    check_whole(ledger, out, 2)


@pytest.mark.parametrize("step", ["0.02", "30"])
def test_sigterm_gives_the_job_back_within_five_seconds(
    step: str, ledger: Ledger, fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP", step)
    ledger.add(items(tmp_path / "out", 300 if step != "30" else 1))
    ran = process(ledger)
    wait_for(lambda: ledger.counts()["running"])
    ran.send_signal(signal.SIGTERM)
    assert ran.wait(timeout=25) == 143, "long before its step of 30 s is over"
    assert workers.GRACE < 5, "on a machine that has time for it"
    counts = ledger.counts()
    assert counts["running"] == 0
    assert {job.tries for job in ledger.jobs(states=("waiting",), limit=-1)} == {0}
    assert not list((tmp_path / "out").glob(".*")) if (tmp_path / "out").exists() else True


def hunted(ledger: Ledger, kills: int, seed: int, workers: int = 2) -> int:
    """Let a pool work, and kill its processes at random times until they were killed so often; return how often."""
    chance, killed = random.Random(seed), 0
    pool = Pool(ledger, batch="b", make="fake_make:make", seconds=60.0)  # the pool itself tells who died
    pool_deaths = 10_000
    import pipelines._jobs_pool as module

    before, module.DEATHS = module.DEATHS, pool_deaths
    try:
        pool.start(workers)
        while killed < kills:
            wait_for(lambda: ledger.counts()["running"] or not ledger.counts()["waiting"])
            if not ledger.counts()["waiting"] + ledger.counts()["running"]:
                break
            time.sleep(chance.random() * 0.08)
            for number in pool.processes()[:1] if chance.random() < 0.5 else pool.processes()[1:2]:
                os.kill(number, signal.SIGKILL)
                killed += 1
        wait_for(lambda: not ledger.counts()["waiting"] + ledger.counts()["running"], 300)
    finally:
        pool.stop()
        module.DEATHS = before
    return killed


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_workers_lose_tear_and_double_nothing(
    kills: int, fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP", "0.02")
    ledger, out = Ledger(tmp_path / "state" / "jobs.sqlite", tries=1_000_000), tmp_path / "out"
    killed, count, batch = 0, 0, 12
    # the batch grows while it is hunted, so that there is always something to interrupt
    while killed < kills:
        count += batch
        ledger.add(items(out, count))
        killed += hunted(ledger, kills - killed, seed=killed + 1)
    assert killed == kills
    assert Worker(ledger, make=drawn, batch="b").run(until_empty=True) == 0, "nothing was left to do"
    check_whole(ledger, out, count)
    made = fake.read_text().split()
    assert set(map(int, made)) == set(range(count))
    assert len(made) <= count + kills, "only what a kill interrupted was made again"


def test_a_pool_starts_dead_workers_again_and_gives_up_on_deadly_items(
    ledger: Ledger, fake: Path, tmp_path: Path
) -> None:
    deadly = Item(
        request={"prompt": "deadly"}, id="deadly", batch="b", folder=str(tmp_path / "out"), priority=1
    )
    ledger.add([deadly, *items(tmp_path / "out", 3)])
    pool = Pool(ledger, batch="b", make="fake_make:make", until_empty=True)
    pool.start(1)
    assert pool.alive() == 1
    try:
        assert pool.wait(90)
    finally:
        pool.stop()
    assert (pool.problem, pool.alive(), pool.working()) == ("", 0, False)
    assert ledger.counts(batch="b")["done"] == 3
    (job,) = ledger.jobs(states=("poisoned",))
    assert job.item.id == "deadly"
    assert "worker ended in the middle of it 3 times" in job.error


def test_a_worker_ends_when_its_pool_is_gone(ledger: Ledger, fake: Path) -> None:
    ran = process(ledger, "--follow", stdin=subprocess.PIPE)
    assert ran.stdin is not None
    ran.stdin.close()
    assert ran.wait(timeout=300) == 0


def test_a_broken_ledger_ends_a_worker_process_with_its_code(tmp_path: Path, fake: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    path.write_bytes(b"no database" * 400)
    command = [sys.executable, "-m", "pipelines.workers", str(path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 3
    assert "damaged or no ledger" in ran.stderr
