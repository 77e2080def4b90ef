"""Accelerators in a request: what can have no effect ends the run after its first step, what had none is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from acceleration.base import Untouched
from pipelines.generate import Progress, generate
from pipelines.request import Request, RequestError


@pytest.mark.parametrize(
    ("method", "more", "words"),
    [
        ("token-merge", {}, "min_tokens is 256"),
        ("adaspa", {}, "min_tokens is 8192"),
        ("xattention", {}, "min_tokens is 8192"),
        ("guidance-skip", {"guidance": 1.0}, "no unconditional branch was seen: guidance is off"),
        ("step-forecast:mask=1010", {}, "its mask is of 4 steps, the run has 8"),
    ],
)
def test_no_more_than_the_first_step_is_spent(
    tiny: str, method: str, more: dict[str, float], words: str
) -> None:
    told: list[Progress] = []
    request = Request(prompt="a cat", model=tiny, steps=8, accelerators=(method,), **more)
    with pytest.raises(RequestError, match=words) as error:
        generate(request, on_step=told.append)
    assert error.value.field == "accelerators"
    assert isinstance(error.value.__cause__, Untouched)
    assert [one.step for one in told if one.phase == "denoise"] == [1]
    plain = request.replace(accelerators=(), steps=2)
    assert generate(plain).report["pixels"] == generate(plain).report["pixels"], "nothing is left behind"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("delta-cache:warmup=100", "delta-cache: every block of every call was computed"),
        ("taylor-cache:warmup=100", "taylor-cache: every block of every call was computed"),
        ("step-forecast:warmup=100", "step-forecast: 0 of 4 calls of the network were forecast"),
        ("guidance-skip:warmup=100", "guidance-skip: of the unconditional forwards none was spared"),
        ("adaspa:warmup=0.95,min_tokens=2", "adaspa: every attention call was dense"),
        ("token-merge:warmup=100,min_tokens=4", "token-merge: no token was merged"),
    ],
)
def test_a_schedule_that_leaves_nothing_out_is_told(tiny: str, method: str, words: str) -> None:
    request = Request(prompt="a cat", model=tiny, steps=4, accelerators=(method,))
    report = generate(request).report
    assert report["warnings"][0].startswith("nothing was saved in 4 steps: ")
    assert words in report["warnings"][0]
    if not method.startswith("guidance-skip"):  # which computes a batch of both branches as two
        assert report["pixels"] == generate(request.replace(accelerators=())).report["pixels"]


def test_what_saves_or_is_neutral_is_not_warned_of(tiny: str) -> None:
    for method in ("delta-cache", "delta-cache:interval=1", "guidance-skip", "step-forecast"):
        assert not generate(Request(prompt="a cat", model=tiny, steps=6, accelerators=(method,))).report[
            "warnings"
        ]


@pytest.mark.parametrize("family", ["flux", "sd3", "ours"])
def test_a_starting_picture_leaves_out_steps_and_the_last_one_is_full_all_the_same(
    family: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    picture = tmp_path / "noise.png"
    Image.effect_noise((32, 32), 90).convert("RGB").save(picture)
    report = generate(
        Request(
            prompt="a cat", model=str(folder_of(family)), width=32, height=32, steps=8, image=str(picture), strength=0.6,
            guidance=1.0, accelerators=("delta-cache:warmup=1,mode=whole",),
        )
    ).report  # fmt: skip
    states = [set(cell["states"]) for cell in report["run"]["cells"]]
    assert states == [{"C"}, {"C"}, {"R"}, {"C"}, {"C"}]
    assert report["run"]["predicted_speedup"] == 5 / 4
