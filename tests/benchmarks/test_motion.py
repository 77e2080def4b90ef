"""The eyes of the clip figures: on real clips they must see what is there, and on others they must not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import _motion_tasks as tasks
from benchmarks._motion_eyes import (
    Frames,
    centre_errors,
    change,
    colours_in,
    does,
    flicker,
    judge,
    shape_of,
    shape_seen,
    straight_on,
    track,
)
from benchmarks._motion_tasks import Maker, blended, came_out, drawn, gone, turns
from benchmarks.motion import goals, judged, sheet
from training.clips import COLOURS, SHAPES, Clip, Mover, Script, coverage, example, film


def filmed(seed: int = 0, **mover: Any) -> Clip:
    settings = {"colour": "red", "shape": "circle"} | mover
    return film(Script(movers=(Mover(**settings),)), np.random.default_rng(seed))


@pytest.mark.parametrize("single", [True, False])
def test_real_clips_are_right(single: bool) -> None:
    found = []
    for seed in range(30):
        clip, _ = example(9000 + seed, held_out=True, single=single)
        found.append(judge(clip.frames, clip.script)["all"])
    assert np.mean(found) >= (1.0 if single else 0.95), "things may hide each other for good"


def test_real_scenes_of_stories_are_right() -> None:
    found = []
    for seed in range(30):
        clip, _ = example(seed, frames=8, single=True)
        if not clip.script.wall:
            found.append(judge(clip.frames, clip.script)["all"])
    assert np.mean(found) >= 0.97


def test_centres_are_found_to_a_pixel() -> None:
    for seed in range(10):
        clip, _ = example(seed, single=True)
        errors = centre_errors(clip.frames, clip.script, clip.centres, 16.0)
        assert errors[clip.visible > 0.95].max(initial=0) < 1.0


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("radius", [4.7, 7.2, 10.4])
def test_shapes_are_told_apart(shape: str, radius: float) -> None:
    for centre in ([30.0, 31.0], [20.3, 40.6]):
        drawn_one = coverage(shape, np.asarray(centre, np.float32), np.asarray(radius, np.float32)) > 0.5
        assert shape_of(drawn_one) == shape


def test_the_wrong_thing_is_seen_to_be_wrong() -> None:
    clip = filmed(motion="right")
    other = {"colour": {"colour": "blue"}, "shape": {"shape": "square"}, "motion": {"motion": "left"}}
    assert judge(clip.frames, clip.script) == {"colour": True, "shape": True, "motion": True, "all": True}
    for name, changed in other.items():
        script = Script(
            movers=(Mover(**({"colour": "red", "shape": "circle", "motion": "right"} | changed)),)
        )
        verdict = judge(clip.frames, script)
        assert not verdict[name]
        assert not verdict["all"]
    more = Script(movers=(*clip.script.movers, Mover(colour="green", shape="square")))
    assert not judge(clip.frames, more)["colour"], "one is missing"
    both = film(more, np.random.default_rng(2))
    assert not judge(both.frames, clip.script)["colour"], "one too many"
    back = clip.frames[::-1]
    assert not judge(np.ascontiguousarray(back), clip.script)["motion"], "the same frames backwards"
    assert not does(track(np.repeat(clip.frames[:1], 16, 0), "red"), clip.script.movers[0])


@pytest.mark.parametrize("motion", ["left", "up", "fall", "still"])
def test_a_motion_is_taken_for_no_other(motion: str) -> None:
    clip = filmed(4, motion=motion)
    found = track(clip.frames, "red")
    for name in ("left", "right", "up", "down", "still"):
        alike = name == motion or (motion, name) == ("fall", "down")
        assert does(found, Mover(colour="red", shape="circle", motion=name)) == alike, name


def test_nothing_is_seen_where_nothing_is() -> None:
    empty = np.full((4, 3, 64, 64), 30, np.uint8)
    assert colours_in(empty) == set()
    found = track(empty, "red")
    assert not found.seen.any()
    assert np.isnan(found.centres).all()
    assert shape_seen(found) is None
    assert set(COLOURS) == {c for c in COLOURS if colours_in(filmed(colour=c).frames) == {c}}


def test_straight_lines_are_right_until_something_turns() -> None:
    plain = filmed(motion="right")
    assert np.allclose(straight_on(plain.centres, 8)[7:], plain.centres[7:], atol=1e-3)
    clips, _ = drawn(4, 0, kind="turn")
    for clip in clips:
        far = np.linalg.norm(straight_on(clip.centres, 8) - clip.centres, axis=-1)
        assert far[8:, turns(clip)].max() > 2
    assert not turns(plain).any()


def test_blending_keeps_keyframes_and_mixes_between() -> None:
    real = filmed(motion="right", speed="fast").frames[None]
    found = blended(real, 4)
    assert np.array_equal(found[:, ::4], real[:, ::4])
    middle = real[:, 0].astype(float) / 2 + real[:, 4].astype(float) / 2
    assert np.abs(found[:, 2] - middle).max() <= 0.5


def test_a_clip_in_which_nothing_moves_does_not_judge_interpolation() -> None:
    clips = [filmed(motion="right"), filmed(motion="still")]
    figures, _ = tasks.interpolated(Maker(_Perfect()), clips, ["", ""], 0)
    alone, _ = tasks.interpolated(Maker(_Perfect()), clips[:1], [""], 0)
    still, _ = tasks.interpolated(Maker(_Perfect()), clips[1:], [""], 0)
    assert figures["blending"]["psnr_db_moving"] == alone["blending"]["psnr_db"] == alone["blending"]["psnr_db_moving"]
    assert figures["blending"]["psnr_db"] > figures["blending"]["psnr_db_moving"] + 6
    assert (figures["moving"], still["moving"], still["model"]["psnr_db_moving"]) == (1, 0, None)


def test_a_hidden_thing_must_come_out_where_it_belongs() -> None:
    clips, _ = drawn(4, 0, kind="wall")
    for clip in clips:
        assert came_out(clip.frames, clip) == {
            "seen": 1.0,
            "in_place": 1.0,
            "centre_px": pytest.approx(0.4, abs=0.6),
        }
        held = clip.frames[np.minimum(np.arange(16), gone(clip) - 1)]
        assert came_out(held, clip)["seen"] == 0.0
        assert came_out(held, clip)["in_place"] == 0.0
        late = np.concatenate([clip.frames[:1]] * 16)
        assert came_out(late, clip)["in_place"] == 0.0, "seen, and elsewhere"


def test_flicker_is_change_that_is_not_motion() -> None:
    clip = filmed(motion="right").frames
    shaken = clip.astype(int) + 20 * (np.arange(16) % 2)[:, None, None, None]
    noisy = shaken.clip(0, 255).astype(np.uint8)
    assert flicker(noisy) > 5 * flicker(clip)
    assert change(noisy) > change(clip) > 0
    assert change(np.repeat(clip[:1], 16, 0)) == flicker(np.repeat(clip[:1], 16, 0)) == 0


class _Perfect:
    """Stands in for a pipeline: the truth of every caption that `tasks` draws, for the figures' own arithmetic."""

    def __init__(self) -> None:
        self.known: dict[str, Frames] = {}

    def __call__(self, prompt: list[str], video: Any = None, num_frames: int = 16, **_: Any) -> Any:
        if video is not None:
            clips = video
        else:
            clips = torch.stack([self._of(text, num_frames) for text in prompt])
        return type("Output", (), {"frames": clips})()

    def _of(self, text: str, frames: int) -> torch.Tensor:
        return torch.from_numpy(self.known[text][:frames]).float() / 255

    def _clip_latents(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels

    def decode_latents(self, latents: torch.Tensor, _: str) -> torch.Tensor:
        return latents


def test_a_perfect_model_reaches_every_goal_and_a_still_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = _Perfect()
    plain = tasks.drawn

    def known(*args: Any, **more: Any) -> Any:
        clips, captions = plain(*args, **more)
        pipe.known |= {caption: clip.frames for clip, caption in zip(clips, captions, strict=True)}
        return clips, captions

    monkeypatch.setattr("benchmarks.motion.drawn", known)
    maker = Maker(pipe)
    monkeypatch.setattr(
        "benchmarks.motion.stories",
        lambda *_, **__: ({"model": {"colour": 1.0, "shape": 1.0}}, np.zeros((1, 8, 3, 64, 64), np.uint8), [["a"]]),
    )
    figures = judged(maker, 4)
    assert all(goals(figures).values()), goals(figures)
    assert figures["held_out"]["model"]["all"] == 1.0
    assert figures["prediction"]["copy-last"]["centre_px"] > 3

    def held(self: _Perfect, prompt: list[str], video: Any = None, **more: Any) -> Any:
        found = _Perfect.perfect(self, prompt, video, **more)
        found.frames = found.frames[:, :1].expand_as(found.frames).clone()
        return found

    monkeypatch.setattr(_Perfect, "perfect", _Perfect.__call__, raising=False)
    monkeypatch.setattr(_Perfect, "__call__", held)
    reached = goals(judged(maker, 4))
    reached.pop("scene i shows the colour and shape of caption i in 90 %")
    assert not any(reached.values()), reached


def test_a_sheet_has_a_row_for_each_clip() -> None:
    clip = filmed().frames
    assert sheet([("one", clip), ("two", clip)]).size == (16 * 65, 2 * 76)
    assert sheet([("one", clip)], every=2).size == (8 * 65, 76)
