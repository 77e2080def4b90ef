"""What of a job outlives the death of its worker, and a loss of power, at the worst moments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import jobs
from pipelines.jobs import Item, Job, Ledger


class Clock:
    """A clock that is moved by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "state" / "jobs.sqlite", clock=clock)
    yield made
    made.close()


def leased(ledger: Ledger, worker: str = "w") -> Job:
    job = ledger.lease(worker, seconds=10)
    assert job is not None
    return job


def staged(ledger: Ledger, folder: Path) -> tuple[Job, Path, dict[Path, Path]]:
    """A leased job, its final file, and its drafts: the picture and what lies beside it."""
    ledger.add([Item(request={"prompt": "a cat", "seed": 1}, folder=str(folder), batch="b")])
    job, final = leased(ledger), folder / "x.png"
    assert ledger.target(job, [final]) == final
    drafts = {folder / "draft.json": final.with_suffix(".json"), folder / "draft.png": final}
    for draft in drafts:
        draft.write_bytes(draft.name.encode())
    return job, final, drafts


class Died(BaseException):
    """The process ended here."""


def test_files_that_appeared_before_their_worker_died_are_not_made_again(
    ledger: Ledger, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, final, drafts = staged(ledger, tmp_path)

    def die(*_: Any) -> None:
        for draft, name in drafts.items():
            draft.rename(name)
        raise Died

    monkeypatch.setattr("pipelines.jobs.publish", die)
    with pytest.raises(Died):
        ledger.done(job, [final], {"pixels": "p"}, staged=drafts)
    seen = ledger.get(job.name)
    assert seen is not None
    assert (seen.state, seen.files, seen.sha256, seen.report) == ("running", [], [], {}), (
        "nothing is promised before"
    )
    clock.now += 11
    left = tmp_path / f".leapfrog-{job.name}-{job.lease}"
    left.mkdir()
    ledger.expire()
    assert ledger.lease("another") is None
    assert not left.exists(), "nothing half made stays"
    seen = ledger.get(job.name)
    assert seen is not None
    assert (seen.state, seen.files, seen.report, seen.error) == ("done", [str(final)], {"pixels": "p"}, "")
    assert ledger.verify("b") == []


@pytest.mark.parametrize("left", ["nothing", "torn"])
def test_files_that_did_not_appear_whole_are_made_again(
    left: str, ledger: Ledger, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, final, drafts = staged(ledger, tmp_path)

    def die(*_: Any) -> None:
        if left == "torn":
            final.write_bytes(b"draft.")
        raise Died

    monkeypatch.setattr("pipelines.jobs.publish", die)
    with pytest.raises(Died):
        ledger.done(job, [final], {}, staged=drafts)
    monkeypatch.undo()
    clock.now += 11
    again = leased(ledger, "another")
    assert (again.name, again.tries) == (job.name, 2)
    assert ledger.target(again, [final]) == final, "its own place, also where something torn lies there"
    assert ledger.done(again, [final], {}, staged=drafts)
    assert ledger.verify("b") == []


def test_a_loss_of_power_after_the_files_appeared_loses_nothing(
    ledger: Ledger, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SQLite had made last when the first name appeared is all that is left of the ledger: it must know the names."""
    kept, lasting = tmp_path / "kept", [0]
    inner = ledger._store.writing

    def writing(*, durable: bool = True) -> Any:
        lasting[0] += durable
        return inner(durable=durable)

    monkeypatch.setattr(ledger._store, "writing", writing)
    job, final, drafts = staged(ledger, tmp_path)
    lasting[0] = 0

    def powerless(given: Any) -> None:
        assert lasting[0] == 1, "one commit that lasts, and it is before the names"
        kept.mkdir()
        for one in ledger.path.parent.glob("jobs.sqlite*"):
            (kept / one.name).write_bytes(one.read_bytes())
        publish(given)

    publish = jobs.publish
    monkeypatch.setattr("pipelines.jobs.publish", powerless)
    assert ledger.done(job, [final], {"pixels": "p"}, staged=drafts)
    assert lasting[0] == 1, "the files decide: the last commit need not last"
    monkeypatch.undo()
    clock.now += 11
    found = Ledger(kept / "jobs.sqlite", clock=clock)
    assert found.counts()["running"] == 1
    found.expire()
    (seen,) = found.jobs()
    assert (seen.state, seen.files, seen.report) == ("done", [str(final)], {"pixels": "p"})
    found.close()
