"""Prompts over time: three forms, one text; and how a request for a clip reaches our two video pipelines."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from dit import clip_masks
from pipelines import request
from pipelines.request import Request, RequestError
from pipelines.schedule import read_numbers, read_prompts, spread, text_of

_place = importlib.util.spec_from_file_location("tiny_clips", Path(__file__).with_name("tiny_clips.py"))
assert _place is not None
assert _place.loader is not None
tiny_clips = importlib.util.module_from_spec(_place)
_place.loader.exec_module(tiny_clips)
clips = tiny_clips.clips

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
