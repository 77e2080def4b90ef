"""Names that come from outside: file names that are safe to write, and files that may be read, resolved inside given folders."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

LONGEST = 200
"""Most bytes of a file name."""

_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)(\..*)?", re.IGNORECASE)
_DRIVE = re.compile(r"[A-Za-z]:")


def file_name(text: object) -> str | None:
    """Return why a text is no name (or folder/name) to write inside a folder, or None where it is one."""
    if not isinstance(text, str):
        return "it is no text"
    reason = _odd(text)
    if reason is not None:
        return reason
    for part in text.split("/"):
        if part in ("", ".", ".."):
            return "it has an empty part, . or .."
        if len(part.encode()) > LONGEST:
            return f"it is longer than {LONGEST} bytes"
        if part.startswith((".", "~", "-")) or part.endswith((".", " ")):
            return "a part begins with . ~ or -, or ends with . or a space"
        if _RESERVED.fullmatch(part):
            return "a part is a name that systems keep for devices"
        if any(letter in '<>:"|?*' for letter in part):
            return 'it has one of the signs < > : " | ? *'
    if len(PurePosixPath(text).parts) > 8:
        return "it lies more than 8 folders deep"
    return None


def _odd(text: str) -> str | None:
    if not text or len(text) > 1024:
        return "it is empty or longer than 1024 characters"
    for letter in text:
        if unicodedata.category(letter)[0] == "C":
            return f"it has the character U+{ord(letter):04X}"
    if "\\" in text:
        return r"it has a \; folders are written with /"
    if unicodedata.normalize("NFKC", text) != text and any(
        sign in unicodedata.normalize("NFKC", text) and sign not in text for sign in ("/", "\\", "..", ":")
    ):
        return "it has a sign that looks like one of paths"
    return None


class Roots:
    """Folders in which files may be read. The first is where relative paths begin."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = [root.expanduser().resolve() for root in roots]

    def file(self, text: object, *, folder: bool = True) -> str:
        """Return the whole path of a file (with `folder` also of a folder) inside a root, links followed.

        Raises: ValueError with the reason.
        """
        if not isinstance(text, str):
            raise ValueError("it is no text")
        reason = _odd(text)
        if reason is not None:
            raise ValueError(reason)
        if _DRIVE.match(text) or text.startswith("~"):
            raise ValueError("it names a drive or a home folder")
        try:
            path = (self.roots[0] / text).resolve()
        except (OSError, RuntimeError, ValueError):
            raise ValueError("it cannot be resolved") from None
        if not any(path.is_relative_to(root) for root in self.roots):
            raise ValueError("it lies outside")
        try:
            if not path.is_file() and not path.is_dir():
                raise ValueError("there is no such file")
            if path.is_dir() and not folder:
                raise ValueError("it is a folder")
            if path.is_file() and not path.stat().st_size:
                raise ValueError("it is empty")
        except OSError as error:
            raise ValueError(f"it cannot be read: {error.strerror}") from None
        return str(path)
