"""What the queue costs for each item: to add it, lease it, beat once a step, finish it with its file.

With an empty ledger and with one that holds thousands; on this disk, and where there is one in memory, without the time that the
disk takes to make things last. `python -m benchmarks.jobs` writes benchmarks/results/jobs.json. The target is 20 ms an item.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
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
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {
            "empty": measured(Path(folder) / "empty", given.items, given.steps, 0),
            "full": measured(Path(folder) / "full", given.items, given.steps, given.held),
            "fsync_ms": fsync(Path(folder)),
        }
    if MEMORY.is_dir():
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            found["full_in_memory"] = measured(Path(folder) / "full", given.items, given.steps, given.held)
    value = (
        record()
        | {"target_ms": TARGET, "items": given.items, "steps": given.steps, "held": given.held}
        | found
    )
    write_json(RESULTS / "jobs.json", value)
    for kind in ("empty", "full", "full_in_memory"):
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
