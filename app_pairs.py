"""What the tab Compare has measured already, and which of the comparisons a page asked for is its newest.

Differs: a comparison that is asked for again gives the same words, letter for letter, so that the page leaves its viewer alone.
"""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from urllib.parse import quote

from app_page import SESSIONS, served
from pipelines.likeness import Likeness, likeness

KEPT = 100
"""Pairs of files whose comparison is remembered."""

Mark = tuple[str, int, int]
"""A file as it is: its path, when it was written in ns, and its length in bytes."""


@dataclasses.dataclass
class _Pair:
    """Two files, and what differs between them once that is known."""

    turn: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    found: Likeness | None = None
    heat: Path | None = None


class Pairs:
    """Comparisons by the files they are of. One that is asked for by two at once is made once."""

    def __init__(self) -> None:
        self._pairs: OrderedDict[tuple[Mark, Mark], _Pair] = OrderedDict()
        self._lock = threading.Lock()

    def measured(self, a: Path, b: Path) -> tuple[Likeness, str]:
        """Return how far two files are apart, and the address of the difference as a picture: the same one each time.

        Raises: RequestError, OSError.
        """
        marks = (_mark(a), _mark(b))
        with self._lock:
            pair = self._pairs.setdefault(marks, _Pair())
            self._pairs.move_to_end(marks)
            while len(self._pairs) > KEPT:
                self._pairs.popitem(last=False)
        with pair.turn:
            if pair.found is None or pair.heat is None or not pair.heat.is_file():
                found = likeness(a, b)
                pair.heat = _picture(found)
                pair.found = dataclasses.replace(found, heat=b"")
            return pair.found, f"gradio_api/file={quote(str(pair.heat))}"


class Newest:
    """The number of the newest thing that each open page asked for; a page counts on its own."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def asked(self, page: str, number: float) -> None:
        """Take note of what a page asks for."""
        with self._lock:
            self._numbers[page] = max(number, self._numbers.get(page, number))
            self._numbers.move_to_end(page)
            while len(self._numbers) > SESSIONS:
                self._numbers.popitem(last=False)

    def over(self, page: str, number: float) -> bool:
        """Whether a page has asked for something newer since."""
        with self._lock:
            return self._numbers.get(page, number) > number


def _mark(path: Path) -> Mark:
    state = path.stat()
    return str(path), state.st_mtime_ns, state.st_size


def _picture(found: Likeness) -> Path:
    """Return a served copy of the difference as a picture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "difference.png"
        path.write_bytes(found.heat)
        return Path(served(path))
