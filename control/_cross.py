"""An attention to something else, added inside a transformer's own attention before its map out.

In each attention that is held, `strength * attention(q, k', v')` is added to what the layer heard, over keys and values
from elsewhere (a control stream, a picture encoder); the layer's own keys are not touched. The queries are the layer's
own, or are made by the adapter of the picture's tokens that the layer was given. Sparse attention and token merging do not
reach it: it stays exact, so that what they cost does not grow by what steers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from control._backbones import Place
from control._tokens import KeyValues
from control.base import ControlRun, Refused, Use
from dit.seams import Attending, attention_seam

Queries = Callable[[Place, Tensor], Tensor]
Gates = Callable[[Place], Tensor | None]


@dataclass(frozen=True, slots=True)
class Crossing:
    """What is added for one use in the call of the transformer that is running.

    Attributes:
        source: keys and values by layer. strength: what the result is multiplied by.
        queries: makes queries [B, K, N, head size] of the picture's tokens [B, N, D] that a layer was given; None takes
            the layer's own, of the text too where it stands in the same sequence.
        gate: a factor for each channel [D] of the result, or None.
        where: a factor for each of the picture's tokens, [1 or B, N]. text: that of text tokens where `where` is given.
    """

    use: Use
    source: KeyValues
    strength: float
    queries: Queries | None = None
    gate: Gates = lambda _place: None
    where: Tensor | None = None
    text: float = 1.0


class Cross:
    """Add to the attention calls of `places` what is heard `now`.

    Args:
        places: blocks whose attention is held. text_first: whether the prompt stands before the picture in a joint sequence.
    """

    def __init__(self, run: ControlRun, places: Sequence[Place], *, text_first: bool) -> None:
        self.run, self.text_first = run, text_first
        self.places: Mapping[str, Place] = {place.layer: place for place in places}
        self.now: list[Crossing] = []
        self._words = 0
        self._given: dict[str, Tensor] = {}

    @contextmanager
    def attached(self, transformer: nn.Module) -> Iterator[None]:
        """Hold the attention of the transformer."""
        with ExitStack() as stack:
            for place in self.places.values():
                hook = place.attn.register_forward_pre_hook(self._keeper(place.layer), with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(attention_seam(transformer, self.answer))
            yield

    def begin(self, crossings: Sequence[Crossing], words: int = 0) -> None:
        """Say what the call that begins now hears, and how many text tokens it has; nothing after it has ended."""
        self.now, self._words = list(crossings), words
        self._given.clear()

    def answer(self, call: Attending) -> Tensor:
        """Compute one attention call, and add."""
        heard = [one for one in self.now if call.path in self.places and call.path in one.source]
        out = call.exact()
        for one in heard:
            out = self._with(out, call, one)
            self.run.account(one.use).acted += 1
        return out

    def _keeper(self, layer: str) -> Callable[..., None]:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.now:
                self._given[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return keep

    def _with(self, out: Tensor, call: Attending, one: Crossing) -> Tensor:
        """Return `out` [B, K, N, head size] with one crossing added."""
        place = self.places[call.path]
        k, v = (_for_batch(x, out.shape[0], one.use.name) for x in one.source.pair(call.path))
        if one.queries is None:
            q = call.q
        else:
            given = self._given[call.path]
            q = one.queries(place, given[:, self._words :] if place.kind == "single" else given)
        added = _exactly(q, k, v, call.scale) * one.strength
        gate = one.gate(place)
        if gate is not None:
            added = added * gate.to(added.dtype).view(1, added.shape[1], 1, -1)
        if one.where is not None:
            added = added * self._spread(added.shape[2], one, call).to(added.dtype)
        if added.shape[2] == out.shape[2]:
            return out + added
        first = out.shape[2] - added.shape[2] if self.text_first else 0
        last = first + added.shape[2]
        parts = [out[:, :, :first], out[:, :, first:last] + added, out[:, :, last:]]
        return torch.cat([part for part in parts if part.shape[2]], dim=2)

    def _spread(self, queries: int, one: Crossing, call: Attending) -> Tensor:
        """Return the factors of a region for `queries`, [1 or B, 1, N, 1]."""
        where = one.where
        assert where is not None
        words = queries - where.shape[1]
        if words not in (0, self._words):
            raise Refused(
                f"{one.use.name}: region covers {where.shape[1]} tokens of the picture, and {call.path} asks with {queries}: "
                "no region where tokens were merged or others stand beside the picture"
            )
        rest = where.new_full((len(where), words), one.text)
        rows = torch.cat([rest, where] if self.text_first else [where, rest], dim=1)
        batch = call.q.shape[0]
        rows = rows.repeat(batch // len(rows), 1) if 1 < len(rows) < batch else rows
        return rows[:, None, :, None]


def _exactly(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attention that no attention seam hears: what steers is small beside the rest, and must not be thinned out or merged."""
    found: Tensor = torch.ops.aten.scaled_dot_product_attention(q, k, v, scale=scale)
    return found


def _for_batch(x: Tensor, batch: int, name: str) -> Tensor:
    """One condition for all samples, or as many as samples of each guidance branch."""
    if len(x) in (1, batch):
        return x.expand(batch, -1, -1, -1)
    if batch % len(x):
        raise Refused(
            f"{name}: {len(x)} conditions for a batch of {batch}; give one for all, or as many as pictures"
        )
    return x.repeat(batch // len(x), 1, 1, 1)
