"""Mamba2 from both ends of a clip, along another axis in each block, after a glance at the whole of it.

Paper: LinGen: Towards High-Resolution Minute-Length Text-to-Video Generation with Linear Computational Complexity, Wang et al.
2024, arXiv:2412.09856 (rotary major scan, review tokens); Mamba2, Dao and Gu 2024, arXiv:2405.21060.
Differs: LinGen does not tell its sizes. Ours: states of 64 for each channel, heads as wide as those of attention, one Mamba2 for
each direction (or one for both), whose answers are added; review tokens are means of boxes, 4 along each axis.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit.embeddings import Rotary
from dit.grid import Grid
from dit.layers import HeadNorm
from dit.ledger import macs_of
from dit.mixers.full import Mixer, grid_alone, heads_of, keys_of
from dit.mixers.linear import gated_heads
from dit.mixers.proxy import pool
from dit.model import Context
from dit.partition import Window
from dit.scan import Scan, scan_macs, state_space_scan
from dit.spec import knob, spec

ROTARY = {
    "rows": (0, 1, 2),
    "columns": (0, 2, 1),
    "time-rows": (1, 2, 0),
    "time-columns": (2, 1, 0),
}
"""Orders of the rotary major scan: axes (frames, rows, columns) from the slowest to the fastest."""

ORDERS = (*ROTARY, "zigzag")
"""Ways through a clip; "zigzag" turns round at the end of every row and frame, so that it never leaps."""


SEGMENT = 2048
"""Tokens that go through a direction at once: of a long clip, what comes between stays small enough to be at hand."""

SEGMENT_ON_DEVICE = 65536
"""The same on a GPU, where more must be done at once."""


@spec("mamba", paper="LinGen, arXiv:2412.09856")
class Mamba(Mixer):
    """State-space scan from both ends, O(N D state)."""

    scan: str = knob(
        default="rotary", label="Order of the scan, or a cycle over the blocks", choices=("rotary", *ORDERS)
    )
    both_ends: bool = knob(default=True, label="Scan from the last token too")
    shared: bool = knob(default=False, label="Both directions have the same weights")
    review: int = knob(
        default=4, label="Review tokens along an axis, 0 for none", low=0, high=64, unit="tokens"
    )
    state: int = knob(default=64, label="Size of the state for each channel", low=1, high=1024)
    expand: int = knob(default=2, label="Channels of the scan, times the width", low=1, high=8)
    kernel: int = knob(default=4, label="Tokens of the convolution before the scan", low=1, high=16)

    @property
    def needs_grid(self) -> bool:
        return True

    def at(self, block: int) -> Mamba:
        if self.scan != "rotary":
            return self
        return self.replace(scan=tuple(ROTARY)[block % len(ROTARY)])

    def build(self, width: int, heads: int, *, qk_norm: bool = False, pre_only: bool = False) -> nn.Module:
        return MambaMixer(self, width, heads)


def scan_order(order: str, grid: Grid, device: torch.device | str = "cpu") -> Tensor | None:
    """Return which token comes when, [N]; None where tokens stand in the order already."""
    if order == "rows":
        return None
    places = torch.arange(grid.tokens, device=device).reshape(grid.frames, grid.height, grid.width)
    if order != "zigzag":
        return places.permute(ROTARY[order]).flatten()
    rows = torch.arange(grid.height, device=device)[None, :, None] % 2 == 1
    places = torch.where(rows, places.flip(2), places).flatten(1)  # [F, S]
    frames = torch.arange(grid.frames, device=device)[:, None] % 2 == 1
    return torch.where(frames, places.flip(1), places).flatten()


def review_grid(grid: Grid, count: int) -> Window:
    """Return the boxes whose means are the review tokens: at most `count` along each axis."""
    f, h, w = (-(-axis // count) for axis in (grid.frames, grid.height, grid.width))
    return Window(grid, (f, h, w))


class Mamba2(nn.Module):
    """One direction: a map, a short causal convolution, the scan, a gate and its norm, a map back."""

    def __init__(self, settings: Mamba, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"mamba: width {width} does not divide by {heads} heads")
        self.inner, self.heads, self.state = settings.expand * width, settings.expand * heads, settings.state
        self.sizes = [self.inner, self.inner + 2 * self.state, self.heads]
        self.in_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv = nn.Conv1d(self.sizes[1], self.sizes[1], settings.kernel, groups=self.sizes[1])
        steps = torch.exp(torch.empty(self.heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = HeadNorm(self.inner)
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    def forward(
        self,
        x: Tensor,
        heard: Tensor | None = None,
        heads: Tensor | None = None,
        *,
        skip: int = 0,
        scan: Scan = state_space_scan,
    ) -> Tensor:
        """Tokens in the order of the scan [B, N, D] -> [B, N - skip, D], without answers to the first `skip` tokens.

        A token that is not `heard` [B, N] leaves the state as it is. `heads` are gates of the network's heads, [B, K].
        """
        state: Tensor | None = None
        tail: Tensor | None = None
        out: list[Tensor] = []
        start = 0
        length = SEGMENT_ON_DEVICE if x.is_cuda else SEGMENT
        for part in x.split(length, dim=1):
            end = start + part.shape[1]
            there = None if heard is None else heard[:, start:end]
            z, answer, state, tail = self._scanned(part, there, state, tail, scan)
            if end > skip:
                kept = slice(max(skip - start, 0), None)
                answer = self.norm(answer[:, kept] * F.silu(z[:, kept])).to(x.dtype)
                out.append(self.out_proj(answer if heads is None else gated_heads(answer, heads)))
            start = end
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    def macs(self, rows: int, skip: int = 0) -> int:
        """Return the multiply-accumulates for `rows` tokens of which the first `skip` are not answered."""
        whole, rest = divmod(rows, SEGMENT)
        sizes = self.heads, self.state, self.inner // self.heads
        scanned = whole * scan_macs(SEGMENT, *sizes) + (scan_macs(rest, *sizes) if rest else 0)
        maps = macs_of(self.in_proj, rows) + macs_of(self.conv, rows) + macs_of(self.out_proj, rows - skip)
        return scanned + maps

    def _scanned(
        self, x: Tensor, heard: Tensor | None, state: Tensor | None, tail: Tensor | None, scan: Scan
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One segment [B, N, D], the state and the tokens before it -> gates and answers [B, N, expanded D], state and tokens."""
        exact = torch.promote_types(x.dtype, torch.float32)
        z, mixed, dt = self.in_proj(x).split(self.sizes, dim=-1)
        dt = F.softplus(dt.to(exact) + self.dt_bias.to(exact))  # [B, N, K]
        if heard is not None:
            mixed, dt = mixed * heard.unsqueeze(-1), dt * heard.unsqueeze(-1)
        before = self.conv.kernel_size[0] - 1
        mixed = F.pad(mixed.mT, (before, 0)) if tail is None else torch.cat([tail, mixed.mT], dim=-1)
        v, B, C = F.silu(self.conv(mixed).mT).split([self.inner, self.state, self.state], dim=-1)
        v = v.unflatten(-1, (self.heads, -1))  # [B, N, K, e]
        out, state = scan(v, dt, -self.A_log.to(exact).exp(), B, C, state)
        out = out + v * self.D.to(v.dtype)[:, None]
        return z, out.flatten(2), state, mixed[..., mixed.shape[-1] - before :]


