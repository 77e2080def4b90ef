"""Where a transformer may be altered inside its attention: every call of torch's attention, with its layer and its text.

One torch function mode is in force during the forwards of the transformer; it sees all attention that ends in
`scaled_dot_product_attention` (the native backends of diffusers and its older processors). Hooks on the attention
modules say which layer is speaking. Where the text stands in a joint sequence is read off the concatenations that
built it, so no table of models is needed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_SDPA = F.scaled_dot_product_attention
_CATS = frozenset((torch.cat, torch.concat, torch.concatenate))
_NAMES = re.compile(r"attn|attention", re.IGNORECASE)
_TEXT = re.compile(r"context|caption|text|txt")
_NO_LAYERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_HIDDEN = ("hidden_states", "x", "query")
_CONTEXT = ("encoder_hidden_states", "context", "key")
# How many of the last keys of the call that is on its way are no part of the model's own sequence.
_APPENDED: ContextVar[int] = ContextVar("appended", default=0)
# How many of the first keys of the call that is on its way are text, where only a part of the sequence asks.
_PART: ContextVar[int | None] = ContextVar("part", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attending:
    """One attention call: q [B, K, N, head size] over k, v [B, K, M, head size].

    `kind` is self, cross or joint (the sequence holds the text too). `text` counts the text tokens that stand before
    and after the others among the keys, `query_text` among the queries. `path` is the layer, with `#1`, `#2` for
    further calls of the same layer.
    """

    path: str
    kind: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    text: tuple[int, int]
    query_text: tuple[int, int]
    scale: float | None
    causal: bool
    dropout: float
    exact: Callable[[], Tensor]  # computes the call as the model meant it


Attends = Callable[[Attending], Tensor]


def attend_appended(call: Attending, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Answer a call with more keys and values k, v [B, K, M', head size] behind its own.

    `mask` is that of all keys, boolean or additive, broadcastable to [B, K, N, M + M']. Whoever listens nearer to the
    weights sees the longer call, of the same kind as before, with the additional keys as text that does not ask.
    """
    token = _APPENDED.set(_APPENDED.get() + k.shape[-2])
    try:
        return _SDPA(
            call.q, torch.cat([call.k, k], dim=-2), torch.cat([call.v, v], dim=-2), attn_mask=mask,
            dropout_p=call.dropout, scale=call.scale,
        )  # fmt: skip
    finally:
        _APPENDED.reset(token)


@contextmanager
def asked_by_a_part(text: int) -> Iterator[None]:
    """Say that in the calls inside a part of the picture's tokens asks all of them, and `text` text tokens before them."""
    token = _PART.set(text)
    try:
        yield
    finally:
        _PART.reset(token)


@contextmanager
def attention_seam(transformer: nn.Module, around: Attends) -> Iterator[None]:
    """Let `around(attending)` answer every attention call in the forwards of a transformer.

    Calls outside of its forward (recomputation in a backward pass, a block used by itself) are left alone. Only what
    `unseen` passes can be held: attention inside a compiled graph or on a foreign backend never comes by.
    """
    listener = _Listener(around)
    inner = transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        listener.clear()
        with listener:
            return inner(*args, **kwargs)

    forward.__wrapped__ = inner  # type: ignore[attr-defined]  # inspect.signature sees the model's own arguments
    from dit.seams import patched  # this module is a part of dit.seams

    with ExitStack() as stack:
        for path, module in attention_layers(transformer):
            before, after = listener.hooks(path)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, always_call=True).remove)
        stack.enter_context(patched(transformer, "forward", forward))
        yield


