"""How like two saved results are: PSNR, SSIM, where they differ, and for clips also the worst frame, flicker and motion.

Every number stands beside the noise floor where that was measured: what the exact run does when it is repeated.

Paper: Image Quality Assessment: From Error Visibility to Structural Similarity, Wang et al. 2004 (SSIM).
Differs: SSIM is taken in bands of rows that overlap by its window, so large pictures need little memory; the mean is the same.
Flicker is the mean step between neighbouring frames of the difference of two clips, motion the mean step between frames of a clip.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.compare import Difference, psnr, ssim
from pipelines.request import Request, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

PIXELS = 150_000_000
"""Most pixels of all frames of one side: 129 frames of 1280 x 720 px are 119 million. Each takes 3 bytes, while it is read 6."""
BAND = 256
"""Rows of a picture that are compared at once."""
KNOWN = 4096
"""Pairs of files whose PSNR is kept."""
WINDOW = 11
NOT_THE_PICTURE = ("images", "device", "dtype")

Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How far `b` is from `a`; what is told of clips alone is None for pictures.

    `frames` holds the PSNR of every frame in dB, `worst` the number of the worst one, counted from 0; `flicker` is in grey levels a
    frame; `motions` holds the motion of `a` and `b` in grey levels a frame. `heat` is the worst frame's difference, a PNG.
    """

    difference: Difference
    size: tuple[int, int]
    frames: tuple[float, ...]
    worst: int = 0
    flicker: float | None = None
    motions: tuple[float, float] | None = None
    heat: bytes = dataclasses.field(default=b"", repr=False)
    scale: int = 0

    @property
    def is_clip(self) -> bool:
        """Whether there is more than one frame."""
        return len(self.frames) > 1

    def verdict(self, floor: float | None = None) -> str:
        """Return how far they are apart, in words; with a floor, the PSNR in dB of an exact run against itself."""
        found = self.difference
        if found.largest == 0:
            return "identical"
        if floor is not None and found.psnr >= floor:
            return "within noise"
        return {"within rounding": "small", "a different picture": "different picture"}.get(
            found.verdict, found.verdict
        )

    def __str__(self) -> str:
        if not self.is_clip or self.motions is None or self.difference.largest == 0:
            return str(self.difference)
        a, b = self.motions
        return (
            f"{self.difference}\nworst frame {self.worst}: {self.frames[self.worst]:.1f} dB; flicker {self.flicker:.2f}, motion "
            f"{a:.2f} and {b:.2f} grey levels a frame"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; an infinite PSNR is null."""
        clip: dict[str, Any] = {}
        if self.is_clip and self.motions is not None:
            clip = {
                "worst_frame": self.worst, "worst_psnr_db": _number(self.frames[self.worst]), "flicker": self.flicker,
                "motion": {"a": self.motions[0], "b": self.motions[1]},
            }  # fmt: skip
        return self.difference.to_dict() | {"width": self.size[0], "height": self.size[1]} | clip


def likeness(a: Path, b: Path, names: tuple[str, str] = ("A", "B")) -> Likeness:
    """Compare two files: pictures, clips or folders of frames.

    Raises:
        RequestError: one cannot be read, is too large, or their sizes or numbers of frames differ.
    """
    left, right = (_pixels(path, name) for path, name in zip((a, b), names, strict=True))
    if left.shape != right.shape:
        raise RequestError(
            "results", f"{names[0]} {_shape(left)}, {names[1]} {_shape(right)}", "of one size and length"
        )
    if min(left.shape[1:3]) < WINDOW:
        raise RequestError("results", _shape(left), f"with sides of {WINDOW} px or more")
    errors = [_error(x, y) for x, y in zip(left, right, strict=True)]
    frames = tuple(psnr(one) for one in errors)
    worst = int(np.argmax(errors))
    gap = np.abs(left[worst].astype(np.int16) - right[worst]).max(-1)
    heat, scale = _heat(gap)
    found = Difference(psnr(float(np.mean(errors))), _similar(left, right), _largest(left, right))
    size = (left.shape[2], left.shape[1])
    if len(left) == 1:
        return Likeness(difference=found, size=size, frames=frames, heat=heat, scale=scale)
    return Likeness(
        difference=found, size=size, frames=frames, worst=worst, flicker=_flicker(left, right),
        motions=(_motion(left), _motion(right)), heat=heat, scale=scale,
    )  # fmt: skip


def psnr_of(a: Path, b: Path) -> float | None:
    """Return the PSNR of two files in dB, kept for files that have not changed; None where they cannot be compared."""
    try:
        marks = [(str(one), one.stat().st_mtime_ns, one.stat().st_size) for one in (a, b)]
        return _psnr(marks[0], marks[1])
    except (OSError, RequestError):
        return None


def changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return what differs between two requests (the form of `Request.to_dict`): field, value in a, value in b."""
    found = []
    for name in dict.fromkeys([*a, *b]):
        left, right = a.get(name), b.get(name)
        if left != right and name not in NOT_THE_PICTURE:
            found.append((name.replace("_", " "), _words(name, left), _words(name, right)))
    return found


@functools.lru_cache(maxsize=KNOWN)
def _psnr(a: tuple[str, int, int], b: tuple[str, int, int]) -> float | None:
    left, right = _pixels(Path(a[0]), "A"), _pixels(Path(b[0]), "B")
    if left.shape != right.shape:
        return None
    return psnr(float(np.mean([_error(x, y) for x, y in zip(left, right, strict=True)])))


def _pixels(path: Path, name: str) -> Array:
    """Return the frames of a file, [F, H, W, 3] in uint8. Raises: RequestError, before anything large is decoded."""
    from PIL import Image, UnidentifiedImageError

    from pipelines.inputs import read_image
    from pipelines.video_files import read_clip

    frames: Sequence[Image.Image] = []
    if not path.is_dir() and path.suffix.lower() not in (".mp4", ".gif"):
        try:
            with Image.open(path) as opened:
                _check_size(name, opened.width * opened.height * getattr(opened, "n_frames", 1))
                single = getattr(opened, "n_frames", 1) == 1
        except RequestError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise RequestError(name, path.name, f"at most {PIXELS // 1_000_000} million pixels") from None
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError):
            raise RequestError(
                name, path.name, "a readable PNG, JPEG, WebP or BMP picture, or a clip"
            ) from None
        if single:
            picture, _ = read_image(str(path), name)
            assert picture is not None
            frames = [picture]
    if not frames:
        frames, _ = read_clip(path, field=name)
        _check_size(name, sum(one.width * one.height for one in frames))
    return np.stack([np.asarray(one.convert("RGB")) for one in frames])


