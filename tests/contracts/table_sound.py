"""Sound and other transformers of diffusers, and our own, at tiny random size, and in words why a class is not run."""

from __future__ import annotations

from typing import Any

import torch

TABLE: dict[str, dict[str, Any]] = {
    "AceStepTransformer1DModel": {
        "config": {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 8,
            "num_key_value_heads": 1, "in_channels": 12, "audio_acoustic_hidden_dim": 4, "encoder_hidden_size": 16,
        },
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, 4 * H, 4), "encoder_hidden_states": r(B, 5, 16), "context_latents": r(B, 4 * H, 8),
            "timestep_r": torch.zeros(B),
        },
    },
    "LongCatAudioDiTTransformer": {
        "config": {"dit_dim": 16, "dit_depth": 4, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 4},
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, 4 * H, 4), "encoder_hidden_states": r(B, 5, 16),
            "encoder_attention_mask": torch.ones(B, 5).bool(),
        },
    },
    "MiniMaxMusic3Transformer1DModel": {
        "config": {
            "in_channels": 4, "condition_dim": 8, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8,
            "ff_inner_dim": 32, "rotary_dim": 4, "fourier_embedding_dim": 16,
        },
        "inputs": lambda r, B, H: {"hidden_states": r(B, 4, 4 * H), "encoder_hidden_states": r(B, 4 * H, 8)},
    },
    "MiniMaxMusic3RVQDepthDecoder": {
        "config": {
            "hidden_size": 16, "num_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "audio_vocab_size": 8,
        },
        "inputs": lambda r, B, H: {"inputs_embeds": r(B, 2 * H, 16)},
        "call": lambda model, given, time: model(**given),
    },
    "StableAudioDiTModel": {
        "config": {
            "sample_size": 16, "in_channels": 4, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2,
            "num_key_value_attention_heads": 1, "out_channels": 4, "cross_attention_dim": 16, "time_proj_dim": 16,
            "global_states_input_dim": 16, "cross_attention_input_dim": 16,
        },
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, 4, 4 * H), "encoder_hidden_states": r(B, 5, 16), "global_hidden_states": r(B, 1, 16),
            "rotary_embedding": (torch.ones(4 * H + 1, 4), torch.zeros(4 * H + 1, 4)),
        },
    },
    "StableAudio3DiTModel": {
        "config": {
            "io_channels": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "cond_token_dim": 16, "global_cond_dim": 16,
            "local_add_cond_dim": 4, "timestep_features_dim": 16, "num_memory_tokens": 2,
        },
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, 4, 4 * H), "encoder_hidden_states": r(B, 5, 16), "global_hidden_states": r(B, 16),
        },
    },
    "T5FilmDecoder": {
        "config": {
            "input_dims": 4, "targets_length": 32, "d_model": 16, "num_layers": 4, "num_heads": 2, "d_kv": 8, "d_ff": 32,
        },
        "inputs": lambda r, B, H: {
            "decoder_input_tokens": r(B, 4 * H, 4), "encodings_and_masks": [(r(B, 5, 16), torch.ones(B, 5))],
        },
        "time": "decoder_noise_time",
        "call": lambda model, given, time: model(
            **given, decoder_noise_time=torch.full((len(given["decoder_input_tokens"]),), time)
        ),
    },
    "DiT": {
        "home": "dit.backbones.dit",
        "config": {"patch_size": 1, "sample_size": 4, "width": 16, "depth": 4, "heads": 2, "num_classes": 4},
        "inputs": lambda r, B, H: {"hidden_states": r(B, 4, H, H), "class_labels": torch.arange(B)},
    },
    "MMDiT": {
        "home": "dit.backbones.mmdit",
        "config": {
            "patch_size": 1, "sample_size": 4, "width": 16, "heads": 2, "dual_depth": 2, "single_depth": 2, "context_dim": 16,
            "pooled_dim": 16,
        },
        "inputs": lambda r, B, H: {
            "hidden_states": r(B, 3, H, H), "encoder_hidden_states": r(B, 5, 16), "pooled_projections": r(B, 16),
        },
    },
    "EMMDiT": {
        "home": "dit.backbones.emmdit",
        "config": {
            "in_channels": 4, "sample_size": 4, "width": 16, "heads": 2, "groups": [2, 3, 2], "context_dim": 16,
        },
        "inputs": lambda r, B, H: {"hidden_states": r(B, 4, H, H), "encoder_hidden_states": r(B, 5, 16)},
        "joins": 2,  # tokens are compressed, and reconstructed
    },
}  # fmt: skip

# Classes that cannot stand alone at tiny size, and why.
UNBUILT: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": "its training forward compiles flex attention, its inference forward writes a K/V cache",
    "WanAnimate2Transformer3DModel": "its second pass needs compiled flex attention, and every pass writes or reads a K/V cache",
    "RFD4ProteinaTransformer": "its inputs are some forty features of a protein, prepared by its pipeline",
}

# What some classes refuse at this size, and how that is said; a refusal that is not listed here fails the test.
REFUSED: dict[str, str] = {
    "HunyuanDiT2DModel": "long skips.*reuse the rear or the whole stack",
    "SanaTransformer2DModel": "cross-attention",  # its self-attention is linear, as is that of the next
    "SanaVideoTransformer3DModel": "cross-attention",
    "OmniGenTransformer2DModel": "an additive mask",
    "MiniMaxMusic3RVQDepthDecoder": "causal",
    "T5FilmDecoder": "does not use scaled_dot_product_attention",
    "Kandinsky6SRTransformer3DModel": "does not use scaled_dot_product_attention",  # flex attention, sparse by itself
    "QwenImage21Transformer2DModel": "min_tokens",  # short stretches, one after the other
    "TransformerTemporalModel": "min_tokens",  # hears two frames
    "PriorTransformer": "min_tokens",  # eight tokens
    "Cosmos3OmniTransformer": "min_tokens",
}
