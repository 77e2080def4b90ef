"""What a released code base must tell to be read: its arguments, its weights, how its recorded cases are run.

One file of this package a code base. A class derived from `System` and decorated with `@system("official name", ...)` is
found by `find`, by `python -m dit.convert` and by `python -m benchmarks.fidelity`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]

_SYSTEMS: dict[str, type[System]] = {}
_HOMES = ["dit.convert"]  # packages whose modules are converters
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


class LayoutError(ValueError):
    """Official arguments or weights that do not fit the system they are said to belong to."""


class UnknownSystemError(ValueError):
    """No file of this package knows the system."""


@dataclass(frozen=True, slots=True)
class Case:
    """One recorded call of the official code: its inputs, outputs and intermediate values, by name."""

    name: str
    inputs: Tensors = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)
    mids: Tensors = field(default_factory=dict)


class System(ABC):
    """A released code base in our terms. `name` is the official name under which it was asked for."""

    tolerance = 1e-4

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def build(self, args: Mapping[str, Any], settings: Mapping[str, Any]) -> nn.Module:
        """Return our untrained network for the official constructor's arguments and a fixture's further settings.

        Raises: LayoutError for arguments the official constructor does not have.
        """

    @abstractmethod
    def to_ours(self, state: Mapping[str, Tensor], model: nn.Module) -> Tensors:
        """Return the official weights under our names and in our shapes. Raises: LayoutError."""

    @abstractmethod
    def to_official(self, model: nn.Module) -> Tensors:
        """Return our weights under the official names and in the official shapes: the inverse of `to_ours`."""

    @abstractmethod
    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
        """Return what the official code would return for a recorded case, by the recorded names. Raises: LayoutError."""

    def complete(self, cases: Sequence[Case]) -> list[Case]:
        """Return the cases of a recording with what they leave to each other or to their names filled in."""
        return list(cases)

    def place(self, path: str) -> str | None:
        """Return our path of the module at an official path, or None where we have no such module."""
        return None

    def run_observed(self, model: nn.Module, case: Case) -> tuple[Tensors, Tensors]:
        """Run a case and return outputs and intermediate values; those without a counterpart are left out."""
        places = {name: self.place(name) for name in case.mids}
        with observed(model, {name: place for name, place in places.items() if place is not None}) as mids:
            outputs = self.run(model, case.inputs)
        return outputs, mids


S = TypeVar("S", bound=System)


def system(*names: str) -> Callable[[type[S]], type[S]]:
    """Register a `System` under its official names."""

    def declare(cls: type[S]) -> type[S]:
        for name in names:
            known = _SYSTEMS.setdefault(name, cls)
            if known.__module__ != cls.__module__:
                raise ValueError(f"two converters for {name!r}: {known.__module__} and {cls.__module__}")
        return cls

    return declare


def add_home(package: str) -> None:
    """Let `find` look for converters in the modules of another package too."""
    if package not in _HOMES:
        _HOMES.append(package)


def systems() -> tuple[str, ...]:
    """Return the official names that can be read, sorted."""
    for home in _HOMES:
        for module in pkgutil.iter_modules(importlib.import_module(home).__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{home}.{module.name}")
    return tuple(sorted(_SYSTEMS))


def find(name: str) -> System:
    """Return the system of an official name. Raises: UnknownSystemError naming the nearest one."""
    names = systems()
    if name not in names:
        close = [one for one in names if one.lower() == name.lower()] or difflib.get_close_matches(
            name, names, n=1, cutoff=0.8
        )
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UnknownSystemError(f"no converter for {name} yet{hint}; there are: {', '.join(names)}")
    return _SYSTEMS[name](name)


def official_args(owner: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the official constructor's arguments, defaults filled in. Raises: LayoutError for one it does not have."""
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise LayoutError(
            f"{owner}: the official constructor has no argument {unknown[0]!r}; it has {', '.join(defaults)}"
        )
    return dict(defaults) | dict(given)


def about(model: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model's config, and what its converter kept of the official settings that our config has no place for."""
    return model.config, getattr(model, "official_settings", {})


def renamed(owner: str, key: str, outside: Mapping[str, str], inside: Mapping[str, str]) -> str:
    """Replace the longest known beginning of a weight's name: of `inside` in a block of `transformer_blocks`, else of `outside`.

    Raises: LayoutError where there is none.
    """
    block = _BLOCK.fullmatch(key)
    start, name, places = "", key, outside
    if block is not None:
        start, name, places = f"transformer_blocks.{block[1]}.", block[2], inside
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        known = places.get(".".join(parts[:count]))
        if known is not None:
            return start + ".".join([known, *parts[count:]])
    raise LayoutError(f"{owner}: unknown weight {key!r}")


def laid_flat(convolution: Tensor) -> Tensor:
    """Return the weights of our linear map of patches, [D, p p C], for a convolution [D, C, p, p] that cuts them."""
    return convolution.permute(0, 2, 3, 1).flatten(1).contiguous()


def folded(linear: Tensor, patch: int, channels: int) -> Tensor:
    """Return the convolution [D, C, p, p] of a linear map of patches [D, p p C]: the inverse of `laid_flat`."""
    return linear.unflatten(1, (patch, patch, channels)).permute(0, 3, 1, 2).contiguous()


def load(model: nn.Module, state: Mapping[str, Tensor], owner: str) -> None:
    """Put converted weights in the place of a model's own, all of them and no others.

    Raises: LayoutError naming what is missing, left over or of another shape.
    """
    wanted = model.state_dict()
    wrong = [f"missing {name}" for name in wanted if name not in state]
    wrong += [f"left over {name}" for name in state if name not in wanted]
    wrong += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if wrong:
        raise LayoutError(f"{owner}: weights do not fit ({len(wrong)}): " + "; ".join(wrong[:5]))
    model.load_state_dict(state, strict=True, assign=True)


@contextmanager
def observed(model: nn.Module, places: Mapping[str, str]) -> Iterator[Tensors]:
    """Collect what the modules at `places` (name -> path) return inside."""
    seen: Tensors = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen[name] = output.detach()

        return hook

    paths = dict(model.named_modules())
    handles = [
        paths[path].register_forward_hook(keep(name)) for name, path in places.items() if path in paths
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def check_table(owner: str, stored: Tensor, ours: Tensor, name: str) -> None:
    """Compare a table that the release stores and we compute. Raises: LayoutError unless they are equal to rounding."""
    if stored.shape != ours.shape:
        raise LayoutError(f"{owner}: {name} is {tuple(stored.shape)}, expected {tuple(ours.shape)}")
    if stored.device.type == "meta" or ours.device.type == "meta":
        return
    allowed = max(1e-5, 2 * torch.finfo(stored.dtype).eps)
    error = float((stored.double() - ours.to(stored.device).double()).abs().max())
    if not error <= allowed:
        raise LayoutError(
            f"{owner}: the stored {name} is not the one of the released code (largest difference {error:.3g}); "
            "a model trained with other positions cannot be read"
        )
