"""Clips in files: MP4 (H.264), GIF, animated PNG and folders of PNG frames; their request inside, read with limits.

Paper: none. Formats: ISO/IEC 14496-12 (boxes of an MP4), GIF89a, PNG with its animation extension.
Differs: an MP4 and a GIF lose something, so the report inside keeps the digest of the frames as they were made.
"""

from __future__ import annotations

import io
import re
import struct
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pipelines.request import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".png": "animated PNG", ".mp4": "MP4", ".gif": "GIF", ".frames": "folder of PNG frames"}
"""What a clip can be saved as, by the ending of its name."""
OTHERS = (
    ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".tga", ".ico", ".pdf",
    ".svg", ".apng", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv",
)  # fmt: skip
"""Endings of other files, which are not written: a result would be called otherwise than it was asked for."""
LOSSY = (".mp4", ".gif")
"""Formats whose frames are not exactly those that were made."""
FRAME_LIMIT, PIXEL_LIMIT, BYTE_LIMIT = 1000, 400_000_000, 500_000_000
"""Most frames, pixels of all frames together, and bytes of a file that is read."""
QUALITY = 12
"""Constant rate factor of H.264: 0 is lossless, 18 is hardly seen, 51 is the worst."""
FPS = 16.0
"""Frames a second where nothing says how many."""

_TEXT_LIMIT = 1_000_000
_BOX_LIMIT = 10_000


def encode(frames: Sequence[Image], ending: str, fps: float, text: str) -> bytes:
    """Return the file of a clip: `ending` ".mp4" or ".gif" (animated PNGs: `pipelines.result`).

    Args:
        frames: pictures of one size. H.264 halves the resolution of colour; of an odd size it keeps it, and few players show that.
        text: JSON, ASCII, that is put into the file's comment.
    """
    return _mp4(frames, fps, text) if ending == ".mp4" else _gif(frames, fps, text)


