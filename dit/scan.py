"""The state-space scan of Mamba2: a state that every token writes to, that forgets as tokens say, and that is read along the way.

Paper: Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality, Dao and Gu 2024,
arXiv:2405.21060.
Differs: the states between chunks are carried by the same scan over groups of chunks, so few steps follow one another on a long
sequence; on a GPU the scan is that of mamba-ssm or flash-linear-attention, where one of them is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
"""Tokens that hear each other by one matrix; between chunks there is the state alone."""

GROUP = 16
"""Chunks, and groups of chunks, between which states are carried at once."""

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def state_space_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scan tokens x [B, N, K, e] from the first to the last through states of K heads -> answers [B, N, K, e] and the last state.

    The state, [B, K, d, e] and 0 before the first token unless given, is h_n = exp(dt_n A) h_(n-1) + dt_n B_n x_n and the answer
    C_n h_n, with steps dt [B, N, K] of at least 0, rates A [K] below 0, and B, C [B, N, d] that all heads share. Computed in
    float32 or better, answered in the dtype of x; the state stays in float32.
    """
    kernel = _kernel() if x.is_cuda and x.dtype != torch.float64 else None
    return (kernel or state_space_scan_chunked)(x, dt, A, B, C, state)


def state_space_scan_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, token by token: what `state_space_scan` is compared to."""
    if state is None:
        state = torch.zeros_like(x[:, 0, :, None] * B[:, 0, None, :, None])
    out = []
    for n in range(x.shape[1]):
        kept = (dt[:, n] * A).exp()[:, :, None, None]
        written = B[:, n, None, :, None] * (dt[:, n, :, None] * x[:, n])[:, :, None]
        state = kept * state + written
        out.append(torch.einsum("bd,bkde->bke", C[:, n], state))
    return torch.stack(out, dim=1), state


def state_space_scan_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence by chunks of tokens, in matrix products, O(N)."""
    dtype, tokens = x.dtype, x.shape[1]
    exact = torch.promote_types(dtype, torch.float32)
    chunk = min(CHUNK, tokens)
    dt = dt.to(exact)
    decay = _chunks((dt * A.to(exact)).unsqueeze(-1), chunk).squeeze(
        -1
    )  # [B, K, G, chunk], 0 beyond the last token
    v = _chunks(x.to(exact) * dt.unsqueeze(-1), chunk)  # [B, K, G, chunk, e]
    k, q = (_chunks(one.to(exact).unsqueeze(2), chunk) for one in (B, C))  # [B, 1, G, chunk, d]
    kept = decay.cumsum(-1)  # since the start of the chunk, this token's own decay included
    weights = (q @ k.mT) * _between(kept, kept, 0)  # [B, K, G, chunk, chunk]
    added = k.mT @ (v * (kept[..., -1:] - kept).exp().unsqueeze(-1))  # [B, K, G, d, e]
    states = _carried(kept[..., -1], added)
    if state is not None:
        since = kept[..., -1].cumsum(-1) - kept[..., -1]  # from the first token to the start of each chunk
        states = states + since.exp()[..., None, None] * state.to(exact).unsqueeze(2)
    out = weights @ v + (q @ states) * kept.exp().unsqueeze(-1)
    last = states[:, :, -1] * kept[:, :, -1, -1, None, None].exp() + added[:, :, -1]
    return out.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens].to(dtype), last


def scan_macs(tokens: int, heads: int, state: int, channels: int) -> int:
    """Return the multiply-accumulates of the scan of N tokens through states [d = `state`, e = `channels`] of K heads."""
    chunk = min(CHUNK, tokens)
    chunks = -(-tokens // chunk)
    rows = chunks * chunk
    within = rows * chunk * (state + heads * channels)
    return within + heads * state * channels * (2 * rows + _carry_macs(chunks))


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, N, K, e] -> [B, K, G, chunk, e], the last chunk filled up with zeros."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)


def _between(end: Tensor, start: Tensor, diagonal: int) -> Tensor:
    """What is kept of place j at place i, exp(end_i - start_j), [..., M] twice -> [..., M, M]; 0 above the diagonal."""
    gap = end.unsqueeze(-1) - start.unsqueeze(-2)
    later = torch.ones(gap.shape[-2:], dtype=torch.bool, device=gap.device).triu(diagonal + 1)
    return gap.masked_fill(later, float("-inf")).exp()  # masked before exp: what is not heard might overflow


def _carried(decay: Tensor, added: Tensor) -> Tensor:
    """Logarithm of what chunks keep of a state [B, K, G] and what they add to it [B, K, G, d, e] -> the state before each."""
    count = decay.shape[-1]
    group = min(GROUP, count)
    missing = -count % group
    decay = F.pad(decay, (0, missing)).unflatten(-1, (-1, group))  # [B, K, G', group]
    parts = (
        F.pad(added, (0, 0, 0, 0, 0, missing)).flatten(-2).unflatten(2, (-1, group))
    )  # [B, K, G', group, d e]
    kept = decay.cumsum(-1)
    before = kept - decay
    states = _between(before, kept, -1) @ parts
    if decay.shape[-2] > 1:
        total = (kept[..., -1:] - kept).exp().unsqueeze(-2) @ parts  # [B, K, G', 1, d e]
        earlier = _carried(kept[..., -1], total.squeeze(-2).unflatten(-1, added.shape[-2:]))
        states = states + before.exp().unsqueeze(-1) * earlier.flatten(-2).unsqueeze(-2)
    return states.flatten(2, 3)[:, :, :count].unflatten(-1, added.shape[-2:])


def _carry_macs(chunks: int) -> int:
    """Multiply-accumulates of `_carried` for one channel of the state of one head."""
    group = min(GROUP, chunks)
    groups = -(-chunks // group)
    within = groups * group * group
    return within if groups == 1 else within + groups * group + _carry_macs(groups)


@functools.cache
def _kernel() -> Scan | None:
    """Return the scan of an installed package, mamba-ssm's before flash-linear-attention's, or None where there is neither."""
    if importlib.util.find_spec("mamba_ssm") is not None:
        return _mamba_ssm()
    return _flash_linear_attention() if importlib.util.find_spec("fla") is not None else None


def _mamba_ssm() -> Scan:
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def run(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        before = None if state is None else state.mT.contiguous()  # its states are [B, K, e, d]
        pair = B.unsqueeze(2), C.unsqueeze(2)
        out, last = scan(x, dt, A.float(), *pair, CHUNK, initial_states=before, return_final_states=True)
        return out, last.mT

    return run


def _flash_linear_attention() -> Scan:
    """Its gated linear attention with one gate a head is the same scan: B are the keys, C the queries, dt x the values."""
    scan = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    if (
        "head_first" in inspect.signature(scan).parameters
    ):  # there heads came before tokens unless told otherwise
        scan = functools.partial(scan, head_first=False)

    def run(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        dt = dt.float()
        keys, queries = (
            one.to(x.dtype).unsqueeze(2).expand(-1, -1, x.shape[2], -1).contiguous() for one in (B, C)
        )
        values = (x * dt.unsqueeze(-1)).to(x.dtype)
        before = None if state is None else state.float()
        about = {"scale": 1.0, "initial_state": before, "output_final_state": True}
        out, last = scan(queries, keys, values, dt * A.float(), **about)
        return out, last

    return run
