"""Shards: each is whole or not there, every finished item is in exactly one, and what was packed is not made again."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import signal
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines import batch, shards
from pipelines._batch_folder import BATCH, Folder
from pipelines.jobs import Item, Job, Ledger
from pipelines.manifest import Manifest
from pipelines.request import Request, RequestError
from pipelines.result import Picture, Result, SaveError
from pipelines.shards import Shards, member_key

_place = importlib.util.spec_from_file_location("batches", Path(__file__).with_name("batches.py"))
assert _place is not None
assert _place.loader is not None
batches = importlib.util.module_from_spec(_place)
_place.loader.exec_module(batches)
Driven = batches.Bench
FORMS = ["webdataset", "parquet"]


class Bench:
    """A begun batch whose items are finished by hand."""

    def __init__(self, output: Path, form: str, members: int = 3) -> None:
        if form == "parquet":
            pytest.importorskip("pyarrow", reason="Parquet shards need pyarrow")
        self.folder = Folder(output)
        self.folder.begin(form, members, Manifest(output, (), {}))
        self.ledger = Ledger(self.folder.path)
        self.made = 0

    def finish(self, count: int) -> list[Job]:
        """Add items and finish them as a worker does."""
        found = []
        for number in range(self.made, self.made + count):
            request = Request(prompt=f"cat {number}", seed=number)
            item = Item(
                request=request.to_dict(),
                id=f"i.{number}",
                batch=BATCH,
                folder=str(self.folder.items),
                tags={"n": number},
            )
            self.ledger.add([item])
            job = self.ledger.lease("hand")
            assert job is not None
            picture = Picture((Image.new("RGB", (8, 8), (number, 0, 0)),), request, {})
            paths = Result((picture,), request, {}).save(
                self.folder.items / f"{job.item.id}.png", overwrite=True
            )
            assert self.ledger.done(job, paths, {"pixels": number})
            found.append(job)
        self.made += count
        return found

    def open(self) -> Shards:
        made = self.folder.shards(self.ledger)
        assert made is not None
        return made


@pytest.fixture(params=FORMS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "out", request.param)
    yield made
    made.ledger.close()


def members(output: Path) -> list[dict[str, Any]]:
    """Return what every shard holds, read as others would read it; the pictures are decoded."""
    found: list[dict[str, Any]] = []
    for path in sorted(output.glob("shard-*.tar")):
        pairs: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                key, _, ending = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                pairs.setdefault(key, {})[ending] = file.read()
        for key, files in pairs.items():
            assert set(files) == {"png", "json"}
            found.append(json.loads(files["json"]) | {"member": key, "data": files["png"]})
    for path in sorted(output.glob("shard-*.parquet")):
        from pyarrow import parquet

        for row in parquet.read_table(path).to_pylist():
            texts = {name: json.loads(row[name]) for name in ("request", "report", "tags")}
            found.append(
                row
                | texts
                | {"member": row["media"]["path"].removesuffix(".png"), "data": row["media"]["bytes"]}
            )
    for one in found:
        with Image.open(io.BytesIO(one["data"])) as picture:
            picture.load()
    return found


def test_full_shards_are_written_and_a_last_one_when_asked(bench: Bench) -> None:
    jobs = bench.finish(7)
    opened = bench.open()
    assert opened.pack() == 6
    assert len(opened.names()) == 2
    assert len(list(bench.folder.items.glob("*.png"))) == 1
    assert opened.pack() == 0
    assert opened.pack(rest=True) == 1
    found = members(bench.folder.output)
    assert [one["id"] for one in found] == [f"i.{n}" for n in range(7)]
    assert [one["member"] for one in found] == [member_key(job) for job in jobs]
    assert all("." not in one["member"] for one in found)
    assert [(one["request"]["seed"], one["tags"], one["report"]) for one in found] == [
        (n, {"n": n}, {"pixels": n}) for n in range(7)
    ]
    assert not list(bench.folder.items.iterdir())
    assert opened.verify() == []
    opened.close()


def test_shards_have_the_same_bytes_for_the_same_items(tmp_path: Path) -> None:
    data = []
    for name in ("a", "b"):
        made = Bench(tmp_path / name, "webdataset")
        made.finish(3)
        opened = made.open()
        opened.pack()
        opened.close()
        made.ledger.close()
        data.append((made.folder.output / "shard-000000.tar").read_bytes())
        time.sleep(0.01)
    assert data[0] == data[1]


@pytest.mark.parametrize("moment", ["fsync", "replace", "noted"])
def test_a_death_in_the_middle_leaves_nothing_torn(
    bench: Bench, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    bench.finish(3)
    opened = bench.open()
    with monkeypatch.context() as patch:
        if moment == "noted":
            patch.setattr(shards, "_remove", die)  # noted, but the single files are still there
        else:
            patch.setattr(os, moment, die)
        with pytest.raises(Killed):
            opened.pack()
    opened.close()
    draft = bench.folder.output / ".shard-000000.tar.1-1.part"
    draft.write_bytes(b"what a killed process leaves")
    opened = bench.open()
    assert opened.count() == (3 if moment == "noted" else 0)
    opened.tidy()
    assert not draft.exists()
    opened.pack(rest=True)
    assert len(members(bench.folder.output)) == 3
    assert not list(bench.folder.items.iterdir())
    assert bench.ledger.counts(batch=BATCH)["done"] == 3
    opened.close()


def test_a_full_disk_is_told_and_nothing_is_lost(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.finish(3)
    opened = bench.open()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SaveError) as caught:
            opened.pack()
    assert caught.value.full
    assert not list(bench.folder.output.glob(".shard*"))
    opened.close()
    opened = bench.open()
    assert opened.pack() == 3
    opened.close()


def test_a_damaged_shard_and_a_changed_file_are_made_again(bench: Bench) -> None:
    bench.finish(7)
    opened = bench.open()
    opened.pack()
    first, second = (bench.folder.output / name for name in opened.names())
    first.write_bytes(b"damaged")
    second.unlink()
    (loose,) = bench.folder.items.glob("*.png")
    loose.write_bytes(b"changed")
    told = opened.verify()
    assert [one.split()[0] for one in told] == [first.name, second.name, "a"]
    assert bench.ledger.counts(batch=BATCH)["waiting"] == 7
    assert opened.count() == 0
    assert opened.verify() == []
    opened.close()


def test_two_packers_put_every_item_in_one_shard(bench: Bench) -> None:
    bench.finish(6)
    first, second = bench.open(), bench.open()
    second._look()
    assert first.pack() == 6
    assert second.pack(rest=True) == 0
    bench.finish(3)
    assert second.pack() == 3
    assert [one["id"] for one in members(bench.folder.output)] == [f"i.{n}" for n in range(9)]
    first.close()
    second.close()


def test_forms_and_sizes_that_there_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="one of files, webdataset, parquet"):
        Folder(tmp_path).settled("zip", None)
    with pytest.raises(RequestError, match="whole number from 1 to"):
        Folder(tmp_path).settled("webdataset", 0)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RequestError, match=r"pip install leapfrog-dit\[parquet\]"):
        shards.check_form("parquet")


@pytest.mark.parametrize("form", FORMS)
def test_a_killed_run_goes_on_and_ends_with_whole_shards(form: str, tmp_path: Path) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet shards need pyarrow")
    bench = Driven(tmp_path, step=0.03)
    manifest = bench.manifest(*(f"cat {i}" for i in range(10)))
    with bench.drive(manifest, "1", form) as driver:
        end = time.monotonic() + 120
        while bench.done() < 4 and time.monotonic() < end:
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
    assert bench.done() >= 4
    outcome = batch.run(batch.plan(manifest, bench.output), engine=bench.engine())
    assert (outcome.complete, outcome.packed) == (True, 10)
    assert sorted(one["id"] for one in members(bench.output)) == sorted(f"i{n}" for n in range(10))
    assert bench.calls().total() <= 10 + 1
    assert batch.verify(bench.output) == []
    lines = [json.loads(line) for line in batch.export(bench.output)[0].read_text().splitlines()]
    assert {line["member"] for line in lines} == {one["member"] for one in members(bench.output)}
    again = batch.run(bench.output, engine=bench.engine())
    assert (again.packed, bench.calls().total() <= 11) == (10, True)
