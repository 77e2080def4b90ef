"""diffusers' video families behind our door: Wan, HunyuanVideo, CogVideoX and LTX at tiny size, saved by diffusers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import app_tasks
from pipelines import catalog, clip_memory, previews
from pipelines.clip_memory import Estimate, estimate
from pipelines.families import Face
from pipelines.generate import generate
from pipelines.inputs import read_inputs
from pipelines.repro import repro
from pipelines.request import Request, RequestError

SIZE = {"width": 32, "height": 32, "frames": 9, "steps": 8, "seed": 3, "device": "cpu"}


def hunyuan(parts: Any) -> Any:
    network = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=2,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=32, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    llama = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    clip = transformers.CLIPTextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, bos_token_id=2,
        max_position_embeddings=77, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(
        transformer=network, vae=vae.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=transformers.LlamaModel(llama).eval(), tokenizer=parts.tokenizer,
        text_encoder_2=transformers.CLIPTextModel(clip).eval(), tokenizer_2=parts.tokenizer,
    )  # fmt: skip


def cogvideox(parts: Any) -> Any:
    network = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=32,
        num_layers=2, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=226,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, latent_channels=4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=32, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
        )
    )  # fmt: skip
    return diffusers.CogVideoXPipeline(
        transformer=network, vae=vae.eval(), scheduler=diffusers.CogVideoXDDIMScheduler(), text_encoder=t5.eval(),
        tokenizer=parts.tokenizer,
    )  # fmt: skip


def ltx(parts: Any, old: bool = False, late: bool = False) -> Any:
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32, num_layers=2,
        caption_channels=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False), patch_size=1,
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=late,
    )  # fmt: skip
    return diffusers.LTXPipeline(
        transformer=network, vae=vae.eval(), text_encoder=cogvideox(parts).text_encoder, tokenizer=parts.tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=old),
    )  # fmt: skip


def wan_i2v(parts: Any) -> Any:
    network = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=32,
        freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.WanImageToVideoPipeline(
        tokenizer=parts.tokenizer, text_encoder=parts.text_encoder, vae=parts.vae, scheduler=parts.scheduler, transformer=network
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(folder_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the saved folder of a family as a model name."""
    made: dict[str, str] = {"wan": str(folder_of("wan"))}
    builders = {
        "hunyuan": hunyuan,
        "cogvideox": cogvideox,
        "ltx": ltx,
        "wan-i2v": wan_i2v,
        "old-ltx": lambda p: ltx(p, old=True),
        "late-ltx": lambda p: ltx(p, late=True),
    }

    def folder(name: str) -> str:
        if name not in made:
            torch.manual_seed(1)
            place = tmp_path_factory.mktemp(name) / "model"
            builders[name](diffusers.WanPipeline.from_pretrained(made["wan"])).save_pretrained(place)
            made[name] = str(place)
        return made[name]

    yield folder
    catalog.unload()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("film")
    for index, one in enumerate(np.random.default_rng(2).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(one).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize(("name", "fps"), [("wan", 16), ("hunyuan", 15), ("cogvideox", 8), ("ltx", 25)])
def test_every_family_makes_a_clip_exactly_and_faster(
    name: str, fps: float, model: Any, tmp_path: Path
) -> None:
    asked = Request(**({"prompt": "a red cat", "model": model(name)} | SIZE))
    exact = generate(asked)
    assert len(exact.clips[0]) == 9
    assert exact.report["effective"]["fps"] == fps
    assert not exact.report["warnings"]
    rounded = generate(asked.replace(frames=8))
    assert rounded.report["pixels"] == exact.report["pixels"]
    assert rounded.report["warnings"] == ["asked for 8 frames, made 9: the nearest that it can"]
    for method in ("delta-cache:interval=2,warmup=1", "taylor-cache"):
        fast = generate(asked.replace(accelerators=(method,)))
        run = fast.report["run"]
        assert 0 < run["computed"] < exact.report["run"]["computed"]
        assert fast.report["pixels"] != exact.report["pixels"]
    if name == "wan":
        (path,) = exact.save(tmp_path / "clip.mp4")
        verdict = repro(path, model=asked.model)
        assert verdict.verdict == "identical", str(verdict)
        sparse = generate(
            asked.replace(
                accelerators=("adaspa:min_tokens=8,rows=4,block=4,measure=false,density=0.3,guard=0",)
            )
        )
        rows = [one for one in sparse.report["run"]["attention"] if one["sparse"]]
        assert rows
        assert all(one["density"] < 1 for one in rows)
        assert sparse.report["pixels"] != exact.report["pixels"]
    assert generate(asked).report["pixels"] == exact.report["pixels"]


@pytest.mark.parametrize(("name", "side"), [("hunyuan", 96), ("cogvideox", 128)])
def test_sparse_attention_beside_a_prompt_in_the_same_sequence(name: str, side: int, model: Any) -> None:
    """Both pad prompts to 226 or 256 tokens, and tiles with text are always kept: only a clip longer than that can gain."""
    small = Request(**({"prompt": "a red cat", "model": model(name)} | SIZE | {"steps": 3}))
    large = small.replace(width=side, height=side)
    exact = generate(large).report["pixels"]
    for method in (
        "adaspa:min_tokens=8,rows=4,block=4,measure=false,density=0.3,guard=0",
        "xattention:threshold=0.3,stride=2,rows=16,block=16,min_tokens=8,measure=false",
    ):
        fast = generate(large.replace(accelerators=(method,)))
        rows = [one for one in fast.report["run"]["attention"] if one["sparse"]]
        assert rows
        assert all(one["density"] < 0.9 for one in rows)
        assert fast.report["pixels"] != exact
        words = generate(small.replace(accelerators=(method,))).report["summary"]
        assert "every attention call was dense (its prompt lies in" in words
        assert "of the tiles, which are always kept)" in words


def test_first_and_last_pictures_where_the_family_has_them(model: Any, pictures: Path) -> None:
    first = {"image": str(pictures / "0.png")}
    both = first | {"last_image": str(pictures / "8.png")}
    for name, one, two in (
        ("wan-i2v", "WanImageToVideoPipeline", "WanImageToVideoPipeline"),
        ("ltx", "LTXImageToVideoPipeline", "LTXConditionPipeline"),
    ):
        asked = Request(**({"prompt": "a red cat", "model": model(name)} | SIZE | {"steps": 2}))
        made = [generate(asked.replace(**more)).report for more in (first, both)]
        assert [report["effective"]["pipeline"] for report in made] == [one, two]
        assert made[0]["pixels"] != made[1]["pixels"]
        assert made[1]["last_image"]["name"] == "8.png"


def test_a_given_clip_is_gone_on_from_or_made_over(model: Any, pictures: Path) -> None:
    for name, kind, frames in (
        ("ltx", "LTXConditionPipeline", 17),
        ("wan", "WanVideoToVideoPipeline", 9),
        ("cogvideox", "CogVideoXVideoToVideoPipeline", 9),
    ):
        asked = Request(
            **(
                {"prompt": "a red cat", "model": model(name)}
                | SIZE
                | {"steps": 2, "frames": frames, "clip": str(pictures)}
            )
        )
        report = generate(asked).report
        assert (report["effective"]["pipeline"], report["effective"]["frames"]) == (kind, frames)


@pytest.mark.parametrize(
    ("name", "more", "field", "words"),
    [
        ("wan", {"image": "0.png"}, "image", "cannot start from a picture"),
        ("hunyuan", {"image": "0.png"}, "image", "cannot start from a picture"),
        ("cogvideox", {"image": "0.png"}, "image", "cannot start from a picture"),
        ("wan", {"last_image": "0.png"}, "last_image", "takes no last picture"),
        ("hunyuan", {"clip": "."}, "clip", "cannot start from a clip"),
        ("cogvideox", {"last_image": "0.png"}, "last_image", "takes no last picture"),
        ("old-ltx", {"clip": "."}, "clip", "LTX-Video 0.9.5"),
        ("ltx", {"clip": "."}, "clip", "fewer than the 9"),
        ("wan-i2v", {}, "image", "starts from one"),
        ("wan", {"window": 4}, "window", "has no such thing"),
        ("wan", {"prompt": "", "prompts": "a | b"}, "prompts", "hears one prompt"),
    ],
)
def test_what_a_family_cannot_do_is_refused_in_words(
    name: str, more: dict[str, Any], field: str, words: str, model: Any, pictures: Path
) -> None:
    paths = {
        key: str(pictures / value) if key in ("image", "last_image", "clip") else value
        for key, value in more.items()
    }
    catalog.unload()
    with pytest.raises(RequestError, match=words) as caught:
        generate(Request(**({"prompt": "a cat", "model": model(name)} | SIZE | paths)))
    assert caught.value.field == field
    assert not catalog._loaded or words == "fewer than the 9", "nothing loads"


@pytest.mark.parametrize("name", ["wan", "wan-i2v", "hunyuan", "cogvideox", "ltx", "old-ltx"])
def test_a_folder_tells_of_a_family_what_the_loaded_pipeline_does(name: str, model: Any) -> None:
    told = Face.in_folder(Path(model(name)))
    assert told == Face.of(catalog.load(model(name)).pipeline)
    assert told is not None
    assert (told.hears_pictures, told.shifts) == (name == "wan-i2v", name == "old-ltx")


def test_sides_of_ltx_are_multiples_of_what_its_autoencoder_says(model: Any) -> None:
    _, card = catalog.prepare(catalog.find(model("ltx")))
    pipeline = catalog.load(model("ltx")).pipeline
    assert card.multiple == pipeline.vae_spatial_compression_ratio * pipeline.transformer_spatial_patch_size == 4


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("wan", ()), ("hunyuan", ()), ("cogvideox", ()), ("ltx", ()), ("ltx", ("image",)), ("ltx", ("image", "last_image")),
        ("late-ltx", ()), ("wan-i2v", ("image",)),
    ],
)  # fmt: skip
def test_every_family_shows_its_middle_frame_while_it_is_made(
    name: str, given: tuple[str, ...], model: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previews, "PAUSE", 0.0)
    monkeypatch.setattr(previews, "SHARE", 0)
    paths = {field: str(pictures / "0.png") for field in given}
    asked = Request(**({"prompt": "a cat", "model": model(name)} | SIZE | {"steps": 3} | paths))
    seen: list[Image.Image] = []
    made = generate(asked, on_preview=seen.append)
    assert len(seen) == 3
    last, *frames = (np.asarray(one.convert("RGB"), dtype=float) for one in (seen[-1], *made.clips[0]))
    assert last.shape == frames[0].shape
    far = [np.abs(last.mean((0, 1)) - one.mean((0, 1))).max() for one in frames]
    assert min(far) < 16, "a latent frame alone, which Wan's decoder takes for a first one"
    assert generate(asked).report["pixels"] == made.report["pixels"]


