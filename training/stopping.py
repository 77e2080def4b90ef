"""Signals that end a run between two steps instead of in the middle of one, so that it can save and be started again."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def heard() -> Iterator[list[int]]:
    """Yield a list that gets the number of SIGTERM or SIGINT when one comes; a second one acts as it always did.

    Only the main thread of a program may listen: in another nothing is changed, and the list stays empty.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {one: signal.getsignal(one) for one in SIGNALS}

    def restore() -> None:
        for one, handler in before.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        restore()
        print(
            f"\n{signal.Signals(number).name}: this step ends, then the run is saved",
            file=sys.stderr,
            flush=True,
        )

    for one in SIGNALS:
        signal.signal(one, note)
    try:
        yield came
    finally:
        restore()


def leave(number: int, seen: int) -> None:
    """End the program as a signal does, after the run was saved. Raises: SystemExit, always."""
    name = signal.Signals(number).name
    print(
        f"saved after {seen} samples ({name}); the same command goes on from here",
        file=sys.stderr,
        flush=True,
    )
    raise SystemExit(128 + number)
