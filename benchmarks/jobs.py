"""What the queue costs for each item: to add it, lease it, beat once a step, finish it with its file.

With an empty ledger and with one that holds thousands; on this disk, and where there is one in memory, without the time that the
disk takes to make things last. `python -m benchmarks.jobs` writes benchmarks/results/jobs.json. The target is 20 ms an item.

Beside it: what a whole worker spends on an item whose picture costs nothing, against drawing and saving it in one loop, with the
synchronisations that both make; and with --throughput the pace of one and of two workers against one plain loop over the same
requests, each process on one thread, from the first finished picture to the last.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, record, write_json
from pipelines.jobs import Item, Ledger

TARGET = 20.0
"""Most time of the queue for one item, in ms."""
MEMORY = Path("/dev/shm")
"""A disk in memory, on Linux."""
PHASES = ("add", "lease", "beats", "target", "done")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--held", type=int, default=10_000, help="jobs that are in the ledger already")
    parser.add_argument("--steps", type=int, default=8, help="heartbeats of an item")
    parser.add_argument(
        "--throughput", type=int, default=0, metavar="N", help="also make N pictures by each way"
    )
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {
            "empty": measured(Path(folder) / "empty", given.items, given.steps, 0),
            "full": measured(Path(folder) / "full", given.items, given.steps, given.held),
            "worker": worked(Path(folder) / "worker", given.items),
            "fsync_ms": fsync(Path(folder)),
        }
        if given.throughput:
            found["throughput"] = throughput(Path(folder) / "throughput", given.throughput)
    if MEMORY.is_dir():
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            found["full_in_memory"] = measured(Path(folder) / "full", given.items, given.steps, given.held)
            found["worker_in_memory"] = worked(Path(folder) / "worker", given.items)
    value = (
        record()
        | {"target_ms": TARGET, "items": given.items, "steps": given.steps, "held": given.held}
        | found
    )
    write_json(RESULTS / "jobs.json", value)
    for kind in ("empty", "full", "full_in_memory", "worker", "worker_in_memory", "throughput"):
        if kind in found:
            print(kind, {name: round(one, 3) for name, one in found[kind].items()})
    print("one fsync of this disk:", round(found["fsync_ms"], 3), "ms")


def measured(folder: Path, items: int, steps: int, held: int) -> dict[str, float]:
    """Return ms for each phase of an item, median over the items, their sum, and the processor's time for all of it."""
    folder.mkdir()
    ledger = Ledger(folder / "jobs.sqlite")
    ledger.add(_item(folder, f"held{i}", -1, 10_000_000 + i) for i in range(held))
    taken: dict[str, list[float]] = {name: [] for name in PHASES}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        answer = call()
        taken[name].append((time.perf_counter() - start) * 1e3)
        return answer

    busy = time.process_time()
    for i in range(items):
        timed("add", lambda i=i: ledger.add([_item(folder, f"i{i}", 1, i)]))
        job = timed("lease", lambda: ledger.lease("bench", prefers="emoji"))
        assert job is not None
        timed(
            "beats", lambda job=job: [ledger.beat(job, {"phase": "denoise", "step": n}) for n in range(steps)]
        )
        final = timed("target", lambda job=job, i=i: ledger.target(job, [folder / f"{i}.png"]))
        draft = folder / f".{i}.part"
        draft.write_bytes(os.urandom(4096))
        assert timed(
            "done",
            lambda job=job, final=final, draft=draft: ledger.done(job, [final], {}, staged={draft: final}),
        )
    found = {name: statistics.median(all_) for name, all_ in taken.items()}
    found |= {"total": sum(found.values()), "processor": (time.process_time() - busy) / items * 1e3}
    ledger.close()
    return found


