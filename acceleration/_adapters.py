"""Which adapters (LoRA and its kin, by peft) stand in a network at a moment: what is stored fits no other set of them."""

from __future__ import annotations

from typing import Any

from torch import nn


def adapters_of(network: nn.Module) -> tuple[Any, ...]:
    """Return what tells two sets of adapters apart: the active ones of every layer, their scales, and merged ones."""
    return tuple(
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
