"""The commands `batch plan | run | status | resume | retry | verify | export`.

Exit codes: 0 all done, 1 bad input and nothing started, 2 some items failed, 3 something is missing here, 4 no room on the disk,
5 finished files differ, 130 and 143 stopped by a signal: started again, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.request import RequestError

if TYPE_CHECKING:
    from pipelines.batch import Outcome, Plan

NO_DEFAULT = ("images", "image", "mask", "last_image", "clip", "prompts", "controls", "loras")
"""Fields of a request that only a row can give."""
EVERY = 30.0
"""Between two lines of progress where standard error is no terminal, in s."""
SHOWN = 10
"""Failures that are listed after a run."""


def add_commands(commands: Any) -> None:
    """Add `batch` and what it can do."""
    from pipelines import cli

    about = "make everything that a manifest lists; started again, make what is missing"
    batch = commands.add_parser("batch", help=about, description=about)
    inner = batch.add_subparsers(title="what to do", metavar="ACTION", required=True)
    for name, run, words in (
        ("plan", _plan, "check a manifest and say what a run would do"),
        ("run", _run, "make what a manifest lists and the folder does not hold yet"),
    ):
        one = cli._command(inner, name, run, words)
        one.add_argument("manifest", metavar="MANIFEST", help="a table: .jsonl, .csv or .parquet")
        one.add_argument(
            "--output", metavar="FOLDER", required=True, help="where finished files and the ledger go"
        )
        one.add_argument("--format", metavar="FORM", help="files, webdataset or parquet (default: files)")
        one.add_argument("--members", metavar="N", help="pictures in a shard (default: 1000)")
        one.add_argument(
            "--files-from", action="append", default=[], metavar="FOLDER",
            help="a further folder in which files that the manifest names may lie; repeatable",
        )  # fmt: skip
        one.add_argument(
            "--accelerate",
            action="append",
            metavar="NAME[:KEY=VALUE,...]",
            help="for rows without any; repeatable",
        )
        cli._setting_options(one, NO_DEFAULT)
        if run is _run:
            _engine_options(one)
    for name, run, words in (
        ("status", _status, "show how a batch stands"),
        ("resume", _resume, "make what is still missing of a batch that was begun"),
        ("retry", _retry, "try again what failed or was cancelled"),
        ("verify", _verify, "read every finished file again; put back what is missing or changed"),
        ("export", _export, "write results.jsonl and failures.jsonl"),
    ):
        one = cli._command(inner, name, run, words)
        one.add_argument(
            "folder", metavar="FOLDER|MANIFEST", help="the output folder; with --output also the manifest"
        )
        one.add_argument(
            "--output", metavar="FOLDER", help="the output folder, where the manifest is named first"
        )
        if run in (_resume, _retry):
            _engine_options(one)


def _engine_options(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--workers",
        metavar="N",
        help="processes at work; with ray 0 is all there is room for (default: 1, ray 0)",
    )
    one.add_argument(
        "--engine", default="local", metavar="NAME", help="local, ray or accelerate (default: local)"
    )
    one.add_argument("--dry-run", action="store_true", help="check everything, make nothing")


def _plan(options: argparse.Namespace) -> int:
    from pipelines import cli

    plan = _planned(options)
    if plan is None:
        return cli.BAD_INPUT
    cli.say(options, str(plan), plan.to_dict())
    return cli.DONE if plan.fits else cli.NO_DISK


def _run(options: argparse.Namespace) -> int:
    from pipelines import cli

    workers = _workers(options)
    plan = _planned(options)
    if plan is None:
        return cli.BAD_INPUT
    if options.dry_run:
        cli.say(options, f"{plan}\nnothing was made (--dry-run)", plan.to_dict() | {"dry_run": True})
        return cli.DONE if plan.fits else cli.NO_DISK
    if not plan.fits:
        words = f"about {plan.need / 1e6:.0f} MB are needed and {plan.free / 1e6:.0f} MB are free; nothing was started"
        return cli._fail(options, cli.NO_DISK, words)
    if not options.quiet:
        cli.tell(str(plan))
    return _drive(options, plan, plan.output, workers)


def _resume(options: argparse.Namespace) -> int:
    from pipelines import batch, cli

    workers, folder = _workers(options), _folder(options)
    found = batch.status(folder)
    if options.dry_run:
        left = found["counts"]["waiting"] + found["counts"]["running"]
        cli.say(options, f"{left} items would be made (--dry-run)", found | {"dry_run": True})
        return cli.DONE
    return _drive(options, folder, folder, workers)


def _retry(options: argparse.Namespace) -> int:
    from pipelines import batch, cli

    folder = _folder(options)
    counts = batch.status(folder)["counts"]
    failed = counts["failed"] + counts["poisoned"] + counts["cancelled"]
    if not options.dry_run:
        _workers(options)
        batch.retry(folder)
    if not options.quiet:
        cli.tell(f"{failed} items are tried again")
    return _resume(options)


def _status(options: argparse.Namespace) -> int:
    from pipelines import batch, cli

    found = batch.status(_folder(options))
    counts = ", ".join(f"{count} {state}" for state, count in found["counts"].items() if count)
    lines = [f"{found['items']} items: {counts or 'none'}"]
    if found["packed"] is not None:
        lines.append(f"{found['packed']} in {len(found['shards'])} shards")
    lines += [f"{one['id']}: {one.get('phase', '')} on {one['worker']}" for one in found["running"]]
    cli.say(options, "\n".join(lines), found)
    return cli.DONE


def _verify(options: argparse.Namespace) -> int:
    from pipelines import batch, cli

    folder = _folder(options)
    told = batch.verify(folder)
    done = batch.status(folder)["counts"]["done"]
    cli.say(
        options, "\n".join([*told, f"{done} items are as they were written"]), {"differ": told, "done": done}
    )
    return cli.NOT_REPRODUCIBLE if told else cli.DONE


def _export(options: argparse.Namespace) -> int:
    from pipelines import batch, cli

    paths = [str(path) for path in batch.export(_folder(options))]
    cli.say(options, "\n".join(paths), {"files": paths})
    return cli.DONE


def _planned(options: argparse.Namespace) -> Plan | None:
    """Return the plan; None where the manifest has mistakes, which are told here."""
    from pipelines import batch, cli
    from pipelines.manifest import ManifestError

    defaults = cli.settings_of(options)
    if options.accelerate:
        defaults["accelerators"] = options.accelerate
    roots = [Path(one) for one in options.files_from]
    members = None if options.members is None else _number("members", options.members)
    try:
        return batch.plan(
            options.manifest,
            options.output,
            defaults=defaults,
            roots=roots,
            form=options.format,
            members=members,
        )
    except ManifestError as error:
        if options.json:
            told = {"code": cli.BAD_INPUT, "field": error.field, "message": str(error)}
            print(json.dumps({"error": told | {"problems": [one.to_dict() for one in error.problems]}}))
        cli.tell(f"leapfrog: {error}")
        return None


def _drive(options: argparse.Namespace, what: Any, folder: Path, workers: int) -> int:
    from pipelines import batch, cli
    from pipelines.jobs import LedgerError

    first = options.engine != "accelerate" or os.environ.get("RANK") == "0"  # one rank speaks for all
    progress = _Progress(live=sys.stderr.isatty(), off=options.quiet or not first)
    try:
        outcome = batch.run(
            what, workers=workers, engine=options.engine, tell=progress, stopped=options.stopped
        )
    except LedgerError as error:
        return cli._fail(options, cli.NO_DISK if error.full else cli.ENVIRONMENT, str(error))
    finally:
        progress.clear()
    if first:
        _tell_failures(options, folder, outcome)
        cli.say(options, _summary(outcome, folder), outcome.to_dict() | {"output": str(folder)})
    if outcome.broken:
        cli.tell(f"leapfrog: {outcome.broken}")
    return _code(outcome)


def _code(outcome: Outcome) -> int:
    from pipelines import cli

    if outcome.stopped:
        return 128 + outcome.stopped
    if outcome.full:
        return cli.NO_DISK
    if outcome.broken:
        return cli.ENVIRONMENT
    return cli.DONE if outcome.complete else cli.SOME_FAILED


def _summary(outcome: Outcome, folder: Path) -> str:
    counts = (
        ", ".join(f"{count} {state}" for state, count in outcome.counts.items() if count) or "nothing to do"
    )
    told = f"{counts} in {folder} ({outcome.seconds:.1f} s)"
    if outcome.full:
        told += "\nthe disk is full: make room, then start the same command again"
    elif outcome.stopped:
        told += "\nstopped; start the same command again to go on"
    return told


def _tell_failures(options: argparse.Namespace, folder: Path, outcome: Outcome) -> None:
    from pipelines import cli
    from pipelines._batch_folder import BATCH, Folder

    if options.quiet:
        return
    with Folder(folder).ledger() as ledger:
        failed = ledger.jobs(batch=BATCH, states=("failed", "poisoned"), limit=SHOWN, newest_first=False)
    for job in failed:
        cli.tell(f"{job.item.id}: {job.error}")
    for name in outcome.flagged[:SHOWN]:
        cli.tell(f"{name}: its picture holds NaN or one colour")
    if failed:
        cli.tell(f"all of them: leapfrog batch export {folder}; again: leapfrog batch retry {folder}")


def _folder(options: argparse.Namespace) -> Path:
    return Path(options.output or options.folder).expanduser()


def _workers(options: argparse.Namespace) -> int:
    if options.workers is None:
        return 0 if options.engine == "ray" else 1
    return _number("workers", options.workers)


def _number(field: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise RequestError(field, text, "a whole number")
    return int(text)


class _Progress:
    """Tells how a batch goes on: one line that is drawn again on a terminal, a line now and then elsewhere."""

    def __init__(self, *, live: bool, off: bool) -> None:
        self.live, self.off = live, off
        self.begun: int | None = None
        self.last = time.monotonic()

    def __call__(self, counts: dict[str, int], seconds: float) -> None:
        """Draw or print where the batch stands."""
        self.begun = counts["done"] if self.begun is None else self.begun
        now = time.monotonic()
        if self.off or (not self.live and now - self.last < EVERY):
            return
        self.last = now
        made, left = counts["done"] - self.begun, counts["waiting"] + counts["running"]
        parts = [f"{counts['done']} done", f"{counts['running']} running", f"{counts['waiting']} waiting"]
        failed = counts["failed"] + counts["poisoned"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"about {seconds / made * left:.0f} s left"] if made else []
        text = f"{seconds:6.1f} s  {', '.join(parts)}"
        print(
            f"\r{text}\033[K" if self.live else text,
            end="" if self.live else "\n",
            file=sys.stderr,
            flush=True,
        )

    def clear(self) -> None:
        """Wipe the drawn line."""
        if self.live and not self.off:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
