"""Workers: commits, cancelling, signals, kills at any time, a full disk and bad items."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines import catalog
from pipelines.generate import Cancelled, Progress, generate
from pipelines.jobs import Item, Job, Ledger
from pipelines.request import Request, RequestError
from pipelines.result import Picture, Result, pixel_hash
from pipelines.workers import DiskFull, Pool, Worker

ROOT = Path(__file__).resolve().parents[2]

FAKE = '''
"""A make that draws at once, notes every run in a file, and does what its environment says."""
import os, time
from PIL import Image
from pipelines.generate import Cancelled, Progress
from pipelines.result import Picture, Result, pixel_hash

def make(request, *, on_step=None):
    for step in range(4):
        time.sleep(float(os.environ.get("FAKE_STEP", "0.001")))
        if on_step and on_step(Progress(step, 4, "denoise", 0.0)) is False:
            raise Cancelled("stopped")
    if request.prompt == "deadly":
        os._exit(9)
    image = Image.effect_noise((24, 24), 50).convert("RGB") if request.prompt == "noise" else Image.new(
        "RGB", (24, 24), (request.seed % 256, request.seed // 256, 7))
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(f"{request.seed}\\n")
    report = {"seed": request.seed, "pixels": pixel_hash([image]), "warnings": [], "failures": [], "at": time.time()}
    return Result((Picture((image,), request, report),), request, report)
'''


def drawn(request: Request, on_step: Any = None, size: int = 24) -> Result:
    """Draw at once what FAKE draws."""
    for step in range(3):
        if on_step is not None and on_step(Progress(step, 3, "denoise", 0.0)) is False:
            raise Cancelled("stopped")
    image = Image.new("RGB", (size, size), (request.seed % 256, request.seed // 256, 7))
    report = {"seed": request.seed, "pixels": pixel_hash([image]), "warnings": [], "failures": []}
    return Result((Picture((image,), request, report),), request, report)


def items(folder: Path, count: int, **more: Any) -> list[Item]:
    return [
        Item(
            request={"prompt": "a cat", "seed": i},
            id=f"i{i}",
            batch="b",
            folder=str(folder),
            output=f"{i}.png",
            **more,
        )
        for i in range(count)
    ]


def job_of(ledger: Ledger, name: str) -> Job:
    job = ledger.get(name)
    assert job is not None
    return job


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "state" / "jobs.sqlite")
    yield made
    made.close()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the fake make where worker processes find it, and return its log."""
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes" / "fake_make.py").write_text(FAKE)
    log = tmp_path / "log.txt"
    log.touch()
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path / 'fakes'}")
    return log


def process(ledger: Ledger, *more: str, **options: Any) -> subprocess.Popen[Any]:
    command = [
        sys.executable,
        "-m",
        "pipelines.workers",
        str(ledger.path),
        "--make=fake_make:make",
        "--batch=b",
    ]
    return subprocess.Popen([*command, *more], cwd=ROOT, **options)


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def check_whole(ledger: Ledger, folder: Path, count: int) -> None:
    """Every item is done, its file is whole and its own, and there is no other file."""
    assert ledger.counts(batch="b")["done"] == count
    assert ledger.verify("b") == []
    for job in ledger.jobs(batch="b", limit=-1):
        (file,) = job.files
        with Image.open(file) as opened:
            assert pixel_hash([opened]) == job.report["pixels"]
        assert Request.from_file(file).seed == job.item.request["seed"]
        assert (
            json.loads(Path(file).with_suffix(".json").read_text())["report"]["pixels"]
            == job.report["pixels"]
        )
    expected = {f"{i}{ending}" for i in range(count) for ending in (".png", ".json")}
    assert {one.name for one in folder.iterdir()} == expected


def test_a_batch_is_made_and_a_second_run_makes_only_what_is_missing(ledger: Ledger, tmp_path: Path) -> None:
    made: list[int] = []

    def make(request: Request, on_step: Any = None) -> Result:
        made.append(request.seed)
        return drawn(request, on_step)

    out = tmp_path / "out"
    ledger.add(items(out, 4))
    assert Worker(ledger, make=make, batch="b").run(until_empty=True) == 4
    check_whole(ledger, out, 4)
    ledger.add(items(out, 5))
    (out / "1.png").unlink()
    (out / "2.png").write_bytes(b"torn")
    made.clear()
    assert Worker(ledger, make=make, batch="b").run(until_empty=True) == 3
    assert sorted(made) == [1, 2, 4]
    check_whole(ledger, out, 5)


