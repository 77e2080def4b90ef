"""The exam asks what it says, and its figures follow from the judge's verdicts; a perfect model gets full marks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import quality
from benchmarks.exam import SYNONYMS, Answers, Exam, set_exam, sit
from training.data import STYLES, Pictures
from training.judge import Court, Judge, save_judge

DRAWN = ["fluent3d", "noto"]
CONCEPTS = ["dog", "cat", "rabbit", "automobile", "fire", "apple"]
CAPTIONS = {f"{c}, {STYLES[s][0]}": (c, s) for c in CONCEPTS for s in DRAWN}


def drawing(concept: str, style: str) -> Tensor:
    """A picture that tells its concept by the first pixel and its style by the second."""
    pixels = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    pixels[:, 0, 0], pixels[:, 0, 1] = CONCEPTS.index(concept), DRAWN.index(style)
    return pixels


class Reader(torch.nn.Module):
    """A judge that reads what `drawing` wrote; features are a few pixels."""

    def features(self, pictures: Tensor) -> Tensor:
        return pictures[:, :, 0, :4].flatten(1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        values = ((pictures[:, 0, 0, :2] + 1) * 127.5).round()
        styles = -(values[:, 1:2] - torch.arange(len(DRAWN))).abs()
        return styles, -(values[:, :1] - torch.arange(len(CONCEPTS)) + 0.1).abs()


@pytest.fixture
def court() -> Court:
    return Court(Reader(), DRAWN, CONCEPTS, "sha256:0")  # type: ignore[arg-type]


@pytest.fixture
def pictures() -> Pictures:
    rows, pixels = [], []
    for caption, (concept, style) in CAPTIONS.items():
        split = "val_pair" if (concept, style) in [("dog", "noto"), ("fire", "fluent3d")] else "train"
        keywords = ["puppy"] if concept == "dog" else None
        rows.append(
            {"caption": caption, "concept": concept, "style": style, "split": split, "keywords": keywords}
            | {"subgroup": "any"}
        )
        pixels.append(drawing(concept, style))
    rows.append(rows[0] | {"style": "blob", "split": "val_pair"})
    pixels.append(pixels[0])
    return Pictures(torch.stack(pixels), rows)


@pytest.fixture
def exam(pictures: Pictures) -> Exam:
    return set_exam(pictures, DRAWN, learnt=4)


def right(prompts: list[str], seeds: list[int]) -> Tensor:
    """A perfect model: it even knows the first concept that each synonym stands for."""
    assert len(prompts) == len(seeds)
    made = []
    for prompt in prompts:
        name, _, words = prompt.partition(", ")
        concept = name if name in CONCEPTS else next(one for one in SYNONYMS[name] if one in CONCEPTS)
        made.append(drawing(concept, next(style for style in DRAWN if STYLES[style][0] == words)))
    return torch.stack(made)


def wrong(prompts: list[str], seeds: list[int]) -> Tensor:
    return torch.stack([drawing("apple", "noto") for _ in prompts])


def test_the_exam_asks_for_held_out_pairs_of_the_models_styles(exam: Exam) -> None:
    assert {row["caption"] for row in exam.held_out.rows} == {"dog, cartoon", "fire, 3d render"}
    assert len(exam.learnt) == 4
    assert len(exam.others) == 6
    learnt, others = ({row["caption"] for row in part.rows} for part in (exam.learnt, exam.others))
    assert not learnt & others
    assert all(row["split"] == "train" for row in exam.learnt.rows + exam.others.rows)


def test_the_exam_repeats(pictures: Pictures, exam: Exam) -> None:
    again = set_exam(pictures, DRAWN, learnt=4)
    assert again.learnt.rows == exam.learnt.rows
    assert again.words == exam.words


def test_synonyms_only_of_known_concepts_and_marked_where_they_were_keywords(exam: Exam) -> None:
    found = {word.prompt.partition(",")[0]: word for word in exam.words}
    assert found["puppy"].accepted == ("dog",)
    assert found["puppy"].keyword
    assert not found["hare"].keyword
    assert "pony" not in found


def test_no_synonym_is_accepted_for_nothing() -> None:
    assert all(accepted and word not in accepted for word, accepted in SYNONYMS.items())


def test_synonyms_name_concepts_of_the_recipe(shared: Path) -> None:
    with open(shared / "data" / "emoji64" / "captions.jsonl") as stream:
        concepts = {row["concept"] for row in map(json.loads, stream)}
    assert {one for accepted in SYNONYMS.values() for one in accepted} <= concepts
    assert not concepts & set(SYNONYMS)


def test_every_seed_is_asked_for_every_held_out_pair(exam: Exam) -> None:
    asked: list[tuple[str, int]] = []

    def make(prompts: list[str], seeds: list[int]) -> Tensor:
        asked.extend(zip(prompts, seeds, strict=True))
        return right(prompts, seeds)

    answers = sit(make, exam, 3)
    assert [pair for pair in asked if pair[0] == "dog, cartoon"] == [
        ("dog, cartoon", seed) for seed in range(3)
    ]
    assert len(answers.held_out) == 6
    assert len(answers.learnt) == 4
    assert len(answers.words) == 2 * len(exam.words)


def test_a_perfect_model_gets_full_marks(court: Court, exam: Exam) -> None:
    found = quality.judge(court, exam, sit(right, exam, 2))
    full = {"style_top1": 1.0, "concept_top1": 1.0, "concept_top5": 1.0}
    assert found["held_out"] == {"pictures": 4, "pairs": 2, "seeds": 2} | full
    assert found["learnt"] == {"pictures": 4} | full
    assert found["held_out_by_style"]["noto"] == {"pictures": 2} | full
    assert found["synonyms"]["right_top5"] == found["synonyms"]["new_top5"] == 1
    assert found["missed"] == {}
    assert found["frechet"]["to_same"] == pytest.approx(0, abs=1e-9)
    assert found["frechet"]["to_others"] == pytest.approx(found["frechet"]["floor"])
    json.dumps(found)


def test_a_bad_model_gets_what_it_deserves(court: Court, exam: Exam) -> None:
    found = quality.judge(court, exam, sit(wrong, exam, 2))
    assert found["held_out"]["style_top1"] == 0.5
    assert found["held_out"]["concept_top1"] == 0
    assert found["held_out"]["concept_top5"] == 0.5  # of six concepts, five: all but the dog
    assert list(found["missed"]) == ["dog, cartoon"]
    assert found["frechet"]["to_same"] > 0
    assert 0 < found["synonyms"]["right_top5"] < 1


def test_real_pictures_are_judged_beside_and_through_the_codec(court: Court, exam: Exam) -> None:
    codec = SimpleNamespace(dtype=torch.float32, encode=lambda x: x, decode=lambda x: torch.ones_like(x))
    found = quality.reality(court, exam, codec)
    assert found["held_out"]["concept_top1"] == 1
    assert found["held_out_through_codec"]["concept_top1"] == 0
    assert "held_out_through_codec" not in quality.reality(court, exam)


def test_accelerated_answers_are_compared_with_the_exact_ones() -> None:
    dark, light = torch.zeros(2, 3, 16, 16).byte(), torch.full((2, 3, 16, 16), 10).byte()
    exact, fast = (Answers(part, part, part, seconds) for part, seconds in ((dark, 6.0), (light, 2.0)))
    found = quality.alike(exact, fast)
    assert found["times_as_fast"] == pytest.approx(3)
    assert found["psnr_db"] == pytest.approx(28.13, abs=0.01)
    assert found["ssim"] < 1


def test_the_sheet_shows_every_picture_with_its_prompt() -> None:
    made = torch.zeros(70, 3, 64, 64).byte()
    made[9, 0] = 255
    rows = [{"caption": f"a thing of number {i}, black and white icon"} for i in range(70)]
    board = quality.sheet(made, rows)
    width, height = board.size
    assert board.getpixel((width // 8 + 30, height // 8 + 30)) == (255, 0, 0)
    assert board.getpixel((30, height // 8 + 30)) == (0, 0, 0)
    under = board.crop((0, 4 + 128, width // 8, height // 8))
    assert np.asarray(under).min() < 100
    assert quality.sheet(made[:3], rows[:3]).size == (width, height // 8)


class Pipeline:
    """Stands in for a text-to-image pipeline."""

    device = torch.device("cpu")
    transformer = None

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, prompts: list[str], **given: Any) -> SimpleNamespace:
        self.calls.append(given | {"prompts": prompts})
        return SimpleNamespace(images=right(prompts, given["seeds"]).float() / 255)


def test_pictures_are_made_in_batches_with_their_own_seeds() -> None:
    pipeline, prompts = Pipeline(), ["dog, cartoon", "cat, cartoon", "fire, 3d render"]
    make = quality.maker(pipeline, steps=7, guidance=None, batch=2, reports=[])
    assert torch.equal(make(prompts, [4, 5, 6]), right(prompts, [4, 5, 6]))
    assert [call["seeds"] for call in pipeline.calls] == [[4, 5], [6]]
    assert all(call["num_inference_steps"] == 7 and "guidance_scale" not in call for call in pipeline.calls)


def test_the_command_writes_figures_and_sheet(
    pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = {part: {"widths": [8, 16], "depth": 1} for part in ("style", "concept")}
    save_judge(
        Court(Judge(model, 2, 6), DRAWN, CONCEPTS),
        tmp_path / "judge",
        {"recipe": {"model": model}},
    )
    recipe = tmp_path / "model.toml"
    recipe.write_text(
        f'[data]\nfolder = "none"\nstyles = {json.dumps(DRAWN)}\nsubgroups = []\nconcepts = []\n'
    )
    monkeypatch.setattr(quality, "load_pictures", lambda *_: pictures)
    known = {"model": "perfect", "digest": "sha256:1", "steps": 3, "guidance": 2.0}
    monkeypatch.setattr(quality, "load_pipeline", lambda *_: (Pipeline(), known))
    command = [
        "quality",
        "--recipe",
        str(recipe),
        "--judge",
        str(tmp_path / "judge"),
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr("sys.argv", [*command, "--seeds", "2", "--learnt", "4"])
    quality.main()
    found = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert found["machine"]["processor"]
    assert found["commit"]
    assert found["model"] == known | {"seeds": 2, "batch": 16}
    assert found["judge"].startswith("sha256:")
    # A perfect model does exactly as well as the real pictures.
    (run,) = found["runs"]
    assert run["held_out"]["concept_top5"] == found["real"]["held_out"]["concept_top5"]
    assert run["learnt"]["style_top1"] == found["real"]["learnt"]["style_top1"]
    assert Image.open(tmp_path / "out" / "held_out.png").width > 1000
    assert "real held-out pictures" in capsys.readouterr().out


def test_what_to_ask_stands_in_the_card_or_else_in_the_recipe(
    pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "model.toml"
    recipe.write_text(
        '[data]\nfolder = "none"\nstyles = ["noto"]\nsubgroups = []\nconcepts = ["dog", "fire"]\n'
    )
    monkeypatch.setattr(quality, "load_pictures", lambda *_: pictures)
    found, styles = quality.asked_of({}, recipe, None)
    assert ({row["concept"] for row in found.rows}, styles) == ({"dog", "fire"}, ["noto"])
    known = {"model": "a", "styles": ["fluent3d"], "concepts": ["cat"]}
    found, styles = quality.asked_of(known, recipe, None)
    assert ({row["concept"] for row in found.rows}, styles) == ({"cat"}, ["fluent3d"])
    assert known == {"model": "a"}


def test_an_unknown_accelerator_is_refused_before_anything_is_made(
    court: Court, exam: Exam, tmp_path: Path
) -> None:
    pipeline = Pipeline()
    given = SimpleNamespace(
        accelerate=["no-such-method"], steps=None, guidance=None, batch=4, seeds=1, out=tmp_path
    )
    with pytest.raises(ValueError, match="no-such-method"):
        quality.examine(pipeline, {}, court, exam, given)  # type: ignore[arg-type]
    assert not pipeline.calls
