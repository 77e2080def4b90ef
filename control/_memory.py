"""What adapters computed of a condition and may use again: found by what it was made from, never by time or order.

An entry is found only if its key is equal and every tensor it was made from is still the same: the very tensor,
unwritten since, or one of equal content. So it can serve other prompts, seeds and runs, and cannot go stale.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dit.seams import version

T = TypeVar("T")
_PROBED = 3  # values of each weight that a probe looks at


@dataclass(slots=True)
class _Witness:
    """One tensor that an entry was made from: itself with its version, and a copy."""

    tensor: Tensor
    version: int | None
    copy: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> _Witness:
        return cls(tensor, version(tensor), tensor.detach().clone())

    def agrees(self, tensor: Tensor) -> bool:
        """Whether `tensor` holds what it held; only where that is not known by its version are values compared."""
        if tensor is self.tensor and self.version is not None and version(tensor) == self.version:
            return True
        copy = self.copy
        alike = (tensor.shape, tensor.dtype, tensor.device) == (copy.shape, copy.dtype, copy.device)
        return alike and bool(torch.equal(tensor.detach(), copy))


@dataclass(slots=True)
class _Entry:
    key: Hashable
    witnesses: tuple[_Witness, ...]
    value: Any
    bytes: int
    used: bool = True  # since the last turn


class Memory:
    """A small store of results, the least lately used of which goes first.

    Args:
        entries: most results kept. storage: "exact", or "fp8" (half of bf16, not exact). place: "device", or "cpu" (pinned
            where there is a GPU, brought back block by block). Both are for those who keep keys and values.
    """

    def __init__(self, entries: int = 32, *, storage: str = "exact", place: str = "device") -> None:
        for name, value, allowed in (
            ("storage", storage, ("exact", "fp8")),
            ("place", place, ("device", "cpu")),
        ):
            if value not in allowed:
                raise ValueError(f"Memory: {name} must be one of {', '.join(allowed)}, got {value!r}")
        if isinstance(entries, bool) or not isinstance(entries, int) or entries < 0:
            raise ValueError(f"Memory: entries must be a whole number of at least 0, got {entries!r}")
        self.entries, self.storage, self.place = entries, storage, place
        self.hits = self.misses = 0
        self._kept: list[_Entry] = []

    @property
    def bytes(self) -> int:
        """Bytes of all results kept now."""
        return sum(one.bytes for one in self._kept)

    def recall(
        self, key: Hashable, tensors: Sequence[Tensor], make: Callable[[], T], weigh: Callable[[T], int]
    ) -> T:
        """Return the result for this key and these tensors, made now where there is none.

        Args:
            key: what else decides the result; equal keys mean equal results.
            tensors: what it is made from. make: computes it. weigh: counts its bytes.
        """
        for place, one in enumerate(self._kept):
            if (
                one.key == key
                and len(one.witnesses) == len(tensors)
                and all(w.agrees(x) for w, x in zip(one.witnesses, tensors, strict=True))
            ):
                self._kept.append(self._kept.pop(place))
                one.used = True
                self.hits += 1
                found: T = one.value
                return found
        self.misses += 1
        made = make()
        if self.entries:
            self._kept.append(_Entry(key, tuple(_Witness.of(x) for x in tensors), made, weigh(made)))
            del self._kept[: -self.entries]
        return made

    def turn(self) -> None:
        """Forget what nobody has asked for since the last turn: keys and values of earlier prompts take much room."""
        self._kept = [one for one in self._kept if one.used]
        for one in self._kept:
            one.used = False

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


def mark(*modules: nn.Module) -> Hashable:
    """Return what changes when weights of the modules are written, exchanged, or adapted by peft."""
    found: list[Hashable] = []
    for module in modules:
        for part in module.modules():
            found += [
                (weight.data_ptr(), version(weight), weight.dtype)
                for weight in (*part._parameters.values(), *part._buffers.values())
                if weight is not None
            ]
            about = part.__dict__
            if "scaling" in about:  # a layer of peft
                found.append((
                    tuple(about["scaling"].items()), str(about.get("_active_adapter")),
                    about.get("_disable_adapters"), str(about.get("merged_adapters")),
                ))  # fmt: skip
    return tuple(found)


@torch.no_grad()
def probe(*modules: nn.Module) -> Hashable:
    """Return some values of every weight: merging an adapter writes past the version counter. Once a run is enough."""
    some = [
        weight.detach().flatten()[:: max(1, weight.numel() // _PROBED)][:_PROBED].float().sum()
        for module in modules
        for weight in module.parameters()
        if not weight.is_meta
    ]
    return tuple(torch.stack([one.to(some[0].device) for one in some]).tolist()) if some else ()
