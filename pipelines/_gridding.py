"""The commands `grid` and `bench`: many settings side by side, and a short benchmark of this computer.

Exit codes of `grid` are those of `batch`: its folder is a batch's, so `batch status | resume | retry | verify` work on it too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.request import RequestError

if TYPE_CHECKING:
    from pipelines.batch import Outcome, Plan
    from pipelines.grid import Cell, Grid, Table
    from pipelines.jobs import Job, Ledger

FILE, LIMIT = "grid.json", 1_000_000
KNOWN = 1000
"""Finished jobs of this computer that an estimate looks at."""
EVERY = "all failed"
_SUBJECTS = ("prompt", "prompts", "class_label")


def add_commands(commands: Any) -> None:
    """Add `grid` and `bench`."""
    from pipelines import cli

    one = cli._command(
        commands, "grid", grid, "make a table of pictures, settings changing along up to three axes"
    )
    cli._request_options(one)
    for name in ("x", "y", "z"):
        one.add_argument(
            f"--{name}", metavar="FIELD=VALUES",
            help="what changes along it, e.g. steps=10,20,28 or accelerators=none,delta-cache:interval=3",
        )  # fmt: skip
    one.add_argument("--seeds", metavar="N", help="make every cell with so many seeds (default: 1)")
    one.add_argument("--output", metavar="FOLDER", required=True, help="where pictures, ledger and sheets go")
    one.add_argument(
        "--no-exact", action="store_true", help="leave out the exact pictures that are measured against"
    )
    one.add_argument(
        "--retry",
        nargs="?",
        const=EVERY,
        metavar="CELL",
        help="try again what failed, or one cell by its name",
    )
    one.add_argument(
        "--dry-run", action="store_true", help="check everything, tell cells, time and memory, make nothing"
    )
    one.add_argument("--workers", metavar="N", help="processes at work (default: 1)")
    one.set_defaults(engine="local")
    one = cli._command(
        commands, "bench", bench, "a short benchmark of this computer: exact against recommended accelerators"
    )
    cli._request_options(one)
    one.add_argument(
        "--rounds", default="3", metavar="N", help="timed runs of each setting, in turns (default: 3)"
    )


def grid(options: argparse.Namespace) -> int:
    """Make a grid, or what is missing of it; return the exit code."""
    from pipelines import _batching, cli
    from pipelines._batch_folder import Folder
    from pipelines._grid_sheets import export

    workers = _batching._workers(options)
    found = _grid(options)
    found.check()
    folder = Folder(Path(options.output))
    work = found.work()
    plan, told = _plan(found, folder, work)
    if options.dry_run:
        more = " " + _axes_told(found)
        cli.say(
            options,
            f"{told}\n{more.strip()}\nnothing was made (--dry-run)",
            told.to_dict() | found.to_dict() | {"dry_run": True},
        )
        return cli.DONE
    if options.retry is not None:
        _retry(folder, options.retry)
    outcome = _made(options, found, folder, plan, workers)
    with folder.ledger() as ledger:
        made = _table(found, ledger)
    files = export(made, folder.output)
    return _told(options, outcome, made, files)


def bench(options: argparse.Namespace) -> int:
    """Run the benchmark; return the exit code."""
    from pipelines import bench as runs
    from pipelines import cli
    from pipelines.request import Request

    if not options.rounds.isdecimal() or not 1 <= int(options.rounds) <= runs.ROUNDS:
        raise RequestError("rounds", options.rounds, f"a whole number from 1 to {runs.ROUNDS}")
    given, options.accelerate = options.accelerate or [], None
    if options.prompt is None and options.class_label is None:
        options.prompt, options.class_label = _example(options.model or str(Request(prompt="-").model))
    request = cli.request_of(options)
    with cli.progress(options) as on_step:
        found = runs.bench(request, given, int(options.rounds), on_step=on_step)
    cli.say(options, str(found), found.to_dict())
    return cli.SOME_FAILED if any(one.refused for one in found.rows) else cli.DONE


def _grid(options: argparse.Namespace) -> Grid:
    """Return the grid of the options; without axes, the one that the folder holds. Raises: RequestError."""
    from pipelines import cli
    from pipelines.grid import Grid, read_axis

    texts = [options.x, options.y, options.z]
    given = [text for text in texts if text is not None]
    if not given:
        path = Path(options.output).expanduser() / FILE
        try:
            data = path.read_bytes()
            return Grid.from_dict(json.loads(data) if len(data) <= LIMIT else None)
        except (OSError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(
                "x", None, f"given, such as --x steps=10,20: {path} holds no grid to go on with"
            ) from None
    if texts[: len(given)] != given:
        raise RequestError("axes", given, "given in order: --x first, then --y, then --z")
    axes = tuple(read_axis(text) for text in given)
    if options.prompt is None and any(axis.field in _SUBJECTS for axis in axes):
        return _of_axes(options, axes)
    request = cli.request_of(options)
    return Grid(request=request, axes=axes, seeds=_seeds(options.seeds), references=not options.no_exact)


def _of_axes(options: argparse.Namespace, axes: Any) -> Grid:
    """Return a grid whose prompts stand on an axis."""
    from pipelines import cli
    from pipelines.grid import Grid
    from pipelines.request import Request

    values = cli.settings_of(options)
    if options.accelerate:
        values["accelerators"] = options.accelerate
    for axis in axes:
        if axis.field in _SUBJECTS:
            values[axis.field] = axis.values[0].given
    return Grid(
        request=Request.from_dict(values),
        axes=axes,
        seeds=_seeds(options.seeds),
        references=not options.no_exact,
    )


def _seeds(text: str | None) -> int:
    from pipelines.grid import SEEDS

    if text is None:
        return 1
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= SEEDS):
        raise RequestError("seeds", text, f"a whole number from 1 to {SEEDS}")
    return int(text)


def _plan(grid: Grid, folder: Any, work: tuple[Cell, ...]) -> tuple[Plan, Any]:
    """Return the batch of a grid, and what is left of it would take."""
    from pipelines._planning import Plan, free
    from pipelines.grid import estimate
    from pipelines.manifest import Entry, Manifest
    from pipelines.shards import MEMBERS

    jobs: list[Job] = []
    if folder.exists:
        folder.settled("files", None)
        with folder.ledger() as ledger:
            jobs = _jobs(ledger)
    done = {job.key for job in jobs if job.state == "done"}
    told = estimate(work, [*jobs, *_earlier()], done)
    entries = tuple(
        Entry(
            line=place,
            id=cell.id,
            request=cell.request.to_dict(),
            key=cell.key,
            output=f"cells/{cell.id}.png",
        )
        for place, cell in enumerate(work, start=1)
    )
    missing = tuple(entry for entry in entries if entry.key not in done)
    repeated = len(grid.cells()) - len({cell.key for cell in grid.cells()})
    plan = Plan(
        manifest=Manifest(folder.output / FILE, entries, {}, repeated), output=folder.output, form="files", members=MEMBERS,
        missing=missing, done=len(entries) - len(missing), seconds=told.seconds, need=0, free=free(folder.output),
    )  # fmt: skip
    return plan, told


def _made(options: argparse.Namespace, grid: Grid, folder: Any, plan: Plan, workers: int) -> Outcome:
    from pipelines import _batching, batch, cli
    from pipelines.result import write_file

    folder.begin(plan.form, plan.members, plan.manifest)
    write_file(folder.output / FILE, json.dumps(grid.to_dict(), indent=1).encode() + b"\n", overwrite=True)
    if not options.quiet:
        cli.tell(f"{len(plan.manifest.entries)} pictures, {len(plan.missing)} to make")
    progress = _batching._Progress(live=sys.stderr.isatty(), off=options.quiet)
    try:
        return batch.run(plan, workers=workers, engine="local", tell=progress, stopped=options.stopped)
    finally:
        progress.clear()


def _told(options: argparse.Namespace, outcome: Outcome, made: Table, files: list[Path]) -> int:
    from pipelines import _batching, cli

    failed = [one for one in made.cells.values() if one.state in ("failed", "poisoned")]
    for one in failed[: _batching.SHOWN]:
        cli.tell(f"{one.cell.id}: {one.error}")
    lines = [_batching._summary(outcome, Path(options.output)), *map(str, files)]
    lines += [f"{dot.speedup:.2f}x  {_decibels(dot.psnr)}  {dot.label}" for dot in made.dots()]
    data = outcome.to_dict() | made.to_dict() | {"exported": [str(one) for one in files]}
    cli.say(options, "\n".join(lines), data)
    if outcome.broken:
        cli.tell(f"leapfrog: {outcome.broken}")
    return _batching._code(outcome)


def _retry(folder: Any, cell: str) -> None:
    """Put failed cells, or one of them, back in the queue. Raises: RequestError for a cell that is not there."""
    from pipelines._batch_folder import BATCH

    folder.require()
    with folder.ledger() as ledger:
        if cell == EVERY:
            ledger.retry(batch=BATCH)
            return
        found = next((job for job in _jobs(ledger) if job.item.id == cell), None)
        if found is None:
            raise RequestError(
                "retry", cell, "the name of a cell of this grid, as it was told where it failed"
            )
        ledger.retry(name=found.name)


def _table(grid: Grid, ledger: Ledger) -> Table:
    from pipelines.grid import table

    return table(grid, _jobs(ledger))


def _jobs(ledger: Ledger) -> list[Job]:
    from pipelines._batch_folder import pages

    return list(pages(ledger))


def _earlier() -> list[Job]:
    """Return finished jobs of this person's own ledger, if there is one."""
    from pipelines.jobs import Ledger, LedgerError, default_ledger

    path = default_ledger()
    if not path.is_file() or not os.access(path, os.R_OK):
        return []
    try:
        ledger = Ledger(path)
        try:
            return ledger.jobs(states=("done",), limit=KNOWN)
        finally:
            ledger.close()
    except LedgerError:  # an estimate is not worth an error
        return []


def _axes_told(grid: Grid) -> str:
    shape = " x ".join(str(len(axis.values)) for axis in grid.axes)
    seeds = f", {grid.seeds} seeds" if grid.seeds > 1 else ""
    extra = len(grid.work()) - len({cell.key for cell in grid.cells()})
    more = f"; {extra} exact pictures more, to measure against" if extra else ""
    return f"{shape} cells{seeds}{more}"


def _example(model: str) -> tuple[str | None, str | None]:
    """Return a prompt, or the text of a class number, that a model's card calls an example."""
    from pipelines import catalog
    from pipelines.tune import known_prompts

    source = catalog.find(model)
    card = None if source.folder is None else catalog.prepare(source)[1]
    if card is not None and card.takes_class:
        return None, "0"
    known = known_prompts(card) if card is not None else []
    if not known:
        raise RequestError("prompt", None, f"given: {model} has no example")
    return known[0], None


def _decibels(value: float) -> str:
    return "identical" if math.isinf(value) else f"{value:.1f} dB"
