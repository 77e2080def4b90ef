"""Picture transformers of diffusers at tiny random size: build arguments and inputs, nothing else.

`inputs(draw, images B, rows H)` starts with the latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HEADS: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 2}
FLUX: dict[str, Any] = HEADS | {
    "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (2, 2, 4),
    "joint_attention_dim": 16,
}  # fmt: skip
COGVIEW: dict[str, Any] = HEADS | {
    "in_channels": 4, "out_channels": 4, "num_layers": 4, "text_embed_dim": 16, "time_embed_dim": 16, "condition_dim": 4,
}  # fmt: skip
JOY: dict[str, Any] = {
    "in_channels": 4, "hidden_size": 16, "num_attention_heads": 2, "text_dim": 16, "num_layers": 4, "rope_dim_list": [2, 2, 4],
}  # fmt: skip


def ids(count: int, axes: int = 3) -> Tensor:
    return torch.stack([torch.arange(count).float()] * axes, dim=1)


def tokens(r: Any, B: int, H: int, width: int = 16) -> dict[str, Any]:
    given = {"hidden_states": r(B, H * H, 4), "encoder_hidden_states": r(B, 5, width)}
    return given | {"img_ids": ids(H * H), "txt_ids": ids(5)}


def picture(r: Any, B: int, H: int, width: int = 16) -> dict[str, Any]:
    return {"hidden_states": r(B, 4, H, H), "encoder_hidden_states": r(B, 5, width)}


def sizes(B: int, H: int) -> dict[str, Any]:
    return {"target_size": torch.full((B, 2), 8.0 * H), "crop_coords": torch.zeros(B, 2)}


def hunyuan(r: Any, B: int, H: int) -> dict[str, Any]:
    text = {"encoder_hidden_states": r(B, 5, 16), "text_embedding_mask": torch.ones(B, 5)}
    return {
        "hidden_states": r(B, 4, H, H), **text, "encoder_hidden_states_t5": r(B, 6, 16),
        "text_embedding_mask_t5": torch.ones(B, 6), "image_meta_size": torch.ones(B, 6), "style": torch.zeros(B).long(),
        "image_rotary_emb": [torch.ones(H * H // 4, 8), torch.zeros(H * H // 4, 8)],
    }  # fmt: skip


def ideogram(r: Any, B: int, H: int) -> dict[str, Any]:
    marks = torch.cat([torch.full((B, 3), 3), torch.full((B, H * H), 2)], dim=1)
    places = torch.arange(3 + H * H)[None, :, None].expand(B, -1, 3)
    return {
        "hidden_states": r(B, 3 + H * H, 4), "encoder_hidden_states": r(B, 3 + H * H, 16), "position_ids": places,
        "segment_ids": torch.zeros_like(marks), "indicator": marks,
    }  # fmt: skip


def qwen(r: Any, B: int, H: int) -> dict[str, Any]:
    marks = torch.cat([torch.zeros(B, 5), torch.ones(B, H * H // 4)], dim=1).bool()
    return {
        "hidden_states": r(B, H * H, 4), "encoder_hidden_states": r(B, 5, 16), "img_shapes": [[(1, H, H)]] * B, "img_mask": marks,
    }  # fmt: skip


def omnigen(r: Any, B: int, H: int) -> dict[str, Any]:
    count = 3 + 1 + H * H // 4
    return {
        "hidden_states": r(B, 4, H, H), "input_ids": torch.arange(3).repeat(B, 1), "input_img_latents": [],
        "input_image_sizes": {}, "attention_mask": torch.ones(B, count, count), "position_ids": torch.arange(count).repeat(B, 1),
    }  # fmt: skip


TABLE: dict[str, dict[str, Any]] = {
    "BriaTransformer2DModel": {
        "config": FLUX | {"pooled_projection_dim": 16},
        "inputs": tokens,
        "residuals": lambda r, N: {"controlnet_block_samples": [r(1, N, 16) for _ in range(2)]},
    },
    "BriaFiboTransformer2DModel": {
        "config": FLUX | {"pooled_projection_dim": 16, "text_encoder_dim": 16},
        "inputs": lambda r, B, H: tokens(r, B, H) | {"text_encoder_layers": [r(B, 5, 16) for _ in range(4)]},
    },
    "BriaFibo2Transformer2DModel": {
        "config": {
            "in_channels": 4, "dim": 24, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 3, "cap_feat_dim": 16,
            "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 2, "max_num_gist_tokens": 4,
            "gist_step": 1, "gist_min_text_len": 2, "gist_max_text_len": 8, "axes_dims": (4, 2, 2), "axes_lens": (64, 32, 32),
        },
        "inputs": lambda r, B, H: {"hidden_states": r(B, 4, H, H), "encoder_hidden_states": r(B, 2, 5, 16)},
    },
    "CogView3PlusTransformer2DModel": {
        "config": COGVIEW | {"pos_embed_max_size": 8, "sample_size": 8},
        "inputs": lambda r, B, H: picture(r, B, H) | sizes(B, H) | {"original_size": torch.full((B, 2), 8.0 * H)},
    },
    "CogView4Transformer2DModel": {
        "config": COGVIEW | {"sample_size": 8, "rope_axes_dim": (8, 8)},
        "inputs": lambda r, B, H: picture(r, B, H) | sizes(B, H) | {"original_size": torch.full((B, 2), 8.0 * H)},
    },
    "DreamLiteTransformer2DModel": {
        "config": HEADS | {"in_channels": 4, "num_layers": 4, "norm_num_groups": 2, "cross_attention_dim": 16, "ff_mult": 2},
        "inputs": picture,
    },
    "ErnieImageTransformer2DModel": {
        "config": {
            "hidden_size": 16, "num_attention_heads": 2, "num_layers": 4, "ffn_hidden_size": 32, "in_channels": 4,
            "out_channels": 4, "text_in_dim": 16, "rope_axes_dim": (4, 2, 2),
        },
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, 4, H, H), "text_bth": r(B, 5, 16), "text_lens": torch.full((B,), 5),
        },
    },
    "Flux3Transformer2DModel": {
        "config": HEADS | {
            "in_channels": 4, "cond_in_channels": 4, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 16,
            "timestep_channels": 16, "axes_dims_rope": (2, 2, 2, 2),
        },
        "inputs": lambda r, B, H: tokens(r, B, H) | {"img_ids": ids(H * H, 4), "txt_ids": ids(5, 4)},
    },
    "GlmImageTransformer2DModel": {
        "config": COGVIEW | {"prior_vq_quantizer_codebook_size": 8},
        "inputs": lambda r, B, H: picture(r, B, H) | sizes(B, H) | {
            "prior_token_id": torch.zeros(B, H * H // 4).long(), "prior_token_drop": torch.zeros(B, H * H // 4).bool(),
        },
    },
    "HiDreamImageTransformer2DModel": {
        "config": HEADS | {
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
            "caption_channels": [16, 16], "text_emb_dim": 16, "num_routed_experts": 2, "num_activated_experts": 1,
            "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8), "llama_layers": [0, 1, 2, 3], "force_inference_output": True,
        },
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, 4, H, H), "encoder_hidden_states_t5": r(B, 3, 16),
            "encoder_hidden_states_llama3": r(4, B, 3, 16), "pooled_embeds": r(B, 16),
        },
        "time": "timesteps",
    },
    "HunyuanDiT2DModel": {
        "config": HEADS | {
            "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 16, "num_layers": 4, "cross_attention_dim": 16,
            "cross_attention_dim_t5": 16, "pooled_projection_dim": 16, "text_len": 5, "text_len_t5": 6,
        },
        "inputs": hunyuan,
    },
    "HunyuanImageTransformer2DModel": {
        "config": HEADS | {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1,
            "text_embed_dim": 16, "rope_axes_dim": (4, 4),
        },
        "inputs": lambda r, B, H: picture(r, B, H) | {"encoder_attention_mask": torch.ones(B, 5)},
    },
    "Ideogram4Transformer2DModel": {
        "config": {
            "in_channels": 4, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2, "intermediate_size": 16,
            "adaln_dim": 16, "llm_features_dim": 16, "mrope_section": (2, 1, 1),
        },
        "inputs": ideogram,
    },
    "JoyImageEditTransformer3DModel": {
        "config": JOY,
        "inputs": lambda r, B, H: {"hidden_states": r(B, 4, 2, H, H), "encoder_hidden_states": r(B, 5, 16)},
    },
    "JoyImageEditPlusTransformer3DModel": {
        "config": JOY,
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, H * H // 4, 4, 1, 2, 2), "encoder_hidden_states": r(B, 5, 16),
            "shape_list": [[(1, H // 2, H // 2)]] * B,
        },
    },
    "Krea2Transformer2DModel": {
        "config": {
            "in_channels": 4, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 16, "timestep_embed_dim": 16, "text_hidden_dim": 16, "num_text_layers": 2,
            "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 2, 2),
        },
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, H * H, 4), "encoder_hidden_states": r(B, 5, 2, 16), "position_ids": ids(5 + H * H),
        },
    },
    "LongCatImageTransformer2DModel": {
        "config": FLUX | {"pooled_projection_dim": 16, "axes_dims_rope": [2, 2, 4]},
        "inputs": tokens,
    },
    "LuminaNextDiT2DModel": {
        "config": {
            "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 4, "num_attention_heads": 3, "num_kv_heads": 1,
            "multiple_of": 4, "cross_attention_dim": 16,
        },
        "inputs": lambda r, B, H: picture(r, B, H) | {
            "encoder_mask": torch.ones(B, 5), "cross_attention_kwargs": {},
            "image_rotary_emb": torch.ones(8, 8, 4, dtype=torch.complex64),
        },
    },
    "NucleusMoEImageTransformer2DModel": {
        "config": HEADS | {
            "in_channels": 4, "out_channels": 1, "num_layers": 4, "num_key_value_heads": 1, "joint_attention_dim": 16,
            "axes_dims_rope": (2, 2, 4), "num_experts": 2, "moe_intermediate_dim": 8, "capacity_factors": 2.0, "mlp_ratio": 12.0,
            "dense_moe_strategy": "leave_first_block_dense",
        },
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, H * H, 4), "encoder_hidden_states": r(B, 5, 16), "img_shapes": [(1, H, H)] * B,
            "encoder_hidden_states_mask": torch.ones(B, 5, dtype=torch.bool),
        },
    },
    "OmniGenTransformer2DModel": {
        "config": {
            "in_channels": 4, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32,
            "num_layers": 4, "pad_token_id": 0, "vocab_size": 8, "time_step_dim": 16, "pos_embed_max_size": 8,
            "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        },
        "inputs": omnigen,
    },
    "OvisImageTransformer2DModel": {"config": FLUX | {"out_channels": 4}, "inputs": tokens},
    "PRXTransformer2DModel": {
        "config": {"in_channels": 4, "context_in_dim": 16, "hidden_size": 16, "num_heads": 2, "depth": 4, "axes_dim": [4, 4]},
        "inputs": picture,
    },
    "QwenImage21Transformer2DModel": {
        "config": HEADS | {
            "in_channels": 4, "out_channels": 4, "num_layers": 4, "context_in_dim": 16, "axes_dims_rope": (2, 2, 4),
        },
        "inputs": qwen,
    },
    "Transformer2DModel": {
        "config": HEADS | {"in_channels": 4, "num_layers": 4, "norm_num_groups": 2, "cross_attention_dim": 16},
        "inputs": picture,
    },
    "TransformerTemporalModel": {
        "config": HEADS | {"in_channels": 4, "num_layers": 4, "norm_num_groups": 2},
        "inputs": lambda r, B, H: {"hidden_states": r(2 * B, 4, H, H), "num_frames": 2},
    },
    "PriorTransformer": {
        "config": HEADS | {"num_layers": 4, "embedding_dim": 16, "num_embeddings": 5, "additional_embeddings": 4},
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, 16), "proj_embedding": r(B, 16), "encoder_hidden_states": r(B, 5, 16),
        },
    },
}  # fmt: skip