def _mp4(frames: Sequence[Image], fps: float, text: str) -> bytes:
    import av
    import numpy as np

    width, height = frames[0].size
    with tempfile.TemporaryDirectory() as folder:  # a real file, so that its index can be moved to the front
        path = Path(folder) / "clip.mp4"
        with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
            container.metadata["comment"] = text
            stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height = width, height
            stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
            # The same frames give the same bytes: one thread, and without the macroblock tree, whose vector code reads
            # memory that x264 never wrote (other bytes under another MALLOC_PERTURB_).
            stream.options = {
                "crf": str(QUALITY), "preset": "medium", "threads": "1", "x264-params": "mbtree=0"
            }  # fmt: skip
            context = stream.codec_context
            context.thread_count = 1
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709, said and done
            context.color_range = 1
            for one in frames:
                shown = av.VideoFrame.from_ndarray(np.asarray(one.convert("RGB")), format="rgb24")
                shown = shown.reformat(format=stream.pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG")
                container.mux(stream.encode(shown))
            container.mux(stream.encode())
        return path.read_bytes()


def _gif(frames: Sequence[Image], fps: float, text: str) -> bytes:
    buffer = io.BytesIO()
    first, *rest = [one.convert("RGB").quantize(256) for one in frames]
    # A GIF counts in hundredths of a second; whole frames, so that none is merged with the one before.
    duration = max(20, round(100 / fps) * 10)
    first.save(
        buffer, format="GIF", save_all=True, append_images=rest, duration=duration, loop=0, comment=text.encode("ascii"),
        optimize=False, disposal=2,
    )  # fmt: skip
    return buffer.getvalue()


def lossy_copy(frames: Sequence[Image], ending: str) -> list[Image]:
    """Return the frames as they are after they were written in a lossy format and read again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip{ending}"
        path.write_bytes(encode(frames, ending, FPS, "{}"))
        return read_clip(path)[0]


def read_clip(path: str | Path, *, field: str = "clip") -> tuple[list[Image], float | None]:
    """Return the frames of a file or a folder of pictures (in the order of their names) and its frames a second, None unknown.

    Raises:
        RequestError: no such file, not decodable (the frame is named), empty, or beyond the limits of this module.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            return _folder(path, field), None
        if path.stat().st_size > BYTE_LIMIT:
            raise RequestError(field, str(path), f"a file of at most {BYTE_LIMIT // 1_000_000} MB")
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise RequestError(field, str(path), f"a readable file ({error.strerror or error})") from None
    if head[:4] == b"\x89PNG" or head[:4] == b"GIF8":
        return _animation(path, field)
    if head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3":
        return _film(path, field)
    raise RequestError(field, str(path), "an MP4, WebM, GIF or PNG file, or a folder of pictures")


def _animation(path: Path, field: str) -> tuple[list[Image], float | None]:
    from PIL import Image, ImageSequence

    found: list[Image.Image] = []
    duration = None
    try:
        with Image.open(path, formats=("PNG", "GIF")) as opened:
            _check_size(path, field, getattr(opened, "n_frames", 1), opened.width * opened.height)
            duration = opened.info.get("duration")
            for frame in ImageSequence.Iterator(opened):
                duration = duration or frame.info.get("duration")
                found.append(frame.convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(field, str(path), f"at most {PIXEL_LIMIT // 1_000_000} million pixels") from None
    except RequestError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise RequestError(
            field, str(path), f"a clip whose frames can be decoded; frame {len(found)} cannot ({error})"
        ) from None
    return found, 1000 / duration if duration and len(found) > 1 else None


def _film(path: Path, field: str) -> tuple[list[Image], float | None]:
    import av

    found: list[Image] = []
    try:
        with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise RequestError(field, str(path), "a file with pictures in it; this one has none")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(PIXEL_LIMIT)}
            said, size = stream.frames, stream.width * stream.height
            _check_size(path, field, said or 1, size)
            fps = float(stream.average_rate) if stream.average_rate else None
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise RequestError(
                        field, str(path), f"a clip whose frames can be decoded; frame {len(found)} is damaged"
                    )
                _check_size(path, field, len(found) + 1, frame.width * frame.height)
                found.append(frame.to_image())  # type: ignore[no-untyped-call, unused-ignore]
    except (av.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, RequestError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise RequestError(
            field, str(path), f"a clip whose frames can be decoded; frame {len(found)} cannot ({reason})"
        ) from None
    if not found or len(found) < said:
        raise RequestError(field, str(path), f"a whole clip; of {said} frames {len(found)} can be decoded")
    return found, fps


def _folder(path: Path, field: str) -> list[Image]:
    from PIL import Image

    names = [
        one for one in path.iterdir() if one.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    ]
    names.sort(
        key=lambda one: [
            (int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", one.name)
        ]
    )
    if not names:
        raise RequestError(field, str(path), "a folder with pictures in it; this one has none")
    found: list[Image.Image] = []
    for name in names:
        try:
            if name.stat().st_size > BYTE_LIMIT:
                raise RequestError(field, name.name, f"a file of at most {BYTE_LIMIT // 1_000_000} MB")
            with Image.open(name, formats=("PNG", "JPEG", "WEBP", "BMP")) as opened:
                _check_size(path, field, len(names), opened.width * opened.height)
                if found and opened.size != found[0].size:
                    sizes = f"{name.name} has {opened.width}x{opened.height} px"
                    raise RequestError(
                        field, sizes, f"frames of one size, {found[0].width}x{found[0].height} px"
                    )
                found.append(opened.convert("RGB"))
        except RequestError:
            raise
        except (
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
        ) as error:
            raise RequestError(field, name.name, f"a picture that can be decoded ({error})") from None
    return found


def _check_size(path: Path, field: str, frames: int, pixels: int) -> None:
    if frames > FRAME_LIMIT:
        raise RequestError(field, f"{path.name}: {frames} frames", f"at most {FRAME_LIMIT} frames")
    if frames * pixels > PIXEL_LIMIT:
        shown = f"{path.name}: {frames} frames of {pixels} pixels"
        raise RequestError(field, shown, f"at most {PIXEL_LIMIT // 1_000_000} million pixels together")


def comment_of(path: Path, head: bytes, file: BinaryIO) -> bytes:
    """Return the comment of an MP4 or a GIF whose first bytes are `head`; no picture is decoded.

    Raises:
        RequestError: none inside, a damaged or cut file, or a comment of more than 1 MB.
    """
    if head[:4] == b"GIF8":
        return _gif_comment(path, file)
    file.seek(0)
    found = _box(path, file, path.stat().st_size, (b"moov", b"udta", b"meta", b"ilst", b"\xa9cmt", b"data"))
    if found is None:
        raise RequestError("file", str(path), "a clip made by leapfrog; this MP4 holds no request")
    return found[8:]


def _box(path: Path, file: BinaryIO, end: int, names: Sequence[bytes]) -> bytes | None:
    """Return what lies in the box at the end of a path of boxes, or None; `file` stands where the first begins."""
    for _ in range(_BOX_LIMIT):
        start = file.tell()
        if start + 8 > end:
            return None
        size, kind = struct.unpack(">I4s", file.read(8))
        inner = start + 8
        if size == 1:
            size, inner = struct.unpack(">Q", file.read(8))[0], start + 16
        size = end - start if size == 0 else size
        if size < inner - start or start + size > end:
            raise RequestError("file", str(path), "a whole MP4; this one is cut off or damaged")
        if kind == names[0]:
            if len(names) == 1:
                if size > _TEXT_LIMIT + 100:
                    raise RequestError("file", str(path), "an MP4 with at most 1 MB of text")
                file.seek(inner)
                return file.read(start + size - inner)
            file.seek(inner + (4 if kind == b"meta" else 0))  # this one has a version before its boxes
            return _box(path, file, start + size, names[1:])
        file.seek(start + size)
    return None


def _gif_comment(path: Path, file: BinaryIO) -> bytes:
    file.seek(10)
    flags = file.read(3)[:1]
    if flags and flags[0] & 0x80:
        file.seek(3 << ((flags[0] & 7) + 1), 1)
    while block := file.read(1):
        if block == b"\x21":
            label = file.read(1)
            data = bytearray()
            for piece in _pieces(path, file):
                data += piece if label == b"\xfe" else b""
                if len(data) > _TEXT_LIMIT:
                    raise RequestError("file", str(path), "a GIF with at most 1 MB of text")
            if label == b"\xfe":
                return bytes(data)
        elif block == b"\x2c":
            flags = file.read(9)[8:]
            if flags and flags[0] & 0x80:
                file.seek(3 << ((flags[0] & 7) + 1), 1)
            file.seek(1, 1)
            for _ in _pieces(path, file):
                pass
        else:
            break
    raise RequestError("file", str(path), "a clip made by leapfrog; this GIF holds no request")


def _pieces(path: Path, file: BinaryIO) -> Iterator[bytes]:
    while size := file.read(1):
        if size == b"\0":
            return
        piece = file.read(size[0])
        if len(piece) < size[0]:
            break
        yield piece
    raise RequestError("file", str(path), "a whole GIF; this one is cut off")
