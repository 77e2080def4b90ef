"""diffusers' autoencoders, variational (AutoencoderKL) or not (AutoencoderDC), behind two functions.

Paper: Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models, Chen et al. 2024, arXiv:2410.10733.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def scale_of(vae: Any) -> int:
    """Return how many picture pixels stand for one latent pixel."""
    factor = getattr(vae, "spatial_compression_ratio", None)
    return int(factor) if isinstance(factor, int) else 2 ** (len(vae.config.block_out_channels) - 1)


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in -1..1 -> latents as a network sees them: shifted, scaled, the most likely ones."""
    found = vae.encode(pixels.to(vae.dtype))
    latents: Tensor = found.latent if hasattr(found, "latent") else found.latent_dist.mode()
    return (latents - _shift(vae)) * vae.config.scaling_factor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """The inverse: latents as a network sees them -> pictures in about -1..1."""
    pictures: Tensor = vae.decode(
        latents.to(vae.dtype) / vae.config.scaling_factor + _shift(vae), return_dict=False
    )[0]
    return pictures


def _shift(vae: Any) -> float:
    return float(vae.config.get("shift_factor") or 0.0)
