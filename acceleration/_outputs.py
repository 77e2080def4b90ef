"""Whether what a network returned can become anything: its last outputs are looked at once a run is over.

What is not a number in one step is not a number in all that follow, so the last output of each branch tells of the whole run,
and a device is waited for once a run, not once a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit.seams import Moment


class Outputs:
    """The last output of each guidance branch, until it is looked at."""

    def __init__(self) -> None:
        self._now: Moment | None = None
        self._last: dict[str, tuple[Moment, list[Tensor]]] = {}
        self._failures: list[str] = []

    def begin(self, moment: Moment) -> None:
        """Take the next output as that of a moment; those of an earlier run are looked at now."""
        if self._now is not None and self._now.run != moment.run:
            self.look()
        self._now = moment

    def returned(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """Hold what a forward returned (as a hook of torch) in the place of the branch's output before."""
        if self._now is not None:
            self._last[self._now.branch] = self._now, _floating(output)

    def look(self) -> list[str]:
        """Look at what is held and let it go; return in words what was wrong with any output so far."""
        for moment, parts in self._last.values():
            if any(not part.is_meta and not bool(torch.isfinite(part).all()) for part in parts):
                words = f"what the network returned in step {moment.step + 1} of {moment.branch} is not finite (NaN or infinite)"
                self._failures += [words] if words not in self._failures else []
        self._last.clear()
        return list(self._failures)


def _floating(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach()] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [one for part in parts for one in _floating(part)]
