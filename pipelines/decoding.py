"""Decode large pictures and clips in tiles, in less memory.

Paper: High-Resolution Image Synthesis with Latent Diffusion Models, Rombach et al. 2022, arXiv:2112.10752 (autoencoders).
Differs: our codecs are convolutions alone, so tiles that see as far as the codec does give the whole decode itself, no seam to
blend; diffusers' autoencoders normalise over the whole picture, so their tiles are blended and differ a little.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pipelines.request import RequestError

if TYPE_CHECKING:
    from torch import Tensor

TILE = 64
"""Side of a tile, in latent pixels."""


def reach_of(codec: Any) -> int | None:
    """Return how many latent pixels away a codec's decoder looks; None where that is not known."""
    blocks = getattr(codec, "blocks", None)
    return (
        None if blocks is None else 2 * len(blocks) + 2
    )  # two convolutions a block, one before and one after


def tiled_decode(decode: Callable[[Tensor], Tensor], latents: Tensor, reach: int, tile: int = TILE) -> Tensor:
    """Decode [B, C, h, w] -> [B, C', H, W] in tiles of `tile` latent pixels that each see `reach` pixels beyond their border.

    For a decoder that looks no further than `reach` this equals the whole decode, up to the rounding of its convolutions.
    """
    import torch

    height, width = latents.shape[-2:]
    rows = []
    for top in range(0, height, tile):
        row = []
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            above, before = max(0, top - reach), max(0, left - reach)
            part = latents[..., above : min(bottom + reach, height), before : min(right + reach, width)]
            made = decode(part.contiguous())
            scale = made.shape[-1] // part.shape[-1]
            row.append(
                made[..., (top - above) * scale : (bottom - above) * scale,
                     (left - before) * scale : (right - before) * scale]
            )  # fmt: skip
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=-2)


@contextlib.contextmanager
def tiled(pipeline: Any, wanted: bool, tile: int = TILE) -> Iterator[None]:
    """Decode in tiles inside the `with`, and as before after it. Raises: RequestError where nothing can be tiled."""
    if not wanted:
        yield
        return
    from dit.seams import patched

    codec, vae = getattr(pipeline, "codec", None), getattr(pipeline, "vae", None)
    reach = reach_of(codec)
    if codec is not None and reach is not None:
        whole, far = codec.decode, reach
        with patched(codec, "decode", lambda latents: tiled_decode(whole, latents, far, tile)):
            yield
    elif vae is not None and hasattr(vae, "enable_tiling"):
        before = bool(getattr(vae, "use_tiling", False))
        vae.enable_tiling()
        try:
            yield
        finally:
            if not before:
                vae.disable_tiling()
    else:
        raise RequestError("tiling", True, "left out: this model has no decoder that works in tiles")
