"""Clips behind the denoising: latents kept, tiles, output types and offload; and sparse attention in our video models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dit.backbones.vdt import VDT
from pipelines import catalog
from pipelines._kept import Latents
from pipelines.clips import Task
from pipelines.compare import psnr
from pipelines.generate import generate
from pipelines.request import Request, RequestError
from pipelines.story_to_video import StoryToVideoPipeline
from pipelines.text_to_video import TextToVideoPipeline

_place = importlib.util.spec_from_file_location("tiny_clips", Path(__file__).with_name("tiny_clips.py"))
assert _place is not None
assert _place.loader is not None
tiny_clips = importlib.util.module_from_spec(_place)
_place.loader.exec_module(tiny_clips)
awake, clips = tiny_clips.awake, tiny_clips.clips
stories, film, made = tiny_clips.stories, tiny_clips.film, tiny_clips.made

# Latents, decode, offload


@pytest.mark.parametrize("kind", ["clip", "long", "story"])
def test_a_failed_decode_is_taken_up_without_denoising(
    kind: str, clips: str, stories: str, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {
        "clip": Request(model=clips, prompt="a red cat", clip=str(film), task="image", steps=2),
        "long": Request(model=clips, prompt="a red cat", image=str(film / "0.png"), frames=7, steps=2),
        "story": Request(model=stories, prompts="a red cat | a dog | a tree", steps=2),
    }[kind]
    plain = generate(asked).report["pixels"]
    pipeline = catalog.load(asked.model).pipeline
    monkeypatch.setattr(pipeline.codec, "decode", lambda *_: (_ for _ in ()).throw(OSError("no luck")))
    with pytest.raises(OSError, match="no luck"):
        generate(asked, keep=Latents(tmp_path / "kept"))
    monkeypatch.undo()
    assert len(list((tmp_path / "kept").iterdir())) == 1
    calls: list[int] = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    keep = Latents(tmp_path / "kept")  # another process would find no more than the folder
    again = generate(asked, keep=keep)
    handle.remove()
    assert not calls
    assert again.report["pixels"] == plain
    assert again.report["resumed"] == "from kept latents"
    keep.forget()
    assert not (tmp_path / "kept").exists()


def test_chunks_and_tiles_decode_as_the_whole_does(clips: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import decoding, text_to_video

    pipeline = TextToVideoPipeline.from_pretrained(clips)
    torch.nn.init.normal_(
        pipeline.codec.conv_out.weight, std=0.5
    )  # begins at zero: the convolutions would not show
    latents = torch.randn(1, 3, 5, 40, 24, generator=torch.Generator().manual_seed(1))
    whole = pipeline.decode_latents(latents, "pt")
    for chunk in (1, 2):
        monkeypatch.setattr(text_to_video, "CHUNK", chunk)
        torch.testing.assert_close(pipeline.decode_latents(latents, "pt"), whole, atol=1e-5, rtol=0)
    reach = decoding.reach_of(pipeline.codec)
    assert reach is not None
    sizes: list[tuple[int, ...]] = []
    handle = pipeline.codec.conv_in.register_forward_pre_hook(
        lambda _, given: sizes.append(tuple(given[0].shape[-2:]))
    )
    with decoding.tiled(pipeline, True, tile=8):
        tiles = pipeline.decode_latents(latents, "pt")
    handle.remove()
    assert max(max(one) for one in sizes) <= 8 + 2 * reach
    torch.testing.assert_close(tiles, whole, atol=1e-5, rtol=0)
    with torch.no_grad():
        short = decoding.tiled_decode(pipeline.codec.decode, latents[0].transpose(0, 1), reach - 3, 8)
        longer = decoding.tiled_decode(pipeline.codec.decode, latents[0].transpose(0, 1), reach, 8)
    assert (short - longer).abs().max() > 1e-5, "a tile that sees less differs"
    assert generate(Request(model=clips, prompt="a cat", steps=1, tiling=True)).ok


def test_tiles_of_an_autoencoder_are_near_the_whole_and_switched_off_again() -> None:
    from pipelines import decoding

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        sample_size=32, block_out_channels=(8, 8), layers_per_block=1, latent_channels=3, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    network = awake(VDT(in_channels=3, sample_size=8, frames=2, width=32, depth=1, heads=2, mlp_ratio=2.0))
    pipeline = TextToVideoPipeline(network, diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae)
    latents = torch.randn(1, 3, 2, 40, 40)
    whole = pipeline.decode_latents(latents, "pt")
    with decoding.tiled(pipeline, True):
        tiles = pipeline.decode_latents(latents, "pt")
    assert (
        0 < (tiles - whole).abs().mean() < 0.05
    )  # its layers normalise over the whole picture, a tile's over the tile
    assert torch.equal(pipeline.decode_latents(latents, "pt"), whole)
    plain = TextToVideoPipeline(network, diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(RequestError, match="no decoder that works in tiles"), decoding.tiled(plain, True):
        pass


@pytest.mark.parametrize("kind", ["clip", "story"])
@pytest.mark.parametrize("output_type", ["latent", "pt", "np", "pil"])
def test_every_output_type_is_the_same_clip(kind: str, output_type: str, clips: str, stories: str) -> None:
    pipeline = catalog.load(clips if kind == "clip" else stories).pipeline
    options = {"num_inference_steps": 1, "seeds": [3] if kind == "clip" else 3}
    out = pipeline("a red cat", output_type=output_type, **options)
    tensor = pipeline("a red cat", output_type="pt", **options).frames
    shapes = {
        "latent": (1, 3, tensor.shape[1], 8, 8),
        "pt": (1, tensor.shape[1], 3, 16, 16),
        "np": (1, tensor.shape[1], 16, 16, 3),
    }
    if output_type == "pil":
        found = np.stack([np.asarray(one) for one in out.frames[0]])
        assert np.array_equal(found, (tensor[0].permute(0, 2, 3, 1) * 255).round().byte())
        return
    assert tuple(out.frames.shape) == shapes[output_type]
    if output_type == "latent":
        assert torch.equal(pipeline.decode_latents(out.frames, "pt"), tensor)
    else:
        assert np.array_equal(
            out.frames if output_type == "np" else out.frames.movedim(2, -1), tensor.movedim(2, -1)
        )


@pytest.mark.parametrize("kind", ["clip", "story"])
@pytest.mark.parametrize("mode", ["group", "layerwise", "model", "sequential"])
def test_offload_modes_make_the_same_clip(kind: str, mode: str, clips: str, stories: str) -> None:
    """Model and sequential offload need a device beside the processor; here accelerate's hooks move each part to the processor."""
    folder = clips if kind == "clip" else stories
    pipeline = (TextToVideoPipeline if kind == "clip" else StoryToVideoPipeline).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {
        "num_inference_steps": 2,
        "seeds": [3] if kind == "clip" else 3,
        "output_type": "pt",
    }
    plain = pipeline("a red cat", **options).frames
    processor = torch.device("cpu")
    if mode == "group":
        pipeline.transformer.enable_group_offload(processor, processor, offload_type="leaf_level")
    elif mode == "layerwise":
        pipeline.transformer.enable_layerwise_casting(
            storage_dtype=torch.bfloat16, compute_dtype=torch.float32
        )
        cast = pipeline("a red cat", **options).frames
        assert 0 < (cast - plain).abs().mean() < 0.05  # weights rounded to bfloat16
        return
    else:
        from accelerate import cpu_offload, cpu_offload_with_hook

        seen: list[str] = []
        for name in ("text_encoder", "transformer", "codec"):
            part = getattr(pipeline, name)
            if mode == "model":
                cpu_offload_with_hook(part, processor)
            else:
                cpu_offload(part, processor)
            before = part._hf_hook.pre_forward
            part._hf_hook.pre_forward = lambda *a, _n=name, _b=before, **k: (seen.append(_n), _b(*a, **k))[1]
    assert torch.equal(pipeline("a red cat", **options).frames, plain)
    if mode in ("model", "sequential"):
        assert {"text_encoder", "transformer", "codec"} <= set(seen), (
            "each part is called so that its hook brings it"
        )
    assert StoryToVideoPipeline.model_cpu_offload_seq == "text_encoder->transformer->codec->vae"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "mode", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"]
)
def test_offload_modes_on_a_card(mode: str, clips: str) -> None:
    pipeline = TextToVideoPipeline.from_pretrained(clips)
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline.to("cuda")("a red cat", seeds=[3], num_inference_steps=2, output_type="pt").frames.cpu()
    pipeline.to("cpu")
    getattr(pipeline, mode)(**({"onload_device": torch.device("cuda")} if "group" in mode else {}))
    made = pipeline("a red cat", seeds=[3], num_inference_steps=2, output_type="pt").frames.cpu()
    torch.testing.assert_close(made, plain, atol=1e-4, rtol=0)


