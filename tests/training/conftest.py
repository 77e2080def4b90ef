"""A tiny data set in the layout of the real one, and a text encoder that needs no weights."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dit.text import Prompt

CONCEPTS = {"red heart": "heart", "dog": "animal-mammal", "apple": "food-fruit", "rocket": "transport-air"}
DRAWN = ("fluent3d", "fluentbw", "noto")


def rows() -> list[dict[str, Any]]:
    """Every concept in three styles, one held-out pair, and a photo."""
    words = {"fluent3d": "3d render", "fluentbw": "black and white icon", "noto": "cartoon", "photo": "photo"}
    found = []
    for style, concept in [(style, one) for style in DRAWN for one in CONCEPTS] + [("photo", "apple")]:
        found.append(
            {
                "id": f"{style}-{concept.replace(' ', '_')}",
                "caption": f"{concept}, {words[style]}",
                "concept": concept,
                "style": style,
                "keywords": [concept, "nice", "small thing"] if style != "photo" else None,
                "subgroup": CONCEPTS[concept],
                "split": "val_pair" if (style, concept) == ("noto", "dog") else "train",
            }
        )
    return found


def picture(row: dict[str, Any], size: int = 64) -> np.ndarray:
    """A bar whose place tells the concept and whose colour tells the style, on white."""
    pixels = np.full((size, size, 3), 255, np.uint8)
    place = list(CONCEPTS).index(row["concept"]) * size // 4
    colour = {"fluent3d": (200, 30, 30), "fluentbw": (0, 0, 0), "noto": (30, 30, 200), "photo": (90, 160, 90)}
    pixels[place : place + size // 4] = colour[row["style"]]
    return pixels


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with emoji64.zip, photo64.zip and captions.jsonl, its rows in another order than the pictures."""
    place = tmp_path_factory.mktemp("data")
    every = rows()
    (place / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in every[::-1]))
    for name, photos in (("emoji64.zip", False), ("photo64.zip", True)):
        with zipfile.ZipFile(place / name, "w") as archive:
            for row in every:
                if (row["style"] == "photo") == photos:
                    stream = io.BytesIO()
                    Image.fromarray(picture(row)).save(stream, "WEBP", lossless=True)
                    archive.writestr(f"{row['id']}.webp", stream.getvalue())
    return place


@pytest.fixture(scope="session")
def written() -> Callable[[dict[str, Any], Path], Path]:
    """Return a function that writes a recipe as a TOML file and returns its place."""

    def toml(value: Any) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{key} = {toml(one)}" for key, one in value.items()) + " }"
        return json.dumps(value, ensure_ascii=False)

    def write(recipe: dict[str, Any], place: Path) -> Path:
        lines = []
        for section, values in recipe.items():
            for table in values if isinstance(values, list) else [values]:
                lines.append(f"[[{section}]]" if isinstance(values, list) else f"[{section}]")
                lines += [f"{key} = {toml(value)}" for key, value in table.items()]
        place.write_text("\n".join(lines) + "\n")
        return place

    return write


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put a stand-in for the text encoder under training.train; returns the list of every text it is given."""
    asked: list[str] = []

    def encode(
        tokenizer: object, encoder: object, prompts: Sequence[str], *, length: int, **_: object
    ) -> Prompt:
        asked.extend(prompts)
        tokens, mask = (
            torch.zeros(len(prompts), length, 16),
            torch.zeros(len(prompts), length, dtype=torch.bool),
        )
        for i, prompt in enumerate(prompts):
            for j, word in enumerate(["[", *prompt.split(), "]"][:length]):
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
                tokens[i, j] = torch.randn(16, generator=torch.Generator().manual_seed(seed))
                mask[i, j] = True
        return Prompt(tokens, mask, tokens.mean(dim=1), tuple(len(one.split()) + 2 for one in prompts))

    monkeypatch.setattr("training.train.load_minilm", lambda: (None, torch.nn.Identity()))
    monkeypatch.setattr("training.train.encode", encode)
    return asked


@pytest.fixture
def adapter_recipe(folder: Path) -> dict[str, Any]:
    """Return a recipe for an adapter that is learnt in a moment."""
    return {
        "base": {"model": "tiny"},
        "control": {"name": "easycontrol", "rank": 4},
        "condition": {"kind": "edges", "drop": 0.2},
        "data": {
            "folder": str(folder), "size": 64, "styles": ["fluent3d", "fluentbw", "noto"], "wordings": 2, "text_tokens": 6,
            "copies": 2, "shift": 2, "mirror": 0.5, "drop": 0.2,
        },
        "objective": {"mean": 0.5, "std": 1.0},
        "optimizer": {
            "name": "adamw", "rate": 1e-2, "matrix_rate": 1e-2, "decay": 0.0, "clip": 1.0, "ema": 0.5, "warmup": 2,
            "cooldown": 0.3,
        },
        "run": {
            "samples": 32, "batch": 4, "precision": "float32", "save_every": 60.0, "check_every": 4, "checked": 4, "seed": 1,
        },
    }  # fmt: skip
