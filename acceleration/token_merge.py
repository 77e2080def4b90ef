"""TokenMerge: let a few tokens of each window stand for the others in attention and feed-forward, and share what they become.

Paper: ToMA: Token Merge with Attention for Diffusion Models; 2025; arXiv:2509.10918. Token Merging for Fast Stable
    Diffusion; Bolya, Hoffman; 2023; arXiv:2303.17604.
Differs: the prompt's tokens are never merged; queries and keys are those of the tokens that stay, so each keeps its own
    rotary position, and only values are averaged (feed-forwards of kept tokens came out nearer to the exact picture
    than those of averages); a kept key weighs as much as all it stands for; maps to queries, keys
    and values run on all tokens, so what is saved is attention itself and the feed-forward.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

from torch import nn

from acceleration._attending import refuses
from acceleration._merged import Merging, Row, position_wise
from acceleration.base import Accelerator, Run
from dit.spec import knob, spec


@spec("token-merge", paper="ToMA, arXiv:2509.10918; ToMe-SD, arXiv:2303.17604")
class TokenMerge(Accelerator):
    """Compute attention and feed-forward for a part of the picture's tokens only."""

    seam: ClassVar[str] = "which keys a query hears"
    depth: ClassVar[int] = 1  # what caches keep of a module is what it returns for all tokens

    ratio: float = knob(
        default=0.5, label="Part of the tokens that is merged into others", low=0.0, high=0.95, step=0.05
    )
    modules: str = knob(
        default="both", label="Where tokens are merged", choices=("both", "attention", "feed-forward")
    )
    queries: bool = knob(default=True, label="In attention merge queries too, not only keys and values")
    proportional: bool = knob(default=True, label="Let a kept key weigh as much as all it stands for")
    window: int = knob(
        default=64, label="Tokens among which is merged, a square", choices=(4, 16, 64, 256), unit="tokens"
    )
    reuse: int = knob(default=5, label="How long a choice of tokens is kept", low=1, high=999, unit="steps")
    layers: int = knob(default=0, label="Blocks in a row with one choice (0: all)", low=0, high=999)
    warmup: int = knob(default=1, label="Exact steps at the start", low=0, high=1000, unit="steps")
    final_full: int = knob(default=0, label="Exact steps at the end", low=0, high=1000, unit="steps")
    min_tokens: int = knob(default=256, label="Shortest sequence that is merged", low=4, unit="tokens")

    @property
    def neutral(self) -> bool:
        """Whether no token is merged, whatever the size."""
        return self.kept(self.window) == self.window

    def kept(self, tokens: int) -> int:
        """Return how many of the tokens of a window stay."""
        return max(1, tokens - round(self.ratio * tokens))

    def merges(self, step: int, steps: int | None) -> bool:
        """Whether tokens are merged in a step (from 0) of a run of `steps`, if known."""
        return step >= self.warmup and (steps is None or step < steps - self.final_full)

    def refuses(self, transformer: nn.Module) -> str | None:
        reason = refuses(transformer)
        if reason is None and self.modules == "feed-forward" and not position_wise(transformer):
            return f"no feed-forward module of {type(transformer).__name__} treats every token alone; use modules=attention"
        return reason

    def attached(self, transformer: nn.Module, run: Run) -> AbstractContextManager[None]:
        return nullcontext() if self.neutral else Merging(self, run).attached(transformer)

    def effect(self, run: Run) -> str:
        rows = [row for row in _rows(run) if row.merged]
        if not rows:
            return f"{self.name}: no token was merged"
        parts = []
        for wanted, name in ((False, "attention"), (True, "feed-forward")):
            calls = [row for row in _rows(run) if (row.kind == "feed-forward") is wanted]
            merged = sum(row.merged for row in calls)
            if merged:
                parts.append(f"{merged} of {sum(row.calls for row in calls)} {name} calls")
        largest = max(rows, key=lambda row: row.tokens)
        return f"{self.name}: {' and '.join(parts)} on merged tokens, {largest.kept} of {largest.tokens} kept"

    def untouched(self, run: Run) -> str | None:
        rows = _rows(run)
        if self.neutral or any(row.merged or row.reason is None for row in rows):
            return None
        if all(row.kind == "feed-forward" for row in rows):
            return "none of its attention calls was seen; it does not use scaled_dot_product_attention"
        wanted = [row for row in rows if (row.kind == "feed-forward") is (self.modules == "feed-forward")]
        main = [row for row in wanted if row.kind != "cross" and row.tokens >= 1]
        reasons = dict.fromkeys(row.reason or "" for row in sorted(main or rows, key=lambda row: -row.tokens))
        return "; ".join(list(reasons)[:3])

    def hopeless(self, run: Run) -> str | None:
        return self.untouched(run)


def _rows(run: Run) -> list[Row]:
    return [row for row in run.attention.values() if isinstance(row, Row)]
