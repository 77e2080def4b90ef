"""Who computes what: the one record that every router of the project fills in.

Conditional compute has two forms that must agree: a masked one for training (everything is computed, then multiplied) and a
compact one (what is not chosen is not computed), which is the one that is timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Scope = Literal["time", "token", "sample", "step"]


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """One decision of one router.

    Attributes:
        scope: what the decision reads. "time": the noise level alone, so it can be made ahead of a run; "token": each token;
            "sample": each picture; "step": the index of the denoising step.
        gates: soft weights, differentiable: [B, E], or [B, N, E] for each token.
        active: hard choice of the same shape, 1 where something is computed.
        heads: [B, K], 1 where an attention head is computed; None for all.
        groups: [B, G], 1 where a group of hidden channels of the perceptron is computed; None for all.
        compact: leave out what is not active; otherwise multiply it by its gate.
        share: share of the block's multiply-accumulates that this decision leaves, 0-1, differentiable; None where unknown.
    """

    scope: Scope
    gates: Tensor | None = None
    active: Tensor | None = None
    heads: Tensor | None = None
    groups: Tensor | None = None
    compact: bool = False
    share: Tensor | None = None