class MambaMixer(nn.Module):
    """The network of `Mamba`: in each direction review tokens come first, then the clip in the order of the block."""

    def __init__(self, settings: Mamba, width: int, heads: int) -> None:
        super().__init__()
        self.order, self.review, self.both_ends = (
            settings.at(0).scan,
            settings.review,
            settings.both_ends,
        )
        count = 2 if settings.both_ends and not settings.shared else 1
        self.scans = nn.ModuleList(Mamba2(settings, width, heads) for _ in range(count))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        context: Context | None = None,
        scan: Scan = state_space_scan,
        **_: Any,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]. Positions lie in the order of the scan: none are added.

        Raises: ValueError without a grid, or where text tokens stand in the sequence.
        """
        grid = grid_alone("mamba", context)
        assert context is not None
        x, heads = hidden_states, heads_of(context).get("heads")
        keys = keys_of("mamba", context.mask, *x.shape[:2])
        first, seen = self._reviewed(x, keys, grid)  # [B, R, D]
        index = scan_order(self.order, grid, x.device)
        if index is not None:
            x, keys = x[:, index], None if keys is None else keys[:, index]
        out = torch.zeros_like(x)
        for reverse in (False, True) if self.both_ends else (False,):
            turned, heard = (x.flip(1), None if keys is None else keys.flip(1)) if reverse else (x, keys)
            if heard is not None and seen is not None:
                heard = torch.cat([seen, heard], dim=1)
            sequence = turned if first is None else torch.cat([first, turned], dim=1)
            skip = sequence.shape[1] - turned.shape[1]
            answer = self.scans[-1 if reverse else 0](sequence, heard, heads, skip=skip, scan=scan)
            out = out + (answer.flip(1) if reverse else answer)
        if index is None:
            return out
        back = torch.empty_like(index).scatter_(0, index, torch.arange(len(index), device=index.device))
        return out[:, back]

    def macs_on(self, grid: Grid, _text: int = 0) -> int:
        """Return the multiply-accumulates for one sample of `grid`."""
        return self._macs(grid.tokens, review_grid(grid, self.review).groups if self.review else 0)

    def macs(self, rows: int, _text: int = 0) -> int:
        """Return the multiply-accumulates where only a count of tokens is known: with as many review tokens as there may be."""
        return self._macs(rows, min(self.review**3, rows))

    def _macs(self, tokens: int, first: int) -> int:
        ends: list[Any] = [self.scans[0], self.scans[-1]] if self.both_ends else [self.scans[0]]
        return sum(int(one.macs(tokens + first, first)) for one in ends)

    def _reviewed(self, x: Tensor, keys: Tensor | None, grid: Grid) -> tuple[Tensor | None, Tensor | None]:
        """The review tokens [B, R, D], means of what may be heard, in the order of the scan; and which have heard any [B, R]."""
        if not self.review:
            return None, None
        boxes = review_grid(grid, self.review)
        index = scan_order(self.order, Grid(*boxes.boxes), x.device)
        seen = None
        if keys is None:
            first, _ = pool(x, boxes, (1, 1), "mean")
        else:
            there = keys.unsqueeze(-1).to(x.dtype)
            share, _ = pool(there, boxes, (1, 1), "mean")
            total, _ = pool(x * there, boxes, (1, 1), "mean")
            first, seen = total / share.clamp_min(torch.finfo(x.dtype).tiny), share.squeeze(-1) > 0
        if index is not None:
            first, seen = first[:, index], None if seen is None else seen[:, index]
        return first, seen
