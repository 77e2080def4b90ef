"""The commands `compare` and `tune`: what an accelerator costs and gains, and which is the best for a wish."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipelines.request import Request, RequestError

NOT_TUNED = (
    "seed", "images", "image", "strength", "class_label", "profile", "fps", "prompts", "last_image", "clip", "task", "given",
    "every", "keyframes", "region", "mask", "window", "overlap", "window_seeds", "scene_frames", "tiling",
)  # fmt: skip
"""Fields of a request that a profile is not bound to."""
MINUTES = "5"


def add_commands(commands: Any) -> None:
    """Add `compare` and `tune`."""
    from pipelines import cli

    about = "measure what an accelerator costs and gains, or how far two files differ"
    one = cli._command(commands, "compare", _compare, about)
    cli._request_options(one)
    _add_compare(one)
    about = "search the accelerators that are fastest at a wished likeness, and write a profile"
    one = cli._command(commands, "tune", _tune, about)
    _add_tune(one)
    cli._setting_options(one, NOT_TUNED)


def _add_compare(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "other", nargs="?", metavar="FILE", help="with a file in place of the prompt: the second file"
    )
    one.add_argument(
        "--rounds", default="3", metavar="N", help="timed runs of each kind, taken in turns (default: 3)"
    )


def _compare(options: argparse.Namespace) -> int:
    """Compare a request with its exact run, or two files; return the exit code."""
    from pipelines import cli, measure

    if options.other is not None:
        found = measure.files(options.prompt, options.other)
        cli.say(options, str(found), found.to_dict())
        return cli.DONE
    if not options.rounds.isdecimal() or not 1 <= int(options.rounds) <= measure.ROUNDS:
        raise RequestError("rounds", options.rounds, f"a whole number from 1 to {measure.ROUNDS}")
    request = cli.request_of(options)
    with cli.progress(options) as on_step:
        measured = measure.compare(request, request.accelerators, rounds=int(options.rounds), on_step=on_step)
    cli.say(options, str(measured), measured.to_dict())
    return cli.SOME_FAILED if measured.failures else cli.DONE


def _add_tune(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "wanted", nargs="*", metavar="PROMPT", help="what to draw (default: the model card's examples)"
    )
    wish = one.add_mutually_exclusive_group()
    wish.add_argument(
        "--psnr", metavar="DB", help="as fast as can be at this mean PSNR to the exact picture (default: 35)"
    )
    wish.add_argument(
        "--speedup", metavar="X", help="as like as can be at this speed-up of the denoising loop"
    )
    one.add_argument(
        "--minutes", default=MINUTES, metavar="X", help=f"the most time to take (default: {MINUTES})"
    )
    one.add_argument(
        "--output", metavar="FILE", help="the profile's file, .json (default: a name in the folder profiles)"
    )


def _tune(options: argparse.Namespace) -> int:
    """Search and write a profile; return the exit code."""
    from pipelines import cli
    from pipelines.tune import tune as search

    budget = f"speedup>={options.speedup}" if options.speedup is not None else f"psnr>={options.psnr or 35}"
    values = cli.settings_of(options)
    settings = Request.from_dict({"prompt": "-"} | values)
    with cli.progress(options) as on_step:
        tuned = search(
            settings.model, budget, _minutes(options.minutes), settings=settings, prompts=options.wanted,
            output=_output(options.output), on_step=on_step, tell=_quiet if options.quiet else cli.tell,
        )  # fmt: skip
    cli.say(options, str(tuned), tuned.to_dict())
    return cli.DONE if tuned.profile is not None else cli.SOME_FAILED


def _minutes(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError("minutes", text, "a number of minutes") from None


def _output(text: str | None) -> Path | None:
    path = Path(text).expanduser() if text else None
    if path is not None and path.suffix.lower() != ".json":
        raise RequestError("output", text, "a file with the ending .json")
    return path


def _quiet(_: Any) -> None:
    return None
