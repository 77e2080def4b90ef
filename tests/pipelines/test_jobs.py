"""The job ledger: states, leases, keys, several processes at once, and files that are no ledger."""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pipelines import _jobs_store
from pipelines._jobs_store import Store
from pipelines.jobs import STATES, Item, Job, Ledger, LedgerError, default_ledger
from pipelines.request import RequestError

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Ledger:
    return Ledger(tmp_path / "state" / "jobs.sqlite", clock=clock)


def item(seed: int = 0, folder: Path | str = "", **more: Any) -> Item:
    return Item(**({"request": {"prompt": "a cat", "seed": seed}, "folder": str(folder)} | more))


def leased(ledger: Ledger, worker: str = "w", **more: Any) -> Job:
    job = ledger.lease(worker, **more)
    assert job is not None
    return job


def test_a_job_goes_from_waiting_to_done_and_comes_back_as_it_went_in(ledger: Ledger, tmp_path: Path) -> None:
    asked = item(
        7, tmp_path, id="seven", batch="b", owner="me", tags={"a": [1, "x"]}, output="sub/x.png", priority=2
    )
    (job,) = ledger.add([asked])
    assert (job.state, job.item, job.item.folder) == ("waiting", asked, str(tmp_path))
    running = leased(ledger, seconds=10)
    assert (running.name, running.state, running.tries, running.worker) == (job.name, "running", 1, "w")
    assert ledger.lease("another") is None
    assert ledger.beat(running, {"phase": "denoise", "step": 3, "steps": 9})
    seen = ledger.get(job.name)
    assert seen is not None
    assert (seen.phase, seen.progress["step"]) == ("denoise", 3)
    file = tmp_path / "x.png"
    file.write_bytes(b"pixels")
    assert ledger.done(running, [file], {"pixels": "sha256:1"})
    done = ledger.get(job.name)
    assert done is not None
    assert (done.state, done.over, done.files, done.report) == (
        "done",
        True,
        [str(file)],
        {"pixels": "sha256:1"},
    )
    assert done.sha256 == [f"sha256:{hashlib.sha256(b'pixels').hexdigest()}"]
    assert not ledger.done(running, [file], {}), "done is final"
    assert not ledger.beat(running)
    assert ledger.counts() == dict.fromkeys(STATES, 0) | {"done": 1}


def test_the_same_item_again_is_the_job_that_is_there(ledger: Ledger) -> None:
    first = ledger.add([item(1, batch="b"), item(2, batch="b"), item(1, batch="b")])
    assert first[0].name == first[2].name
    again = ledger.add([item(2, batch="b"), item(3, batch="b")])
    assert again[0].name == first[1].name
    assert ledger.counts(batch="b")["waiting"] == 3
    others = ledger.add([item(1, batch="c"), item(1, batch="b", owner="x"), item(1, batch="b", id="own")])
    assert len({one.name for one in (*first, *others)}) == 5, "another batch, owner or id is another job"
    ran = leased(ledger, batch="c")
    assert ledger.done(ran, [], {})
    assert ledger.add([item(1, batch="c")])[0].state == "done", "what is done is not asked for again"


