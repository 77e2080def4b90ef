"""Stand-ins for the making of pictures, and what the tests of workers share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.generate import Cancelled, Progress
from pipelines.jobs import Item, Job, Ledger
from pipelines.request import Request
from pipelines.result import Picture, Result, pixel_hash

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


def wait_for(what: Callable[[], Any], seconds: float = 120.0) -> None:
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
