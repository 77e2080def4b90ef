"""A clip that came in, decoded once by a process of its own, which may use so much memory and time and then ends.

A small file can hold hours of work: the header of a clip does not say what its frames will cost, and a decoder is large and meets
hostile bytes. Whatever happens to the process, the server goes on, and what it could not decode is never kept or given to a worker.

Differs: of pictures the header and the count of scans decide (`pipelines._serve_files`), so they need no process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.request import RequestError

MEMORY = 3_000_000_000
"""Most bytes of memory of the process; the frames of the longest clip that is allowed take 1.2e9 of them."""
SECONDS, PATIENCE = 60, 300.0
"""Most time of the processor, and most time by the clock, in s."""
WAITING = 15.0
"""How long a clip waits for its turn, in s."""

_ROOT = Path(__file__).resolve().parents[1]
_turns = threading.BoundedSemaphore(2)


def look(
    data: bytes, ending: str = ".mp4", *, memory: int = MEMORY, seconds: int = SECONDS
) -> tuple[int, int, int]:
    """Return width and height in px and the frames of a clip after every one of them was decoded.

    Raises:
        RequestError: damaged, beyond the limits of `pipelines.video_files`, or more work than one upload may make.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with _turn(), tempfile.TemporaryDirectory(prefix="leapfrog-") as folder:
        path = Path(folder) / f"clip{ending}"
        path.write_bytes(data)
        command = [sys.executable, "-m", "pipelines._serve_decoding", str(path), str(memory), str(seconds)]
        environment = os.environ | threads | {"PYTHONPATH": str(_ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            ran = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=PATIENCE,
                check=False,
            )
            found = json.loads(ran.stdout)
            if "allowed" in found:
                raise RequestError("file", found["given"].replace(f"{folder}{os.sep}", ""), found["allowed"])
            return int(found["width"]), int(found["height"]), int(found["frames"])
        except (subprocess.TimeoutExpired, KeyError, TypeError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            allowed = (
                f"one that is decoded with {memory // 1_000_000} MB of memory in {seconds} s, without a fault"
            )
            raise RequestError("file", "a clip", allowed) from None


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    """Hold one of few places, so that many clips at once cannot take the whole computer. Raises: RequestError."""
    if not _turns.acquire(timeout=WAITING):
        raise RequestError("file", "a clip", "sent again in a minute: others are being looked at")
    try:
        yield
    finally:
        _turns.release()


def main(arguments: Sequence[str]) -> int:
    """Decode the clip of a path within limits, and print what it is or what is wrong with it."""
    path, memory, seconds = arguments[0], int(arguments[1]), int(arguments[2])
    with contextlib.suppress(ImportError):  # no such limits on Windows: there the clock alone ends it
        import resource

        for kind, most in (
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (most, most))
    from pipelines.video_files import read_clip

    try:
        frames, _ = read_clip(path, field="file")
    except RequestError as error:
        print(json.dumps({"given": str(error.given), "allowed": error.allowed}))
        return 1
    print(json.dumps({"width": frames[0].width, "height": frames[0].height, "frames": len(frames)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
