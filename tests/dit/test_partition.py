"""Interleaved groups: who stands with whom, the exact inverse, padding and its mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit.partition import Interleave, heard

COUNTS = st.integers(1, 90)


@given(tokens=COUNTS, groups=st.integers(1, 6), chunk=st.integers(1, 5))
def test_joining_undoes_splitting(tokens: int, groups: int, chunk: int) -> None:
    cut = Interleave(tokens, groups, chunk)
    x = torch.arange(2 * tokens * 3, dtype=torch.float32).reshape(2, tokens, 3) + 1
    parts = cut.split(x)
    assert parts.shape == (2 * groups, cut.length, 3)
    assert torch.equal(cut.join(parts), x)


@given(tokens=COUNTS, groups=st.integers(2, 6), chunk=st.integers(1, 5))
def test_every_token_is_dealt_to_its_group(tokens: int, groups: int, chunk: int) -> None:
    cut = Interleave(tokens, groups, chunk)
    dealt = cut.split(torch.arange(1, tokens + 1).unsqueeze(0))
    for group, members in enumerate(dealt):
        assert all((int(one) - 1) // chunk % groups == group for one in members if one)
    mask = cut.mask()
    if mask is None:
        assert (dealt > 0).all()
    else:
        assert torch.equal(mask[:, 0], dealt > 0)


def test_four_chunks_of_sixteen_tokens() -> None:
    strided = Interleave(16, 4).split(torch.arange(16).unsqueeze(0))
    assert strided.tolist() == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]
    chunks = Interleave(32, 4, 4).split(torch.arange(32).unsqueeze(0))
    assert chunks.tolist()[1] == [4, 5, 6, 7, 20, 21, 22, 23]


def test_groups_of_a_sample_stand_together() -> None:
    cut = Interleave(4, 2)
    x = torch.tensor([[0, 1, 2, 3], [10, 11, 12, 13]])
    assert cut.split(x).tolist() == [[0, 2], [1, 3], [10, 12], [11, 13]]
    assert cut.spread(torch.tensor([5, 6])).tolist() == [5, 5, 6, 6]


def test_one_group_is_the_identity() -> None:
    x = torch.randn(2, 7, 3)
    cut = Interleave(7, 1, 4)
    assert cut.split(x) is x
    assert cut.join(x) is x
    assert cut.mask() is None


def test_a_place_that_may_hear_nobody_hears_everybody() -> None:
    mask = Interleave(5, 4, 4).mask()
    assert mask is not None
    assert mask[:, 0].tolist() == [[True] * 4, [True] + [False] * 3, [False] * 4, [False] * 4]
    found = heard(mask, 2)
    assert found is not None
    assert found.shape == (8, 1, 1, 4)
    assert found[1, 0, 0].tolist() == [True, False, False, False]
    assert found[2:4].all()
    assert torch.equal(found[:4], found[4:])
    assert heard(None, 2) is None


@pytest.mark.parametrize("wrong", [(0, 4, 1), (5, 0, 1), (5, 4, 0)])
def test_counts_are_checked(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Interleave(*wrong)
