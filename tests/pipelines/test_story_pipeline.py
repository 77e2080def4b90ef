"""Stories: scenes together and one after another, given scenes, seeds, lengths, codecs, interruption, loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from acceleration import DeltaCache, GuidanceSkip, accelerated
from dit.backbones.mask2dit import Mask2DiT
from pipelines import catalog
from pipelines.request import RequestError
from pipelines.story_to_video import StoryToVideoPipeline, split_story
from pipelines.text_to_image import TextToImagePipeline

STORY = ["a red cat", "a blue dog", "the green fish in a house", "a tree"]


def network(channels: int = 3) -> Mask2DiT:
    torch.manual_seed(0)
    made = Mask2DiT(
        in_channels=channels, sample_height=8, sample_width=12, frames=2, scenes=2, width=32, depth=2, heads=2, time_dim=12,
        context_dim=16, caption_length=16,
    )  # fmt: skip
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.fixture(scope="module")
def folder(folder_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved pipeline: the tiny model's parts around a Mask2DiT of two scenes."""
    parts = TextToImagePipeline.from_pretrained(folder_of("ours")).components
    place = tmp_path_factory.mktemp("story") / "model"
    StoryToVideoPipeline(**(parts | {"transformer": network()}), text_length=16).save_pretrained(place)
    return place


@pytest.fixture
def pipe(folder: Path) -> Any:
    made = StoryToVideoPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def tell(pipe: Any, story: Any = STORY, output_type: str = "pt", **more: Any) -> Tensor:
    options = {"seeds": 3, "num_inference_steps": 3, "output_type": output_type} | more
    found: Tensor = pipe(story, **options).frames
    return found


def test_the_catalog_loads_it(folder: Path) -> None:
    loaded = catalog.load(str(folder))
    assert isinstance(loaded.pipeline, StoryToVideoPipeline)
    assert isinstance(loaded.pipeline.transformer, Mask2DiT)
    catalog.unload()


def test_a_story_may_have_more_scenes_than_were_trained(pipe: Any) -> None:
    frames = tell(pipe)
    assert frames.shape == (1, 8, 3, 16, 24)
    assert frames.std() > 0.01
    assert torch.equal(frames, tell(pipe, "a red cat | a blue dog|the green fish in a house | a tree"))
    assert torch.allclose(frames, tell(pipe, guidance_mode="sequential"), atol=5e-4)
    # a story told on keeps its scenes; another caption changes its scene and those that hear it
    assert torch.equal(tell(pipe, STORY[:3]), frames[:, :6])
    other = tell(pipe, [*STORY[:3], "a photo"])
    assert torch.equal(other[:, :6], frames[:, :6])
    assert not torch.allclose(other[:, 6:], frames[:, 6:], atol=1e-3)


def test_the_network_sees_given_scenes_at_time_0_and_unchanged(pipe: Any) -> None:
    seen: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    latents = tell(pipe, STORY[:3], output_type="latent", guidance_scale=1.0)
    assert [len(one["scene_frames"]) for one in seen] == [2] * 6
    assert all(one["timestep"].shape == (1,) for one in seen[:3])
    for one in seen[3:]:
        assert one["timestep"].shape == (1, 2)
        assert one["timestep"][0, 0] == 0 < one["timestep"][0, 1]
        assert torch.equal(one["hidden_states"][:, :, :2], latents[:, :, 2:4])  # the scene before
    alone = tell(pipe, STORY[:3], window=1)
    assert len(seen[-1]["scene_frames"]) == 1
    assert not torch.allclose(alone, tell(pipe, STORY[:3]), atol=1e-3)


@pytest.mark.parametrize("kind", ["pictures", "array", "tensor"])
def test_given_scenes_come_out_as_they_are(pipe: Any, kind: str) -> None:
    draw = np.random.default_rng(0)
    array = draw.integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    clip: Any = [Image.fromarray(one) for one in array]
    if kind != "pictures":
        clip = array.astype(np.float32) / 255
    if kind == "tensor":
        clip = torch.from_numpy(clip).permute(0, 3, 1, 2)
    out = pipe(STORY[:2], seeds=3, num_inference_steps=2, given=[clip], output_type="pil")
    assert out.scene_frames == [3, 2]
    assert np.array_equal(np.stack([np.asarray(one) for one in out.frames[0][:3]]), array)
    other = pipe(
        STORY[:2], seeds=3, num_inference_steps=2, given=[clip[::-1] if kind == "pictures" else 1 - clip]
    )
    assert any(
        not np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(out.frames[0][3:], other.frames[0][3:], strict=True)
    )
    everything = pipe(STORY[:1], given=[clip], output_type="np").frames
    assert np.array_equal(np.rint(everything[0] * 255), array)