def _check_size(name: str, pixels: int) -> None:
    if pixels > PIXELS:
        raise RequestError(
            name, f"{pixels / 1e6:.0f} million pixels", f"at most {PIXELS // 1_000_000} million"
        )


def _error(x: Array, y: Array) -> float:
    """Return the mean squared error of two frames, exactly: in whole numbers."""
    total = 0
    for start in range(0, len(x), BAND):
        gap = x[start : start + BAND].astype(np.int32) - y[start : start + BAND]
        total += int(np.sum(gap * gap, dtype=np.int64))
    return total / x.size


def _similar(left: Array, right: Array) -> float:
    """Return the mean SSIM of all frames."""
    found = []
    for x, y in zip(left, right, strict=True):
        total, windows = 0.0, len(x) - WINDOW + 1
        for start in range(0, windows, BAND):
            rows = slice(start, min(start + BAND, windows) + WINDOW - 1)
            bands = (np.moveaxis(one[rows].astype(np.float64), -1, 0) for one in (x, y))
            total += ssim(*bands) * (rows.stop - rows.start - WINDOW + 1)
        found.append(total / windows)
    return float(np.mean(found))


def _largest(left: Array, right: Array) -> int:
    return max(int(np.abs(x.astype(np.int16) - y).max()) for x, y in zip(left, right, strict=True))


def _motion(clip: Array) -> float:
    """Return the mean step between neighbouring frames in grey levels."""
    return float(np.mean([np.abs(_step(clip, place)).mean() for place in range(1, len(clip))]))


def _flicker(left: Array, right: Array) -> float:
    """Return the mean difference between the steps of two clips in grey levels."""
    gaps = [np.abs(_step(left, place) - _step(right, place)).mean() for place in range(1, len(left))]
    return float(np.mean(gaps))


def _step(clip: Array, place: int) -> Array:
    return clip[place].astype(np.int16) - clip[place - 1]


def _heat(gap: Array) -> tuple[bytes, int]:
    """Return a difference in grey levels, [H, W], as a PNG from dark to bright, and what its brightest colour stands for."""
    from PIL import Image

    top = max(1, int(gap.max()))
    scale = next(one for one in (1, 2, 4, 8, 16, 32, 64, 128, 255) if one >= top)
    places = np.clip(gap.astype(np.float64) / scale, 0, 1)
    colours = np.stack([np.interp(places, STOPS, [one[band] for one in HEAT]) for band in range(3)], -1)
    buffer = io.BytesIO()
    Image.fromarray(colours.round().astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue(), scale


STOPS = (0.0, 0.25, 0.5, 0.75, 1.0)
HEAT = ((8, 10, 30), (84, 20, 110), (190, 55, 85), (245, 140, 30), (252, 250, 190))
"""Colours of a difference: as in a fire, darker is always less, so it reads in black and white too."""


def _shape(frames: Array) -> str:
    many = f", {len(frames)} frames" if len(frames) > 1 else ""
    return f"{frames.shape[2]} x {frames.shape[1]} px{many}"


def _words(name: str, value: Any) -> str:
    if value in (None, "", [], ()):
        return "none (exact)" if name == "accelerators" else "the model's own"
    if name == "accelerators":
        return " + ".join(map(str, Request.from_dict({"prompt": "-", "accelerators": value}).accelerators))
    if isinstance(value, list | tuple):
        return ", ".join(str(one.get("file", one)) if isinstance(one, Mapping) else str(one) for one in value)
    return str(value)


def _number(value: float) -> float | None:
    return round(value, 2) if math.isfinite(value) else None
