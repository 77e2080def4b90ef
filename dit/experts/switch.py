"""Switch-DiT: experts chosen by the noise level alone decide which channels of a token go through a block and which bypass it.

Paper: Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse Mixture-of-Experts, Park et al. 2024,
arXiv:2403.09176.
Differs: time may be continuous (it is cut into `bins` for the prior loss alone, the gate reads it as it is); each time is
embedded once instead of all thousand in every call; in a dual-stream block the picture is routed and the prompt is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit.experts.dense import Experts, Perceptron
from dit.model import Context
from dit.routing import RouteDecision
from dit.spec import knob, spec

Streams = dict[str, Tensor]


@spec("switch", paper="Switch-DiT, arXiv:2403.09176")
class Switch(Experts):
    """A plain perceptron, and around each block `experts` linear maps, `active` of them for each noise level."""

    experts: int = knob(3, "Experts a block", low=2, high=64)
    active: int = knob(2, "Experts in use at one noise level", low=1, high=64)
    bins: int = knob(1000, "Noise levels that the prior loss tells apart", low=2, high=10000)
    weight: float = knob(1.0, "Weight of the diffusion prior loss", low=0.0)

    def check(self) -> None:
        if self.active > self.experts:
            raise ValueError(
                f"switch: active must be at most experts, got active={self.active}, experts={self.experts}"
            )

    def build(self, width: int, hidden: int) -> nn.Module:
        return plain_perceptron(width, hidden)

    def router(self, width: int, heads: int, hidden: int) -> nn.Module:
        return SwitchRouter(width, self.experts, self.active)

    def losses(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the diffusion prior loss of the last training pass."""
        routers = [one for one in model.modules() if isinstance(one, SwitchRouter)]
        seen = [one.seen for one in routers if one.seen is not None]
        if not self.weight or len(seen) < len(routers) or not seen:
            return {}
        timestep = seen[0][1]
        if timestep.dim() > 1:  # the prior speaks of one time a sample
            return {}
        gates = torch.cat([one[0] for one in seen], dim=-1)
        chosen = selections(model, routers, self.bins)
        prior = prior_table(len(routers) * self.experts, self.bins, self.active / self.experts).to(
            gates.device
        )
        rows = prior[bins_of(model, timestep, self.bins)]
        loss, _ = prior_loss(gates, chosen, prior, rows, len(routers))
        return {"diffusion_prior": self.weight * loss}


def plain_perceptron(width: int, hidden: int) -> Perceptron:
    """Return the perceptron of the plain block, started as the papers start it."""
    layer = Perceptron(width, inner_dim=hidden, activation_fn="gelu-approximate")
    for linear in (one for one in layer.modules() if isinstance(one, nn.Linear)):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return layer


class TimeGate(nn.Module):
    """Noise level -> probability of each expert, and the choice: softmax first, then the best, not made to add up to 1."""

    def __init__(self, width: int, experts: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.linear = nn.Linear(width, experts)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, time: Tensor) -> RouteDecision:
        """[B, D] or [B, N, D] -> gates and 0/1 choice [B, E] or [B, N, E]."""
        gates = self.linear(nn.functional.silu(time)).softmax(dim=-1)
        best = gates.topk(self.active, dim=-1).indices
        return RouteDecision("time", gates, torch.zeros_like(gates).scatter(-1, best, 1.0))


_FEW = 4  # so many samples get copies of their experts' weights; more are sorted by expert


class LinearExperts(nn.Module):
    """One linear map an expert, zero at the start so that every block begins as the plain one."""

    def __init__(self, width: int, experts: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.weight = nn.Parameter(torch.zeros(experts, width, width))  # x @ weight, as released
        self.bias = nn.Parameter(torch.zeros(experts, width))

    def forward(self, x: Tensor, decision: RouteDecision) -> Tensor:
        """x [B, N, D] -> sum of the chosen experts' answers times their gates [B, N, D]; the others are not computed."""
        gates, active = decision.gates, decision.active
        assert gates is not None
        assert active is not None
        if gates.dim() == 3:
            return self.reference(x, decision)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)  # casting by layers leaves them in their own type
        if len(x) <= _FEW or torch.compiler.is_compiling():  # without asking which, so that a graph stays whole
            best = active.topk(self.active, dim=-1).indices  # [B, k]
            answers = x.unsqueeze(1) @ weight[best] + bias[best].unsqueeze(2)  # [B, k, N, D]
            return (gates.gather(1, best)[..., None, None] * answers).sum(dim=1)
        out = torch.zeros_like(x)
        for expert in range(len(self.weight)):
            rows = active[:, expert].nonzero().squeeze(1)
            if len(rows):
                answer = x[rows] @ weight[expert] + bias[expert]
                out = out.index_add(0, rows, gates[rows, expert, None, None] * answer)
        return out

    def reference(self, x: Tensor, decision: RouteDecision) -> Tensor:
        """Compute every expert and multiply it by its gate or by zero."""
        assert decision.gates is not None
        assert decision.active is not None
        share = decision.gates * decision.active
        share = share if share.dim() == 3 else share.unsqueeze(1)
        answers = torch.einsum("bnd,edc->benc", x, self.weight.to(x.dtype)) + self.bias.to(x.dtype)[:, None]
        return torch.einsum("benc,bne->bnc", answers, share.expand(-1, x.shape[1], -1))

    def macs(self, rows: int, text: int = 0) -> int:
        """Return the multiply-accumulates of the experts in use for `rows` tokens."""
        return self.active * self.weight[0].numel() * rows

    def activated_parameters(self) -> int:
        """Return the parameters that one token passes through."""
        return self.active * (self.weight[0].numel() + self.bias[0].numel())


