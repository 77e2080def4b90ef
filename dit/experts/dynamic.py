"""DyDiT: the noise level decides how wide a block is, each token decides whether it needs the perceptron; both really skip.

Paper: Dynamic Diffusion Transformer, Zhao et al. 2024, arXiv:2410.03456; DyDiT++, Zhao et al. 2025, arXiv:2504.06803.
Differs: the released inference multiplies by masks, here what is off is not computed; the budget loss counts the tokens at
hand; a joint block routes the heads of both streams together and the tokens of each stream by a gate of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dit.experts.dense import Experts
from dit.experts.switch import plain_perceptron
from dit.layers import cut, sliceable
from dit.model import Context
from dit.routing import RouteDecision
from dit.spec import knob, spec

Streams = dict[str, Tensor]


@spec("dynamic", paper="DyDiT, arXiv:2410.03456")
class Dynamic(Experts):
    """Attention heads and groups of hidden channels by noise level, tokens by themselves, towards a share of the cost."""

    target: float = knob(0.5, "Share of attention and perceptron that may be spent", low=0.05, high=1.0)
    width: bool = knob(True, "Heads and hidden channels by noise level")
    tokens: bool = knob(True, "Perceptron only for tokens that need it")
    temperature: float = knob(5.0, "Temperature of the choice in training", low=0.1, high=100.0)
    start_width: float = knob(
        15.0, "Bias of the width gates at the start: everything on", low=0.0, high=100.0
    )
    start_tokens: float = knob(
        35.0, "Bias of the token gates at the start: everything on", low=0.0, high=100.0
    )
    weight: float = knob(2.0, "Weight of the budget loss", low=0.0)
    hold: int = knob(100, "Training steps at the full budget", low=0, unit="steps")
    fall: int = knob(1000, "Training step from which the budget is the target", low=1, unit="steps")

    def check(self) -> None:
        if self.hold > self.fall:
            raise ValueError(f"dynamic: hold must be at most fall, got hold={self.hold}, fall={self.fall}")

    def build(self, width: int, hidden: int) -> nn.Module:
        return DynamicPerceptron(width, hidden, self)

    def router(self, width: int, heads: int, hidden: int) -> nn.Module | None:
        return WidthRouter(width, heads, hidden, self) if self.width and heads > 1 else None

    def losses(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the budget loss of the last training pass: how far the share that was spent lies from the target."""
        spent = share_of(model)
        if spent is None or not self.weight:
            return {}
        step = getattr(model, "training_step", self.fall)
        fallen = min(max((step - self.hold) / max(self.fall - self.hold, 1), 0.0), 1.0)
        return {"budget": self.weight * (spent - (1 + (self.target - 1) * fallen)) ** 2}


class StraightThrough(nn.Module):
    """Logits -> 0/1: by sign in evaluation; in training with logistic noise, and the soft choice's gradient."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor) -> Tensor:
        """Any shape -> the same, 1 where something is computed."""
        if not self.training:
            return (logits > 0).to(logits.dtype)
        first, second = self.noise(logits)
        soft = ((logits - first.log() + second.log()) / self.temperature).sigmoid()
        return (soft > 0.5).to(logits.dtype) - soft.detach() + soft

    def noise(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return two unit-exponential draws of the logits' shape: their log ratio is logistic."""
        return torch.empty_like(logits).exponential_(), torch.empty_like(logits).exponential_()


