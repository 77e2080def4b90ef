"""What every condition stands on: the family, pictures as arrays whatever their mode, and the size they are given.

A picture is an array [H, W, 3] in float32 from 0 to 1 here; transparent parts are laid on white.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from control.base import Refused
from dit.spec import Spec

Array = np.ndarray[Any, np.dtype[Any]]

PIXEL_LIMIT = 64_000_000
"""Most pixels of a picture."""
BYTE_LIMIT = 64_000_000
"""Most bytes of a picture's file."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")

_FLAT = 1.5 / 255  # less than two grey levels from the darkest to the brightest place


class Condition(Spec):
    """The family of what can be made of a picture to steer by: edges, colours, places. Pure functions of settings and picture."""

    __slots__ = ()
    about: ClassVar[str] = ""  # one line for a page
    instruction: ClassVar[str] = ""  # what it is called to an adapter that reads an instruction

    def made(self, picture: Array) -> Array:
        """[H, W, 3] from 0 to 1 -> [H, W] or [H, W, 3] from 0 to 1."""
        raise NotImplementedError(f"{type(self).__name__}.made")


def read_picture(source: str | Path | bytes | Image.Image, what: str = "the picture") -> Array:
    """Return a picture [H, W, 3] in float32 from 0 to 1; of an animation its first frame, turned upright.

    Any of Pillow's modes: palettes, transparency (on white), 16 bits in grey, CMYK.

    Raises: Refused for a file that is missing, unreadable, too large, or of a number format that has no white.
    """
    if isinstance(source, Image.Image):
        _check_size(source, what)
        return _array(source, what)
    try:
        data = source if isinstance(source, bytes) else _bytes(Path(source).expanduser(), what)
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            _check_size(opened, what)
            return _array(ImageOps.exif_transpose(opened), what)
    except Refused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refused(f"{what} must have at most {PIXEL_LIMIT // 1_000_000} million pixels") from None
    except (UnidentifiedImageError, FileNotFoundError) as error:
        missing = isinstance(error, FileNotFoundError)
        words = (
            "there is no such file"
            if missing
            else "no picture is recognised in it"
            if data
            else "it is empty"
        )
        raise Refused(f"{what} must be a readable PNG, JPEG, WebP or BMP picture ({words})") from None
    except (OSError, ValueError, SyntaxError) as error:
        words = str(getattr(error, "strerror", None) or "").lower()  # of the system: a folder, no permission
        words = words or (str(error).splitlines()[0][:200] if str(error) else type(error).__name__)
        raise Refused(f"{what} must be a readable PNG, JPEG, WebP or BMP picture ({words})") from None


def condition_of(condition: Condition, picture: Array) -> Array:
    """Make a condition of a picture: [H, W, 3] -> [H, W, 3] in float32 from 0 to 1.

    Raises: Refused if the picture is none, or if nothing is found in it.
    """
    picture = checked(picture)
    if flat(picture):
        raise Refused(
            f"{condition.name}: the picture is {colour_of(picture)} all over, so nothing can be found in it"
        )
    made = np.asarray(condition.made(picture), dtype=np.float32)
    made = np.repeat(made[..., None], 3, axis=2) if made.ndim == 2 else made
    assert made.shape == picture.shape, f"{condition.name} made {made.shape} of {picture.shape}"
    made = made.clip(0, 1)
    if flat(made):
        raise Refused(
            f"{condition.name} found nothing in the picture: what it made is {colour_of(made)} all over"
        )
    return made


def checked(picture: Any, what: str = "the picture") -> Array:
    """Return an array [H, W, 3] of numbers from 0 to 1 in float32. Raises: Refused for anything else."""
    found = np.asarray(picture)
    if found.ndim == 2:
        found = np.repeat(found[..., None], 3, axis=2)
    if found.ndim != 3 or found.shape[2] != 3 or not found.size:
        raise Refused(f"{what} must be an array [H, W, 3] of numbers from 0 to 1, got shape {found.shape}")
    if found.dtype == np.uint8:
        return (found / np.float32(255)).astype(np.float32)
    if not np.issubdtype(found.dtype, np.floating) or not np.isfinite(found).all():
        raise Refused(f"{what} must hold finite numbers from 0 to 1, got {found.dtype}")
    if found.min() < 0 or found.max() > 1:
        raise Refused(f"{what} must hold numbers from 0 to 1, got {found.min():g} to {found.max():g}")
    return found.astype(np.float32)


def flat(picture: Array) -> bool:
    """Whether a picture is one colour all over."""
    rows = picture.reshape(-1, picture.shape[-1] if picture.ndim == 3 else 1)
    return bool((rows.max(axis=0) - rows.min(axis=0)).max() < _FLAT)


def colour_of(picture: Array) -> str:
    """Return what a flat picture's colour is called."""
    level = float(picture.mean())
    return "black" if level < _FLAT else "white" if level > 1 - _FLAT else "one colour"


def grey_of(picture: Array) -> Array:
    """[H, W, 3] -> brightness [H, W] as the eye weighs the colours (Rec. 601)."""
    found: Array = picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return found


def resized(picture: Array, width: int, height: int) -> Array:
    """[H, W] or [H, W, 3] -> the same at another size, smoothed where it shrinks; from 0 to 1. Equal sizes change nothing."""
    if picture.shape[:2] == (height, width):
        return picture
    planes = picture[..., None] if picture.ndim == 2 else picture
    done = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
        )
        for plane in np.moveaxis(planes, -1, 0)
    ]
    found = np.stack(done, axis=-1).clip(0, 1).astype(np.float32)
    return found[..., 0] if picture.ndim == 2 else found


def fitted(picture: Array, width: int, height: int) -> Array:
    """Cut the middle out of a picture of another aspect, then bring it to `width` x `height` px: nothing is stretched."""
    rows, columns = picture.shape[:2]
    wide = min(columns, max(1, round(rows * width / height)))
    high = min(rows, max(1, round(columns * height / width)))
    left, top = (columns - wide) // 2, (rows - high) // 2
    return resized(picture[top : top + high, left : left + wide], width, height)


def image_of(picture: Array) -> Image.Image:
    """[H, W] or [H, W, 3] from 0 to 1 -> an RGB picture of 8 bits."""
    levels = np.rint(picture.clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")


def _bytes(file: Path, what: str) -> bytes:
    if file.stat().st_size > BYTE_LIMIT:
        raise Refused(
            f"{what} must be a file of at most {BYTE_LIMIT // 1_000_000} MB, got {file.stat().st_size} bytes"
        )
    return file.read_bytes()


def _check_size(image: Image.Image, what: str) -> None:
    width, height = image.size
    if not width or not height:
        raise Refused(f"{what} is empty: {width} x {height} px")
    if width * height > PIXEL_LIMIT:
        raise Refused(
            f"{what} must have at most {PIXEL_LIMIT // 1_000_000} million pixels, got {width} x {height}"
        )


def _array(image: Image.Image, what: str) -> Array:
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        return _deep(image, what)
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        image = Image.alpha_composite(white, over)
    return (np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255)).astype(np.float32)


def _deep(image: Image.Image, what: str) -> Array:
    """Read grey of 16 bits (or 32 that hold 16), or of floating point from 0 to 1."""
    levels = np.asarray(image).astype(np.float64)
    most = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(levels).all() or levels.min() < 0 or levels.max() > most:
        raise Refused(
            f"{what} must hold numbers from 0 to {most:g} in mode {image.mode}; convert it to 8 or 16 bits"
        )
    grey = (levels / most).astype(np.float32)
    return np.repeat(grey[..., None], 3, axis=2)
