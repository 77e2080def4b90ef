"""Batch throughput of two workers against one, and what the ledger costs an item: `python -m benchmarks.batch [--items 24]`.

The same manifest is made by one worker process and by two, in turns, each time into a new folder. Loading a model takes as long
as many small pictures, so the clock starts when every worker has finished its first item: the pace of a long batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, record, write_json
from pipelines import batch
from pipelines._batch_folder import BATCH, Folder
from pipelines.jobs import Ledger
from pipelines.request import Request


def pace(manifest: Path, output: Path, workers: int, defaults: dict[str, Any]) -> dict[str, float]:
    """Make a manifest and return items a second once every worker has finished one, and the whole time in s."""
    outcome = batch.run(batch.plan(manifest, output, defaults=defaults), workers=workers)
    assert outcome.complete, outcome
    with Folder(output).ledger() as ledger:
        jobs = ledger.jobs(batch=BATCH, limit=-1)
    first = {
        name: min(job.ended for job in jobs if job.worker == name) for name in {job.worker for job in jobs}
    }
    start = max(first.values())
    counted = [job.ended for job in jobs if job.ended > start]
    seconds = max(counted) - start
    return {
        "items_a_second": len(counted) / seconds,
        "seconds": outcome.seconds,
        "workers_seen": float(len(first)),
    }


def overhead(items: int, folder: Path) -> float:
    """Return what one item costs in the ledger, from being added over lease and three heartbeats to done, in ms."""
    from pipelines.jobs import Item

    ledger = Ledger(folder / "jobs.sqlite")
    file = folder / "file.png"
    file.write_bytes(b"-" * 10_000)
    start = time.perf_counter()
    for number in range(items):
        ledger.add(
            [Item(request=Request(prompt="a cat", seed=number).to_dict(), id=str(number), batch=BATCH)]
        )
        job = ledger.lease("bench", batch=BATCH)
        assert job is not None
        for step in range(3):
            assert ledger.beat(job, {"step": step})
        assert ledger.done(job, [file], {})
    seconds = time.perf_counter() - start
    ledger.close()
    return 1000 * seconds / items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--model", default="emoji")
    options = parser.parse_args()
    paces: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as place:
        manifest = Path(place) / "items.jsonl"
        rows = [
            json.dumps({"id": f"i{number}", "prompt": "a red apple", "seed": number})
            for number in range(options.items)
        ]
        manifest.write_text("\n".join(rows))
        defaults = {"steps": options.steps, "model": options.model}
        for number in range(options.rounds):
            for workers, found in paces.items():
                found.append(pace(manifest, Path(place) / f"{number}-{workers}", workers, defaults))
                print(f"{workers} workers: {found[-1]['items_a_second']:.2f} items/s", flush=True)
        cost = overhead(100, Path(place))
    one, two = (statistics.median(run["items_a_second"] for run in paces[workers]) for workers in (1, 2))
    print(f"two workers against one: {two / one:.2f}x; ledger: {cost:.1f} ms an item")
    report = {"settings": vars(options), "runs": {str(workers): found for workers, found in paces.items()},
              "ratio": two / one, "ledger_ms_an_item": cost}  # fmt: skip
    write_json(RESULTS / "batch.json", record() | report)


if __name__ == "__main__":
    main()
