"""Tiny random pipelines, saved once a session: ours, and seven families of diffusers."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dit.backbones.mmdit import MMDiT
from dit.codec import ResampleCodec
from pipelines import catalog
from pipelines.text_to_image import TextToImagePipeline

WORDS = [
    "a",
    "an",
    "the",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "fish",
    "house",
    "tree",
    "of",
    "on",
    "in",
    "sticker",
    "photo",
]
Build = Callable[[], Any]


def tokenizer(length: int = 24) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few English words, one number each."""
    known = ["<pad>", "<unk>", "<s>", "</s>", *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=length,
    )


def ours() -> TextToImagePipeline:
    """Build our text-to-image pipeline: 32 px pictures from 16 px latents."""
    torch.manual_seed(0)
    transformer = MMDiT(
        patch_size=4,
        sample_size=16,
        width=32,
        heads=2,
        dual_depth=2,
        single_depth=2,
        context_dim=16,
        pooled_dim=16,
    )
    for parameter in transformer.parameters():  # zero gates would hide the text
        torch.nn.init.normal_(parameter, std=0.15)
    codec = ResampleCodec(width=8, depth=1)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return TextToImagePipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.5),
        text_encoder=transformers.BertModel(config, add_pooling_layer=False).eval(),
        tokenizer=tokenizer(),
        codec=codec.eval(),
        text_length=16,
    )


def clip(projection: bool = False) -> Any:
    """Build a tiny CLIP text encoder."""
    config = transformers.CLIPTextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, projection_dim=32, bos_token_id=2, eos_token_id=3, pad_token_id=0, hidden_act="gelu",
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(
        config
    ).eval()


def t5(kind: Any = transformers.T5EncoderModel, config: Any = transformers.T5Config) -> Any:
    """Build a tiny T5 encoder."""
    return kind(
        config(
            vocab_size=32,
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=1,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def gemma() -> Any:
    """Build a tiny Gemma 2."""
    config = transformers.Gemma2Config(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, attn_implementation="eager",
    )  # fmt: skip
    return transformers.Gemma2Model(config).eval()


def vae(channels: int = 4, blocks: int = 1, **more: Any) -> Any:
    """Build a tiny autoencoder; every block beyond the first halves the size."""
    return diffusers.AutoencoderKL(
        sample_size=32, block_out_channels=(4,) * blocks, layers_per_block=1, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=1, **more,
    ).eval()  # fmt: skip


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=clip(), tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(), transformer=transformer,
    )  # fmt: skip


def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=clip(True), tokenizer=tokenizer(), text_encoder_2=clip(True), tokenizer_2=tokenizer(),
        text_encoder_3=t5(), tokenizer_3=tokenizer(),
    )  # fmt: skip


def pixart() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=vae(),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=32,
    )  # fmt: skip
    codec = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        tokenizer=tokenizer(400), text_encoder=gemma(), vae=codec.eval(), transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def wan() -> Any:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32,
        freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    codec = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return diffusers.WanPipeline(
        tokenizer=tokenizer(), text_encoder=t5(transformers.UMT5EncoderModel, transformers.UMT5Config), vae=codec.eval(),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
    )  # fmt: skip


def wan22() -> Any:
    """Two transformers, one for each half of the noise levels."""
    first, second = wan(), wan()
    return diffusers.WanPipeline(
        **{name: part for name, part in first.components.items() if name not in ("transformer_2", "boundary_ratio")},
        transformer_2=second.transformer, boundary_ratio=0.8,
    )  # fmt: skip


def lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=8, num_layers=2, num_attention_heads=1, num_kv_heads=1,
        multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(300, 512, 512), cap_feat_dim=8,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(4, 4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06), text_encoder=gemma(),
        tokenizer=tokenizer(300),
    )  # fmt: skip


def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=4, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, attention_bias=True, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return diffusers.DiTPipeline(
        transformer=transformer.eval(), vae=vae(), scheduler=diffusers.DDIMScheduler()
    )


BUILDERS: dict[str, Build] = {
    "ours": ours, "flux": flux, "sd3": sd3, "pixart": pixart, "sana": sana, "wan": wan, "wan22": wan22,
    "lumina2": lumina2, "dit": dit,
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """Leave the libraries' remarks about tiny models out of the output."""
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the saved folder of a family, built when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            torch.manual_seed(1)
            BUILDERS[name]().save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture
def tiny(folder_of: Callable[[str], Path]) -> str:
    """Return our tiny model's folder as a model name."""
    return str(folder_of("ours"))


@pytest.fixture
def copy_of(folder_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a fresh copy of a saved family, to be broken."""

    def copy(name: str = "ours") -> Path:
        return Path(shutil.copytree(folder_of(name), tmp_path / f"copy of {name}"))

    return copy


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Start and end without loaded models."""
    catalog.unload()
    yield
    catalog.unload()
