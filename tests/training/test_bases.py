"""Training adapters beside diffusers' own networks: FLUX and Stable Diffusion 3, tiny."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from control import load
from training.adapters import AdapterTrainer
from training.bases import Base, FluxBase, StableDiffusion3Base, base_of


class Encoders:
    """Stand-in for the encoders of diffusers' pipelines."""

    def __init__(self, transformer: Any, channels: int) -> None:
        self.transformer, self.vae, self.channels = transformer, None, channels
        self.config: dict[str, Any] = {}

    def encode_prompt(
        self, texts: Sequence[str], *_: object, max_sequence_length: int, **__: object
    ) -> tuple[Tensor, ...]:
        tokens = torch.stack([torch.full((max_sequence_length, 32), len(text) / 50) for text in texts])
        pooled = tokens.mean(dim=1)
        return (
            (tokens, pooled, tokens)
            if isinstance(self.transformer, FluxTransformer2DModel)
            else (tokens, tokens, pooled, pooled)
        )


def flux() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=12, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip


def stable_diffusion() -> Any:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=32, patch_size=4, in_channels=3, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=3, pos_embed_max_size=32,
    )  # fmt: skip


@pytest.mark.parametrize(("make", "family"), [(flux, FluxBase), (stable_diffusion, StableDiffusion3Base)])
def test_it_trains_beside_diffusers_own(
    adapter_recipe: dict[str, Any], tmp_path: Path, make: Any, family: type[Base]
) -> None:
    base = base_of(Encoders(make(), 3))
    assert type(base) is family
    adapter_recipe["data"] |= {"scenes": 20, "size": 32, "copies": 1}
    trainer = AdapterTrainer(adapter_recipe, tmp_path, None, base=base)
    trainer.run()
    assert math.isfinite(trainer.log[-1]["held_out"])
    assert load(tmp_path / "adapter.safetensors", base.transformer).control == trainer.model.control


def test_flux_is_given_its_latents_packed_as_its_pipeline_packs_them() -> None:
    from diffusers import FluxPipeline

    base = base_of(Encoders(flux(), 3))
    seen: dict[str, Any] = {}

    def forward(hidden_states: Tensor, **given: Any) -> tuple[Tensor]:
        seen.update(given, hidden_states=hidden_states)
        return (hidden_states,)

    base.transformer.forward = forward
    noisy = torch.randn(2, 3, 8, 4)
    found = base.velocity(noisy, torch.tensor([0.5, 0.25]), base.texts(["a", "bb"], 5))
    assert torch.equal(found, noisy)
    assert torch.equal(seen["hidden_states"], FluxPipeline._pack_latents(noisy, 2, 3, 8, 4))
    assert torch.equal(seen["img_ids"], FluxPipeline._prepare_latent_image_ids(2, 4, 2, "cpu", torch.float32))
    assert seen["timestep"].tolist() == [0.5, 0.25]