def worked(folder: Path, items: int) -> dict[str, float]:
    """Return what a worker spends on an item in ms, what drawing and saving alone take, and how often both wait for the disk."""
    from PIL import Image

    from pipelines._jobs_store import Store
    from pipelines.request import Request
    from pipelines.result import Picture, Result
    from pipelines.workers import Worker

    waits, sync, writing = [0], os.fsync, Store.writing

    def made(request: Request, on_step: Any = None) -> Result:
        image = Image.new("RGB", (256, 256), (request.seed % 256, 7, 7))
        return Result((Picture((image,), request, {}),), request, {})

    def synced(handle: int) -> None:
        waits[0] += 1
        sync(handle)

    @contextmanager
    def written(self: Store, *, durable: bool = True) -> Iterator[Any]:
        waits[0] += durable
        with writing(self, durable=durable) as db:
            yield db

    folder.mkdir()
    ledger, plain = Ledger(folder / "jobs.sqlite"), folder / "plain"
    plain.mkdir()
    ledger.add(_item(folder / "out", f"i{i}", 0, i) for i in range(items))
    os.fsync, Store.writing = synced, written  # type: ignore[method-assign]
    try:
        start = time.perf_counter()
        for i in range(items):
            made(Request(prompt="a red fish", seed=i)).save(plain)
        middle, alone = time.perf_counter(), waits[0]
        busy = time.process_time()
        Worker(ledger, make=made, batch="bench").run(until_empty=True)
        busy, end = time.process_time() - busy, time.perf_counter()
    finally:
        os.fsync, Store.writing = sync, writing  # type: ignore[method-assign]
    assert ledger.counts()["done"] == items
    ledger.close()
    found = {
        "worker": end - middle,
        "plain": middle - start,
        "overhead": end - 2 * middle + start,
        "processor": busy,
    }
    found = {name: seconds / items * 1e3 for name, seconds in found.items()}
    return found | {"waits": (waits[0] - alone) / items, "plain_waits": alone / items}


PLAIN = """
import sys, time
from pathlib import Path
from pipelines.generate import generate
from pipelines.request import Request
for seed in range(int(sys.argv[1])):
    generate(Request(prompt="a red fish", seed=seed)).save(Path(sys.argv[2]) / f"{seed}.png")
    print(time.time(), flush=True)
"""


def throughput(folder: Path, items: int) -> dict[str, float]:
    """Return pictures a minute: of a plain loop in one process, of one worker, of two; and what two gain over the loop."""
    import subprocess
    import sys

    from pipelines.workers import Pool

    environment = {"OMP_NUM_THREADS": "1"}
    (folder / "plain").mkdir(parents=True)
    ran = subprocess.run(
        [sys.executable, "-c", PLAIN, str(items), str(folder / "plain")],
        env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    ended = {"plain": [float(line) for line in ran.stdout.split()]}
    for count in (1, 2):
        ledger = Ledger(folder / f"{count}" / "jobs.sqlite")
        ledger.add(_item(folder / f"{count}" / "out", f"i{i}", 0, i) for i in range(items))
        pool = Pool(ledger, until_empty=True, environment=environment)
        pool.start(count)
        pool.wait()
        pool.stop()
        ended[f"workers_{count}"] = sorted(job.ended for job in ledger.jobs(states=("done",), limit=-1))
        assert len(ended[f"workers_{count}"]) == items
        ledger.close()
    found = {name: (len(times) - 1) / (times[-1] - times[0]) * 60 for name, times in ended.items()}
    return found | {"two_over_plain": found["workers_2"] / found["plain"]}


def fsync(folder: Path, rounds: int = 50) -> float:
    """Return what the disk takes to keep one small write, in ms: the queue makes some for each item."""
    seconds = []
    with (folder / "sync").open("wb") as file:
        for _ in range(rounds):
            file.write(b"x" * 4096)
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


def _item(folder: Path, name: str, priority: int, seed: int) -> Item:
    request = {"prompt": "a red fish", "seed": seed}
    return Item(request=request, id=name, batch="bench", folder=str(folder), priority=priority)


if __name__ == "__main__":
    main()
