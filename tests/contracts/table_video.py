"""Video and world transformers of diffusers at tiny random size: build arguments and inputs, nothing else."""

from __future__ import annotations

from typing import Any

import torch

HEADS: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 2}
WAN: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_layers": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32,
    "attention_head_dim": 12, "num_attention_heads": 2,
}  # fmt: skip
HUNYUAN: dict[str, Any] = HEADS | {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16,
    "rope_axes_dim": (2, 2, 4),
}  # fmt: skip
LTX2: dict[str, Any] = HEADS | {
    "in_channels": 4, "out_channels": 4, "num_layers": 4, "cross_attention_dim": 16, "audio_in_channels": 4,
    "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8,
    "caption_channels": 16, "rope_double_precision": False,
}  # fmt: skip


def clip(r: Any, B: int, H: int) -> dict[str, Any]:
    return {"hidden_states": r(B, 4, 2, H, H), "encoder_hidden_states": r(B, 5, 16)}


def frames_first(r: Any, B: int, H: int) -> dict[str, Any]:
    return {"hidden_states": r(B, 2, 4, H, H), "encoder_hidden_states": r(B, 5, 16)}


def framepack(r: Any, B: int, H: int) -> dict[str, Any]:
    past = {
        "latents_clean": r(B, 4, 2, H, H),
        "latents_history_2x": r(B, 4, 2, H, H),
        "latents_history_4x": r(B, 4, 4, H, H),
    }
    places = {f"indices_{name}": torch.arange(x.shape[2]) for name, x in past.items()}
    return clip(r, B, H) | past | places | {
        "encoder_attention_mask": torch.ones(B, 5).long(), "pooled_projections": r(B, 16), "image_embeds": r(B, 3, 16),
        "indices_latents": torch.arange(2),
    }  # fmt: skip


