"""E-MMDiT: its published size and cost, compression on any grid, shared modulation, and who reaches whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import MagCacheConfig
from torch import Tensor, nn

from dit.backbones.emmdit import EMMDiT, EMMDiTBlock, EMMDiTOutput
from dit.compress import TokenCompressor, TokenReconstructor
from dit.embeddings import sincos_2d
from dit.experts.dense import Dense
from dit.grid import Grid
from dit.ledger import analytic, counted, parameters_of
from dit.mixers.subregion import Subregion
from dit.model import Context
from dit.modulation import AdaLNAffine, AdaLNSingle, AdaLNZero, TableModulation
from dit.presets import build

TINY: dict[str, Any] = {
    "in_channels": 4, "sample_size": 8, "width": 16, "heads": 2, "groups": [1, 3, 2], "mlp_ratio": 2.0, "context_dim": 6,
}  # fmt: skip


def tiny(**changes: Any) -> Any:
    """A small network whose zero maps are filled, so that everything in it counts."""
    torch.manual_seed(0)
    model = EMMDiT(**(TINY | changes)).eval()
    for one in model.parameters():
        if not one.any():
            nn.init.normal_(one, std=0.2)
    return model


def inputs(rows: int = 8, columns: int = 8, text: int = 5, batch: int = 2) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, rows, columns, generator=draw),
        "timestep": torch.tensor([20.0, 800.0])[:batch],
        "encoder_hidden_states": torch.randn(batch, text, 6, generator=draw),
    }


def velocity(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**given).sample
    return out


def differ(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, atol=1e-3)


# Size and cost


def unread(model: Any, text: int, groups: int) -> float:
    """GMACs of the released last block's queries of the prompt, which nobody reads and ours leaves out."""
    width = model.config.width
    keys = ((model.config.sample_size // model.config.patch_size) ** 2 + text) // groups
    return text * (width * width + 2 * keys * width) / 1e9


@pytest.mark.parametrize(
    ("name", "mixer", "groups", "gmacs"),
    [
        ("nitro-e", "subregion", 4, 40.22),
        ("nitro-e", "full", 1, 41.62),
        ("nitro-e-1024", "full", 1, 122.8),
    ],
)
def test_size_and_cost_are_the_published_ones(name: str, mixer: str, groups: int, gmacs: float) -> None:
    with torch.device("meta"):
        model = build(name, mixer=mixer)
    side, width = model.config.sample_size, model.config.width
    queries = width * (width + 1) + width // model.config.heads
    assert (parameters_of(model) + queries) / 1e6 == pytest.approx(302.4, abs=0.1)
    found = analytic(model, side, side, text=128).macs / 1e9
    assert found + unread(model, 128, groups) == pytest.approx(gmacs, abs=0.05)


def test_the_cost_is_what_is_counted_at_any_size() -> None:
    with torch.device("meta"):
        model = EMMDiT(**(TINY | {"pooled_dim": 7, "mixer": "subregion:pattern=1/1 2/3"}))
    for rows, columns, text in ((8, 8, 16), (5, 12, 3)):
        given = {name: one[:1].to("meta") for name, one in inputs(rows, columns, text).items()}
        given["pooled_projections"] = torch.empty(1, 7, device="meta")
        assert analytic(model, rows, columns, text=text).macs == counted(model, given).macs > 0


def test_compression_leaves_less_than_a_third_of_the_picture() -> None:
    with torch.device("meta"):
        model = build("nitro-e", groups=[4, 16, 4])
    assert model.compressor.tokens(Grid(1, 16, 16)) == 80  # of 256
    parts = {one.path: one.macs for one in analytic(model, 16, 16, text=128).parts}
    assert parts["transformer_blocks.4.ff"] / parts["transformer_blocks.3.ff"] == 80 / 256
    assert parts["transformer_blocks.4.ff_context"] == parts["transformer_blocks.3.ff_context"]


@pytest.mark.parametrize(("kind", "weights"), [("adaln-affine", 12), ("adaln-single", 6)])
def test_modulation_costs_a_stream_twelve_widths(kind: str, weights: int) -> None:
    model = tiny(modulation=kind)
    block = model.transformer_blocks[0]
    assert parameters_of(block.modulation) == parameters_of(block.modulation_context) == weights * 16
    assert parameters_of(model.transformer_blocks[-1].modulation_context) == 0
    assert parameters_of(AdaLNZero(bias=False).build(16, 6)) == 6 * 16 * 16


# Modulation


def test_tables_turn_the_shared_vectors() -> None:
    torch.manual_seed(0)
    shared = AdaLNAffine().shared(8)
    assert shared is not None
    emb = torch.randn(2, 8)
    vectors = shared(emb)
    assert vectors.shape == (2, 48)
    affine = AdaLNAffine().build(8, 6)
    for i, one in enumerate(affine(vectors)):
        expected = affine.bias[i] + vectors[:, 8 * i : 8 * i + 8] * (1 + affine.scale[i])
        torch.testing.assert_close(one, expected.unsqueeze(1))
    single = AdaLNSingle().build(8, 3)
    assert [one.shape for one in single(vectors)] == [(2, 1, 8)] * 3
    torch.testing.assert_close(single(vectors)[1][:, 0], single.bias[1] + vectors[:, 8:16])
    a_token = shared(torch.randn(2, 5, 8))
    assert [one.shape for one in affine(a_token)] == [(2, 5, 8)] * 6
    with pytest.raises(ValueError, match="share 6 vectors"):
        TableModulation(8, 9)


# Compression


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (4, 8), (12, 4), (5, 7), (3, 2)])
def test_a_token_is_compressed_with_its_neighbours_and_comes_back_to_them(rows: int, columns: int) -> None:
    """The released code cuts the compressed sequence by the height alone: right on squares, wrong elsewhere."""
    torch.manual_seed(0)
    grid = Grid(1, rows, columns)
    down, up = TokenCompressor(16, (2, 4)), TokenReconstructor(16, (2, 4))
    whole_rows, whole_columns = -(-rows // 4) * 4, -(-columns // 4) * 4
    assert down.tokens(grid) == whole_rows * whole_columns * 5 // 16
    first = whole_rows * whole_columns // 4
    x = torch.randn(1, grid.tokens, 16, requires_grad=True)
    small = down(x, grid)
    assert small.shape == (1, down.tokens(grid), 16)
    for ratio, start in ((2, 0), (4, first)):
        across = whole_columns // ratio
        for index in (0, across - 1, across * (whole_rows // ratio) - 1):
            row, column = divmod(index, across)
            (gradient,) = torch.autograd.grad(small[0, start + index].sum(), x, retain_graph=True)
            heard = gradient[0].abs().sum(1).reshape(rows, columns) > 0
            # beyond the edge the last row and column are repeated
            ys = {min(row * ratio + i, rows - 1) for i in range(ratio)}
            xs = {min(column * ratio + i, columns - 1) for i in range(ratio)}
            assert {(int(y), int(x)) for y, x in heard.nonzero()} == {(y, x) for y in ys for x in xs}
    tokens = torch.randn(1, down.tokens(grid), 16, requires_grad=True)
    back = up(tokens, torch.randn(1, grid.tokens, 16), grid)
    assert back.shape == (1, grid.tokens, 16)
    for place in range(grid.tokens):
        row, column = divmod(place, columns)
        (gradient,) = torch.autograd.grad(back[0, place].sum(), tokens, retain_graph=True)
        told = (gradient[0].abs().sum(1) > 0).nonzero().flatten().tolist()
        assert told == [
            row // 2 * (whole_columns // 2) + column // 2, first + row // 4 * (whole_columns // 4) + column // 4
        ]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (4, 12), (7, 5)])
def test_any_size_runs_and_every_part_of_the_picture_counts(rows: int, columns: int) -> None:
    model, given = tiny(), inputs(rows, columns)
    given["hidden_states"].requires_grad_()
    out = model(**given).sample
    assert out.shape == (2, 4, rows, columns)
    out[0, :, 0, 0].sum().backward()
    reached = given["hidden_states"].grad.abs().sum(1)
    assert (reached[0] > 0).all()
    assert not reached[1].any()


def test_positions_are_added_again_and_features_kept() -> None:
    given = inputs()
    model = tiny()
    out = velocity(model, given)
    state = model.state_dict()
    plain = tiny(reinforce=False)
    plain.load_state_dict(state)
    assert differ(velocity(plain, given), out)
    assert tiny(skip_features=False).reconstructor.merger[0].in_features == 2 * 16
    assert model.reconstructor.merger[0].in_features == 3 * 16
    one = tiny(groups=[3])
    assert one.compressor is None
    assert differ(velocity(one, given), out)


def test_positions_are_places_of_a_centred_table() -> None:
    model = tiny()
    assert torch.allclose(model.positions(Grid(1, 8, 8)), sincos_2d(16, Grid(1, 8, 8)), atol=1e-6)
    table = tiny(position_size=20, position_scale=2.0)
    whole = table.positions(Grid(1, 20, 20)).unflatten(0, (20, 20))
    assert torch.equal(table.positions(Grid(1, 4, 10)), whole[8:12, 5:15].flatten(0, 1))
    assert torch.allclose(whole[3, 5], torch.cat([wave(5 * 8 / 20 / 2), wave(3 * 8 / 20 / 2)]), atol=1e-6)


def wave(position: float) -> Tensor:
    angles = position * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    return torch.cat([angles.sin(), angles.cos()]).float()


# Who reaches whom


def reached(blocks: list[int], image: int = 32, text: int = 16) -> Tensor:
    """Which tokens, image first, hear which after these blocks of the network: [T, T]."""
    torch.manual_seed(0)
    emb = torch.randn(1, 16)
    stack = [
        EMMDiTBlock(
            16, 2, pre_only=False, hidden=16, qk_norm=True, mixer=Subregion().at(block), experts=Dense(),
            modulation=AdaLNZero(),
        ).double()
        for block in blocks
    ]  # fmt: skip
    for block in stack:
        for one in block.parameters():
            nn.init.normal_(one, std=0.4)
    tokens = torch.randn(1, image + text, 16, dtype=torch.float64, requires_grad=True)
    x, words = tokens[:, :image], tokens[:, image:]
    context = Context(None, emb.double())
    for block in stack:
        words, x = block(hidden_states=x, encoder_hidden_states=words, temb=context.emb, context=context)
    both = torch.cat([x, words], dim=1)[0]
    rows = [torch.autograd.grad(one.sum(), tokens, retain_graph=True)[0][0].abs().sum(-1) for one in both]
    return torch.stack(rows) > 0


@pytest.mark.parametrize("start", [0, 1, 2])
def test_three_blocks_in_a_row_connect_all_tokens(start: int) -> None:
    assert reached([start, start + 1, start + 2]).all()


def test_two_subregion_blocks_connect_all_only_where_they_differ() -> None:
    assert reached([1, 2]).all()
    assert reached([2, 1]).all()
    for block in (1, 2):
        assert reached([block, block]).float().mean() == 0.25
    assert reached([0]).all()


# Inputs and outputs


def test_every_input_matters() -> None:
    model, given = tiny(pooled_dim=3), inputs()
    given["pooled_projections"] = torch.randn(2, 3)
    out = velocity(model, given)
    for name, value in given.items():
        assert differ(velocity(model, given | {name: value.flip(0)}), out), name
    short = given | {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}
    found = velocity(model, short)
    assert differ(found[0], out[0])
    noise = given["encoder_hidden_states"].clone()
    noise[0, 3:] = 9.0
    torch.testing.assert_close(velocity(model, short | {"encoder_hidden_states": noise}), found)
    with pytest.raises(ValueError, match="pooled_projections"):
        velocity(model, given | {"pooled_projections": None})


def test_layers_of_each_group_can_be_left_out() -> None:
    model, given = tiny(), inputs()
    with torch.no_grad():
        none = model(**given, skip_layers=[0, 1, 2]).sample
        second = model(**given, skip_layers=[1]).sample
    assert differ(none, velocity(model, given))
    assert differ(second, none)
    calls: list[int] = []
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    with torch.no_grad():
        model(**given, skip_layers=[1])
    assert calls == [0, 1, 3, 4]


def test_projections_of_the_first_group_are_trained_with_it() -> None:
    model, given = tiny(projection_dims=[7, 3], projection_hidden=9), inputs(batch=1)
    out = model(**given, return_projections=True)
    assert isinstance(out, EMMDiTOutput)
    assert [one.shape for one in out.projections] == [(1, 64, 7), (1, 64, 3)]
    sample, projections = model(**given, return_projections=True, return_dict=False)
    assert torch.equal(sample, out.sample)
    sum(one.square().mean() for one in projections).backward()
    touched = {
        name.split(".")[1]
        for name, one in model.named_parameters()
        if one.grad is not None and "blocks" in name
    }
    assert touched == {"0"}
    assert all(one.grad is not None for one in model.projectors.parameters())
    assert model(**given).projections is None
    with pytest.raises(ValueError, match="no projector"):
        tiny()(**given, return_projections=True)


def test_the_clean_picture_and_the_velocity_agree() -> None:
    model, given = tiny(), inputs()
    other = tiny(prediction_type="sample")
    other.load_state_dict(model.state_dict())
    level = given["timestep"].reshape(-1, 1, 1, 1) / 1000
    picture = velocity(model, given)
    torch.testing.assert_close(
        velocity(other, given), (given["hidden_states"] - picture) / level, atol=1e-4, rtol=1e-4
    )


def test_a_time_for_each_token_is_refused() -> None:
    with pytest.raises(ValueError, match="one time a sample"):
        velocity(tiny(), inputs() | {"timestep": torch.zeros(2, 64)})


@pytest.mark.parametrize(
    "config", [FirstBlockCacheConfig(), MagCacheConfig(mag_ratios=torch.ones(8), num_inference_steps=8)]
)
def test_caches_that_jump_over_compression_are_refused(config: Any) -> None:
    with pytest.raises(ValueError, match="replaces all blocks by the difference"):
        tiny().enable_cache(config)
    model = tiny(groups=[3])
    model.enable_cache(config)
    assert model.is_cache_enabled


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 18}, "width must divide by heads and by 4"),
        ({"groups": [2, 2]}, "three counts of blocks, or one"),
        ({"groups": [1, 0, 1]}, r"got \[1, 0, 1\]"),
        ({"width": 20}, r"ratios=\[2, 4\]"),
        ({"ratios": []}, r"ratios=\[\]"),
        ({"prediction_type": "noise"}, "velocity or sample"),
        ({"mixer": "subregions"}, "did you mean 'subregion'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EMMDiT(**(TINY | {"ratios": [2, 4]} | changes))


def test_other_paths_of_compression() -> None:
    given = inputs(6, 9)
    for ratios in ([2], [4], [1, 2, 4]):
        assert velocity(tiny(ratios=ratios), given).shape == (2, 4, 6, 9)


@pytest.mark.parametrize("slot", [{"mixer": "linear"}, {"mixer": "proxy"}, {"mixer": "gated"}, {"experts": "mix-ffn"}])
def test_what_looks_at_places_is_refused_where_tokens_are_compressed(slot: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="looks at the places of tokens"):
        EMMDiT(**(TINY | slot))
    whole = EMMDiT(**(TINY | slot | {"groups": (2,)}))
    assert len(whole.transformer_blocks) == 2
