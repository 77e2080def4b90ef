"""Pictures that come in, checked by their content before anything is decoded, and files that go out, byte for byte.

Differs: Pillow only warns of a picture of 90 million pixels and decodes it; here the header alone decides, at 64 million.
"""

from __future__ import annotations

import contextlib
import io
import secrets
import time
import warnings
from pathlib import Path
from typing import Any

from pipelines._serve_decoding import look
from pipelines._serve_desk import UPLOAD, Desk, Refusal
from pipelines.guard import UPLOAD_MB, inside, within
from pipelines.inputs import PIXEL_LIMIT
from pipelines.request import RequestError
from pipelines.result import write_file
from pipelines.video_files import FRAME_LIMIT
from pipelines.video_files import PIXEL_LIMIT as CLIP_PIXELS

SIDE_LIMIT = 16_384
"""Most px of one side of an upload."""
SCANS, SCANNED = 1000, 16 * PIXEL_LIMIT
"""Most passes over a progressive JPEG, and most pixels of all of them: a file of some MB can ask for thousands."""
UPLOADS, UPLOAD_BYTES = 200, 1_000_000_000
"""Most uploads of one owner, and most bytes of them together."""
KEPT_SECONDS = 7 * 86_400.0
"""How long an upload is kept."""

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG", ".png"),
    (b"\xff\xd8\xff", "JPEG", ".jpg"),
    (b"RIFF", "WEBP", ".webp"),
)
KINDS = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".json": "application/json",
}
"""What a browser may show; everything else is only saved."""


def picture_of(data: bytes) -> tuple[str, int, int]:
    """Return suffix, width and height in px of an upload after checking it; nothing is decoded.

    Of an MP4 only the kind and the bytes are checked here, and 0x0 returned: `keep` has its frames decoded elsewhere.

    Raises:
        RequestError: too large in bytes, px or frames, damaged, or no PNG, JPEG, WebP or MP4 by its content.
    """
    from PIL import Image

    if len(data) > UPLOAD_MB * 1_000_000:
        raise RequestError("file", f"{len(data)} bytes", f"a file of at most {UPLOAD_MB} MB")
    if data[4:8] == b"ftyp":
        return ".mp4", 0, 0
    known = next((one for one in _MAGIC if data.startswith(one[0])), None)
    if known is None or (known[1] == "WEBP" and data[8:12] != b"WEBP"):
        raise RequestError("file", data[:12], "a PNG, JPEG or WebP picture or an MP4, by its content")
    _check_sides(
        *_webp_sides(data) if known[1] == "WEBP" else (1, 1)
    )  # to open one takes memory for its canvas
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            with Image.open(io.BytesIO(data), formats=(known[1],)) as opened:
                width, height = opened.size
                _check_sides(width, height)
                frames = int(getattr(opened, "n_frames", 1))
                scans = data.count(b"\xff\xda") if known[1] == "JPEG" else 1
                if scans > SCANS or scans * width * height > SCANNED:
                    raise RequestError(
                        "file", f"{scans} scans", f"a JPEG of at most {SCANNED // (width * height)} scans"
                    )
                if frames > 1 and (frames > FRAME_LIMIT or frames * width * height > CLIP_PIXELS):
                    words = f"a clip of at most {FRAME_LIMIT} frames and {CLIP_PIXELS // 1_000_000} million pixels"
                    raise RequestError("file", f"{frames} frames", words)
                opened.verify()
    except Image.DecompressionBombError:
        words = f"a picture of at most {PIXEL_LIMIT // 1_000_000} million pixels"
        raise RequestError("file", "more", words) from None
    except RequestError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged picture makes Pillow raise nearly anything
        raise RequestError("file", type(error).__name__, "an undamaged picture") from None
    return known[2], width, height


def _check_sides(width: int, height: int) -> None:
    if width * height > PIXEL_LIMIT or max(width, height) > SIDE_LIMIT:
        allowed = f"a picture of at most {PIXEL_LIMIT // 1_000_000} million pixels and {SIDE_LIMIT} px a side"
        raise RequestError("file", f"{width}x{height} px", allowed)


def _webp_sides(data: bytes) -> tuple[int, int]:
    """Return width and height that the first part of a WebP names: its canvas, or its only picture."""
    kind, place = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        return 1 + int.from_bytes(place[4:7], "little"), 1 + int.from_bytes(place[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(place[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(place[6:8], "little") & 0x3FFF, int.from_bytes(place[8:10], "little") & 0x3FFF


def keep(desk: Desk, owner: str, data: bytes) -> dict[str, Any]:
    """Check an upload and save it for its owner; return what HTTP answers. Raises: RequestError, Refusal, SaveError."""
    suffix, width, height = picture_of(data)
    frames = 1
    if suffix == ".mp4":
        width, height, frames = look(data)
    folder = desk.uploads / owner
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with desk.lock:
        known = [(file, file.stat()) for file in folder.iterdir() if UPLOAD.match(file.stem)]
        old = [file for file, state in known if time.time() - state.st_mtime > KEPT_SECONDS]
        for file in old:
            file.unlink(missing_ok=True)
        used = sum(state.st_size for file, state in known if file not in old)
        if len(known) - len(old) >= UPLOADS or used + len(data) > UPLOAD_BYTES:
            words = f"you have {UPLOADS} uploads or {UPLOAD_BYTES // 1_000_000} MB of them; delete some"
            raise Refusal(413, "uploads_full", words, "file")
        name = f"up_{secrets.token_hex(16)}"
        write_file(folder / f"{name}{suffix}", data)
    return {
        "id": name, "object": "file", "bytes": len(data), "created_at": int(time.time()), "filename": f"{name}{suffix}",
        "purpose": "vision", "leapfrog": {"width": width, "height": height} | ({"frames": frames} if suffix == ".mp4" else {}),
    }  # fmt: skip


def served(desk: Desk, owner: str, name: str) -> tuple[Path, str | None]:
    """Return a file of one's own by its id, and its media type, None for one that a browser shall not show.

    Raises:
        Refusal: no such file, another's, or a name that is a path.
    """
    try:
        path = _found(desk, owner, name)
    except RequestError as error:
        raise Refusal(404, "not_found", f"no such file: {error.allowed}", "id") from None
    return path, KINDS.get(path.suffix.lower())


def _found(desk: Desk, owner: str, name: str) -> Path:
    if UPLOAD.match(name):
        return desk.upload(name, owner)
    job_name, _, rest = name.partition(".")
    index, _, suffix = rest.partition(".")
    job = (
        desk.ledger.get(job_name, owner)
        if len(name) <= 100 and index.isascii() and index.isdecimal()
        else None
    )
    if job is None or int(index) >= len(job.files):
        inside(desk.folder, name)  # says what is wrong with the name itself
        raise RequestError("file", name, "the id of a file of your own")
    path = Path(job.files[int(index)])
    if suffix and f".{suffix}" != path.suffix:
        raise RequestError("file", name, "the id of a file of your own")
    return within(desk.folder / owner, path)


def forget(desk: Desk, owner: str, name: str) -> None:
    """Delete an upload. Raises: Refusal."""
    try:
        path = desk.upload(name, owner)
    except RequestError as error:
        raise Refusal(404, "not_found", f"no such upload: {error.allowed}", "id") from None
    with contextlib.suppress(OSError):
        path.unlink()