@pytest.mark.parametrize(
    ("name", "can"),
    [
        ("wan", {"clip"}), ("wan-i2v", {"animate", "between"}), ("hunyuan", {"clip"}), ("cogvideox", {"clip"}),
        ("ltx", {"clip", "animate", "between"}), ("old-ltx", {"clip", "animate"}),
    ],
)  # fmt: skip
def test_the_page_offers_what_a_family_can_do(name: str, can: set[str], model: Any, pictures: Path) -> None:
    _, card = catalog.prepare(catalog.find(model(name)))
    reasons = app_tasks.possible(card)
    assert {task for task, reason in reasons.items() if not reason} == can
    for task, more in {"animate": {"image"}, "between": {"image", "last_image"}}.items():
        paths = {key: str(pictures / "0.png") for key in more}
        asked = Request(**({"prompt": "a cat", "model": model(name)} | SIZE | {"steps": 1} | paths))
        if task in can:
            assert generate(asked).clips
        else:
            with pytest.raises(RequestError):
                generate(asked)


def test_too_long_a_clip_of_a_family_is_refused_before_it_loads(
    model: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(name: str, **more: Any) -> Estimate:
        folder = Path(model(name))
        _, card = catalog.prepare(catalog.find(str(folder)))
        asked = Request(prompt="a", model=str(folder), **more)
        found = estimate(asked, card, folder, read_inputs(asked, card))
        assert found is not None
        return found

    own = {"wan": (81, 480, 832), "hunyuan": (129, 720, 1280), "ltx": (161, 512, 704), "cogvideox": (9, 32, 32)}
    for name, (frames, high, wide) in own.items():  # what the pipelines make where nothing is said
        assert told(name).frames == frames * high * wide * 36, name
        assert told(name) == told(name, frames=frames, height=high, width=wide), name
        assert told(name, tiling=True).decoder == 0 < told(name).decoder, name
    first, clip = {"image": str(pictures / "0.png")}, {"clip": str(pictures)}
    assert told("ltx", **first).frames == 161 * 32 * 32 * 36, "the size of the first frame"
    assert told("wan", **clip, width=32, height=32).frames == 9 * 32 * 32 * 36, "made over: as many frames"
    few, many = told("ltx", frames=9, width=64, height=64), told("ltx", frames=17, width=64, height=64)
    assert many.network * 3 == few.network * 5, "4 frames a latent one: (9 - 1) / 4 + 1 against (17 - 1) / 4 + 1"
    catalog.unload()
    monkeypatch.setattr(clip_memory, "memory_of", lambda _: (40_000_000, "this computer"))
    for name in own:
        with pytest.raises(RequestError, match=r"an estimated .* GB .* this computer has 40\.0 MB") as caught:
            generate(Request(prompt="a", model=model(name), frames=1000, width=256, height=256, device="cpu"))
        assert caught.value.field == "frames"
    assert not catalog._loaded