def test_names_are_made_of_prompt_and_seed_and_never_taken_twice(ledger: Ledger, tmp_path: Path) -> None:
    out = tmp_path / "out"
    request = {"prompt": "a cat", "seed": 1}
    ledger.add(Item(request=request, id=f"n{i}", folder=str(out)) for i in range(3))
    Worker(ledger, make=drawn).run(until_empty=True)
    names = sorted(Path(one.files[0]).name for one in ledger.jobs())
    assert names == ["a-cat-1-2.png", "a-cat-1-3.png", "a-cat-1.png"]
    assert len(list(out.iterdir())) == 6


def test_files_of_others_are_not_replaced(ledger: Ledger, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "0.png").write_bytes(b"mine")
    ledger.add(items(out, 2))
    assert Worker(ledger, make=drawn, batch="b").run(until_empty=True) == 1
    assert (out / "0.png").read_bytes() == b"mine"
    (failed,) = ledger.jobs(states=("failed",))
    assert "nothing of others is replaced" in failed.error
    assert {one.name for one in out.iterdir()} == {"0.png", "1.png", "1.json"}


def test_one_bad_item_never_stops_the_others(ledger: Ledger, tmp_path: Path) -> None:
    def make(request: Request, on_step: Any = None) -> Result:
        if request.seed == 1:
            raise RequestError("steps", 0, "more")
        if request.seed == 2:
            raise RuntimeError("a prompt that breaks the model")
        result = drawn(request, on_step)
        if request.seed == 3:
            result.report["failures"].append("the picture contains NaN")
        return result

    ledger.add(items(tmp_path / "out", 5))
    assert Worker(ledger, make=make, batch="b").run(until_empty=True) == 3
    jobs = {job.item.id: job for job in ledger.jobs()}
    assert {name: job.state for name, job in jobs.items()} == {
        "i0": "done", "i1": "failed", "i2": "poisoned", "i3": "done", "i4": "done",
    }  # fmt: skip
    assert jobs["i1"].error == "steps must be more; got 0"
    assert "a prompt that breaks the model" in jobs["i2"].error
    assert (jobs["i1"].tries, jobs["i2"].tries) == (1, 3)
    assert jobs["i3"].report["failures"] == ["the picture contains NaN"], "flagged, and not hidden"


