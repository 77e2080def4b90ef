"""Time to the first picture, to the next one, memory and imports: `python -m benchmarks.startup [--model emoji]`."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, ROOT, interleaved, record, write_json

IMPORTS = ("pipelines.request", "pipelines.cli", "acceleration", "dit.backbones.mmdit", "pipelines.text_to_image", "app")


def process(*words: str) -> float:
    """Return the wall-clock seconds of one Python process. Raises: CalledProcessError with what it printed."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def imports(repeats: int) -> dict[str, float]:
    """Return the median seconds to start Python and import each module, and to start Python alone."""
    bare = statistics.median(process("-c", "pass") for _ in range(repeats))
    found = {name: statistics.median(process("-c", f"import {name}") for _ in range(repeats)) for name in IMPORTS}
    return {"python alone": bare} | found


def cold(model: str, repeats: int) -> float:
    """Return the median seconds from nothing to a saved picture by the command line (files in the disk's cache)."""
    taken = []
    for number in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            words = ("-m", "pipelines.cli", "generate", "dog, cartoon", "--model", model, "--seed", str(number))
            taken.append(process(*words, "--output", str(Path(folder) / "a.png")))
    return statistics.median(taken)


def warm(model: str, repeats: int) -> dict[str, Any]:
    """Return medians of a picture in a process that has made one, for each dtype in turns, and the memory's peak in MB."""
    from pipelines.generate import generate
    from pipelines.request import Request

    made = {
        dtype: (lambda dtype=dtype: generate(Request(prompt="dog, cartoon", model=model, dtype=dtype)))
        for dtype in ("float32", "bfloat16")
    }
    times = interleaved(made, rounds=repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    return {"seconds": times, "peak_memory_mb_with_both_dtypes_loaded": round(peak)}


def peak(model: str) -> int:
    """Return the peak memory in MB of a fresh process that makes one picture."""
    code = (
        "import resource\nfrom pipelines.generate import generate\nfrom pipelines.request import Request\n"
        f"generate(Request(prompt='dog, cartoon', model={model!r}))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) // (1024 if sys.platform != "darwin" else 1024**2)


def main() -> None:
    """Measure, print, and write benchmarks/results/startup.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    figures = {
        "import_seconds": imports(given.repeats),
        "cold_start_to_saved_picture_seconds": cold(given.model, given.repeats),
        "peak_memory_mb": peak(given.model),
        "warm_picture": warm(given.model, given.repeats),
    }
    write_json(RESULTS / "startup.json", record() | {"model": given.model, "repeats": given.repeats} | figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
