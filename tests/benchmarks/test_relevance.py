"""The figures by which pictures without a block are judged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.relevance import edges, outline, pixels


def square(left: int) -> Tensor:
    picture = torch.zeros(1, 24, 24, 3)
    picture[:, 8:16, left : left + 8] = 1
    return picture


def test_a_shift_moves_the_edges_by_as_much() -> None:
    assert edges(square(4), square(4)) == 0
    assert edges(square(4), square(9)) == pytest.approx(5, abs=0.01)
    assert edges(torch.cat([square(4), square(4)]), torch.cat([square(4), square(8)])) == pytest.approx(
        2, abs=0.01
    )


def test_a_flat_picture_has_no_outline_and_is_compared_all_the_same() -> None:
    flat = torch.full((1, 24, 24, 3), 0.5)
    assert outline(flat[0].numpy()).tolist() != []
    assert edges(square(4), flat) > 0


def test_pixels_are_the_root_mean_square() -> None:
    assert pixels(torch.zeros(2, 4, 4, 3), torch.full((2, 4, 4, 3), 0.5)) == pytest.approx(0.5)
