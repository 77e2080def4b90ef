"""Recordings of other configurations of EasyControl and UNIC-Adapter, made here by references that share no code with ours.

Each reference is first held against the recording of the released code, where that is beside the project; then it records
sizes, depths, ranks and counts that the recording does not have, and the command must reproduce them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import fidelity

_place = importlib.util.spec_from_file_location("official", Path(__file__).with_name("official.py"))
assert _place is not None
assert _place.loader is not None
official = importlib.util.module_from_spec(_place)
_place.loader.exec_module(official)
Official, heard, plain, turned = official.Official, official.heard, official.plain, official.turned
read, write = official.read, official.write

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"
Weights = dict[str, Tensor]


# EasyControl


def easycontrol(config: dict[str, Any], weights: Weights, given: Weights, strengths: list[float]) -> Tensor:
    """FLUX with conditions as one masked sequence [text, noise, conditions], as the release computes it."""
    sizes, run = config["args"]["transformer"], config["run"]
    net, axes = Official(weights, sizes["num_attention_heads"]), tuple(sizes["axes_dims_rope"])
    high, wide, own = run["latent_height"] // 2, run["latent_width"] // 2, config["args"]["cond_size"] // 16
    text, noise, cond = (given[f"{one}hidden_states"] for one in ("encoder_", "", "cond_"))
    L, N, count = text.shape[1], noise.shape[1], cond.shape[1] // own**2
    guidance = given["guidance"] * 1000 if sizes["guidance_embeds"] else None
    time = given["timestep"] * 1000
    now, still = (
        net.time_text("time_text_embed", one, given["pooled_projections"], guidance)
        for one in (time, 0 * time)
    )
    rows = [[0.0, 0.0, 0.0]] * L + [[0.0, float(i), float(j)] for i in range(high) for j in range(wide)]
    for number in range(count):
        for i in range(own):
            subject = count > 1 and number == 0
            rows += [
                [0.0, i + 64.0, float(j)] if subject else [0.0, i * high / own, j * wide / own]
                for j in range(own)
            ]
    ids = torch.tensor(rows)
    mask = torch.zeros(len(ids), len(ids))
    mask[L + N :] = -1e20
    for number in range(count):
        part = slice(L + N + number * own**2, L + N + (number + 1) * own**2)
        mask[part, part] = 0
    text, noise, cond = (
        net.linear("context_embedder", text),
        net.linear("x_embedder", noise),
        net.linear("x_embedder", cond),
    )

    def low(layer: str, name: str, x: Tensor) -> Tensor:
        """What the LoRAs add to all tokens: to those of each condition its own."""
        parts = []
        for number, part in enumerate(x[:, -count * own**2 :].chunk(count, dim=1)):
            path = f"{layer}.processor.{name}_loras.{number}"
            up, down = weights[f"{path}.up.weight"], weights[f"{path}.down.weight"]
            parts.append(strengths[number] * part @ down.T @ up.T)
        return torch.cat(
            [x.new_zeros(*x.shape[:1], x.shape[1] - count * own**2, parts[0].shape[-1]), *parts], dim=1
        )

    def attention(layer: str, x: Tensor, words: Tensor | None) -> Tensor:
        q, k, v = (net.split(net.linear(f"{layer}.to_{one}", x) + low(layer, one, x)) for one in "qkv")
        q, k = net.normed(f"{layer}.norm_q", q), net.normed(f"{layer}.norm_k", k)
        if words is not None:
            q = torch.cat([net.project(f"{layer}.add_q_proj", f"{layer}.norm_added_q", words), q], dim=2)
            k = torch.cat([net.project(f"{layer}.add_k_proj", f"{layer}.norm_added_k", words), k], dim=2)
            v = torch.cat([net.project(f"{layer}.add_v_proj", None, words), v], dim=2)
        return heard(turned(q, ids, axes), turned(k, ids, axes), v, mask)

    for place in range(sizes["num_layers"]):
        block = f"transformer_blocks.{place}"
        layer = f"{block}.attn"
        ours, theirs = net.vectors(f"{block}.norm1", now, 6), net.vectors(f"{block}.norm1", still, 6)
        told = net.vectors(f"{block}.norm1_context", now, 6)
        inner, inner_c, inner_t = (
            plain(x) * (1 + one[1]) + one[0] for x, one in ((noise, ours), (cond, theirs), (text, told))
        )
        both = attention(layer, torch.cat([inner, inner_c], dim=1), inner_t)
        out = net.linear(f"{layer}.to_out.0", both[:, L:])
        out = out + low(layer, "proj", out)
        said = net.linear(f"{layer}.to_add_out", both[:, :L])
        streams = []
        for x, one, part, name in (
            (noise, ours, out[:, :N], "ff"), (cond, theirs, out[:, N:], "ff"), (text, told, said, "ff_context"),
        ):  # fmt: skip
            x = x + one[2] * part
            streams.append(x + one[5] * net.mlp(f"{block}.{name}", plain(x) * (1 + one[4]) + one[3]))
        noise, cond, text = streams
    joint = torch.cat([text, noise], dim=1)
    for place in range(sizes["num_single_layers"]):
        block = f"single_transformer_blocks.{place}"
        ours, theirs = net.vectors(f"{block}.norm", now, 3), net.vectors(f"{block}.norm", still, 3)
        inner = torch.cat(
            [plain(x) * (1 + one[1]) + one[0] for x, one in ((joint, ours), (cond, theirs))], dim=1
        )
        wide_ = F.gelu(net.linear(f"{block}.proj_mlp", inner), approximate="tanh")
        out = net.linear(
            f"{block}.proj_out", torch.cat([attention(f"{block}.attn", inner, None), wide_], dim=-1)
        )
        joint, cond = joint + ours[2] * out[:, : L + N], cond + theirs[2] * out[:, L + N :]
    scale, shift = net.vectors("norm_out", now, 2)
    return net.linear("proj_out", plain(joint[:, L:]) * (1 + scale) + shift)


@torch.no_grad()
@pytest.mark.skipif(not (FIXTURES / "EasyControl").is_dir(), reason="the recorded runs are not here")
def test_the_reference_of_easycontrol_is_the_released_code() -> None:
    config, weights, io = read(FIXTURES / "EasyControl")
    given = {key.removeprefix("case0.in."): x for key, x in io.items() if key.startswith("case0.in.")}
    one = easycontrol(config, weights, given, [1.0])
    assert float((one - io["case0.out.sample"]).abs().max()) < 2e-5
    given = {key.removeprefix("case2.in."): x for key, x in io.items() if key.startswith("case2.in.")}
    two = easycontrol(config, weights, given, config["run"]["lora_weights_two"])
    assert float((two - io["case2.out.sample"]).abs().max()) < 2e-5


EASY: dict[str, dict[str, Any]] = {
    "one condition, no guidance": {
        "transformer": {"num_layers": 1, "num_single_layers": 3, "attention_head_dim": 12, "num_attention_heads": 3,
                        "axes_dims_rope": [4, 4, 4], "guidance_embeds": False},
        "rank": 3, "cond_size": 48, "n_loras": 1, "run": {"latent_height": 4, "latent_width": 10}, "weights": ([0.8],), "batch": 1,
    },
    "three conditions": {
        "transformer": {"num_layers": 3, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
                        "axes_dims_rope": [2, 4, 2], "guidance_embeds": True},
        "rank": 5, "cond_size": 32, "n_loras": 3, "run": {"latent_height": 10, "latent_width": 6},
        "weights": ([1.0], [0.5, 1.0], [1.0, 0.3, 0.7]), "batch": 3,
    },
    "blocks of two streams alone": {
        "transformer": {"num_layers": 2, "num_single_layers": 0, "attention_head_dim": 8, "num_attention_heads": 1,
                        "axes_dims_rope": [4, 2, 2], "guidance_embeds": True},
        "rank": 1, "cond_size": 64, "n_loras": 2, "run": {"latent_height": 6, "latent_width": 6}, "weights": ([1.0], [1.0, 0.0]),
        "batch": 2,
    },
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(EASY))
def test_other_configurations_of_easycontrol(name: str, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    case = EASY[name]
    transformer = {"patch_size": 1, "in_channels": 16, "joint_attention_dim": 9, "pooled_projection_dim": 7}
    args = {key: case[key] for key in ("rank", "cond_size", "n_loras")}
    args["transformer"] = transformer | case["transformer"]
    words = ("one", "two", "three")
    run = case["run"] | {
        f"lora_weights_{word}": one for word, one in zip(words, case["weights"], strict=False)
    }
    config = {"system": "EasyControl", "args": args, "run": run}
    draw = torch.Generator().manual_seed(7)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    weights = {
        key: noise(*x.shape) * 0.2
        for key, x in FluxTransformer2DModel(**args["transformer"]).state_dict().items()
    }
    width = args["transformer"]["num_attention_heads"] * args["transformer"]["attention_head_dim"]
    for stack, count, parts in (
        ("transformer_blocks", "num_layers", ("q", "k", "v", "proj")),
        ("single_transformer_blocks", "num_single_layers", ("q", "k", "v")),
    ):
        for place in range(args["transformer"][count]):
            for part in parts:
                for number in range(args["n_loras"]):
                    path = f"{stack}.{place}.attn.processor.{part}_loras.{number}"
                    weights[f"{path}.down.weight"] = noise(args["rank"], width) * 0.3
                    weights[f"{path}.up.weight"] = noise(width, args["rank"]) * 0.3
    batch, high, wide = case["batch"], run["latent_height"] // 2, run["latent_width"] // 2
    io: Weights = {}
    for count, strengths in enumerate(case["weights"], start=1):
        given = {
            "hidden_states": noise(batch, high * wide, 16), "encoder_hidden_states": noise(batch, 4, 9),
            "cond_hidden_states": noise(batch, count * (args["cond_size"] // 16) ** 2, 16), "pooled_projections": noise(batch, 7),
            "timestep": torch.rand(batch, generator=draw),
        }  # fmt: skip
        if args["transformer"]["guidance_embeds"]:
            given["guidance"] = torch.full((batch,), 2.5)
        io |= {f"case{count - 1}.in.{key}": x for key, x in given.items()}
        io[f"case{count - 1}.out.sample"] = easycontrol(config, weights, given, strengths)
    write(tmp_path / "other", config, weights, io)
    assert fidelity.main([str(tmp_path / "other")]) == fidelity.HIT
    weights["transformer_blocks.0.attn.processor.proj_loras.0.up.weight"] *= 1.01
    write(tmp_path / "other", config, weights, io)
    assert fidelity.main([str(tmp_path / "other")]) == fidelity.MISS


# UNIC-Adapter


def unic(config: dict[str, Any], weights: Weights, given: Weights, scale: float) -> Tensor:
    """Stable Diffusion 3 with the adapter's stream beside it, as the release computes it."""
    sizes = config["args"]
    net, patch, size = (
        Official(weights, sizes["num_attention_heads"]),
        sizes["patch_size"],
        sizes["attention_head_dim"],
    )
    high, wide = (side // patch for side in given["hidden_states"].shape[-2:])
    N, axes = high * wide, (size // 2, size // 2)
    pairs = [(float(i), float(j)) for i in range(high) for j in range(wide)]
    ids = torch.tensor(pairs + [(0.0, 0.0)] * given["encoder_hidden_states_control"].shape[1])

    def embedded(suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        name, most = f"pos_embed{suffix}", sizes["pos_embed_max_size"]
        x = F.conv2d(
            given[f"hidden_states{suffix}"],
            weights[f"{name}.proj.weight"],
            weights[f"{name}.proj.bias"],
            stride=patch,
        )
        table = weights[f"{name}.pos_embed"].view(most, most, -1)
        top, left = (most - high) // 2, (most - wide) // 2
        x = x.flatten(2).transpose(1, 2) + table[top : top + high, left : left + wide].reshape(1, N, -1)
        emb = net.time_text(
            f"time_text_embed{suffix}", given["timestep"], given[f"pooled_projections{suffix}"]
        )
        return x, net.linear(f"context_embedder{suffix}", given[f"encoder_hidden_states{suffix}"]), emb

    (x, words, emb), (seen, told, emb_c) = embedded(""), embedded("_control")
    for place in range(sizes["num_layers"]):
        block = f"transformer_blocks.{place}"
        last, dual = place == sizes["num_layers"] - 1, place in sizes["dual_attention_layers"]
        streams: dict[str, tuple[Tensor, Tensor | None]] = {}
        crossing: tuple[Tensor, Tensor] | None = None
        for suffix, image, text, vector in (("_control", seen, told, emb_c), ("", x, words, emb)):
            layer = f"{block}.attn{suffix}"
            mods = net.vectors(f"{block}.norm1{suffix}", vector, 9 if dual else 6)
            mods_t = net.vectors(f"{block}.norm1_context{suffix}", vector, 2 if last else 6)
            inner = plain(image) * (1 + mods[1]) + mods[0]
            # The last norm of the text gives its scale first.
            inner_t = plain(text) * (1 + mods_t[0 if last else 1]) + mods_t[1 if last else 0]
            found = []
            for one in "qkv":
                norms = (None, None) if one == "v" else (f"{layer}.norm_{one}", f"{layer}.norm_added_{one}")
                of_image = net.project(f"{layer}.to_{one}", norms[0], inner)
                found.append(
                    torch.cat([of_image, net.project(f"{layer}.add_{one}_proj", norms[1], inner_t)], 2)
                )
            q, k, v = found
            if suffix:
                crossing = turned(k, ids, axes), v
                q, k = turned(q, ids, axes), crossing[0]
            both = heard(q, k, v)
            out, said = both[:, :N], both[:, N:]
            if not suffix:
                assert crossing is not None
                asked = turned(net.project(f"{block}.to_q_control", None, inner), ids[:N], axes)
                out = out + scale * heard(asked, *crossing)
            image = image + mods[2] * net.linear(f"{layer}.to_out.0", out)
            if dual:
                came = seen if suffix else x  # as it came into the block; nothing is turned here, as released
                again = plain(came) * (1 + mods[7]) + mods[6]
                second = f"{block}.attn2{suffix}"
                q, k, v = (
                    net.project(f"{second}.to_{one}", norm, again)
                    for one, norm in (("q", f"{second}.norm_q"), ("k", f"{second}.norm_k"), ("v", None))
                )
                image = image + mods[8] * net.linear(f"{second}.to_out.0", heard(q, k, v))
            image = image + mods[5] * net.mlp(f"{block}.ff", plain(image) * (1 + mods[4]) + mods[3])
            if not last:
                text = text + mods_t[2] * net.linear(f"{layer}.to_add_out", said)
                text = text + mods_t[5] * net.mlp(
                    f"{block}.ff_context", plain(text) * (1 + mods_t[4]) + mods_t[3]
                )
            streams[suffix] = image, text
        (x, words), (seen, told) = streams[""], streams["_control"]  # type: ignore[assignment]
    scale_, shift = net.vectors("norm_out", emb, 2)
    out = net.linear("proj_out", plain(x) * (1 + scale_) + shift)
    grid = out.view(-1, high, wide, patch, patch, sizes["out_channels"])
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, sizes["out_channels"], high * patch, wide * patch)


@torch.no_grad()
@pytest.mark.skipif(not (FIXTURES / "UNIC-Adapter").is_dir(), reason="the recorded runs are not here")
def test_the_reference_of_unic_adapter_is_the_released_code() -> None:
    config, weights, io = read(FIXTURES / "UNIC-Adapter")
    given = {key.removeprefix("case0.in."): x for key, x in io.items() if key.startswith("case0.in.")}
    for name, scale in (("case0", 1.0), ("case2_adapter_off", 0.0)):
        ours = unic(config, weights, given, scale)
        assert float((ours - io[f"{name}.out.sample"]).abs().max()) < 2e-5


UNIC: dict[str, dict[str, Any]] = {
    "as SD3 medium": {
        "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 3, "dual_attention_layers": [], "qk_norm": None,
        "in_channels": 4, "pos_embed_max_size": 6, "sample_size": 12, "control_scale": 1.0, "height": 6, "width": 10, "text": 3,
    },
    "as SD3.5, weaker": {
        "num_layers": 4, "attention_head_dim": 12, "num_attention_heads": 2, "dual_attention_layers": [0, 1], "qk_norm": "rms_norm",
        "in_channels": 6, "pos_embed_max_size": 9, "sample_size": 10, "control_scale": 0.6, "height": 12, "width": 4, "text": 7,
    },
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(UNIC))
def test_other_configurations_of_unic_adapter(name: str, tmp_path: Path) -> None:
    from dit.convert import find

    args = dict(UNIC[name])
    height, width, text = (args.pop(key) for key in ("height", "width", "text"))
    args |= {
        "patch_size": 2,
        "joint_attention_dim": 11,
        "pooled_projection_dim": 5,
        "out_channels": args["in_channels"],
    }
    args["caption_projection_dim"] = args["num_attention_heads"] * args["attention_head_dim"]
    run = {"height": height, "width": width, "image_instruction_guidance": 1.7, "prompt_guidance": 4.0}
    config = {"system": "UNIC-Adapter", "args": args, "run": run}
    empty = find("UNIC-Adapter").to_official(find("UNIC-Adapter").build(args, run))  # names and shapes
    draw = torch.Generator().manual_seed(3)
    weights = {
        key: x.clone() if key.endswith(("pos_embed.pos_embed", "pos_embed_control.pos_embed"))
        else torch.randn(x.shape, generator=draw) * 0.2 + float(".norm_" in key and x.dim() == 1 and "linear" not in key)
        for key, x in empty.items()
    }  # fmt: skip
    io: Weights = {}
    for number, batch in enumerate((2, 3, 1)):
        given = {
            f"{key}{suffix}": torch.randn(batch, *shape, generator=draw)
            for suffix in ("", "_control")
            for key, shape in (
                ("hidden_states", (args["in_channels"], height, width)), ("encoder_hidden_states", (text, 11)),
                ("pooled_projections", (5,)),
            )
        }  # fmt: skip
        given["timestep"] = torch.rand(batch, generator=draw) * 1000
        found = unic(config, weights, given, args["control_scale"])
        io |= {f"case{number}.in.{key}": x for key, x in given.items()}
        io[f"case{number}.out.sample"] = found
        if batch == 3:
            u, n, f = found.chunk(3)
            io[f"case{number}.out.guided"] = u + 1.7 * (n - u) + 4.0 * (f - n)
    write(tmp_path / "other", config, weights, io)
    assert fidelity.main([str(tmp_path / "other")]) == fidelity.HIT
    weights["transformer_blocks.0.to_q_control.weight"] *= 1.05
    write(tmp_path / "other", config, weights, io)
    assert fidelity.main([str(tmp_path / "other")]) == fidelity.MISS
