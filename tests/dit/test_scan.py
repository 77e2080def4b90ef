"""The scan by chunks is the recurrence, also where states are carried over many of them; and what it costs is told right."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit import scan
from dit.scan import Scan, scan_macs, state_space_scan, state_space_scan_chunked, state_space_scan_reference

HEADS, STATE, CHANNELS = 3, 4, 5


def streams(tokens: int, strength: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, dt, A, B, C."""
    draw = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    dt = strength * normal(2, tokens, HEADS).abs()
    rates = -torch.rand(HEADS, generator=draw, dtype=dtype) - 0.1
    return [normal(2, tokens, HEADS, CHANNELS), dt, rates, normal(2, tokens, STATE), normal(2, tokens, STATE)]


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("tokens", [1, 3, 63, 64, 65, 200])
def test_chunks_equal_the_recurrence(tokens: int, strength: float) -> None:
    """From states that keep nearly everything to those that forget all at every token."""
    given = streams(tokens, strength)
    ours, last = state_space_scan_chunked(*given)
    reference, state = state_space_scan_reference(*given)
    assert ours.shape == (2, tokens, HEADS, CHANNELS)
    assert ours.dtype == torch.float64
    assert float((ours - reference).abs().max()) < 1e-8
    assert float((last - state).abs().max()) < 1e-8
    assert torch.equal(state_space_scan(*given)[0], ours)


@pytest.mark.parametrize("scan_by", [state_space_scan_chunked, state_space_scan_reference])
def test_a_scan_goes_on_where_another_stopped(scan_by: Scan) -> None:
    x, dt, rates, keys, queries = streams(300, 0.1)
    whole, end = scan_by(x, dt, rates, keys, queries, None)
    state, parts = None, []
    for part in (slice(0, 130), slice(130, 131), slice(131, 300)):
        out, state = scan_by(x[:, part], dt[:, part], rates, keys[:, part], queries[:, part], state)
        parts.append(out)
    assert state is not None
    assert float((torch.cat(parts, dim=1) - whole).abs().max()) < 1e-8
    assert float((state - end).abs().max()) < 1e-8


@pytest.mark.parametrize("tokens", [7, 31, 100, 243])
def test_states_are_carried_through_groups_of_groups(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(scan, "CHUNK", 3)
    monkeypatch.setattr(scan, "GROUP", 3)
    given = streams(tokens, 0.1)
    difference = state_space_scan_chunked(*given)[0] - state_space_scan_reference(*given)[0]
    assert float(difference.abs().max()) < 1e-8


def test_single_precision_is_close_and_half_is_computed_in_single() -> None:
    given = streams(300, 0.1)
    exact, _ = state_space_scan_reference(*given)
    for dtype, share in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        out, _ = state_space_scan(*[one.to(dtype) for one in given])
        assert out.dtype == dtype
        assert float((out.double() - exact).abs().max()) < share * float(exact.abs().max())


def test_gradients_are_those_of_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "CHUNK", 4)
    monkeypatch.setattr(scan, "GROUP", 2)
    grads = []
    for run in (state_space_scan_chunked, state_space_scan_reference):
        given = [one.clone().requires_grad_() for one in streams(21)]
        out, last = run(*given)
        (out.sin().sum() + last.cos().sum()).backward()
        grads.append([one.grad for one in given])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-8)


def test_the_longest_steps_neither_overflow_nor_stop_gradients() -> None:
    x, _, rates, keys, queries = streams(130, dtype=torch.float32)
    dt = torch.full((2, 130, HEADS), 1e4, requires_grad=True)
    x.requires_grad_()
    out, _ = state_space_scan(x, dt, rates, keys, queries)
    out.square().sum().backward()
    now = (
        (queries * keys).sum(-1)[..., None, None] * 1e4 * x
    )  # a state that forgets everything holds the token itself
    torch.testing.assert_close(out, now, atol=1e-1, rtol=1e-4)
    for one in (x, dt):
        assert one.grad is not None
        assert one.grad.isfinite().all()


