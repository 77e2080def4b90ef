"""Official DiT and SiT weights: read strictly, reproduced, and written back; by fidelity's own way, for any configuration."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from benchmarks import fidelity
from dit.backbones.dit import DiT
from dit.convert import LayoutError, UnknownSystemError, convert, find, load_official, systems
from dit.convert.__main__ import main as convert_main

DIT: dict[str, Any] = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1, "num_classes": 5, "learn_sigma": True,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("DiT", {}),
    "patch 4, two heads, no sigma, no null class": (
        "DiT",
        {"patch_size": 4, "num_heads": 2, "learn_sigma": False, "class_dropout_prob": 0, "mlp_ratio": 2},
    ),
    "odd sizes": (
        "DiT",
        {
            "input_size": 9,
            "patch_size": 3,
            "hidden_size": 36,
            "num_heads": 9,
            "in_channels": 1,
            "mlp_ratio": 1.3,
        },
    ),
    "deep, many classes": ("DiT", {"depth": 5, "num_classes": 111, "in_channels": 16}),
    "sit": ("SiT", {}),
    "sit without sigma": ("SiT", {"learn_sigma": False, "num_heads": 1, "depth": 1}),
    "sit without null class": ("SiT", {"class_dropout_prob": 0.0, "patch_size": 1, "input_size": 4}),
}


def table(width: int, side: int) -> torch.Tensor:
    """The frozen positions, computed in numpy: column first, then row; each sines, then cosines."""

    def axis(positions: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
        angles = np.outer(positions.reshape(-1), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.mgrid[0:side, 0:side].astype(np.float64)
    return torch.from_numpy(np.concatenate([axis(columns), axis(rows)], axis=1)).float().unsqueeze(0)


def random_state(args: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights in the official layout."""
    draw = torch.Generator().manual_seed(seed)
    width, patch, channels = args["hidden_size"], args["patch_size"], args["in_channels"]
    hidden, out = int(width * args["mlp_ratio"]), channels * (2 if args["learn_sigma"] else 1)
    rows = args["num_classes"] + (1 if args["class_dropout_prob"] > 0 else 0)
    linear = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for i in range(args["depth"]):
        linear |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (hidden, width),
            f"blocks.{i}.mlp.fc2": (width, hidden),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    linear |= {
        "final_layer.linear": (patch * patch * out, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    state = {
        f"{name}.weight": torch.randn(shape, generator=draw) / math.sqrt(shape[1])
        for name, shape in linear.items()
    }
    state |= {f"{name}.bias": 0.1 * torch.randn(shape[0], generator=draw) for name, shape in linear.items()}
    state["x_embedder.proj.weight"] = 0.3 * torch.randn(width, channels, patch, patch, generator=draw)
    state["x_embedder.proj.bias"] = 0.1 * torch.randn(width, generator=draw)
    state["y_embedder.embedding_table.weight"] = torch.randn(rows, width, generator=draw)
    state["pos_embed"] = table(width, args["input_size"] // patch)
    return state


def official(
    system: str, args: dict[str, Any], w: dict[str, torch.Tensor], x: Any, t: Any, y: Any
) -> torch.Tensor:
    """The released forward pass written down once more from its layout, in float64."""
    w = {name: tensor.double() for name, tensor in w.items()}

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(value: torch.Tensor) -> torch.Tensor:
        return (value - value.mean(-1, keepdim=True)) / (
            value.var(-1, unbiased=False, keepdim=True) + 1e-6
        ).sqrt()

    width, patch, heads = args["hidden_size"], args["patch_size"], args["num_heads"]
    tokens = F.conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    side = tokens.shape[-1]
    tokens = tokens.flatten(2).transpose(1, 2) + w["pos_embed"]
    angles = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    time = linear(
        "t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1)))
    )
    emb = F.silu(time + w["y_embedder.embedding_table.weight"][y])
    for i in range(args["depth"]):
        six = [one.unsqueeze(1) for one in linear(f"blocks.{i}.adaLN_modulation.1", emb).chunk(6, 1)]
        q, k, v = (
            linear(f"blocks.{i}.attn.qkv", norm(tokens) * (1 + six[1]) + six[0])
            .reshape(len(x), -1, 3, heads, width // heads)
            .permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1)
        tokens = tokens + six[2] * linear(f"blocks.{i}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        hidden = F.gelu(
            linear(f"blocks.{i}.mlp.fc1", norm(tokens) * (1 + six[4]) + six[3]), approximate="tanh"
        )
        tokens = tokens + six[5] * linear(f"blocks.{i}.mlp.fc2", hidden)
    shift, scale = (one.unsqueeze(1) for one in linear("final_layer.adaLN_modulation.1", emb).chunk(2, 1))
    out = linear("final_layer.linear", norm(tokens) * (1 + scale) + shift)
    out = out.reshape(len(x), side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    out = out.reshape(len(x), -1, side * patch, side * patch)
    if system == "SiT" and args["learn_sigma"]:
        out = out.chunk(2, dim=1)[0]
    return out


def official_cfg(
    system: str, args: dict[str, Any], w: Any, x: Any, t: Any, y: Any, scale: float
) -> torch.Tensor:
    half = x[: len(x) // 2]
    out = official(system, args, w, torch.cat([half, half]), t, y)
    cond, uncond = out[:, :3].chunk(2)
    first = uncond + scale * (cond - uncond)
    return torch.cat([torch.cat([first, first]), out[:, 3:]], dim=1)


def write_folder(folder: Path, system: str, changes: dict[str, Any], seed: int = 0) -> Path:
    """Record a fixture folder from the forward pass above."""
    folder.mkdir(parents=True, exist_ok=True)
    args = DIT | changes
    w = random_state(args, seed)
    shape = (args["in_channels"], args["input_size"], args["input_size"])
    draw = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(3, *shape, generator=draw)
    top = args["num_classes"] - (args["class_dropout_prob"] == 0)
    whole, broken = torch.tensor([0, 500, 999]), torch.tensor([0.5, 321.25, 998.9])
    if system == "SiT":
        whole, broken = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0.001, 0.37, 0.999])
    y = torch.tensor([0, 1, top])
    io = {
        "case0.in.x": x,
        "case0.in.t": whole,
        "case0.in.y": y,
        "case0.out.model": official(system, args, w, x, whole, y),
    }
    io |= {
        "case1.in.x": x,
        "case1.in.t": broken,
        "case1.in.y": y,
        "case1.out.model": official(system, args, w, x, broken, y),
    }
    if args["class_dropout_prob"] > 0:
        x4, t4 = torch.randn(4, *shape, generator=draw), torch.cat([broken[:2], broken[:2]])
        y4 = torch.tensor([2, 3, args["num_classes"], args["num_classes"]])
        guided = official_cfg(system, args, w, x4, t4, y4, 2.5)
        io |= {"case2.in.x": x4, "case2.in.t": t4, "case2.in.y": y4, "case2.in.cfg_scale": torch.tensor(2.5)}
        io |= {"case2.out.model": guided}
    plain = {name: one.float() if one.is_floating_point() else one for name, one in io.items()}
    save_file(
        {name: one.clone(memory_format=torch.contiguous_format) for name, one in plain.items()},
        folder / "io.safetensors",
    )
    save_file(w, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps({"system": system, "args": args, "run": {}}))
    return folder


def change_io(folder: Path, **changes: Any) -> None:
    io = load_file(folder / "io.safetensors")
    for name, change in changes.items():
        key = name.replace("__", ".")
        io[key] = change(io[key].clone()) if key in io else change(None)
    save_file(io, folder / "io.safetensors")


def change_weights(folder: Path, change: Any) -> None:
    state = load_file(folder / "weights.safetensors")
    change(state)
    save_file(state, folder / "weights.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "one", "DiT", {})


@pytest.mark.parametrize("mid", [False, True])
def test_recorded_dit_is_reproduced(shared: Path, capsys: pytest.CaptureFixture[str], mid: bool) -> None:
    assert (
        fidelity.main([str(shared / "fixtures" / "DiT"), "--tolerance", "2e-5", *(["--mid"] if mid else [])])
        == 0
    )
    printed = capsys.readouterr().out
    assert ("8 of 8" if mid else "3 of 3") in printed
    assert printed.count("mid.") == (5 if mid else 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_configuration_is_reproduced(tmp_path: Path, variant: str) -> None:
    report = fidelity.compare(write_folder(tmp_path, *VARIANTS[variant]))
    assert report.status == fidelity.HIT, report
    assert len(report.rows) == (2 if "null class" in variant else 3)
    assert max(row.difference for row in report.rows if row.difference is not None) < 5e-5


@pytest.mark.parametrize(
    "change",
    [
        {"case0__out__model": lambda x: x + 2e-4},
        {"case1__out__model": lambda x: x.index_fill(0, torch.tensor([1]), math.nan)},
        {"case2__out__model": lambda x: x[:, :4].contiguous()},
        {"case2__out__model": lambda x: x.roll(1, 0)},
        {"case0__out__other": lambda _: torch.zeros(3)},
        {"case0__in__guidance": lambda _: torch.zeros(3)},
    ],
    ids=["value", "nan", "shape", "halves swapped", "an output we do not make", "an input we do not know"],
)
def test_a_miss_is_seen(folder: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main([str(folder)]) == 0
    change_io(folder, **change)
    assert fidelity.main([str(folder)]) == 1
    assert fidelity.main([str(folder), "--json"]) == 1
    capsys.readouterr()


def test_another_head_count_is_a_miss(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["args"]["num_heads"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    assert fidelity.compare(folder).status == fidelity.MISS


def test_json_output_names_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main([str(folder), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert [(row["case"], row["output"]) for row in report["rows"]] == [
        (f"case{i}", "model") for i in range(3)
    ]
    assert all(
        row["system"] == "DiT" and row["difference"] <= row["tolerance"] == 1e-4 for row in report["rows"]
    )


def test_unknown_intermediate_is_a_miss_only_on_request(folder: Path) -> None:
    change_io(folder, case0__mid__attic=lambda _: torch.zeros(2))
    assert fidelity.compare(folder).status == fidelity.HIT
    report = fidelity.compare(folder, mid=True)
    assert report.status == fidelity.MISS
    assert report.rows[-1].note or any(row.note for row in report.rows)


def test_unknown_system_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"system": "NoSuchNet"}
    (folder / "config.json").write_text(json.dumps(config))
    assert fidelity.main([str(folder)]) == 2
    assert "no converter for NoSuchNet yet" in capsys.readouterr().err
    with pytest.raises(UnknownSystemError, match="did you mean 'DiT'"):
        find("dit")


def test_no_folder_and_no_outputs_are_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fidelity.main([str(tmp_path / "nothing")]) == 2
    save_file({"case0.in.x": torch.zeros(1)}, folder / "io.safetensors")
    assert fidelity.main([str(folder)]) == 2
    assert "no recorded outputs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("blocks.1.attn.proj.bias"), "missing transformer_blocks.1.attn.to_out.0.bias"),
        (lambda s: s.pop("pos_embed"), "pos_embed is missing"),
        (lambda s: s.update({"blocks.2.attn.proj.bias": torch.zeros(24)}), "left over transformer_blocks.2"),
        (lambda s: s.update({"stray.weight": torch.zeros(1)}), "unknown weight 'stray.weight'"),
        (lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.zeros(7)}), r"\(7,\), expected \(96,\)"),
        (lambda s: s.update({"pos_embed": s["pos_embed"] + 1e-3}), "not the one of the released code"),
        (lambda s: s.update({"pos_embed": s["pos_embed"][:, :4].contiguous()}), "pos_embed is"),
    ],
)
def test_weights_are_loaded_strictly(folder: Path, change: Any, words: str) -> None:
    change_weights(folder, change)
    with pytest.raises(LayoutError, match=words):
        load_official(folder / "weights.safetensors", "DiT", **DIT)
    assert fidelity.compare(folder).status == fidelity.MISS


def test_unknown_argument_is_refused() -> None:
    with pytest.raises(LayoutError, match="no argument 'mlp_ration'"):
        find("DiT").build({"mlp_ration": 4}, {})


def test_every_key_table_loads_on_the_meta_device(shared: Path) -> None:
    fixture = shared / "fixtures" / "DiT"
    presets = json.loads((fixture / "config.json").read_text())["official_presets"]
    tables = json.loads((fixture / "keys.json").read_text())
    assert any(name.startswith("DiT-XL/2") for name in tables)
    for name, shapes in tables.items():
        preset = presets[name.split(" ")[0]]
        args = {key: value for key, value in preset.items() if not key.startswith("input_size")}
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        model = convert(state, "SiT" if "/8" in name else "DiT", args | {"input_size": 32})
        assert {one.device.type for one in model.parameters()} == {"meta"}
        table_size = math.prod(shapes["pos_embed"])
        assert (
            sum(one.numel() for one in model.parameters())
            == sum(map(math.prod, shapes.values())) - table_size
        )
    state.pop("blocks.3.attn.qkv.bias")
    with pytest.raises(LayoutError, match=r"missing transformer_blocks\.3\.attn\.to_q\.bias"):
        convert(state, "DiT", args | {"input_size": 32})


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_gives_the_official_weights_back(variant: str) -> None:
    system, changes = VARIANTS[variant]
    args = DIT | changes
    state = random_state(args)
    model = convert(state, system, args)
    back = find(system).to_official(model)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        if name == "pos_embed":
            torch.testing.assert_close(back[name], tensor, atol=1e-6, rtol=0)
        else:
            assert torch.equal(back[name], tensor), name


def test_converted_model_keeps_dtype_and_can_be_saved(tmp_path: Path) -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in random_state(DIT).items()}
    save_file(state, tmp_path / "w.safetensors")
    model = load_official(tmp_path / "w.safetensors", "DiT", **DIT)
    assert not model.training
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "ours")
    again = DiT.from_pretrained(tmp_path / "ours", torch_dtype=torch.bfloat16)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_sit_walks_the_same_path_in_our_direction() -> None:
    """Official: t from 0 (noise) to 1 with picture - noise. Ours: diffusers' scheduler from 1000 down to 0, noise - picture."""
    args = DIT | {"depth": 1}
    state = random_state(args, seed=3)
    model = convert(state, "SiT", args)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, steps = torch.tensor([1, 5]), 6
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    ours = noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            velocity = model(ours, timestep.expand(2), labels).sample
            ours = scheduler.step(velocity, timestep, ours).prev_sample
    theirs = noise.double()
    for i in range(steps):
        theirs = theirs + official("SiT", args, state, theirs, torch.full((2,), i / steps), labels) / steps
    assert not torch.allclose(ours, noise, atol=0.1)
    torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-5)


def test_pickles_are_refused_unopened(tmp_path: Path) -> None:
    torch.save({"ema": {}}, tmp_path / "DiT-XL-2.pt")
    (tmp_path / "lying.safetensors").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    for name in ("DiT-XL-2.pt", "lying.safetensors"):
        with pytest.raises(ValueError, match=r"is a pickle.*weights_only=True.*save_file"):
            load_official(tmp_path / name, "DiT")


def test_truncated_file_is_refused(folder: Path) -> None:
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_official(file, "DiT", **DIT)
    assert fidelity.compare(folder).status == fidelity.UNTRIED


def test_command_line_converts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(folder / "weights.safetensors"), tmp_path / "ours"
    assert convert_main([source, str(target), "--system", "DiT", "--args", json.dumps(DIT)]) == 0
    assert "DiT, 0.0" in capsys.readouterr().out
    model = DiT.from_pretrained(target)
    io = load_file(folder / "io.safetensors")
    with torch.no_grad():
        out = model(io["case0.in.x"], io["case0.in.t"], io["case0.in.y"]).sample
    torch.testing.assert_close(out, io["case0.out.model"], atol=2e-5, rtol=0)
    assert convert_main([source, str(target), "--system", "DiT", "--args", str(folder / "config.json")]) == 0
    for wrong in (["--system", "DiT"], ["--system", "Unheard"], ["--system", "DiT", "--args", "[]"]):
        assert convert_main([source, str(tmp_path / "no"), *wrong]) == 2
        assert capsys.readouterr().err.startswith("dit.convert: ")
    assert not (tmp_path / "no").exists()


def test_known_systems_are_listed() -> None:
    assert {"DiT", "SiT"} <= set(systems())


def test_the_forward_pass_above_is_the_recorded_one(shared: Path) -> None:
    """What the random configurations are compared with is itself held against the released code's recording."""
    fixture = shared / "fixtures" / "DiT"
    args = json.loads((fixture / "config.json").read_text())["args"]
    io, w = load_file(fixture / "io.safetensors"), load_file(fixture / "weights.safetensors")
    for case in ("case0", "case1"):
        out = official("DiT", args, w, *(io[f"{case}.in.{name}"] for name in "xty"))
        torch.testing.assert_close(out.float(), io[f"{case}.out.model"], atol=5e-5, rtol=0)
    given = [io[f"case2.in.{name}"] for name in ("x", "t", "y", "cfg_scale")]
    out = official_cfg("DiT", args, w, given[0], given[1], given[2], float(given[3]))
    torch.testing.assert_close(out.float(), io["case2.out.model"], atol=5e-5, rtol=0)