def kandinsky5(r: Any, B: int, H: int) -> dict[str, Any]:
    places = tuple(torch.arange(n) for n in (2, H // 2, H // 2))
    return {
        "hidden_states": r(B, 2, H, H, 4), "encoder_hidden_states": r(B, 5, 16), "pooled_projections": r(B, 16),
        "visual_rope_pos": places, "text_rope_pos": torch.arange(5),
    }  # fmt: skip


def ltx2(r: Any, B: int, H: int) -> dict[str, Any]:
    return {
        "hidden_states": r(B, 2 * H * H, 4), "audio_hidden_states": r(B, 3, 4), "encoder_hidden_states": r(B, 5, 16),
        "audio_encoder_hidden_states": r(B, 5, 16), "num_frames": 2, "height": H, "width": H, "audio_num_frames": 3,
    }  # fmt: skip


def minimax(r: Any, B: int, H: int) -> dict[str, Any]:
    N = 2 * H * H // 4
    total = 5 + N + 3
    tags = torch.tensor([0] * 5 + [1] * N + [2] * 3)
    return {
        "hidden_states": r(B, N, 16), "audio_hidden_states": r(B, 3, 4), "encoder_hidden_states": r(B, 5, 16),
        "timestep_indices": torch.zeros(total).long(), "token_tags": tags,
        "position_ids": torch.arange(total)[:, None].repeat(1, 3),
        "text_indices": torch.arange(5), "video_indices": 5 + torch.arange(N), "audio_indices": 5 + N + torch.arange(3),
    }  # fmt: skip


def cosmos3(r: Any, B: int, H: int) -> dict[str, Any]:
    N = H * H // 4
    places = torch.arange(5 + N)[None].repeat(3, 1)
    return {
        "vision_tokens": [r(1, 4, 1, H, H)], "input_ids": torch.arange(5), "text_indexes": torch.arange(5), "position_ids": places,
        "und_len": 5, "sequence_length": 5 + N, "vision_token_shapes": [(1, H // 2, H // 2)],
        "vision_sequence_indexes": 5 + torch.arange(N), "vision_mse_loss_indexes": 5 + torch.arange(N),
        "vision_noisy_frame_indexes": [torch.arange(1)],
    }  # fmt: skip


TABLE: dict[str, dict[str, Any]] = {
    "AllegroTransformer3DModel": {
        "config": {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 4,
            "cross_attention_dim": 24, "caption_channels": 16, "sample_height": 4, "sample_width": 4, "sample_frames": 2,
        },
        "inputs": lambda r, B, H: clip(r, B, H) | {
            "image_rotary_emb": [
                [(torch.ones(H, 4), torch.zeros(H, 4))] * 3, [torch.arange(H * H // 2)[None] % H] * 3
            ],
        },
    },
    "AnyFlowTransformer3DModel": {
        "config": WAN,
        "inputs": lambda r, B, H: frames_first(r, B, H) | {"r_timestep": torch.zeros(B, 2)},
        "call": lambda model, given, time: model(
            **given, timestep=torch.full(given["r_timestep"].shape, time), return_dict=False
        )[0],
    },
    "ChronoEditTransformer3DModel": {"config": WAN | {"rope_temporal_skip_len": 1}, "inputs": clip},
    "ConsisIDTransformer3DModel": {
        "config": HEADS | {
            "in_channels": 4, "out_channels": 4, "num_layers": 4, "time_embed_dim": 8, "text_embed_dim": 16, "sample_width": 4,
            "sample_height": 4, "sample_frames": 5, "max_text_seq_length": 5, "is_train_face": True, "cross_attn_dim_head": 4,
            "cross_attn_num_heads": 2, "LFE_id_dim": 4, "LFE_vit_dim": 4, "LFE_depth": 5, "LFE_dim_head": 4, "LFE_num_heads": 2,
            "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 10,
        },
        "inputs": lambda r, B, H: frames_first(r, B, H) | {
            "id_vit_hidden": [r(B, 2, 4) for _ in range(5)], "id_cond": r(B, 4),
        },
    },
    "CosmosTransformer3DModel": {
        "config": {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 4,
            "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 8, 8), "encoder_hidden_states_channels": 16,
            "crossattn_proj_in_channels": 16, "controlnet_block_every_n": 2, "concat_padding_mask": False,
        },
        "inputs": lambda r, B, H: clip(r, B, H) | {"fps": 16},
        "residuals": lambda r, N: {"block_controlnet_hidden_states": [r(1, N // 2, 24) for _ in range(2)]},
    },
    "Cosmos3OmniTransformer": {
        "config": {
            "head_dim": 8, "hidden_size": 16, "intermediate_size": 32, "latent_channel": 4, "num_attention_heads": 2,
            "num_hidden_layers": 4, "num_key_value_heads": 1, "patch_latent_dim": 16, "vocab_size": 8, "dtype": "float32",
            "rope_axes_dim": (2, 1, 1),
        },
        "inputs": cosmos3,
        "call": lambda model, given, time: model(
            **given, vision_timesteps=torch.full((len(given["vision_sequence_indexes"]),), time), return_dict=False
        )[0],
    },
    "EasyAnimateTransformer3DModel": {
        "config": {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2,
            "sample_width": 4, "sample_height": 4, "num_layers": 4, "mmdit_layers": 2, "time_embed_dim": 8, "text_embed_dim": 16,
        },
        "inputs": clip,
    },
    "HeliosTransformer3DModel": {
        "config": WAN | {"rope_dim": (4, 4, 4), "has_multi_term_memory_patch": False, "guidance_cross_attn": False},
        "inputs": clip,
    },
    "HunyuanVideo15Transformer3DModel": {
        "config": HUNYUAN | {"num_layers": 4, "text_embed_2_dim": 16, "image_embed_dim": 16, "task_type": "t2v"},
        "inputs": lambda r, B, H: clip(r, B, H) | {
            "encoder_attention_mask": torch.ones(B, 5), "encoder_hidden_states_2": r(B, 3, 16),
            "encoder_attention_mask_2": torch.ones(B, 3), "image_embeds": r(B, 3, 16),
        },
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        "config": HUNYUAN | {
            "num_single_layers": 2, "guidance_embeds": False, "pooled_projection_dim": 16, "has_image_proj": True,
            "image_proj_dim": 16, "has_clean_x_embedder": True,
        },
        "inputs": framepack,
    },
    "Kandinsky5Transformer3DModel": {
        "config": {
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16, "time_dim": 16, "model_dim": 16,
            "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 4, "axes_dims": (4, 2, 2),
        },
        "inputs": kandinsky5,
        "call": lambda model, given, time: model(
            **given, timestep=torch.full((len(given["hidden_states"]),), time), return_dict=True
        ).sample,
    },
    "Kandinsky6Transformer3DModel": {
        "config": {
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16, "time_dim": 16, "model_dim": 16,
            "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 4, "axes_dims": (4, 2, 2), "visual_cond": False,
            "in_audio_dim": 4, "out_audio_dim": 4, "model_dim_a": 16, "time_dim_a": 16, "ff_dim_a": 32, "axes_dims_a": (4, 2, 2),
        },
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, 2, H, H, 4), "encoder_hidden_states": r(B, 5, 16), "pooled_projections": r(B, 16),
            "audio_hidden_states": r(B, 3, 4),
        },
    },
    "Kandinsky6SRTransformer3DModel": {
        "config": {
            "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 16, "ff_dim": 32, "num_visual_blocks": 2,
            "axes_dims": (4, 2, 2),
        },
        "inputs": lambda r, B, H: {"hidden_states": r(B, 1, 2 * H, 2 * H, 9)},
    },
    "LTXVideoTransformer3DModel": {
        "config": HEADS | {
            "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "num_layers": 4, "caption_channels": 16,
        },
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, 2 * H * H, 4), "encoder_hidden_states": r(B, 5, 16),
            "encoder_attention_mask": torch.ones(B, 5), "num_frames": 2, "height": H, "width": H,
        },
    },
    "LTX2VideoTransformer3DModel": {"config": LTX2, "inputs": ltx2},
    "MiniMaxH3Transformer3DModel": {
        "config": {
            "num_attention_heads": 2, "attention_head_dim": 8, "hidden_size": 16, "num_layers": 4, "num_refiner_layers": 1,
            "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 4, "text_dim": 16, "freq_dim": 16, "time_embed_hidden_dim": 16,
            "time_embed_dim": 16, "rope_freq_dim": 1,
        },
        "inputs": minimax,
    },
    "MochiTransformer3DModel": {
        "config": HEADS | {
            "num_layers": 4, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4,
            "max_sequence_length": 5,
        },
        "inputs": lambda r, B, H: clip(r, B, H) | {"encoder_attention_mask": torch.ones(B, 5).bool()},
    },
    "MotifVideoTransformer3DModel": {
        "config": HEADS | {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 3, "num_decoder_layers": 1,
            "text_embed_dim": 16, "rope_axes_dim": (2, 2, 4),
        },
        "inputs": clip,
    },
    "SanaVideoTransformer3DModel": {
        "config": {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 4,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16,
        },
        "inputs": clip,
        "residuals": lambda r, N: {"controlnet_block_samples": tuple(r(1, N // 2, 24) for _ in range(3))},
    },
    "SanaWMTransformer3DModel": {
        "config": {
            "in_channels": 4, "num_layers": 4, "hidden_size": 24, "num_attention_heads": 2, "linear_head_dim": 12,
            "caption_channels": 16, "chunk_plucker_post_attn_blocks": 0, "use_chunk_plucker_post_attn": False, "image_size": 32,
        },
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, 4, 2, H, H), "encoder_hidden_states": r(B, 1, 5, 16), "encoder_attention_mask": torch.ones(B, 5),
        },
        "call": lambda model, given, time: model(
            **given, timestep=torch.full((len(given["hidden_states"]), 1, 2), 1000 * time), return_dict=False
        )[0],
    },
    "SanaWMLTX2RefinerTransformer3DModel": {
        "config": LTX2,
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, H * H, 4), "encoder_hidden_states": r(B, 5, 16),
            "video_rotary_emb": (torch.ones(B, H * H, 16), torch.zeros(B, H * H, 16)),
        },
    },
    "SkyReelsV2Transformer3DModel": {"config": WAN, "inputs": clip},
    "WanAnimateTransformer3DModel": {
        "config": WAN | {
            "in_channels": 12, "latent_channels": 4, "image_dim": 16, "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
        },
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, 12, 2, H, H), "encoder_hidden_states": r(B, 5, 16), "encoder_hidden_states_image": r(B, 3, 16),
            "pose_hidden_states": r(B, 4, 1, H, H), "face_pixel_values": r(B, 3, 4, 16, 16),
        },
    },
    "WanVACETransformer3DModel": {
        "config": WAN | {"vace_layers": [0, 2], "vace_in_channels": 4},
        "inputs": lambda r, B, H: clip(r, B, H) | {"control_hidden_states": r(B, 4, 2, H, H)},
    },
}  # fmt: skip
