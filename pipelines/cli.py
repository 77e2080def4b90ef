"""The `leapfrog` command. Results go to standard output, progress to standard error.

Exit codes: 0 done, 1 bad input, 2 some pictures failed, 3 something is missing here, 4 no room on the disk, 5 not
reproducible, 130 and 143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipelines import _batching, _clipping, _examining, _gridding, _measuring, _serving, controls, ranks
from pipelines.form import add_options, fields, read
from pipelines.request import Request, RequestError

if TYPE_CHECKING:
    from pipelines.generate import Progress

DONE, BAD_INPUT, SOME_FAILED, ENVIRONMENT, NO_DISK, NOT_REPRODUCIBLE = range(6)
INPUT_LIMIT = 1_000_000

_FLAGS = {"negative_prompt": "negative", "class_label": "class"}
_OWN_OPTIONS = ("prompt", "accelerators", "controls", "loras")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return BAD_INPUT
    from pipelines.machine import strangers

    for sentence in strangers():
        return _fail(options, ENVIRONMENT, sentence)
    return _guarded(options)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; its options for a request come from the request's own fields. Imports nothing heavy."""
    parser = _Parser(
        prog="leapfrog",
        description="Pictures from prompts with diffusion transformers, exact or accelerated.",
    )
    parser.add_argument("--version", action=_Version, help="show the version and leave")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    one = _command(commands, "generate", ranks.command(_generate), "make pictures from a prompt")
    _request_options(one)
    ranks.add_option(one)
    _clipping.add_output(one)
    one.add_argument("--overwrite", action="store_true", help="replace files that are there")
    one.add_argument("--dry-run", action="store_true", help="check everything, make nothing")
    _measuring.add_commands(commands)
    _examining.add_commands(commands)
    _serving.add_commands(commands)
    _batching.add_commands(commands)
    _gridding.add_commands(commands)
    return parser


def _request_options(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="what to draw; - reads a whole request as JSON from standard input",
    )
    _setting_options(one)
    one.add_argument(
        "--accelerate",
        action="append",
        metavar="NAME[:KEY=VALUE,...]",
        help="e.g. delta-cache:interval=3; repeatable",
    )


def _setting_options(one: argparse.ArgumentParser, left_out: Sequence[str] = ()) -> None:
    names = (*_OWN_OPTIONS, *left_out)
    add_options(one, [field for field in fields(Request) if field.name not in names], _FLAGS)
    one.add_argument("--size", metavar="N|WxH", help="width and height at once")
    controls.add_options(one)


def _generate(options: argparse.Namespace) -> int:
    request = request_of(options)
    target = _target(options, request)
    if options.dry_run:
        return _dry_run(options, request)
    from pipelines.generate import generate

    keep = _clipping.kept(options)
    with progress(options) as on_step:
        result = generate(request, on_step=on_step, keep=keep)
    if not ranks.saves():
        return DONE
    paths = result.save(target, overwrite=options.overwrite)
    keep.forget()
    for warning in result.report["warnings"]:
        tell(f"warning: {warning}")
    if not options.json:
        tell(f"{sum(result.report['timings'].values()):.1f} s - {result.report['summary']}")
    say(options, "\n".join(map(str, paths)), {"files": [str(one) for one in paths], "report": result.report})
    return DONE if result.ok else SOME_FAILED


