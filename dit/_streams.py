"""What goes into a transformer block and what comes out: tensor arguments by name, outputs matched to the streams they continue.

A *stream* is a tensor that a block takes in and hands on changed (image tokens, text tokens). Everything else a block
takes in is context. No table of block classes is needed: an output continues the input that the source calls by the
same name, or else the only input of its shape.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Output:
    """The form of what a block returns: one stream name (or None) for each place."""

    kind: type
    names: tuple[str | None, ...]

    def split(self, output: Any) -> Tensors:
        """Return the streams that `output` holds, by name."""
        return {name: part for name, part in zip(self.names, _parts(output), strict=True) if name is not None}

    def join(self, streams: Mapping[str, Tensor]) -> Any:
        """Return `streams` in the form in which the block itself would have returned them."""
        parts = [None if name is None else streams[name] for name in self.names]
        return parts[0] if self.kind is Tensor else self.kind(parts)


def arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of `module` by the names of its forward."""
    if not args:
        return dict(kwargs)
    return dict(zip(_parameters(_written(module)), args, strict=False)) | dict(kwargs)


def tensor_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensors:
    """Return those arguments of a call that are tensors, by name, in the order of the signature."""
    given = arguments(module, args, kwargs)
    order = _parameters(_written(module))
    names = [name for name in order if name in given] + [name for name in given if name not in order]
    return {name: given[name] for name in names if isinstance(given[name], Tensor)}


def match(module: nn.Module, inputs: Tensors, output: Any) -> Output | str:
    """Find out which input every part of a block's output continues.

    Returns:
        The form of the output, or in words why it is no set of streams.
    """
    kind, parts, who = _kind(output), _parts(output), type(_written_module(module)).__name__
    wrong = [type(part).__name__ for part in parts if part is not None and not isinstance(part, Tensor)]
    if wrong or not any(isinstance(part, Tensor) for part in parts):
        return f"{who} returns {', '.join(wrong) or 'no tensor'}, and only tensors can be reused"
    fits: list[list[str]] = []
    for part in parts:
        names = [] if part is None else [n for n, x in inputs.items() if _alike(x, part)]
        if part is not None and not names:
            return f"{who} returns a tensor of shape {tuple(part.shape)} that none of its inputs has"
        fits.append(names)
    for names_written in _returned(_written(module)):
        if len(names_written) == len(parts) and all(
            part is None or name in fit for part, name, fit in zip(parts, names_written, fits, strict=True)
        ):
            pairs = zip(parts, names_written, strict=True)
            return Output(kind, tuple(None if part is None else name for part, name in pairs))
    found = _eliminated(fits)
    if found is not None:
        return Output(kind, found)
    if len(parts) == 1:
        return Output(kind, (fits[0][0],))
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
    return f"{who} is ambiguous: {len(parts)} outputs fit several of its inputs ({shapes})"


def version(tensor: Tensor) -> int | None:
    """Return how often a tensor was written in place, or None where torch keeps no count (inference mode)."""
    return None if torch.is_inference(tensor) else tensor._version


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.device == y.device and x.is_floating_point() == y.is_floating_point()


def _kind(output: Any) -> type:
    return Tensor if isinstance(output, Tensor) else list if isinstance(output, list) else tuple


def _parts(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def _eliminated(fits: list[list[str]]) -> tuple[str | None, ...] | None:
    """Give every output its only possible input, one after the other; None if some stay open."""
    found: list[str | None] = [None] * len(fits)
    open_places = {place: set(names) for place, names in enumerate(fits) if names}
    while open_places:
        sure = next((place for place, names in open_places.items() if len(names) == 1), None)
        if sure is None:
            return None
        name = open_places.pop(sure).pop()
        found[sure] = name
        for names in open_places.values():
            names.discard(name)
    return tuple(found)


def _written_module(module: nn.Module) -> nn.Module:
    original = getattr(module, "_orig_mod", None)  # torch.compile(block) wraps it
    return original if isinstance(original, nn.Module) else module


def _written(module: nn.Module) -> Any:
    return type(_written_module(module))


@functools.lru_cache(maxsize=512)
def _parameters(cls: Any) -> tuple[str, ...]:
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(cls.forward).parameters.values()
    return tuple(one.name for one in parameters if one.kind in plain)[1:]  # without self


@functools.lru_cache(maxsize=512)
def _returned(cls: Any) -> tuple[tuple[str | None, ...], ...]:
    """Return what the `return` lines of a forward say, as names, where they say it plainly."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):
        return ()
    lines = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    found: list[tuple[str | None, ...]] = []
    for value in lines:
        parts = value.elts if isinstance(value, ast.Tuple | ast.List) else [value]
        names = tuple(one.id if isinstance(one, ast.Name) else None for one in parts)
        nothing = [isinstance(one, ast.Constant) and one.value is None for one in parts]
        plain = all(name is not None or none for name, none in zip(names, nothing, strict=True))
        if plain and len(set(filter(None, names))) == len([name for name in names if name]):
            found.append(names)
    # Two lines of one length that name different streams prove nothing about either.
    rivals = {len(a) for a in found for b in found if len(a) == len(b) and a != b}
    return tuple(dict.fromkeys(names for names in found if len(names) not in rivals))