# Attention


SPARSE = {
    "adaspa": "adaspa:density=0.3,rows=4,block=4,min_tokens=8,guard=0,dense_layers=0,measure=false",
    "xattention": "xattention:threshold=0.3,stride=2,rows=16,block=16,min_tokens=32,measure=false",
}


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("kind", ["clip", "story"])
def test_sparse_attention_works_on_our_video_models(kind: str, method: str, clips: str, stories: str) -> None:
    asked = Request(
        model=clips if kind == "clip" else stories,
        prompt="a red cat" if kind == "clip" else "a red cat | a blue dog | a tree",
        width=32,
        height=32,
        steps=6,
        device="cpu",
    )
    exact = generate(asked)
    fast = generate(asked.replace(accelerators=(SPARSE[method],)))
    rows = [one for one in fast.report["run"]["attention"] if one["sparse"]]
    assert rows, fast.report["summary"]
    assert all(0 < one["density"] < 1 for one in rows)
    assert f"{method}: " in fast.report["summary"]
    assert "recall" in fast.report["summary"]
    assert fast.report["pixels"] != exact.report["pixels"]
    frames = [np.stack([np.asarray(one, dtype=float) for one in found.clips[0]]) for found in (fast, exact)]
    assert psnr(float(((frames[0] - frames[1]) ** 2).mean())) > 25, "most of the weight is kept"
    assert generate(asked).report["pixels"] == exact.report["pixels"]


def test_a_task_may_be_given_to_the_pipeline_itself() -> None:
    assert Task(name="image").of(3, 1, 1, 1)[:, 0, 0].tolist() == [0, 1, 1]
