"""The judge learns what it is shown, sees no held-out picture, and is the same after saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from training import judge
from training.data import load_pictures
from training.judge import Court, Judge, Lessons, augment, held_out, load_judge, mixed, save_judge

AUGMENT = {
    "mirror": 0.5,
    "shift": 1.0,
    "scale": 0.05,
    "turn": 2.0,
    "blur": 0.5,
    "noise": 0.02,
    "grey": 0.1,
    "light": 0.05,
    "cut": 6,
    "mix": 0.1,
}
MODEL = {"style": {"widths": [8], "depth": 1}, "concept": {"widths": [8, 16], "depth": 1}}
NONE = dict.fromkeys(AUGMENT, 0)


@pytest.fixture
def recipe() -> dict[str, Any]:
    return {
        "model": {"style": {"widths": [16], "depth": 1}, "concept": {"widths": [16, 16, 32], "depth": 1}},
        "augment": {"style": AUGMENT, "concept": AUGMENT},
        "objective": {"smoothing": 0.0},
        "optimizer": {
            "name": "muon",
            "rate": 5e-3,
            "matrix_rate": 1e-2,
            "decay": 0.0,
            "clip": 5.0,
            "ema": 0.8,
            "warmup": 2,
            "cooldown": 0.5,
        },
        "run": {"style_samples": 320, "concept_samples": 640, "batch": 16, "precision": "float32", "seed": 3},
    }


@pytest.fixture
def court() -> Court:
    torch.manual_seed(0)
    return Court(Judge(MODEL, 3, 7).eval(), ["a", "b", "c"], list("tuvwxyz"))


def test_a_judge_learns_and_composes(recipe: dict[str, Any], folder: Path) -> None:
    pictures = load_pictures(folder)
    concepts = sorted({row["concept"] for row in pictures.rows})
    trained = judge.train(recipe, ["fluent3d", "fluentbw", "noto"], concepts, pictures)
    found = held_out(trained, pictures)
    assert found["learnt"]["pictures"] == 11
    assert found["learnt"]["style_top1"] > 0.8
    assert found["learnt"]["concept_top1"] > 0.6
    assert found["held_out"]["pictures"] == 1
    assert found["held_out"]["style_top1"] == 1
    assert found["held_out_other_styles"]["pictures"] == 0
    assert "style_top1" not in found["held_out_other_styles"]


def test_held_out_pictures_are_no_lessons_and_styles_come_from_other_concepts(folder: Path) -> None:
    pictures = load_pictures(folder)
    given: list[list[dict[str, Any]]] = []

    class Watched(Lessons):
        def __init__(self, pictures: Any, key: str, names: list[str]) -> None:
            given.append(pictures.rows)
            super().__init__(pictures, key, names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "Lessons", Watched)
        judge.lessons_for(pictures, ["fluent3d", "noto"], ["apple", "dog"])
    style, concept = given
    assert {row["split"] for row in style + concept} == {"train"}
    assert {row["concept"] for row in style} == {"apple", "red heart", "rocket"}, (
        "the dog has a held-out picture"
    )
    assert {row["style"] for row in style} == {"fluent3d", "noto"}
    assert {row["concept"] for row in concept} == {"apple", "dog"}
    assert {row["style"] for row in concept} == {"fluent3d", "fluentbw", "noto", "photo"}


def test_every_pair_is_drawn_equally_often(folder: Path) -> None:
    pictures = load_pictures(folder)
    many = pictures.only([row["style"] == "photo" for row in pictures.rows])
    crowded = type(pictures)(
        torch.cat([pictures.pixels, *[many.pixels] * 20]), pictures.rows + many.rows * 20
    )
    lessons = Lessons(crowded, "style", ["fluent3d", "fluentbw", "noto", "photo"])
    dice = torch.Generator().manual_seed(0)
    labels = torch.cat([lessons.draw(130, dice)[1] for _ in range(20)])
    assert int((labels == 3).sum()) == pytest.approx(200, rel=0.2)
    assert int((labels == 0).sum()) == pytest.approx(800, rel=0.1)


def test_neutral_augmentation_changes_nothing() -> None:
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(augment(pictures, NONE, torch.Generator()), pictures, atol=1e-4, rtol=0)


def test_what_comes_in_from_outside_is_white() -> None:
    shifted = augment(-torch.ones(32, 3, 64, 64), NONE | {"shift": 8.0}, torch.Generator().manual_seed(1))
    assert shifted.max() == pytest.approx(1.0)
    assert shifted[:, :, 30:34, 30:34].max() == pytest.approx(-1.0)


@pytest.mark.parametrize("name", sorted(set(AUGMENT) - {"mix"}))
def test_each_augmentation_does_something_and_repeats(name: str) -> None:
    pictures = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = NONE | {
        name: 20
        if name == "cut"
        else 0.5
        if name in ("scale", "mirror", "blur", "noise", "grey", "light")
        else 5.0
    }
    first, second = (augment(pictures, given, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, second)
    assert (first - pictures).abs().max() > 0.05
    assert first.abs().max() <= 1


def test_mixing_tells_each_own_part() -> None:
    pictures = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 2, 2)
    found, own = mixed(pictures, 1.0, torch.Generator().manual_seed(0))
    assert ((own >= 0.5) & (own <= 1)).all()
    torch.testing.assert_close(found[1, 0, 0, 0], own[1] * 1 + (1 - own[1]) * 0)
    torch.testing.assert_close(found[0, 0, 0, 0], own[0] * 0 + (1 - own[0]) * 3)
    same, whole = mixed(pictures, 0.0, torch.Generator())
    assert torch.equal(same, pictures)
    assert whole.tolist() == [1.0] * 4


def test_a_verdict_does_not_depend_on_the_batch(court: Court) -> None:
    pixels = torch.randint(0, 256, (70, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    torch.testing.assert_close(court.features(pixels)[66:67], court.features(pixels[66:67]))
    styles, concepts = court.verdicts(pixels)
    assert len(styles) == len(concepts) == 70
    assert all(len(set(row)) == 5 for row in concepts)
    assert court.verdicts(pixels[66:67]) == (styles[66:67], concepts[66:67])


def test_accuracy_counts_what_the_verdicts_say(court: Court) -> None:
    pixels = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(1)).byte()
    styles, concepts = court.verdicts(pixels)
    rows = [
        {"style": styles[0], "concept": concepts[0][0]},
        {"style": styles[1], "concept": concepts[1][4]},
        {"style": "none", "concept": "none"},
    ]
    found = court.accuracy(pixels, rows)
    assert found == pytest.approx(
        {"pictures": 3, "style_top1": 2 / 3, "concept_top1": 1 / 3, "concept_top5": 2 / 3}
    )


def test_a_saved_judge_is_the_same(court: Court, tmp_path: Path) -> None:
    court.judge.to(torch.bfloat16).float()
    save_judge(court, tmp_path, {"recipe": {"model": MODEL}, "seconds": 1})
    again = load_judge(tmp_path)
    assert (again.styles, again.concepts) == (court.styles, court.concepts)
    assert again.digest.startswith("sha256:")
    pixels = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(2)).byte()
    assert torch.equal(again.features(pixels), court.features(pixels))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judge.json", "judge.safetensors"]


def test_the_command_trains_measures_and_saves(
    recipe: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{key} = {inline(one)}" for key, one in value.items()) + " }"
        return json.dumps(value)

    def toml(values: dict[str, Any]) -> str:
        return "".join(f"{name} = {inline(one)}\n" for name, one in values.items())

    recipe["data"] = {"folder": str(folder), "concepts_of": "model.toml"}
    (tmp_path / "judge.toml").write_text(toml(recipe))
    model = {"styles": ["noto", "fluentbw"], "subgroups": ["animal-mammal"], "concepts": ["apple"]}
    (tmp_path / "model.toml").write_text(toml({"data": model}))
    command = [
        "judge",
        str(tmp_path / "judge.toml"),
        "--out",
        str(tmp_path / "out"),
        "--set",
        "run.style_samples=32",
        "--set",
        "run.concept_samples=16",
    ]
    monkeypatch.setattr("sys.argv", command)
    judge.main()
    known = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert known["concepts"] == ["apple", "dog"]
    assert known["styles"] == ["noto", "fluentbw"]
    assert known["recipe"]["run"]["style_samples"] == 32
    assert known["accuracy"] == json.loads(capsys.readouterr().out)
    assert known["accuracy"]["held_out"]["pictures"] == 1
