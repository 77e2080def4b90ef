"""Patches: the order of their values, and that cutting and joining undo each other."""

from __future__ import annotations

import pytest
import torch

from dit.grid import Grid, patchify, unpatchify


@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((2, 3, 4, 6), (1, 2, 2)),
        ((1, 1, 6, 6), (1, 3, 2)),
        ((2, 4, 5, 7), (1, 1, 1)),
        ((1, 2, 4, 4, 6), (2, 2, 3)),
    ],
)
def test_unpatchify_undoes_patchify(shape: tuple[int, ...], patch: tuple[int, int, int]) -> None:
    x = torch.randn(shape)
    grid = Grid.of(x, patch)
    tokens = patchify(x, patch)
    assert tokens.shape == (shape[0], grid.tokens, shape[1] * patch[0] * patch[1] * patch[2])
    assert torch.equal(unpatchify(tokens, grid, patch, frames=x.dim() == 5), x)


def test_tokens_run_along_rows_and_channels_run_fastest() -> None:
    x = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)
    tokens = patchify(x, (1, 2, 2))
    first = [x[0, c, row, column] for row in (0, 1) for column in (0, 1) for c in (0, 1)]
    assert tokens[0, 0].tolist() == first
    assert tokens[0, 1, 0] == x[0, 0, 0, 2]
    assert tokens[0, 2, 0] == x[0, 0, 2, 0]


def test_positions_follow_token_order() -> None:
    grid = Grid(2, 2, 3)
    assert grid.tokens == 12
    assert grid.positions().tolist() == [[f, h, w] for f in range(2) for h in range(2) for w in range(3)]


@pytest.mark.parametrize("shape", [(1, 3, 5, 4), (1, 3, 4, 5), (3, 4, 4)])
def test_sides_that_do_not_divide_are_refused_with_numbers(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cannot be cut into patches of \(1, 2, 2\)"):
        Grid.of(torch.zeros(shape), (1, 2, 2))
