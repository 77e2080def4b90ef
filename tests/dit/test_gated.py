"""Gated linear attention and DiG: chunks equal the recurrence, scans, and the released layout in any configuration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks import fidelity
from dit.backbones.dig import DiG
from dit.convert import LayoutError, convert, find
from dit.embeddings import sincos_2d
from dit.grid import Grid
from dit.ledger import analytic, counted
from dit.mixers.full import Mixer
from dit.mixers.gated import (
    ORDERS,
    Gated,
    GatedMixer,
    gated_scan,
    gated_scan_chunked,
    gated_scan_reference,
    scan_index,
)
from dit.model import Context
from dit.presets import build
from dit.spec import parse

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"
GRID = Grid(1, 4, 6)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def streams(tokens: int, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k = (draw(2, tokens, 3, 8, seed=i) for i in range(2))
    gate = F.logsigmoid(strength * draw(2, tokens, 3, 8, seed=3)) / 16
    return q, k, draw(2, tokens, 3, 5, seed=2), gate


@pytest.mark.parametrize("strength", [1.0, 40.0])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 50])
def test_chunks_equal_the_recurrence(tokens: int, strength: float) -> None:
    """Also where gates forget most of the state at every token."""
    q, k, v, gate = streams(tokens, strength)
    chunks = gated_scan_chunked(q, k, v, gate, scale=0.3)
    reference = gated_scan_reference(q.double(), k.double(), v.double(), gate.double(), scale=0.3)
    assert chunks.shape == (2, tokens, 3, 5)
    assert float((chunks - reference).abs().max()) < 1e-5 * float(reference.abs().max())


def test_the_strongest_gates_neither_overflow_nor_stop_gradients() -> None:
    q, k, v, _ = streams(40)
    gate = torch.full_like(q, -1000.0).requires_grad_()
    k.requires_grad_()
    out = gated_scan(q, k, v, gate)
    out.square().sum().backward()
    now = (q * k).sum(-1, keepdim=True) * v / 8**0.5  # a state that forgets everything holds the token itself
    assert float((out - now).detach().abs().max()) < 1e-3 * float(now.detach().abs().max())
    assert k.grad is not None
    assert gate.grad is not None
    assert torch.isfinite(k.grad).all()
    assert torch.isfinite(gate.grad).all()


def test_gradients_of_chunks_are_those_of_the_recurrence() -> None:
    grads = []
    for scan in (gated_scan_chunked, gated_scan_reference):
        given = [one.double().float().requires_grad_() for one in streams(21)]
        scan(*given, scale=0.3).sin().sum().backward()
        grads.append([one.grad for one in given])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
def test_the_kernel_of_flash_linear_attention_agrees() -> None:
    pytest.importorskip("fla")
    q, k, _, gate = (one.cuda() for one in streams(100))
    v = draw(2, 100, 3, 8).cuda()
    ours = gated_scan_chunked(q, k, v, gate, scale=0.3)
    torch.testing.assert_close(gated_scan(q, k, v, gate, scale=0.3), ours, atol=2e-2, rtol=2e-2)


def test_scans_visit_every_token_once() -> None:
    for order in ORDERS:
        index = scan_index(order, GRID, 3, 27, "cpu")
        assert index is None if order == "row" else sorted(index.tolist()) == list(range(27))
    grid = Grid(1, 2, 3)  # 0 1 2 / 3 4 5
    assert scan_index("column", grid, 0, 6, "cpu").tolist() == [0, 3, 1, 4, 2, 5]
    assert scan_index("reversed-row", grid, 1, 7, "cpu").tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert scan_index("reversed-column", grid, 1, 7, "cpu", text_first=True).tolist() == [0, 6, 3, 5, 2, 4, 1]
    assert scan_index("column", Grid(2, 2, 2), 0, 8, "cpu").tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    with pytest.raises(ValueError, match="3 text tokens and 1 x 4 x 6 others, got 26 in all"):
        scan_index("column", GRID, 3, 26, "cpu")


@pytest.mark.parametrize("order", ORDERS)
def test_a_token_hears_those_before_it_in_the_scan(order: str) -> None:
    torch.manual_seed(0)
    mixer = Gated(scan=order).build(16, 2)
    x = draw(1, GRID.tokens, 16)
    context = Context(GRID, torch.zeros(1, 16))
    plain = mixer(hidden_states=x, context=context)
    place = GRID.width + 2  # row 1, column 2
    louder = x.clone()
    louder[:, place] += 1
    changed = (mixer(hidden_states=louder, context=context) - plain).abs().sum(-1)[0] > 1e-6
    rows, columns = torch.arange(GRID.tokens) // GRID.width, torch.arange(GRID.tokens) % GRID.width
    along = columns * GRID.height + rows if order.endswith("column") else torch.arange(GRID.tokens)
    behind = along <= along[place] if order.startswith("reversed") else along >= along[place]
    assert torch.equal(changed, behind)


def test_orders_change_from_block_to_block() -> None:
    def orders(scan: str) -> list[str]:
        return [parse(Mixer, f"gated:scan={scan}").at(i).scan for i in range(6)]  # type: ignore[attr-defined]

    assert orders("four") == ["row", "reversed-row", "column", "reversed-column", "row", "reversed-row"]
    assert orders("reversing") == ["row", "reversed-row"] * 3
    assert orders("transposing") == ["row", "row", "column", "column", "row", "row"]
    assert orders("column") == ["column"] * 6
    with torch.device("meta"):
        model = build("dig-s/2")
    assert [one.attn.order for one in model.transformer_blocks][:5] == orders("four")[:5]


@pytest.mark.parametrize("order", ["row", "reversed-column"])
@pytest.mark.parametrize("pre_only", [False, True])
def test_two_streams_in_one_scan(pre_only: bool, order: str) -> None:
    """Masked text changes nothing; the picture hears the text where the text comes first."""
    torch.manual_seed(0)
    joint = Gated(scan=order).build_joint(16, 2, context_pre_only=pre_only)
    image, text = draw(1, GRID.tokens, 16), draw(1, 5, 16, seed=1)
    mask = torch.ones(1, 1, 1, 5 + GRID.tokens, dtype=torch.bool)
    mask[..., 3:5] = False

    def run(text: Tensor) -> Tensor:
        out = joint(
            hidden_states=image,
            encoder_hidden_states=text,
            context=Context(GRID, torch.zeros(1, 16), mask=mask),
        )
        return out if pre_only else out[0]

    plain, masked, louder = run(text), text.clone(), text.clone()
    masked[:, 3:] += 1
    louder[:, 0] += 1
    torch.testing.assert_close(run(masked), plain)
    assert torch.allclose(run(louder), plain) == (order == "reversed-column" and not pre_only)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must divide by 3 heads"):
        Gated().build(16, 3)
    with pytest.raises(ValueError, match="long skips need an even depth"):
        DiG(depth=3, skip="aligned")
    with pytest.raises(ValueError, match="odd count of tokens, got 4"):
        DiG(depth=1, kernel=4)
    with pytest.raises(ValueError, match="convolution is one of after, inside, none"):
        DiG(depth=1, convolution="before")
    mask = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    with pytest.raises(ValueError, match="scans each key once"):
        Gated().build(16, 2)(hidden_states=draw(1, 24, 16), context=Context(GRID, draw(1, 16), mask=mask))


# The released DiG

ARGS: dict[str, Any] = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 4, "num_heads": 2,
    "class_dropout_prob": 0.1, "num_classes": 5, "learn_sigma": True, "bid_mode": "layer", "if_dw_conv": True,
    "if_quad_dir": True,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "as recorded": {},
    "depth 1": {"depth": 1},
    "depth 6, four heads": {"depth": 6, "num_heads": 4},
    "depth 7": {"depth": 7, "hidden_size": 24, "num_heads": 3},
    "no quad": {"if_quad_dir": False, "depth": 3},
    "sequence": {"bid_mode": "seq", "depth": 3},
    "rows only, no convolution": {"bid_mode": "seq", "if_quad_dir": False, "if_dw_conv": False},
    "convolution inside, side 5": {"if_in_block_conv": True, "conv_kernel_size": 5},
    "rms norms, split gate": {"if_rms_norm": True, "if_fuse_norm": False},
    "skips": {"if_skip": True, "depth": 8},
    "skips, depth 6, reversing": {"if_skip": True, "depth": 6, "if_quad_dir": False},
    "expanded, no sigma, no null class": {
        "expand_k": 1.0, "expand_v": 2.0, "learn_sigma": False, "class_dropout_prob": 0.0, "in_channels": 3,
    },
    "arguments without effect": {"mlp_ratio": 2.0, "if_norm_qkv": True, "gate_low_rank_dim": 4, "attn_model": "chunk"},
}  # fmt: skip


def random_state(args: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights in the official layout."""
    dice = torch.Generator().manual_seed(0)
    width, patch, channels = args["hidden_size"], args["patch_size"], args["in_channels"]
    keys, values = int(width * args.get("expand_k", 0.5)), int(width * args.get("expand_v", 1))
    inner, side = 256 * math.ceil(int(width * 8 / 3) / 256), args["input_size"] // patch
    plain, biased = {}, {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    ones = []
    for i in range(args["depth"]):
        block = f"blocks.{i}"
        plain |= {
            f"{block}.attn.q_proj": (keys, width), f"{block}.attn.k_proj": (keys, width),
            f"{block}.attn.v_proj": (values, width), f"{block}.attn.g_proj": (values, width),
            f"{block}.attn.gk_proj.0": (16, width), f"{block}.attn.o_proj": (width, values),
            f"{block}.mlp.gate_proj": (2 * inner, width), f"{block}.mlp.down_proj": (width, inner),
        }  # fmt: skip
        biased |= {f"{block}.attn.gk_proj.1": (keys, 16), f"{block}.adaLN_modulation.1": (6 * width, width)}
        if args.get("if_skip") and i > args["depth"] // 2:
            biased[f"{block}.skip_linear"] = (width, 2 * width)
        if args["if_dw_conv"]:
            biased[f"{block}.dw_conv"] = (width, 1, *[args.get("conv_kernel_size", 3)] * 2)
        norm = "g_norm_swish_gate" if args.get("if_fuse_norm", True) else "g_norm"
        ones.append((f"{block}.attn.{norm}", values // args["num_heads"]))
        if args.get("if_rms_norm"):
            ones += [(f"{block}.norm1", width), (f"{block}.norm2", width)]
    out = channels * (2 if args["learn_sigma"] else 1)
    biased |= {
        "final_layer.linear": (patch * patch * out, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    state = {
        f"{name}.weight": torch.randn(shape, generator=dice) / math.sqrt(math.prod(shape[1:]))
        for name, shape in (plain | biased).items()
    }
    state |= {f"{name}.bias": 0.1 * torch.randn(shape[0], generator=dice) for name, shape in biased.items()}
    state |= {f"{name}.weight": 1 + 0.1 * torch.randn(size, generator=dice) for name, size in ones}
    for block in range(args["depth"] if args.get("if_rms_norm") else 0):
        for twin, name in (("attn_norm", "norm1"), ("mlp_norm", "norm2")):
            state[f"blocks.{block}.{twin}.weight"] = state[f"blocks.{block}.{name}.weight"]
    state["x_embedder.proj.weight"] = 0.3 * torch.randn(width, channels, patch, patch, generator=dice)
    state["x_embedder.proj.bias"] = 0.1 * torch.randn(width, generator=dice)
    rows = args["num_classes"] + (1 if args["class_dropout_prob"] > 0 else 0)
    state["y_embedder.embedding_table.weight"] = torch.randn(rows, width, generator=dice)
    state["pos_embed"] = sincos_2d(width, Grid(1, side, side)).unsqueeze(0)
    return state


def official(
    args: dict[str, Any], w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """The released forward pass written down once more, in float64: a sequence that is turned around behind every block."""
    w = {name: tensor.double() for name, tensor in w.items()}
    width, heads, depth = args["hidden_size"], args["num_heads"], args["depth"]

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def rms(value: Tensor, weight: Tensor) -> Tensor:
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def layer(value: Tensor) -> Tensor:
        return (value - value.mean(-1, keepdim=True)) / (
            value.var(-1, unbiased=False, keepdim=True) + 1e-6
        ).sqrt()

    def conv(block: str, value: Tensor) -> Tensor:
        grid = value.transpose(1, 2).unflatten(2, (side, side))
        kernel = w[f"{block}.dw_conv.weight"]
        out = F.conv2d(grid, kernel, w[f"{block}.dw_conv.bias"], padding=kernel.shape[-1] // 2, groups=width)
        return out.flatten(2).transpose(1, 2)

    def attention(block: str, value: Tensor) -> Tensor:
        q, k, v, g = (linear(f"{block}.{n}_proj", value).unflatten(-1, (heads, -1)) for n in "qkvg")
        gate = linear(f"{block}.gk_proj.1", linear(f"{block}.gk_proj.0", value)).unflatten(-1, (heads, -1))
        out = gated_scan_reference_in(q, k, v, gate.sigmoid().log() / 16)
        norm = w.get(f"{block}.g_norm_swish_gate.weight", w.get(f"{block}.g_norm.weight"))
        return linear(f"{block}.o_proj", (rms(out, norm) * F.silu(g)).flatten(2))

    tokens = F.conv2d(
        x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=args["patch_size"]
    )
    side = tokens.shape[-1]
    tokens = tokens.flatten(2).transpose(1, 2) + w["pos_embed"]
    angles = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    time = linear(
        "t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1)))
    )
    emb = F.silu(time + w["y_embedder.embedding_table.weight"][y])
    kept: list[Tensor] = []
    found: dict[str, Tensor] = {}
    for i in range(depth):
        block = f"blocks.{i}"
        norm1, norm2 = layer, layer
        if args.get("if_rms_norm"):
            norm1, norm2 = (lambda z, n=n, b=block: rms(z, w[f"{b}.norm{n}.weight"]) for n in (1, 2))  # type: ignore[misc]
        if args.get("if_skip") and i > depth // 2:
            tokens = linear(f"{block}.skip_linear", torch.cat([tokens, kept.pop()], dim=-1))
        six = [one.unsqueeze(1) for one in linear(f"{block}.adaLN_modulation.1", emb).chunk(6, 1)]
        inner = norm1(tokens) * (1 + six[1]) + six[0]
        if args["if_dw_conv"] and args.get("if_in_block_conv"):
            inner = conv(block, inner)
        tokens = tokens + six[2] * attention(f"{block}.attn", inner)
        gate, value = linear(f"{block}.mlp.gate_proj", norm2(tokens) * (1 + six[4]) + six[3]).chunk(2, -1)
        tokens = tokens + six[5] * linear(f"{block}.mlp.down_proj", F.silu(gate) * value)
        if args["if_dw_conv"] and not args.get("if_in_block_conv"):
            tokens = conv(block, tokens)
        found[f"mid.{block}"] = tokens
        if args["bid_mode"] == "layer":
            tokens = tokens.flip(1)
        if i % 2 and args["if_quad_dir"]:
            tokens = tokens.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
        if args.get("if_skip") and i < depth // 2 - 1:
            kept.append(tokens)
    shift, scale = (one.unsqueeze(1) for one in linear("final_layer.adaLN_modulation.1", emb).chunk(2, 1))
    out = linear("final_layer.linear", layer(tokens) * (1 + scale) + shift)
    patch = args["patch_size"]
    out = out.reshape(len(x), side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return found | {"out.model": out.reshape(len(x), -1, side * patch, side * patch)}


def gated_scan_reference_in(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """The recurrence in the precision that comes in."""
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    out = []
    for n in range(q.shape[1]):
        state = state * gate[:, n].exp()[..., None] + k[:, n, :, :, None] * v[:, n, :, None]
        out.append(torch.einsum("bkd,bkde->bke", q[:, n] / q.shape[-1] ** 0.5, state))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_configuration_of_the_released_code_is_reproduced(variant: str, tmp_path: Path) -> None:
    args = ARGS | VARIANTS[variant]
    state = random_state(args)
    x = draw(2, args["in_channels"], args["input_size"], args["input_size"])
    t, y = torch.tensor([3.0, 700.0]), torch.tensor([0, 4])
    recorded = {f"case0.{k}": v.float().contiguous() for k, v in official(args, state, x, t, y).items()}
    save_file(recorded | {"case0.in.x": x, "case0.in.t": t, "case0.in.y": y}, tmp_path / "io.safetensors")
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"system": "DiG", "args": args}))
    # float32 against float64; heads that read next to nothing are blown up by their norm, in the released code alike
    report = fidelity.compare(tmp_path, mid=True, tolerance=2e-3)
    assert report.problem == ""
    assert report.status == fidelity.HIT, [(row.output, row.difference) for row in report.rows]
    assert len(report.rows) == 1 + args["depth"]
    found = find("DiG")
    model = convert(state, "DiG", args)
    again = found.to_official(model)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state if name != "pos_embed")


def test_the_recording_is_reproduced() -> None:
    if not (FIXTURES / "DiG").is_dir():
        pytest.skip("../shared/fixtures/DiG is not there")
    report = fidelity.compare(FIXTURES / "DiG", mid=True)
    assert len(report.rows) == 10
    assert all(row.passed and row.tolerance == 2e-5 for row in report.rows)


def test_official_sizes_load_strictly() -> None:
    if not (FIXTURES / "DiG").is_dir():
        pytest.skip("../shared/fixtures/DiG is not there")
    tables = json.loads((FIXTURES / "DiG" / "keys.json").read_text())
    presets = json.loads((FIXTURES / "DiG" / "config.json").read_text())["official_presets"]
    sizes = {"DiG-S/2": "dig-s/2", "DiG-B/2": "dig-b/2", "DiG-L/2": "dig-l/2", "DiG-XL/2": "dig-xl/2"}
    assert len(tables) == 4
    for name, table in tables.items():
        args = presets[name.split(" ")[0]]
        state = {key: torch.empty(shape, device="meta") for key, shape in table.items()}
        model = convert(state, "DiG", args)
        assert sum(one.numel() for one in model.parameters()) == sum(
            math.prod(shape) for key, shape in table.items() if key != "pos_embed"
        )
        with torch.device("meta"):
            ours = build(sizes[name.split("-bid")[0]])
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
        del state["blocks.3.dw_conv.weight"]
        with pytest.raises(LayoutError, match="missing"):
            convert(state, "DiG", args)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bid_mode": "both"}, "bid_mode is layer or seq"),
        ({"hidden_act": "relu"}, "hidden_act is swish"),
        ({"num_classes": 0}, "without classes"),
        ({"widht": 3}, "no argument 'widht'"),
    ],
)
def test_arguments_that_cannot_be_read_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        convert(random_state(ARGS), "DiG", ARGS | changes)


def test_costs_are_told_right_and_other_sizes_run() -> None:
    with torch.device("meta"):
        model = build("dig-s/2", depth=2)
        inputs = {"hidden_states": torch.empty(1, 4, 20, 28), "timestep": torch.empty(1)}
        inputs["class_labels"] = torch.zeros(1, dtype=torch.long)
    assert analytic(model, 20, 28).macs == counted(model, inputs).macs
    small = DiG(width=16, heads=2, depth=3, num_classes=3, sample_size=8)
    out = small(draw(1, 4, 8, 12), torch.tensor([5.0]), torch.tensor([1])).sample
    assert out.shape == (1, 8, 8, 12)


def test_an_untrained_block_is_the_identity() -> None:
    torch.manual_seed(0)
    model = DiG(width=16, heads=2, depth=4, num_classes=3, sample_size=8)
    x, context = draw(1, 16, 16), Context(Grid(1, 4, 4), draw(1, 16))
    assert isinstance(model.transformer_blocks[0].attn, GatedMixer)
    for block in model.transformer_blocks:
        torch.testing.assert_close(block(hidden_states=x, temb=context.emb, context=context), x)
