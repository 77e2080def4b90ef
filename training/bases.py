"""A frozen network with its encoders, as an adapter is trained beside it: pictures and prompts in, velocities out.

Ours, and diffusers' pipelines of Flux and Stable Diffusion 3; each family says only how it is called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit.text import encode, encode_padded
from pipelines import autoencoder

Prompts = dict[str, Tensor]
"""The prompt inputs of a forward by their names, each [n, ...]."""


class Base:
    """Our pipelines: transformers that take a prompt's tokens, their mask and a pooled vector, and count time to 1000."""

    def __init__(self, pipeline: Any, name: str = "") -> None:
        self.pipeline, self.name = pipeline, name
        self.transformer: Any = pipeline.transformer.eval().requires_grad_(False)

    @torch.no_grad()
    def pictures(self, pixels: Tensor) -> Tensor:
        """Pictures uint8 [n, 3, H, W] -> latents [n, C, h, w] on the transformer's device, in float32."""
        device = self.transformer.device
        return torch.cat(
            [self._encoded((part / 127.5 - 1).to(device)).float() for part in pixels.float().split(64)]
        )

    def _encoded(self, pictures: Tensor) -> Tensor:
        codec, vae = getattr(self.pipeline, "codec", None), getattr(self.pipeline, "vae", None)
        if codec is not None:
            return codec.encode(pictures.to(codec.dtype))
        return pictures if vae is None else autoencoder.encode(vae, pictures.to(vae.dtype))

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Latents [n, C, h, w] -> pictures [n, 3, H, W] in -1..1, in float32."""
        codec, vae = getattr(self.pipeline, "codec", None), getattr(self.pipeline, "vae", None)
        if codec is not None:
            return codec.decode(latents.to(codec.dtype)).float()
        return latents.float() if vae is None else autoencoder.decode(vae, latents.to(vae.dtype)).float()

    @torch.no_grad()
    def texts(self, texts: Sequence[str], length: int) -> Prompts:
        """Encode prompts, cut or padded to `length` tokens."""
        parts = [self._texts(list(texts[i : i + 64]), length) for i in range(0, len(texts), 64)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _texts(self, texts: list[str], length: int) -> Prompts:
        made, config = self.pipeline, self.pipeline.config
        if config.get("text_padding") == "heard":
            found = encode_padded(made.tokenizer, made.text_encoder, texts, length=length)
            prompts = {"encoder_hidden_states": found.tokens}
        else:
            found = encode(made.tokenizer, made.text_encoder, texts, length=length)
            prompts = {"encoder_hidden_states": found.tokens, "encoder_attention_mask": found.mask}
        if self.transformer.config.get("pooled_dim"):
            prompts["pooled_projections"] = found.pooled
        return prompts

    def velocity(self, noisy: Tensor, times: Tensor, prompts: Prompts) -> Tensor:
        """Call the transformer: noisy [B, C, h, w], times [B] from 0 to 1 (noise) -> velocity [B, C, h, w]."""
        found: Tensor = self.transformer(noisy, times * 1000, **self._cast(prompts), return_dict=False)[0]
        return found[:, : noisy.shape[1]]

    def _cast(self, prompts: Prompts) -> Prompts:
        kind = self.transformer.dtype
        return {name: x.to(kind) if x.is_floating_point() else x for name, x in prompts.items()}


class StableDiffusion3Base(Base):
    """diffusers' Stable Diffusion 3."""

    def _texts(self, texts: list[str], length: int) -> Prompts:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def velocity(self, noisy: Tensor, times: Tensor, prompts: Prompts) -> Tensor:
        kind = self.transformer.dtype
        found = self.transformer(
            noisy.to(kind), timestep=times * 1000, **self._cast(prompts), return_dict=False
        )
        return found[0]


class FluxBase(Base):
    """diffusers' Flux, whose latents are packed two by two and whose time ends at 1."""

    def _texts(self, texts: list[str], length: int) -> Prompts:
        tokens, pooled, _ = self.pipeline.encode_prompt(texts, None, max_sequence_length=length)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def velocity(self, noisy: Tensor, times: Tensor, prompts: Prompts) -> Tensor:
        kind, device = self.transformer.dtype, noisy.device
        b, c, h, w = noisy.shape
        packed = noisy.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)
        axes = [torch.zeros(1), torch.arange(h // 2).float(), torch.arange(w // 2).float()]
        guidance = (
            {"guidance": torch.ones(b, device=device)} if self.transformer.config.guidance_embeds else {}
        )
        found = self.transformer(
            packed.to(kind),
            timestep=times.to(kind),
            img_ids=torch.cartesian_prod(*axes).to(device),
            txt_ids=torch.zeros(prompts["encoder_hidden_states"].shape[1], 3, device=device),
            **self._cast(prompts),
            **guidance,
            return_dict=False,
        )[0]
        return found.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


FAMILIES: dict[str, type[Base]] = {
    "FluxTransformer2DModel": FluxBase,
    "SD3Transformer2DModel": StableDiffusion3Base,
}
"""Class of a transformer -> how it is called; every other one is called as ours are."""


def base_of(pipeline: Any, name: str = "") -> Base:
    """Put the right way to call around a pipeline."""
    families = [
        FAMILIES[one.__name__] for one in type(pipeline.transformer).__mro__ if one.__name__ in FAMILIES
    ]
    return (families[0] if families else Base)(pipeline, name)


def load_base(model: str) -> Base:
    """Return the base of a shipped name, a folder or a hub id."""
    from pipelines import catalog

    return base_of(catalog.load(model).pipeline, model)


def weights_digest(module: torch.nn.Module) -> str:
    """Return sha256 of all weights and buffers, bit by bit."""
    digest = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
