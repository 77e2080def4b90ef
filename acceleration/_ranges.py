"""Record what a range of blocks adds to its streams, and put that in the place of the blocks later.

What the model itself adds between two blocks (ControlNet residuals) is no part of the recording: the model adds it
again when the blocks are left out, so it must count once. A range is cut wherever the streams are joined or reshaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from acceleration.base import Call, Reached
from dit.seams import Block, Output, Tensors, match, version


@dataclass(slots=True)
class Part:
    """Blocks that follow one another without a join: their places in the forward, and what they add to each stream."""

    first: int
    blocks: list[Block] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    added: Tensors = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of what is stored."""
        return sum(x.numel() * x.element_size() for x in self.added.values())


@dataclass(slots=True)
class Held:
    """A stream between two blocks: the tensor, how often it had been written to, and a copy where that is needed."""

    tensor: Tensor
    version: int | None
    copy: Tensor | None

    @classmethod
    def take(cls, tensor: Tensor, careful: bool) -> Held:
        return cls(tensor, version(tensor), tensor.clone() if careful else None)

    @property
    def value(self) -> Tensor | None:
        """The tensor as it was when taken; None if it was written to since and no copy was made."""
        if self.copy is not None:
            return self.copy
        return None if self.touched else self.tensor

    @property
    def touched(self) -> bool:
        """Whether the tensor was, or may have been, written to since it was taken."""
        return self.version is None or self.tensor._version != self.version


class Recording:
    """Watch the blocks at the places of `span` compute, and keep what each part of them adds.

    `careful` copies the streams at every block; needed for models that write into them in place.
    """

    def __init__(self, span: range, careful: bool = False) -> None:
        self.span, self.careful = span, careful
        self.parts: list[Part] = []
        self.reasons: list[str] = []
        self.overwritten = False
        self.skipped = False
        self._unfit: set[type] = set()
        self._open: Part | None = None
        self._first: dict[str, Held] = {}
        self._last_in: dict[str, Held] = {}
        self._last_out: dict[str, Held] = {}
        self._between: Tensors = {}

    def visited(self, call: Call, reached: Reached) -> Any:
        """Compute a block and account for it."""
        inputs, place, block = reached.tensors(), reached.place, reached.block
        if place not in self.span or type(block.module) in self._unfit:
            self._close()
            self.skipped = self.skipped or ("skip" in inputs and place >= self.span.stop and bool(self.parts))
            return call.compute(reached)
        self.careful = self.careful or any(version(x) is None for x in inputs.values())
        if self._open is not None and not self._continues(inputs):
            self._close()
        before = {name: Held.take(x, self.careful) for name, x in inputs.items()}
        output = call.compute(reached)
        form = match(block.module, inputs, output)
        if isinstance(form, str):
            self.reasons.append(form)
            self._close()
            return output
        if self._open is not None and not _goes_on(self._open.outputs[-1], form):
            self._close()
        if self._open is None:
            self._open = Part(place)
            self._first, self._between = before, {}
        self._extend(self._open, block, form, before, form.split(output))
        return output

    def finish(self) -> list[Part]:
        """Close the recording and return its parts."""
        self._close()
        if self.skipped:
            self.reasons.append(
                "later blocks take what these blocks return (long skips): reuse the rear or the whole stack"
            )
            return []
        return [
            part for part in self.parts if not any(type(one.module) in self._unfit for one in part.blocks)
        ]

    def _extend(
        self, part: Part, block: Block, form: Output, before: dict[str, Held], streams: Tensors
    ) -> None:
        part.blocks.append(block)
        part.outputs.append(form)
        self._last_in = {name: before[name] for name in streams}
        self._last_out = {name: Held.take(x, self.careful) for name, x in streams.items()}

    def _continues(self, inputs: Tensors) -> bool:
        """Account for what the model did to the streams since the last block; False where a join cuts the range."""
        changes: Tensors = {}
        for name, held in self._last_out.items():
            x = inputs.get(name)
            if x is None or x.shape != held.tensor.shape or x.device != held.tensor.device:
                return False
            if x is self._last_in[name].tensor and x is not held.tensor:
                self._leave_out_last(f"returns as {name} does not reach the next block")
                return False
            before = held.value
            if before is None:
                self.overwritten = True
                self._drop()
                return False
            if x is not held.tensor or held.touched:
                entered = self._last_in[name].value
                if entered is not None and _parallel(_minus(x, entered), before):
                    self._leave_out_last(f"returns is added to {name} by the model itself")
                    return False
                changes[name] = _minus(x, before)
        for name, change in changes.items():
            self._between[name] = change if name not in self._between else self._between[name] + change
        return True

    def _leave_out_last(self, why: str) -> None:
        """End the part before its last block, which stands beside the stream (a face adapter) and must be computed."""
        part = self._open
        if part is None:
            return
        kind = type(part.blocks.pop().module)
        part.outputs.pop()
        self._unfit.add(kind)
        self.reasons.append(f"what {kind.__name__} {why}, so it is always computed")
        if part.blocks:
            self._last_out = self._last_in  # what went into that block is what the one before it made
        else:
            self._drop()

    def _close(self) -> None:
        part = self._open
        if part is not None and self._weigh(part):
            self.parts.append(part)
        self._drop()

    def _weigh(self, part: Part) -> bool:
        """Work out what the part adds; False if a tensor that is needed was overwritten."""
        for name, held in self._last_out.items():
            first, last = self._first[name].value, held.value
            if first is None or last is None:
                self.overwritten = True
                return False
            added = _minus(last, first)
            if name in self._between:
                added = added - self._between[name]
            part.added[name] = added.to(held.tensor.dtype)
        return True

    def _drop(self) -> None:
        self._open = None
        self._first, self._last_in, self._last_out, self._between = {}, {}, {}, {}


