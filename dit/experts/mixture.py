"""Dense2MoE's perceptron: one expert that every token shares, and many small ones of which each token picks the best few.

Paper: Dense2MoE: Restructuring Diffusion Transformer to MoE for Efficient Text-to-Image Generation, Zheng et al. 2025,
arXiv:2510.09094.
Differs: gates are the softmax times the count of experts, so their mean is 1: a dense perceptron cut into experts whose router
knows nothing yet is that same perceptron when all experts are on. A conversion starts it as good as blind for that reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit.experts._dispatch import ACTIVATIONS, GATED, dispatch, dispatch_reference
from dit.experts.dense import Experts, Perceptron
from dit.ledger import activated_of, macs_of, parameters_of
from dit.routing import RouteDecision
from dit.spec import knob, parse, spec

if TYPE_CHECKING:
    from dit.model import Context

BLIND = 1e-6
"""Deviation of a converted router's weights: enough to break ties, too little to move a gate away from 1."""


@spec("mixture", paper="Dense2MoE, arXiv:2510.09094")
class Mixture(Experts):
    """A shared expert and routed ones; the paper's 1S12E2A by default, 1.5 parts of 4 at work.

    The two ratios are parts of the hidden channels as the paper counts them (in widths, of which a usual perceptron has 4);
    what counts is their proportion: `shared_ratio + experts * expert_ratio` parts are all the hidden channels there are.
    """

    shared_ratio: float = knob(1.0, "Parts of the shared expert", low=0.001, high=100.0)
    expert_ratio: float = knob(0.25, "Parts of one routed expert", low=0.001, high=100.0)
    experts: int = knob(12, "Routed experts", low=1, high=512)
    active: int = knob(2, "Routed experts a token uses", low=0, high=512)
    balance: float = knob(0.01, "Weight of the load-balance loss", low=0.0)
    activation: str = knob("gelu-approximate", "Activation", choices=ACTIVATIONS)

    def check(self) -> None:
        if self.active > self.experts:
            raise ValueError(
                f"mixture: active must be at most experts, got active={self.active}, experts={self.experts}"
            )

    def sizes(self, hidden: int) -> tuple[int, int]:
        """Return the hidden channels of the shared and of one routed expert, of `hidden` altogether.

        Raises: ValueError where that leaves an expert without channels.
        """
        parts = self.shared_ratio + self.experts * self.expert_ratio
        size = round(hidden * self.expert_ratio / parts)
        shared = hidden - self.experts * size
        if size < 1 or shared < 1:
            raise ValueError(
                f"mixture: {hidden} hidden channels are too few for a shared part of {self.shared_ratio:g} and "
                f"{self.experts} experts of {self.expert_ratio:g}"
            )
        return shared, size

    @property
    def activated_share(self) -> float:
        """Share of the hidden channels that a token goes through, 0-1."""
        parts = self.shared_ratio + self.experts * self.expert_ratio
        return (self.shared_ratio + self.active * self.expert_ratio) / parts

    def build(self, width: int, hidden: int) -> nn.Module:
        return MixtureLayer(width, hidden, self)