class WidthRouter(nn.Module):
    """Time embedding -> which heads and which groups of hidden channels; the first of each is always on."""

    def __init__(self, width: int, heads: int, hidden: int, settings: Dynamic) -> None:
        super().__init__()
        self.width, self.hidden = width, hidden
        self.heads, self.groups = nn.Linear(width, heads - 1), nn.Linear(width, heads - 1)
        self.choose_heads, self.choose_groups = (StraightThrough(settings.temperature) for _ in range(2))
        for linear in (self.heads, self.groups):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.constant_(linear.bias, settings.start_width)
        self.complete = False
        self.seen: RouteDecision | None = None

    def forward(
        self, body: Callable[[Streams, Context], Streams], streams: Streams, context: Context
    ) -> Streams:
        """Run the block `body` as wide as the noise level asks."""
        if self.complete:
            return body(streams, context)
        if context.time is None:
            raise ValueError(
                "dynamic width reads the time: this network does not put it into the context of its blocks"
            )
        time = context.time if context.time.dim() == 2 else context.time.mean(dim=1)
        heads = _with_first(self.choose_heads(self.heads(time)))
        groups = _with_first(self.choose_groups(self.groups(time)))
        decision = RouteDecision("time", heads=heads, groups=groups, compact=not self.training)
        self.seen = decision if self.training else None
        return body(streams, dataclasses.replace(context, route=decision))

    def macs(self, rows: int, text: int = 0) -> int:
        """Return the multiply-accumulates of the two gates."""
        return self.heads.weight.numel() + self.groups.weight.numel()


