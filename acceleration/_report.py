"""The report of an accelerated run: what was asked for, what took effect, and what became of every block."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What was asked for and what took effect; counts are calls of blocks.

    `cells` holds one entry a call: run, branch, step, evaluation, one letter a block (C, R, F, S, M), and where a gate decides
    its signal (None where there is none yet), threshold and decision in words.
    `bytes` is the most that all methods together stored for reuse at one time, `predicted_bytes` what the first full
    calls let expect of it, `predicted_speedup` what the schedules promise of the denoising loop (an estimate). `sparse` of
    the `computed` were computed with sparse attention and `merged` with merged tokens; `attention` says for each layer how
    dense it was, what recall was measured, and how long it took, or how many of its tokens were kept. `failures` say in words
    what was wrong with the network's outputs: such a run was no success, whatever it saved.
    """

    requested: list[dict[str, Any]]
    effective: list[str]
    steps: int
    calls: int
    blocks: int
    computed: int
    reused: int
    forecast: int
    bytes: int
    notes: list[str]
    cells: list[dict[str, Any]]
    sparse: int = 0
    merged: int = 0
    predicted_bytes: int = 0
    predicted_speedup: float | None = None
    attention: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def fraction(self) -> float:
        """The fraction of block calls that were computed."""
        return self.computed / max(1, self.computed + self.reused + self.forecast)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self) | {"fraction": self.fraction}

    def summary(self) -> str:
        """Return the report in one line."""
        total = self.computed + self.reused + self.forecast
        what = "; ".join(self.effective) or "exact"
        failed = "".join(f"failed: {words}; " for words in self.failures)
        return f"{failed}{what} - {self.computed} of {total} block calls computed ({self.fraction:.0%}) in {self.calls} calls"
