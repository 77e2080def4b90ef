"""How well pictures keep to a condition: edges, outlines, subjects, and the judge's words on style and concept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from training.judge import Court
from training.scenes import made_of

Flags = NDArray[np.bool_]
PIXELS = 2.0  # how far an edge may lie from the one it should be


def edge_f1(made: Flags, wanted: Flags, within: float = PIXELS) -> float:
    """Return F1 of edges [H, W]: those made that lie within so many px of a wanted one, and the other way round.

    1 where both are empty, 0 where one is.
    """
    if not made.any() or not wanted.any():
        return float(made.any() == wanted.any())
    precision = float((distance_transform_edt(~wanted)[made] <= within).mean())
    recall = float((distance_transform_edt(~made)[wanted] <= within).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def overlap(made: Flags, wanted: Flags) -> float:
    """Return intersection over union of masks [H, W]; 1 where both are empty."""
    union = int((made | wanted).sum())
    return float((made & wanted).sum()) / union if union else 1.0


SCORES = {"edges": edge_f1, "masks": overlap}


def score(kind: str, made: Tensor, conditions: Tensor) -> float:
    """Return how well pictures uint8 [n, 3, H, W] keep to conditions of that kind [n, 3, H, W], in the mean."""
    found, wanted = ((one[:, 0] > 127).numpy() for one in (made_of(made, kind), conditions))
    return float(np.mean([SCORES[kind](a, b) for a, b in zip(found, wanted, strict=True)]))


def preferred(court: Court, made: Tensor, given: Tensor, others: Tensor) -> float:
    """Return the share of pictures that the judge's features take for the given subject rather than for the other one."""
    features = [court.features(one) for one in (made, given, others)]
    a, b, c = (one / one.norm(dim=1, keepdim=True).clamp_min(1e-9) for one in features)
    return float(((a * b).sum(dim=1) > (a * c).sum(dim=1)).float().mean())


def rising(values: Sequence[float], slack: float = 0.005) -> bool:
    """Whether no value falls by more than `slack` below one before it."""
    highest = -1.0
    for one in values:
        if one < highest - slack:
            return False
        highest = max(highest, one)
    return True
