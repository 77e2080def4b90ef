"""Cells of a CSV table: text, read as what the column stands for."""

from __future__ import annotations

import json
from typing import Any

from pipelines.form import read
from pipelines.request import Request, RequestError, settings

DRAWN = ("prompt", "negative_prompt")
"""Texts that may hold choices; a cell of them is never read as anything else."""
_SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def cell(field: str, text: str) -> Any:
    """Return the value of a cell; lists are JSON, or texts with ; between them.

    Raises:
        RequestError: with the field, what was given and what is allowed.
    """
    if field in DRAWN:
        return text
    text = text.strip()
    if field in ("id", "output"):
        return text
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise RequestError(field, text, "JSON, where it begins with [ or {") from None
    if field == "matrix":
        return _SWITCH.get(text.lower(), text)
    if field in ("seeds", "tags") or any(one.name == field and one.type is tuple for one in settings()):
        parts = [part.strip() for part in text.split(";") if part.strip()]
        return [_whole(part) for part in parts] if field == "seeds" else parts
    return read(Request, field, text)


def _whole(text: str) -> int | str:
    """Return a whole number, or the text where it is none, so that it is refused by its field."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else text
