"""Positions, times and labels against independent references."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_2d_sincos_pos_embed
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from dit.embeddings import (
    LabelEmbedding,
    PooledProjection,
    TimeEmbedding,
    rotary,
    rotate,
    sincos_1d,
    sincos_2d,
)
from dit.grid import Grid


def test_sincos_of_one_axis_by_hand() -> None:
    table = sincos_1d(4, torch.tensor([0, 3]))
    expected = [[0, 0, 1, 1], [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]]
    torch.testing.assert_close(table.float(), torch.tensor(expected))


def test_sincos_table_equals_diffusers_where_both_are_square() -> None:
    theirs = torch.as_tensor(
        get_2d_sincos_pos_embed(24, 6, base_size=6, output_type="pt"), dtype=torch.float32
    )
    torch.testing.assert_close(sincos_2d(24, Grid(1, 6, 6)), theirs.reshape(36, 24), atol=1e-6, rtol=0)


def test_sincos_table_of_a_wide_grid() -> None:
    table = sincos_2d(8, Grid(1, 2, 5)).reshape(2, 5, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4])  # the first half knows the column alone
    assert torch.equal(table[:, 0, 4:], table[:, 4, 4:])  # the second half the row alone
    torch.testing.assert_close(table[1, 3, 0], torch.tensor(math.sin(3)))
    torch.testing.assert_close(table[1, 3, 4], torch.tensor(math.sin(1)))
    assert sincos_2d(8, Grid(3, 2, 5)).shape == (30, 8)


def test_sincos_needs_a_width_that_divides() -> None:
    with pytest.raises(ValueError, match="divisible by 4, got 10"):
        sincos_2d(10, Grid(1, 2, 2))


def test_rotary_equals_flux() -> None:
    grid, text, axes = Grid(1, 3, 4), 5, (4, 6, 6)
    ids = torch.cat([torch.zeros(text, 3), grid.positions().float()])
    cos, sin = FluxPosEmbed(theta=10000, axes_dim=list(axes))(ids)
    ours = rotary(axes, grid, text, 10000.0, "cpu")
    torch.testing.assert_close(ours[0], cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours[1], sin, atol=1e-6, rtol=0)
    x = torch.randn(2, text + grid.tokens, 3, 16)
    theirs = apply_rotary_emb(x, (cos, sin), sequence_dim=1)
    torch.testing.assert_close(rotate(x, ours), theirs, atol=1e-5, rtol=0)


def test_rotary_products_depend_on_distance_alone() -> None:
    grid = Grid(1, 1, 8)
    table = rotary((0, 0, 8), grid, 0, 100.0, "cpu")
    q, k = torch.randn(8), torch.randn(8)
    turned = [rotate(v.expand(1, 8, 1, 8), table)[0, :, 0] for v in (q, k)]
    products = turned[0] @ turned[1].T
    for distance in (-3, 1, 4):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[0].expand_as(along), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(products.diagonal(1)[0], products.diagonal(4)[0])


def test_time_sinusoid_has_cosines_first_and_shift_zero() -> None:
    embed = TimeEmbedding(8)
    waves = embed.time_proj(torch.tensor([999.0]))[0]
    freqs = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    torch.testing.assert_close(
        waves, torch.cat([(999 * freqs).cos(), (999 * freqs).sin()]), atol=1e-4, rtol=0
    )


def test_time_embedding_of_tokens_equals_that_of_samples() -> None:
    embed = TimeEmbedding(8)
    times = torch.tensor([[0.0, 500.0], [3.5, 1000.0]])
    each = embed(times, torch.float32)
    assert each.shape == (2, 2, 8)
    torch.testing.assert_close(each[1], embed(times[1], torch.float32))


def test_label_table_has_a_null_row_only_where_wanted() -> None:
    assert LabelEmbedding(5, 4)(torch.tensor([5])).shape == (1, 4)
    with pytest.raises(IndexError):
        LabelEmbedding(5, 4, null=False)(torch.tensor([5]))


def test_pooled_projection_by_hand() -> None:
    embed = PooledProjection(3, 4)
    x = torch.randn(2, 3)
    inner = x @ embed.linear_1.weight.T + embed.linear_1.bias
    expected = (inner * inner.sigmoid()) @ embed.linear_2.weight.T + embed.linear_2.bias
    torch.testing.assert_close(embed(x), expected)
