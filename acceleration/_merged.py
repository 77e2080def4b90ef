"""Attention and feed-forward on merged tokens: which calls may be merged, the plans of each branch, and the account."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acceleration._attending import valid_keys
from acceleration._merging import Plan, Windows, grid_of, plan
from acceleration._modules import is_feed_forward, parts_of, serves_prompt
from acceleration.base import Run
from dit.seams import Attending, Block, Blocks, around_blocks, attention_seam, blocks_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Settings(Protocol):
    """What has to be known of the method."""

    @property
    def name(self) -> str: ...
    @property
    def modules(self) -> str: ...
    @property
    def queries(self) -> bool: ...
    @property
    def proportional(self) -> bool: ...
    @property
    def window(self) -> int: ...
    @property
    def reuse(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def min_tokens(self) -> int: ...

    def kept(self, tokens: int) -> int: ...
    def merges(self, step: int, steps: int | None) -> bool: ...


@dataclass(slots=True)
class Row:
    """The account of one layer over all branches and steps: how many of its tokens were kept where it was merged."""

    layer: str
    kind: str
    tokens: int = 0
    kept: int = 0
    calls: int = 0
    merged: int = 0
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; `tokens` without those of the prompt."""
        return {
            "layer": self.layer, "kind": self.kind, "tokens": self.tokens, "kept": self.kept if self.merged else self.tokens,
            "calls": self.calls, "merged": self.merged, "reason": self.reason,
        }  # fmt: skip


@dataclass(slots=True)
class _Branch:
    """What one branch knows: where text stands in sequences of each (batch, length), windows by length, and plans."""

    texts: dict[tuple[int, int], tuple[int, int] | None] = field(default_factory=dict)
    windows: dict[int, Windows] = field(default_factory=dict)
    plans: dict[tuple[int, int, int], Plan] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.plans.values())

    def learn(self, shape: tuple[int, int], text: tuple[int, int]) -> None:
        """Write down where the text stands in a sequence; None where two answers contradict each other."""
        if self.texts.setdefault(shape, text) != text:
            self.texts[shape] = None


def position_wise(transformer: nn.Module) -> list[Block]:
    """Find the feed-forward modules of all blocks that treat every token alone; of fused blocks, their linear maps."""
    parts = parts_of(transformer)
    found = [
        one
        for one in parts.modules
        if is_feed_forward(one.path.rsplit(".", 1)[-1], one.module)
        and not any(isinstance(inner, _CONVOLUTIONS) for inner in one.module.modules())
    ]
    for block in blocks_of(transformer):
        if block.path in parts.fused:
            maps = block.module.named_children()
            found += [Block(f"{block.path}.{name}", one) for name, one in maps if isinstance(one, nn.Linear)]
    return [one for one in found if not serves_prompt(one.path) and not _is_empty(one.module)]


def _is_empty(module: nn.Module) -> bool:
    """Whether a map has no width (a tower left out): what it returns is the same for every token, so merging changes nothing."""
    maps = [one for one in module.modules() if isinstance(one, nn.Linear)]
    return any(0 in (one.in_features, one.out_features) for one in maps)


