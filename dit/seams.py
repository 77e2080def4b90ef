"""Where a transformer may be taken hold of: its stacks of blocks, its calls, its clock, and a patch that undoes itself.

Everything here works on any `torch.nn.Module` that is built like a diffusers transformer, is attached by public
torch hooks and `patched`, and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit._attention_seam import (
    Attending,
    asked_by_a_part,
    attend_appended,
    attention_layers,
    attention_seam,
    unseen,
)
from dit._clock import Clock, Moment
from dit._streams import Output, Tensors, arguments, match, tensor_arguments, version

__all__ = [
    "CONTROL_RUN", "RUN", "Attending", "Block", "Blocks", "Clock", "Moment", "Output", "Tensors", "Visit", "announce", "arguments",
    "around_blocks", "around_calls", "asked_by_a_part", "attend_appended", "attention_layers", "attention_seam", "blocks_of",
    "fingerprint", "match", "named_contexts", "observed", "patched", "prompt_of", "tensor_arguments", "timestep_of", "unseen",
    "version", "writes_cache",
]  # fmt: skip

_ABSENT = object()
RUN = "_leapfrog_run"  # where a transformer carries the run that is attached to it
CONTROL_RUN = "_leapfrog_control"  # and where it carries that of the adapters that steer it
_TIMESTEPS = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level")
_PROMPTS = (
    "encoder_hidden_states", "encoder_hidden_states_t5", "encoder_hidden_states_llama3", "cap_feats", "class_labels",
    "prompt_embeds", "text_embed", "context", "input_ids", "text_hidden_states",
)  # fmt: skip
# Stacks with these words in their name read the prompt or a condition; they are no part of the main path.
_SIDE_STACKS = ("refiner", "text", "txt", "caption", "context", "vace", "embed", "norm", "proj", "res_block")


@contextmanager
def patched(obj: Any, name: str, value: Any) -> Iterator[None]:
    """Put `value` into the object's `__dict__`, and at the end restore exactly what stood there, absence included.

    Raises:
        RuntimeError: at the end, if somebody else replaced the value in between (it is gone: restoring won).
    """
    before = obj.__dict__.get(name, _ABSENT)
    obj.__dict__[name] = value
    overlaid = False
    try:
        yield
    finally:
        overlaid = obj.__dict__.get(name, _ABSENT) is not value
        if before is _ABSENT:
            obj.__dict__.pop(name, None)
        else:
            obj.__dict__[name] = before
    if overlaid:
        raise RuntimeError(
            f"{type(obj).__name__}.{name} was replaced inside a with-block that had patched it"
        )


@dataclass(frozen=True, slots=True)
class Block:
    """One repeated block, with its place in the transformer (`transformer_blocks.3`)."""

    path: str
    module: nn.Module


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of the main path in the order in which they are declared, or in words why there are none."""

    blocks: tuple[Block, ...]
    reason: str | None = None

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)


def blocks_of(transformer: nn.Module) -> Blocks:
    """Find the stacks of repeated blocks: the shallowest `ModuleList`s of blocks that are not refiners or text stacks."""
    level: list[tuple[str, nn.Module]] = [("", transformer)]
    for _ in range(3):
        found: list[Block] = []
        deeper: list[tuple[str, nn.Module]] = []
        for prefix, parent in level:
            for name, child in parent.named_children():
                if isinstance(child, nn.ModuleList):
                    found += _stack(f"{prefix}{name}", child)
                else:
                    deeper.append((f"{prefix}{name}.", child))
        if found:
            return Blocks(tuple(found))
        level = deeper
    return Blocks((), f"{type(transformer).__name__} has no stack of repeated blocks")


def _stack(path: str, children: nn.ModuleList) -> list[Block]:
    if any(word in path.rsplit(".", 1)[-1] for word in _SIDE_STACKS):
        return []
    modules = [(f"{path}.{place}", one) for place, one in enumerate(children)]
    whole = all(
        any(True for _ in one.children()) and any(True for _ in one.parameters()) for _, one in modules
    )
    lists = any(isinstance(one, nn.ModuleList | nn.ModuleDict) for _, one in modules)
    return [Block(name, one) for name, one in modules] if whole and not lists else []


