"""Masks and canvases for filling in: soft borders, a larger canvas, and the known part put back bit for bit.

A mask is [H, W] from 0 to 1: 1 is to be made, 0 is known.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from control._conditions import PIXEL_LIMIT, Array, checked
from control.base import Refused


def feathered(mask: Array, width: float) -> Array:
    """Let a mask rise over `width` px from its border inwards; where it was 0 it stays 0, so that nothing known is touched.

    Raises: Refused for a mask that is none, or a width below 0.
    """
    found = mask_of(mask)
    if not width >= 0:
        raise Refused(f"width must be a number of at least 0 px, got {width!r}")
    if width == 0 or found.min() > 0:
        return found
    # The first pixel inside lies one pixel from the known ones, and is to hold something of what is made.
    inside = ndimage.distance_transform_edt(found > 0)
    return (found * np.minimum(inside / (width + 1), 1)).astype(np.float32)


def extended(
    picture: Array, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0, multiple: int = 1
) -> tuple[Array, Array]:
    """Put a picture [H, W, 3] on a larger canvas: its own border goes on outwards, and the mask says what is to be made.

    Args:
        left, top, right, bottom: px to add. multiple: what the new sides must divide by; right and bottom grow to that.

    Raises: Refused for numbers below 0, nothing to add, or a canvas that is too large.
    """
    known = checked(picture)
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, side in sides.items():
        if isinstance(side, bool) or not isinstance(side, int) or side < 0:
            raise Refused(f"{name} must be a whole number of at least 0 px, got {side!r}")
    if not any(sides.values()):
        raise Refused("one of left, top, right and bottom must be above 0 px, got 0 for all")
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise Refused(f"multiple must be a whole number of at least 1 px, got {multiple!r}")
    height, width = known.shape[:2]
    bottom += -(height + top + bottom) % multiple
    right += -(width + left + right) % multiple
    if (height + top + bottom) * (width + left + right) > PIXEL_LIMIT:
        raise Refused(f"the canvas must have at most {PIXEL_LIMIT // 1_000_000} million pixels")
    around = ((top, bottom), (left, right))
    canvas = np.pad(known, (*around, (0, 0)), mode="edge")
    mask = np.pad(np.zeros((height, width), dtype=np.float32), around, constant_values=1)
    return canvas, mask


def pasted(made: Array, known: Array, mask: Array) -> Array:
    """Put the known part back: pictures [H, W, 3] of 8 bits, bit for bit where the mask is 0, mixed where it is between.

    Raises: Refused for pictures of other sizes or number formats.
    """
    for name, one in (("made", made), ("known", known)):
        if one.dtype != np.uint8 or one.ndim != 3 or one.shape[2] != 3:
            raise Refused(
                f"{name} must be a picture [H, W, 3] of 8 bits, got {one.dtype} of shape {one.shape}"
            )
    share = mask_of(mask)
    if made.shape != known.shape or share.shape != made.shape[:2]:
        raise Refused(f"made {made.shape}, known {known.shape} and mask {share.shape} must be of one size")
    part = share[..., None].astype(np.float64)
    mixed = np.rint(made * part + known * (1 - part)).astype(np.uint8)
    return np.where(part == 0, known, np.where(part == 1, made, mixed))


def mask_of(mask: Array) -> Array:
    """Return a mask [H, W] in float32 from 0 to 1; of a picture [H, W, 3] its brightness. Raises: Refused for anything else."""
    found = checked(mask, "the mask")
    return np.rint(found.mean(axis=2) * 65535).astype(np.float32) / np.float32(65535)
