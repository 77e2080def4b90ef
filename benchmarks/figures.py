"""`make figures`: every figure of the README again, on this machine, each by its own command."""

from __future__ import annotations

import subprocess
import sys

COMMANDS = (
    ("benchmarks.startup",),
    ("benchmarks.overhead",),
    ("benchmarks.speed",),
    ("benchmarks.quality",),
    ("benchmarks.strip",),
    ("benchmarks.backbones", "--readme"),
    ("benchmarks.peers", "--steps", "28"),  # last, it takes by far the longest
)


def main() -> int:
    """Run one benchmark after the other; the exit code is that of the first that failed."""
    failed = 0
    for command in COMMANDS:
        print(f"== {' '.join(command)}", flush=True)
        failed = failed or subprocess.run([sys.executable, "-m", *command], check=False).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
