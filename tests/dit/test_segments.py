"""Captions and scenes as lengths: who hears whom, how they are found, and what does not add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit.grid import Grid
from dit.segments import Segments, spread


def test_who_hears_whom() -> None:
    """The rule of the paper, token by token, and the count of pairs."""
    segments = Segments((3, 0, 5), (4, 9, 2))
    caption = [scene for scene, count in enumerate(segments.text) for _ in range(count)]
    clip = [scene for scene, count in enumerate(segments.video) for _ in range(count)]
    kinds = [("text", one) for one in caption] + [("video", one) for one in clip]
    expected = [
        [
            a[0] == b[0] == "video" or a[1] == b[1] for b in kinds
        ]  # all videos; caption and scene of one number
        for a in kinds
    ]
    mask = segments.mask()
    assert mask.tolist() == expected
    assert torch.equal(mask, mask.T)
    assert int(mask.sum()) == segments.pairs


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text": 9, "caption": 4}, "9 text tokens are not captions of 4, 4 tokens"),
        ({"text": 12, "caption": 4}, "4 frames do not divide into 3 scenes"),
        (
            {"text": 8, "caption": 4, "frames": [1, 2]},
            "scenes of 1, 2 frames do not fit 2 captions and 4 frames",
        ),
        ({"text": 8, "texts": [8], "frames": [2, 2]}, "do not fit 1 captions"),
        ({"text": 8, "texts": [3, 4]}, "8 text tokens are not captions of 3, 4"),
        ({"text": 8, "texts": [4, 4], "frames": [4, 0]}, "scenes at least 1"),
    ],
)
def test_captions_and_scenes_that_do_not_fit_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Segments.of(Grid(4, 1, 2), **given)


def test_segments_are_told_or_found() -> None:
    grid = Grid(6, 1, 2)
    assert Segments.of(grid, 9, 3) == Segments((3, 3, 3), (4, 4, 4))
    assert Segments.of(grid, 2, 3) == Segments((2,), (12,))  # a text shorter than a caption
    assert Segments.of(grid, 9) == Segments((9,), (12,))
    assert Segments.of(grid, 8, frames=[1, 5]) == Segments((4, 4), (2, 10))
    assert Segments.of(grid, 9, 3, frames=[1, 2, 3]) == Segments((3, 3, 3), (2, 4, 6))
    assert Segments.of(grid, 9, 3, texts=[2, 7], frames=[4, 2]) == Segments((2, 7), (8, 4))
    with pytest.raises(ValueError, match="got 1 captions and 2 scenes"):
        Segments((1,), (2, 3))


def test_vectors_are_dealt_out() -> None:
    vectors = torch.arange(3.0).reshape(1, 3, 1)
    assert spread(vectors, (2, 0, 1)).flatten().tolist() == [0, 0, 2]
    assert spread(vectors[:, :1], (2, 3)).shape == (1, 1, 1)