class MixtureLayer(nn.Module):
    """Shared expert, routed experts and their router: y = shared(x) + sum over the best k of gate_i(x) expert_i(x).

    Attributes:
        active: k, which may be changed at any time; 0 leaves the shared expert alone.
        unit_gates: every chosen expert counts 1, whatever the router says.
        masked: compute every expert and multiply, the plain form of the same thing.
        decision: what the router decided for the last tokens it saw, while somebody watches (`watched`), else None.
    """

    def __init__(self, width: int, hidden: int, settings: Mixture, *, bias: bool = True) -> None:
        super().__init__()
        shared, size = settings.sizes(hidden)
        self.settings = settings
        self.experts, self.active, self.size, self.kind = (
            settings.experts, settings.active, size, settings.activation,
        )  # fmt: skip
        self.balance = settings.balance
        self.unit_gates, self.masked, self.watching = False, False, False
        self.decision: RouteDecision | None = None
        self.auxiliary: dict[str, Tensor] = {}
        rows = size * (2 if self.kind in GATED else 1)
        self.shared = Perceptron(width, inner_dim=shared, activation_fn=self.kind, bias=bias)
        self.gate = nn.Linear(width, self.experts, bias=False)
        # All experts in one matrix each, as the dense layer had them: the optimizers treat them as the matrices they are.
        self.up = nn.Parameter(torch.empty(self.experts * rows, width))
        self.up_bias = nn.Parameter(torch.zeros(self.experts * rows)) if bias else None
        self.down = nn.Parameter(torch.empty(width, self.experts * size))
        nn.init.xavier_uniform_(self.up)
        nn.init.xavier_uniform_(self.down)
        nn.init.normal_(self.gate.weight, std=width**-0.5)

    def forward(self, hidden_states: Tensor, context: Context | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        out: Tensor = self.shared(hidden_states)
        self.auxiliary = {}
        if not self.active:
            return out
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, D]
        indices, gates = self._route(x, hidden_states.shape)
        up, bias, down = self.stacked(x.dtype)
        mix = dispatch_reference if self.masked else dispatch
        return out + mix(x, indices, gates.to(x.dtype), up, bias, down, self.kind).view_as(out)

    def stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the routed experts one by one: first maps [E, H, D], their biases [E, H], second maps [E, D, h]."""
        width = self.down.shape[0]
        up = self.up.to(dtype).view(self.experts, -1, width)
        bias = None if self.up_bias is None else self.up_bias.to(dtype).view(self.experts, -1)
        return up, bias, self.down.to(dtype).view(width, self.experts, self.size).transpose(0, 1)

    def _route(self, x: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Tokens [T, D] -> the chosen experts and their gates, [T, k]."""
        logits = self.gate(x).float()  # [T, E]
        gates = torch.softmax(logits, dim=-1) * self.experts
        indices = logits.topk(self.active, dim=-1).indices
        if self.balance and self.training and torch.is_grad_enabled():
            self.auxiliary = {"load_balance": self.balance * load_balance(gates, indices)}
        if self.watching:
            active = torch.zeros_like(gates).scatter(1, indices, 1.0)
            grid = (*shape[:-1], self.experts)
            self.decision = RouteDecision(
                scope="token",
                gates=gates.detach().view(grid),
                active=active.view(grid),
                compact=not self.masked,
            )
        chosen = gates.gather(1, indices)
        return indices, torch.ones_like(chosen) if self.unit_gates else chosen

    def macs(self, rows: int, text: int = 0) -> int:
        """Return the multiply-accumulates for `rows` tokens."""
        routed = self.active * (self.up.numel() + self.down.numel()) // self.experts
        return rows * routed + macs_of(self.shared, rows) + (macs_of(self.gate, rows) if self.active else 0)

    def activated_parameters(self) -> int:
        """Return the parameters that one token goes through."""
        routed = self.up.numel() + self.down.numel() + (0 if self.up_bias is None else self.up_bias.numel())
        gate = parameters_of(self.gate) if self.active else 0
        return activated_of(self.shared) + gate + self.active * routed // self.experts


def load_balance(gates: Tensor, indices: Tensor) -> Tensor:
    """Return the sum over experts of share of the choices times mean gate, 1 where the load is even; gates [T, E] of mean 1."""
    chosen = torch.zeros_like(gates).scatter(1, indices, 1.0).mean(dim=0) / indices.shape[-1]
    return (chosen * gates.mean(dim=0)).sum()


def layers_of(model: nn.Module) -> dict[str, MixtureLayer]:
    """Return the mixtures in a network by path. Raises: ValueError where there are none."""
    found = {path: one for path, one in model.named_modules() if isinstance(one, MixtureLayer)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no mixture of experts")
    return found


def set_active(model: nn.Module, active: int) -> None:
    """Let every token use its best `active` routed experts from now on, also once saved; 0 for the shared expert alone.

    Raises: ValueError for a count that some mixture of the network does not have.
    """
    layers = layers_of(model)
    most = min(one.experts for one in layers.values())
    if not 0 <= active <= most:
        raise ValueError(f"active experts: from 0 to {most}, got {active}")
    for layer in layers.values():
        layer.active = active
    known: Any = getattr(model, "config", {})
    if "experts" in known:  # one of ours, whose config builds it anew
        changed = parse(Experts, known["experts"]).replace(active=active)
        model.register_to_config(experts=changed.to_dict())  # type: ignore[operator]


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, MixtureLayer]]:
    """Let every mixture keep its last decision for as long as the `with` lasts."""
    layers = layers_of(model)
    for layer in layers.values():
        layer.watching = True
    try:
        yield layers
    finally:
        for layer in layers.values():
            layer.watching, layer.decision = False, None
