"""`make figures`: every figure of the README again, on this machine, each by its own command."""

from __future__ import annotations

import subprocess
import sys

COMMANDS = ("benchmarks.startup", "benchmarks.overhead", "benchmarks.speed", "benchmarks.quality", "benchmarks.strip")


def main() -> int:
    """Run one benchmark after the other; the exit code is that of the first that failed."""
    failed = 0
    for name in COMMANDS:
        print(f"== {name}", flush=True)
        failed = failed or subprocess.run([sys.executable, "-m", name], check=False).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
