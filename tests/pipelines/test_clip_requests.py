"""How a request for a clip or a story reaches our two video pipelines."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from acceleration.delta_cache import DeltaCache
from pipelines import catalog, clip_memory
from pipelines.generate import Cancelled, Progress, generate
from pipelines.long_clips import long_clip
from pipelines.request import Request, RequestError
from pipelines.text_to_video import TextToVideoPipeline

_place = importlib.util.spec_from_file_location("tiny_clips", Path(__file__).with_name("tiny_clips.py"))
assert _place is not None
assert _place.loader is not None
tiny_clips = importlib.util.module_from_spec(_place)
_place.loader.exec_module(tiny_clips)
SIDE, clips, stories = tiny_clips.SIDE, tiny_clips.clips, tiny_clips.stories
film, frames_of, made = tiny_clips.film, tiny_clips.frames_of, tiny_clips.made

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


def test_a_clip_of_nothing_asks_for_no_prompt(clips: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Request(model=clips, task="unconditional", steps=2)
    result = generate(asked)
    assert len(result.pictures[0].frames) == 4
    assert result.report["effective"]["guidance"] == 1.0
    assert result.report["run"]["calls"] == 2
    assert generate(asked.replace(guidance=2.0)).report["effective"]["guidance"] == 2.0
    assert Request.from_dict(asked.told()).words == "no prompt"
    with pytest.raises(RequestError, match="prompt must be text"):
        Request(model=clips)
    with pytest.raises(RequestError, match="task must be left out"):
        generate(asked.replace(model="emoji"))


def test_first_and_last_pictures(clips: str, film: Path, tmp_path: Path) -> None:
    given = frames_of(film)
    asked = Request(
        model=clips, prompt="a red cat", image=str(film / "0.png"), last_image=str(film / "3.png"), steps=2
    )
    frames = made(asked)
    assert (frames[[0, 3]] == given[[0, 3]]).all()
    assert (frames[1] != given[1]).any()
    with pytest.raises(RequestError, match="a first frame, maybe with a last one"):
        generate(asked.replace(image=None))
    first, *rest = [Image.fromarray(one) for one in given]
    first.save(tmp_path / "film.png", save_all=True, append_images=rest)
    result = generate(asked.replace(image=str(tmp_path / "film.png")))
    assert result.report["warnings"] == ["image: of the 4 frames of film.png the first was taken"]


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


def test_tasks_of_a_clip_longer_than_a_window(clips: str, film: Path, tmp_path: Path) -> None:
    given = frames_of(film)
    asked = Request(model=clips, prompt="a red cat", frames=7, overlap=1, steps=1, clip=str(film))

    def kept(frames: np.ndarray) -> dict[int, int]:
        """Where in what was made which of the given frames stands."""
        same = (frames[:, None] == given[None]).all((2, 3, 4))
        return dict(np.argwhere(same).tolist())

    assert kept(made(asked)) == {0: 0, 1: 1, 2: 2, 3: 3}, "a clip is continued"
    assert kept(made(asked.replace(task="predict", given=2))) == {0: 0, 1: 1}
    assert kept(made(asked.replace(task="backward"))) == {3: 0, 4: 1, 5: 2, 6: 3}
    assert kept(made(asked.replace(task="backward", given=1))) == {6: 3}
    assert kept(made(asked.replace(task="first-last"))) == {0: 0, 6: 3}
    assert kept(made(asked.replace(task="image"))) == {0: 0}
    assert kept(made(asked.replace(task="interpolate", every=2))) == {0: 0, 2: 1, 4: 2, 6: 3}
    ends = asked.replace(clip=None, image=str(film / "0.png"), last_image=str(film / "3.png"))
    assert kept(made(ends)) == {0: 0, 6: 3}
    told: list[Progress] = []
    result = generate(asked, on_step=told.append)
    steps = [(one.step, one.steps) for one in told if one.phase == "denoise"]
    assert steps == [(1, 1)], "the first window is given whole"
    assert "made in one window" in result.report["warnings"][0]
    region = Request(model=clips, prompt="a", clip=str(film), task="region", region="0,0,8,8", steps=1)
    short, masks = tmp_path / "short", tmp_path / "masks"
    for folder in (short, masks):
        folder.mkdir()
    for place, one in enumerate(given[:3]):
        Image.fromarray(one).save(short / f"{place}.png")
        Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(masks / f"{place}.png")
    for one, count in ((region, 4), (region.replace(clip=str(short)), 3)):
        assert len(made(one)) == count, "as many frames as the clip has"
    anew = region.replace(clip=str(short), task=None, region=None, mask=str(masks))
    assert len(made(anew)) == 3


def test_a_part_of_a_clip_that_is_longer_than_the_models_own_is_measured_by_the_clip(
    clips: str, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = tmp_path / "longer"
    longer.mkdir()
    for place, one in enumerate(np.concatenate([frames_of(film)] * 2)[:6]):
        Image.fromarray(one).save(longer / f"{place}.png")
    region = Request(model=clips, prompt="a", clip=str(longer), task="region", region="0,0,8,8", steps=1)
    assert len(made(region.replace(window=5))) == 6
    schedule = region.replace(prompt="", prompts="a | b | c | d | e | f", window=3, overlap=2)
    assert len(made(schedule)) == 6
    catalog.unload()
    for asked, field, words in (
        (region.replace(window=7), "window", "at most the 6 frames"),
        (schedule.replace(prompts="a | b | c | d | e | f | g"), "prompts", "each of the 6 frames"),
    ):
        with pytest.raises(RequestError, match=words) as caught:
            generate(asked)
        assert caught.value.field == field
    monkeypatch.setattr(clip_memory, "memory_of", lambda _: (0, "this computer"))
    with pytest.raises(RequestError, match=r"got 6$"):
        generate(region)
    assert not catalog._loaded, "nothing loads"


def test_memory_is_counted_for_all_frames_that_are_made_at_once(clips: str) -> None:
    _, card = catalog.prepare(catalog.find(clips))
    card = dataclasses.replace(card, more=card.more | {"tells_scenes": True, "scenes": 3, "scene_frames": 2})
    story = Request(model=clips, prompts="a | b | c")
    found = {
        name: clip_memory.estimate(asked, card, Path(clips))
        for name, asked in {
            "clip": story.replace(prompts=None, prompt="a", frames=8), "story": story,
            "windows": story.replace(window=2), "long": story.replace(prompts="a | b | c | d | e"),
        }.items()
    }  # fmt: skip
    network = {name: one.network for name, one in found.items() if one is not None}
    assert network["story"] == network["long"] == 6 * network["clip"] // 4 == 3 * network["windows"]


def test_a_network_whose_frames_hear_captions_of_their_own_tells_stories(
    clips: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "teller"
    shutil.copytree(clips, model)
    (model / "card.json").write_text(json.dumps({"frames": 4, "scenes": 3, "scene_frames": 2}))
    asked = Request(model=str(model), prompts="a red cat | a blue dog | a tree", steps=1)
    pipeline = catalog.load(str(model)).pipeline
    direct = pipeline(
        ["a red cat", "a blue dog", "a tree"], caption_frames=[2, 2, 2], seeds=[0], num_inference_steps=1, output_type="np"
    ).frames[0]  # fmt: skip
    told = made(asked)
    assert np.array_equal(np.rint(direct * 255).astype(np.uint8), told), "scenes as long as the card says, all at once"
    assert np.array_equal(made(asked.replace(prompts=None, prompt="a red cat | a blue dog | a tree")), told)
    assert np.array_equal(made(asked.replace(frames=6)), told)
    assert np.array_equal(made(asked.replace(scene_frames="2")), told)
    assert len(made(asked.replace(scene_frames="1,3,2"))) == 6
    heard: list[tuple[Any, Any]] = []
    inner = type(pipeline).__call__

    def call(self: Any, *args: Any, **given: Any) -> Any:
        heard.append((given["prompt"], given.get("caption_frames")))
        return inner(self, *args, **given)

    monkeypatch.setattr(type(pipeline), "__call__", functools.wraps(inner)(call))
    longer = generate(asked.replace(prompts="a red cat | a blue dog | a tree | a house"))
    assert heard == [
        (["a red cat", "a blue dog", "a tree"], [2, 2, 2]), (["a blue dog", "a tree", "a house"], [2, 2, 2])
    ], "a scene more is told with those before it given"  # fmt: skip
    assert len(longer.pictures[0].frames) == 8
    assert np.array_equal(np.stack([np.asarray(one) for one in longer.pictures[0].frames])[:6], told)
    heard.clear()
    generate(asked.replace(window=4, overlap=1, prompts="a red cat | a tree", frames=7))
    assert heard == [("a red cat", None), (["a red cat", "a tree"], [1, 3])]
    heard.clear()
    generate(asked.replace(prompts="a | b | c | d | e"))
    assert [texts for texts, _ in heard] == [["a", "b", "c"], ["b", "c", "d"], ["c", "d", "e"]], "a window makes a scene"
    monkeypatch.setattr(type(pipeline), "tells_scenes", False)
    with pytest.raises(RequestError, match=r"hear the prompts at the frames 0, 4.*shorter window"):
        generate(asked.replace(prompts="a | b | c", frames=7, overlap=1))


@pytest.mark.parametrize(
    ("changes", "tells"), [({}, True), ({"conditioning": "concatenate"}, False), ({"pooled_dim": 16}, False)]
)
def test_a_card_says_of_scenes_what_the_pipeline_does(
    clips: str, tmp_path: Path, changes: dict[str, Any], tells: bool
) -> None:
    model = tmp_path / "model"
    shutil.copytree(clips, model)
    written = model / "transformer" / "config.json"
    config = json.loads(written.read_text()) | changes
    written.write_text(json.dumps(config))
    network: Any = SimpleNamespace(transformer=SimpleNamespace(config=FrozenDict(config)))
    assert TextToVideoPipeline.tells_scenes.fget(network) is tells  # type: ignore[attr-defined]
    assert catalog.card_of(model, "model").more["tells_scenes"] is tells


@pytest.mark.parametrize(
    ("more", "field", "words"),
    [
        ({"prompts": "a | b | c", "prompt": "", "frames": 2}, "prompts", "each of the 2 frames"),
        ({"window_seeds": "1,2"}, "window_seeds", "one: 4 frames"),
        ({"frames": 7, "window_seeds": "1,2,3,4"}, "window_seeds", "each of the 3 windows"),
        ({"frames": 7, "overlap": 4}, "overlap", "from 1 to 3"),
        ({"frames": 3, "window": 4}, "window", "at most the 3 frames"),
        ({"scene_frames": "2"}, "scene_frames", "given with captions"),
        ({"prompts": "a | b", "prompt": "", "scene_frames": "2,2,2"}, "scene_frames", "2 captions: no scene goes without"),
        ({"prompts": "a | b", "prompt": "", "scene_frames": "2", "frames": 4}, "scene_frames", "counted otherwise"),
        ({"prompts": "a | b", "prompt": "", "scene_frames": "600"}, "scene_frames", "at most 1000 frames together"),
        ({"last_image": "FILM"}, "image", "a first frame, maybe with a last one"),
        ({"image": "FILM", "strength": 0.4}, "strength", "keeps its first frame as it is"),
        ({"clip": "FILM", "task": "region", "region": "1,0,8,8"}, "region", "multiples of 2 px"),
        ({"clip": "FILM", "task": "predict", "given": 4}, "given", "1 to 3 frames.*got 4"),
        ({"clip": "FILM", "task": "backward", "given": 9}, "given", "1 to 3 frames.*got 9"),
        ({"clip": "FILM", "task": "keyframes", "keyframes": "1,7"}, "keyframes", "frame 7 is not.*got '1,7'"),
        (
            {"clip": "FILM", "task": "region", "region": "0,0,8,40"},
            "region",
            "inside 16 x 16 px.*got '0,0,8,40'",
        ),
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
        (Request(model=stories, prompts="a | b", image="a.png"), "image", "told by captions"),
        (Request(model=stories, prompts="a | b", frames=8, scene_frames="4"), "scene_frames", "counted otherwise"),
        (Request(model=stories, prompts="0: a | 4: b"), "frames", "no last one"),
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


def test_too_long_a_story_is_refused_with_numbers(
    clips: str, stories: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, card = catalog.prepare(catalog.find(stories))
    plain = Request(model=stories, prompts="a | b | c")
    found = {
        name: clip_memory.estimate(asked, card, Path(stories))
        for name, asked in {
            "plain": plain, "long": plain.replace(scene_frames="20"), "many": plain.replace(prompts="a | b | c | d | e | f"),
            "one": plain.replace(window=1),
        }.items()
    }  # fmt: skip
    frames = {name: one.frames for name, one in found.items() if one is not None}
    network = {name: one.network for name, one in found.items() if one is not None}
    assert (frames["long"], frames["many"]) == (10 * frames["plain"], 2 * frames["plain"])
    view = card.more["scenes"]
    assert network["plain"] == network["many"] == view * network["one"], "as many scenes as are seen at once"
    for asked in (
        plain.replace(scene_frames="400"),
        plain.replace(prompts="0-600: a | 600-1200: b"),
        Request(model=clips, prompts="0-600: a | 600-1200: b"),
    ):
        with pytest.raises(RequestError, match="for at most 1000 frames together"):
            generate(asked)
    monkeypatch.setattr(clip_memory, "memory_of", lambda _: (1, "this computer"))
    with pytest.raises(RequestError, match=r"an estimated .*; got 60$"):
        generate(plain.replace(scene_frames="20", device="cpu"))
    assert not catalog._loaded


def test_a_picture_of_another_shape_is_told_of(clips: str, tmp_path: Path) -> None:
    for name, size in (("wide", (2 * SIDE, SIDE)), ("square", (3 * SIDE, 3 * SIDE))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    asked = Request(model=clips, prompt="a", steps=1, image=str(tmp_path / "wide.png"))
    told = f"image: {2 * SIDE}x{SIDE} px was stretched to {SIDE}x{SIDE} px"
    assert [one.startswith(told) for one in generate(asked).report["warnings"]] == [True]
    assert not generate(asked.replace(image=str(tmp_path / "square.png"))).report["warnings"]


def test_a_clip_that_does_not_fit_is_named_as_people_gave_it(clips: str, film: Path) -> None:
    asked = Request(model=clips, prompt="a", steps=1, clip=str(film))
    for more, field, words in (
        ({"frames": 3, "task": "interpolate", "every": 2}, "clip", "3 frames, or the 2 that are given"),
        ({"frames": 8, "window": 1}, "window", "2 frames or more"),
    ):
        with pytest.raises(RequestError, match=words) as caught:
            generate(asked.replace(**more))
        assert caught.value.field == field


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
