"""E-MMDiT in the text-to-image pipeline: diffusers' AutoencoderDC for the pixels, a decoder-only language model for the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from acceleration.base import accelerated
from acceleration.delta_cache import DeltaCache
from dit.backbones.emmdit import EMMDiT
from dit.text import encode_padded
from pipelines import autoencoder, catalog
from pipelines.generate import generate
from pipelines.request import Request, RequestError
from pipelines.text_to_image import TextToImagePipeline

LENGTH = 12


def tokenizer() -> PreTrainedTokenizerFast:
    """As of a Llama: a start mark, an end mark, nothing to pad with."""
    words = ["<unk>", "<s>", "</s>", "a", "red", "green", "cat", "dog", "house"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=4096
    )


def language_model(kind: Any = transformers.LlamaModel) -> Any:
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return kind(config).eval()


def codec() -> Any:
    """Four times smaller sides, four channels, the scaling factor of DC-AE f32c32."""
    torch.manual_seed(3)
    return diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(4, 8, 8),
        decoder_block_out_channels=(4, 8, 8), encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = EMMDiT(
        in_channels=4,
        sample_size=8,
        width=32,
        heads=2,
        groups=[1, 2, 1],
        ratios=[2, 4],
        context_dim=20,
        projection_dims=[],
    )
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    place = tmp_path_factory.mktemp("emmdit") / "model"
    TextToImagePipeline(
        transformer=network.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=language_model(),
        tokenizer=tokenizer(), vae=codec(), text_length=LENGTH, text_padding="heard",
    ).save_pretrained(place)  # fmt: skip
    return place


@pytest.fixture
def pipe(folder: Path) -> Iterator[Any]:
    made = TextToImagePipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    yield made
    catalog.unload()


def draw(pipe: Any, prompt: Any = "a red cat", seeds: Any = (3,), steps: int = 4, **more: Any) -> np.ndarray:
    return np.asarray(
        pipe(prompt, seeds=seeds, num_inference_steps=steps, **({"output_type": "np"} | more)).images
    )


def test_a_saved_pipeline_draws_any_size(pipe: Any) -> None:
    assert isinstance(pipe.transformer, EMMDiT)
    assert isinstance(pipe.vae, diffusers.AutoencoderDC)
    assert (pipe.scale_factor, pipe.multiple, pipe.latent_channels) == (4, 4, 4)
    picture = draw(pipe)
    assert picture.shape == (1, 32, 32, 3)
    assert picture.std() > 0.01
    assert draw(pipe, height=20, width=48).shape == (1, 20, 48, 3)
    with pytest.raises(RequestError, match="a multiple of 4 px"):
        draw(pipe, height=18)


def test_the_network_hears_all_places_and_no_mask(pipe: Any) -> None:
    seen: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    draw(pipe, ["a cat", "a red green cat"], (1, 2), steps=1)
    assert set(seen[0]) == {"hidden_states", "timestep", "encoder_hidden_states", "return_dict"}
    assert seen[0]["encoder_hidden_states"].shape == (4, LENGTH, 20)
    assert pipe.prompt_lengths == (1, 1, 3, 5)
    empty = encode_padded(pipe.tokenizer, pipe.text_encoder, [""], length=LENGTH).tokens
    assert torch.allclose(
        seen[0]["encoder_hidden_states"][:1], empty, atol=1e-6
    )  # the null prompt is the encoded ""


def test_prompt_seed_and_guidance_decide(pipe: Any) -> None:
    plain = draw(pipe)
    assert np.array_equal(plain, draw(pipe))
    assert np.allclose(plain, draw(pipe, guidance_mode="sequential"), atol=2e-5)
    assert np.allclose(plain[0], draw(pipe, ["a dog", "a red cat"], (9, 3))[1], atol=2e-5)
    for other in (draw(pipe, "a green house"), draw(pipe, seeds=(4,)), draw(pipe, guidance_scale=1.0)):
        assert not np.allclose(plain, other, atol=1e-3)


def test_a_picture_to_start_from_is_encoded_and_scaled(pipe: Any) -> None:
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    latents = autoencoder.encode(pipe.vae, pixels)
    with torch.no_grad():
        assert torch.allclose(latents, pipe.vae.encode(pixels).latent * 0.41407)
        back = autoencoder.decode(pipe.vae, latents)
        assert torch.allclose(back, pipe.vae.decode(latents / 0.41407).sample)
    start = diffusers.image_processor.VaeImageProcessor().postprocess(pixels)[0]
    assert not np.allclose(draw(pipe, image=start, strength=0.5), draw(pipe), atol=1e-3)


@pytest.mark.parametrize("shift", [None, 0.06])
def test_variational_autoencoders_keep_their_way(shift: float | None) -> None:
    torch.manual_seed(5)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=1, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=shift,
    ).eval()  # fmt: skip
    pixels = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        latents = autoencoder.encode(vae, pixels)
        assert autoencoder.scale_of(vae) == 2
        assert torch.allclose(latents / 0.5 + (shift or 0), vae.encode(pixels).latent_dist.mode(), atol=1e-5)
        assert torch.equal(autoencoder.decode(vae, latents), vae.decode(latents / 0.5 + (shift or 0)).sample)


def test_states_are_those_of_the_last_layer_with_or_without_a_language_head() -> None:
    bare, headed = language_model(), language_model(transformers.LlamaForCausalLM)
    headed.model.load_state_dict(bare.state_dict())
    words = tokenizer()
    found = encode_padded(words, bare, ["a cat", ""], length=6)
    assert torch.equal(found.tokens, encode_padded(words, headed, ["a cat", ""], length=6).tokens)
    assert found.mask.tolist() == [[True] * 3 + [False] * 3, [True] + [False] * 5]
    ids = torch.tensor([[1, 3, 6]])
    with torch.no_grad():
        assert torch.allclose(found.tokens[:1, :3], bare(input_ids=ids).last_hidden_state, atol=1e-5)
    assert found.tokens[:, 3:].any(), "padding keeps the states the model gave it"
    assert found.tokens.isfinite().all()
    cut = encode_padded(words, bare, ["a red green cat"], length=3)
    assert cut.counts == (5,)
    assert torch.allclose(
        cut.tokens, encode_padded(words, bare, ["a red green cat"], length=6).tokens[:, :3], atol=1e-5
    )


def test_any_language_model_will_do() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=20, n_layer=1, n_head=2, n_positions=32, eos_token_id=2
    )
    found = encode_padded(tokenizer(), transformers.GPT2LMHeadModel(config).eval(), ["a cat"], length=8)
    assert found.tokens.shape == (1, 8, 20)


def test_how_prompts_are_padded_is_checked(pipe: Any) -> None:
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    with pytest.raises(RequestError, match="masked, heard"):
        TextToImagePipeline(**parts, text_padding="longest")


def test_generate_takes_the_folder(folder: Path, pipe: Any) -> None:
    request = Request(model=str(folder), prompt="a red cat", seed=3, steps=4, guidance=4.0)
    result = generate(request)
    assert np.abs(np.asarray(result.images[0]) / 255 - draw(pipe)[0]).max() < 3e-3


def test_an_accelerator_leaves_blocks_out(pipe: Any) -> None:
    plain = draw(pipe, steps=8)
    with accelerated(pipe.transformer, DeltaCache(interval=2)) as run:
        fast = draw(pipe, steps=8)
    report = run.report()
    assert report.reused > 0
    assert not np.array_equal(plain, fast)
