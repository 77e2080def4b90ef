"""Which adapters stand in a network at a moment, peft's and ours: what is stored fits no other set of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from dit.seams import CONTROL_RUN


def _adapted(network: nn.Module) -> list[dict[str, Any]]:
    """What the modules that hold adapters of peft know: asked for in every step, so a faster walk than `modules()`."""
    waiting, found = [network], []
    while waiting:
        known = waiting.pop().__dict__
        if "_active_adapter" in known:
            found.append(known)
        waiting += [child for child in known["_modules"].values() if child is not None]
    return found


def adapters_of(network: nn.Module) -> tuple[Any, ...]:
    """Return what tells two sets of adapters apart: peft's active ones of every layer with their scales, and merged ones; and
    which of those that steer by a with-block act in the call that is running (their windows begin and end).
    """
    layers = tuple(
        (
            id(known),
            str(known["_active_adapter"]),
            bool(known.get("_disable_adapters")),
            tuple(known.get("merged_adapters", ())),
            tuple(sorted(known.get("scaling", {}).items())),
        )
        for known in _adapted(network)
    )
    steering = network.__dict__.get(CONTROL_RUN)
    return layers if steering is None else (*layers, steering.acting)