class DynamicPerceptron(nn.Module):
    """A perceptron for the tokens that ask for it, with the hidden channels that the route allows."""

    def __init__(self, width: int, hidden: int, settings: Dynamic) -> None:
        super().__init__()
        self.net = plain_perceptron(width, hidden).net
        self.tokens: nn.Sequential | None = None
        if settings.tokens:
            inner = max(1, width // 16)
            last = nn.Linear(inner, 1)
            self.tokens = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), last)
            nn.init.constant_(last.bias, settings.start_tokens)
        self.choose = StraightThrough(settings.temperature)
        self.complete = False
        self.seen: Tensor | None = None

    def forward(self, hidden_states: Tensor, context: Context | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D], zero for tokens that do without."""
        route = None if context is None or self.complete else context.route
        groups = None if route is None else route.groups
        keep: Tensor | None = None
        if self.tokens is not None and not self.complete:
            residual = hidden_states if context is None or context.residual is None else context.residual
            keep = self.choose(self.tokens(residual))  # [B, N, 1]
        self.seen = None
        if self.training and not self.complete:
            self.seen = hidden_states.new_ones(*hidden_states.shape[:2], 1) if keep is None else keep
        if self.training or torch.compiler.is_compiling() or hidden_states.is_meta:
            return self.masked(hidden_states, groups, keep)
        return self.compact(hidden_states, groups, keep)

    def masked(self, x: Tensor, groups: Tensor | None, keep: Tensor | None) -> Tensor:
        """Compute everything, multiply what is off by zero: x [B, N, D], groups [B, G], keep [B, N, 1] -> [B, N, D]."""
        first, last = self.net[0].proj, self.net[2]
        inner = first(x)
        if groups is not None:
            inner = inner * groups[:, _group_of(inner.shape[-1], groups.shape[1], x.device)].unsqueeze(1).to(
                inner.dtype
            )
        out: Tensor = last(nn.functional.gelu(inner, approximate="tanh"))
        return out if keep is None else out * keep.to(out.dtype)

    def compact(self, x: Tensor, groups: Tensor | None, keep: Tensor | None) -> Tensor:
        """The same, computing only what is on."""
        if groups is not None and not _same(
            groups
        ):  # several noise levels in one batch: each sample by itself
            parts = [
                self.compact(x[i : i + 1], groups[i : i + 1], None if keep is None else keep[i : i + 1])
                for i in range(len(x))
            ]
            return torch.cat(parts)
        rows = None if keep is None or bool(keep.bool().all()) else keep.flatten().nonzero().squeeze(1)
        tokens = x if rows is None else x.flatten(0, 1)[rows]
        answers = self._some(tokens, groups)
        if rows is None:
            return answers
        return x.new_zeros(x.shape[0] * x.shape[1], x.shape[2]).index_copy_(0, rows, answers).view(x.shape)

    def macs(self, rows: int, text: int = 0) -> int:
        """Return the multiply-accumulates of the complete perceptron and the token gate."""
        linears = [one for one in self.modules() if isinstance(one, nn.Linear)]
        return sum(one.weight.numel() for one in linears) * rows

    def _some(self, x: Tensor, groups: Tensor | None) -> Tensor:
        """Tokens [B, N, D] or [rows, D], all with the groups of the first sample."""
        first, last = self.net[0].proj, self.net[2]
        if groups is None or bool(groups.bool().all()):
            out: Tensor = last(nn.functional.gelu(first(x), approximate="tanh"))
            return out
        if not (sliceable(first, x.dtype) and sliceable(last, x.dtype)):
            whole = x if x.dim() == 3 else x.unsqueeze(0)
            return self.masked(whole, groups[:1].expand(len(whole), -1), None).view(x.shape)
        channels = channels_of(groups[0], first.out_features)
        inner = nn.functional.gelu(nn.functional.linear(x, *cut(first, channels, 0)), approximate="tanh")
        return nn.functional.linear(inner, *cut(last, channels, 1))


def channels_of(groups: Tensor, count: int) -> Tensor:
    """Return the places of `count` channels whose group [G] is on."""
    return groups.bool()[_group_of(count, len(groups), groups.device)].nonzero().squeeze(1)


def spent_share(
    heads: Tensor, groups: Tensor, tokens: Tensor, attention: float | Tensor, perceptron: float | Tensor
) -> Tensor:
    """Return the share of the cost that routes leave, mean over the batch.

    Args:
        heads, groups, tokens: shares that are on, [B, blocks].
        attention, perceptron: cost of each in a complete block, one for all or [B, blocks].
    """
    spent = heads * attention + groups * tokens * perceptron
    whole = torch.ones_like(heads) * attention + torch.ones_like(heads) * perceptron
    return (spent.sum(dim=1) / whole.sum(dim=1)).mean()


def share_of(model: nn.Module) -> Tensor | None:
    """Return the share of the cost that the last training pass spent, differentiable; None if none was routed."""
    rows = []
    for block in model.modules():
        layers = [
            one
            for one in (getattr(block, name, None) for name in _LAYERS)
            if isinstance(one, DynamicPerceptron)
        ]
        router: Any = getattr(block, "router", None)
        decision = router.seen if isinstance(router, WidthRouter) else None
        kept = [one.seen for one in layers if one.seen is not None]
        if kept and (decision is not None or any(one.tokens is not None for one in layers)):
            rows.append(_row(layers[0], decision, torch.cat(kept, dim=1)))
    return spent_share(*(torch.stack(column, dim=1) for column in zip(*rows, strict=True))) if rows else None


@contextmanager
def complete(model: nn.Module) -> Iterator[None]:
    """Pass all routers of `model` by inside: the complete network."""
    parts = [one for one in model.modules() if isinstance(one, WidthRouter | DynamicPerceptron)]
    before = [one.complete for one in parts]
    for one in parts:
        one.complete = True
    try:
        yield
    finally:
        for one, was in zip(parts, before, strict=True):
            one.complete = was


_LAYERS = ("ff", "ff_context")


def _row(layer: DynamicPerceptron, decision: RouteDecision | None, kept: Tensor) -> tuple[Tensor, ...]:
    """One block's shares [B] and costs [B]: heads, groups, tokens, attention, perceptron; `kept` [B, N, 1] of all its tokens."""
    batch, count = kept.shape[:2]
    ones = kept.new_ones(batch)
    width, hidden = layer.net[2].out_features, layer.net[2].in_features
    attention = float(count * 4 * width * width + 2 * count * count * width)
    heads = ones if decision is None or decision.heads is None else decision.heads.mean(dim=1)
    groups = ones if decision is None or decision.groups is None else decision.groups.mean(dim=1)
    return heads, groups, kept.mean(dim=(1, 2)), ones * attention, ones * float(2 * count * width * hidden)


def _with_first(choice: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(choice[:, :1]), choice], dim=1)


def _group_of(channels: int, groups: int, device: torch.device) -> Tensor:
    """The group of each channel: contiguous runs, as even as they can be."""
    return torch.arange(channels, device=device) * groups // channels


def _same(rows: Tensor) -> bool:
    return len(rows) == 1 or bool((rows.bool() == rows[:1].bool()).all())
