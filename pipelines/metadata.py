"""The request and report inside a saved picture or clip: text of a PNG, MP4 or GIF, or a JSON file. Read as data, with limits."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.request import INPUTS, WITHHELD, Request, RequestError, bare, model_name

KEY = "leapfrog"
"""Name of the text chunk that holds the JSON."""
FRAMES_JSON = "request.json"
"""The file with the request in a folder of frames."""
LIMIT = 1_000_000
"""Most bytes of metadata that are read or written."""
VERSION = 1

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return {"version", "request", "report"} from a saved PNG, MP4 or GIF, a folder of frames, or a JSON sidecar.

    Raises:
        RequestError: no such file, nothing of ours inside, too much of it, or not the expected shape.
    """
    path = Path(path)
    path = path / FRAMES_JSON if path.is_dir() else path
    try:
        with path.open("rb") as file:
            head = file.read(len(_SIGNATURE))
            if head == _SIGNATURE:
                text = _from_png(path, file)
            elif head[:4] == b"GIF8" or head[4:8] == b"ftyp":
                from pipelines.video_files import comment_of

                text = comment_of(path, head, file)
            else:
                text = _from_json(path, head, file)
    except OSError as error:
        raise RequestError("file", str(path), f"a readable file ({error.strerror or error})") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(
            "file", str(path), "a picture or JSON file made by leapfrog; its metadata is not valid JSON"
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("request"), dict):
        raise RequestError("file", str(path), "a picture or JSON file made by leapfrog; it holds no request")
    if found.get("version") != VERSION:
        raise RequestError(
            "file", found.get("version"), f"metadata of version {VERSION}; update leapfrog to read newer ones"
        )
    report = found.get("report")
    return {
        "version": VERSION,
        "request": found["request"],
        "report": report if isinstance(report, dict) else {},
    }


def write_metadata(request: dict[str, Any], report: dict[str, Any]) -> str:
    """Return the JSON text of a picture, ASCII only and within the limit; a timeline too long to fit is left out, and says so."""
    text = _dump(request, report)
    if len(text) > LIMIT:
        run = {key: value for key, value in (report.get("run") or {}).items() if key != "cells"}
        text = _dump(
            request, report | {"run": run | {"cells_left_out": "the timeline would not fit in 1 MB"}}
        )
    if len(text) > LIMIT:
        raise RequestError("report", len(text), f"at most {LIMIT} characters of JSON")
    return text


def file_text(request: Request, report: dict[str, Any]) -> str | None:
    """Return the JSON text that a saved file holds at the request's level of metadata; None where it is to tell nothing."""
    return None if request.metadata == "none" else write_metadata(*told_of(request, report))


def told_of(request: Request, report: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the request and the report that others may read: no path of this computer, no more words than its metadata allows."""
    if request.metadata == "none":
        return {}, {}
    told, report = request.told(), _placeless(report, _places(request))
    if request.metadata == "prompt-free":
        prompts = [request.prompt, request.negative_prompt, request.prompts or ""]
        words = {part.strip() for one in prompts for part in (one, *one.split("|")) if part.strip()}
        report = _without(report, sorted(words, key=len, reverse=True))
    return told, report


def _without(value: Any, words: list[str]) -> Any:
    """Return a report without the words of its prompts: a text that holds some of them says so, and no more."""
    if isinstance(value, str):
        held = any(value == one or (len(one) > 2 and one in value) for one in words)
        return WITHHELD if held else value
    if isinstance(value, dict):
        return {key: _without(one, words) for key, one in value.items()}
    return [_without(one, words) for one in value] if isinstance(value, list | tuple) else value


def _places(request: Request) -> dict[str, str]:
    """Return the paths that a request names, in every form they may be told in, and the names that others hear instead."""
    named: list[Any] = [getattr(request, name) for name in (*INPUTS, "profile")]
    for one in (*request.controls, *request.loras):
        named += [getattr(one, name, None) for name in ("file", "adapter", "region")]
    found = {one: bare(one) for one in named if isinstance(one, str) and one}
    found[request.model] = model_name(request.model)
    for place, name in list(found.items()):
        try:
            full = Path(place).expanduser()
            found |= {str(full.absolute()): name, str(full.resolve()): name}
        except (OSError, ValueError, RuntimeError):  # no path of this system
            continue
    found = {
        place: name for place, name in found.items() if place != name and ("/" in place or "\\" in place)
    }
    return found | ({str(Path.home()): "~"} if len(str(Path.home())) > 1 else {})


def _placeless(value: Any, places: dict[str, str]) -> Any:
    """Return a report in which files and folders are called by their names alone."""
    if isinstance(value, str):
        for place in sorted(places, key=len, reverse=True):
            value = value.replace(place, places[place])
        return value
    if isinstance(value, dict):
        return {key: _placeless(one, places) for key, one in value.items()}
    return [_placeless(one, places) for one in value] if isinstance(value, list | tuple) else value


def _dump(request: dict[str, Any], report: dict[str, Any]) -> str:
    return json.dumps(
        {"version": VERSION, "request": request, "report": report}, allow_nan=False, ensure_ascii=True
    )


def _from_json(path: Path, head: bytes, file: BinaryIO) -> bytes:
    data = head + file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise RequestError("file", str(path), "a PNG made by leapfrog, or a JSON file of at most 1 MB")
    return data


def _from_png(path: Path, file: BinaryIO) -> bytes:
    for kind, data in _chunks(path, file):
        found = _text(kind, data)
        if found is not None:
            return found
    raise RequestError("file", str(path), "a picture made by leapfrog; this PNG holds no request")


def _chunks(path: Path, file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    size = path.stat().st_size
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return
        if length > size - file.tell():
            break
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            file.seek(length + 4, 1)
            continue
        if length > LIMIT + 1000:
            raise RequestError("file", str(path), "a PNG with at most 1 MB of text")
        data, check = file.read(length), file.read(4)
        if len(check) < 4 or zlib.crc32(kind + data) != struct.unpack(">I", check)[0]:
            raise RequestError("file", str(path), "an undamaged PNG; the checksum of its text is wrong")
        yield kind, data
    raise RequestError("file", str(path), "a complete PNG; this one is cut off")


def _text(kind: bytes, data: bytes) -> bytes | None:
    key, _, rest = data.partition(b"\0")
    if key != KEY.encode():
        return None
    if kind == b"tEXt":
        return rest
    if kind == b"zTXt":
        return _inflate(rest[1:])
    packed, rest = rest[:1] == b"\1", rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    return _inflate(rest) if packed else rest


def _inflate(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, LIMIT)
    except zlib.error:
        raise RequestError("file", "damaged text", "an undamaged PNG") from None
    if unpacker.unconsumed_tail:
        raise RequestError("file", "compressed text", "a PNG with at most 1 MB of text")
    return text
