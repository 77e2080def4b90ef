"""Pictures made into what adapters steer by: edges, colours, masks, boxes, depth; and masks and canvases for filling in.

`Condition` is the one registry: `parse(Condition, "canny:low=0.1,high=0.2")`. All of them are pure functions of settings and
picture, for any size; `preview` shows what an adapter would be given.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from control._conditions import (
    BYTE_LIMIT,
    PIXEL_LIMIT,
    Array,
    Condition,
    checked,
    colour_of,
    condition_of,
    fitted,
    flat,
    grey_of,
    image_of,
    read_picture,
    resized,
)
from control._conditions_canvas import extended, feathered, mask_of, pasted
from control._conditions_edges import Blur, Canny, Grey, LineArt, LowResolution, Picture, SoftEdge
from control._conditions_estimated import Depth, Pose
from control._conditions_regions import Boxes, Holes, Mask, Palette, Segments, Subject
from dit.spec import kinds, parse

__all__ = [
    "BYTE_LIMIT", "PIXEL_LIMIT", "Array", "Blur", "Boxes", "Canny", "Condition", "Depth", "Grey", "Holes", "LineArt",
    "LowResolution", "Mask", "Palette", "Picture", "Pose", "Segments", "SoftEdge", "Subject", "checked", "colour_of",
    "condition_of", "conditions", "extended", "feathered", "fitted", "flat", "grey_of", "image_of", "mask_of", "pasted", "preview",
    "read_picture", "resized",
]  # fmt: skip


def conditions() -> dict[str, type[Condition]]:
    """Return every condition by name."""
    return kinds(Condition)


def preview(
    condition: Condition | str,
    source: str | Path | bytes | Image.Image,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """Show the condition that an adapter would be given of a picture.

    Args:
        size: width and height in px of the picture that is to be made; None: the source's own.

    Raises: ValueError for an unknown condition; Refused for a picture that cannot be read, or that holds nothing of it.
    """
    chosen = parse(Condition, condition)  # type: ignore[type-abstract,unused-ignore]
    picture = read_picture(source)
    if size is not None:
        picture = fitted(picture, *size)
    return image_of(condition_of(chosen, picture))
