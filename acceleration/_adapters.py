"""Which adapters stand in a network at a moment, peft's and ours: what is stored fits no other set of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from dit.seams import CONTROL_RUN


class Adapters:
    """The adapters of a network, asked for in every step: its modules are walked again only after one was put somewhere."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._layers: list[dict[str, Any]] | None = None  # what the modules that hold adapters of peft know

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Take note of modules that are put into others, as peft does with its layers."""
        hook = register_module_module_registration_hook(self._changed)
        try:
            yield
        finally:
            hook.remove()

    def now(self) -> tuple[Any, ...]:
        """Return what tells two sets of adapters apart: peft's active ones of every layer with their scales, and merged ones;
        and which of those that steer by a with-block act in the call that is running (their windows begin and end).
        """
        if self._layers is None:
            self._layers = _adapted(self._network)
        layers = tuple(
            (
                id(known),
                str(known["_active_adapter"]),
                bool(known.get("_disable_adapters")),
                tuple(known.get("merged_adapters", ())),
                tuple(sorted(known.get("scaling", {}).items())),
            )
            for known in self._layers
        )
        steering = self._network.__dict__.get(CONTROL_RUN)
        return layers if steering is None else (*layers, steering.acting)

    def _changed(self, *_: Any) -> None:
        self._layers = None


def _adapted(network: nn.Module) -> list[dict[str, Any]]:
    return [one.__dict__ for one in network.modules() if "_active_adapter" in one.__dict__]