class Replay:
    """Leave out the blocks of recorded parts: the first adds what all of them added, the others hand their streams on."""

    def __init__(self, parts: Sequence[Part], letter: str = "R") -> None:
        self.letter = letter
        self.strayed = False
        self.left_out = 0
        self._parts = {
            place: part for part in parts for place in range(part.first, part.first + len(part.blocks))
        }

    def visited(self, call: Call, reached: Reached) -> Any:
        """Answer for a block: from the recording, or by computing it where the recording does not fit."""
        place, block = reached.place, reached.block
        part = self._parts.get(place)
        if part is None:
            return call.compute(reached)
        inputs = reached.tensors()
        offset = place - part.first
        if offset == 0 and not _fits(part, block, inputs):
            self._parts = {at: other for at, other in self._parts.items() if other is not part}
            return call.compute(reached)
        form = part.outputs[offset]
        if block is not part.blocks[offset] or any(
            name not in inputs for name in form.names if name is not None
        ):
            self.strayed = True
            return call.compute(reached)
        if offset == 0:
            for name, added in part.added.items():
                inputs[name] = (inputs[name] + added).to(added.dtype)
        call.states.append(self.letter)
        self.left_out += 1
        return form.join(inputs)


def _goes_on(form: Output, following: Output) -> bool:
    """Whether the next block hands on the same streams in the same places, or ends some of them."""
    return len(form.names) == len(following.names) and all(
        after in (None, name) for name, after in zip(form.names, following.names, strict=True)
    )


def _minus(x: Tensor, y: Tensor) -> Tensor:
    """Subtract, in float32 at least: two roundings to half precision would show as an error where there is none."""
    x, y = (one.detach().float() if one.dtype.itemsize < 4 else one.detach() for one in (x, y))
    return x - y


def _parallel(change: Tensor, output: Tensor) -> bool:
    """Whether a stream has changed by a multiple of what a block returned: then that was a change, and no stream."""
    size = change.norm() * output.float().norm()
    return bool(size > 0) and bool((change * output).sum().abs() > (1 - 1e-5) * size)


def _fits(part: Part, block: Block, inputs: Tensors) -> bool:
    return block is part.blocks[0] and all(
        name in inputs and inputs[name].shape == added.shape and inputs[name].device == added.device
        for name, added in part.added.items()
    )