Around = Callable[[Block, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def around_blocks(blocks: Blocks, around: Around) -> Iterator[None]:
    """Let `around(block, inner, args, kwargs)` answer every call of a block; not calling `inner` skips the block."""
    with ExitStack() as stack:
        for block in blocks:
            # A compiled block is held from outside its graph, so that the decision stays in eager Python.
            name = "forward" if block.module._compiled_call_impl is None else "_compiled_call_impl"
            stack.enter_context(patched(block.module, name, _wrapped(block, name, around)))
        yield


def _wrapped(block: Block, name: str, around: Around) -> Callable[..., Any]:
    inner = getattr(block.module, name)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(block, inner, args, kwargs)

    forward.__wrapped__ = inner  # type: ignore[attr-defined]  # inspect.signature sees the block's own arguments
    return forward


@contextmanager
def around_calls(
    transformer: nn.Module,
    enter: Callable[[dict[str, Any]], None],
    leave: Callable[[bool], None],
) -> Iterator[None]:
    """Call `enter(arguments by name)` before each forward of the transformer and `leave(failed)` after it."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        enter(arguments(module, args, kwargs))

    def after(_module: nn.Module, _args: tuple[Any, ...], result: Any) -> None:
        leave(result is None)  # torch calls an always_call hook with None when the forward raised

    first = transformer.register_forward_pre_hook(before, with_kwargs=True)
    last = transformer.register_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        first.remove()
        last.remove()


@contextmanager
def named_contexts(transformer: nn.Module, clock: Clock) -> Iterator[None]:
    """Let the clock hear the branch names that diffusers' pipelines give by `transformer.cache_context(name)`."""
    original = getattr(transformer, "cache_context", None)
    if original is None:
        yield
        return

    @contextmanager
    def cache_context(name: str, **about: Any) -> Iterator[None]:
        with (
            original(name, **about),
            clock.context(name, about.get("step_index"), about.get("num_inference_steps")),
        ):
            yield

    with patched(transformer, "cache_context", cache_context):
        yield


def announce(
    transformer: nn.Module, *, steps: int | None = None, step: int | None = None, branch: str | None = None
) -> None:
    """Tell the runs attached to `transformer` that a run of `steps` begins, or what the next call is.

    `step` counts denoising steps from 0 (a scheduler that evaluates twice announces the same step twice).
    Does nothing where no run is attached.
    """
    for name in (CONTROL_RUN, RUN):
        run = transformer.__dict__.get(name)
        if run is None:
            continue
        if steps is not None:
            run.clock.begin(steps)
        if step is not None or branch is not None:
            run.clock.announce(step, branch)


def timestep_of(given: Mapping[str, Any]) -> Callable[[], float | None]:
    """Return a function that reads the timestep of a call: a number, or the largest of one a sample or a token."""
    value = next((given[name] for name in _TIMESTEPS if given.get(name) is not None), None)
    if isinstance(value, Tensor):
        tensor = value
        return lambda: float(tensor.max()) if tensor.numel() else None
    number = float(value) if isinstance(value, int | float) else None
    return lambda: number


def prompt_of(given: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor that carries the prompt of a call (the first of a list), or None."""
    for name in _PROMPTS:
        value = given.get(name)
        while isinstance(value, list | tuple) and value:
            value = value[0]
        if isinstance(value, Tensor):
            return value
    return None


def writes_cache(given: Mapping[str, Any]) -> bool:
    """Whether a call may write a K/V cache, as a pass over a reference picture does: then every block must be computed."""
    cache = next((given[name] for name in ("kv_cache", "kv_caches") if given.get(name) is not None), None)
    if cache is None:
        return False
    flags = given.get("kv_cache_flag")
    if isinstance(flags, Mapping):
        return bool(flags.get("is_cache_step", True))
    layers = [cache[0]] if given.get("kv_cache") is None and hasattr(cache, "__getitem__") else []
    mode = getattr(layers[0], "mode", None) if layers else given.get("kv_cache_mode")
    return mode not in ("cached", "inject", "read", "skip")


def fingerprint(given: Mapping[str, Any]) -> Any:
    """Return what must stay equal for a stored tensor to fit a later call: shapes, types, devices, flags; not contents."""
    moving = {name: "float" for name in _TIMESTEPS if isinstance(given.get(name), int | float)}
    return _fingerprint(dict(given) | moving)


def _fingerprint(value: Any, depth: int = 0) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, Mapping):
        return tuple((name, _fingerprint(one, depth + 1)) for name, one in value.items())
    if isinstance(value, list | tuple):
        return tuple(_fingerprint(one, depth + 1) for one in value)
    if isinstance(value, float) and depth <= 1:
        return "float"  # a timestep or a guidance scale given as a number changes from call to call
    return value if isinstance(value, int | float | str | bool | None) else type(value).__name__


@dataclass(frozen=True, slots=True)
class Visit:
    """One call of a block seen in a forward: its streams by name, or in words why it has none."""

    path: str
    inputs: Mapping[str, tuple[int, ...]]
    streams: Output | str


@contextmanager
def observed(transformer: nn.Module) -> Iterator[list[Visit]]:
    """Write down the order in which the blocks run inside, and the streams of each."""
    visits: list[Visit] = []

    def around(block: Block, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = tensor_arguments(block.module, args, kwargs)
        output = inner(*args, **kwargs)
        shapes = {name: tuple(x.shape) for name, x in inputs.items()}
        visits.append(Visit(block.path, shapes, match(block.module, inputs, output)))
        return output

    with torch.no_grad(), around_blocks(blocks_of(transformer), around):
        yield visits
