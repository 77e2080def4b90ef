"""Clips at tiny size: every task by a mask, what is given bit for bit, a seed for each clip, and every door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from acceleration import DeltaCache, accelerated
from dit.backbones.vdt import VDT
from dit.clip_masks import TASKS
from pipelines import catalog, text_to_video
from pipelines.clips import Task, tensor_of
from pipelines.generate import generate
from pipelines.request import Request, RequestError
from pipelines.text_to_image import TextToImagePipeline
from pipelines.text_to_video import TextToVideoPipeline


def network(**changes: Any) -> VDT:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "in_channels": 3, "sample_size": 8, "frames": 4, "width": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0,
    }  # fmt: skip
    made = VDT(**(size | changes))
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def pipeline(codec: Any = None, **changes: Any) -> Any:
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    made = TextToVideoPipeline(transformer=network(**changes), scheduler=flow, codec=codec)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(folder_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved pipeline: the tiny model's parts, with a codec of half size, around a VDT."""
    parts = TextToImagePipeline.from_pretrained(folder_of("ours")).components
    made = parts | {"transformer": network(context_dim=16, clean_time=True)}
    place = tmp_path_factory.mktemp("vdt") / "model"
    TextToVideoPipeline(**made, text_length=16).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def words(folder: Path) -> Any:
    pipe = TextToVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: Any, *args: Any, seeds: Any = (3,), steps: int = 3, output_type: str = "pt", **more: Any
) -> Any:
    return pipe(*args, seeds=seeds, num_inference_steps=steps, output_type=output_type, **more).frames


def clip(frames: int = 4, side: int = 8, channels: int = 3) -> Tensor:
    return torch.rand(frames, channels, side, side, generator=torch.Generator().manual_seed(5))


SETTINGS: dict[str, dict[str, Any]] = {"keyframes": {"keyframes": (1, 2)}, "region": {"box": (2, 0, 6, 4)}}


# Tasks


@pytest.mark.parametrize("conditioning", ["replace", "concatenate"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_a_mask_and_what_is_given_leaves_bit_for_bit(task: str, conditioning: str) -> None:
    pipe = pipeline(conditioning=conditioning)
    given = None if task == "unconditional" else clip()
    about = Task(name=task, **SETTINGS.get(task, {}))
    mask = about.of(4, 8, 8, None if given is None else 4).bool()[:, None].expand(4, 3, 8, 8)
    seen: list[int] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _m, _a, kw: seen.append(kw["hidden_states"].shape[2]), with_kwargs=True
    )
    made = draw(pipe, video=given, task=about)
    whole = int((~mask.flatten(1).any(1)).sum())
    assert seen == [4 - whole if conditioning == "concatenate" else 4] * 3
    assert made.shape == (1, 4, 3, 8, 8)
    if given is None:
        return
    assert torch.equal(made[0][~mask], given[~mask])
    assert (made[0][mask] != given[mask]).float().mean() > 0.9
    latent = draw(pipe, video=given, task=about, output_type="latent")[0].transpose(0, 1)
    assert torch.equal(latent[~mask], (given * 2 - 1)[~mask])
    other = draw(pipe, video=1 - given, task=about)
    assert not torch.allclose(other[0][mask], made[0][mask], atol=1e-3)  # what is given is looked at


def test_pictures_come_back_as_they_were_though_the_codec_loses(words: Any) -> None:
    first, last = (
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8))
        for i in (1, 2)
    )
    assert words.scale_factor == 2
    for more, places in (({}, {0: first}), ({"last_image": last}, {0: first, 3: last})):
        (frames,) = draw(words, "a red cat", image=first, output_type="pil", **more)
        assert len(frames) == 4
        for i, frame in enumerate(frames):
            same = [np.array_equal(frame, one) for one in places.values()]
            assert (i in places) == any(same)
            assert i not in places or np.array_equal(frame, places[i])


