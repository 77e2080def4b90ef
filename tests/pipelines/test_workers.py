"""Workers: commits, cancelling, signals, kills at any time, a full disk and bad items."""

from __future__ import annotations

import errno
import importlib.util
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import catalog
from pipelines.generate import Progress, generate
from pipelines.jobs import Item, Ledger
from pipelines.request import Request, RequestError
from pipelines.result import Result
from pipelines.workers import DiskFull, Worker

_place = importlib.util.spec_from_file_location("working", Path(__file__).with_name("working.py"))
assert _place is not None
assert _place.loader is not None
working = importlib.util.module_from_spec(_place)
_place.loader.exec_module(working)
drawn, items = working.drawn, working.items
job_of, ledger, check_whole = working.job_of, working.ledger, working.check_whole


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


def test_a_worker_that_is_told_of_a_job_does_not_wait_for_its_next_look(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle, made, counts = threading.Event(), threading.Event(), ledger.counts

    def counted(**which: Any) -> dict[str, int]:
        idle.set()
        return counts(**which)

    def make(request: Request, on_step: Any = None) -> Result:
        made.set()
        return drawn(request, on_step)

    monkeypatch.setattr(ledger, "counts", counted)
    worker = Worker(ledger, make=make, batch="b", pause=3600.0)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    assert idle.wait(120)  # it has found nothing
    ledger.add(items(tmp_path / "out", 1))
    worker.look()
    assert made.wait(120)
    worker.stop()
    thread.join(120)
    assert not thread.is_alive()


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


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux to tell folders from files")
def test_bytes_and_names_last_before_a_job_counts_as_done(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that a loss of power cannot break, and no more synchronisations than it needs."""
    told: list[str] = []
    sync, replace, writing, out = os.fsync, os.replace, ledger._store.writing, tmp_path / "out"
    (job,) = ledger.add(items(out, 1))

    def fsync(handle: int) -> None:
        told.append("names" if os.path.isdir(f"/proc/self/fd/{handle}") else "bytes")
        sync(handle)

    def renamed(old: Any, new: Any) -> None:
        if Path(new).parent == out:
            told.append(f"appears {Path(new).suffix}")
        replace(old, new)

    def written(*, durable: bool = True) -> Any:
        told.extend(["lasting commit"] if durable else [])
        return writing(durable=durable)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.replace", renamed)
    monkeypatch.setattr(ledger._store, "writing", written)
    Worker(ledger, make=drawn, batch="b").run(until_empty=True)
    assert told == ["bytes", "bytes", "lasting commit", "appears .json", "appears .png", "names"]
    assert job_of(ledger, job.name).state == "done"