def request_of(options: argparse.Namespace) -> Request:
    """Return the request of the options, or the one on standard input. Raises: RequestError."""
    values: dict[str, Any] = {}
    if options.prompt == "-":
        text = sys.stdin.read(INPUT_LIMIT + 1)
        try:
            values = json.loads(text) if len(text) <= INPUT_LIMIT else {}
        except (ValueError, RecursionError):
            values = {}
        if not isinstance(values, dict) or not values:
            raise RequestError("standard input", text[:40], "a request as a JSON object of at most 1 MB")
    elif options.prompt is not None:
        values["prompt"] = options.prompt
    values |= settings_of(options)
    if options.accelerate:
        values["accelerators"] = options.accelerate
    return Request.from_dict(values)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a request that were given as options. Raises: RequestError."""
    values: dict[str, Any] = controls.given(options)
    if options.size is not None:
        sides = options.size.lower().split("x")
        if not 1 <= len(sides) <= 2 or not all(sides):
            raise RequestError("size", options.size, "one number or WIDTHxHEIGHT, in px")
        values |= {"width": read(Request, "width", sides[0]), "height": read(Request, "height", sides[-1])}
    for field in fields(Request):
        text = getattr(options, field.name, None)
        if field.name not in _OWN_OPTIONS and text is not None:
            if not text.strip() and field.default is None:  # as of a variable of the shell that is not set
                raise RequestError(field.name, text, "given, or the option left out")
            values[field.name] = read(Request, field.name, text)
    return values


def _dry_run(options: argparse.Namespace, request: Request) -> int:
    from pipelines import catalog
    from pipelines.generate import check

    source = catalog.find(request.model)
    known: dict[str, Any] = {"kind": source.kind, "folder": str(source.folder) if source.folder else None}
    if source.folder is not None:
        _, card = catalog.prepare(source)
        check(request, card)
        known |= {"width": request.width or card.width, "height": request.height or card.height}
        known |= {
            "steps": request.steps or card.steps,
            "guidance": card.guidance if request.guidance is None else request.guidance,
        }
    text = "\n".join(f"{key}: {value}" for key, value in (request.to_dict() | known).items())
    say(
        options,
        f"{text}\nnothing was made (--dry-run)",
        {"request": request.to_dict(), "model": known, "dry_run": True},
    )
    return DONE


def _target(options: argparse.Namespace, request: Request) -> Path | None:
    """Return where to save, after checking before any work that saving there can succeed."""
    from pipelines import catalog
    from pipelines.result import check_ending, check_target

    path = _clipping.output(options)
    check_target(path, overwrite=options.overwrite, pictures=request.images * (request.panels or 1))
    source = catalog.find(request.model)
    if source.folder is not None:
        check_ending(path, catalog.prepare(source)[1])
    return path


def _guarded(options: argparse.Namespace) -> int:
    """Run the chosen command and turn what goes wrong into one sentence and an exit code."""
    from pipelines.catalog import Unavailable
    from pipelines.generate import Cancelled
    from pipelines.result import SaveError

    stopped: list[int] = []
    previous = {one: signal.signal(one, _stopper(stopped)) for one in (signal.SIGINT, signal.SIGTERM)}
    options.stopped = stopped
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except RequestError as error:
        return _fail(options, BAD_INPUT, str(error), error.field)
    except Unavailable as error:
        return _fail(options, ENVIRONMENT, str(error))
    except SaveError as error:
        return _fail(options, NO_DISK if error.full else ENVIRONMENT, str(error))
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except ImportError as error:
        return _fail(
            options,
            ENVIRONMENT,
            f"a library is missing ({error}); install with: pip install -r requirements.txt",
        )
    except (Cancelled, KeyboardInterrupt):
        return _fail(options, 128 + (stopped[0] if stopped else signal.SIGINT), "stopped; nothing was saved")
    except RuntimeError as error:
        return _fail(options, SOME_FAILED, f"the run failed: {error}")
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)


def _stopper(stopped: list[int]) -> Callable[[int, Any], None]:
    def stop(number: int, _frame: Any) -> None:
        if stopped:  # asked twice: at once
            os._exit(128 + number)
        stopped.append(number)

    return stop


@contextmanager
def progress(options: argparse.Namespace) -> Iterator[Callable[[Progress], bool]]:
    """Yield an `on_step` that draws one line on a terminal and answers False once a signal came."""
    live = sys.stderr.isatty() and not options.quiet

    def on_step(progress: Progress) -> bool:
        if live:
            steps = f" {progress.step}/{progress.steps}" if progress.steps else ""
            print(
                f"\r{progress.seconds:6.1f} s  {progress.phase}{steps}\033[K",
                end="",
                file=sys.stderr,
                flush=True,
            )
        return not options.stopped

    try:
        yield on_step
    finally:
        if live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], about: str
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made.add_argument("--quiet", action="store_true", help="no progress")
    made.set_defaults(run=run)
    return made


def say(options: argparse.Namespace, text: str, data: dict[str, Any]) -> None:
    """Print a result: the text, or with --json the data."""
    print(json.dumps(data, default=str) if options.json else text)


def tell(text: str) -> None:
    """Print a remark on standard error."""
    print(text, file=sys.stderr)


def _fail(options: argparse.Namespace, code: int, sentence: str, field: str | None = None) -> int:
    if options.json:
        print(json.dumps({"error": {"code": code, "field": field, "message": sentence}}))
    tell(f"leapfrog: {sentence}")
    return code


class _Parser(argparse.ArgumentParser):
    """Bad options are bad input: exit code 1."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}; {self.prog} --help shows what there is\n")


class _Version(argparse.Action):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from pipelines.machine import version

        print(f"leapfrog {version()}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
