"""What became of the adapters of a with-block, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Account:
    """What became of one use: calls of the transformer in which it acted, and what the adapter wants to tell."""

    calls: int = 0  # calls in which its strength was above 0
    acted: int = 0  # places (attention calls, blocks, layers) where it changed something
    least: float = math.inf
    most: float = 0.0
    told: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlReport:
    """What was asked for and what took effect: one dictionary a use, calls of the transformer, remarks."""

    uses: list[dict[str, Any]]
    calls: int
    bytes: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"uses": self.uses, "calls": self.calls, "bytes": self.bytes, "notes": self.notes}
