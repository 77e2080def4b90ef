"""Switch-DiT and DyDiT at other sizes than the recorded ones, against their released passes written down once more.

The passes below are plain formulas over weights in the official layout, in float64, and share nothing with the networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from dit.convert import find

Weights = dict[str, Tensor]
Inner = Callable[[Tensor], Tensor]
DIT: dict[str, Any] = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1, "num_classes": 5, "learn_sigma": True,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "as recorded": {},
    "eight heads, deep": {"num_heads": 8, "depth": 4},
    "patch 4, no sigma": {"patch_size": 4, "num_heads": 2, "learn_sigma": False, "mlp_ratio": 2.0},
    "odd sizes": {"input_size": 9, "patch_size": 3, "hidden_size": 36, "num_heads": 9, "in_channels": 3},
    "one head": {"num_heads": 1, "hidden_size": 16, "depth": 3},
    "no null class": {"class_dropout_prob": 0.0, "num_heads": 4, "num_classes": 2},
}
ROUTINGS: dict[str, dict[str, Any]] = {
    "two of three": {"name": "DMoE", "taskcount": 1000, "w_JSD": 1, "param": {"num_experts": 3, "k": 2}},
    "one of five": {"name": "DMoE", "taskcount": 60, "w_JSD": 0.25, "param": {"num_experts": 5, "k": 1}},
    "all four": {"name": "DMoE", "taskcount": 200, "w_JSD": 2.0, "param": {"num_experts": 4, "k": 4}},
}


def filled(model: Any) -> Any:
    """Every weight random, so that nothing stands still."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, one in model.named_parameters():
            scale = 1 / math.sqrt(one.shape[-1]) if one.dim() > 1 else 0.3
            one.copy_(scale * torch.randn(one.shape, generator=draw))
            if "gate" in name or "router.heads" in name or "router.groups" in name:
                one.mul_(4)
    return model.eval()


