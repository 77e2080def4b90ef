"""The commands `inspect`, `models`, `doctor` and `repro`: what is in a file, what is here, whether a picture comes out again."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import _clipping, controls
from pipelines.request import RequestError

if TYPE_CHECKING:
    from pipelines.catalog import Card


def add_commands(commands: Any) -> None:
    """Add the commands."""
    from pipelines import cli

    one = cli._command(
        commands, "inspect", _inspect, "show what is in a picture, a weight file or a model folder"
    )
    one.add_argument("path", metavar="FILE|FOLDER")
    one.add_argument(
        "--timeline", metavar="SVG", help="draw the run of a picture, steps by blocks, into a new file"
    )
    cli._command(commands, "models", _models, "list the shipped models")
    cli._command(commands, "doctor", _doctor, "check this computer")
    one = cli._command(commands, "repro", _repro, "remake a picture from its file and compare")
    one.add_argument("path", metavar="FILE")
    one.add_argument(
        "--model", metavar="MODEL", help="the model, where the file names one that is not shipped"
    )
    one.add_argument("--image", metavar="FILE", help="the starting picture, where there was one")
    controls.add_files(one)
    _clipping.add_files(one)


def _inspect(options: argparse.Namespace) -> int:
    from pipelines import cli
    from pipelines.inspection import inspect

    found = inspect(Path(options.path).expanduser())
    if options.timeline:
        found["timeline"] = _draw(found, Path(options.timeline).expanduser())
    cli.say(options, _lines(found), found)
    return cli.DONE


def _draw(found: dict[str, Any], path: Path) -> str:
    from pipelines.result import check_target
    from pipelines.timeline import drawing

    report = found.get("report") or {}
    try:
        text = drawing(report.get("run", {}), report.get("summary", ""))
    except ValueError as error:
        raise RequestError("timeline", str(path), f"left out here: {error}") from None
    if path.suffix.lower() != ".svg" or path.exists():
        raise RequestError("timeline", str(path), "a new file with the ending .svg")
    check_target(path.absolute().parent)
    path.write_text(text, encoding="utf-8")
    return str(path)


def _models(options: argparse.Namespace) -> int:
    from pipelines import catalog, cli

    cards = catalog.shipped()
    rows = [
        f"{name}\t{_size(card)}\t{card.task}\t{card.summary if card.title in ('', name) else card.title}"
        for name, card in cards.items()
    ]
    rows.append(
        "also: any folder saved by a diffusers pipeline, or a hub id such as org/name (safetensors only)"
    )
    cli.say(
        options, "\n".join(rows), {"models": {name: dataclasses.asdict(card) for name, card in cards.items()}}
    )
    return cli.DONE


def _size(card: Card) -> str:
    frames = card.more.get("frames")
    return f"{card.width}x{card.height} px" + (f", {frames} frames" if isinstance(frames, int) else "")


def _doctor(options: argparse.Namespace) -> int:
    from pipelines import cli
    from pipelines.inspection import examine

    found = examine(Path.cwd())
    cli.say(options, _lines(found), found)
    return cli.ENVIRONMENT if found["problems"] else cli.DONE


def _repro(options: argparse.Namespace) -> int:
    from pipelines import cli
    from pipelines.repro import repro

    files = {"image": options.image, **controls.files(options), **_clipping.files(options)}
    with cli.progress(options) as on_step:
        verdict = repro(options.path, model=options.model, on_step=on_step, **files)
    cli.say(options, str(verdict), verdict.to_dict())
    return cli.DONE if verdict.same else cli.NOT_REPRODUCIBLE


def _lines(found: dict[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", _lines(value, indent + "  ")] if value else []
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{indent}{key}: {len(value)} entries")
        else:
            lines.append(f"{indent}{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return "\n".join(lines)
