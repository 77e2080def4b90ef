"""Weights under their official names applied by hand, and folders of recordings, for tests of other configurations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


class Official:
    """Weights by their official names, applied by hand."""

    def __init__(self, weights: Weights, heads: int) -> None:
        self.weights, self.heads = weights, heads

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def normed(self, name: str, x: Tensor) -> Tensor:
        """Root mean square norm of each head, where the model has one."""
        if f"{name}.weight" not in self.weights:
            return x
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weights[f"{name}.weight"]

    def project(self, name: str, norm: str | None, x: Tensor) -> Tensor:
        found = self.split(self.linear(name, x))
        return found if norm is None else self.normed(norm, found)

    def two(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.linear_2", F.silu(self.linear(f"{name}.linear_1", x)))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.net.2", F.gelu(self.linear(f"{name}.net.0.proj", x), approximate="tanh"))

    def time_text(self, name: str, time: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        found = self.two(f"{name}.timestep_embedder", waves(time)) + self.two(f"{name}.text_embedder", pooled)
        return found if guidance is None else found + self.two(f"{name}.guidance_embedder", waves(guidance))

    def vectors(self, name: str, emb: Tensor, count: int) -> tuple[Tensor, ...]:
        return self.linear(f"{name}.linear", F.silu(emb))[:, None].chunk(count, dim=-1)


def waves(time: Tensor) -> Tensor:
    angles = time[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def plain(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def heard(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def turned(x: Tensor, ids: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Turn pairs of neighbouring channels [B, K, N, head size] by positions [N, axes]."""
    angles = torch.cat(
        [ids[:, one, None] * 10000 ** (-torch.arange(0, size, 2) / size) for one, size in enumerate(axes)], -1
    )
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack(
        [a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1
    ).flatten(-2)


def read(folder: Path) -> tuple[dict[str, Any], Weights, Weights]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors")


def write(folder: Path, config: dict[str, Any], weights: Weights, io: Weights) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in (("weights", weights), ("io", io)):
        save_file({key: x.contiguous().clone() for key, x in tensors.items()}, folder / f"{name}.safetensors")
