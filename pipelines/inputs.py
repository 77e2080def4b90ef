"""The files that a request names: pictures, a clip, a mask; opened with limits, before any weights load."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.catalog import Card
from pipelines.request import Request, RequestError
from pipelines.video_files import read_clip

if TYPE_CHECKING:
    from PIL.Image import Image

PIXEL_LIMIT = 64_000_000
"""Most pixels of a picture."""
BYTE_LIMIT = 64_000_000
"""Most bytes of a picture's file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """What was read: pictures, frames of a clip and how many of them a second, a mask, and for each its name and digest.

    The mask is [1 or F, H, W] in px, True where something is made anew. What steers, and the part of a still picture that is
    filled in, are added by `pipelines.controls.steered`.
    """

    image: Image | None = None
    last_image: Image | None = None
    clip: tuple[Image, ...] = ()
    fps: float | None = None
    mask: Any = None
    digests: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    steering: Any = None
    inpainting: Any = None
    notes: tuple[str, ...] = ()
    """What to tell of how they were read."""


NOTHING = Inputs()


def read_inputs(request: Request, card: Card) -> Inputs:
    """Open the files of a request. Raises: RequestError for one that is not readable, too large or of another shape."""
    digests: dict[str, dict[str, str]] = {}
    pictures = {}
    notes: list[str] = []
    for name in ("image", "last_image"):
        pictures[name], digest = read_image(getattr(request, name), name, notes)
        if digest is not None:
            digests[name] = digest
    clip: list[Image] = []
    fps, mask = None, None
    if request.clip is not None:
        clip, fps = read_clip(request.clip)
        digests["clip"] = _noted(request.clip, clip)
    if request.mask is not None and request.clip is not None:
        found, _ = read_clip(request.mask, field="mask")
        digests["mask"] = _noted(request.mask, found)
        mask = _read_mask(request, card, found, clip)
    return Inputs(pictures["image"], pictures["last_image"], tuple(clip), fps, mask, digests, notes=tuple(notes))


def read_image(
    path: str | None, field: str = "image", notes: list[str] | None = None
) -> tuple[Image | None, dict[str, str] | None]:
    """Open a starting picture: of an animation its first frame, turned upright, transparency on white, 16 bits brought to 8.

    Args:
        notes: what is to be told of it is added here.

    Raises: RequestError, before anything large is decoded.
    """
    if path is None:
        return None, None
    from PIL import Image, ImageOps, UnidentifiedImageError

    file, data = Path(path).expanduser(), b""
    try:
        if file.stat().st_size > BYTE_LIMIT:
            raise RequestError(field, path, f"a file of at most {BYTE_LIMIT // 1_000_000} MB")
        data = file.read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "BMP", "GIF")) as opened:
            if opened.width * opened.height > PIXEL_LIMIT:
                raise RequestError(
                    field,
                    f"{opened.width}x{opened.height}",
                    f"at most {PIXEL_LIMIT // 1_000_000} million pixels",
                )
            frames = int(getattr(opened, "n_frames", 1))
            picture = _rgb(ImageOps.exif_transpose(opened))
    except RequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(field, path, f"at most {PIXEL_LIMIT // 1_000_000} million pixels") from None
    except (OSError, ValueError, SyntaxError) as error:
        words = str(error)
        if isinstance(error, UnidentifiedImageError):
            words = "no picture is recognised in it" if data else "it is empty"
            if data[4:8] == b"ftyp" or data[:4] == b"\x1aE\xdf\xa3":
                words = "it is a film: give one of its frames, or give it as the clip of a model of clips"
        elif isinstance(error, FileNotFoundError):
            words = "there is no such file"
        elif isinstance(error, IsADirectoryError):
            words = "it is a folder: give one of its pictures, or give it as the clip of a model of clips"
        elif isinstance(error, OSError) and error.strerror:
            words = error.strerror.lower()
        raise RequestError(field, path, f"a readable PNG, JPEG, WebP, BMP or GIF picture ({words})") from None
    if frames > 1 and notes is not None:
        notes.append(f"{field}: of the {frames} frames of {file.name} the first was taken")
    return picture, {"name": file.name, "sha256": hashlib.sha256(data).hexdigest()}


def _rgb(image: Image) -> Image:
    """Return a picture of any of these files' modes as `control.conditions.read_picture` sees it, in 8 bits."""
    import numpy as np
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):  # which Pillow would cut at 255
        levels = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        image = Image.fromarray(np.rint(levels).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert("RGB")


def _noted(path: str, frames: list[Image]) -> dict[str, str]:
    """Return a clip's name and the digest of its pixels: a folder has no digest of its own."""
    from pipelines.result import pixel_hash

    return {"name": Path(path).name, "sha256": pixel_hash(frames).partition(":")[2]}


def _read_mask(request: Request, card: Card, frames: list[Image], clip: list[Image]) -> Any:
    import numpy as np

    mask = np.stack([np.asarray(one.convert("L")) for one in frames]) > 127
    wide, high = request.width or card.width, request.height or card.height
    if wide is None or high is None:
        wide, high = clip[0].size
    made = request.frames or len(clip)
    if mask.shape[1:] != (high, wide) or mask.shape[0] not in (1, made):
        allowed = f"of shape 1 or {made} frames x {high} x {wide} px, as the clip that is made"
        raise RequestError("mask", " x ".join(map(str, mask.shape)), allowed)
    if mask.all() or not mask.any():
        what = "black" if not mask.any() else "white"
        raise RequestError(
            "mask", f"{what} everywhere", "white where something is made anew, black elsewhere"
        )
    return mask