class SwitchRouter(nn.Module):
    """m = 1 + sum of the chosen experts; the block sees x m, and x (1 - m) goes past it."""

    def __init__(self, width: int, experts: int, active: int) -> None:
        super().__init__()
        self.gate = TimeGate(width, experts, active)
        self.experts = LinearExperts(width, experts, active)
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(
        self, body: Callable[[Streams, Context], Streams], streams: Streams, context: Context
    ) -> Streams:
        """Run the block `body` on the routed share of the picture's stream."""
        if context.time is None or context.timestep is None:
            raise ValueError(
                "switch experts read the time: this network does not put it into the context of its blocks"
            )
        x, time = streams["hidden_states"], context.time
        if (
            time.dim() == 3 and time.shape[1] < x.shape[1]
        ):  # prompt tokens stand first and have no time of their own
            prompt = time.mean(dim=1, keepdim=True).expand(-1, x.shape[1] - time.shape[1], -1)
            time = torch.cat([prompt, time], dim=1)
        decision = self.gate(time)
        self.seen = (decision.gates, context.timestep) if self.training else None
        mask = 1 + self.experts(x, decision)
        made = body(streams | {"hidden_states": x * mask}, context)
        return made | {"hidden_states": made["hidden_states"] + (1 - mask) * x}

    def macs(self, rows: int, text: int = 0) -> int:
        """Return the multiply-accumulates of gate and experts for `rows` tokens."""
        return self.gate.linear.weight.numel() + self.experts.macs(rows)


def prior_table(columns: int, bins: int, share: float, alpha: float = 4.0) -> Tensor:
    """Return the 0/1 table [bins, columns] of which paths each noise level should take.

    A band of `share` of the columns, whose start moves from the first to the last place with the `alpha`-th power of the level:
    neighbouring levels share most of their paths, and low noise moves more slowly.
    """
    band = int(columns * share)
    level = torch.linspace(0, 1, bins, dtype=torch.float64)
    start = (level**alpha * (columns - band)).round().long()[:, None]
    place = torch.arange(columns)[None]
    return ((place >= start) & (place < start + band)).float()


def prior_loss(
    gates: Tensor,
    chosen: Tensor,
    prior: Tensor,
    rows: Tensor,
    depth: int,
    gate_order: Tensor | None = None,
    prior_order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the Jensen-Shannon divergence of gates and matched prior, and the matching [columns].

    Args:
        gates: probabilities of all blocks side by side [B, columns]. chosen: 0/1 choices at every noise level [bins, columns].
        prior: the table of `prior_table`. rows: its rows at the samples' own levels [B, columns]. depth: count of blocks.
        gate_order, prior_order: permutations of the columns, drawn where not given, so that equal costs are no bias.
    """
    from scipy.optimize import linear_sum_assignment

    count = gates.shape[-1]
    gate_order = torch.rand(count).argsort() if gate_order is None else gate_order
    prior_order = torch.rand(count).argsort() if prior_order is None else prior_order
    gate_order, prior_order = gate_order.to(gates.device), prior_order.to(gates.device)
    cost = torch.cdist(chosen[:, gate_order].T.float(), prior[:, prior_order].T.to(chosen.device), p=1)
    matching = torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=gates.device)
    ours = gates[:, gate_order].float() / depth
    theirs = rows[:, prior_order][:, matching] / rows.sum(dim=1, keepdim=True)
    middle = (ours + theirs) / 2

    def divergence(p: Tensor) -> Tensor:
        return (p * ((p + _TINY).log() - (middle + _TINY).log())).sum(dim=1)

    return ((divergence(ours) + divergence(theirs)) / 2).mean(), matching


_TINY = 1e-6


def bins_of(model: Any, timestep: Tensor, bins: int) -> Tensor:
    """Return the bin [B] of each time, in the model's own units: 0..bins-1 as they are (DDPM), or 0..1000 (flow) cut evenly."""
    scale = 1.0 if _counted(model) else bins / 1000
    return (timestep.float() * scale).floor().long().clamp(0, bins - 1)


@torch.no_grad()
def selections(model: Any, routers: Sequence[SwitchRouter], bins: int) -> Tensor:
    """Return the 0/1 choices of all blocks at every noise level, [bins, blocks * E]."""
    device = routers[0].experts.weight.device
    levels = torch.arange(bins, device=device)
    times = levels if _counted(model) else (levels + 0.5) * (1000 / bins)
    embedded = model.embed_time(times, routers[0].experts.weight.dtype)
    found = [one.gate(embedded).active for one in routers]
    return torch.cat(found, dim=-1)


def _counted(model: Any) -> bool:
    """Whether time is a count of diffusion steps and not a level on 0..1000."""
    return bool(getattr(model.config, "convention", "flow") == "ddpm")
