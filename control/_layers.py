"""Layers of a transformer that adapters change: found by their paths, heard through forward hooks, let go of again.

An adapter gives one function for each layer, of the layer's input, its output and the strength of the call. The weights
of the transformer are never written, so what it saves inside a with-block is what it saves outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from control.base import ControlRun, Refused, Use
from dit.seams import blocks_of

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
PERCEPTRON = ("ff", "proj_mlp", "proj_out")

Change = Callable[[Tensor, Tensor, float], Tensor]


def linear_layers(transformer: nn.Module) -> dict[str, Any]:
    """Return every linear layer by its path; one that peft has wrapped counts as one, whatever stands inside."""
    found: dict[str, Any] = {}
    inside = "."  # no path begins so
    for path, module in transformer.named_modules():
        if path.startswith(inside):
            continue
        if all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features")):
            found[path] = module
            inside = f"{path}."
    return found


def targeted(transformer: nn.Module, targets: Iterable[str], owner: str) -> dict[str, Any]:
    """Return the linear layers in blocks whose path holds one of the names. Raises: Refused if there is none."""
    names = tuple(targets)
    stacks = tuple(f"{block.path}." for block in blocks_of(transformer))
    layers = {path: one for path, one in linear_layers(transformer).items() if path.startswith(stacks)}
    found = {path: one for path, one in layers.items() if any(f".{name}." in f".{path}." for name in names)}
    if not found:
        ends = sorted({path.rsplit(".", 1)[-1] for path in layers})
        raise Refused(
            f"{owner}: {type(transformer).__name__} has no layers called {', '.join(names)}; it has {', '.join(ends) or 'none'}"
        )
    return found


def check_targets(owner: str, targets: tuple[Any, ...]) -> None:
    """Raises: ValueError if targets are no names of layers."""
    if not targets or not all(isinstance(one, str) and one.strip(".") for one in targets):
        raise ValueError(f"{owner}: targets must be names of layers (such as to_q), got {targets!r}")


def made_like(transformer: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return dtype and device for an adapter's weights; layers kept in fp8 are computed in bf16."""
    weight = next(transformer.parameters())
    return weight.dtype if weight.dtype.itemsize > 1 else torch.bfloat16, weight.device


def layers_refuse(transformer: nn.Module) -> str | None:
    """Return in words why no layer of a transformer can be changed, or None."""
    compiled = hasattr(transformer, "_orig_mod") or transformer._compiled_call_impl is not None
    if compiled or any(block.module._compiled_call_impl is not None for block in blocks_of(transformer)):
        return (
            "it is compiled, and a compiled graph does not see what is hung on its layers: compile afterwards"
        )
    return None if linear_layers(transformer) else f"{type(transformer).__name__} has no linear layers"


def use_refused(transformer: nn.Module, use: Use, paths: Iterable[str]) -> str | None:
    """Return in words why a use cannot change the layers at `paths`, or None."""
    if use.region is not None:
        return "it changes whole layers and cannot be held to a region"
    checkpointed = bool(getattr(transformer, "gradient_checkpointing", False))
    if use.timed and checkpointed and use.adapter.trained_now:
        return "blocks that are computed again in the backward pass need one strength for all steps"
    modules, layers = dict(transformer.named_modules()), linear_layers(transformer)
    for path in paths:
        if path not in modules:
            return f"these weights are for another transformer: it has no {path}"
        parent = modules[path.rpartition(".")[0]]
        name = path.rpartition(".")[2]
        if getattr(parent, "fused_projections", False) and name in (
            "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj",
        ):  # fmt: skip
            return f"{path} is not computed while projections are fused: unfuse_qkv_projections() first"
        if getattr(layers.get(path), "merged", False):
            return f"peft has merged an adapter into {path}: unfuse_lora() first"
    return None


class Acting:
    """The strength of a use in the call that is running, also where its blocks are computed again in the backward pass."""

    def __init__(self, use: Use, run: ControlRun) -> None:
        self.use, self.run, self._last = use, run, 0.0
        self.reached: set[str] = set()

    def strength(self) -> float:
        """Return the strength now; between calls it is 0, save for blocks that are computed again for their gradient."""
        if self.run.moment is None:
            return self._last if torch.is_grad_enabled() and self.use.adapter.trained_now else 0.0
        self._last = self.run.strength(self.use)
        return self._last

    def hook(self, path: str, change: Change) -> Callable[..., Tensor | None]:
        """Return a forward hook that lets `change` answer for the layer at a path."""

        def after(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            strength = self.strength()
            if strength == 0:
                return None
            self.run.account(self.use).acted += 1
            self.reached.add(path)
            return change(args[0] if args else next(iter(kwargs.values())), output, strength)

        return after


@contextmanager
def changed_layers(
    transformer: nn.Module, use: Use, run: ControlRun, changes: Mapping[str, Change]
) -> Iterator[Acting]:
    """Let `changes[path](x, y, strength)` answer for every call of the layer at `path` inside."""
    acting = Acting(use, run)
    handles = []
    try:
        for path, change in changes.items():
            layer = transformer.get_submodule(path)
            handles.append(layer.register_forward_hook(acting.hook(path, change), with_kwargs=True))
        yield acting
    finally:
        for one in handles:
            one.remove()
        run.account(use).told["layers"] = f"{len(acting.reached)}/{len(changes)}"


def weight_of(transformer: nn.Module, path: str) -> Tensor:
    """Return the weight [D out, D in] of a linear layer. Raises: Refused where it is quantised or wrapped."""
    layer: Any = transformer.get_submodule(path)
    if type(layer) is not nn.Linear or not layer.weight.is_floating_point():
        raise Refused(
            f"{path} is a {type(layer).__name__}: only plain linear layers can be merged with an adapter"
        )
    return layer.weight
