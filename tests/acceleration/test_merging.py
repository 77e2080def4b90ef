from __future__ import annotations

from typing import Any

import pytest
import torch

from acceleration._merging import Plan, Windows, destinations, destinations_reference, grid_of, plan
from dit.grid import Grid

CPU = torch.device("cpu")


def planned(tokens: int = 22, window: int = 4, count: int = 2, grid: Grid | None = None) -> tuple[Plan, Any]:
    torch.manual_seed(0)
    x = torch.randn(2, tokens, 6)
    return plan(x, Windows.of(grid, tokens, window, CPU), count), x


def test_windows_are_squares_of_the_picture() -> None:
    windows = Windows.of(Grid(2, 4, 6), 48, 4, CPU)
    position = Grid(2, 4, 6).positions()[windows.order].view(12, 4, 3)
    assert (position.amax(1) - position.amin(1)).tolist() == [[0, 1, 1]] * 12
    assert torch.equal(torch.cat([windows.order, windows.rest])[windows.inverse], torch.arange(48))
    assert torch.equal(Windows.of(None, 9, 4, CPU).order, torch.arange(8))
    assert Windows.of(None, 9, 4, CPU).rest.tolist() == [8]
    assert Windows.of(None, 3, 64, CPU).size == 3


@pytest.mark.parametrize("count", [1, 3, 8])
def test_destinations_are_those_of_the_reference(count: int) -> None:
    torch.manual_seed(count)
    similarity = torch.rand(2, 5, 8, 8) * 2 - 1  # of candidates (rows) to tokens; symmetric ones have ties
    chosen = destinations(similarity, count)
    expected = [[destinations_reference(one, count) for one in sample] for sample in similarity]
    assert chosen.tolist() == expected


def test_one_of_each_kind_is_chosen() -> None:
    kinds = torch.eye(3).repeat_interleave(4, 0)
    chosen = destinations(kinds @ kinds.t(), 3)
    assert sorted(one // 4 for one in chosen.tolist()) == [0, 1, 2]


def test_all_tokens_kept_is_the_identity() -> None:
    found, x = planned(count=4)
    assert torch.equal(found.spread(found.mean(x)), x)
    assert torch.equal(found.counts(), torch.ones(2, 22))


def test_equal_tokens_come_back_unchanged() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6).repeat_interleave(4, 1)
    found = plan(x, Windows.of(None, 20, 4, CPU), 1)
    assert found.kept.shape == (2, 5)
    assert torch.allclose(found.spread(found.mean(x)), x, atol=1e-6)
    assert torch.equal(found.pick(x[:, None])[:, 0], x[:, ::4])


def test_nothing_is_lost_and_the_rest_stays() -> None:
    found, x = planned(grid=Grid(1, 2, 11))
    assert found.kept.shape == (2, 12)
    assert torch.allclose(found.share.sum(-1), torch.ones(2, 5, 4))
    assert torch.allclose(found.counts().sum(1), torch.full((2,), 22.0))
    assert torch.allclose((found.counts()[..., None] * found.mean(x)).sum(1), x.sum(1), atol=1e-5)
    back = found.spread(found.mean(x))
    assert torch.equal(back[:, found.windows.rest], x[:, found.windows.rest])
    assert torch.allclose(found.spread(torch.ones(2, 12, 1)), torch.ones(2, 22, 1))


def test_a_destination_takes_nothing_of_the_others() -> None:
    found, _ = planned()
    y = torch.randn(2, found.kept.shape[1], 3)
    spread = found.spread(y)
    for sample in range(2):
        assert torch.allclose(spread[sample, found.kept[sample]], y[sample])


def test_padding_weighs_nothing() -> None:
    found, x = planned(tokens=20)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, 12:] = False
    other = x.clone()
    other[1, 12:] = 99.0
    counts = found.counts(valid)
    assert torch.allclose(counts.sum(1), torch.tensor([20.0, 12.0]))
    assert (counts[1, 6:] == 0).all()
    assert torch.equal(found.mean(x, valid)[1, :6], found.mean(other, valid)[1, :6])


@pytest.mark.parametrize(
    ("given", "tokens", "expected"),
    [
        ({"hidden_states": torch.zeros(1, 4, 8, 12)}, 24, Grid(1, 4, 6)),
        ({"hidden_states": torch.zeros(1, 16, 5, 8, 8)}, 80, Grid(5, 4, 4)),
        ({"hidden_states": torch.zeros(1, 4, 8, 8, 8)}, 128, Grid(8, 4, 4)),
        ({"x": [torch.zeros(4, 1, 6, 4)]}, 24, Grid(1, 6, 4)),
        (
            {"hidden_states": torch.zeros(1, 30, 4), "num_frames": 2, "height": 3, "width": 5},
            30,
            Grid(2, 3, 5),
        ),
        ({"img_shapes": [[(1, 3, 5)]]}, 15, Grid(1, 3, 5)),
        ({"img_ids": Grid(1, 3, 5).positions().float()}, 15, Grid(1, 3, 5)),
        ({"hidden_states": torch.zeros(1, 30, 4)}, 30, None),
        ({"hidden_states": torch.zeros(1, 4, 8, 8)}, 17, None),
    ],
)
def test_the_grid_is_read_off_the_arguments(
    given: dict[str, Any], tokens: int, expected: Grid | None
) -> None:
    assert grid_of(given, tokens) == expected
