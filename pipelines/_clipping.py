"""Options of the command line for clips: where they are saved, where their latents are kept, and files to be named again."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from pipelines._kept import Latents
from pipelines.request import RequestError
from pipelines.video_files import OTHERS

AGAIN = {"last_image": "the last picture", "clip": "the given clip"}


def add_output(one: argparse.ArgumentParser) -> None:
    """Add where a result is saved, and where its latents wait until it is."""
    one.add_argument(
        "--output", metavar="FILE", help="file or folder (default: a new PNG in this folder); the ending says the format: .png, for"
        " clips also .mp4, .gif, or .frames for a folder of PNG files",
    )  # fmt: skip
    one.add_argument(
        "--latents", metavar="FOLDER", help="keep latents here until the result is saved: after a failed decode the same command"
        " decodes them and denoises nothing",
    )  # fmt: skip


def output(options: argparse.Namespace) -> Path | None:
    """Return where a result is to be saved, if it was said. Raises: RequestError for a format that is not written."""
    if options.output is None:
        return None
    if options.output.strip() in ("", "-"):
        raise RequestError("output", options.output, "a file or a folder; left out, a new PNG in this folder")
    path = Path(options.output).expanduser()
    if path.suffix.lower() in OTHERS and not path.is_dir():
        raise RequestError(
            "output", str(path), "a file that ends in .png, for clips also .mp4, .gif or .frames"
        )
    if options.output.endswith(("/", os.sep)) and not path.is_dir():
        raise RequestError("output", options.output, "a folder that is there, or a file")
    return path


def kept(options: argparse.Namespace) -> Latents:
    """Return where latents are kept. Raises: RequestError for a folder that holds other things."""
    if options.latents is None:
        return Latents()
    folder = Path(options.latents).expanduser()
    if folder.exists() and (
        not folder.is_dir() or any(one.suffix != ".safetensors" for one in folder.iterdir())
    ):
        raise RequestError(
            "latents",
            str(folder),
            "a new folder, or one that an earlier run kept latents in: it is deleted after",
        )
    return Latents(folder)


def add_files(one: argparse.ArgumentParser) -> None:
    """Add what the file of a clip names beside a starting picture."""
    for name, words in AGAIN.items():
        one.add_argument(
            f"--{name.replace('_', '-')}", dest=name, metavar="FILE", help=f"{words}, where there was one"
        )


def files(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `add_files` was given."""
    return {name: getattr(options, name) for name in AGAIN if getattr(options, name) is not None}


def confirmed(request: Any, was: dict[str, Any], named: dict[str, Any]) -> dict[str, str]:
    """Take the files of a clip that a person has named again out of `named`. Raises: RequestError for one that was not."""
    found = {}
    for name in AGAIN:
        value = named.pop(name, None)
        told = was.get(name)
        if value is not None:
            found[name] = value
        elif getattr(request, name) is not None:
            shown = told.get("name") if isinstance(told, dict) else None
            flag = f"--{name.replace('_', '-')}"
            raise RequestError(name, shown, f"given again with {flag}: a file cannot choose what is opened")
    return found
