"""The two-dimensional shuffle mixer: values change places among tokens and channels, hear each other, and go home again.

Channels are dealt to groups; in a group all values of all tokens are permuted together, cut into segments, and each segment
attends to itself. So a value hears others from anywhere, at a fraction of the cost of full attention: a segment is a
quarter as long, and a group's maps are as narrow as the group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from control.base import Refused
from dit.layers import PlainNorm

_KEPT = 4  # sizes of pictures whose permutations are kept


@dataclass(frozen=True, slots=True)
class Draws:
    """The permutations of one call: of the channels [D], and for each group of its values [N x C]."""

    channels: Tensor
    values: tuple[Tensor, ...]


def widths(width: int, groups: int, unit: int) -> tuple[int, ...]:
    """Deal `width` channels to groups as evenly as multiples of `unit` allow, the released code's way.

    Raises: Refused where they cannot be dealt.
    """
    units, rest = divmod(width, unit)
    if rest or not 1 <= groups <= units:
        allowed = f"1 to {units}" if not rest else f"a width that divides by 8 x heads = {unit}"
        raise Refused(f"{width} channels cannot be dealt to {groups} groups; allowed is {allowed}")
    share = [-(-(width // groups + (place < width % groups)) // unit) for place in range(groups)]
    place = 0
    while sum(share) > units:  # what was rounded up comes off the first groups that have more than one
        if share[place] > 1:
            share[place] -= 1
        place = (place + 1) % groups
    return tuple(one * unit for one in share)


class SegmentAttention(nn.Module):
    """Softmax attention inside each segment of a group, in C channels."""

    def __init__(self, width: int, heads: int, segments: int) -> None:
        super().__init__()
        self.heads, self.segments = heads, segments
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """[B, N, C] and a permutation of its N x C values -> [B, N, C], every value at its own place."""
        batch, tokens, width = x.shape
        count = math.gcd(tokens, self.segments)
        mixed = x.flatten(1).index_select(1, order).reshape(batch * count, tokens // count, width)
        q, k, v = self.qkv(mixed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Not by the name that `attention_seam` listens to: accelerators decide about the transformer's own attention.
        heard = torch.ops.aten.scaled_dot_product_attention.default(q, k, v)
        out = self.proj(heard.transpose(1, 2).flatten(2)).reshape(batch, -1)
        home = torch.empty_like(out).index_copy_(1, order.long(), out)  # a permutation fills every place
        return home.reshape(batch, tokens, width)

    def macs(self, rows: int, text: int = 0) -> int:
        """Multiply-accumulates of one sample of `rows` tokens."""
        maps = self.qkv.weight.numel() + self.proj.weight.numel()
        return rows * maps + 2 * rows * (rows // math.gcd(rows, self.segments)) * self.proj.in_features


class ShuffleMixer(nn.Module):
    """Norm, shift and scale, groups of shuffled segments, gate, and back onto the stream.

    Args:
        parts: channels of each group. rows: vectors in its table; shift, scale and gate are the first three.
        seed: of the permutations, which are drawn on the CPU and are the same on every device.
    """

    def __init__(self, parts: Sequence[int], heads: int, segments: int, *, rows: int, seed: int) -> None:
        super().__init__()
        width = sum(parts)
        self.parts, self.seed = tuple(parts), seed
        self.norm = PlainNorm(width)
        self.table = nn.Parameter(torch.randn(rows, width) / width**0.5)
        self.groups = nn.ModuleList(SegmentAttention(part, heads, segments) for part in parts)
        self._fixed: dict[tuple[int, torch.device], Draws] = {}

    def forward(self, x: Tensor, vectors: Tensor, draws: Draws) -> Tensor:
        """Tokens [B, N, D] and vectors [B, 1 or N, 3 or 6, D] -> [B, N, D]."""
        shift, scale, gate = (vectors[..., :3, :] + self.table[:3]).unbind(-2)  # each [B, 1 or N, D]
        inner = (self.norm(x) * (1 + scale) + shift).index_select(2, draws.channels)
        dealt = zip(self.groups, inner.split(self.parts, dim=2), draws.values, strict=True)
        out = torch.cat([group(part, order) for group, part, order in dealt], dim=2)
        return x + gate * torch.empty_like(out).index_copy_(2, draws.channels, out)

    def fixed(self, tokens: int, device: torch.device) -> Draws:
        """Return the permutations of this mixer's seed for pictures of N tokens. Groups of one width share theirs."""
        key = (tokens, device)
        if key not in self._fixed:
            while len(self._fixed) >= _KEPT:
                del self._fixed[next(iter(self._fixed))]
            with torch.inference_mode(False):  # what is kept may be used in training later
                self._fixed[key] = self._seeded(tokens, device)
        return self._fixed[key]

    def _seeded(self, tokens: int, device: torch.device) -> Draws:
        channels = torch.randperm(sum(self.parts), generator=_generator(self.seed), device="cpu")
        held: dict[int, Tensor] = {}
        for part in dict.fromkeys(self.parts):
            order = torch.randperm(tokens * part, generator=_generator(self.seed, tokens, part), device="cpu")
            held[part] = order.to(device, torch.int32)
        return Draws(channels.to(device), tuple(held[part] for part in self.parts))

    def drawn(self, tokens: int, device: torch.device) -> Draws:
        """Draw permutations from torch's global generator, as the released code does in every call."""
        channels = torch.randperm(sum(self.parts)).to(device)
        return Draws(
            channels, tuple(torch.randperm(tokens * part, device=device).int() for part in self.parts)
        )

    def identity(self, tokens: int, device: torch.device) -> Draws:
        """Return the permutations that leave everything where it is."""
        values = tuple(torch.arange(tokens * part, device=device) for part in self.parts)
        return Draws(torch.arange(sum(self.parts), device=device), values)


def shuffle_reference(mixer: ShuffleMixer, x: Tensor, vectors: Tensor, draws: Draws) -> Tensor:
    """Compute `ShuffleMixer.forward` sample by sample and value by value, as the paper says it; for tests."""
    shift, scale, gate = (vectors[..., :3, :] + mixer.table[:3]).unbind(-2)
    inner, out = mixer.norm(x) * (1 + scale) + shift, torch.zeros_like(x)
    for sample in range(len(x)):
        begin = 0
        for group, part, order in zip(mixer.groups, mixer.parts, draws.values, strict=True):
            assert isinstance(group, SegmentAttention)
            channels = draws.channels[begin : begin + part]
            begin += part
            flat, home = inner[sample][:, channels].reshape(-1), torch.zeros(x.shape[1] * part, dtype=x.dtype)
            size = len(flat) // math.gcd(x.shape[1], group.segments)
            for first in range(0, len(flat), size):
                places = order[first : first + size].long()
                mixed = flat[places].reshape(-1, part)
                q, k, v = group.qkv(mixed).split(part, dim=1)
                heard = []
                for a, b, c in zip(
                    *(one.split(part // group.heads, dim=1) for one in (q, k, v)), strict=True
                ):
                    heard.append(torch.softmax(a @ b.T / a.shape[1] ** 0.5, dim=1) @ c)
                home[places] = group.proj(torch.cat(heard, dim=1)).reshape(-1)
            out[sample][:, channels] = home.reshape(-1, part)
    return x + gate * out


def _generator(*parts: int) -> torch.Generator:
    """A generator for a seed and what it is for; the parts are small, and their mix is the same everywhere."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 1_000_003 + part + 1) % (1 << 63)
    return torch.Generator("cpu").manual_seed(mixed)
