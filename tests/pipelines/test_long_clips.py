"""Long clips by windows: each goes on from the end of the one before, with its own prompt and noise."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from dit.backbones.vdt import VDT
from pipelines.clips import Task
from pipelines.long_clips import long_clip, planned, prompt_schedule, windows
from pipelines.request import RequestError
from pipelines.text_to_video import TextToVideoPipeline


def pipeline(**changes: Any) -> Any:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "in_channels": 3, "sample_size": 8, "frames": 4, "width": 32, "depth": 1, "heads": 2, "mlp_ratio": 2.0,
    }  # fmt: skip
    network = VDT(**(size | changes))
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    made = TextToVideoPipeline(
        transformer=network.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler()
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    ("frames", "window", "overlap"), [(4, 4, 2), (5, 4, 2), (11, 4, 1), (30, 16, 8), (17, 16, 15)]
)
def test_windows_are_of_one_length_and_cover_every_frame_once(frames: int, window: int, overlap: int) -> None:
    done = 0
    for i, (start, known) in enumerate(windows(frames, window, overlap)):
        assert start + known == done
        assert known >= overlap or i == 0
        assert known < window
        done = start + window
    assert done == frames


@pytest.mark.parametrize(
    ("prompts", "found"),
    [
        (None, None),
        ("a cat", {0: "a cat"}),
        ("a | b | c", {0: "a", 3: "b", 7: "c"}),
        ({5: "b", 0: "a"}, {0: "a", 5: "b"}),
        ([(4, 10, "b"), (0, 4, "a")], {0: "a", 4: "b"}),
    ],
)
def test_prompts_stand_at_frames(prompts: Any, found: Any) -> None:
    assert prompt_schedule(prompts, 10) == found


@pytest.mark.parametrize(
    "prompts",
    [
        {1: "a"},
        {},
        {0: "a", 10: "b"},
        [(0, 4, "a"), (5, 10, "b")],
        [(0, 4, "a")],
        [],
        " | ".join("abcdefghijk"),
    ],
)
def test_prompts_with_gaps_or_past_the_end_are_refused(prompts: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        prompt_schedule(prompts, 10)


@pytest.mark.parametrize("conditioning", ["replace", "concatenate"])
def test_every_window_goes_on_from_the_latents_before_it(conditioning: str) -> None:
    pipe = pipeline(conditioning=conditioning)
    seen: list[tuple[int, int, int]] = []

    def watch(index: int, count: int, latents: Tensor) -> None:
        seen.append((index, count, latents.shape[2]))

    made = long_clip(pipe, num_frames=9, overlap=2, num_inference_steps=2, output_type="pt", on_window=watch)
    assert seen == [(0, 4, 4), (1, 4, 6), (2, 4, 8), (3, 4, 9)]
    assert made.frames.shape == (1, 9, 3, 8, 8)
    assert made.latents is not None
    assert torch.equal(pipe.decode_latents(made.latents, "pt"), made.frames)
    generator = torch.Generator().manual_seed(0)
    first = pipe(num_frames=4, generator=[generator], num_inference_steps=2, output_type="latent").latents
    second = pipe(
        num_frames=4,
        generator=[generator],
        num_inference_steps=2,
        output_type="latent",
        given_latents=first[:, :, 2:],
    ).latents
    assert torch.equal(made.latents[:, :, :4], first)
    assert torch.equal(made.latents[:, :, 4:6], second[:, :, 2:])
    assert torch.equal(second[:, :, :2], first[:, :, 2:])
    again = long_clip(pipe, num_frames=9, overlap=2, num_inference_steps=2, output_type="pil")
    expected = made.frames[0].permute(0, 2, 3, 1).mul(255).round().byte()
    assert np.array_equal(np.stack(again.frames[0]), expected)


def test_a_seed_for_each_window_changes_that_window_and_what_follows() -> None:
    pipe = pipeline()

    def draw(*seeds: int) -> Tensor:
        made = long_clip(
            pipe, num_frames=8, overlap=2, seeds=seeds, num_inference_steps=2, output_type="latent"
        )
        assert made.latents is made.frames
        return made.frames

    plain, other = draw(1, 2, 3), draw(1, 5, 3)
    same = (plain == other).all(dim=1).flatten(2).all(-1)[0]
    assert same.tolist() == [True] * 4 + [False] * 4
    with pytest.raises(RequestError, match="one, or one for each of the 3 windows"):
        draw(1, 2)


def test_a_first_frame_is_of_the_first_window_and_prompts_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, image = pipeline(), torch.rand(1, 3, 8, 8)
    calls: list[dict[str, Any]] = []
    inner = TextToVideoPipeline.__call__

    def call(self: Any, **given: Any) -> Any:
        calls.append(given)
        return inner(self, **{name: value for name, value in given.items() if name != "prompt"})

    monkeypatch.setattr(TextToVideoPipeline, "__call__", call)
    made = long_clip(
        pipe,
        "a | b",
        num_frames=6,
        overlap=2,
        video=image,
        task="image",
        num_inference_steps=1,
        output_type="np",
    )
    assert made.frames.shape == (1, 6, 8, 8, 3)
    assert np.array_equal(made.frames[0, 0].transpose(2, 0, 1), image[0])
    assert [one["prompt"] for one in calls] == ["a", "b"]
    assert "video" not in calls[1]


def test_an_interrupted_clip_keeps_its_latents() -> None:
    pipe = pipeline()
    steps = []

    def stop(one: Any, *_: Any) -> dict[str, Any]:
        steps.append(1)
        one._interrupt = len(steps) == 3
        return {}

    made = long_clip(pipe, num_frames=6, overlap=2, num_inference_steps=2, callback_on_step_end=stop)
    assert made.frames == []
    assert made.latents is not None
    assert made.latents.shape[2] == 4


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(RequestError, match="num_frames must be at least 1"):
        long_clip(pipeline(), num_frames=0)
    with pytest.raises(RequestError, match="overlap must be from 1 to 3"):
        long_clip(pipeline(), num_frames=9, overlap=4)
    with pytest.raises(RequestError, match="given_latents"):
        pipeline()(given_latents=torch.zeros(1, 3, 2, 9, 8), output_type="pt")


def test_what_is_given_is_given_of_the_whole_clip() -> None:
    pipe, real = pipeline(), torch.rand(9, 3, 8, 8)

    def kept(video: Tensor, frames: int = 9, **task: Any) -> list[int]:
        made = long_clip(
            pipe, num_frames=frames, overlap=2, video=video, num_inference_steps=1, output_type="pt", **task
        )
        same = [
            any(torch.equal(one, given) for given in video) for one in made.frames[0]
        ]
        return [place for place, one in enumerate(same) if one]

    assert kept(real[:2], task="first-last") == [0, 8], "the last picture ends the clip, not its first window"
    assert kept(real[:3], task="backward") == [6, 7, 8]
    assert kept(real[:5], task="predict") == [0, 1, 2, 3, 4], "more frames than a window has"
    assert kept(real, task=Task(name="interpolate", every=3)) == [0, 3, 6]
    assert kept(real[:2], task=Task(name="keyframes", keyframes=(1, 7))) == [1, 7]
    box = torch.zeros(9, 8, 8)
    box[:, 2:5, 1:6] = 1
    made = long_clip(
        pipe, num_frames=9, overlap=2, video=real, task=Task(mask=box), num_inference_steps=1, output_type="pt"
    )
    same = (made.frames[0] == real).all(1)
    assert torch.equal(same, box == 0)


def test_windows_begin_where_something_is_given_and_leave_out_what_is_given_whole() -> None:
    mask = torch.ones(9, 1, 1)
    mask[6:] = 0
    plan = planned(mask, 9, 4, 2)
    assert [(one.start, one.new.start, one.new.stop) for one in plan] == [(5, 5, 9), (3, 3, 5), (1, 1, 3), (0, 0, 1)]
    mask = torch.ones(9, 1, 1)
    mask[:5] = 0
    assert [(one.start, one.new.start, one.new.stop) for one in planned(mask, 9, 4, 2)] == [(2, 4, 6), (4, 6, 8), (5, 8, 9)]
    mask = torch.ones(9, 1, 1)
    mask[[0, 8]] = 0
    assert [one.start for one in planned(mask, 9, 4, 2)] == [0, 2, 4], "forward where both ends are given"
    assert len(planned(None, 9, 4, 2)) == len(windows(9, 4, 2))


def test_a_clip_that_goes_backward_joins_what_it_ends_with() -> None:
    pipe, real = pipeline(), torch.rand(4, 3, 8, 8)
    seen: list[int] = []
    made = long_clip(
        pipe, num_frames=8, overlap=2, video=real, task="backward", num_inference_steps=2, output_type="latent",
        on_window=lambda index, count, latents: seen.append(latents.shape[2]),
    )  # fmt: skip
    assert seen == [4, 6], "the last window is given whole"
    ends = real.transpose(0, 1)[None] * 2 - 1
    generator = torch.Generator().manual_seed(0)
    last = pipe(
        num_frames=4, generator=[generator], num_inference_steps=2, output_type="latent",
        given_latents=torch.cat([torch.zeros(1, 3, 2, 8, 8), ends[:, :, :2]], dim=2), task=Task(mask=[1, 1, 0, 0]),
    ).latents  # fmt: skip
    assert torch.allclose(made.latents[:, :, 2:6], last, atol=1e-5), "made first, before the given frames"
