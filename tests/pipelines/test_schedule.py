"""Prompts over time: three forms, one text; and how a request for a clip reaches our two video pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from acceleration.delta_cache import DeltaCache
from dit import clip_masks
from dit.backbones.mask2dit import Mask2DiT
from dit.backbones.vdt import VDT
from pipelines import catalog, clip_memory, request
from pipelines._kept import Latents
from pipelines.clips import Task
from pipelines.generate import Cancelled, Progress, generate
from pipelines.long_clips import long_clip
from pipelines.request import Request, RequestError
from pipelines.schedule import read_numbers, read_prompts, spread, text_of
from pipelines.story_to_video import StoryToVideoPipeline
from pipelines.text_to_image import TextToImagePipeline
from pipelines.text_to_video import TextToVideoPipeline

SIDE = 16


def awake(network: Any) -> Any:
    """Fill what begins at zero, so that prompts, masks and blocks show."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def saved(kind: Any, network: Any, folder_of: Any, place: Path) -> str:
    parts = TextToImagePipeline.from_pretrained(folder_of("ours")).components
    kind(**(parts | {"transformer": awake(network)}), text_length=16).save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def clips(folder_of: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder of a tiny VDT: clips of 4 frames, 16 px, latents of half that size."""
    torch.manual_seed(0)
    network = VDT(
        in_channels=3, sample_size=8, frames=4, width=32, depth=2, heads=2, mlp_ratio=2.0, context_dim=16, clean_time=True
    )  # fmt: skip
    return saved(TextToVideoPipeline, network, folder_of, tmp_path_factory.mktemp("vdt") / "model")


@pytest.fixture(scope="module")
def stories(folder_of: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder of a tiny Mask2DiT of two scenes of 2 frames, 16 px."""
    torch.manual_seed(0)
    network = Mask2DiT(
        in_channels=3, sample_height=8, sample_width=8, frames=2, scenes=2, width=32, depth=2, heads=2, time_dim=12,
        context_dim=16, caption_length=16,
    )  # fmt: skip
    return saved(StoryToVideoPipeline, network, folder_of, tmp_path_factory.mktemp("story") / "model")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of four pictures of 16 px."""
    folder = tmp_path_factory.mktemp("film")
    for index, one in enumerate(
        np.random.default_rng(2).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    ):
        Image.fromarray(one).save(folder / f"{index}.png")
    return folder


def frames_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(one)) for one in sorted(folder.iterdir())])


def made(asked: Request, **more: Any) -> np.ndarray:
    return np.stack([np.asarray(one) for one in generate(asked, **more).pictures[0].frames])


# The text form


@pytest.mark.parametrize(
    ("value", "text", "found"),
    [
        ("a", "a", [(0, 8, "a")]),
        ("a|b |  c", "a | b | c", [(0, 3, "a"), (3, 5, "b"), (5, 8, "c")]),
        (["a", "b"], "a | b", [(0, 4, "a"), (4, 8, "b")]),
        ("0: a | 6: b", "0: a | 6: b", [(0, 6, "a"), (6, 8, "b")]),
        ({6: "b", 0: "a"}, "0: a | 6: b", [(0, 6, "a"), (6, 8, "b")]),
        ({"0": "a", "6": "b"}, "0: a | 6: b", [(0, 6, "a"), (6, 8, "b")]),
        ("0-6: a: c | 6 - 8 : b", "0-6: a: c | 6-8: b", [(0, 6, "a: c"), (6, 8, "b")]),
        ([(6, 8, "b"), (0, 6, "a")], "0-6: a | 6-8: b", [(0, 6, "a"), (6, 8, "b")]),
        ([{"start": 0, "end": 8, "text": "a"}], "0-8: a", [(0, 8, "a")]),
    ],
)
def test_every_form_is_one_text_that_reads_back(value: Any, text: str, found: Any) -> None:
    parts = read_prompts(value)
    assert text_of(parts) == text
    assert read_prompts(text) == parts
    assert spread(parts, 8) == found
    assert Request(prompts=value) == Request(prompts=text)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "not empty"), ("a | | b", "not empty"), ([], "1 to 100 parts"), (["a|b"], "hold no"), ("a | 4: b", "one form"),
        ("0-4: a | 4: b", "one form"), ("4: a", "starts at frame 0"), ({}, "1 to 100 parts"), ("0: a | 0: b", "one prompt at a"),
        ("0-4: a | 5-8: b", "leave a gap"), ("0-5: a | 4-8: b", "overlap"), ("0-0: a", "at least one frame"), (7, "parts as"),
        ([(0, 4)], "start, end, text"), (["4: a"], "no frame number"), ({0: 3}, "not empty"), ({-1: "a"}, "0 to 9999"),
        (" | ".join("a" * 101), "1 to 100 parts"), ("a\x00", "U.0000"), ("a" * 2001, "at most 2000"),
    ],
)  # fmt: skip
def test_broken_schedules_are_refused_when_they_are_read(value: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        Request(prompts=value)
    assert caught.value.field == "prompts"


def test_schedules_that_do_not_fit_a_clip() -> None:
    for text, words in {
        "a | b | c": "each of the 2 frames",
        "0: a | 2: b": "before frame 2",
        "0-3: a": "end at 2",
    }.items():
        with pytest.raises(RequestError, match=words):
            spread(read_prompts(text), 2)


def test_numbers_are_read_from_text_and_lists() -> None:
    for value in ("0,7, 15", [0, 7, 15], (0, 7, 15)):
        assert read_numbers("keyframes", value, low=0, high=20) == (0, 7, 15)
    assert Request(prompt="a", clip="c", task="keyframes", keyframes=[0, -1]).keyframes == "0,-1"  # type: ignore[arg-type]
    for bad in ("", "1,,2", "x", [1.5], [True], True, [21], [], "9" * 20):
        with pytest.raises(RequestError, match="keyframes must be 1 to 1000 whole numbers from 0 to 20"):
            read_numbers("keyframes", bad, low=0, high=20)


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"prompts": "b"}, "prompts", "left out where a prompt"),
        ({"mask": "m.png"}, "mask", "given with a clip"),
        ({"clip": "c", "image": "i"}, "clip", "left out where a first"),
        ({"clip": "c", "mask": "m", "task": "image"}, "mask", "a task is named"),
        ({"task": "predict"}, "clip", "a file for the task predict"),
        ({"clip": "c", "given": 3}, "given", "without the task predict"),
        ({"clip": "c", "task": "region"}, "region", "given for the task"),
        ({"clip": "c", "task": "region", "region": "4,4,2,8"}, "region", "left < right"),
        ({"clip": "c", "task": "region", "region": "4,4"}, "region", "left < right"),
        ({"clip": "c", "task": "dance"}, "task", "one of unconditional, predict"),
        ({"images": 2, "window_seeds": "1,2"}, "window_seeds", "several clips"),
        ({"fps": 0.5}, "fps", "1 to 120"),
        ({"frames": 0}, "frames", "1 to 1000"),
        ({"frames": 1001}, "frames", "1 to 1000"),
    ],
)
def test_settings_that_exclude_each_other(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        Request(**({"prompt": "a"} | fields))
    assert caught.value.field == field


def test_tasks_are_those_of_the_network() -> None:
    assert request.TASKS == clip_masks.TASKS


# Clips


def test_every_task_reaches_the_pipeline_and_what_is_given_comes_out(
    clips: str, film: Path, tmp_path: Path
) -> None:
    given = frames_of(film)
    asked = Request(model=clips, prompt="a red cat", clip=str(film), steps=2, seed=3)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:9, 2:8] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    cells = np.zeros((SIDE, SIDE), bool)
    cells[4:10, 2:8] = True  # a latent pixel is made anew where any of its four pixels is
    box = np.zeros((SIDE, SIDE), bool)
    box[4:8, 2:12] = True
    for more, kept in (
        ({"task": "predict", "given": 3}, [0, 1, 2]), ({"task": "backward", "given": 1}, [3]), ({"task": "image"}, [0]),
        ({"task": "interpolate", "every": 2}, [0, 2]), ({"task": "first-last"}, [0, 3]),
        ({"task": "keyframes", "keyframes": "1,2"}, [1, 2]),
    ):  # fmt: skip
        frames = made(asked.replace(**more))
        same = [bool((frames[i] == given[i]).all()) for i in range(4)]
        assert same == [i in kept for i in range(4)], more
    for more, anew in (
        ({"task": "region", "region": "2,4,12,8"}, box),
        ({"mask": str(tmp_path / "mask.png")}, cells),
    ):
        frames = made(asked.replace(**more))
        assert (frames == given)[:, ~anew].all()
        assert (frames != given)[:, anew].any(-1).mean() > 0.9
    result = generate(asked.replace(task="image"))
    assert result.report["clip"]["name"] == film.name
    assert len(result.report["clip"]["sha256"]) == 64


def test_first_and_last_pictures(clips: str, film: Path) -> None:
    given = frames_of(film)
    asked = Request(
        model=clips, prompt="a red cat", image=str(film / "0.png"), last_image=str(film / "3.png"), steps=2
    )
    frames = made(asked)
    assert (frames[[0, 3]] == given[[0, 3]]).all()
    assert (frames[1] != given[1]).any()
    with pytest.raises(RequestError, match="a first frame, maybe with a last one"):
        generate(asked.replace(image=None))


def test_long_clips_are_made_in_windows_with_prompts_and_seeds_of_their_own(clips: str, film: Path) -> None:
    asked = Request(
        model=clips,
        prompts="a red cat | a blue dog",
        frames=7,
        overlap=1,
        steps=2,
        window_seeds="5,6",
        guidance=2.0,
    )
    told: list[Progress] = []
    result = generate(asked, on_step=told.append)
    pipeline = catalog.load(clips).pipeline
    direct = long_clip(
        pipeline, [(0, 4, "a red cat"), (4, 7, "a blue dog")], num_frames=7, overlap=1, seeds=(5, 6), num_inference_steps=2,
        guidance_scale=2.0,
    ).frames[0]  # fmt: skip
    assert all(np.array_equal(a, b) for a, b in zip(result.pictures[0].frames, direct, strict=True))
    assert result.report["warnings"] == ["made in 2 windows of 4 frames, 1 or more of them given"]
    assert [(one.step, one.steps) for one in told if one.phase == "denoise"] == [(i, 4) for i in (1, 2, 3, 4)]
    assert [one.phase for one in told][-1] == "decode"
    other = made(asked.replace(window_seeds="5,7"))
    first = np.stack([np.asarray(one) for one in direct])
    assert (other[:4] == first[:4]).all()
    assert (other[4:] != first[4:]).any()
    after = made(asked.replace(prompts="a red cat | a tree"))
    assert (after[:4] == first[:4]).all()
    assert (after[4:] != first[4:]).any()
    # beyond the frames of the network windows come by themselves; a window as long as the clip makes it at once
    plain = asked.replace(prompts=None, prompt="a red cat", overlap=None, window_seeds=None)
    assert "windows of 4 frames" in generate(plain).report["warnings"][0]
    assert not generate(plain.replace(window=7)).report["warnings"]
    with pytest.raises(Cancelled):
        generate(asked, on_step=lambda one: one.step < 3)
    # the given frame of the first window stays as it came
    begun = made(plain.replace(image=str(film / "0.png")))
    assert (begun[0] == frames_of(film)[0]).all()


def test_windows_keep_an_accelerators_state_to_themselves(clips: str) -> None:
    asked = Request(model=clips, prompt="a red cat", frames=7, overlap=1, steps=6, device="cpu")
    exact = generate(asked)
    neutral = generate(asked.replace(accelerators=(DeltaCache(interval=1),)))
    assert neutral.report["pixels"] == exact.report["pixels"]
    fast = generate(asked.replace(accelerators=(DeltaCache(interval=2, warmup=2, final_full=0),)))
    run = fast.report["run"]
    assert run["reused"] > 0
    assert run["computed"] + run["reused"] == exact.report["run"]["computed"]
    short = generate(asked.replace(frames=4, overlap=None, accelerators=fast.request.accelerators)).report[
        "run"
    ]
    assert (run["reused"], run["computed"]) == (2 * short["reused"], 2 * short["computed"]), (
        "every window warms up anew"
    )


@pytest.mark.parametrize(
    ("more", "field", "words"),
    [
        (
            {"prompts": "a | b | c", "prompt": "", "frames": 7, "overlap": 1},
            "prompts",
            "begin anew at the frames",
        ),
        ({"prompts": "a | b | c", "prompt": "", "frames": 2}, "prompts", "each of the 2 frames"),
        ({"window_seeds": "1,2"}, "window_seeds", "one: 4 frames"),
        ({"frames": 7, "window_seeds": "1,2,3,4"}, "window_seeds", "each of the 3 windows"),
        ({"frames": 7, "overlap": 4}, "overlap", "from 1 to 3"),
        ({"frames": 3, "window": 4}, "window", "at most the 3 frames"),
        ({"scene_frames": "2"}, "scene_frames", "tells no stories"),
        ({"clip": "FILM", "task": "region", "region": "1,0,8,8"}, "region", "multiples of 2 px"),
        ({"clip": "FILM", "task": "predict", "given": 4}, "task", "1 to 3 frames"),
        ({"clip": "FILM", "mask": "MASK"}, "mask", r"1 or 4 frames x 16 x 16 px.*got '1 x 8 x 12'"),
        ({"clip": "FILM"}, "task", "all frames came"),
    ],
)
def test_what_does_not_fit_a_clip(
    clips: str, film: Path, tmp_path: Path, more: dict[str, Any], field: str, words: str
) -> None:
    Image.new("L", (12, 8), 255).save(tmp_path / "mask.png")
    names = {"FILM": str(film), "MASK": str(tmp_path / "mask.png")}
    more = {key: names.get(str(value), value) for key, value in more.items()}
    with pytest.raises(RequestError, match=words) as caught:
        generate(Request(**({"model": clips, "prompt": "a cat", "steps": 1} | more)))
    assert caught.value.field == field


def test_what_can_be_refused_before_weights_load_is(
    clips: str, stories: str, tiny: str, tmp_path: Path, forgotten: None
) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(200))
    for asked, field, words in (
        (Request(model=tiny, prompt="a", clip="c.mp4"), "clip", "still pictures"),
        (Request(model=tiny, prompt="a", fps=12), "fps", "still pictures"),
        (Request(model=tiny, prompts="a | b"), "prompts", "still pictures"),
        (Request(model=clips, prompt="a", clip=str(tmp_path / "bad.mp4")), "clip", "can be decoded"),
        (Request(model=clips, prompt="a", clip=str(tmp_path / "none.mp4")), "clip", "readable"),
        (Request(model=clips, prompts="0: a | 9: b"), "prompts", "before frame 4"),
        (
            Request(model=stories, prompts="a | b", scene_frames="2,2,2"),
            "scene_frames",
            "2 captions: no scene goes without",
        ),
        (Request(model=stories, prompts="a | b", window_seeds="2,2,2"), "window_seeds", "2 captions"),
        (
            Request(model=clips, prompt="a", frames=1000, width=4096, height=4096, window=1000),
            "frames",
            "an estimated .* GB",
        ),
    ):
        with pytest.raises(RequestError, match=words) as caught:
            generate(asked)
        assert caught.value.field == field
    assert not catalog._loaded


def test_too_long_a_clip_is_refused_with_numbers(clips: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_memory, "memory_of", lambda _: (5_000_000, "this computer"))
    with pytest.raises(
        RequestError, match=r"at most \d+ frames.*weights.*network.*frames.*has 5\.0 MB; got 900"
    ):
        generate(Request(model=clips, prompt="a", frames=900, device="cpu"))
    _, card = catalog.prepare(catalog.find(clips))
    few, many = (
        clip_memory.estimate(Request(model=clips, prompt="a", frames=n), card, Path(clips)) for n in (8, 16)
    )
    assert few is not None
    assert many is not None
    assert many.frames == 2 * few.frames == 16 * SIDE * SIDE * 36
    assert many.network == few.network, "windows of 4 frames, however many"


# Stories


def test_a_story_takes_captions_lengths_and_seeds(stories: str, film: Path) -> None:
    asked = Request(model=stories, prompts="a red cat | a blue dog | a tree", steps=2, seed=3)
    told: list[Progress] = []
    result = generate(asked, on_step=told.append)
    frames = made(asked)
    assert len(frames) == 6
    assert [(one.step, one.steps) for one in told if one.phase == "denoise"] == [(i, 4) for i in (1, 2, 3, 4)]
    assert [one.phase for one in told].count("decode") == 1
    assert not result.report["warnings"]
    pipeline = catalog.load(stories).pipeline
    direct = pipeline(
        ["a red cat", "a blue dog", "a tree"], seeds=3, num_inference_steps=2, output_type="np"
    ).frames
    assert np.array_equal(np.rint(direct[0] * 255).astype(np.uint8), frames)
    assert len(made(asked.replace(scene_frames="1,3,2"))) == 6
    assert len(made(asked.replace(scene_frames="1"))) == 3
    placed = made(asked.replace(prompts="0-1: a red cat | 1-4: a blue dog | 4-6: a tree"))
    assert np.array_equal(placed, made(asked.replace(scene_frames="1,3,2")))
    assert len(made(asked.replace(frames=9))) == 9
    other = made(asked.replace(window_seeds="3,4,9"))
    assert (other[:4] == frames[:4]).all()
    assert (other[4:] != frames[4:]).any()
    extended = made(asked.replace(clip=str(film)))
    assert (extended[:4] == frames_of(film)).all()
    assert len(extended) == 8
    for more, words in (
        ({"task": "predict", "clip": str(film)}, "told by captions"),
        ({"window_seeds": "1,2"}, "each of the 3 scenes"),
    ):
        with pytest.raises(RequestError, match=words):
            generate(asked.replace(**more))


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
    """Model and sequential offload need a device beside the processor; here torch's own rehearsal of one stands in for it."""
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
        prompt="a red cat",
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
    assert generate(asked).report["pixels"] == exact.report["pixels"]


def test_a_task_may_be_given_to_the_pipeline_itself() -> None:
    assert Task(name="image").of(3, 1, 1, 1)[:, 0, 0].tolist() == [0, 1, 1]