class Merging:
    """Answer attention and feed-forward calls of a transformer's blocks on merged tokens, or exactly."""

    def __init__(self, settings: Settings, run: Run) -> None:
        self.settings, self.run = settings, run
        self.rows: dict[str, Any] = run.attention
        self._masks: tuple[Any, str | Tensor | None] = (None, None)
        self._unfit: set[str] = set()  # feed-forward modules that do not return one row for each token
        self._prefixes = [f"{block.path}." for block in run.blocks]

    @contextmanager
    def attached(self, transformer: nn.Module) -> Iterator[None]:
        """Hold the attention of the transformer, and the feed-forward modules where they are to be merged."""
        modules = position_wise(transformer) if self.settings.modules != "attention" else []
        try:
            with (
                attention_seam(transformer, self.attention),
                around_blocks(Blocks(tuple(modules)), self.feed_forward),
            ):
                yield
        finally:
            self._masks = (None, None)

    def attention(self, call: Attending) -> Tensor:
        """Compute one attention call: merged queries hear merged keys, and their answers are spread again."""
        row = self._row(call.path, call.kind)
        branch = self._branch()
        tokens = call.k.shape[-2] - sum(call.text)
        row.tokens = max(row.tokens, tokens)
        row.reason, keys = self._attention_reason(call, branch, tokens)
        if row.reason is None and self.settings.modules == "feed-forward":
            row.reason = "only feed-forward modules are to be merged"
        if row.reason is not None or branch is None or not self._now():
            return call.exact()
        first = call.text[0]
        value = call.v[:, :, first : first + tokens].transpose(1, 2).flatten(2)
        merge = self._plan(branch, call.path, value)
        self._count(row, merge)
        return self._attend(call, merge, value, keys)

    def feed_forward(
        self, block: Block, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute one feed-forward call on the kept tokens, and spread what it returns."""
        row, branch = self._row(block.path, "feed-forward"), self._branch()
        name = next((one for one, value in kwargs.items() if isinstance(value, Tensor)), "")
        x = args[0] if args else kwargs.get(name)
        text: tuple[int, int] | None = None
        row.reason = self._place_reason(block.path, branch)
        if row.reason is None and branch is not None:
            others = (*args[1:], *(value for key, value in kwargs.items() if args or key != name))
            text = (
                branch.texts.get((x.shape[0], x.shape[1])) if isinstance(x, Tensor) and x.ndim == 3 else None
            )
            row.reason = self._rows_reason(block.path, x, text, others)
        if row.reason is not None or branch is None or text is None or not isinstance(x, Tensor):
            return inner(*args, **kwargs)
        first, tokens = text[0], x.shape[1] - sum(text)
        row.tokens = max(row.tokens, tokens)
        if not self._now():
            return inner(*args, **kwargs)
        picture = x[:, first : first + tokens]
        merge = self._plan(branch, block.path, picture)
        shorter = torch.cat([x[:, :first], merge.pick(picture[:, None])[:, 0], x[:, first + tokens :]], 1)
        out = inner(shorter, *args[1:], **kwargs) if args else inner(**(kwargs | {name: shorter}))
        if not isinstance(out, Tensor) or out.shape[:2] != shorter.shape[:2]:
            self._unfit.add(block.path)
            return inner(*args, **kwargs)
        self._count(row, merge)
        kept = merge.kept.shape[1]
        return torch.cat(
            [out[:, :first], merge.spread(out[:, first : first + kept]), out[:, first + kept :]], 1
        )

    def _attend(self, call: Attending, merge: Plan, value: Tensor, keys: Tensor | None) -> Tensor:
        (first, _), (ahead, _) = call.text, call.query_text
        tokens, kept = value.shape[1], merge.kept.shape[1]
        valid = None if keys is None else keys[:, first : first + tokens]

        def shortened(x: Tensor, start: int, middle: Tensor) -> Tensor:
            return torch.cat([x[:, :, :start], middle, x[:, :, start + tokens :]], 2)

        mean = merge.mean(value, valid).unflatten(2, (call.v.shape[1], -1)).transpose(1, 2)
        k = shortened(call.k, first, merge.pick(call.k[:, :, first : first + tokens]))
        v = shortened(call.v, first, mean)
        q = call.q
        if self.settings.queries:
            q = shortened(q, ahead, merge.pick(q[:, :, ahead : ahead + tokens]))
        bias = self._bias(call, merge, keys, tokens, valid)
        grouped = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=call.scale, **grouped)
        if not self.settings.queries:
            return out
        answers = merge.spread(out[:, :, ahead : ahead + kept].transpose(1, 2).flatten(2))
        spread = answers.unflatten(2, (out.shape[1], -1)).transpose(1, 2)
        return torch.cat([out[:, :, :ahead], spread, out[:, :, ahead + kept :]], 2)

    def _bias(
        self, call: Attending, merge: Plan, keys: Tensor | None, tokens: int, valid: Tensor | None
    ) -> Tensor | None:
        """Return what is added to the scores [B, 1, 1, M]: a kept key speaks for all it stands for, padding for none."""
        if keys is None and not self.settings.proportional:
            return None
        B, first, last = len(merge.kept), *call.text
        counts = merge.counts(valid)
        if not self.settings.proportional:
            counts = (counts > 0).float()
        heard = torch.ones(B, call.k.shape[2], device=counts.device) if keys is None else keys.float()
        all_of = torch.cat([heard[:, :first], counts, heard[:, first + tokens : first + tokens + last]], 1)
        return all_of.log().to(call.q.dtype)[:, None, None, :]

    def _plan(self, branch: _Branch, path: str, x: Tensor) -> Plan:
        """Return the plan for the picture's tokens x [B, N, C] in this block, made anew when it is too old."""
        settings, call = self.settings, self.run.call
        assert call is not None
        B, N, _ = x.shape
        group = self._place(path) // settings.layers if settings.layers else 0
        found = branch.plans.get((B, N, group))
        if found is None or call.moment.step - found.step >= settings.reuse:
            windows = branch.windows.get(N)
            if windows is None:
                windows = Windows.of(grid_of(call.given, N), N, settings.window, x.device)
                branch.windows[N] = windows
            found = plan(x, windows, settings.kept(windows.size), call.moment.step)
            branch.plans[B, N, group] = found
            self.run.weigh()
        return found

    def _attention_reason(
        self, call: Attending, branch: _Branch | None, tokens: int
    ) -> tuple[str | None, Tensor | None]:
        """Say why an attention call stays exact, or return its valid keys [B, M] (None: all of them)."""
        reason = self._place_reason(call.path, branch)
        if reason is not None or branch is None:
            return reason, None
        if call.kind == "cross":
            return "it hears the prompt alone (cross-attention)", None
        if call.q.ndim != 4 or call.k.ndim != 4:
            return "its heads do not lie in an axis of their own", None
        short = f"it has {tokens} tokens, and min_tokens is {self.settings.min_tokens}"
        if call.causal or call.dropout > 0:
            why = "it is causal" if call.causal else "it uses dropout"
            return (short if tokens < self.settings.min_tokens else why), None
        if tokens != call.q.shape[2] - sum(call.query_text):
            return "its queries and keys are different tokens", None
        branch.learn((len(call.q), tokens), (0, 0))
        branch.learn((len(call.q), call.k.shape[2]), call.text)
        if tokens < self.settings.min_tokens:
            return short, None
        if torch.is_grad_enabled() and any(one.requires_grad for one in (call.q, call.k, call.v)):
            return "gradients are wanted", None
        keys = self._keys(call)
        return (keys, None) if isinstance(keys, str) else (None, keys)

    def _keys(self, call: Attending) -> str | Tensor | None:
        if call.mask is None:
            return None
        known, found = self._masks
        if known is not call.mask:
            found = valid_keys(call.mask, call.q.shape[0], call.k.shape[2])
            self._masks = (call.mask, found)
        return found

    def _place_reason(self, path: str, branch: _Branch | None) -> str | None:
        """Say why nothing may be merged at this place and time."""
        if self.run.call is None:
            return "it was called outside of the transformer"
        if self._place(path) < 0:
            return "it stands outside of the blocks"
        if serves_prompt(path):
            return "it serves the prompt"
        return "the step could not be told" if branch is None else None

    def _rows_reason(
        self, path: str, x: Any, text: tuple[int, int] | None, others: tuple[Any, ...]
    ) -> str | None:
        """Say why a feed-forward call stays exact."""
        if text is None or path in self._unfit:
            return "its rows are no sequence that an attention of the model hears"
        if any(isinstance(one, Tensor) and x.shape[1] in one.shape[1:-1] for one in others):
            return "it takes something else for each token"
        if x.shape[1] - sum(text) < self.settings.min_tokens:
            return f"it has {x.shape[1] - sum(text)} tokens, and min_tokens is {self.settings.min_tokens}"
        return "gradients are wanted" if torch.is_grad_enabled() and x.requires_grad else None

    def _now(self) -> bool:
        call = self.run.call
        return call is not None and self.settings.merges(call.moment.step, self.run.clock.steps)

    def _branch(self) -> _Branch | None:
        call = self.run.call
        return call.state(self, _Branch) if call is not None and call.moment.known else None

    def _place(self, path: str) -> int:
        return next((place for place, prefix in enumerate(self._prefixes) if path.startswith(prefix)), -1)

    def _row(self, path: str, kind: str) -> Row:
        row: Row = self.rows.setdefault(path, Row(path, kind))
        row.calls += 1
        return row

    def _count(self, row: Row, merge: Plan) -> None:
        row.merged += 1
        row.kept = merge.kept.shape[1]
        if self.run.call is not None and self.run.call.states:
            self.run.call.states[-1] = "M"
