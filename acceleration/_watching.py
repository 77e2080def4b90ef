"""What a run does by itself: count blocks that no method decides about, weigh what methods store, and stay one of its kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from dit.seams import patched

if TYPE_CHECKING:
    from acceleration.base import Call, Reached


def bytes_of(state: Any) -> int:
    """Return the size of a method's state: what it says itself, or of what it holds by name."""
    if isinstance(state, Mapping):
        return sum(bytes_of(one) for one in state.values())
    return int(getattr(state, "bytes", 0))


class Watching:
    """Decide nothing: every block is computed and counted."""

    def started(self, call: Call) -> bool:
        """Leave all blocks alone."""
        return False

    def visited(self, call: Call, reached: Reached) -> Any:
        """Compute a block."""
        return call.compute(reached)

    def finished(self, call: Call, failed: bool) -> None:
        """Keep nothing."""


@contextmanager
def uncopied(transformer: nn.Module) -> Iterator[None]:
    """Refuse to copy or pickle the transformer inside: a copy would go on calling the original's blocks and its run."""

    def refused(_protocol: int) -> NoReturn:
        raise RuntimeError(
            f"{type(transformer).__name__} is accelerated and cannot be copied or pickled now: do that outside of the with-block"
        )

    with patched(transformer, "__reduce_ex__", refused):
        yield
