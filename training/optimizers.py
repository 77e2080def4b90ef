"""Optimizers over float32 master weights, so that the network itself can compute in bfloat16.

Paper: Mixed Precision Training, Micikevicius et al. 2017, arXiv:1710.03740; Muon, Jordan et al. 2024 (orthogonalised
momentum for the inner matrices, AdamW for the rest).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

OUTER = ("embed", "modulation", "proj_out.proj", "norm")
"""Parts of names that stay with AdamW: what reads or writes the network's ends, vectors, and modulation."""


class Master:
    """Float32 copies of a model's weights, their moving average, and the optimizers that move them."""

    def __init__(self, model: nn.Module, *, name: str, rate: float, matrix_rate: float, decay: float, ema: float) -> None:
        self.names, self.live = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
        self.weights = [p.detach().float().clone().requires_grad_() for p in self.live]
        self.average = [w.detach().clone() for w in self.weights]
        self.ema, self.steps = ema, 0
        inner = [self._is_inner(n, w) and name == "muon" for n, w in zip(self.names, self.weights, strict=True)]
        vectors = [w for w, muon in zip(self.weights, inner, strict=True) if not muon]
        self.optimizers: list[torch.optim.Optimizer] = []
        if vectors:  # an adapter may be matrices alone
            self.optimizers.append(torch.optim.AdamW(vectors, lr=rate, betas=(0.9, 0.99), weight_decay=decay, fused=True))
        if any(inner):
            matrices = [w for w, muon in zip(self.weights, inner, strict=True) if muon]
            self.optimizers.append(
                torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            )
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]

    @staticmethod
    def _is_inner(name: str, weight: Tensor) -> bool:
        return weight.dim() == 2 and not any(part in name for part in OUTER)

    def step(self, factor: float, clip: float) -> float:
        """Move the weights by the live model's gradients at `factor` of the full rate; return the gradient's norm."""
        for weight, live in zip(self.weights, self.live, strict=True):
            weight.grad = live.grad.float() if live.grad is not None else torch.zeros_like(weight)
            live.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.weights, clip)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * factor
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1
        with torch.no_grad():
            torch._foreach_copy_(list(self.live), self.weights)
            keep = min(self.ema, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.average, self.weights, 1 - keep)
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """Return everything a resumed run needs, as named tensors."""
        tensors = {f"weight.{n}": w.detach() for n, w in zip(self.names, self.weights, strict=True)}
        tensors |= {f"average.{n}": w for n, w in zip(self.names, self.average, strict=True)}
        tensors["steps"] = torch.tensor(self.steps)
        for i, optimizer in enumerate(self.optimizers):
            for index, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{index}.{key}": torch.as_tensor(v) for key, v in values.items()}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state` returned. Raises: KeyError where a weight is missing."""
        with torch.no_grad():
            for n, weight, average, live in zip(self.names, self.weights, self.average, self.live, strict=True):
                weight.copy_(tensors[f"weight.{n}"])
                average.copy_(tensors[f"average.{n}"])
                live.copy_(weight)
        self.steps = int(tensors["steps"])
        for i, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Any]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer.{i}."):
                    _, _, index, key = name.split(".", 3)
                    state.setdefault(int(index), {})[key] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def averaged(self) -> dict[str, Tensor]:
        """Return the moving average as a state dict of the trained parameters."""
        return dict(zip(self.names, self.average, strict=True))
