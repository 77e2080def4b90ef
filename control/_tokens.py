"""Keys and values of a condition, heard in the main pass beside the transformer's own: no mask where the strength is 1.

A strength s is a bias log s on the scores of the condition's keys: exactly nothing at 0 (they are not appended), what was
trained at 1, and continuous in between. A region is a bias for each place that asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from control.base import ControlRun, Refused, Use
from dit.seams import Attending, attend_appended, attention_seam

Pair = tuple[Tensor, Tensor]
_FP8 = torch.float8_e4m3fn


@dataclass(slots=True)
class _Kept:
    """One tensor [B, K, M, head size] as it is stored: itself, or in fp8 with a scale for each head; maybe on the CPU."""

    data: Tensor
    scale: Tensor | None

    @classmethod
    def of(cls, x: Tensor, storage: str, place: str) -> _Kept:
        scale = None
        if storage == "fp8":
            scale = x.float().abs().amax(dim=(2, 3), keepdim=True).clamp(min=1e-12) / torch.finfo(_FP8).max
            x = (x.float() / scale).to(_FP8)
        if place == "cpu" and x.device.type != "cpu":
            x = x.to("cpu").pin_memory() if x.device.type == "cuda" else x.to("cpu")
        return cls(x, scale)

    @property
    def bytes(self) -> int:
        scale = 0 if self.scale is None else self.scale.numel() * self.scale.element_size()
        return self.data.numel() * self.data.element_size() + scale

    def fetched(self, device: torch.device) -> Tensor:
        return self.data.to(device, non_blocking=True)

    def restored(self, fetched: Tensor, dtype: torch.dtype) -> Tensor:
        return fetched.to(dtype) if self.scale is None else (fetched.float() * self.scale).to(dtype)


class KeyValues:
    """Keys and values of one pass over conditions, by layer; stored as asked, given back in the dtype they had."""

    def __init__(self, pairs: Mapping[str, Pair], storage: str = "exact", place: str = "device") -> None:
        first = next(iter(pairs.values()))[0]
        self.dtype, self.device, self.samples, self.tokens = (
            first.dtype,
            first.device,
            first.shape[0],
            first.shape[2],
        )
        self._kept = {
            layer: (_Kept.of(k, storage, place), _Kept.of(v, storage, place))
            for layer, (k, v) in pairs.items()
        }
        order = list(pairs)
        self._next = dict(zip(order, order[1:] + order[:1], strict=True))
        self._coming: dict[str, Pair] = {}
        self._ahead = place == "cpu" and self.device.type == "cuda"

    def __contains__(self, layer: str) -> bool:
        return layer in self._kept

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers in order."""
        return tuple(self._kept)

    @property
    def bytes(self) -> int:
        """Bytes stored."""
        return sum(k.bytes + v.bytes for k, v in self._kept.values())

    def pair(self, layer: str) -> Pair:
        """Return keys and values [B, K, M, head size] of a layer, and let those of the next one begin to come."""
        k, v = self._kept[layer]
        came = self._coming.pop(layer, None) or (k.fetched(self.device), v.fetched(self.device))
        if self._ahead:
            after = self._next[layer]
            later = self._kept[after]
            self._coming = {after: (later[0].fetched(self.device), later[1].fetched(self.device))}
        return k.restored(came[0], self.dtype), v.restored(came[1], self.dtype)


@dataclass(slots=True)
class Heard:
    """One condition in the call that is running: samples `first` to `last` of `source`, how strongly, and where [B, N]."""

    use: Use
    source: KeyValues
    first: int
    last: int
    strength: float
    where: Tensor | None = None
    text: float = 1.0  # how far the text hears it, where `where` is given
    _bias: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def bias(self, call: Attending) -> Tensor:
        """Return what is added to the scores of its keys: [1, 1, 1, 1], or [B, 1, N, 1] where a region is given."""
        if self.where is None:
            return torch.full((1, 1, 1, 1), math.log(self.strength), device=call.q.device)
        queries, (front, back) = call.q.shape[2], call.query_text
        key = (queries, front, back)
        if key not in self._bias:
            if queries - front - back != self.where.shape[1]:
                raise Refused(
                    f"{self.use.name}: region covers {self.where.shape[1]} tokens of the picture, and {call.path} has "
                    f"{queries - front - back}: no region where tokens were merged or others stand beside the picture"
                )
            words = self.where.new_full((len(self.where), 1), self.text)
            rows = torch.cat([words.expand(-1, front), self.where, words.expand(-1, back)], dim=1)
            self._bias[key] = (self.strength * rows).log()[:, None, :, None]
        return self._bias[key]


