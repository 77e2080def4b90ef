"""Nitro-E's weights: the full-size layout, a round trip at any size, the recordings, and clear refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fidelity import HIT, compare
from dit.convert import LayoutError, convert, find
from dit.convert.base import Case
from dit.ledger import parameters_of
from dit.mixers.subregion import SubregionMixer

FIXTURE = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "Nitro-E"
SMALL: dict[str, Any] = {
    "sample_size": 8, "patch_size": 1, "in_channels": 3, "attention_head_dim": 8, "num_attention_heads": 2,
    "caption_channels": 6, "caption_projection_dim": 16, "out_channels": 3, "pos_embed_max_size": 12,
}  # fmt: skip


def built(**changes: Any) -> Any:
    torch.manual_seed(0)
    return find("Nitro-E").build(SMALL | changes, {}).eval()


def official(**changes: Any) -> dict[str, Tensor]:
    return find("Nitro-E").to_official(built(**changes))


def inputs(rows: int = 8, columns: int = 8, channels: int = 3) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(1, channels, rows, columns),
        "encoder_hidden_states": torch.randn(1, 16, 6),
        "timestep": torch.tensor([400.0]),
    }


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="the recordings are not beside this project")
def test_the_recordings_are_reproduced() -> None:
    report = compare(FIXTURE, mid=True)
    assert report.problem == ""
    assert report.status == HIT
    assert {row.case for row in report.rows} >= {
        "case0", "case1", "case2", "case3_full_attention", "case4_training"
    }  # fmt: skip
    assert max(row.difference for row in report.rows if row.difference is not None) < 1e-4


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="the recordings are not beside this project")
@pytest.mark.parametrize("name", ["Nitro-E-512px", "Nitro-E-1024px"])
def test_the_full_layout_loads_strictly(name: str) -> None:
    args = json.loads((FIXTURE / "config.json").read_text())["official_presets"][name]
    shapes = json.loads((FIXTURE / "keys.json").read_text())["Nitro-E-512px"]
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model = convert(state, "Nitro-E", args)
    assert parameters_of(model) / 1e6 == pytest.approx(302.4, rel=0.01)
    back = find("Nitro-E").to_official(model)
    assert {key: list(one.shape) for key, one in back.items()} == shapes
    groups = {one.groups for one in model.modules() if isinstance(one, SubregionMixer)}
    assert groups == ({1, 4} if name == "Nitro-E-512px" else set())


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 2, "pos_embed_max_size": 9},
        {"sample_size": 32, "use_sub_attn": False, "pos_embed_max_size": 32},
        {
            "qk_norm": None,
            "out_channels": 5,
            "attention_head_dim": 12,
            "num_attention_heads": 4,
            "caption_projection_dim": 48,
        },
        {"repa_depth": 8, "projector_dim": 10, "z_dims": [4, 7]},
        {"num_layers": 3, "out_channels": None},
    ],
)
def test_any_configuration_makes_the_round_trip(changes: dict[str, Any]) -> None:
    model = built(**changes)
    state = find("Nitro-E").to_official(model)
    again = convert(state, "Nitro-E", SMALL | changes)
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    side = model.config.sample_size
    given = inputs(side, side)
    with torch.no_grad():
        assert torch.equal(model(**given).sample, again(**given).sample)


def test_positions_follow_the_size_the_release_was_made_for() -> None:
    assert built(sample_size=16).config.position_scale == 1.0
    assert built(sample_size=32).config.position_scale == 2.0
    table = official(sample_size=32, pos_embed_max_size=48)["pos_embed.pos_embed"]
    assert table.shape == (1, 48 * 48, 16)
    where = 5 * 32 / 48 / 2  # column 5 of the stored table, in the release's units
    assert float(table[0, 5, 0]) == pytest.approx(math.sin(where), abs=1e-6)
    assert float(table[0, 5 * 48, 8]) == pytest.approx(math.sin(where), abs=1e-6)


def test_what_nobody_reads_may_be_anything_or_missing() -> None:
    state = official()
    unread = [
        key for key in state if key.startswith("block_groups.2.3.attn.") and "add" in key and "_q" in key
    ]
    assert len(unread) == 3
    plain = convert(state, "Nitro-E", SMALL)
    filled = convert(state | {key: torch.randn_like(state[key]) for key in unread}, "Nitro-E", SMALL)
    without = convert({key: one for key, one in state.items() if key not in unread}, "Nitro-E", SMALL)
    given = inputs()
    with torch.no_grad():
        assert torch.equal(plain(**given).sample, filled(**given).sample)
        assert torch.equal(plain(**given).sample, without(**given).sample)


def test_wrong_weights_and_arguments_are_refused_in_words() -> None:
    state = official()
    table = state["pos_embed.pos_embed"]
    for wrong, words in (
        (
            {key: one for key, one in state.items() if key != "pos_embed.pos_embed"},
            "pos_embed.pos_embed is missing",
        ),
        (state | {"pos_embed.pos_embed": table + 0.1}, "largest difference 0.1"),
        (state | {"block_groups.3.0.norm1.weight": table}, "unknown weight 'block_groups.3.0"),
        (state | {"extra.weight": table}, "unknown weight 'extra.weight'"),
        (
            {key: one for key, one in state.items() if "ff_context" not in key},
            "missing transformer_blocks.0.ff_context",
        ),
    ):
        with pytest.raises(LayoutError, match=words):
            convert(wrong, "Nitro-E", SMALL)
    for changes, words in (
        ({"caption_projection_dim": 20}, "caption_projection_dim must be heads times head size, 16, got 20"),
        ({"qk_norm": "layer_norm"}, "rms_norm or none"),
        ({"depth": 3}, "no argument 'depth'"),
    ):
        with pytest.raises(LayoutError, match=words):
            built(**changes)


def test_cases_borrow_inputs_and_say_by_their_names_what_they_are() -> None:
    given = inputs()
    cases = [
        Case("case0", dict(given)),
        Case("case1", {"skip_layers": torch.tensor([0, 2])}),
        Case("case2_full_attention", {}),
        Case("case3_training", {}, {"tokens": torch.zeros(1)}),
    ]
    system = find("Nitro-E")
    done = system.complete(cases)
    assert [sorted(set(one.inputs) - set(given)) for one in done] == [
        [],
        ["skip_layers"],
        ["full_attention"],
        ["training"],
    ]
    assert all(one.inputs["hidden_states"] is given["hidden_states"] for one in done)
    model = built(repa_depth=1, projector_dim=5, z_dims=[4])
    torch.nn.init.normal_(model.proj_out.proj.weight)
    with torch.no_grad():
        outputs = [system.run(model, one.inputs) for one in done]
    assert [sorted(one) for one in outputs] == [["sample"]] * 3 + [["tokens", "zs.0"]]
    pictures = [one["sample"] for one in outputs[:3]]
    assert all(not torch.allclose(pictures[0], other, atol=1e-4) for other in pictures[1:])
    assert torch.equal(outputs[3]["tokens"], pictures[0].flatten(2).transpose(1, 2))
    with torch.no_grad():
        assert torch.equal(system.run(model, given)["sample"], pictures[0]), (
            "full attention was only for that case"
        )
    with pytest.raises(LayoutError, match="maybe skip_layers"):
        system.run(model, {"x": torch.zeros(1)})
