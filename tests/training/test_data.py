"""Pictures stay beside their own rows, choices keep what they say, and wordings only say what the row says."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from training.data import STYLES, Pictures, choose, load_pictures, wording


def test_pictures_stand_beside_their_rows(folder: Path) -> None:
    found = load_pictures(folder)
    assert found.pixels.shape == (13, 3, 64, 64)
    assert found.pixels.dtype == torch.uint8
    assert len(found) == 13
    for pixels, row in zip(found.pixels, found.rows, strict=True):
        top = ["red heart", "dog", "apple", "rocket"].index(row["concept"]) * 16
        dark = (pixels.float().mean(dim=0) < 200).nonzero()[:, 0]
        assert (dark.min(), dark.max()) == (top, top + 15), row["id"]
        if row["style"] == "fluent3d":
            assert pixels[:, top + 3, 5].tolist() == [200, 30, 30]


def test_other_sizes_read_their_own_archive(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"emoji128\.zip"):
        load_pictures(folder, size=128)


def test_only_keeps_pixels_and_rows_together(folder: Path) -> None:
    every = load_pictures(folder)
    some = every.only([row["split"] == "val_pair" for row in every.rows])
    assert [row["id"] for row in some.rows] == ["noto-dog"]
    assert torch.equal(some.pixels[0], every.pixels[[row["id"] for row in every.rows].index("noto-dog")])


def test_choose_by_style_subgroup_and_concept(folder: Path) -> None:
    every = load_pictures(folder)

    def ids(**given: list[str]) -> set[str]:
        asked = {"styles": [], "subgroups": [], "concepts": []} | given
        return {row["id"] for row in choose(every, **asked).rows}

    assert len(ids()) == 13
    assert ids(styles=["photo"]) == {"photo-apple"}
    assert ids(subgroups=["heart"], styles=["noto"]) == {"noto-red_heart"}
    assert ids(subgroups=["heart"], concepts=["dog"], styles=["noto", "fluentbw"]) == {
        "noto-red_heart",
        "noto-dog",
        "fluentbw-red_heart",
        "fluentbw-dog",
    }


def test_choose_names_the_concepts_that_are_not_there(folder: Path) -> None:
    with pytest.raises(ValueError, match="no pictures of: cow, yeti"):
        choose(load_pictures(folder), styles=[], subgroups=[], concepts=["yeti", "dog", "cow"])


def test_wordings_name_the_picture_and_no_other_style(folder: Path) -> None:
    dice = random.Random(0)
    for row in load_pictures(folder).rows:
        others = {words for style, several in STYLES.items() if style != row["style"] for words in several}
        seen = Counter(wording(row, dice) for _ in range(300))
        keywords = set(row["keywords"] or []) - {row["concept"]}
        assert len(seen) > 8
        assert row["caption"] in seen
        for text in seen:
            assert row["concept"] in text or any(word in text for word in keywords), text
            assert not any(
                text.endswith(f", {words}") for words in others if words not in STYLES[row["style"]]
            ), text
            assert "  " not in text


def test_wordings_repeat_with_the_dice_and_choose_the_article(folder: Path) -> None:
    row = next(row for row in load_pictures(folder).rows if row["id"] == "noto-apple")
    first, second = ([wording(row, random.Random(seed)) for seed in range(60)] for _ in range(2))
    assert first == second
    assert any("an apple" in text for text in first)
    assert not any("a apple" in text for text in first)


def test_a_row_without_keywords_is_asked_for_by_its_name() -> None:
    row = {"concept": "apple", "caption": "apple, photo", "style": "photo", "keywords": None}
    assert all("apple" in wording(row, random.Random(seed)) for seed in range(100))


def test_the_emoji_recipe_keeps_its_held_out_pairs_apart(shared: Path) -> None:
    import tomllib

    data = tomllib.loads((Path(__file__).parents[2] / "training/recipes/emoji.toml").read_text())["data"]
    with open(shared / "data" / "emoji64" / "captions.jsonl") as stream:
        rows = [json.loads(line) for line in stream]
    found = choose(
        Pictures(torch.zeros(len(rows), 0), rows),
        **{key: data[key] for key in ("styles", "subgroups", "concepts")},
    )
    pairs = {
        split: {(row["concept"], row["style"]) for row in found.rows if row["split"] == split}
        for split in ("train", "val_pair")
    }
    assert len(pairs["val_pair"]) == 68
    assert not pairs["train"] & pairs["val_pair"]
    assert {concept for concept, _ in pairs["val_pair"]} <= {concept for concept, _ in pairs["train"]}
    assert all(
        row["style"] in STYLES and row["caption"].endswith(STYLES[row["style"]][0]) for row in found.rows
    )