def test_scenes_have_lengths_and_seeds_of_their_own(pipe: Any) -> None:
    out = pipe(STORY[:3], scene_frames=[1, 3, 2], seeds=[3, 4, 5], num_inference_steps=2, output_type="np")
    assert out.scene_frames == [1, 3, 2]
    assert out.frames.shape == (1, 6, 16, 24, 3)
    counted = pipe(STORY[:3], scene_frames=[1, 3, 2], seeds=3, num_inference_steps=2, output_type="np").frames
    assert np.array_equal(out.frames, counted)  # 3, 4, 5
    last = pipe(
        STORY[:3], scene_frames=[1, 3, 2], seeds=[3, 4, 9], num_inference_steps=2, output_type="np"
    ).frames
    assert np.array_equal(last[:, :4], counted[:, :4])
    assert not np.allclose(last[:, 4:], counted[:, 4:], atol=1e-3)
    assert pipe(STORY[:1], height=24, width=16, num_inference_steps=1, output_type="pt").frames.shape == (
        1,
        2,
        3,
        24,
        16,
    )


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_any_scheduler_keeps_given_scenes(pipe: Any, kind: str) -> None:
    """Some scale what the network sees or evaluate twice: given scenes still reach it as they are."""
    pipe.register_modules(scheduler=getattr(diffusers, kind)(prediction_type="v_prediction"))
    seen: list[Tensor] = []
    latents = tell(pipe, STORY[:3], output_type="latent", guidance_scale=1.0)
    pipe.transformer.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["hidden_states"][:, :, :2]), with_kwargs=True
    )
    again = tell(pipe, STORY[:3], output_type="latent", guidance_scale=1.0)
    assert torch.equal(again, latents)
    assert latents.isfinite().all()
    assert all(torch.equal(one, latents[:, :, 2:4]) for one in seen[len(seen) // 2 :])


def test_a_video_autoencoder_works_scene_by_scene(pipe: Any) -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2, temporal_compression_ratio=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    ).eval()  # fmt: skip
    pipe.register_modules(vae=vae, codec=None, transformer=network(channels=4))
    size = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "pt", "seeds": 3}
    with pytest.warns(UserWarning, match="scene_frames: 6 is no multiple of 4 and 1 more; made 5"):
        out = pipe(STORY[:3], scene_frames=[6, 1, 5], **size)
    assert out.scene_frames == [5, 1, 5]
    assert out.frames.shape == (1, 11, 3, 32, 32)
    clip = torch.rand(5, 3, 32, 32)
    extended = pipe(STORY[:2], given=[clip], scene_frames=5, **size).frames
    assert torch.equal(extended[0, :5], clip)
    with pytest.raises(RequestError, match=r"4 n \+ 1 frames"):
        pipe(STORY[:2], given=[clip[:3]], **size)


def test_callbacks_count_on_and_stop(pipe: Any) -> None:
    told: list[tuple[int, int]] = []

    def callback(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> None:
        told.append((index, tensors["latents"].shape[2]))

    tell(pipe, STORY[:3], callback_on_step_end=callback)
    assert told == [(i, 4) for i in range(6)]

    def stop(pipe: Any, index: int, _: Any, __: dict[str, Any]) -> None:
        pipe._interrupt = index == 4

    assert pipe(STORY[:3], num_inference_steps=3, callback_on_step_end=stop).frames == []
    assert pipe._view is None


def test_accelerators_hold_it(pipe: Any) -> None:
    plain = tell(pipe, num_inference_steps=6)
    with accelerated(pipe.transformer, DeltaCache(interval=1)):
        assert torch.equal(tell(pipe, num_inference_steps=6), plain)
    with accelerated(pipe.transformer, DeltaCache(interval=2, warmup=1, final_full=1)) as run:
        fast = tell(pipe, num_inference_steps=6)
    assert run.report().reused > 0
    assert 0 < (fast - plain).abs().mean() < 0.1
    with accelerated(pipe.transformer, GuidanceSkip()) as run:
        tell(pipe, num_inference_steps=6, guidance_mode="sequential")
    assert torch.equal(tell(pipe, num_inference_steps=6), plain)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"story": []}, "at least one caption"),
        ({"story": "a cat | | a dog"}, "none of them empty"),
        ({"scene_frames": [2, 2]}, "one count for each of the 4 captions"),
        ({"scene_frames": 0}, "at least 1, a whole number of frames"),
            ({"scene_frames": 2.5}, "whole number of frames"),
            ({"scene_frames": [2, 2.5, 2, 2]}, "whole number of frames"),
            ({"given": [[]]}, "at least one frame"),
        ({"seeds": [1, 2]}, "one for each of the 4 scenes"),
        ({"window": 0}, "at least 1 scene"),
        ({"given": [torch.zeros(1, 3, 16, 24)] * 5}, "at most one clip for each of the 4 captions"),
        ({"height": 18}, "a multiple of 4 px"),
        ({"output_type": "gif"}, "one of pil, np, pt, latent"),
        ({"num_inference_steps": 0}, "from 1 to 1000"),
    ],
)
def test_what_does_not_fit_is_refused(pipe: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        tell(pipe, **changes)


def test_other_networks_are_refused_in_words(pipe: Any, folder_of: Any) -> None:
    pipe.register_modules(transformer=TextToImagePipeline.from_pretrained(folder_of("ours")).transformer)
    with pytest.raises(RequestError, match="a network of scenes, Mask2DiT"):
        tell(pipe)


def test_stories_are_split() -> None:
    assert split_story(" one |two") == ["one", "two"]
    assert split_story(["one | two"]) == ["one | two"]
