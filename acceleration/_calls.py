"""One forward of a transformer: where it stands, the blocks it reaches, and what decides about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from dit import seams
from dit.seams import Block, Moment, Tensors

if TYPE_CHECKING:
    from acceleration.base import Run

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reached:
    """A block that a call has reached: its place in the call (from 0), what computes it, and what it is given."""

    place: int
    block: Block
    inner: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> Tensors:
        """Return the arguments that are tensors, by name."""
        return seams.tensor_arguments(self.block.module, self.args, self.kwargs)


class Control(Protocol):
    """What decides about the blocks of each call: it sees the call begin, every block, and the call end."""

    def started(self, call: Call) -> bool:
        """Decide about a call; False leaves all its blocks alone."""

    def visited(self, call: Call, reached: Reached) -> Any:
        """Answer for a block, by `call.compute(reached)` or otherwise."""

    def finished(self, call: Call, failed: bool) -> None:
        """Keep or drop what the call has recorded."""


@dataclass(slots=True)
class Call:
    """One forward of the transformer: when it is, and what became of each block (C computed, R reused, F forecast,
    S computed with sparse attention, M with merged tokens).

    `remarks` is what else the report's cell of this call says (signal, threshold, decision).
    """

    run: Run
    moment: Moment
    given: Mapping[str, Any]
    states: list[str] = field(default_factory=list)
    remarks: dict[str, Any] = field(default_factory=dict)
    active: bool | None = None  # whether the control decides about its blocks; None before the first of them
    _fingerprint: Any = None

    @property
    def fingerprint(self) -> Any:
        """What must stay equal for a stored tensor to fit, taken once: every attention of a call may ask for it."""
        if self._fingerprint is None:
            self._fingerprint = seams.fingerprint(self.given)
        return self._fingerprint

    def compute(self, reached: Reached) -> Any:
        """Compute a block after all."""
        self.states.append("C")
        return reached.inner(*reached.args, **reached.kwargs)

    def state(self, owner: object, make: Callable[[], T]) -> T:
        """Return the owner's state for this branch and evaluation; a new one if shapes, types or flags have changed."""
        return self.run._state(self, owner, make)
