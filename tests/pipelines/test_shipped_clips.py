"""The clip model that is shipped, where it is: found by its name, every task, and what its card says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import app_form
import app_tasks
from benchmarks._motion_eyes import judge
from benchmarks._motion_tasks import drawn
from pipelines import catalog, cli
from pipelines.generate import check, generate
from pipelines.request import Request

NAME = "motion"


@pytest.fixture(scope="module")
def card() -> catalog.Card:
    cards = catalog.shipped()
    if NAME not in cards:
        pytest.skip("no clip model is shipped in this checkout")
    return cards[NAME]


def made(**asked: Any) -> np.ndarray:
    result = generate(Request(**({"model": NAME, "steps": 2, "device": "cpu"} | asked)))
    return np.stack([np.asarray(one) for one in result.pictures[0].frames])


def test_its_card_says_what_doors_ask_of_it(card: catalog.Card) -> None:
    frames = card.more["frames"]
    assert (card.task, card.pipeline, card.more["tells_scenes"]) == ("text-to-video", "TextToVideoPipeline", True)
    assert frames > 1
    assert card.more["fps"] > 0
    assert card.low <= (card.width or 0) <= card.high
    config = json.loads((catalog.CHECKPOINTS / NAME / "transformer" / "config.json").read_text())
    assert config["frames"] == frames
    for prompt in card.more["examples"]:
        check(Request(model=NAME, prompt=prompt), card)
    assert {name for name, reason in app_tasks.possible(card).items() if not reason} == {
        "clip", "animate", "between", "story"
    }  # fmt: skip
    values = app_form.values_of(Request(model=NAME, prompt="-"), card, {})
    assert (values["task"], values["frames"], values["steps"]) == ("clip", frames, card.steps)
    size = sum(one.stat().st_size for one in (catalog.CHECKPOINTS / NAME).rglob("*"))
    assert size < 60e6, "bytes of a checkout"


def test_it_makes_what_is_asked_for_by_name(card: catalog.Card) -> None:
    shape = (card.more["frames"], card.height, card.width, 3)
    first = made(prompt="a red ball moves to the right")
    assert first.shape == shape
    assert np.array_equal(first, made(prompt="a red ball moves to the right"))
    assert not np.array_equal(first, made(prompt="a blue square falls"))
    story = made(prompts="a red ball rests | a blue square falls")
    assert story.shape[1:] == shape[1:]
    assert len(made(prompt="a red ball rests", frames=shape[0] + 2)) == shape[0] + 2


def test_it_goes_on_from_a_clip(card: catalog.Card, tmp_path: Path) -> None:
    paths = generate(Request(model=NAME, prompt="a red ball rests", steps=2, device="cpu")).save(tmp_path / "clip.png")
    before = made(prompt="a red ball rests")
    frames = len(before)
    for more, kept in (
        ({"task": "predict", "given": 3}, [0, 1, 2]), ({"task": "interpolate", "every": frames - 1}, [0, frames - 1]),
        ({"task": "backward", "given": 1}, [frames - 1]),
    ):  # fmt: skip
        after = made(prompt="a red ball rests", clip=str(paths[0]), **more)
        assert (after[kept] == before[kept]).all(), more
    onward = made(prompt="a red ball rests", clip=str(paths[0]), frames=frames + 4)
    assert np.array_equal(onward[:frames], before)


def test_the_first_model_is_the_one_of_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    assert next(iter(catalog.shipped())) == Request(prompt="-").model
    assert cli.main(["models"]) == 0
    rows = [row.split("\t") for row in capsys.readouterr().out.splitlines()[:-1]]
    assert [row[0] for row in rows] == list(catalog.shipped())
    assert all(row[3] not in ("", row[0]) for row in rows), "what it makes, not its name once more"


def test_it_draws_what_captions_name(card: catalog.Card) -> None:
    clips, captions = drawn(8, 123_456, kind="single", world=card.more["world"])
    told = [
        judge(made(prompt=caption, seed=place, steps=8).transpose(0, 3, 1, 2), clip.script)
        for place, (clip, caption) in enumerate(zip(clips, captions, strict=True))
    ]
    right = {name: sum(one[name] for one in told) for name in ("colour", "shape", "motion")}
    assert right["colour"] == 8
    assert min(right.values()) >= 7, right
