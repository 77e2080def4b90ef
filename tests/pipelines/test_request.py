"""A request checks itself, says what is allowed, and survives JSON."""

from __future__ import annotations

import json
import math
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest

from acceleration.delta_cache import DeltaCache
from pipelines.request import LARGEST_SEED, PROMPT_LENGTH, Request, RequestError, settings

BAD: list[tuple[str, Any, str]] = [
    ("prompt", "", "1 to 2000"),
    ("prompt", "  \n\t ", "1 to 2000"),
    ("prompt", "x" * 10_000, "at most 2000"),
    ("prompt", 42, "text"),
    ("prompt", b"a cat", "text"),
    ("prompt", None, "text"),
    ("prompt", ["a cat"], "text"),
    ("prompt", "a cat\x00", "U+0000"),
    ("prompt", "\ud800", "U+D800"),
    ("prompt", "\u200b", "at least one letter"),
    ("negative_prompt", "y" * (PROMPT_LENGTH + 1), "at most 2000"),
    ("negative_prompt", 1.5, "text"),
    ("model", "", "text"),
    ("model", 7, "text"),
    ("width", 0, "16 to 4096 px"),
    ("width", -64, "16 to 4096 px"),
    ("height", 8192, "16 to 4096 px"),
    ("height", 64.5, "whole number"),
    ("width", "64", "whole number"),
    ("width", True, "whole number"),
    ("frames", 0, "1 to 1000"),
    ("steps", 0, "1 to 1000 steps"),
    ("steps", 10**9, "1 to 1000 steps"),
    ("guidance", math.nan, "0 to 50"),
    ("guidance", math.inf, "0 to 50"),
    ("guidance", -1.0, "0 to 50"),
    ("guidance", "strong", "0 to 50"),
    ("seed", -1, "from 0"),
    ("seed", LARGEST_SEED + 1, "from 0"),
    ("seed", 1.5, "whole number"),
    ("images", 0, "1 to 256"),
    ("images", 10**6, "1 to 256"),
    ("scheduler", "eulr", "dpm++2m"),
    ("strength", 0.0, "0.01 to 1"),
    ("strength", math.nan, "0.01 to 1"),
    ("guidance_mode", "both", "batched, sequential"),
    ("dtype", "int8", "bfloat16"),
    ("device", "cuda:-1", "cpu"),
    ("device", "toaster", "cpu"),
    ("class_label", -1, "from 0"),
    ("image", "", "text"),
    ("accelerators", "no-such", "delta-cache"),
    ("accelerators", "delta-cache:interval=0", "interval"),
    ("accelerators", 5, "list"),
    ("accelerators", (DeltaCache(), DeltaCache(interval=3)), "once"),
]


CLIP: dict[str, Any] = {
    "prompts": "a | b", "fps": 12.0, "clip": "c.mp4", "task": "keyframes", "keyframes": "0,7", "window": 8, "overlap": 4,
    "window_seeds": "1,2", "scene_frames": "4,6", "tiling": True,
}  # fmt: skip
OTHERS: list[dict[str, Any]] = [  # settings of a clip that exclude those
    {"last_image": "z.png"}, {"clip": "c", "task": "predict", "given": 3}, {"clip": "c", "task": "interpolate", "every": 2},
    {"clip": "c", "task": "region", "region": "0,0,8,8"}, {"clip": "c", "mask": "m.png"},
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "words"), BAD, ids=lambda v: repr(v)[:30])
def test_bad_input_names_field_given_and_allowed(field: str, value: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request(**({"prompt": "a cat"} | {field: value}))
    assert caught.value.field == field
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500
    assert isinstance(caught.value, ValueError)
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own bytes
    assert (again.field, str(again)) == (field, str(caught.value))


def test_good_input_at_the_limits() -> None:
    request = Request(
        prompt="x" * PROMPT_LENGTH, seed=LARGEST_SEED, width=16, height=4096, guidance=0, strength=1
    )
    assert request.guidance == 0.0
    assert isinstance(request.guidance, float)
    assert Request(prompt="ein süßer 🐸 – 犬\nzweite Zeile").prompt.startswith("ein")


def test_the_last_seed_of_several_pictures_is_a_seed_too() -> None:
    with pytest.raises(RequestError, match="seed"):
        Request(prompt="a cat", seed=LARGEST_SEED, images=2)


def test_a_class_number_takes_the_place_of_a_prompt() -> None:
    assert Request(class_label=3).prompt == ""
    with pytest.raises(RequestError, match="prompt"):
        Request(class_label=3, prompt="a cat")


def test_json_round_trip_of_every_field() -> None:
    request = Request(
        prompt="a cat", negative_prompt="dog", model="emoji", width=64, height=32, steps=7, guidance=2.5, seed=9, images=3,
        scheduler="heun", image="start.png", strength=0.4, guidance_mode="sequential", dtype="float32", device="cpu", frames=2,
        accelerators=(DeltaCache(interval=3),), metadata="none",
    )  # fmt: skip
    changed = [
        one.name for one in settings() if getattr(request, one.name) == one.default and one.name != "model"
    ]
    left = {"class_label", "profile", "controls", "loras", "panels", "layout", "known", *CLIP}
    left |= {name for one in OTHERS for name in one}
    assert set(changed) == left, "every other field is set to something else than its default"
    for one in (request, Request(**CLIP), *(Request(prompt="a", **more) for more in OTHERS)):
        assert Request.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_accelerators_are_read_from_text_and_dictionaries() -> None:
    made = Request(prompt="a", accelerators=("delta-cache:interval=3",))  # type: ignore[arg-type]
    assert made.accelerators == (DeltaCache(interval=3),)
    same = Request(prompt="a", accelerators=({"name": "delta-cache", "interval": 3},))  # type: ignore[arg-type]
    assert same == made


def test_an_unknown_field_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(RequestError, match="guidance"):
        Request.from_dict({"prompt": "a", "guidence": 3})
    with pytest.raises(RequestError, match="dictionary"):
        Request.from_dict(["prompt"])  # type: ignore[arg-type]


def test_one_picture_of_several() -> None:
    request = Request(prompt="a", seed=5, images=3)
    assert request.one(2) == Request(prompt="a", seed=7)
    with pytest.raises(RequestError):
        request.one(3)


@pytest.mark.parametrize("code", ["import pipelines.request", "import pipelines.generate, pipelines.form, pipelines.repro",
                                  "from pipelines.cli import build_parser; build_parser().format_help()"])  # fmt: skip
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    script = f"import sys; {code}; print([m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "a cat"}, "a cat"),
        ({"prompts": "a cat | a dog"}, "a cat | a dog"),
        ({"class_label": 0}, "class 0"),
        ({"task": "unconditional"}, "no prompt"),
    ],
)
def test_a_request_in_words_and_as_the_name_of_a_file(fields: dict[str, Any], words: str) -> None:
    from pipelines.result import _slug

    request = Request(**fields)
    assert request.words == words
    assert _slug(request) == re.sub("[^a-z0-9]+", "-", words)
