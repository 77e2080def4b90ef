"""The one attention call and the module around it, against attention written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dit.attention import Attention, attend
from dit.embeddings import rotary, rotate
from dit.grid import Grid
from dit.ledger import macs_of


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = torch.einsum("bnkd,bmkd->bknm", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.einsum("bknm,bmkd->bnkd", scores.softmax(-1), v)


@pytest.mark.parametrize("masked", [False, True])
def test_attend_equals_the_formula(masked: bool) -> None:
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 8)
    mask = torch.rand(2, 1, 1, 7) > 0.4 if masked else None
    if mask is not None:
        mask[..., 0] = True
    torch.testing.assert_close(attend(q, k, v, mask), attend_reference(q, k, v, mask), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_self_attention_equals_torch(qk_norm: bool) -> None:
    ours = Attention(12, 3, qk_norm=qk_norm)
    x = torch.randn(2, 6, 12)
    q, k, v = (linear(x).reshape(2, 6, 3, 4) for linear in (ours.to_q, ours.to_k, ours.to_v))
    if qk_norm:
        q, k = (one / (one.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() for one in (q, k))
    expected = ours.to_out[0](attend_reference(q, k, v).flatten(2))
    torch.testing.assert_close(ours(x), expected, atol=1e-6, rtol=1e-5)


def test_joint_attention_lets_both_streams_hear_both() -> None:
    ours = Attention(8, 2, joint=True)
    image, text = torch.randn(1, 5, 8), torch.randn(1, 3, 8)
    out_image, out_text = ours(image, text)
    q = torch.cat([ours.add_q_proj(text), ours.to_q(image)], 1).reshape(1, 8, 2, 4)
    k = torch.cat([ours.add_k_proj(text), ours.to_k(image)], 1).reshape(1, 8, 2, 4)
    v = torch.cat([ours.add_v_proj(text), ours.to_v(image)], 1).reshape(1, 8, 2, 4)
    both = attend_reference(q, k, v).flatten(2)
    torch.testing.assert_close(out_text, ours.to_add_out(both[:, :3]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out_image, ours.to_out[0](both[:, 3:]), atol=1e-6, rtol=1e-5)


def test_pre_only_text_gives_the_same_image() -> None:
    full, pre = (
        Attention(8, 2, joint=True, qk_norm=True),
        Attention(8, 2, joint=True, qk_norm=True, context_pre_only=True),
    )
    pre.load_state_dict(full.state_dict(), strict=False)
    image, text = torch.randn(1, 6, 8), torch.randn(1, 3, 8)
    table = rotary((0, 2, 2), Grid(1, 2, 3), 3, 100.0, "cpu")
    theirs, _ = full(image, text, image_rotary_emb=table)
    torch.testing.assert_close(pre(image, text, image_rotary_emb=table), theirs, atol=1e-6, rtol=1e-5)
    assert not hasattr(pre, "add_q_proj")
    assert not hasattr(pre, "to_add_out")


def test_rotary_positions_turn_queries_and_keys() -> None:
    ours = Attention(8, 2)
    x, table = torch.randn(1, 6, 8), rotary((0, 2, 2), Grid(1, 2, 3), 0, 100.0, "cpu")
    q, k, v = (linear(x).reshape(1, 6, 2, 4) for linear in (ours.to_q, ours.to_k, ours.to_v))
    expected = ours.to_out[0](attend_reference(rotate(q, table), rotate(k, table), v).flatten(2))
    torch.testing.assert_close(ours(x, image_rotary_emb=table), expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(ours(x), expected, atol=1e-4)


@pytest.mark.parametrize("joint", [False, True])
def test_fused_projections_change_nothing(joint: bool) -> None:
    ours: Any = Attention(8, 2, joint=joint, qk_norm=True)
    inputs = (torch.randn(1, 5, 8), torch.randn(1, 3, 8)) if joint else (torch.randn(1, 5, 8),)
    before = ours(*inputs)
    cost = ours.macs(5, 3 * joint)
    ours.fuse_projections()
    assert ours.fused_projections
    torch.testing.assert_close(ours(*inputs), before, atol=1e-6, rtol=1e-5)
    assert ours.macs(5, 3 * joint) == cost
    ours.unfuse_projections()
    torch.testing.assert_close(ours(*inputs), before, atol=0, rtol=0)


def test_backend_of_the_processor_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def dispatch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append(options["backend"])
        return attend_reference(q, k, v)

    monkeypatch.setattr("dit.attention.dispatch_attention_fn", dispatch)
    ours: Any = Attention(8, 2)
    ours(torch.randn(1, 4, 8))
    ours.processor._attention_backend = "mine"
    ours(torch.randn(1, 4, 8))
    assert seen == [None, "mine"]
    fresh: Any = Attention(8, 2)
    assert fresh.processor._attention_backend is None


def test_width_must_divide_by_heads() -> None:
    with pytest.raises(ValueError, match="width 10 does not divide by 4 heads"):
        Attention(10, 4)


def test_cost_by_hand() -> None:
    assert macs_of(Attention(8, 2), 5) == 5 * 4 * 64 + 2 * 25 * 8
    assert macs_of(Attention(8, 2, joint=True), 5, 3) == 8 * 4 * 64 + 2 * 64 * 8
    assert (
        macs_of(Attention(8, 2, joint=True, context_pre_only=True), 5, 3)
        == 5 * 4 * 64 + 3 * 2 * 64 + 2 * 5 * 8 * 8
    )
    assert macs_of(Attention(8, 2, pre_only=True), 5) == 5 * 3 * 64 + 2 * 25 * 8
