r"""Prompts with choices in them: `{red|blue}` and `__animals__`, a line of animals.txt; drawn by a seed, or all of them.

The same template and seed give the same text on every machine and version of Python. A backslash before { } | _ or \ takes
its meaning away; braces without a | stay as they are.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

DEPTH = 8
"""How deep choices may stand in choices, and word lists in word lists."""
LENGTH = 16_000
"""Most characters of a template."""
MOST = 10**12
"""Where counting ends."""
WORDS_BYTES = 4_000_000
"""Most bytes of a word list."""
WORDS = 100_000
"""Most lines of a word list."""

_NAME = re.compile(r"__([A-Za-z0-9](?:[A-Za-z0-9-]|_(?!_))*)__")
_SPECIAL = "{}|_\\"


class Choice:
    """One place of a template where one of several texts stands."""

    def __init__(self, options: tuple[Template, ...]) -> None:
        self.options = options
        self.count = min(MOST, sum(option.count for option in options))


class Template:
    """Text with choices in it; `count` tells how many texts it stands for, up to `MOST`."""

    def __init__(self, parts: list[str | Choice]) -> None:
        self.parts: list[str | Choice] = []
        for is_text, group in itertools.groupby(parts, lambda part: isinstance(part, str)):
            found = list(group)
            self.parts += ["".join(map(str, found))] if is_text else found
        self.count = 1
        for part in self.parts:
            self.count = min(MOST, self.count * (1 if isinstance(part, str) else part.count))

    def every(self) -> Iterator[str]:
        """Yield every text, the last choice changing fastest. Look at `count` first."""
        ways = [
            [part] if isinstance(part, str) else [text for option in part.options for text in option.every()]
            for part in self.parts
        ]
        for pieces in itertools.product(*ways):
            yield "".join(pieces)

    def drawn(self, seed: int, salt: str = "") -> str:
        """Return one text. Every choice is drawn by itself, from the seed, the salt and its place."""
        return "".join(self._walk(seed, salt, itertools.count()))

    def _walk(self, seed: int, salt: str, places: Iterator[int]) -> Iterator[str]:
        for part in self.parts:
            if isinstance(part, str):
                yield part
            else:
                digest = hashlib.sha256(f"{seed}/{salt}/{next(places)}".encode()).digest()
                option = part.options[int.from_bytes(digest[:8]) % len(part.options)]
                yield from option._walk(seed, salt, places)


class Wildcards:
    """Reads templates; `animals` in them is the file animals.txt of the folder, one text a line, # for remarks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._lists: dict[str, Choice] = {}
        self._open: list[str] = []

    def parse(self, text: str) -> Template:
        """Read a template. Raises: ValueError for an open brace, an unknown word list, or choices in choices without end."""
        if len(text) > LENGTH:
            raise ValueError(f"it has {len(text)} characters; with choices there may be {LENGTH}")
        return _Reader(text, self).whole()

    def choice(self, name: str) -> Choice:
        """Return a word list as a choice. Raises: ValueError."""
        if name in self._open or len(self._open) >= DEPTH:
            raise ValueError(
                f"the word list {name}.txt comes back to itself, or word lists stand in each other too deep"
            )
        if name not in self._lists:
            self._open.append(name)
            try:
                self._lists[name] = Choice(tuple(self.parse(line) for line in self._lines(name)))
            finally:
                self._open.pop()
        return self._lists[name]

    def _lines(self, name: str) -> list[str]:
        path = self.folder / f"{name}.txt"
        try:
            if not path.resolve().is_relative_to(self.folder):
                raise ValueError(f"the word list {path.name} lies outside the manifest's folder")
            if path.stat().st_size > WORDS_BYTES:
                raise ValueError(f"the word list {path.name} has more than {WORDS_BYTES // 1_000_000} MB")
            text = path.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            words = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ValueError(
                f"the word list {path.name} beside the manifest cannot be read ({words})"
            ) from None
        lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
        lines = [line for line in lines if line and not line.startswith("#")]
        if not 1 <= len(lines) <= WORDS:
            raise ValueError(f"the word list {path.name} has {len(lines)} lines; there may be 1 to {WORDS}")
        return lines


def product(templates: Mapping[str, Template]) -> Iterator[dict[str, str]]:
    """Yield every combination of the texts of all templates, by their names."""
    ways = [list(one.every()) for one in templates.values()]
    for texts in itertools.product(*ways):
        yield dict(zip(templates, texts, strict=True))


class _Reader:
    """Reads one text from left to right."""

    def __init__(self, text: str, lists: Wildcards) -> None:
        self.text, self.lists, self.at = text, lists, 0

    def whole(self) -> Template:
        found = self._sequence(depth=0)
        if self.at < len(self.text):
            raise ValueError(r"a } closes nothing; write \} for the sign itself")
        return found

    def _sequence(self, depth: int) -> Template:
        """Read up to the | or } that ends an option; outside braces, to the end."""
        parts: list[str | Choice] = []
        while self.at < len(self.text):
            letter = self.text[self.at]
            if letter == "\\" and self.text[self.at + 1 : self.at + 2] in (*_SPECIAL,):
                parts.append(self.text[self.at + 1])
                self.at += 2
            elif letter == "{":
                parts += self._braces(depth + 1)
            elif letter == "}" or (letter == "|" and depth):
                break
            elif letter == "_" and (found := _NAME.match(self.text, self.at)):
                self.at = found.end()
                parts.append(self.lists.choice(found[1]))
            else:
                parts.append(letter)
                self.at += 1
        return Template(parts)

    def _braces(self, depth: int) -> list[str | Choice]:
        if depth > DEPTH:
            raise ValueError(f"choices stand in choices more than {DEPTH} deep")
        self.at += 1
        options = [self._sequence(depth)]
        while self.text[self.at : self.at + 1] == "|":
            self.at += 1
            options.append(self._sequence(depth))
        if self.text[self.at : self.at + 1] != "}":
            raise ValueError(r"a { is never closed; write \{ for the sign itself")
        self.at += 1
        return [Choice(tuple(options))] if len(options) > 1 else ["{", *options[0].parts, "}"]