def case(args: dict[str, Any], levels: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    shape = (3, args["in_channels"], args["input_size"], args["input_size"])
    last = args["num_classes"] - (args["class_dropout_prob"] == 0)
    times = torch.tensor([0, levels // 3, levels - 1])
    return {"x": torch.randn(shape, generator=draw), "t": times, "y": torch.tensor([0, 1, last])}


class Pass:
    """DiT's released forward pass; the systems change what stands around and inside of its blocks."""

    def __init__(self, args: dict[str, Any], weights: Weights) -> None:
        self.args, self.w = args, {name: one.double() for name, one in weights.items()}

    def linear(self, name: str, value: Tensor) -> Tensor:
        return F.linear(value, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def time(self, t: Tensor) -> Tensor:
        angles = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        return self.linear("t_embedder.mlp.2", F.silu(self.linear("t_embedder.mlp.0", waves)))

    def whole(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        patch = self.args["patch_size"]
        tokens = F.conv2d(
            x.double(), self.w["x_embedder.proj.weight"], self.w["x_embedder.proj.bias"], stride=patch
        )
        side = tokens.shape[-1]
        tokens = tokens.flatten(2).transpose(1, 2) + self.w["pos_embed"]
        time = self.time(t)
        emb = F.silu(time + self.w["y_embedder.embedding_table.weight"][y])
        for i in range(self.args["depth"]):
            tokens = self.block(i, tokens, time, emb)
        shift, scale = self.linear("final_layer.adaLN_modulation.1", emb).unsqueeze(1).chunk(2, -1)
        out = self.linear("final_layer.linear", norm(tokens) * (1 + scale) + shift)
        out = out.reshape(len(x), side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(len(x), -1, side * patch, side * patch)

    def block(self, i: int, x: Tensor, time: Tensor, emb: Tensor) -> Tensor:
        six = self.linear(f"blocks.{i}.adaLN_modulation.1", emb).unsqueeze(1).chunk(6, -1)
        x = x + six[2] * self.attention(i, norm(x) * (1 + six[1]) + six[0], time)
        return x + six[5] * self.perceptron(i, norm(x) * (1 + six[4]) + six[3], x, time)

    def attention(self, i: int, x: Tensor, time: Tensor) -> Tensor:
        heads = self.args["num_heads"]
        parts = self.linear(f"blocks.{i}.attn.qkv", x).reshape(*x.shape[:2], 3, heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        answer = (weights @ v).transpose(1, 2) * self.heads(i, time)[:, None, :, None]
        return self.linear(f"blocks.{i}.attn.proj", answer.flatten(2))

    def perceptron(self, i: int, x: Tensor, residual: Tensor, time: Tensor) -> Tensor:
        hidden = self.linear(f"blocks.{i}.mlp.fc1", x)
        groups = self.groups(i, time)
        hidden = hidden * groups.repeat_interleave(hidden.shape[-1] // groups.shape[1], dim=1)[:, None]
        return self.linear(f"blocks.{i}.mlp.fc2", F.gelu(hidden, approximate="tanh")) * self.tokens(
            i, residual
        )

    def heads(self, i: int, time: Tensor) -> Tensor:
        return torch.ones(len(time), self.args["num_heads"]).double()

    groups = heads

    def tokens(self, i: int, residual: Tensor) -> Tensor:
        return torch.ones_like(residual[..., :1])


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


class SwitchPass(Pass):
    """Each block works on x * m and returns its answer + (1 - m) * x; m follows the time alone."""

    def __init__(self, args: dict[str, Any], weights: Weights, routing: dict[str, Any]) -> None:
        super().__init__(args, weights)
        self.routing = routing

    def gates(self, i: int, time: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.linear(f"routers.{i}.f_gate.1", F.silu(time)).softmax(-1)
        best = gates.topk(self.routing["param"]["k"], dim=-1).indices
        return gates, torch.zeros_like(gates).scatter(1, best, 1.0)

    def block(self, i: int, x: Tensor, time: Tensor, emb: Tensor) -> Tensor:
        gates, chosen = self.gates(i, time)
        w, b = self.w[f"routers.{i}.experts.w"], self.w[f"routers.{i}.experts.b"]
        mask = torch.ones_like(x)
        for e in range(gates.shape[1]):
            mask = mask + (gates * chosen)[:, e, None, None] * (x @ w[e] + b[e].reshape(1, 1, -1))
        return super().block(i, x * mask, time, emb) + (1 - mask) * x

    def prior(self, t: Tensor, gate_order: Tensor, prior_order: Tensor) -> Tensor:
        """The diffusion prior loss, with its weight."""
        levels, param = self.routing["taskcount"], self.routing["param"]
        columns = self.args["depth"] * param["num_experts"]
        band = int(columns * (param["k"] / param["num_experts"]))
        table = torch.zeros(levels, columns).double()
        for level in range(levels):
            start = round((level / (levels - 1)) ** 4 * (columns - band))
            table[level, start : start + band] = 1
        everything = [self.gates(i, self.time(torch.arange(levels))) for i in range(self.args["depth"])]
        chosen = torch.cat([one[1] for one in everything], 1)[:, gate_order]
        ours = torch.cat([one[0] for one in everything], 1)[t][:, gate_order] / self.args["depth"]
        table = table[:, prior_order]
        cost = (chosen[:, :, None] - table[:, None, :]).abs().sum(0)
        table = table[:, linear_sum_assignment(cost.numpy())[1]]
        theirs = table[t] / table[t].sum(1, keepdim=True)
        middle = ((ours + theirs) / 2 + 1e-6).log()
        both = [(one * ((one + 1e-6).log() - middle)).sum(1) for one in (ours, theirs)]
        return self.routing["w_JSD"] * (both[0] + both[1]).mean() / 2


class DynamicPass(Pass):
    """Heads and hidden channels that the time leaves on, tokens that need the perceptron; with draws, as in training."""

    draws: dict[str, Tensor]
    temperature = 5.0

    def on(self, kind: str, i: int, logits: Tensor) -> Tensor:
        if self.draws:
            first, second = (self.draws[f"exp.{i}.{kind}.{n}"].double() for n in (1, 2))
            logits = (logits - first.log() + second.log()) / self.temperature
        return (logits > 0).double()

    def heads(self, i: int, time: Tensor) -> Tensor:
        return F.pad(self.on("attn", i, self.linear(f"blocks.{i}.attn_rate.router", time)), (1, 0), value=1.0)

    def groups(self, i: int, time: Tensor) -> Tensor:
        return F.pad(self.on("mlp", i, self.linear(f"blocks.{i}.mlp_rate.router", time)), (1, 0), value=1.0)

    def tokens(self, i: int, residual: Tensor) -> Tensor:
        name = f"blocks.{i}.token_selection.mlp_head"
        self.kept.append(
            self.on("token", i, self.linear(f"{name}.2", self.linear(f"{name}.0", residual).relu()))
        )
        return self.kept[-1]

    def run(self, given: dict[str, Tensor], draws: dict[str, Tensor]) -> dict[str, Tensor]:
        self.draws, self.kept = draws, list[Tensor]()
        made = {"model": self.whole(given["x"], given["t"], given["y"])}
        time, depth = self.time(given["t"]), range(self.args["depth"])
        made["attn_head_mask"] = torch.stack([self.heads(i, time) for i in depth], 1)
        made["mlp_group_mask"] = torch.stack([self.groups(i, time) for i in depth], 1)
        return made | {"token_mask": torch.stack(self.kept, 1)}


def close(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours.detach().double(), wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=list(ROUTINGS))
@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_switch_is_the_released_pass_at_any_size(size: dict[str, Any], routing: dict[str, Any]) -> None:
    system, args = find("Switch-DiT"), DIT | size
    model = filled(system.build({"model": args, "routing": routing}, {}))
    reference = SwitchPass(args, system.to_official(model), routing)
    given = case(args, routing["taskcount"])
    with torch.no_grad():
        close(system.run(model, given)["model"], reference.whole(given["x"], given["t"], given["y"]))
        if args["class_dropout_prob"] == 0:
            return
        draw = torch.Generator().manual_seed(7)
        columns = args["depth"] * routing["param"]["num_experts"]
        orders = {name: torch.rand(columns, generator=draw) for name in ("rand_gate", "rand_prior")}
        made = system.run(model, given | orders | {"rand_label": torch.tensor([0.05, 0.5, 0.9])})
        label = torch.tensor([args["num_classes"], 1, given["y"][2]])
        close(made["model"], reference.whole(given["x"], given["t"], label))
        wanted = reference.prior(given["t"], orders["rand_gate"].argsort(), orders["rand_prior"].argsort())
        close(made["aux_loss"], wanted)


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("temperature", [5, 1])
def test_dydit_is_the_released_pass_at_any_size(size: dict[str, Any], temperature: float) -> None:
    system, args = find("DyDiT"), DIT | size
    settings = {
        "tau": temperature,
        "flops_model": "DiT-B/4",
        "token_target_ratio": 0.3,
        "token_loss_ratio": 1.5,
    }
    model = filled(system.build(args, settings))
    model.official_settings = {"class_dropout_prob": args["class_dropout_prob"]} | settings
    reference = DynamicPass(args, system.to_official(model))
    reference.temperature = temperature
    given = case(args, 1000)
    with torch.no_grad():
        wanted, made = reference.run(given, {}), system.run(model, given)
        assert made.keys() == wanted.keys()
        assert any(0 < float(one.mean()) < 1 for name, one in wanted.items() if "mask" in name)
        for name, value in wanted.items():
            close(made[name], value)
        if args["class_dropout_prob"] == 0:
            return
        draws = drawn(args, len(given["t"]))
        made = system.run(model, given | draws | {"rand_label": torch.tensor([0.05, 0.5, 0.9])})
        label = torch.tensor([args["num_classes"], 1, given["y"][2]])
        wanted = reference.run(given | {"y": label}, draws)
        for name, value in wanted.items():
            close(made[name], value)
    attention = 64 * (4 * 768**2 + 2 * 64 * 768)
    perceptron = 64 * 8 * 768**2
    heads, groups = (wanted[name].mean(2) for name in ("attn_head_mask", "mlp_group_mask"))
    spent = heads * attention + groups * wanted["token_mask"].mean((2, 3)) * perceptron
    rate = spent.sum(1).mean() / (args["depth"] * (attention + perceptron))
    close(made["flops_rate"], rate)
    close(made["flops_loss"], 1.5 * (rate - 0.3) ** 2)


def drawn(args: dict[str, Any], batch: int) -> dict[str, Tensor]:
    """Unit-exponential draws of the gates of a training pass."""
    draw = torch.Generator().manual_seed(9)
    heads, tokens = args["num_heads"] - 1, (args["input_size"] // args["patch_size"]) ** 2
    shapes = {"attn": (batch, heads), "token": (batch, tokens, 1), "mlp": (batch, heads)}
    return {
        f"exp.{i}.{kind}.{n}": torch.empty(shape).exponential_(generator=draw)
        for i in range(args["depth"])
        for kind, shape in shapes.items()
        for n in (1, 2)
    }


def test_a_wrong_size_is_seen() -> None:
    """The pass above tells networks apart: of other heads, the same weights give another picture."""
    system = find("Switch-DiT")
    model = filled(system.build({"model": DIT, "routing": ROUTINGS["two of three"]}, {}))
    weights = system.to_official(model)
    assert isinstance(model, nn.Module)
    given = case(DIT, 1000)
    other = SwitchPass(DIT | {"num_heads": 4}, weights, ROUTINGS["two of three"])
    with torch.no_grad():
        out = system.run(model, given)["model"]
        assert (out - other.whole(given["x"], given["t"], given["y"])).abs().max() > 1e-3