def test_frames_that_are_given_may_come_alone_and_in_any_form() -> None:
    pipe, given = pipeline(), clip()
    about = Task(name="keyframes", keyframes=(1, 3))
    plain = draw(pipe, video=given, task=about)
    assert torch.equal(draw(pipe, video=given[[1, 3]], task=about), plain)
    assert torch.equal(draw(pipe, video=given[None, [1, 3]], task=about), plain)
    assert torch.equal(draw(pipe, video=given.movedim(1, -1).numpy(), task=about), plain)
    assert torch.equal(draw(pipe, video=given, mask=torch.tensor([1, 0, 1, 0])), plain)
    assert torch.equal(draw(pipe, video=given, mask=np.array([1, 0, 1, 0])), plain)
    predicted = draw(pipe, video=given[:3])  # frames without a task are those to go on from
    assert torch.equal(predicted[0, :3], given[:3])
    assert torch.equal(predicted, draw(pipe, video=given, task=Task(name="predict", given=3)))
    whole = [Image.fromarray(np.uint8(one)) for one in (given.movedim(1, -1) * 255).round().numpy()]
    bytes_ = torch.from_numpy(np.stack([np.asarray(one) for one in whole]))
    assert torch.equal(tensor_of(whole, 8, 8, 3)[0], bytes_.movedim(-1, 1) / 255)
    assert tensor_of(whole, 16, 12, 3).shape == (1, 4, 3, 16, 12)
    assert tensor_of([whole, whole], 8, 8, 1).shape == (2, 4, 1, 8, 8)


def test_clips_of_other_lengths_sizes_and_places_in_time() -> None:
    pipe = pipeline()
    assert draw(pipe, num_frames=7, height=12, width=8).shape == (1, 7, 3, 12, 8)
    assert draw(pipe, num_frames=1).shape == (1, 1, 3, 8, 8)
    plain = draw(pipe)
    assert torch.equal(draw(pipe, frame_index=[0, 1, 2, 3]), plain)
    assert not torch.allclose(draw(pipe, frame_index=[0, 0.5, 1, 1.5]), plain, atol=1e-3)


# Seeds, guidance, doors


def test_prompt_seed_and_company_decide_as_they_should(words: Any) -> None:
    plain = draw(words, "a red cat", output_type="np")
    assert plain.shape == (1, 4, 16, 16, 3)
    assert np.array_equal(plain, draw(words, "a red cat", output_type="np"))
    assert np.allclose(
        plain, draw(words, "a red cat", guidance_mode="sequential", output_type="np"), atol=2e-5
    )
    both = draw(words, ["a dog", "a red cat"], seeds=(9, 3), output_type="np")
    assert np.allclose(plain[0], both[1], atol=2e-5)
    assert not np.allclose(plain, draw(words, "a dog", output_type="np"), atol=1e-3)
    assert not np.allclose(plain, draw(words, "a red cat", seeds=(4,), output_type="np"), atol=1e-3)
    generator = torch.Generator().manual_seed(3)
    again = words("a red cat", generator=generator, num_inference_steps=3, output_type="np").frames
    assert np.array_equal(again, plain)


def test_guidance_leads_away_from_no_class_or_from_no_frames() -> None:
    seen: list[dict[str, Any]] = []

    def watch(pipe: Any) -> Any:
        pipe.transformer.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw), with_kwargs=True)
        return pipe

    pipe = watch(pipeline(num_classes=5))
    draw(pipe, class_labels=2, steps=1)
    assert seen.pop()["class_labels"].tolist() == [5, 2]
    draw(pipe, steps=1)
    assert "class_labels" not in seen.pop()
    draw(pipe, class_labels=2, steps=1, video=clip(), task="image", guide_frames=True)
    mask = seen.pop()["mask"]
    assert mask[0].all()
    assert not mask[1, 0].any()
    pipe = watch(pipeline(conditioning="concatenate"))
    draw(pipe, steps=1, video=clip(), task="predict", guide_frames=True, guidance_scale=2.0)
    assert seen.pop()["condition_mask"].tolist() == [[0, 0], [1, 1]]


