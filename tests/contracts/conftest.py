"""`tiny`: one tiny random transformer of each family, with its inputs and a small sampler.

`TABLE` names a class of diffusers, a small configuration and its inputs; the table_*.py beside this file name all other
classes. `KINDS` are put under all the contracts, every class goes through `test_every_transformer.py`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

Draw = Callable[..., Tensor]
Inputs = Callable[[Draw, int, int], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    config: dict[str, Any]
    inputs: Inputs  # (draw, images B, rows H) -> the arguments of a forward, without the timestep
    residuals: Callable[[Draw, int], dict[str, Any]] | None = (
        None  # (draw, tokens N) -> what a ControlNet injects
    )
    time: str = "timestep"
    joins: int = 0  # places where one stack of blocks ends in a concatenation
    call: Callable[[Any, dict[str, Any], float], Any] | None = None  # (model, arguments, time) -> output
    home: str = "diffusers.models.transformers"


def _ids(count: int, axes: int = 3) -> Tensor:
    return torch.stack([torch.arange(count).float()] * axes, dim=1)


def _flux(r: Draw, B: int, H: int) -> dict[str, Any]:
    given = {
        "hidden_states": r(B, H * H, 4),
        "encoder_hidden_states": r(B, 5, 16),
        "pooled_projections": r(B, 16),
    }
    return given | {"img_ids": _ids(H * H), "txt_ids": _ids(5)}


def _text(channels: int, width: int, *shape: int) -> Inputs:
    """Make the inputs of models that take latents [B, C, (F,) H, H] and prompt states [B, 5, D]."""
    return lambda r, B, H: {
        "hidden_states": r(B, channels, *shape, H, H),
        "encoder_hidden_states": r(B, 5, width),
    }


_HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
TABLE: dict[str, Family] = {
    "FluxTransformer2DModel": Family(
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "axes_dims_rope": (2, 2, 4),
        }
        | {"joint_attention_dim": 16, "pooled_projection_dim": 16}
        | _HEADS,
        _flux,
        lambda r, N: {
            "controlnet_block_samples": [r(1, N, 16) for _ in range(2)],
            "controlnet_single_block_samples": [r(1, N, 16) for _ in range(2)],
        },
    ),
    "Flux2Transformer2DModel": Family(
        {"in_channels": 4, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (2, 2, 2, 2)}
        | {"joint_attention_dim": 16, "timestep_guidance_channels": 16, "guidance_embeds": False}
        | _HEADS,
        lambda r, B, H: {
            "hidden_states": r(B, H * H, 4),
            "encoder_hidden_states": r(B, 5, 16),
            "img_ids": _ids(H * H, 4),
            "txt_ids": _ids(5, 4),
        },
        joins=1,
    ),
    "ChromaTransformer2DModel": Family(
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "axes_dims_rope": (2, 2, 4),
        }
        | {"joint_attention_dim": 16, "approximator_num_channels": 8}
        | {"approximator_hidden_dim": 16, "approximator_layers": 1}
        | _HEADS,
        lambda r, B, H: {k: v for k, v in _flux(r, B, H).items() if k != "pooled_projections"},
        lambda r, N: {"controlnet_block_samples": [r(1, N, 16) for _ in range(2)]},
        joins=1,
    ),
    "SD3Transformer2DModel": Family(
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 4, "caption_projection_dim": 16}
        | {"joint_attention_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 8}
        | _HEADS,
        lambda r, B, H: _text(4, 16)(r, B, H) | {"pooled_projections": r(B, 16)},
        lambda r, N: {"block_controlnet_hidden_states": [r(1, N // 4, 16) for _ in range(2)]},
    ),
    "PixArtTransformer2DModel": Family(
        {
            "sample_size": 4,
            "in_channels": 4,
            "num_layers": 4,
            "caption_channels": 16,
            "cross_attention_dim": 16,
        }
        | _HEADS,
        lambda r, B, H: (
            _text(4, 16)(r, B, H) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        ),
    ),
    "DiTTransformer2DModel": Family(
        {"sample_size": 4, "in_channels": 4, "num_layers": 4} | _HEADS,
        lambda r, B, H: {"hidden_states": r(B, 4, H, H), "class_labels": torch.arange(B)},
    ),
    "WanTransformer3DModel": Family(
        {"in_channels": 4, "out_channels": 4, "num_layers": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32}
        | {"attention_head_dim": 12, "num_attention_heads": 2},
        _text(4, 16, 2),
    ),
    "SanaTransformer2DModel": Family(
        {"in_channels": 4, "out_channels": 4, "num_layers": 4, "caption_channels": 16, "sample_size": 4}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
        | _HEADS,
        _text(4, 16),
        lambda r, N: {"controlnet_block_samples": tuple(r(1, N, 16) for _ in range(3))},
    ),
    "CogVideoXTransformer3DModel": Family(
        {"in_channels": 4, "out_channels": 4, "num_layers": 4, "time_embed_dim": 8, "text_embed_dim": 16}
        | {"sample_width": 4, "sample_height": 4, "sample_frames": 9, "max_text_seq_length": 5}
        | _HEADS,
        lambda r, B, H: {"hidden_states": r(B, 3, 4, H, H), "encoder_hidden_states": r(B, 5, 16)},
    ),
    "AuraFlowTransformer2DModel": Family(
        {"sample_size": 8, "in_channels": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 2}
        | {"joint_attention_dim": 16, "caption_projection_dim": 16, "pos_embed_max_size": 64}
        | _HEADS,
        _text(4, 16),
        joins=1,
    ),
    "Lumina2Transformer2DModel": Family(
        {
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 4,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
        }
        | {"num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2), "axes_lens": (32, 32, 32)}
        | {"cap_feat_dim": 16},
        lambda r, B, H: (
            _text(4, 16)(r, B, H) | {"encoder_attention_mask": torch.ones(B, 5, dtype=torch.bool)}
        ),
    ),
    "ZImageTransformer2DModel": Family(
        {"in_channels": 4, "dim": 16, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": 16, "axes_dims": [4, 2, 2], "axes_lens": [64, 32, 32]},
        lambda r, B, H: {"x": [r(4, 1, H, H) for _ in range(B)], "cap_feats": [r(5, 16) for _ in range(B)]},
        lambda r, N: {"controlnet_block_samples": {1: r(1, 1, 16)}},
        time="t",
    ),
    "QwenImageTransformer2DModel": Family(
        {
            "in_channels": 4,
            "out_channels": 1,
            "num_layers": 4,
            "joint_attention_dim": 16,
            "axes_dims_rope": (2, 2, 4),
        }
        | _HEADS,
        lambda r, B, H: {
            "hidden_states": r(B, H * H, 4),
            "encoder_hidden_states": r(B, 5, 16),
            "encoder_hidden_states_mask": torch.ones(B, 5, dtype=torch.bool),
            "img_shapes": [[(1, H, H)]] * B,
        },
        lambda r, N: {"controlnet_block_samples": [r(1, N, 16) for _ in range(2)]},
    ),
    "HunyuanVideoTransformer3DModel": Family(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
        }
        | {
            "text_embed_dim": 16,
            "pooled_projection_dim": 16,
            "guidance_embeds": False,
            "rope_axes_dim": (2, 2, 4),
        }
        | _HEADS,
        lambda r, B, H: (
            _text(4, 16, 2)(r, B, H)
            | {"encoder_attention_mask": torch.ones(B, 5, dtype=torch.long), "pooled_projections": r(B, 16)}
        ),
    ),
    "LatteTransformer3DModel": Family(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "caption_channels": 16,
        }
        | {"sample_size": 4, "patch_size": 2, "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000}
        | {"video_length": 2, "norm_elementwise_affine": False, "activation_fn": "gelu-approximate"}
        | _HEADS,
        _text(4, 16, 2),
        joins=3,
    ),
}


def load(name: str) -> ModuleType:
    """Return the module of a file beside this one, whatever the folder is called."""
    place = importlib.util.spec_from_file_location(
        f"contracts_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


@functools.cache
def every() -> dict[str, Family]:
    """Return the rows of all tables: every class that runs at tiny size."""
    files = sorted(path.stem for path in Path(__file__).parent.glob("table_*.py"))
    return TABLE | {name: Family(**row) for file in files for name, row in load(file).TABLE.items()}


@functools.cache
def _built(name: str) -> Any:
    family = every()[name]
    torch.manual_seed(0)
    model = getattr(importlib.import_module(family.home), name)(**family.config).eval()
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # some of the classes begin as the identity
        parameter.data.normal_(0, 0.2, generator=draw)
    return model


class Tiny:
    """A tiny random transformer of a family, with its inputs and a small sampler."""

    steps = 8

    def __init__(self, name: str) -> None:
        self.family = every()[name]
        self.draw = torch.Generator().manual_seed(2)
        self.model: Any = copy.deepcopy(_built(name))

    def inputs(self, images: int = 1, rows: int = 4) -> dict[str, Any]:
        return self.family.inputs(lambda *shape: torch.randn(*shape, generator=self.draw), images, rows)

    def residuals(self, rows: int = 4) -> dict[str, Any]:
        assert self.family.residuals is not None
        return self.family.residuals(lambda *shape: torch.randn(*shape, generator=self.draw), rows * rows)

    @torch.no_grad()
    def call(self, given: dict[str, Any], time: float) -> Tensor:
        if self.family.call is not None:
            output = self.family.call(self.model, given, time)
            return torch.stack(output) if isinstance(output, list) else output
        images = len(next(iter(given.values())))
        output = self.model(**given, **{self.family.time: torch.full((images,), time)}, return_dict=False)[0]
        return torch.stack(output) if isinstance(output, list) else output

    def sample(self, given: dict[str, Any], stop: int | None = None) -> list[Tensor]:
        """Call the model at `steps` falling times, each on its own latents."""
        first = next(iter(given))
        latents, outputs = given[first], []
        for step in range(self.steps if stop is None else stop):
            scale = 1 - step / (2 * self.steps)
            moved = [x * scale for x in latents] if isinstance(latents, list) else latents * scale
            outputs.append(self.call(given | {first: moved}, 1 - step / self.steps))
        return outputs


# One of each kind: two stacks of blocks, a join between them, a block that ends a stream, lists for inputs, a clip.
KINDS = (
    "FluxTransformer2DModel", "Flux2Transformer2DModel", "SD3Transformer2DModel", "ZImageTransformer2DModel",
    "WanTransformer3DModel",
)  # fmt: skip


@pytest.fixture(params=KINDS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return Tiny(request.param)


@pytest.fixture(scope="session")
def tables() -> Any:
    """`every` row, `load` a file beside this one, and `build` a tiny transformer by its class's name."""

    class Tables:
        rows, build = staticmethod(every), Tiny
        load = staticmethod(load)

    return Tables
