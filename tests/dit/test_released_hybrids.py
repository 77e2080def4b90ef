"""PT-DiT and Nitro-E at other sizes than the recorded ones, against their released passes written down once more.

The passes below are plain formulas over weights in the official layout, in float64, and share nothing with the networks.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dit.convert import find

PTDIT: dict[str, Any] = {
    "num_heads": 2, "head_dim": 16, "num_layers": 2, "cross_attention_dim": 32, "sample_size": 8, "frame": 1, "patch_size": 2,
    "caption_channels": 6, "compress_ratios": [1, 2, 2], "proxy_compress_ratios": [1, 2, 2], "in_channels": 4,
    "out_channels": 8, "attention_bias": True, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "shift_window": True,
}  # fmt: skip
NITRO: dict[str, Any] = {
    "sample_size": 16, "patch_size": 1, "in_channels": 3, "attention_head_dim": 8, "num_attention_heads": 2,
    "caption_channels": 6, "caption_projection_dim": 16, "out_channels": 3, "pos_embed_max_size": 16,
}  # fmt: skip


def filled(model: Any) -> Any:
    """Every weight random, those of norms around one, so that nothing stands still."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, one in model.named_parameters():
            scale = 0.7 / math.sqrt(one.shape[-1]) if one.dim() > 1 else 0.2
            one.copy_(
                scale * torch.randn(one.shape, generator=draw) + ("norm" in name and name.endswith("weight"))
            )
    return model.eval()


def norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def waves(width: int, where: Tensor) -> Tensor:
    """Sines, then cosines, of places [N]."""
    steps = 10000 ** (-torch.arange(width // 2).double() / (width // 2))
    angles = where.double()[:, None] * steps
    return torch.cat([angles.sin(), angles.cos()], 1)


class Pass:
    """What both releases share: weights by name, time, attention."""

    heads: int

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.w = {name: one.double() for name, one in weights.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight = self.w[f"{name}.weight"].flatten(1)  # maps of 1 x 1 pixels too
        return F.linear(x, weight, self.w.get(f"{name}.bias"))

    def gelu(self, first: str, last: str, x: Tensor) -> Tensor:
        return self.linear(last, F.gelu(self.linear(first, x), approximate="tanh"))

    def time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding [B, D], and the vectors that all blocks share [B, 6, D]."""
        angles = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
        name = "adaln_single.emb.timestep_embedder.linear_"
        inner = F.silu(self.linear(f"{name}1", torch.cat([angles.cos(), angles.sin()], 1)))
        time = self.linear(f"{name}2", inner)
        return time, self.linear("adaln_single.linear", F.silu(time)).unflatten(1, (6, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """Heads [B, N, K, d] -> [B, N, D]."""
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        return ((q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def attention(self, name: str, x: Tensor, y: Tensor | None = None, bias: Tensor | float = 0.0) -> Tensor:
        y = x if y is None else y
        maps = (("to_q", x), ("to_k", y), ("to_v", y))
        q, k, v = (self.linear(f"{name}.{part}", one).unflatten(-1, (self.heads, -1)) for part, one in maps)
        return self.linear(f"{name}.to_out.0", self.attend(q, k, v, bias))


class ProxyPass(Pass):
    """PT-DiT; modulation is dealt out to windows in the released order."""

    def __init__(self, args: dict[str, Any], weights: dict[str, Tensor]) -> None:
        super().__init__(weights)
        self.args, self.heads = args, args["num_heads"]

    def layer(self, name: str, x: Tensor) -> Tensor:
        x = norm(x, self.args["norm_eps"])
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"] if f"{name}.weight" in self.w else x

    def windows(self, x: Tensor) -> Tensor:
        """[B, F, H, W, D] -> [B * windows, tokens of one, D]."""
        f, h, w = self.args["compress_ratios"]
        x = x.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, f))
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)

    def back(self, x: Tensor, shape: torch.Size) -> Tensor:
        f, h, w = self.args["compress_ratios"]
        x = x.reshape(shape[0], shape[1] // f, shape[2] // h, shape[3] // w, f, h, w, -1)
        return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(shape)

    def proxies(self, x: Tensor) -> Tensor:
        """Windows first; a proxy for each fine place, the mean over frames and coarse ones."""
        sides, coarse = self.args["compress_ratios"], self.args["proxy_compress_ratios"]
        rows, columns = sides[1] // coarse[1], sides[2] // coarse[2]
        cut = self.windows(x).unflatten(1, (sides[0], sides[1] // rows, rows, sides[2] // columns, columns))
        return cut.mean((1, 2, 4)).flatten(1, 2).reshape(len(x), -1, x.shape[-1])

    def apart(self, shape: torch.Size) -> Tensor:
        """-10000 between tokens of a shifted window that were no neighbours, [windows, M, M]."""
        label = torch.zeros(1, *shape[1:4], 1).double()
        for axis, (side, count) in enumerate(zip(self.args["compress_ratios"], shape[1:4], strict=True)):
            region = torch.zeros(count).double()
            region[count - side :] = 1
            if side // 2:
                region[count - side // 2 :] = 2
            else:
                region[:] = 0
            label = label * 3 + region.reshape([-1 if i == axis + 1 else 1 for i in range(5)])
        flat = self.windows(label)[..., 0]
        return -10000.0 * (flat[:, None, :] != flat[:, :, None]).double()

    def run(self, picture: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        patch = self.args["patch_size"]
        weight, bias = self.w["pos_embed.proj.weight"], self.w["pos_embed.proj.bias"]
        frames = [F.conv2d(one.double(), weight, bias, stride=patch) for one in picture.unbind(2)]
        x = torch.stack(frames, 1).movedim(2, -1)  # [B, F, H, W, D]
        x = x + self.places(x.shape)
        text = text.double()
        if self.args["caption_channels"]:
            text = self.gelu("caption_projection.linear_1", "caption_projection.linear_2", text)
        time, shared = self.time(t)
        deaf = (1 - mask.double())[:, None, None] * -10000.0
        for i in range(self.args["num_layers"]):
            x = self.block(f"transformer_blocks.{i}", x, shared, text, deaf)
        shift, scale = (self.w["scale_shift_table"] + time[:, None])[:, :, None, None, None].unbind(1)
        x = self.linear("proj_out", norm(x) * (1 + scale) + shift)
        x = x.unflatten(-1, (patch, patch, -1)).permute(0, 6, 1, 2, 4, 3, 5)
        return x.flatten(5, 6).flatten(3, 4)

    def places(self, shape: torch.Size) -> Tensor:
        width, scale = shape[-1], max(self.args["sample_size"] // 64, 1)
        frame = waves(width // 4, torch.arange(shape[1]))
        row, column = (waves(3 * width // 8, torch.arange(count) / scale) for count in shape[2:4])
        parts = (frame[:, None, None], column[None, None], row[None, :, None])
        return torch.cat([one.expand(*shape[1:4], -1) for one in parts], -1)

    def block(self, name: str, x: Tensor, shared: Tensor, text: Tensor, deaf: Tensor) -> Tensor:
        w, shape, flat = self.w, x.shape, (len(x), -1, x.shape[-1])
        proxies = self.proxies(x)
        proxies = proxies + self.attention(f"{name}.proxy_attn1", self.layer(f"{name}.proxy_norm1", proxies))
        heard = self.layer(f"{name}.proxy_cross_norm", proxies)
        seen = self.attention(
            f"{name}.pvisual_attn2", self.layer(f"{name}.norm_before", x.reshape(flat)), heard
        )
        x = self.windows(x + self.linear(f"{name}.linear_1_visual", seen).reshape(shape))
        vectors = w[f"{name}.scale_shift_table"] + shared
        six = vectors.repeat(len(x) // shape[0], 1, 1)[:, :, None].unbind(1)
        inner = self.layer(f"{name}.norm1", x) * (1 + six[1]) + six[0]
        x = x + six[2] * self.attention(f"{name}.attn1", inner)
        if self.args["shift_window"]:
            x = x + self.shifted(name, x, shared, shape)
        x = self.back(x, shape).reshape(flat)
        x = self.windows((x + self.attention(f"{name}.attn2", x, text, deaf)).reshape(shape))
        inner = self.layer(f"{name}.norm2", x) * (1 + six[4]) + six[3]
        return self.back(x + six[5] * self.gelu(f"{name}.ff.net.0.proj", f"{name}.ff.net.2", inner), shape)

    def shifted(self, name: str, x: Tensor, shared: Tensor, shape: torch.Size) -> Tensor:
        moves, axes = [side // 2 for side in self.args["compress_ratios"]], (1, 2, 3)
        three = self.w[f"{name}.proxy_scale_shift_table"] + shared[:, :3]
        shift, scale, gate = three.repeat(len(x) // shape[0], 1, 1)[:, :, None].unbind(1)
        rolled = self.windows(self.back(x, shape).roll([-one for one in moves], axes))
        bias = self.apart(shape).repeat(shape[0], 1, 1)[:, None]
        inner = self.layer(f"{name}.shift_window_norm", rolled) * (1 + scale) + shift
        made = self.back(self.attention(f"{name}.attn3", inner, bias=bias), shape).roll(moves, axes)
        return self.linear(f"{name}.linear_2", gate * self.windows(made))


class NitroPass(Pass):
    """E-MMDiT: 4, 16 and 4 blocks, tokens compressed in the middle."""

    groups = (4, 16, 4)

    def __init__(self, args: dict[str, Any], weights: dict[str, Tensor]) -> None:
        super().__init__(weights)
        self.args, self.heads = args, args["num_attention_heads"]

    def run(
        self, picture: Tensor, t: Tensor, text: Tensor, skip: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        patch = self.args["patch_size"]
        weight, bias = self.w["pos_embed.proj.weight"], self.w["pos_embed.proj.bias"]
        x = F.conv2d(picture.double(), weight, bias, stride=patch)
        side = x.shape[-1]
        x = x.flatten(2).mT + self.places(side)
        text, shared = self.linear("context_embedder", text.double()), self.time(t)[1]
        first = x
        for group, count in enumerate(self.groups):
            for i in range(count):
                if i not in skip:
                    x, text = self.block(group, i, x, text, shared)
            if group == 0:
                first, x = x, self.compressed(x, side)
            if group == 1:
                x = self.reconstructed(x, first, side) + self.places(side)
        out = self.linear("proj_out", norm(x)).unflatten(1, (side, side)).unflatten(-1, (patch, patch, -1))
        out = out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return out, [self.projected(i, first) for i in range(len(self.args.get("z_dims", [])))]

    def places(self, side: int) -> Tensor:
        largest = self.args["pos_embed_max_size"]
        base = self.args["sample_size"] // self.args["patch_size"]
        line = torch.arange(largest).double() / (largest / base) / max(self.args["sample_size"] // 16, 1)
        start, width = (largest - side) // 2, self.w["pos_embed.proj.bias"].shape[0]
        one = waves(width // 2, line[start : start + side])
        return torch.cat([one.repeat(side, 1), one.repeat_interleave(side, 0)], 1)

    def projected(self, i: int, x: Tensor) -> Tensor:
        x = F.silu(self.linear(f"projectors.{i}.2", F.silu(self.linear(f"projectors.{i}.0", x))))
        return self.linear(f"projectors.{i}.4", x)

    def compressed(self, x: Tensor, side: int) -> Tensor:
        picture, name = x.mT.unflatten(2, (side, side)), "tokencompressor.0.0.body"
        cut = {n: F.pixel_unshuffle(picture, n).flatten(2).mT for n in (2, 4)}
        return torch.cat([self.gelu(f"{name}{n}x.1", f"{name}{n}x.3", one) for n, one in cut.items()], 1)

    def reconstructed(self, x: Tensor, first: Tensor, side: int) -> Tensor:
        name, parts = "tokenreconstructor.0.0", []
        for n, one in zip((2, 4), x.split([side**2 // 4, side**2 // 16], 1), strict=True):
            picture = F.pixel_shuffle(one.mT.unflatten(2, (side // n, side // n)), n).flatten(2).mT
            parts.append(self.gelu(f"{name}.body{n}x.1", f"{name}.body{n}x.3", picture))
        return self.gelu(f"{name}.mergers.0", f"{name}.mergers.2", torch.cat([*parts, first], -1))

    def block(self, group: int, i: int, x: Tensor, text: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        name, last = f"block_groups.{group}.{i}", (group, i) == (2, 3)
        image = self.vectors(name, "", shared)
        prompt = image if last else self.vectors(name, "_c", shared)
        words = self.affine(f"{name}.norm1_context", text)
        if not last:
            words = words * (1 + prompt[1]) + prompt[0]
        index = sum(self.groups[:group]) + i if self.args.get("use_sub_attn", True) else 0
        given = self.affine(f"{name}.norm1", x) * (1 + image[1]) + image[0]
        answer, answer_text = self.joint(f"{name}.attn", given, words, index)
        x = x + image[2] * self.linear(f"{name}.attn.to_out.0", answer)
        inner = norm(x) * (1 + image[4]) + image[3]
        x = x + image[5] * self.gelu(f"{name}.ff.net.0.proj", f"{name}.ff.net.2", inner)
        if last:
            return x, text
        text = text + prompt[2] * self.linear(f"{name}.attn.to_add_out", answer_text)
        inner = norm(text) * (1 + prompt[4]) + prompt[3]
        added = self.gelu(f"{name}.ff_context.net.0.proj", f"{name}.ff_context.net.2", inner)
        return x, text + prompt[5] * added

    def vectors(self, name: str, stream: str, shared: Tensor) -> tuple[Tensor, ...]:
        bias, scale = (self.w[f"{name}.scale_shift_{kind}{stream}"] for kind in ("bias", "scale"))
        return (bias + shared * (1 + scale)).unsqueeze(2).unbind(1)

    def affine(self, name: str, x: Tensor) -> Tensor:
        return norm(x, 1e-5) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def joint(self, name: str, x: Tensor, text: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Full attention, groups of single tokens, groups of four in a row, in turns; a token hears its own group."""
        maps = {"q": ("to_q", "add_q_proj"), "k": ("to_k", "add_k_proj"), "v": ("to_v", "add_v_proj")}
        scales = {"q": ("norm_q", "norm_added_q"), "k": ("norm_k", "norm_added_k"), "v": ("", "")}
        q, k, v = (
            torch.cat(
                [
                    self.mapped(f"{name}.{maps[n][i]}", f"{name}.{scales[n][i]}", one)
                    for i, one in enumerate((x, text))
                ],
                1,
            )
            for n in "qkv"
        )
        run = (0, 1, 4)[index % 3]
        group = torch.cat(
            [torch.arange(one.shape[1]) // max(run, 1) % (4 if run else 1) for one in (x, text)]
        )
        bias = torch.where(group[:, None] == group[None], 0.0, -math.inf).double()
        made = self.attend(q, k, v, bias)
        return made[:, : x.shape[1]], made[:, x.shape[1] :]

    def mapped(self, name: str, scale: str, x: Tensor) -> Tensor:
        made = self.linear(name, x).unflatten(-1, (self.heads, -1))
        weight = self.w.get(f"{scale}.weight")
        return (
            made if weight is None else made / (made.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        )


def close(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours.detach().double(), wanted, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compress_ratios": [1, 4, 2], "num_heads": 4, "head_dim": 8, "num_layers": 3},
        {"frame": 4, "compress_ratios": [2, 2, 4], "proxy_compress_ratios": [2, 1, 2]},
        {"compress_ratios": [1, 4, 4], "proxy_compress_ratios": [1, 2, 2], "attention_bias": False},
        {"shift_window": False, "norm_elementwise_affine": True, "norm_eps": 1e-5},
        {"patch_size": 1, "sample_size": 4, "out_channels": 4, "in_channels": 3},
        {"caption_channels": None, "sample_size": 64},
    ],
    ids=str,
)
def test_ptdit_is_the_released_pass_at_any_size(changes: dict[str, Any]) -> None:
    system, args = find("PT-DiT"), PTDIT | changes
    model = filled(system.build(args, {}))
    reference = ProxyPass(args, system.to_official(model))
    draw = torch.Generator().manual_seed(1)
    side = min(args["sample_size"], 8)
    for rows in (side, 2 * side):
        given = {
            "hidden_states": torch.randn(2, args["in_channels"], args["frame"], rows, side, generator=draw),
            "timestep": torch.tensor([20.0, 801.5]),
            "encoder_hidden_states": torch.randn(2, 5, args["caption_channels"] or 32, generator=draw),
            "encoder_attention_mask": (torch.arange(5) < torch.tensor([[5], [3]])).long(),
        }
        with torch.no_grad():
            close(system.run(model, given)["sample"], reference.run(*given.values()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "in_channels": 5,
            "out_channels": 4,
            "caption_channels": 9,
        },
        {"sample_size": 32, "patch_size": 2, "pos_embed_max_size": 21},
        {"use_sub_attn": False, "qk_norm": None},
        {"repa_depth": 3, "projector_dim": 10, "z_dims": [4, 7]},
    ],
    ids=str,
)
def test_nitro_is_the_released_pass_at_any_size(changes: dict[str, Any]) -> None:
    system, args = find("Nitro-E"), NITRO | changes
    model = filled(system.build(args, {}))
    reference = NitroPass(args, system.to_official(model))
    draw = torch.Generator().manual_seed(1)
    given = {
        "hidden_states": torch.randn(
            2, args["in_channels"], args["sample_size"], args["sample_size"], generator=draw
        ),
        "timestep": torch.tensor([20.0, 801.5]),
        "encoder_hidden_states": torch.randn(2, 16, args["caption_channels"], generator=draw),
    }
    with torch.no_grad():
        wanted, projections = reference.run(*given.values())
        close(system.run(model, given)["sample"], wanted)
        skipped = system.run(model, given | {"skip_layers": torch.tensor([0, 2])})["sample"]
        close(skipped, reference.run(*given.values(), skip=(0, 2))[0])
        if "z_dims" in args:
            made = system.run(model, given | {"training": torch.tensor(True)})
            for i, one in enumerate(projections):
                close(made[f"zs.{i}"], one)
