"""Beside a clip: its frames in order and its scenes as long as they are; no markup of a caption gets through."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

import app_clips
import app_form
import app_given
import app_tasks
import app_tokens
from app_inputs import TaskInputs
from pipelines.catalog import Card
from pipelines.request import Request, RequestError
from pipelines.video_files import encode


def frames(count: int) -> list[Image.Image]:
    return [Image.fromarray(np.full((48, 32, 3), 12 * place, np.uint8)) for place in range(count)]


def asked(prompts: str, scene_frames: str | None = None) -> Request:
    return Request(model="none", prompts=prompts, scene_frames=scene_frames)


@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_the_strip_has_first_and_last_frame_and_even_steps_between(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{ending}"
    path.write_bytes(encode(frames(15), ending, 8, "{}"))
    told = app_clips.strip(path)
    assert re.findall(r'alt="Frame (\d+)"', told) == ["0", "2", "4", "6", "8", "10", "12", "14"]
    shown = [Image.open(io.BytesIO(base64.b64decode(one))) for one in re.findall(r"base64,([^\"]+)", told)]
    assert {one.size for one in shown} == {(48, 72)}
    grey = [float(np.asarray(one).mean()) for one in shown]
    assert grey == pytest.approx([24 * place for place in range(8)], abs=6)


def test_a_file_that_has_changed_is_read_again_and_one_that_has_gone_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "clip.gif"
    path.write_bytes(encode(frames(3), ".gif", 8, "{}"))
    assert len(re.findall("<img", app_clips.strip(path))) == 3
    path.write_bytes(b"GIF89a and no more")
    assert app_clips.strip(path) == ""
    path.unlink()
    assert app_clips.strip(path) == ""


def test_scenes_are_as_long_as_they_are() -> None:
    assert app_clips.parts(asked("a | b | c"), 24) == [(0, 8, "a"), (8, 16, "b"), (16, 24, "c")]
    assert app_clips.parts(asked("0: a | 5: b"), 12) == [(0, 5, "a"), (5, 12, "b")]
    assert app_clips.parts(asked("a | b", "3,6"), 9) == [(0, 3, "a"), (3, 9, "b")]
    assert app_clips.parts(asked("a | b", "4"), 8) == [(0, 4, "a"), (4, 8, "b")]
    told = app_clips.scenes(asked("a | b", "3,6"), 9)
    assert re.findall(r"flex:(\d+) ", told) == ["3", "6"]
    assert "<b>3–8</b> b" in told


def test_one_caption_needs_no_scenes_and_a_picture_no_strip(tmp_path: Path) -> None:
    assert app_clips.scenes(Request(model="none", prompt="a"), 9) == ""
    assert app_clips.beside(asked("a | b"), tmp_path / "none.png", 1) == ""


def test_captions_are_told_as_text() -> None:
    told = app_clips.scenes(asked('<img src=x> | "><script>b'), 4)
    assert "<img" not in told
    assert "<script" not in told


def card(pipeline: str = "TextToVideoPipeline", task: str = "text-to-video") -> Card:
    return Card(
        name="none", title="None", task=task, pipeline=pipeline, width=64, height=64, more={"frames": 16}
    )


def value(component: Any) -> Any:
    """Return the value of a component that an event gives back."""
    return component["value"] if isinstance(component, dict) else component.value


def form_says(values: dict[str, Any], model: Card) -> Request:
    more = app_given.fields_of(values, model, str)  # type: ignore[arg-type]  # no file is kept
    return app_form.request_of(values, {}, more=more)


def test_a_story_goes_from_the_form_to_its_request_and_back() -> None:
    model = card()
    values = app_form.values_of(Request(model="none", prompt="-", seed=3), model, {}) | {
        "task": "story", "prompt": "a red ball | a blue box", "frames": 24, "profile": "",
    }  # fmt: skip
    request = form_says(values, model)
    assert (request.prompts, request.prompt, request.frames) == ("a red ball | a blue box", "", 24)
    again = app_form.values_of(request, model, {})
    assert (again["task"], again["prompt"]) == ("story", "a red ball | a blue box")
    assert form_says(again, model) == request
    assert form_says(values | {"frames": 0, "fps": 0}, model) == form_says(values | {"frames": None, "fps": None}, model)
    assert form_says(values | {"frames": 0}, model).frames is None, "gradio's word for an empty field"
    plain = form_says(values | {"task": "clip"}, model)
    assert (plain.prompts, plain.prompt) == (None, "a red ball | a blue box")
    with pytest.raises(RequestError, match="prompt"):
        form_says(values | {"prompt": "a red ball | "}, model)


def test_scenes_of_their_own_lengths_come_back_with_their_frames() -> None:
    model = dataclasses.replace(card(), more={"frames": 16, "tells_scenes": True, "scenes": 3, "scene_frames": 8})
    uneven = app_form.values_of(asked("a | b | c", "8,4,8"), model, {})
    assert (uneven["prompt"], uneven["frames"]) == ("0-8: a | 8-12: b | 12-20: c", 20)
    plain = app_form.values_of(asked("a | b | c"), model, {})
    assert (plain["prompt"], plain["frames"]) == ("a | b | c", 24), "as many as the story has"
    story = app_form.values_of(asked("a | b", "4"), card("StoryToVideoPipeline"), {})
    assert (story["prompt"], story["frames"]) == ("0-4: a | 4-8: b", 8)
    assert app_form.values_of(asked("a | b", "1,2,3"), model, {})["frames"] == 16
    form = TaskInputs({"none": model}, {}, {})
    for task, now, shown in (("story", 16, (0, "Frames (0: 8 a scene)")), ("clip", 0, (16, "Frames")), ("clip", 5, (5, "Frames"))):
        field = form._frames(task, "none", now)
        assert (field.value, field.label) == shown


def test_number_fields_of_a_clip_take_the_0_that_gradio_says_of_an_empty_one() -> None:
    inputs: dict[str, Any] = {}
    form = TaskInputs({"none": card()}, inputs, {})
    with gr.Blocks():
        form.draw_task(card())
        form.draw_inputs(card())
        form.draw_loras(card())
    for name in ("frames", "fps"):
        assert inputs[name].preprocess(0) == 0, "a page that began with a model of pictures says so"
    told = dataclasses.replace(card(), more={"frames": 16, "fps": 8})
    assert value(form.of_model(told)[inputs["fps"]]) == 8
    values = app_form.values_of(Request(model="none", prompt="a", seed=3), told, {}) | {"profile": ""}
    assert (values["fps"], form_says(values, told).fps) == (8, None)
    assert form_says(values | {"fps": 12}, told).fps == 12


def test_what_of_a_clip_the_form_cannot_hold_is_told() -> None:
    request = Request(model="none", prompt="a", clip="film.mp4", task="predict", given=4, window=8, frames=24)
    told = app_given.left_out(request, card())
    assert told == ["its clip", "its task", "its count of given frames", "its window"]
    assert not app_given.left_out(Request(model="none", prompt="a", frames=24), card())


def test_stories_are_for_models_that_hear_more_than_one_caption() -> None:
    assert not app_tasks.possible(card())["story"]
    assert not app_tasks.possible(card("StoryToVideoPipeline"))["story"]
    assert "one caption" in app_tasks.possible(card("WanPipeline"))["story"]
    assert "still pictures" in app_tasks.possible(card("TextToImagePipeline", "text-to-image"))["story"]
    request = Request(model="none", prompts="a | b")
    assert app_tasks.task_of(request, card("WanPipeline")) == "clip"


def test_the_longest_caption_of_a_story_is_counted_not_the_sum_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(app_tokens._minilm())
    monkeypatch.setattr(app_tokens, "_tokenizers", lambda _name: (("MiniLM", tokenizer, 8),))
    told = "a red ball | a blue box that falls | a dog"
    assert "9 / 8 tokens" not in app_tokens.line(told, card(), story=True)
    assert "7 / 8 tokens in scene 2 of 3, the longest</span>" in app_tokens.line(told, card(), story=True)
    assert "too long" in app_tokens.line(told, card()), "one caption with bars in it"
    over = app_tokens.line("0-4: a dog | 4-8: " + "cat " * 9 + "mouse", card(), story=True)
    assert "12 / 8 tokens in scene 2 of 2, the longest: too long" in over
    assert "Not read: <s>cat cat cat mouse</s>" in over
    assert app_tokens.line("a | ", card(), story=True).count("tokens</span>") == 1, "half typed"
    assert "scene" not in app_tokens.line("a red ball", card(), story=True)
