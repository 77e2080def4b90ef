"""What the page costs: to open it, for one job beside the plain call of diffusers, and for each job that waits in its queue.

`python -m benchmarks.page` writes benchmarks/results/page.json. Targets: a page that can be used within 2 s of being asked for, on
this computer and once it runs; one job at most 3 % over the plain call; 20 ms of the queue for a job. `benchmarks.jobs` tells what
the queue's time is made of, and how much of it is the disk's.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app_jobs import Job, Jobs
from benchmarks.jobs import fsync
from benchmarks.machine import RESULTS, ROOT, record, write_json

TARGETS = {"load_seconds": 2.0, "job_over_plain": 0.03, "queue_ms_an_item": 20.0}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
PATIENCE = 120.0
"""Longest wait for the page, in s."""
LOOK = 0.02
"""Seconds between two looks at a queue of jobs; one job is looked at as the page does it."""
WARMUPS = 2
PROMPT = "dog, cartoon"

# The time in ms since the page was asked for, once what is typed counts and the button can be pressed.
_USABLE = """() => {
  const button = document.querySelector("#generate"), prompt = document.querySelector("#prompt textarea");
  return button && prompt && !button.disabled && prompt.offsetParent && !prompt.disabled ? performance.now() : 0;
}"""


# Ends when nothing more was fetched for a second: the page keeps a line to its server, so it is never idle to the browser.
_QUIET = """() => new Promise((done) => {
  let seen = -1;
  const look = setInterval(() => {
    const now = performance.getEntriesByType("resource").length;
    if (now === seen) { clearInterval(look); done(); }
    seen = now;
  }, 1000);
})"""


@contextmanager
def page(model: str, folder: Path) -> Iterator[str]:
    """Start the page as a person would; yield its address."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "LEAPFROG_STATE": str(folder / "state")}
    command = [sys.executable, "-u", "app.py", "--model", model, "--output", str(folder / "out")]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        try:
            while not (found := re.search(r"http://\S+", lines.get(timeout=PATIENCE))):
                pass
            yield found[0]
        finally:
            process.terminate()


def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    for line in process.stdout or ():
        lines.put(line)


def loads(model: str, repeats: int) -> dict[str, Any] | None:
    """Return the seconds from asking for the page to using it, on a first and a second visit; None without a browser."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        return None
    first: list[float] = []
    again: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        page(model, Path(folder)) as url,
        sync_playwright() as found,
    ):
        browser = found.chromium.launch(executable_path=program, args=FLAGS)
        for number in range(repeats + 1):  # the first one is the server's first too, and is left out
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            tab = context.new_page()
            for taken in (first, again):
                tab.goto(url, wait_until="commit")
                usable = tab.wait_for_function(_USABLE, timeout=PATIENCE * 1000).json_value()
                if number:
                    taken.append(usable / 1000)
                tab.evaluate(_QUIET)
            context.close()
        browser.close()
    return {
        "first_visit": {"median": statistics.median(first), "worst": max(first), "all": first},
        "second_visit": {"median": statistics.median(again), "worst": max(again), "all": again},
    }


def over(jobs: Jobs, job: Job, pause: float) -> Job:
    """Wait until a job is over, with a pause between two looks. Raises: RuntimeError for one that failed."""
    while not jobs.refresh(job).over:
        time.sleep(pause)
    if job.state != "done":
        raise RuntimeError(job.error)
    return job


def one_job(model: str, steps: int, repeats: int) -> dict[str, Any]:
    """Time one picture by the plain call of the pipeline, and as a job from asking to the file on the disk, in turns.

    A job is over when the ledger says so; who waits for it looks as seldom as the page, because looking takes time too.
    """
    import torch

    from app_create import WATCHED
    from pipelines import catalog
    from pipelines.request import Request

    request = Request(prompt=PROMPT, model=model, steps=steps, seed=1)
    loaded = catalog.load(model)
    guidance = {} if loaded.card.guidance is None else {"guidance_scale": loaded.card.guidance}
    times: dict[str, list[float]] = {"plain": [], "job": []}
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(Path(folder) / "out", ledger=Path(folder) / "jobs.sqlite")

        def plain() -> float:
            start = time.time()
            seeded = torch.Generator("cpu").manual_seed(1)
            loaded.pipeline(prompt=PROMPT, num_inference_steps=steps, generator=seeded, **guidance)
            return time.time() - start

        def job() -> float:
            start = time.time()
            return over(jobs, jobs.submit(request), WATCHED).ended - start

        ways = {"plain": plain, "job": job}
        for turn in range(-WARMUPS, repeats):
            for name in sorted(ways, reverse=turn % 2 == 0):
                taken = ways[name]()
                if turn >= 0:
                    times[name].append(taken)
        jobs.close()
    pairs = list(zip(times["plain"], times["job"], strict=True))
    return {
        "over_plain": statistics.median(b / a - 1 for a, b in pairs),
        "over_plain_of_best": min(times["job"]) / min(times["plain"]) - 1,
        "ms_over_plain": statistics.median(b - a for a, b in pairs) * 1e3,
        "seconds": {name: [round(one, 4) for one in taken] for name, taken in times.items()},
    }


class Nothing:
    """A result that is there at once."""

    report: dict[str, Any] = {"run": {}, "timings": {}, "effective": {}, "warnings": [], "failures": []}

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def save(self, place: Path, **_: Any) -> list[Path]:
        file = place / f"{self.seed}.png" if place.is_dir() else place
        file.write_bytes(b"nothing")
        return [file]


def queued(folder: Path | None, items: int) -> dict[str, float]:
    """Return the ms that a queue of jobs takes for each, where making one takes no time, and the processor's share of it."""
    from pipelines.request import Request

    with tempfile.TemporaryDirectory(dir=folder) as place:
        ledger = Path(place) / "jobs.sqlite"
        jobs = Jobs(Path(place) / "out", lambda request, **_: Nothing(request.seed), ledger=ledger)
        over(jobs, jobs.submit(Request(prompt=PROMPT, seed=items)), LOOK)
        busy, start = time.process_time(), time.perf_counter()
        waiting = [
            jobs.submit(Request(prompt=PROMPT, seed=number), owner=f"session {number // 50}")
            for number in range(items)  # one session may have 64 of them
        ]
        for job in reversed(waiting):
            over(jobs, job, LOOK)
        found = {"ms": (time.perf_counter() - start) * 1e3 / items}
        found["processor_ms"] = (time.process_time() - busy) * 1e3 / items
        jobs.close()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write benchmarks/results/page.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji", help="a text-to-image model")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--items", type=int, default=100, help="jobs in the queue, at most 500")
    parser.add_argument("--output", type=Path, default=RESULTS / "page.json")
    given = parser.parse_args(arguments)
    found: dict[str, Any] = {
        "load": loads(given.model, given.repeats),
        "one_job": one_job(given.model, given.steps, given.repeats),
        "queue": queued(None, given.items),
    }
    memory = Path("/dev/shm")
    if memory.is_dir():
        found["queue_in_memory"] = queued(memory, given.items)
    with tempfile.TemporaryDirectory() as folder:
        found["fsync_ms"] = fsync(Path(folder))
    settings = {name: getattr(given, name) for name in ("model", "steps", "repeats", "items")}
    write_json(given.output, record() | {"targets": TARGETS} | settings | found)
    shown = {
        key: {name: one for name, one in value.items() if name != "seconds"}
        if isinstance(value, dict)
        else value
        for key, value in found.items()
    }
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
