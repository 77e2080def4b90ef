"""A residual added after chosen blocks, as an inner hook: whoever reuses a block's output reuses it with its residual.

It is attached nearer to the weights than any accelerator, so that a block that is skipped skips its residual, and one
that is reused has it once. diffusers' own order (residuals added between blocks) counts them twice under its caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from control._tokens import on_grid
from control._trunk import Sides, Trunk, fitted_to, repeated
from control.base import ControlRun, Refused, Use
from dit.seams import (
    RUN,
    Block,
    Blocks,
    Tensors,
    arguments,
    around_blocks,
    blocks_of,
    match,
    tensor_arguments,
)

IMAGE = ("hidden_states", "x", "hidden")
"""What blocks call the stream of the picture."""

Residual = Callable[[int, dict[str, Any], Tensor], Tensor | None]


@contextmanager
def residual_after(transformer: nn.Module, places: Mapping[int, Any], residual: Residual) -> Iterator[None]:
    """Add `residual(place, inputs, image)` to the picture's stream after each of the blocks `places`.

    Args:
        places: indices of blocks in the order of `blocks_of` (the values are the caller's).
        residual: called with the place, the block's arguments by name (its inputs) and the picture's stream
            [B, N, D] that the block returned; returns what is added, or None for nothing.

    Raises: Refused for a place that does not exist, or in a call for a block without a recognisable picture stream.
    """
    blocks = blocks_of(transformer)
    strange = [place for place in places if not 0 <= place < len(blocks)]
    if blocks.reason is not None or strange:
        last = len(blocks) - 1
        raise Refused(blocks.reason or f"there is no block {strange[0]}: the blocks are 0 to {last}")
    chosen = {blocks.blocks[place].path: place for place in places}

    def around(block: Block, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = tensor_arguments(block.module, args, kwargs)
        output = inner(*args, **kwargs)
        form = match(block.module, inputs, output)
        if isinstance(form, str):
            raise Refused(f"no residual after {block.path}: {form}")
        streams = form.split(output)
        name = next((one for one in IMAGE if one in streams), None)
        if name is None:
            raise Refused(f"no residual after {block.path}: it returns {', '.join(streams) or 'no stream'}")
        added = residual(chosen[block.path], arguments(block.module, args, kwargs), streams[name])
        return output if added is None else form.join(streams | {name: streams[name] + added})

    held = Blocks(tuple(block for block in blocks if block.path in chosen))
    with around_blocks(held, around):
        yield


@dataclass(slots=True)
class Made:
    """What one control block gave: the control stream after it, and the residual."""

    stream: Tensor
    residual: Tensor


@dataclass(slots=True)
class ControlStream:
    """A chain of control blocks in one use: what they have given in this call, and in the last call of each branch.

    The latter serves accelerators: where a block was not computed, neither was the control block behind it, and a later one
    goes on from what it gave last, as the block's own stream does.

    The adapter has `places`, `blocks` (picture, control stream, vectors, draws -> control stream, residual), `vectors`, `draws`,
    `dtype`, and `control.hold_residual`.
    """

    use: Use
    trunk: Trunk
    run: ControlRun
    now: dict[int, Made] = field(default_factory=dict)
    before: dict[tuple[int, str], dict[int, Made]] = field(default_factory=dict)
    branch: tuple[int, str] = (0, "")
    given: dict[str, Any] = field(default_factory=dict)
    where: tuple[Sides, Tensor] | None = None
    seen: tuple[Any, Sides] | None = None
    said: tuple[Tensor, Tensor] | None = None

    @property
    def adapter(self) -> Any:
        return self.use.adapter

    def places(self, depth: int) -> Sequence[int]:
        """Return the blocks after which something may be added; behind the last block nothing is held."""
        own = self.adapter.places
        if not self.adapter.control.hold_residual:
            return own
        return sorted({*own, *range(own[0], depth - 1)})

    def enter(self, given: dict[str, Any]) -> None:
        moment = self.run.moment
        self.branch = (0, "") if moment is None else (moment.run, moment.branch)
        for other in [one for one in self.before if one[0] != self.branch[0]]:  # of an earlier run
            del self.before[other]
        self.now, self.given = {}, given

    def leave(self, failed: bool) -> None:
        about = vars(self.run.transformer)
        reused = about.get(RUN) is not None or about.get("_cache_config") is not None
        if reused and not failed and self.now and not torch.is_grad_enabled():
            self.before[self.branch] = self.before.get(self.branch, {}) | self.now
            self.run.account(self.use).told["kept_bytes"] = sum(
                x.numel() * x.element_size()
                for made in self.before.values()
                for one in made.values()
                for x in (one.stream, one.residual)
            )
        self.now, self.given, self.said = {}, {}, None

    def residual(self, place: int, inputs: Tensors, image: Tensor) -> Tensor | None:
        """Return what is added behind a block; nothing is computed where the strength is 0."""
        strength = self.run.strength(self.use)
        if strength == 0:
            return None
        adapter = self.adapter
        if place in adapter.places:
            added = self._computed(adapter.places.index(place), inputs, image)
        else:
            held = self._latest(sum(one < place for one in adapter.places), image)
            if held is None:
                return None
            added = held.residual
        self.run.account(self.use).acted += 1
        if strength != 1:
            added = added * strength
        if self.use.region is not None:
            added = added * self._region(image)
        return added.to(image.dtype)

    def _computed(self, number: int, inputs: Tensors, image: Tensor) -> Tensor:
        adapter, dtype = self.adapter, self.adapter.dtype
        block: Any = adapter.blocks[number]
        earlier = self._latest(number, image)
        stream = self._tokens(image) if earlier is None else earlier.stream
        conditioning = inputs.get(self.trunk.argument)
        if conditioning is None:
            raise Refused(f"{self.use.name}: the blocks take no {self.trunk.argument}")
        if self.said is None or self.said[0] is not conditioning:  # one tensor for all blocks of a call
            self.said = conditioning, adapter.vectors(conditioning)
        draws = adapter.draws(number, image.shape[1], image.device)
        stream, added = block(image.to(dtype), stream, self.said[1], draws)
        self.now[number] = Made(stream, added)
        return added

    def _latest(self, number: int, image: Tensor) -> Made | None:
        """Return what the nearest of the first `number` control blocks gave: in this call, or else when it last ran."""
        last = self.before.get(self.branch, {})
        for one in reversed(range(number)):
            found = self.now.get(one) or last.get(one)
            if found is not None and found.stream.shape == image.shape:
                return found
        return None

    def _sides(self) -> Sides:
        ids = self.given.get("img_ids")
        # Reading ids waits for the device, so once for each tensor.
        if self.seen is None or ids is None or self.seen[0] is not ids:
            self.seen = ids, self.trunk.sides(self.run.transformer, self.given)
        return self.seen[1]

    def _tokens(self, image: Tensor) -> Tensor:
        """Return the condition as tokens [B, N, D], the transformer's own way."""
        sides, latent = self._sides(), self.use.condition.to(image.device, self.run.transformer.dtype)
        if tuple(latent.shape[2:]) != sides:
            self.run.note(
                f"{self.use.name}: the condition {tuple(latent.shape[2:])} was stretched to the picture's {sides}"
            )
        tokens = self.trunk.tokens(self.run.transformer, fitted_to(latent, sides))
        if tokens.shape[1:] != image.shape[1:]:
            raise Refused(
                f"{self.use.name}: {tokens.shape[1]} tokens of the condition meet {image.shape[1]} of the picture: "
                "no residual where tokens were merged or others stand beside the picture"
            )
        return repeated(tokens.to(self.adapter.dtype), len(image), self.use.name)

    def _region(self, image: Tensor) -> Tensor:
        """Return how far each token of the picture hears it, [B, N, 1]."""
        sides, region = self._sides(), self.use.region
        assert region is not None
        if self.where is None or self.where[0] != sides or self.where[1].device != image.device:
            patch = self.trunk.patch(self.run.transformer)
            self.where = (
                sides,
                on_grid(region, (sides[0] // patch, sides[1] // patch), image.device)[..., None],
            )
        return repeated(self.where[1], len(image), self.use.name).to(self.adapter.dtype)
