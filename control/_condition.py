"""A pass over conditions alone: what a transformer's keys and values of a picture are, when nothing else is there to hear.

Walked by hand through the frozen blocks, since no block can be asked for one of its streams; adapters add to the
projections. Conditions of one size run as one batch, each with its own adapter, and none hears another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from control._backbones import Facts, Place, facts_of
from dit.attention import attend
from dit.embeddings import Rotary, rotate
from dit.grid import Grid


class Adds(Protocol):
    """What an adapter must tell: what it adds to a projection, and where its condition's tokens stand."""

    def added(self, path: str, x: Tensor) -> Tensor: ...
    def positions(self, grid: tuple[int, int], own: tuple[int, int], device: torch.device) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Step:
    """What a pass over conditions has in one block: keys and values [B, K, N, head size], and the stream after it."""

    place: Place
    k: Tensor
    v: Tensor
    hidden: Tensor | None


class ConditionPass:
    """Run conditions [B, C, H, W] of one size, each with its adapter, through a transformer as one batch (adapters outermost).

    Args:
        grid: rows and columns of the picture's tokens. pooled, guidance: what modulates them, [B, P] and [B].
    """

    def __init__(
        self,
        transformer: nn.Module,
        adapters: Sequence[Adds],
        latents: Sequence[Tensor],
        *,
        grid: tuple[int, int],
        pooled: Tensor,
        guidance: Tensor,
        dtype: torch.dtype,
    ) -> None:
        facts = facts_of(transformer)
        assert isinstance(facts, Facts)
        self.facts, self.transformer, self.adapters = facts, transformer, adapters
        patch = facts.patch(transformer)
        self.own = (latents[0].shape[2] // patch, latents[0].shape[3] // patch)
        where = [one.positions(grid, self.own, latents[0].device) for one in adapters]
        self.x = torch.cat([
            facts.embed(transformer, latent.to(dtype), one, grid) for latent, one in zip(latents, where, strict=True)
        ])  # fmt: skip
        angles = [facts.angles(transformer, one) for one in where]
        self.rotary = _stacked([one for one in angles if one is not None], len(latents[0]))
        emb = facts.conditioning(transformer, pooled, guidance, dtype)
        self.emb = emb.repeat(len(adapters), *(1,) * (emb.dim() - 1))

    def steps(self, last: int | None = None) -> Iterator[Step]:
        """Yield the blocks in order; after the keys and values of block `last` nothing more is computed (None: all is)."""
        x = self.x
        for place in self.facts.places(self.transformer):
            if place.index == last:
                inner = self.facts.normed(place, x, self.emb)
                k, v = self._keys(place, inner)
                yield Step(place, k.transpose(1, 2), v.transpose(1, 2), None)
                return
            kept: list[Tensor] = []

            def hear(_attn: Any, inner: Tensor, place: Place = place, kept: list[Tensor] = kept) -> Tensor:
                k, v = self._keys(place, inner)
                kept += [k, v]
                q = self._queries(place, inner)
                return self._out(place, attend(q, k, v, processor=place.attn.processor))

            x = self.facts.step(place, x, self.emb, hear, Grid(1, *self.own))
            yield Step(place, kept[0].transpose(1, 2), kept[1].transpose(1, 2), x)

    def raw_keys(self, place: Place, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys before norm and rotation, and values, [B, N, K, head size]."""
        k, v = (self._split(place, self._projected(place, name, inner)) for name in ("to_k", "to_v"))
        return k, v

    def queries(self, place: Place, x: Tensor) -> Tensor:
        """Return the queries [B, K, N, head size] of the stream x before a block."""
        return self._queries(place, self.facts.normed(place, x, self.emb)).transpose(1, 2)

    def _queries(self, place: Place, inner: Tensor) -> Tensor:
        q = self._split(place, self._projected(place, "to_q", inner))
        return self._rotated(q if place.attn.norm_q is None else place.attn.norm_q(q))

    def _keys(self, place: Place, inner: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.raw_keys(place, inner)
        return self._rotated(k if place.attn.norm_k is None else place.attn.norm_k(k)), v

    def _projected(self, place: Place, name: str, x: Tensor) -> Tensor:
        plain: Tensor = place.attn.get_submodule(name)(x)
        return plain + self._added(f"{place.layer}.{name}", x)

    def _added(self, path: str, x: Tensor) -> Tensor:
        parts = zip(self.adapters, x.chunk(len(self.adapters)), strict=True)
        return torch.cat([adapter.added(path, part) for adapter, part in parts])

    def _out(self, place: Place, heard: Tensor) -> Tensor:
        out = heard.flatten(2).to(self.x.dtype)
        if getattr(place.attn, "to_out", None) is None:
            return out
        out = place.attn.to_out[0](out)
        # Released files were trained with this part behind the map out, not beside it.
        out = out + self._added(f"{place.layer}.to_out.0", out)
        done: Tensor = place.attn.to_out[1](out)
        return done

    def _split(self, place: Place, x: Tensor) -> Tensor:
        return x.unflatten(-1, (place.attn.heads, -1))

    def _rotated(self, x: Tensor) -> Tensor:
        return x if self.rotary is None else rotate(x, self.rotary)


def _stacked(angles: Sequence[Rotary], batch: int) -> Rotary | None:
    """Angles of every sample [n * B, N, head size], from those of every condition."""
    if not angles:
        return None
    cos, sin = (torch.stack(part).repeat_interleave(batch, dim=0) for part in zip(*angles, strict=True))
    return cos, sin
