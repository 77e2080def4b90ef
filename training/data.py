"""The captioned pictures that shipped models learn from, and the wordings a picture can be asked for with."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

STYLES: dict[str, tuple[str, ...]] = {
    "fluent3d": ("3d render", "3d icon", "glossy 3d rendering"),
    "fluentflat": ("flat illustration", "flat design", "flat vector illustration"),
    "fluentbw": ("black and white icon", "monochrome icon", "black and white outline"),
    "noto": ("cartoon", "cartoon drawing", "cartoon style"),
    "blob": ("blob cartoon", "blobby cartoon"),
    "twemoji": ("sticker", "flat sticker"),
    "emojitwo": ("clip art", "clip art drawing"),
    "emojitwobw": ("line drawing", "ink line drawing"),
    "fx": ("vector art", "vector artwork"),
    "photo": ("photo", "photograph"),
}
"""Words that name a style; the first is the data set's own."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures uint8 [n, 3, H, W] beside their rows of captions.jsonl."""

    pixels: Tensor
    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, keep: Sequence[bool]) -> Pictures:
        """Return the pictures whose flag is true."""
        chosen = [i for i, flag in enumerate(keep) if flag]
        return Pictures(self.pixels[chosen], [self.rows[i] for i in chosen])


def load_pictures(folder: Path, *, size: int = 64) -> Pictures:
    """Read every picture of `folder` at `size` px (64, or 128 for the styles that have it)."""
    with open(folder / "captions.jsonl") as stream:
        rows = {row["id"]: row for row in map(json.loads, stream)}
    pictures, found = [], []
    for name in ("emoji64.zip", "photo64.zip") if size == 64 else (f"emoji{size}.zip",):
        with zipfile.ZipFile(folder / name) as archive:
            for member in archive.namelist():
                picture = Image.open(io.BytesIO(archive.read(member))).convert("RGB")
                pictures.append(np.asarray(picture))
                found.append(rows[member.rsplit(".", 1)[0]])
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return Pictures(pixels, found)


def choose(pictures: Pictures, *, styles: Sequence[str], subgroups: Sequence[str], concepts: Sequence[str]) -> Pictures:
    """Keep the given styles, and of the concepts those in a subgroup or named; empty lists keep everything."""
    wanted = set(concepts)
    known = {row["concept"] for row in pictures.rows}
    if missing := wanted - known:
        raise ValueError(f"no pictures of: {', '.join(sorted(missing))}")
    every = not subgroups and not concepts
    return pictures.only(
        [
            (not styles or row["style"] in styles) and (every or row["subgroup"] in subgroups or row["concept"] in wanted)
            for row in pictures.rows
        ]
    )


def wording(row: dict[str, Any], dice: random.Random) -> str:
    """Draw one way of asking for a picture: word order, keywords, other words for the style, or no style at all."""
    name = row["concept"]
    style = dice.choice(STYLES[row["style"]])
    article = "an" if name[0].lower() in "aeiou" else "a"
    keywords = [word for word in row.get("keywords") or [] if word != name]
    dice.shuffle(keywords)
    some = ", ".join(keywords[: dice.randint(1, 2)])
    forms = [
        (4.0, row["caption"]),
        (1.5, f"{name}, {style}"),
        (1.5, f"{style} of {article} {name}"),
        (1.0, f"{article} {name} in {style} style"),
        (1.0, f"{style}, {name}"),
        (1.0, f"{article} {name}"),
        (0.5, name),
    ]
    if some:
        forms += [(1.0, f"{name}, {some}, {style}"), (0.7, f"{style} of {some} {name}"), (0.3, f"{some}, {style}")]
    weights, texts = zip(*forms, strict=True)
    return str(dice.choices(texts, weights)[0])
