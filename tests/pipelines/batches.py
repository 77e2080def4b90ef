"""A stand-in for a model in worker processes, and a folder to run batches with it; for the tests of batches and shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines._batch_folder import BATCH, Folder
from pipelines._engines import LocalEngine
from pipelines.request import Request

ROOT = Path(__file__).resolve().parents[2]
MAKE = '''
"""Stands in for a model in worker processes: a picture of two colours, and a line in a file for every call."""
import os, pathlib, time
from PIL import Image
from pipelines.generate import Cancelled, Progress
from pipelines.result import Picture, Result

def make(request, on_step):
    handle = os.open(os.environ["CALLS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{request.prompt}\\n".encode())
    os.close(handle)
    if "bad" in request.prompt and not pathlib.Path(os.environ["CALLS"] + ".mended").exists():
        raise RuntimeError("a bad item")
    for step in range(3):
        time.sleep(float(os.environ.get("STEP", "0")))
        if on_step(Progress(step, 3, "denoise", 0.0)) is False:
            raise Cancelled("stopped")
    image = Image.new("RGB", (16, 16), "red")
    image.putpixel((request.seed % 16, 0), (0, 0, 255))
    return Result((Picture((image,), request, {}),), request, {"failures": ["NaN"] if "nan" in request.prompt else []})
'''
DRIVER = """
import sys
from pipelines import batch
from pipelines._engines import LocalEngine, RankEngine
if __name__ == "__main__":
    manifest, output, workers, form = sys.argv[1:]
    engine = LocalEngine(int(workers), make="fake_model:make") if workers != "rank" else RankEngine(make="fake_model:make")
    print("begun", flush=True)
    print(batch.run(batch.plan(manifest, output, form=form, members=3), engine=engine).to_dict())
"""


class Bench:
    """A folder with a manifest and workers whose model is a stand-in."""

    def __init__(self, folder: Path, step: float = 0.0) -> None:
        self.folder, self.output, self.log = folder, folder / "out", folder / "calls"
        (folder / "fake_model.py").write_text(MAKE)
        (folder / "driver.py").write_text(DRIVER)
        self.environment = {
            "PYTHONPATH": str(folder),
            "CALLS": str(self.log),
            "STEP": str(step),
            "OMP_NUM_THREADS": "1",
        }

    def manifest(self, *prompts: str, **more: Any) -> Path:
        path = self.folder / "m.jsonl"
        rows = [
            {"id": f"i{place}", "prompt": prompt, "seed": place} | more
            for place, prompt in enumerate(prompts)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def engine(self, workers: int = 1) -> LocalEngine:
        return LocalEngine(workers, make="fake_model:make", environment=self.environment)

    def calls(self) -> Counter[str]:
        return Counter(self.log.read_text().split("\n")[:-1]) if self.log.exists() else Counter()

    def drive(self, manifest: Path, workers: str = "1", form: str = "files") -> subprocess.Popen[str]:
        environment = os.environ | self.environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}"}
        command = [
            sys.executable,
            str(self.folder / "driver.py"),
            str(manifest),
            str(self.output),
            workers,
            form,
        ]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def done(self) -> int:
        folder = Folder(self.output)
        if not folder.exists:
            return 0
        with folder.ledger() as ledger:
            return ledger.counts(batch=BATCH)["done"]


def whole(output: Path, count: int) -> None:
    """Every file of a batch opens, holds its request, and nothing lies beside them."""
    names = {path.name for path in output.iterdir()} - {".leapfrog"}
    assert names == {f"i{place}.{ending}" for place in range(count) for ending in ("png", "json")}
    for place in range(count):
        with Image.open(output / f"i{place}.png") as picture:
            picture.load()
        assert Request.from_file(output / f"i{place}.png").seed == place