class Tokens:
    """Answer the attention calls of a transformer with the conditions that are `now` heard."""

    def __init__(self, run: ControlRun) -> None:
        self.run = run
        self.now: list[Heard] = []
        self._masks: tuple[object, Tensor | None] = (None, None)

    @contextmanager
    def attached(self, transformer: nn.Module) -> Iterator[None]:
        """Hold the attention of the transformer."""
        with attention_seam(transformer, self.answer):
            yield

    def begin(self, heard: Sequence[Heard]) -> None:
        """Say what the call of the transformer that begins now hears; nothing after it has ended."""
        self.now = list(heard)
        self._masks = (None, None)

    def answer(self, call: Attending) -> Tensor:
        """Compute one attention call, with the conditions' keys and values behind its own."""
        heard = [one for one in self.now if call.path in one.source]
        if not heard:
            return call.exact()
        if call.causal:
            raise Refused(f"{call.path} is causal: nothing can be appended to what it hears")
        pairs = [self._pair(one, call) for one in heard]
        k = torch.cat([one[0] for one in pairs], dim=2)
        v = torch.cat([one[1] for one in pairs], dim=2)
        for one in heard:
            self.run.account(one.use).acted += 1
        return attend_appended(call, k, v, self._mask(call, heard, [one[0].shape[2] for one in pairs]))

    def _pair(self, one: Heard, call: Attending) -> Pair:
        k, v = one.source.pair(call.path)
        k, v = k[one.first : one.last], v[one.first : one.last]
        batch, samples = call.q.shape[0], k.shape[0]
        if samples == 1:
            return k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)
        if batch % samples:
            raise Refused(
                f"{one.use.name}: {samples} conditions for a batch of {batch}; give one for all, or as many as pictures"
            )
        times = batch // samples
        return k.repeat(times, 1, 1, 1), v.repeat(times, 1, 1, 1)

    def _mask(self, call: Attending, heard: Sequence[Heard], lengths: Sequence[int]) -> Tensor | None:
        """Return the mask of all keys, None where all are heard fully; the layers of a call that are alike share it."""
        plain = all(one.strength == 1 and one.where is None for one in heard)
        if plain and call.mask is None:
            return None
        key = (
            id(call.mask),
            tuple(call.q.shape),
            call.k.shape[2],
            call.query_text,
            tuple(id(one) for one in heard),
        )
        if self._masks[0] != key:
            self._masks = (key, self._made(call, heard, lengths, plain))
        return self._masks[1]

    def _made(self, call: Attending, heard: Sequence[Heard], lengths: Sequence[int], plain: bool) -> Tensor:
        mask, q = call.mask, call.q
        if mask is not None and mask.shape[-1] == 1:
            mask = mask.expand(*mask.shape[:-1], call.k.shape[2])
        if plain and mask is not None:
            return F.pad(mask, (0, sum(lengths)), value=True if mask.dtype == torch.bool else 0.0)
        own = q.new_zeros(1, 1, 1, call.k.shape[2])
        if mask is not None:
            own = (
                own.expand(mask.shape).masked_fill(~mask, -math.inf)
                if mask.dtype == torch.bool
                else mask.to(q.dtype)
            )
            own = own.reshape((1,) * (4 - own.dim()) + own.shape)
        parts = [own] + [
            one.bias(call).to(q.dtype).expand(-1, -1, -1, length)
            for one, length in zip(heard, lengths, strict=True)
        ]
        sizes = [max(part.shape[axis] for part in parts) for axis in range(3)]
        for axis, size in ((0, q.shape[0]), (1, q.shape[1])):
            sizes[axis] = size if sizes[axis] > 1 else 1
        return torch.cat([_spread(part, sizes) for part in parts], dim=3)


def _spread(part: Tensor, sizes: Sequence[int]) -> Tensor:
    """Repeat a bias [B, K, N, M] to the sizes of the others; one region a picture serves all guidance branches."""
    if 1 < part.shape[0] < sizes[0]:
        part = part.repeat(sizes[0] // part.shape[0], 1, 1, 1)
    return part.expand(*sizes, part.shape[3])


def on_grid(region: Tensor, grid: tuple[int, int], device: torch.device) -> Tensor:
    """Return a region [H, W] or [B, H, W] as the mean over each token of the picture, [1 or B, N]."""
    x = region.to(device, torch.float32)
    x = x[None] if x.dim() == 2 else x
    return F.interpolate(x[:, None], size=grid, mode="area").flatten(1)
