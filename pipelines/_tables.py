"""The rows of a table file, JSON lines, CSV or Parquet: read as data, within limits, every bad line told by its number.

Differs: the first bad line does not end the reading, so that a person mends a file once; what a spreadsheet leaves in front of a
file (a byte order mark) is understood; a text that is no UTF-8 is refused where another reader would guess.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.request import RequestError, shorten

BYTES = 64_000_000
"""Most bytes of a table."""
LINES = 100_000
"""Most lines of a table."""
LINE = 1_000_000
"""Most characters of a line."""
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
"""Endings of table files and what they hold."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong in a line, counted from 1: the field, what was given and what is allowed."""

    line: int
    field: str
    given: str
    allowed: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.field} must be {self.allowed}; got {self.given}"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)


def problem(line: int, field: str, given: object, allowed: str) -> Problem:
    """Return a problem, with what was given cut to a length that can be shown."""
    return Problem(line, field, given if isinstance(given, str) and not given else shorten(given), allowed)


def read_rows(path: Path, problems: list[Problem]) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of a table with their line numbers (of Parquet: row numbers); None and "" in a cell mean nothing given.

    Args:
        problems: gets what is wrong with single lines.

    Raises:
        RequestError: no such file, an unknown ending, too large, not readable as a whole, or pyarrow is missing.
    """
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise RequestError("manifest", str(path), f"a file with one of the endings {', '.join(KINDS)}")
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise RequestError("manifest", str(path), "a file")
        if size > BYTES:
            raise RequestError("manifest", f"{size} bytes", f"a file of at most {BYTES // 1_000_000} MB")
        if kind == "parquet":
            rows = list(_parquet(path))
        else:
            text = _text(path)
            rows = list((_jsonl if kind == "jsonl" else _csv)(text, problems))
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        words = getattr(error, "strerror", None) or str(error)
        raise RequestError("manifest", str(path), f"a readable file ({words})") from None
    return rows


def _text(path: Path) -> str:
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        allowed = f"text in UTF-8; line {line} holds other bytes: save it again as UTF-8"
        raise RequestError("manifest", path.name, allowed) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.count("\n") > LINES + 1:
        raise RequestError("manifest", f"{text.count(chr(10))} lines", f"a file of at most {LINES} lines")
    return text


def _jsonl(text: str, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if len(line) > LINE:
            problems.append(
                problem(number, "line", f"{len(line)} characters", f"at most {LINE} characters long")
            )
            continue
        try:
            row = json.loads(line, object_pairs_hook=_once, parse_constant=_no_constant)
        except RecursionError:
            problems.append(problem(number, "line", line[:40], "a JSON object that is not nested this deep"))
            continue
        except ValueError as error:
            problems.append(problem(number, "line", line[:80], f"one JSON object ({error})"))
            continue
        if not isinstance(row, dict):
            problems.append(problem(number, "line", row, "one JSON object, from { to }"))
            continue
        yield number, row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {shorten(twice)} is given twice")
    return row


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _csv(text: str, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    if "\0" in text:
        raise RequestError("manifest", "a zero character", "text; this looks like another kind of file")
    before = csv.field_size_limit(LINE)
    try:
        yield from _csv_rows(csv.reader(io.StringIO(text, newline=""), strict=True), problems)
    finally:
        csv.field_size_limit(before)


def _csv_rows(reader: Any, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1  # where the row begins: a cell in quotes may go over several lines
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.append(
                problem(line, "line", str(error), "cells in the form of CSV, text with commas in quotes")
            )
            return  # after an open quote nothing tells where the next row begins
        if header is None:
            header = [name.strip() for name in cells]
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                problems.append(problem(line, "header", twice[0], "names that are given once each"))
                return
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            allowed = f"{len(header)} cells long, as the header; text with commas goes in quotes"
            problems.append(problem(line, "line", f"{len(cells)} cells", allowed))
            continue
        yield line, {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        allowed = "a .jsonl or .csv file, where pyarrow is not installed (pip install pyarrow)"
        raise RequestError("manifest", path.name, allowed) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            about = file.metadata
            size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            if about.num_rows > LINES or size > BYTES:
                given = f"{about.num_rows} rows of {size} bytes"
                allowed = f"a table of at most {LINES} rows and {BYTES // 1_000_000} MB unpacked"
                raise RequestError("manifest", given, allowed)
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise RequestError("manifest", names, "a table whose columns are named once each")
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: value for name, value in row.items() if value is not None}
    except pa.ArrowException as error:
        raise RequestError("manifest", path.name, f"an undamaged Parquet file ({str(error)[:200]})") from None