def attention_layers(transformer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules that are attention by the name of their class or their own, in order of declaration."""
    return [
        (path, module)
        for path, module in transformer.named_modules()
        if path
        and any(True for _ in module.children())
        and not isinstance(module, _NO_LAYERS)
        and (_NAMES.search(path.rsplit(".", 1)[-1]) or _NAMES.search(type(module).__name__))
    ]


def unseen(transformer: nn.Module) -> str | None:
    """Return in words why the attention calls of a transformer cannot be seen, or None if they can."""
    for path, module in transformer.named_modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            return f"{path or type(transformer).__name__} is compiled, and a compiled graph hides its attention calls"
    found = sys.modules.get("diffusers.models.attention_dispatch")
    default = None if found is None else found._AttentionBackendRegistry._active_backend
    for path, module in attention_layers(transformer):
        processor = getattr(module, "processor", None)
        if getattr(processor, "_parallel_config", None) is not None:
            return f"{path} shares its sequence with other devices (context parallel)"
        backend = getattr(processor, "_attention_backend", None) or default
        name = str(getattr(backend, "value", backend or "native"))
        if "native" not in name:
            return f'attention runs on the backend {name!r}, where no call is seen; use set_attention_backend("native")'
    return None


@dataclass(slots=True)
class _Visit:
    """An attention module that is running: the lengths of what it was given, and its calls so far."""

    path: str
    hidden: int | None
    context: int | None
    calls: int = 0


@dataclass(slots=True)
class _Forward:
    """What one forward has shown so far: running layers, and how sequences of each length were put together."""

    visits: list[_Visit] = field(default_factory=list)
    joins: dict[int, tuple[int, ...]] = field(default_factory=dict)
    texts: set[int] = field(default_factory=set)
    lengths: set[int] = field(default_factory=set)
    nameless: int = 0


class _Listener(TorchFunctionMode):
    """Hear attention calls and concatenations of tokens; everything else passes at once."""

    def __init__(self, around: Attends) -> None:
        super().__init__()
        self._around = around
        self._now = _Forward()

    def clear(self) -> None:
        """Forget the forward before, which may have been cut short."""
        self._now = _Forward()

    def hooks(self, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """Return the hooks that tell when a layer begins and ends."""

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._now.visits.append(_visit(path, args, kwargs))

        def after(*_: Any) -> None:
            if self._now.visits:
                self._now.visits.pop()

        return before, after

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA:
            return self._around(self._attending(args, kwargs))
        if func in _CATS:
            self._joined(*args, **kwargs)
        return func(*args, **kwargs)

    def _joined(self, tensors: Any, dim: Any = 0, **_: Any) -> None:
        """Write down how a sequence of tokens was put together: [N, D], [B, N, D], [B, N, K, D] or [B, K, N, D]."""
        if not isinstance(tensors, list | tuple) or len(tensors) < 2 or not isinstance(dim, int):
            return
        rank = tensors[0].ndim
        axis = dim % rank if rank else 0
        if (rank in (2, 3) and axis == rank - 2) or (rank == 4 and axis in (1, 2)):
            lengths = tuple(one.shape[axis] for one in tensors if one.ndim == rank and one.shape[axis])
            if len(lengths) > 1:
                self._now.joins[sum(lengths)] = lengths

    def _attending(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attending:
        given = (
            dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
            | kwargs
        )
        q, k = given["query"], given["key"]
        now = self._now
        if now.visits:
            visit = now.visits[-1]
            number, visit.calls = visit.calls, visit.calls + 1
        else:
            visit = _Visit("attention", None, None)
            number, now.nameless = now.nameless, now.nameless + 1
        appended = _APPENDED.get()
        keys = k.shape[-2] - appended
        kind, text = self._kind(visit, q.shape[-2], keys)
        missing = keys - q.shape[-2] if kind == "joint" else 0  # text that is heard but does not ask
        first = max(0, text[0] - missing)
        return Attending(
            path=f"{visit.path}#{number}" if number else visit.path,
            kind=kind, q=q, k=k, v=given["value"], mask=given.get("attn_mask"),
            text=(text[0], text[1] + appended),
            query_text=(first, max(0, text[1] - (missing - (text[0] - first)))),
            scale=given.get("scale"), causal=bool(given.get("is_causal")), dropout=float(given.get("dropout_p") or 0.0),
            exact=lambda: _SDPA(*args, **kwargs),
        )  # fmt: skip

    def _kind(self, visit: _Visit, queries: int, keys: int) -> tuple[str, tuple[int, int]]:
        """Tell self from cross from joint attention, and where the text stands among the keys."""
        hidden, context, now = visit.hidden, visit.context, self._now
        part = _PART.get()
        if part is not None:
            return "joint", (part, 0)
        if hidden is not None and context is not None and keys == hidden + context:
            now.texts.add(context)
            lengths = now.joins.get(keys, (context, hidden))
            last = lengths[0] != context and lengths[-1] == context
            return "joint", (0, context) if last else (context, 0)
        if queries != keys or (context is not None and keys == context):
            return "cross", (0, 0)
        lengths = now.joins.get(keys, ())
        if not lengths:
            # Lumina2 writes both into an empty tensor, text first; their refiners have shown the two lengths.
            if _TEXT.search(visit.path):
                now.texts.add(keys)
            text = next((one for one in now.texts if keys - one in now.lengths), 0)
            now.lengths.add(keys)
            return ("joint" if text else "self"), (text, 0)
        picture = lengths.index(max(lengths))
        if len(lengths) == 2 and lengths[picture] in now.texts and lengths[1 - picture] not in now.texts:
            picture = 1 - picture  # a text that is longer than its picture
        return "joint", (sum(lengths[:picture]), sum(lengths[picture + 1 :]))


def _visit(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Visit:
    hidden = next((kwargs[name] for name in _HIDDEN if isinstance(kwargs.get(name), Tensor)), None)
    places = [one for one in args if isinstance(one, Tensor)]
    if hidden is None and places:
        hidden = places.pop(0)
    context = next((kwargs[name] for name in _CONTEXT if isinstance(kwargs.get(name), Tensor)), None)
    if context is None and len(args) > 1 and isinstance(args[1], Tensor):
        context = args[1]
    lengths = [
        one.shape[-2] if isinstance(one, Tensor) and one.ndim == 3 and one.is_floating_point() else None
        for one in (hidden, None if context is hidden else context)
    ]
    return _Visit(path, lengths[0], lengths[1])
