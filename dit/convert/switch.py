"""Switch-DiT's released layout: DiT's, plus a router a block and the table of the diffusion prior; and its DTR variant.

Code: byeongjun-park/Switch-DiT (MIT), commit 12fa9a5.
Differs: routing "DTR" is read by the arguments of its released configuration; its masks are computed, and stored ones checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit.backbones.dit import DiT
from dit.convert.base import Case, LayoutError, Tensors, check_table, official_args, system
from dit.convert.dit import DiTSystem
from dit.experts.dense import Experts
from dit.experts.dtr import TaskRouter, TaskRouting
from dit.experts.switch import Switch, SwitchRouter, bins_of, prior_loss, prior_table, selections
from dit.routing import RouteDecision
from dit.spec import parse

_ROUTING: dict[str, dict[str, Any]] = {
    "DMoE": {"num_experts": 3, "k": 2},
    "DTR": {"taskcount": 1000, "alpha": 4.0, "beta": 0.8},
}
_PARTS = {
    "f_gate.1.weight": "gate.linear.weight",
    "f_gate.1.bias": "gate.linear.bias",
    "experts.w": "experts.weight",
    "experts.b": "experts.bias",
}
_PRIOR = "prior._unit_mapping"
_ROUTER = re.compile(r"routers\.(\d+)\.(.+)")


@system("Switch-DiT")
class SwitchSystem(DiTSystem):
    """The released Switch-DiT (routing "DMoE") and its predecessor DTR, both with noise and variance at steps 0..999."""

    tolerance = 2e-5

    def build(self, args: Mapping[str, Any], settings: Mapping[str, Any]) -> DiT:
        """Return our DiT for {"model": arguments of `models.DiT`, "routing": its routing configuration}."""
        unknown = sorted(set(args) - {"model", "routing"})
        if unknown:
            raise LayoutError(f"{self.name}: arguments are model and routing, got {unknown[0]!r}")
        model = dict(args.get("model", {}))
        if model.get("num_classes") == 1:
            model["class_dropout_prob"] = 0.0
        experts = _experts(self.name, args.get("routing", {"name": "DMoE"}))
        made = DiT(**self.our_args(model), experts=experts)
        made.official_dropout = model.get("class_dropout_prob", 0.1)
        return made

    def to_ours(self, state: Mapping[str, Tensor], model: nn.Module) -> Tensors:
        """Take the routers and tables out, check the tables, and read the rest as a DiT."""
        rest, ours = {}, {}
        for key, tensor in state.items():
            router = _ROUTER.fullmatch(key)
            if key == "full_time":
                check_table(self.name, tensor.float(), torch.arange(len(tensor)).float(), key)
            elif key == _PRIOR:
                check_table(self.name, tensor, self._prior(model), key)
            elif router and router[2] == "_unit_mapping":
                check_table(self.name, tensor, _task_table(model, int(router[1])), key)
            elif router:
                if router[2] not in _PARTS:
                    raise LayoutError(f"{self.name}: unknown weight {key!r}")
                ours[f"transformer_blocks.{router[1]}.router.{_PARTS[router[2]]}"] = tensor
            else:
                rest[key] = tensor
        return ours | super().to_ours(rest, model)

    def to_official(self, model: nn.Module) -> Tensors:
        """Write the routers and tables beside the layout of DiT."""
        config: Any = model.config
        experts = parse(Experts, config.experts)
        names = {ours: theirs for theirs, ours in _PARTS.items()}
        routed, rest = {}, {}
        for key, tensor in model.state_dict().items():
            place = re.fullmatch(r"transformer_blocks\.(\d+)\.router\.(.+)", key)
            if place:
                routed[f"routers.{place[1]}.{names[place[2]]}"] = tensor
            else:
                rest[key] = tensor
        if isinstance(experts, Switch):
            routed |= {"full_time": torch.arange(experts.bins), _PRIOR: self._prior(model)}
        else:
            routed |= {f"routers.{i}._unit_mapping": _task_table(model, i) for i in range(config.depth)}
        return routed | self.official_of(model, rest)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
        """Run `forward` in evaluation, with guidance of all channels, or in training with its three random draws."""
        extra = set(inputs) - {"x", "t", "y", "cfg_scale", "rand_label", "rand_gate", "rand_prior"}
        if extra or not {"x", "t", "y"} <= set(inputs):
            raise LayoutError(
                f"{self.name}: a case has x, t, y, maybe cfg_scale or rand_*, got {', '.join(sorted(inputs))}"
            )
        x, t, y = inputs["x"], inputs["t"], inputs["y"]
        config: Any = model.config
        if "cfg_scale" in inputs:
            return {"model": self._guided(model, x, t, y, inputs["cfg_scale"], config.in_channels)}
        if "rand_label" not in inputs:
            return {"model": self._official_forward(model, x, t, y)}
        if config.null_class:
            y = torch.where(inputs["rand_label"] < getattr(model, "official_dropout", 0.1), config.num_classes, y)
        model.train()
        try:
            made = {"model": self._official_forward(model, x, t, y)}
            return made | self._training_loss(model, t, inputs)
        finally:
            model.eval()

    def run_observed(self, model: nn.Module, case: Case) -> tuple[Tensors, Tensors]:
        """Watch the blocks by hooks, and gates, choices and masks as the routers make them."""
        seen: Tensors = {}
        handles = []
        for place, router in enumerate(one for one in model.modules() if isinstance(one, SwitchRouter)):

            def gates(_: nn.Module, __: Any, decision: RouteDecision, place: int = place) -> None:
                assert decision.gates is not None
                assert decision.active is not None
                seen.setdefault(f"routers.{place}.probs", decision.gates)  # later calls are the prior's
                seen.setdefault(f"routers.{place}.selected", decision.active)

            def mask(_: nn.Module, __: Any, made: Tensor, place: int = place) -> None:
                seen[f"routers.{place}.mask"] = 1 + made

            handles += [router.gate.register_forward_hook(gates), router.experts.register_forward_hook(mask)]
        try:
            outputs, mids = super().run_observed(model, case)
        finally:
            for handle in handles:
                handle.remove()
        extra = {name: outputs.pop(name) for name in ("matching", "gate_column_counts") if name in outputs}
        return outputs, {name: value for name, value in (mids | seen | extra).items() if name in case.mids}

    def _training_loss(self, model: nn.Module, t: Tensor, inputs: Mapping[str, Tensor]) -> Tensors:
        routers = [one for one in model.modules() if isinstance(one, SwitchRouter)]
        if not routers:
            return {}
        config: Any = model.config
        experts = parse(Experts, config.experts)
        assert isinstance(experts, Switch)
        gates = torch.cat([one.seen[0] for one in routers if one.seen is not None], dim=-1)
        chosen, prior = selections(model, routers, experts.bins), self._prior(model)
        orders = (inputs["rand_gate"].argsort(), inputs["rand_prior"].argsort())
        rows = prior[bins_of(model, t, experts.bins)]
        loss, matching = prior_loss(gates, chosen, prior, rows, len(routers), *orders)
        counts = chosen.sum(dim=0)[orders[0]].long()
        return {"aux_loss": experts.weight * loss, "matching": matching, "gate_column_counts": counts}

    def _prior(self, model: nn.Module) -> Tensor:
        config: Any = model.config
        experts = parse(Experts, config.experts)
        if not isinstance(experts, Switch):
            raise LayoutError(f"{self.name}: {_PRIOR} belongs to routing DMoE")
        return prior_table(config.depth * experts.experts, experts.bins, experts.active / experts.experts)


def _experts(owner: str, routing: Mapping[str, Any]) -> Experts:
    name = routing.get("name", "DMoE")
    if name not in _ROUTING:
        raise LayoutError(f"{owner}: routing is one of {', '.join(_ROUTING)}, got {name!r}")
    given = official_args(f"{owner} {name}", routing.get("param", {}), _ROUTING[name])
    if name == "DTR":
        return TaskRouting(share=given["beta"], alpha=given["alpha"], bins=given["taskcount"], counted=True)
    return Switch(
        experts=given["num_experts"],
        active=given["k"],
        bins=routing.get("taskcount", 1000),
        weight=routing.get("w_JSD", 1),
    )


def _task_table(model: nn.Module, place: int) -> Tensor:
    router = [one for one in model.modules() if isinstance(one, TaskRouter)][place]
    return router.table
