"""Alternating subregion attention: against a masked reference, in one stream and in two, and who can hear whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit.embeddings import rotary
from dit.grid import Grid
from dit.ledger import macs_of
from dit.mixers.full import Full, Mixer
from dit.mixers.subregion import Subregion, SubregionMixer
from dit.model import Context
from dit.spec import parse

WIDTH, HEADS = 16, 2


def pair(pattern: str, **options: Any) -> tuple[Any, Any]:
    """A subregion mixer and one of full attention with the same weights."""
    torch.manual_seed(0)
    joint = options.pop("joint", False)
    name = "build_joint" if joint else "build"
    ours = getattr(Subregion(pattern=pattern), name)(WIDTH, HEADS, qk_norm=True, **options)
    full = getattr(Full(), name)(WIDTH, HEADS, qk_norm=True, **options)
    full.load_state_dict(ours.state_dict())
    return ours, full


def group_of(count: int, groups: int, chunk: int) -> Tensor:
    return torch.arange(count) // chunk % groups


def reference_mask(text: int, image: int, groups: int, chunk: int, keys: Tensor | None = None) -> Tensor:
    """Who may hear whom in the whole sequence, text first: [B, 1, T, T]."""
    group = torch.cat([group_of(text, groups, chunk), group_of(image, groups, chunk)])
    mask = (group[:, None] == group[None, :])[None, None]
    return mask if keys is None else mask & keys[:, None, None, :]


@pytest.mark.parametrize(("groups", "chunk"), [(1, 1), (4, 1), (4, 4), (3, 2)])
@pytest.mark.parametrize(("text", "image"), [(16, 32), (5, 24), (7, 30)])
def test_two_streams_equal_masked_full_attention(groups: int, chunk: int, text: int, image: int) -> None:
    ours, full = pair(f"{groups}/{chunk}", joint=True)
    x, words = torch.randn(2, image, WIDTH), torch.randn(2, text, WIDTH)
    table = rotary((0, 4, 4), Grid(1, 1, image), text, 100.0, "cpu")
    plain = Context(None, x, rotary=table)
    masked = Context(None, x, rotary=table, mask=reference_mask(text, image, groups, chunk))
    found = ours(hidden_states=x, encoder_hidden_states=words, context=plain)
    expected = full(hidden_states=x, encoder_hidden_states=words, context=masked)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [0, 6])
def test_one_stream_equals_masked_full_attention(length: int) -> None:
    ours, full = pair("4/4")
    x = torch.randn(2, length + 21, WIDTH)
    table = rotary((0, 4, 4), Grid(1, 3, 7), length, 100.0, "cpu")
    mask = reference_mask(length, 21, 4, 4)
    found = ours(hidden_states=x, context=Context(None, x, rotary=table, length=length))
    expected = full(hidden_states=x, context=Context(None, x, rotary=table, mask=mask))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_mask_of_the_prompt_is_split_along() -> None:
    ours, full = pair("4/1", joint=True)
    x, words = torch.randn(2, 12, WIDTH), torch.randn(2, 9, WIDTH)
    keys = torch.ones(2, 21, dtype=torch.bool)
    keys[1, 4:9] = False
    given = Context(None, x, mask=keys[:, None, None, :])
    found = ours(hidden_states=x, encoder_hidden_states=words, context=given)
    expected = full(
        hidden_states=x,
        encoder_hidden_states=words,
        context=Context(None, x, mask=reference_mask(9, 12, 4, 1, keys)),
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="a mask of keys"):
        ours(
            hidden_states=x, encoder_hidden_states=words,
            context=Context(None, x, mask=torch.ones(2, 1, 21, 21, dtype=torch.bool)),
        )  # fmt: skip


def test_a_prompt_that_is_only_heard() -> None:
    ours, full = pair("4/1", joint=True, context_pre_only=True)
    x, words = torch.randn(2, 10, WIDTH), torch.randn(2, 6, WIDTH)
    mask = reference_mask(6, 10, 4, 1)[:, :, 6:]
    table = rotary((0, 4, 4), Grid(1, 2, 5), 6, 100.0, "cpu")
    found = ours(hidden_states=x, encoder_hidden_states=words, context=Context(None, x, rotary=table))
    expected = full(
        hidden_states=x, encoder_hidden_states=words, context=Context(None, x, rotary=table, mask=mask)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("text", "image"), [(1, 1), (5, 24)])
def test_gradients_stay_numbers_where_groups_are_empty(text: int, image: int) -> None:
    ours, _ = pair("4/4", joint=True)
    x = torch.randn(2, image, WIDTH, requires_grad=True)
    words = torch.randn(2, text, WIDTH, requires_grad=True)
    sum(one.square().sum() for one in ours(hidden_states=x, encoder_hidden_states=words)).backward()
    for one in (x, words, *ours.parameters()):
        assert one.grad is not None
        assert one.grad.isfinite().all()


def test_blocks_take_turns() -> None:
    spec = parse(Mixer, "subregion")
    built = [spec.at(block).build(WIDTH, HEADS) for block in range(7)]
    assert [(one.groups, one.chunk) for one in built] == [(1, 1), (4, 1), (4, 4)] * 2 + [(1, 1)]
    assert all(isinstance(one, SubregionMixer) for one in built)
    assert Full().at(5) == Full()


@pytest.mark.parametrize("pattern", ["", "4", "4/0", "0/1", "4/1,4/4", "4 / 1"])
def test_patterns_are_checked(pattern: str) -> None:
    with pytest.raises(ValueError, match="groups/chunk"):
        Subregion(pattern=pattern)


def test_the_pattern_can_be_written_as_text() -> None:
    assert parse(Mixer, "subregion:pattern=2/1 2/8") == Subregion(pattern="2/1 2/8")
    assert parse(Mixer, Subregion(pattern="2/1").to_dict()) == Subregion(pattern="2/1")


def test_four_groups_cost_a_quarter_of_the_attention() -> None:
    whole, part = (Subregion(pattern=one).build_joint(WIDTH, HEADS) for one in ("1/1", "4/4"))
    linear = 4 * WIDTH * WIDTH * (256 + 128)
    assert macs_of(whole, 256, 128) - linear == 4 * (macs_of(part, 256, 128) - linear) == 2 * 384**2 * WIDTH
