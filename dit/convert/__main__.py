"""`python -m dit.convert SRC DST --system DiT --args JSON`: an official .safetensors file becomes a folder of ours."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit.convert import load_official, systems


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one file; return 0, or 2 with a reason on standard error."""
    parser = argparse.ArgumentParser(prog="python -m dit.convert", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SRC", help="official weights, .safetensors")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write: config.json and weights")
    parser.add_argument("--system", required=True, help=f"official name: {', '.join(systems())}")
    parser.add_argument(
        "--args",
        default="{}",
        metavar="JSON",
        help="the official constructor's arguments that differ from its defaults, as JSON or as a .json file",
    )
    given = parser.parse_args(argv)
    try:
        args, settings = _args(given.args)
        model = load_official(given.source, given.system, settings=settings, **args)
        model.save_pretrained(given.target)
    except (ValueError, OSError, TypeError) as error:
        print(f"dit.convert: {error}", file=sys.stderr)
        return 2
    print(
        f"{given.target}: {type(model).__name__}, {sum(one.numel() for one in model.parameters()) / 1e6:.2f} M parameters"
    )
    return 0


def _args(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read JSON, or a .json file: a fixture's config.json gives its `args` and `run`."""
    read = json.loads(Path(text).read_text(encoding="utf-8")) if text.endswith(".json") else json.loads(text)
    if not isinstance(read, dict):
        raise ValueError(f"--args is a JSON object, got {text!r}")
    if isinstance(read.get("args"), dict) and "system" in read:
        return read["args"], read.get("run", {})
    return read, {}


if __name__ == "__main__":
    sys.exit(main())
