"""VDT against its formulas written out once more, with loops over sites and frames, for sizes that no recording has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, silu

from dit.clip_masks import task_mask
from dit.convert import find

Weights = dict[str, Tensor]
SIZES: list[dict[str, Any]] = [
    {"input_size": 8, "patch_size": 4, "in_channels": 3, "hidden_size": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 3.0,
     "num_classes": 5, "num_frames": 5, "learn_sigma": False},
    {"input_size": 12, "patch_size": 2, "in_channels": 2, "hidden_size": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0,
     "num_classes": 1, "num_frames": 3},
]  # fmt: skip


def waves(places: Tensor, width: int) -> Tensor:
    """[n] -> [n, width]: sines of ever lower frequency, then their cosines."""
    rates = 10000 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = places.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1).float().double()


def attention(x: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    """[n, D] -> [n, D], head by head."""
    q, k, v = linear(x, weights[f"{name}.qkv.weight"], weights[f"{name}.qkv.bias"]).chunk(3, -1)
    size = x.shape[-1] // heads
    parts = []
    for head in range(heads):
        part = slice(head * size, head * size + size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        parts.append(scores.softmax(-1) @ v[:, part])
    return linear(torch.cat(parts, -1), weights[f"{name}.proj.weight"], weights[f"{name}.proj.bias"])


def reference(clip: Tensor, time: float, weights: Weights, size: dict[str, Any]) -> Tensor:
    """Return what the network says of one clip [F, C, S, S] in float64, [F, C or 2 C, S, S]."""
    patch, width, heads, frames = size["patch_size"], size["hidden_size"], size["num_heads"], len(clip)
    side = size["input_size"] // patch

    def lin(x: Tensor, name: str) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    angles = torch.exp(-math.log(10000) * torch.arange(128).float() / 128) * time
    told = lin(torch.cat([angles.cos(), angles.sin()]).double(), "t_embedder.mlp.0")
    told = lin(silu(told), "t_embedder.mlp.2") + weights["y_embedder.embedding_table.weight"][0]
    x = torch.zeros(frames, side * side, width, dtype=torch.float64)
    kernel = weights["x_embedder.proj.weight"].flatten(1)
    for frame in range(frames):
        for row in range(side):
            for column in range(side):
                seen = clip[frame, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                place = torch.cat([waves(torch.tensor([one]), width // 2)[0] for one in (column, row)])
                token = linear(seen.flatten(), kernel, weights["x_embedder.proj.bias"])
                x[frame, row * side + column] = token + place + waves(torch.tensor([frame]), width)[0]
    for block in range(size["depth"]):
        at = f"blocks.{block}."
        norm = (weights[f"{at}temporal_norm1.weight"], weights[f"{at}temporal_norm1.bias"])
        over_time = torch.stack(
            [
                attention(layer_norm(x[:, site], (width,), *norm), weights, f"{at}temporal_attn", heads)
                for site in range(side * side)
            ],
            1,
        )
        x = x + lin(over_time, f"{at}temporal_fc")
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = lin(silu(told), f"{at}adaLN_modulation.1").chunk(
            6
        )
        normed = layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift
        x = x + gate * torch.stack([attention(one, weights, f"{at}attn", heads) for one in normed])
        normed = layer_norm(x, (width,), eps=1e-6) * (1 + scale_mlp) + shift_mlp
        hidden = gelu(lin(normed, f"{at}mlp.fc1"), approximate="tanh")
        x = x + gate_mlp * lin(hidden, f"{at}mlp.fc2")
    shift, scale = lin(silu(told), "final_layer.adaLN_modulation.1").chunk(2)
    said = lin(layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift, "final_layer.linear")
    said = said.reshape(frames, side, side, patch, patch, -1)
    return said.permute(0, 5, 1, 3, 2, 4).reshape(frames, -1, size["input_size"], size["input_size"])


@pytest.mark.parametrize("size", SIZES, ids=["three-heads", "learned-variance"])
def test_sizes_that_were_not_recorded_equal_the_formulas(size: dict[str, Any]) -> None:
    torch.manual_seed(0)
    system = find("VDT")
    model = system.build(size, {}).double().eval()
    for one in model.parameters():
        nn.init.normal_(one, std=0.2)  # nothing is zero, so that nothing hides
    official = {name: value.double() for name, value in system.to_official(model).items()}
    clips = torch.randn(
        2, size["num_frames"], size["in_channels"], *[size["input_size"]] * 2, dtype=torch.float64
    )
    times = torch.tensor([7, 913])
    with torch.no_grad():
        ours = system.run(model, {"x": clips, "t": times})["model"]
        theirs = [
            reference(clip, float(time), official, size) for clip, time in zip(clips, times, strict=True)
        ]
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-4, rtol=1e-4)


def test_what_is_given_replaces_what_is_noisy_and_nothing_else() -> None:
    size = SIZES[0]
    torch.manual_seed(0)
    system = find("VDT")
    model = system.build(size, {}).double().eval()
    for one in model.parameters():
        nn.init.normal_(one, std=0.2)
    official = {name: value.double() for name, value in system.to_official(model).items()}
    clean, noisy = torch.randn(2, 3, 5, 8, 8, dtype=torch.float64)
    mask = task_mask("keyframes", 5, 8, 8, keyframes=[1, 4])
    with torch.no_grad():
        ours = model(noisy[None], torch.tensor([40]), mask=mask, clean=clean[None], return_dict=False)[0]
    mixed = noisy.clone()
    mixed[:, [1, 4]] = clean[:, [1, 4]]
    theirs = reference(mixed.transpose(0, 1), 40.0, official, size).transpose(0, 1)
    torch.testing.assert_close(ours[0], theirs, atol=1e-4, rtol=1e-4)