def test_a_perfect_network_draws_its_clip_around_what_is_given() -> None:
    data = torch.linspace(-0.8, 0.8, 3 * 4 * 8 * 8).reshape(1, 3, 4, 8, 8)
    pipe = pipeline()

    def perfect(
        hidden_states: Tensor, timestep: Tensor, mask: Tensor, clean: Tensor, return_dict: bool
    ) -> Any:
        assert clean[:, :, 0].equal(given[:, :, 0])
        return ((hidden_states - data) / (timestep / 1000).reshape(-1, 1, 1, 1, 1),)

    given = (clip()[None] * 2 - 1).transpose(1, 2)
    pipe.transformer.forward = perfect
    made = draw(pipe, video=clip(), task="image", steps=10, output_type="latent")
    assert torch.equal(made[:, :, 0], given[:, :, 0])
    torch.testing.assert_close(made[:, :, 1:], data[:, :, 1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(),
        diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False),
        diffusers.HeunDiscreteScheduler(),
    ],
    ids=lambda one: type(one).__name__,
)
def test_noise_predicting_networks_behind_an_autoencoder(scheduler: Any) -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    ).eval()  # fmt: skip
    transformer = network(in_channels=4, convention="ddpm", learn_sigma=True)
    pipe = TextToVideoPipeline(transformer=transformer, scheduler=scheduler, vae=vae)
    pipe.set_progress_bar_config(disable=True)
    given = clip(side=16)
    made = draw(pipe, video=given, task="first-last")
    assert made.shape == (1, 4, 3, 16, 16)
    assert made.isfinite().all()
    assert torch.equal(made[0, [0, 3]], given[[0, 3]])
    assert not torch.allclose(made[0, 1:3], given[1:3], atol=1e-2)
    assert torch.equal(draw(pipe, video=given, task="first-last"), made)


