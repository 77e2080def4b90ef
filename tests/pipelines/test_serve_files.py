"""Uploads: small files that ask for much work or memory are refused before it is done, or by a process that may do no more."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines import _serve_decoding, _serve_files
from pipelines._attack_parts import ALICE, Caller
from pipelines._serve_decoding import look
from pipelines._serve_files import picture_of
from pipelines.request import RequestError
from pipelines.video_files import FRAME_LIMIT, encode

_place = importlib.util.spec_from_file_location("served", Path(__file__).with_name("served.py"))
assert _place is not None
assert _place.loader is not None
served = importlib.util.module_from_spec(_place)
_place.loader.exec_module(served)
Place, idle = served.Place, served.idle


def film(frames: int, side: int = 16) -> bytes:
    pytest.importorskip("av")
    made = encode([Image.new("RGB", (side, side), (9, 200, 9))] * frames, ".mp4", 8.0, "{}")
    assert isinstance(made, bytes)
    return made


def jpeg(scans: int) -> bytes:
    """A progressive JPEG whose last pass over the picture is there again and again."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 60).save(buffer, "JPEG", progressive=True)
    head, mark, last = buffer.getvalue().removesuffix(b"\xff\xd9").rpartition(b"\xff\xda")
    return head + (mark + last) * (scans - head.count(mark)) + b"\xff\xd9"


def webp(width: int, height: int, kind: bytes) -> bytes:
    sides = {
        b"VP8X": b"\x02\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
        b"VP8L": b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little"),
        b"VP8 ": b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height),
    }
    body = b"WEBP" + kind + struct.pack("<I", len(sides[kind])) + sides[kind]
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("kind", [b"VP8X", b"VP8L", b"VP8 "])
def test_the_sides_of_a_webp_are_read_before_it_is_opened(
    kind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(RequestError, match="16001x16002 px"):
        picture_of(webp(16_001, 16_002, kind))


@pytest.mark.parametrize("lossless", [True, False])
def test_a_webp_that_is_one_is_kept_as_it_is(lossless: bool) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (300, 20), "red").save(buffer, "WEBP", lossless=lossless)
    assert picture_of(buffer.getvalue()) == (".webp", 300, 20)
    assert _serve_files._webp_sides(buffer.getvalue()) == (300, 20)


def test_a_jpeg_of_thousands_of_scans_is_refused_undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert picture_of(jpeg(12)) == (".jpg", 64, 64)
    with pytest.raises(RequestError, match="2000 scans"):
        picture_of(jpeg(2000))
    monkeypatch.setattr(_serve_files, "SCANNED", 64 * 64 * 20)  # fewer of a larger picture
    picture_of(jpeg(20))
    with pytest.raises(RequestError, match="at most 20 scans"):
        picture_of(jpeg(21))


def test_a_clip_is_decoded_by_a_process_that_tells_its_size() -> None:
    assert look(film(3, 32)) == (32, 32, 3)


@pytest.mark.skipif(sys.platform == "win32", reason="needs Unix limits")
@pytest.mark.parametrize("limits", [{"memory": 40_000_000}, {"seconds": 0}], ids=["memory", "time"])
def test_a_clip_that_needs_more_than_it_may_is_refused_in_words(limits: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"one that is decoded with .* MB of memory in .* s"):
        look(film(2), **limits)


def test_a_clip_that_takes_too_long_by_the_clock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_serve_decoding, "PATIENCE", 0.0)
    with pytest.raises(RequestError, match="one that is decoded"):
        look(film(2))


def test_a_bad_clip_over_http_is_refused_and_leaves_nothing(
    idle: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    call, kind = Caller(idle.app, ALICE), [("content-type", "video/mp4")]
    good, long = film(2), film(FRAME_LIMIT + 1)
    assert len(long) < 100_000, "a small file"
    for data, words in (
        (long, f"at most {FRAME_LIMIT} frames"),
        (good[: len(good) // 2], "clip"),
        (b"\0\0\0\x18ftypmp42" + b"x" * 5_000, "clip"),
    ):
        answer = call("POST", "/v1/files", data, kind)
        error = json.loads(answer.body)["error"]
        assert answer.status == 400
        assert words in error["message"]
        assert str(tmp_path) not in error["message"]
        assert not list(temporary.iterdir())
        assert not [one for one in (tmp_path / "uploads").glob("**/*") if one.is_file()]
    told = json.loads(call("POST", "/v1/files", good, kind).body)
    assert told["leapfrog"] == {"width": 16, "height": 16, "frames": 2}


@pytest.mark.parametrize("path", ["/v1/files", "/v1/images/edits", "/v1/jobs"])
@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/json", "image/png"])
def test_who_leaves_in_the_middle_of_an_upload_leaves_nothing(
    idle: Place,
    path: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    pieces = [head, *[b"\x89PNG" + b"x" * 500_000] * 4]  # more than a parser holds in memory
    messages: list[Any] = [{"type": "http.request", "body": one, "more_body": True} for one in pieces]
    messages.append({"type": "http.disconnect"})
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {"host": "localhost", "content-type": kind, "authorization": f"Bearer {ALICE}"}
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "http_version": "1.1",
        "scheme": "http", "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
    }  # fmt: skip
    asyncio.run(idle.app(scope, receive, send))  # raises nothing: a server would print it with its whole way
    assert [one["status"] for one in sent if "status" in one] in ([499], [413], [415])
    assert not caplog.records
    assert not list(temporary.iterdir())
    assert not [one for one in (tmp_path / "uploads").glob("**/*") if one.is_file()]
    assert idle.ledger.jobs() == []