def test_a_key_that_is_ready_is_taken_and_no_file_is_looked_at(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = item(3, batch="b", id="a")
    (job,) = ledger.add([plain])
    monkeypatch.setattr("pipelines.jobs.digests_of", lambda *_: pytest.fail("it was worked out again"))
    (again, other) = ledger.add([item(3, batch="b", id="a", ready=plain.key), item(3, batch="b", id="c", ready="k")])
    assert again.name == job.name
    assert (other.key, item(ready="k").key) == ("k", "k")


def test_all_of_a_list_is_added_or_nothing(ledger: Ledger) -> None:
    with pytest.raises(RequestError, match="steps"):
        ledger.add([item(1), Item(request={"prompt": "x", "steps": 0})])
    assert ledger.counts()["waiting"] == 0
    assert ledger.add([]) == []


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("images", {"request": {"prompt": "x", "images": 2}}),
        ("kind", {"kind": "dance"}),
        ("output", {"output": "../x.png"}),
        ("output", {"output": "/etc/x.png"}),
        ("output", {"output": "a\\..\\..\\x.png"}),
        ("output", {"output": "c:x.png"}),
        ("output", {"output": "folder/"}),
        ("output", {"output": "x\0.png"}),
    ],
)
def test_bad_items_are_refused_in_words(field: str, more: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        item(**more)
    assert caught.value.field == field


def test_higher_priority_goes_first_then_the_loaded_model_then_the_oldest(ledger: Ledger) -> None:
    two = {"prompt": "x", "model": "other/model"}
    names = [one.name for one in ledger.add([item(1), item(2), Item(request=two), item(3, priority=5)])]
    assert leased(ledger, prefers="other/model").name == names[3]
    assert leased(ledger, prefers="other/model").name == names[2]
    ledger.move(names[1], 1)
    assert leased(ledger).name == names[1]
    assert leased(ledger).name == names[0]
    assert ledger.lease("w") is None


def test_a_lease_that_runs_out_returns_the_job_and_the_old_worker_is_powerless(
    ledger: Ledger, clock: Clock, tmp_path: Path
) -> None:
    ledger.add([item()])
    old = leased(ledger, "old", seconds=10)
    clock.now += 9
    assert ledger.beat(old, seconds=10), "a heartbeat pushes the deadline on"
    clock.now += 9
    assert ledger.expire() == 0
    clock.now += 2
    new = leased(ledger, "new", seconds=10)
    assert (new.name, new.tries) == (old.name, 2)
    draft, final = tmp_path / "draft", tmp_path / "final.png"
    draft.write_bytes(b"old")
    assert not ledger.beat(old)
    assert ledger.target(old, [final]) is None
    assert not ledger.done(old, [final], {}, staged={draft: final})
    assert not final.exists(), "who lost the lease publishes nothing"
    assert ledger.failed(old, "late") == "running"
    ledger.give_back(old)
    held = ledger.get(new.name)
    assert held is not None
    assert (held.worker, held.state) == ("new", "running")


def test_tries_are_bounded_and_the_last_error_is_kept(ledger: Ledger, clock: Clock) -> None:
    ledger.add([item()])
    assert ledger.failed(leased(ledger), "first") == "waiting"
    assert ledger.failed(leased(ledger), "second") == "waiting"
    third = leased(ledger)
    assert ledger.failed(third, "third") == "poisoned"
    job = ledger.get(third.name)
    assert job is not None
    assert (job.state, job.error, job.tries) == ("poisoned", "third", 3)
    assert ledger.lease("w") is None
    assert ledger.retry(name=job.name) == 1
    for _ in range(3):
        assert leased(ledger, seconds=1).tries <= 3
        clock.now += 2
    assert ledger.expire() == 1
    job = ledger.get(third.name)
    assert job is not None
    assert job.state == "poisoned"
    assert "worker ended" in job.error
    assert ledger.lease("w") is None


def test_bad_input_fails_at_once_and_a_returned_job_counts_no_try(ledger: Ledger) -> None:
    ledger.add([item()])
    for _ in range(5):
        ledger.give_back(leased(ledger))
    job = leased(ledger)
    assert job.tries == 1
    assert ledger.failed(job, "bad", again=False) == "failed"
    assert ledger.retry(batch="", states=("failed",)) == 1
    assert leased(ledger).tries == 1


def test_cancelling_waiting_and_running_jobs(ledger: Ledger) -> None:
    jobs = ledger.add([item(1, owner="a"), item(2, owner="a"), item(3, owner="b")])
    running = leased(ledger)
    assert running.name == jobs[0].name
    assert ledger.cancel(name=jobs[0].name, owner="b") == 0, "not another's"
    assert ledger.cancel(owner="a") == 2
    assert not ledger.beat(running), "the worker hears of it"
    assert not ledger.done(running, [], {})
    assert ledger.counts()["cancelled"] == 2
    assert leased(ledger).name == jobs[2].name
    assert ledger.get(jobs[2].name, owner="a") is None
    for call in (ledger.cancel, ledger.retry):
        with pytest.raises(ValueError, match="needs a"):
            call()


def test_lost_workers_leave_their_jobs_at_once(ledger: Ledger) -> None:
    ledger.add([item(1), item(2)])
    leased(ledger, "dead", seconds=1000)
    kept = leased(ledger, "alive", seconds=1000)
    assert ledger.lost("dead") == 1
    assert ledger.counts()["waiting"] == 1
    assert ledger.beat(kept)


def test_verify_finds_missing_and_changed_files(ledger: Ledger, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.png" for i in range(3)]
    ledger.add([item(i, batch="b", id=f"i{i}") for i in range(3)])
    for file in files:
        file.write_bytes(file.name.encode())
        assert ledger.done(leased(ledger), [file], {})
    assert ledger.verify("b") == []
    files[0].unlink()
    files[1].write_bytes(b"torn")
    told = ledger.verify("b")
    assert len(told) == 2
    assert "i0: 0.png is missing" in told[0]
    assert "i1: 1.png holds other bytes" in told[1]
    assert (ledger.counts()["waiting"], ledger.counts()["done"]) == (2, 1)
    assert ledger.verify("other") == []


def test_a_job_keeps_its_place_on_the_disk(ledger: Ledger, tmp_path: Path) -> None:
    names = [tmp_path / f"cat{more}.png" for more in ("", "-2", "-3")]
    names[0].write_bytes(b"another's")
    ledger.add([item(1), item(2)])
    first, second = leased(ledger), leased(ledger)
    assert ledger.target(first, names) == names[1]
    assert ledger.target(second, names) == names[2], "promised is taken"
    names[1].write_bytes(b"its own, from a try that was killed")
    assert ledger.target(first, names) == names[1]
    ledger.add([item(3)])
    with pytest.raises(RequestError, match="nothing of others is replaced"):
        ledger.target(leased(ledger), names)


def test_lists_are_filtered_and_paged(ledger: Ledger) -> None:
    words = ["a red Fish", "a dog", 'a "quoted" Käse']
    requests = [{"prompt": word, "seed": i} for i, word in enumerate(words)]
    ledger.add([Item(request=one, batch="b", id=f"n{i}") for i, one in enumerate(requests)])
    assert [one.item.id for one in ledger.jobs()] == ["n2", "n1", "n0"]
    assert [one.item.id for one in ledger.jobs(newest_first=False, limit=1, offset=1)] == ["n1"]
    assert [one.item.id for one in ledger.jobs(text="FISH")] == ["n0"]
    assert [one.item.id for one in ledger.jobs(text='"quoted" Käse')] == ["n2"]
    leased(ledger)
    assert [one.item.id for one in ledger.jobs(states=("running",), batch="b", owner="")] == ["n0"]
    assert ledger.jobs(batch="c") == []


def test_watchers_hear_of_every_change_once(ledger: Ledger) -> None:
    ledger.add([item(i) for i in range(3)])
    mark, told = ledger.changes(0)
    assert len(told) == 3
    assert ledger.changes(mark) == (mark, [])
    job = leased(ledger)
    ledger.beat(job, {"phase": "denoise", "step": 1})
    later, told = ledger.changes(mark)
    assert later > mark
    assert [(one.name, one.phase) for one in told] == [(job.name, "denoise")]
    ledger.cancel(batch="")
    assert len(ledger.changes(later)[1]) == 3
    assert ledger.changes(0, owner="nobody")[1] == []


def test_a_long_list_of_changes_comes_in_pieces(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.jobs.CHANGES", 4)
    for i in range(10):
        ledger.add([item(i)])
    mark, seen = 0, []
    for _ in range(4):
        mark, told = ledger.changes(mark)
        assert len(told) <= 4
        seen += [one.name for one in told]
    assert len(seen) == len(set(seen)) == 10


@pytest.mark.parametrize(
    "content", [b"this is a text file, and no database at all" * 30, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_damaged_file_is_refused_and_not_touched(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="damaged or no ledger"):
        Ledger(path)
    assert path.read_bytes() == content


def test_foreign_and_newer_databases_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE things (x)")
    db.close()
    before = foreign.read_bytes()
    with pytest.raises(LedgerError, match="another program"):
        Ledger(foreign)
    assert foreign.read_bytes() == before
    newer = tmp_path / "newer.sqlite"
    Ledger(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LedgerError, match=r"version 99.*update leapfrog"):
        Ledger(newer)
    with pytest.raises(LedgerError, match="cannot be written"):
        Ledger(foreign / "below" / "jobs.sqlite")


def test_damage_that_comes_later_is_told_in_words(ledger: Ledger) -> None:
    ledger.add([item(i, tags={"long": "x" * 3000}) for i in range(50)])
    ledger.close()
    with ledger.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 60_000)
    with pytest.raises(LedgerError, match="damaged or no ledger"):
        ledger.jobs()


def test_the_ledger_lies_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LEAPFROG_STATE", str(tmp_path / "here"))
    assert default_ledger() == tmp_path / "here" / "jobs.sqlite"
    monkeypatch.delenv("LEAPFROG_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert default_ledger() == tmp_path / "xdg" / "leapfrog" / "jobs.sqlite"
    path = tmp_path / "private" / "jobs.sqlite"
    Ledger(path).close()
    if sys.platform != "win32":
        assert path.stat().st_mode & 0o077 == 0, "prompts are private"


LEASING = """
import sys
from pathlib import Path
from pipelines.jobs import Ledger
ledger, out = Ledger(Path(sys.argv[1])), []
sys.stdin.readline()
while (job := ledger.lease(sys.argv[2])) is not None:
    out.append(job.name)
    assert ledger.done(job, [], {})
print("\\n".join(out))
"""


def test_many_may_open_a_new_ledger_at_once(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def opened(path: Path, gate: threading.Barrier) -> None:
        gate.wait()
        try:
            Ledger(path).close()
        except LedgerError as error:
            errors.append(error)

    for place in range(20):
        gate = threading.Barrier(8)
        told = (tmp_path / str(place) / "jobs.sqlite", gate)
        threads = [threading.Thread(target=opened, args=told) for _ in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert not errors


def test_the_mode_of_a_new_ledger_is_waited_for_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "other.sqlite")
    file = tmp_path / "new.sqlite"
    reader, writer = (sqlite3.connect(file, timeout=0, isolation_level=None) for _ in range(2))
    writer.execute("CREATE TABLE some (one)")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM some").fetchall()
    monkeypatch.setattr(_jobs_store, "PATIENCE", 0.1)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        store._write_ahead(writer)
    monkeypatch.setattr(_jobs_store, "PATIENCE", 60.0)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            reader.execute("COMMIT")

    monkeypatch.setattr(_jobs_store.time, "sleep", wait)
    assert store._write_ahead(writer) == "wal"
    assert len(waits) == 3
    for one in (reader, writer, store):
        one.close()


def test_several_processes_get_every_item_exactly_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "jobs.sqlite")
    names = {job.name for job in ledger.add([item(i) for i in range(60)])}
    command = [sys.executable, "-c", LEASING, str(ledger.path)]
    workers = [
        subprocess.Popen(
            [*command, f"w{i}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
        )
        for i in range(4)
    ]
    for one in workers:  # all begin together
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    taken = [worker.communicate(timeout=300)[0].split() for worker in workers]
    assert sorted(name for names in taken for name in names) == sorted(names)
    assert ledger.counts()["done"] == 60


def test_several_threads_share_one_ledger(ledger: Ledger) -> None:
    ledger.add([item(i) for i in range(40)])
    taken: list[str] = []

    def work(number: int) -> None:
        while (job := ledger.lease(f"t{number}")) is not None:
            taken.append(job.name)
            ledger.beat(job, {"phase": "denoise"})
            ledger.done(job, [], {})

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(taken) == len(set(taken)) == 40