def test_a_step_of_no_length_leaves_the_state_as_it_is() -> None:
    x, dt, rates, keys, queries = streams(90)
    there = torch.arange(90) % 3 != 1
    out, _ = state_space_scan(x, dt * there[:, None], rates, keys, queries)
    alone, _ = state_space_scan(x[:, there], dt[:, there], rates, keys[:, there], queries[:, there])
    torch.testing.assert_close(out[:, there], alone, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("tokens", [1, 40, 64, 65, 64 * 16, 64 * 16 * 16 + 1])
def test_costs_are_told_right(tokens: int) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        given = [
            torch.empty(1, tokens, HEADS, CHANNELS), torch.empty(1, tokens, HEADS), torch.empty(HEADS),
            torch.empty(1, tokens, STATE), torch.empty(1, tokens, STATE),
        ]  # fmt: skip
        state_space_scan(*given)
    assert counter.get_total_flops() == 2 * scan_macs(tokens, HEADS, STATE, CHANNELS)


def test_costs_grow_as_the_tokens_do() -> None:
    long, short = (scan_macs(count, 8, 64, 64) for count in (2**20, 2**12))
    assert 250 < long / short < 260  # 256 times the tokens


def as_mamba_ssm(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **given: Any
) -> Any:
    """As mamba-ssm documents its scan: B and C by groups of heads, states [B, K, e, d]."""
    assert chunk_size == scan.CHUNK
    assert given.pop("return_final_states")
    before = given.pop("initial_states")
    assert not given
    out, last = state_space_scan_reference(
        x, dt, A, B[:, :, 0], C[:, :, 0], None if before is None else before.mT
    )
    return out, last.mT


def as_flash_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """As flash-linear-attention documents its simple gated attention: h_n = exp(g_n) h_(n-1) + k_n v_n, read by scale q_n."""
    assert output_final_state
    state = (
        torch.zeros(len(q), q.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state
    )
    out = []
    for n in range(q.shape[1]):
        state = g[:, n].exp()[..., None, None] * state + k[:, n, ..., None] * v[:, n, :, None]
        out.append(scale * (q[:, n, :, None] @ state).squeeze(-2))
    return torch.stack(out, dim=1), state


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("package", ["mamba_ssm", "fla"])
def test_kernels_are_called_as_their_packages_document_them(
    monkeypatch: pytest.MonkeyPatch, package: str, given_state: bool
) -> None:
    """What the kernels themselves answer is for a machine that has them: the test below."""
    one = {"mamba_chunk_scan_combined": as_mamba_ssm, "chunk_simple_gla": as_flash_linear_attention}
    where = {"mamba_ssm": "mamba_ssm.ops.triton.ssd_combined", "fla": "fla.ops.simple_gla"}[package]
    monkeypatch.setitem(sys.modules, where, types.SimpleNamespace(**one))  # type: ignore[arg-type]
    kernel = scan._mamba_ssm() if package == "mamba_ssm" else scan._flash_linear_attention()
    given = streams(9, dtype=torch.float32)
    state = torch.randn(2, HEADS, STATE, CHANNELS) if given_state else None
    for found, expected in zip(kernel(*given, state), state_space_scan(*given, state), strict=True):
        torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("package", ["mamba_ssm", "fla"])
def test_kernels_of_other_packages_agree(package: str) -> None:
    pytest.importorskip(package)
    draw = torch.Generator().manual_seed(0)
    x, keys, queries = (
        torch.randn(2, 300, *shape, generator=draw).cuda() for shape in ((4, 32), (32,), (32,))
    )
    dt, rates = torch.rand(2, 300, 4, generator=draw).cuda() * 0.1, -torch.rand(4, generator=draw).cuda()
    kernel = scan._mamba_ssm() if package == "mamba_ssm" else scan._flash_linear_attention()
    state = torch.randn(2, 4, 32, 32, generator=draw).cuda()
    ours = state_space_scan_chunked(x, dt, rates, keys, queries, state)
    for found, expected in zip(kernel(x, dt, rates, keys, queries, state), ours, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