def test_an_unreadable_request_fails_in_words(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add([Item(request={"prompt": "x", "model": "no such model", "seed": 1}, folder=str(tmp_path))])
    assert Worker(ledger).run(until_empty=True) == 0
    (job,) = ledger.jobs()
    assert (job.state, job.tries) == ("failed", 1)
    assert "no such model" in job.error


def test_cancelling_stops_within_one_step_and_never_decodes(
    ledger: Ledger, tiny: str, tmp_path: Path
) -> None:
    request = {"prompt": "a red cat", "model": tiny, "steps": 30, "width": 32, "height": 32}
    (job,) = ledger.add([Item(request=request, folder=str(tmp_path / "out"))])
    steps: list[int] = []
    loaded = catalog.load(tiny)
    inner, decoded = loaded.pipeline.codec.decode, []

    def make(asked: Request, on_step: Any = None) -> Result:
        def heard(progress: Progress) -> Any:
            if progress.phase == "denoise":
                steps.append(progress.step)
                if progress.step == 2:
                    ledger.cancel(name=job.name)
            return on_step(progress)

        return generate(asked, on_step=heard)

    loaded.pipeline.codec.__dict__["decode"] = lambda *given: decoded.append(1) or inner(*given)
    try:
        assert Worker(ledger, make=make).run(until_empty=True) == 0
    finally:
        del loaded.pipeline.codec.__dict__["decode"]
    assert steps == [1, 2]
    assert not decoded
    assert job_of(ledger, job.name).state == "cancelled"
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_stopped_worker_gives_its_job_back(ledger: Ledger, tmp_path: Path) -> None:
    (job,) = ledger.add(items(tmp_path / "out", 1))
    worker = Worker(ledger, batch="b")

    def make(request: Request, on_step: Any = None) -> Result:
        worker.stop()
        return drawn(request, on_step)

    worker._make = make
    assert worker.run() == 0
    back = job_of(ledger, job.name)
    assert (back.state, back.tries) == ("waiting", 0)


def test_heartbeats_hold_a_lease_through_a_long_step(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add(items(tmp_path / "out", 1))

    def make(request: Request, on_step: Any = None) -> Result:
        time.sleep(1.0)
        assert ledger.expire() == 0
        return drawn(request, on_step)

    assert Worker(ledger, make=make, batch="b", seconds=0.4).run(until_empty=True) == 1
    assert ledger.jobs()[0].tries == 1


def test_a_worker_keeps_to_the_model_that_it_has_loaded(ledger: Ledger, tmp_path: Path) -> None:
    models = ["a/a", "b/b", "a/a", "b/b", "a/a"]
    ledger.add(
        Item(request={"prompt": "x", "seed": i, "model": model}, folder=str(tmp_path))
        for i, model in enumerate(models)
    )
    order: list[str] = []

    def make(request: Request, on_step: Any = None) -> Result:
        order.append(request.model)
        return drawn(request, on_step)

    Worker(ledger, make=make).run(until_empty=True)
    assert order == ["a/a", "a/a", "a/a", "b/b", "b/b"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_stops_cleanly_and_the_work_goes_on_later(
    number: int, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    ledger.add(items(out, 3))
    replace, room = os.fsync, [3]

    def fsync(handle: int) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(number, os.strerror(number))
        replace(handle)

    monkeypatch.setattr("pipelines.result.os.fsync", fsync)
    with pytest.raises(DiskFull, match="the disk is full; make room and start again"):
        Worker(ledger, make=drawn, batch="b").run(until_empty=True)
    counts = ledger.counts()
    assert counts["running"] == counts["failed"] == counts["poisoned"] == 0
    assert counts["waiting"] >= 1
    assert not [one for one in out.rglob("*") if one.name.startswith(".")], "nothing half written stays"
    monkeypatch.undo()
    Worker(ledger, make=drawn, batch="b").run(until_empty=True)
    check_whole(ledger, out, 3)


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
    _, told = ran.communicate(timeout=60)
    assert ran.returncode == 4
    assert "make room and start again" in told
    assert not list(out.rglob("*.png")) if out.exists() else True
    assert ledger.counts()["done"] == 0
    ledger._set("state = 'running'", [], {"deadline": 0.0})
    assert process(ledger, "--until-empty").wait(timeout=60) == 0
    check_whole(ledger, out, 2)


@pytest.mark.parametrize("step", ["0.02", "30"])
def test_sigterm_gives_the_job_back_within_five_seconds(
    step: str, ledger: Ledger, fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP", step)
    ledger.add(items(tmp_path / "out", 300 if step != "30" else 1))
    ran = process(ledger)
    wait_for(lambda: ledger.counts()["running"])
    start = time.monotonic()
    ran.send_signal(signal.SIGTERM)
    assert ran.wait(timeout=20) == 143
    assert time.monotonic() - start < 5
    counts = ledger.counts()
    assert counts["running"] == 0
    assert {job.tries for job in ledger.jobs(states=("waiting",), limit=-1)} == {0}
    assert not list((tmp_path / "out").glob(".*")) if (tmp_path / "out").exists() else True


def hunted(ledger: Ledger, kills: int, seed: int, workers: int = 2) -> int:
    """Let a pool work, and kill its processes at random times until they were killed so often; return how often."""
    chance, killed = random.Random(seed), 0
    pool = Pool(ledger, batch="b", make="fake_make:make", seconds=5.0)
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
def test_killed_workers_lose_tear_and_double_nothing(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP", "0.01")
    ledger, out = Ledger(tmp_path / "state" / "jobs.sqlite", tries=1000), tmp_path / "out"
    ledger.add(items(out, 25))
    assert hunted(ledger, 5, seed=3) >= 3
    assert Worker(ledger, make=drawn, batch="b").run(until_empty=True) == 0, "nothing was left to do"
    check_whole(ledger, out, 25)
    made = fake.read_text().split()
    assert set(map(int, made)) == set(range(25))
    assert len(made) <= 25 + 10, "only what a kill interrupted was made again"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_two_hundred_kills_lose_tear_and_double_nothing(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP", "0.02")
    ledger, out = Ledger(tmp_path / "state" / "jobs.sqlite", tries=1_000_000), tmp_path / "out"
    killed, count, batch = 0, 0, 12
    while killed < 200:  # the batch grows while it is hunted, so that there is always something to interrupt
        count += batch
        ledger.add(items(out, count))
        killed += hunted(ledger, 200 - killed, seed=killed + 1)
    assert killed == 200
    assert Worker(ledger, make=drawn, batch="b").run(until_empty=True) == 0
    check_whole(ledger, out, count)
    assert set(map(int, fake.read_text().split())) == set(range(count))


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
    assert ran.wait(timeout=30) == 0


def test_a_broken_ledger_ends_a_worker_process_with_its_code(tmp_path: Path, fake: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    path.write_bytes(b"no database" * 400)
    command = [sys.executable, "-m", "pipelines.workers", str(path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 3
    assert "damaged or no ledger" in ran.stderr


def test_two_workers_in_one_process_do_not_meet(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add(items(tmp_path / "out", 20))
    workers = [Worker(ledger, make=drawn, batch="b") for _ in range(2)]
    threads = [threading.Thread(target=one.run, kwargs={"until_empty": True}) for one in workers]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    check_whole(ledger, tmp_path / "out", 20)
    assert {job.tries for job in ledger.jobs()} == {1}
