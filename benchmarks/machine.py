"""What every figure says about itself: the machine, the commit and the versions; and how a time is taken on a busy machine."""

from __future__ import annotations

import datetime as dt
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def record(device: str = "cpu") -> dict[str, Any]:
    """Return machine, commit, versions and the time, for the head of a results file. Imports torch."""
    from pipelines.machine import environment

    found = environment() | {"device": device, "cores": _cores(), "load": _load()}
    return {
        "machine": found,
        "commit": commit(),
        "made": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """Return the commit of the working tree, with "+changes" where tracked files differ; "unknown" outside of git."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 5, warmups: int = 1
) -> dict[str, dict[str, Any]]:
    """Time candidates in turns, so that a load that comes and goes meets all of them alike.

    The order turns round each time. Returns for each one `median`, `best` and `all`, in seconds; and `ratio`, the median over
    the rounds of the first candidate's time by this one's in the same round (above 1: faster than the first).

    Raises:
        ValueError: no candidates, or fewer than one round.
    """
    if not candidates or rounds < 1:
        raise ValueError(f"candidates and rounds must be at least one, got {len(candidates)} and {rounds}")
    names = list(candidates)
    for _ in range(warmups):
        for name in names:
            candidates[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            start = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - start)
    first = times[names[0]]
    return {
        name: {
            "median": statistics.median(taken),
            "best": min(taken),
            "ratio": statistics.median(a / max(b, 1e-12) for a, b in zip(first, taken, strict=True)),
            "all": [round(one, 6) for one in taken],
        }
        for name, taken in times.items()
    }


def write_json(file: Path, value: Any) -> None:
    """Write a results file, under its final name only when whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(file.name + ".tmp")
    draft.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, file)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load() -> float | None:
    """Return the machine's load over the last minute: above the number of cores, times in this file are too long."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