def test_long_clips_are_decoded_in_pieces(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = draw(words, "a cat", video=clip(2, 16))
    seen: list[int] = []
    decode = words.codec.decode
    monkeypatch.setattr(words.codec, "decode", lambda x: seen.append(len(x)) or decode(x), raising=False)
    monkeypatch.setattr(text_to_video, "CHUNK", 3)
    torch.testing.assert_close(draw(words, "a cat", video=clip(2, 16)), plain, atol=1e-5, rtol=1e-5)
    assert seen == [3, 1]


def test_an_interrupted_run_returns_no_frames() -> None:
    def stop(pipe: Any, index: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert tensors["latents"].shape == (1, 3, 4, 8, 8)
        pipe._interrupt = index == 1
        return {}

    assert draw(pipeline(), callback_on_step_end=stop, steps=4) == []


def test_accelerators_act_on_clips_and_leave_no_trace() -> None:
    pipe = pipeline(clean_time=True)
    plain = draw(pipe, video=clip(), task="predict", steps=8)
    with accelerated(pipe.transformer, DeltaCache(interval=2)) as run:
        fast = draw(pipe, video=clip(), task="predict", steps=8)
    assert run.report().reused > 0
    assert torch.equal(fast[:, :2], plain[:, :2])
    assert not torch.equal(fast, plain)
    assert torch.equal(draw(pipe, video=clip(), task="predict", steps=8), plain)


def test_the_catalog_loads_it_and_requests_make_clips(folder: Path, tmp_path: Path) -> None:
    loaded = catalog.load(str(folder))
    assert isinstance(loaded.pipeline.transformer, VDT)
    assert (loaded.card.task, loaded.card.width, loaded.card.multiple) == ("text-to-video", 16, 4)
    asked = Request(model=str(folder), prompt="a red cat", frames=5, window=5, steps=2, seed=3)
    made = generate(asked).pictures[0]
    assert len(made.frames) == 5
    direct = draw(loaded.pipeline, "a red cat", num_frames=5, steps=2, output_type="pil")[0]
    assert all(np.array_equal(a, b) for a, b in zip(made.frames, direct, strict=True))
    first = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    first.save(tmp_path / "first.png")
    from_image = generate(asked.replace(image=str(tmp_path / "first.png"))).pictures[0]
    assert np.array_equal(from_image.frames[0], first)
    assert not np.array_equal(from_image.frames[1], made.frames[1])
    catalog.unload()


# What does not fit

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no frames": ({}, {"num_frames": 0}, "num_frames must be at least 1"),
    "half a frame": ({}, {"num_frames": 3.5}, "a whole number of frames; got 3.5"),
    "a name for a video": ({}, {"video": "clip.mp4"}, "a list of pictures, an array or a tensor; got 'str'"),
    "no numbers": ({}, {"video": clip() * float("nan")}, r"numbers in 0\.\.1, or of bytes"),
    "bytes as floats": ({}, {"video": clip() * 255}, r"numbers in 0\.\.1, or of bytes; got 'numbers from "),
    "words for a mask": ({}, {"mask": "left half", "video": clip()}, "mask must be numbers, of shape"),
    "ragged mask": ({}, {"mask": [[1, 0], [1]], "video": clip()}, "mask must be numbers, of shape"),
    "size": ({}, {"height": 9}, "multiple of 2 px"),
    "prompt": ({}, {"prompt": "a cat"}, "prompt must be left out"),
    "no prompt": ({"context_dim": 16}, {}, "prompt must be given"),
    "class": ({}, {"class_labels": 1}, "knows no classes"),
    "class number": ({"num_classes": 3}, {"class_labels": 3}, "from 0 to 2"),
    "no null": ({"num_classes": 3, "null_class": False}, {"class_labels": 1}, 'without a class for "none"'),
    "task": ({}, {"task": "dream", "video": clip()}, "task must be one of unconditional, predict.*; got 'dream'$"),
    "no task": ({}, {"video": clip()}, "all frames came"),
    "nothing shown": ({}, {"task": "predict"}, "a clip or frames for the task predict"),
    "nothing wanted": ({}, {"task": "unconditional", "video": clip()}, "left out for the task unconditional"),
    "mask": ({}, {"mask": torch.ones(3, 8, 8), "video": clip()}, r"\(4,\) or, at latent size, \(4, 8, 8\); got \(3, 8, 8\)"),
    "empty mask": ({}, {"mask": torch.zeros(4), "video": clip()}, "1 at the sites to generate"),
    "mask alone": ({}, {"mask": torch.tensor([0, 1, 1, 1])}, "a mask says that some are given"),
    "both": ({}, {"mask": torch.tensor([0, 1, 1, 1]), "task": "image", "video": clip()}, "where a task is named"),
    "shape": ({}, {"video": clip(side=6)}, r"3 channels, 8 x 8 px; got \(4, 3, 6, 6\)"),
    "empty": ({}, {"video": []}, "at least one picture"),
    "count": ({}, {"video": clip()[:2], "task": "image"}, "4 frames, or the 1 that are given; got '2 frames'"),
    "clips": ({}, {"video": torch.stack([clip()] * 2), "task": "image"}, "one for each of the 1"),
    "last": ({}, {"last_image": Image.new("RGB", (8, 8))}, "a first frame"),
    "places": ({}, {"frame_index": [0, 1]}, "each of the 4 frames"),
    "guidance": ({}, {"guidance_scale": 3.0}, "no prompt, class or given frame"),
    "seeds": ({"num_classes": 3}, {"class_labels": [1, 2]}, "one for each of the 2"),
    "output": ({}, {"output_type": "gif"}, "pil, np, pt, latent"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_words(name: str) -> None:
    changes, given, said = REFUSED[name]
    with pytest.raises(RequestError, match=said):
        draw(pipeline(**changes), **({"output_type": "pt"} | given))
