"""Prompts over time: "a | b | c", "0: a | 12: b", "0-8: a | 8-16: b", and lists of whole numbers; checked, one text form.

Paper: none; the forms are those of prompt travel (frame -> prompt) and of scene lists (segments with a start and an end).
Differs: all three forms are one text, so that a page, a command line and a file's metadata carry them alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.request import RequestError, shorten

PARTS = 100
"""Most parts of a schedule."""

_PLACE = re.compile(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*:\s*(\S.*)\Z", re.DOTALL)
_NUMBERS = re.compile(r"-?\d{1,16}(\s*,\s*-?\d{1,16})*\Z")
_FORMS = 'parts as "a | b | c", "0: a | 12: b" or "0-8: a | 8-16: b"'


@dataclass(frozen=True, slots=True)
class Part:
    """One prompt and where it stands: from frame `start` to before frame `end`; None where the text does not say."""

    text: str
    start: int | None = None
    end: int | None = None

    def __str__(self) -> str:
        if self.start is None:
            return self.text
        return f"{self.start}: {self.text}" if self.end is None else f"{self.start}-{self.end}: {self.text}"


def read_prompts(value: Any) -> tuple[Part, ...]:
    """Read a schedule.

    Args:
        value: the text form; a list of texts; a mapping first frame -> text; a list of segments, each (start, end, text) or
            {"start": ..., "end": ..., "text": ...}.

    Raises:
        RequestError: no parts, an empty one, forms mixed, frames out of order, overlapping segments, or gaps between them.
    """
    if isinstance(value, str):
        parts = [_part(one.strip()) for one in value.split("|")]
    elif isinstance(value, Mapping):
        parts = [Part(_text(text), _frame(start)) for start, text in value.items()]
    elif isinstance(value, Sequence):
        parts = [_segment(one) for one in value]
    else:
        raise RequestError("prompts", value, _FORMS)
    if not 1 <= len(parts) <= PARTS:
        raise RequestError("prompts", f"{len(parts)} parts", f"1 to {PARTS} parts")
    if len({(one.start is None, one.end is None) for one in parts}) > 1:
        raise RequestError("prompts", shorten(value, 60), f"{_FORMS}, one form for all of them")
    parts.sort(key=lambda one: one.start or 0)  # stable: texts without places stay as they came
    _check_places(parts)
    return tuple(parts)


def text_of(parts: Sequence[Part]) -> str:
    """Return the text form."""
    return " | ".join(map(str, parts))


def spread(parts: Sequence[Part], frames: int) -> list[tuple[int, int, str]]:
    """Return (first frame, frame after the last, prompt) of every part in a clip of `frames` frames, without a gap.

    Raises:
        RequestError: more parts than frames, or places that the clip does not have.
    """
    count = len(parts)
    if parts[0].start is None:
        if count > frames:
            raise RequestError("prompts", f"{count} parts", f"at most one for each of the {frames} frames")
        edges = [round(i * frames / count) for i in range(count)] + [frames]
    else:
        edges = [one.start or 0 for one in parts] + [frames if parts[-1].end is None else parts[-1].end]
        if edges[-1] != frames or edges[-2] >= frames:
            last = edges[-2] if parts[-1].end is None else edges[-1]
            allowed = f"parts that start before frame {frames}" + (
                "" if parts[-1].end is None else f" and end at {frames}, where the clip ends"
            )
            raise RequestError("prompts", last, allowed)
    return [(a, b, one.text) for a, b, one in zip(edges, edges[1:], parts, strict=False)]


def length_of(parts: Sequence[Part]) -> int | None:
    """Return how many frames a schedule of segments has, None where it does not say."""
    return parts[-1].end


def read_numbers(field: str, value: Any, *, low: int, high: int, most: int = 1000) -> tuple[int, ...]:
    """Read whole numbers from text ("0,7,15"), one number or a list. Raises: RequestError."""
    allowed = f"1 to {most} whole numbers from {low} to {high}, as 0,7,15"
    if isinstance(value, bool):
        raise RequestError(field, value, allowed)
    if isinstance(value, int):
        value = [value]
    if isinstance(value, str):
        if not _NUMBERS.match(value.strip()):
            raise RequestError(field, value, allowed)
        value = [int(one) for one in value.split(",")]
    if not isinstance(value, list | tuple) or not all(type(one) is int for one in value):
        raise RequestError(field, value, allowed)
    if not 1 <= len(value) <= most or not all(low <= one <= high for one in value):
        raise RequestError(field, list(value), allowed)
    return tuple(value)


def _part(text: str) -> Part:
    found = _PLACE.match(text)
    if found is None:
        return Part(_text(text))
    start, end, rest = found.groups()
    return Part(_text(rest), int(start), None if end is None else int(end))


def _segment(one: Any) -> Part:
    if isinstance(one, str):
        made = _part(one.strip())
        if made.start is not None:
            raise RequestError("prompts", one, "texts that begin with no frame number in a list of texts")
        return Part(_text(one))
    if isinstance(one, Mapping) and set(one) == {"start", "end", "text"}:
        one = (one["start"], one["end"], one["text"])
    if not isinstance(one, list | tuple) or len(one) != 3:
        raise RequestError("prompts", one, 'a text, (start, end, text) or {"start", "end", "text"}')
    return Part(_text(one[2]), _frame(one[0]), _frame(one[1]))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "|" in value:
        raise RequestError("prompts", value, "made of texts that are not empty and hold no |")
    return value.strip()


def _frame(value: Any) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 5 else value
    if type(number) is not int or not 0 <= number <= 9999:
        raise RequestError("prompts", value, "placed at frames from 0 to 9999")
    return number


def _check_places(parts: Sequence[Part]) -> None:
    if parts[0].start is None:
        return
    if parts[0].start != 0:
        raise RequestError("prompts", parts[0].start, "made so that the first part starts at frame 0")
    for one, following in zip(parts, [*parts[1:], None], strict=True):
        start, end = one.start or 0, one.end
        if end is not None and end <= start:
            raise RequestError("prompts", f"{start}-{end}", "segments of at least one frame")
        if following is None:
            continue
        if following.start == start:
            raise RequestError("prompts", start, "one prompt at a frame")
        if end is not None and end != following.start:
            what = "overlap" if end > (following.start or 0) else "leave a gap"
            raise RequestError(
                "prompts", f"{one!s} and {following!s}", f"segments one after the other; these {what}"
            )
