"""Which adapters stand in a network at a moment, peft's and ours: what is stored fits no other set of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from dit.seams import CONTROL_RUN


def adapters_of(network: nn.Module) -> tuple[Any, ...]:
    """Return what tells two sets of adapters apart: peft's active ones of every layer with their scales, and merged ones; and
    which of those that steer by a with-block act in the call that is running (their windows begin and end).
    """
    layers = tuple(
        (
            id(module),
            str(module.__dict__["_active_adapter"]),
            bool(module.__dict__.get("_disable_adapters")),
            tuple(module.__dict__.get("merged_adapters", ())),
            tuple(sorted(module.__dict__.get("scaling", {}).items())),
        )
        for module in network.modules()
        if "_active_adapter" in module.__dict__
    )
    steering = network.__dict__.get(CONTROL_RUN)
    return layers if steering is None else (*layers, steering.acting)
