"""Batches: started again they make only what is missing, whoever was killed; runs share a folder; nothing is made twice."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from pipelines import batch, cli, machine
from pipelines._batch_folder import BATCH, Folder
from pipelines._engines import RankEngine, engine_for
from pipelines.catalog import Unavailable
from pipelines.manifest import ManifestError
from pipelines.request import Request, RequestError

_place = importlib.util.spec_from_file_location("batches", Path(__file__).with_name("batches.py"))
assert _place is not None
assert _place.loader is not None
batches = importlib.util.module_from_spec(_place)
_place.loader.exec_module(batches)
ROOT, Bench, whole = batches.ROOT, batches.Bench, batches.whole


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_second_run_makes_nothing_and_a_longer_manifest_only_the_new(bench: Bench) -> None:
    prompts = [f"cat {i}" for i in range(4)]
    planned = batch.plan(bench.manifest(*prompts), bench.output)
    assert not bench.output.exists()
    assert (len(planned.missing), planned.done, planned.seconds, planned.fits) == (4, 0, None, True)
    outcome = batch.run(planned, engine=bench.engine(2))
    assert outcome.complete
    assert outcome.counts["done"] == 4
    whole(bench.output, 4)
    planned = batch.plan(bench.manifest(*prompts, "dog"), bench.output)
    assert (len(planned.missing), planned.done) == (1, 4)
    assert planned.seconds is not None
    assert batch.run(planned, engine=bench.engine()).complete
    assert bench.calls() == Counter([*prompts, "dog"])
    assert batch.status(bench.output)["counts"]["done"] == 5
    whole(bench.output, 5)


def test_killed_driver_and_workers_lose_tear_and_double_nothing(tmp_path: Path) -> None:
    bench, prompts = Bench(tmp_path, step=0.05), [f"cat {i}" for i in range(12)]
    manifest = bench.manifest(*prompts)
    with bench.drive(manifest, "2") as driver:
        end = time.monotonic() + 120
        while bench.done() < 3 and time.monotonic() < end:
            time.sleep(0.02)
        with Folder(bench.output).ledger() as ledger:
            names = {job.worker for job in ledger.jobs(batch=BATCH, states=("running",))}
        driver.send_signal(signal.SIGKILL)
    made = bench.done()
    assert 3 <= made < 12
    assert names
    outcome = batch.run(batch.plan(manifest, bench.output), engine=bench.engine(2))
    assert outcome.counts["done"] == 12
    calls = bench.calls()
    assert set(calls) == set(prompts)
    assert calls.total() <= 12 + 2  # what two workers had in hand
    whole(bench.output, 12)
    assert batch.verify(bench.output) == []


def test_two_runs_share_a_folder(tmp_path: Path) -> None:
    bench, prompts = Bench(tmp_path, step=0.02), [f"cat {i}" for i in range(10)]
    planned = batch.plan(bench.manifest(*prompts), bench.output)
    outcomes: list[batch.Outcome] = []
    runs = [
        threading.Thread(target=lambda: outcomes.append(batch.run(planned, engine=bench.engine())))
        for _ in range(2)
    ]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    assert [one.complete for one in outcomes] == [True, True]
    assert bench.calls() == Counter(prompts)
    whole(bench.output, 10)


def test_bad_items_stop_nobody_and_are_tried_again_when_asked(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = bench.manifest("cat", "bad", "dog", "nan")
    outcome = batch.run(batch.plan(manifest, bench.output), engine=bench.engine())
    assert (outcome.counts["done"], outcome.counts["poisoned"]) == (3, 1)
    assert outcome.flagged == ("i3",)
    assert not outcome.complete
    assert bench.calls()["bad"] == 3
    results, failures = batch.export(bench.output)
    assert [json.loads(line)["id"] for line in results.read_text().splitlines()] == ["i0", "i2", "i3"]
    (failure,) = map(json.loads, failures.read_text().splitlines())
    assert (failure["id"], failure["state"]) == ("i1", "poisoned")
    assert "a bad item" in failure["error"]
    Path(f"{bench.log}.mended").touch()
    assert batch.retry(bench.output) == 1
    assert batch.run(bench.output, engine=bench.engine()).counts["done"] == 4
    assert bench.calls()["cat"] == 1


def test_a_signal_gives_the_items_back(tmp_path: Path) -> None:
    bench, stopped = Bench(tmp_path, step=0.2), list[int]()
    planned = batch.plan(bench.manifest(*(f"cat {i}" for i in range(6))), bench.output)

    def tell(counts: dict[str, int], _seconds: float) -> None:
        if counts["done"] and not stopped:
            stopped.append(signal.SIGTERM)

    outcome = batch.run(planned, engine=bench.engine(2), tell=tell, stopped=stopped)
    assert outcome.stopped == signal.SIGTERM
    assert outcome.counts["running"] == 0
    assert 1 <= outcome.counts["done"] < 6
    with Folder(bench.output).ledger() as ledger:
        assert all(job.tries == 0 for job in ledger.jobs(batch=BATCH, states=("waiting",)))


def test_files_that_differ_are_told_and_made_again(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "strangers", list)
    prompts = [f"cat {i}" for i in range(3)]
    batch.run(batch.plan(bench.manifest(*prompts), bench.output), engine=bench.engine())
    assert cli.main(["batch", "verify", str(bench.output)]) == 0
    (bench.output / "i0.png").unlink()
    (bench.output / "i2.png").write_bytes(b"other bytes")
    assert cli.main(["batch", "verify", str(bench.output), "--json"]) == 5
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one.split(":")[0] for one in told["differ"]] == ["i0", "i2"]
    assert cli.main(["batch", "resume", str(bench.output), "--dry-run"]) == 0
    assert batch.run(bench.output, engine=bench.engine()).complete
    assert bench.calls() == Counter({"cat 0": 2, "cat 1": 1, "cat 2": 2})
    whole(bench.output, 3)


def test_what_is_refused_before_anything_starts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = bench.manifest("cat")
    with pytest.raises(RequestError, match="batch that was begun"):
        batch.run(bench.output)
    for engine, workers in (("local", 0), ("local", 1000), ("accelerate", 1), ("spark", 1)):
        monkeypatch.delenv("RANK", raising=False)
        with pytest.raises(RequestError):
            batch.run(batch.plan(manifest, bench.output), engine=engine, workers=workers)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Unavailable, match=r"pip install leapfrog-dit\[ray\]"):
        engine_for("ray", 0)
    assert not bench.output.exists()
    batch.run(batch.plan(manifest, bench.output), engine=bench.engine())
    with pytest.raises(ManifestError, match="other settings"):
        batch.plan(bench.manifest("dog"), bench.output)
    with pytest.raises(RequestError, match="files, as the batch"):
        batch.plan(bench.manifest("cat"), bench.output, form="webdataset")
    with pytest.raises(ManifestError, match="line 1: model"):
        batch.plan(bench.manifest("cat", model="nothing"), bench.folder / "other")
    with pytest.raises(ManifestError, match="still pictures"):
        batch.plan(bench.manifest("cat", frames=9), bench.folder / "other")


def test_the_command_makes_what_generate_makes(
    tiny: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "strangers", list)
    manifest = bench.manifest("a red cat", "a blue dog", accelerators=["delta-cache:interval=2"])
    common = ["--output", str(bench.output), "--model", tiny, "--steps", "3", "--quiet"]
    assert cli.main(["batch", "plan", str(manifest), *common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == 2
    assert cli.main(["batch", "run", str(manifest), *common, "--workers", "1", "--json"]) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out)["counts"]["done"] == 2
    assert cli.main(["batch", "export", str(bench.output)]) == 0
    assert cli.main(["batch", "status", str(bench.output)]) == 0
    assert "2 items: 2 done" in capsys.readouterr().out
    from pipelines.generate import generate

    for line in (bench.output / "results.jsonl").read_text().splitlines():
        found = json.loads(line)
        assert tiny not in line, "a path of this computer"
        request = Request.from_dict(found["request"])
        assert request.model == Request.from_file(bench.output / found["files"][0]).model == Path(tiny).name
        assert generate(request.replace(model=tiny)).report["pixels"] == found["report"]["pixels"]


def test_mistakes_end_with_code_1_and_are_all_listed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "strangers", list)
    manifest = bench.manifest("cat", "dog", steps=4000)
    assert cli.main(["batch", "run", str(manifest), "--output", str(bench.output), "--json"]) == 1
    out, err = capsys.readouterr()
    assert [one["line"] for one in json.loads(out)["error"]["problems"]] == [1, 2]
    assert "line 2: steps" in err
    good = str(bench.manifest("cat"))
    assert cli.main(["batch", "run", good, "--output", str(bench.output), "--workers", "x"]) == 1
    assert cli.main(["batch", "status", str(bench.output)]) == 1
    assert not bench.output.exists()


def test_no_room_is_told_before_the_start(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "strangers", list)
    monkeypatch.setattr("pipelines._planning.free", lambda _: 1000)
    assert (
        cli.main(["batch", "run", str(bench.manifest("cat")), "--output", str(bench.output), "--quiet"]) == 4
    )
    assert not bench.output.exists()


def test_a_rank_without_a_common_folder_takes_its_part(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = batch.plan(bench.manifest(*(f"cat {i}" for i in range(5))), bench.output)
    shares = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        engine = RankEngine()
        monkeypatch.setattr(engine, "_together", lambda _: False)
        share = engine.share(Folder(bench.output), planned.missing, planned.manifest.entries)
        shares.append([entry.id for entry in share])
    assert shares == [["i0", "i2", "i4"], ["i1", "i3"]]


@pytest.mark.slow
def test_two_ranks_of_torchrun_share_the_ledger(tmp_path: Path) -> None:
    bench, prompts = Bench(tmp_path, step=0.05), [f"cat {i}" for i in range(8)]
    environment = os.environ | bench.environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611",
        str(tmp_path / "driver.py"), str(bench.manifest(*prompts)), str(bench.output), "rank", "files",
    ]  # fmt: skip
    ran = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("'complete': True") == 2
    assert bench.calls() == Counter(prompts)
    whole(bench.output, 8)
    with Folder(bench.output).ledger() as ledger:
        assert len({job.worker for job in ledger.jobs(batch=BATCH)}) == 2
    assert not list((bench.output / ".leapfrog").glob("ranks-*"))
