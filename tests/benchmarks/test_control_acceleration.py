"""How much control costs an accelerator: the figure, its range, and the table."""

from __future__ import annotations

import pytest
import torch

from benchmarks.control_acceleration import apart, growth, level, table


def test_growth_is_the_ratio_of_root_mean_squares_picture_by_picture() -> None:
    plain = torch.tensor([0.1, 0.2, 0.4, 0.3])
    same = growth(plain, plain)
    assert same["growth"] == same["growth_low"] == same["growth_high"] == 1
    twice = growth(2 * plain, plain)
    assert [twice[name] for name in ("growth", "growth_low", "growth_high")] == pytest.approx([2, 2, 2])
    assert twice["difference"] == pytest.approx(2 * twice["without"]) == pytest.approx(2 * 0.075**0.5)


def test_one_picture_that_weighs_as_much_as_all_others_widens_the_range() -> None:
    plain, found = torch.full((16,), 0.02), torch.full((16,), 0.02)
    found[3] = 0.3
    told = growth(found, plain)
    assert told["growth_low"] == pytest.approx(1)
    assert told["growth_low"] < told["growth"] < told["growth_high"]
    assert growth(found, plain) == told, "drawn again from one seed"


def test_distances_are_of_each_picture() -> None:
    one, other = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)), torch.ones(3, 2, 4, 4)
    other[1] *= 10
    found = apart(other + 0.1 * one, other)
    assert found[1] < 0.2 * min(found[0], found[2])
    assert level(torch.tensor([3.0, 4.0])) == pytest.approx(12.5**0.5)


def test_the_table_has_a_row_for_each_adapter() -> None:
    row = {"adapter": "lora", "weights": "random", "accelerator": "a", "growth": 1.04, "growth_low": 0.9, "growth_high": 1.2,
           "identical": 0.0}  # fmt: skip
    other = {"adapter": "lora", "weights": "random", "accelerator": "b", "refused": "in words"}
    last = table([row, other]).splitlines()[-1]
    assert last == "| lora (random) | 0e+00; x 1.04 (0.90-1.20) | refused |"
