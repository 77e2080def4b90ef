"""Costs: the published figures, analysis against counting, and units that are never mixed up."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

from dit.backbones.dit import DiT
from dit.ledger import KINDS, activated_of, analytic, counted, kind_of, macs_of
from dit.presets import build


def inputs_for(model: Any, size: tuple[int, int], text: int = 0) -> dict[str, torch.Tensor]:
    config = model.config
    given = {"hidden_states": torch.empty(1, config.in_channels, *size), "timestep": torch.empty(1)}
    if isinstance(model, DiT):
        return given | {"class_labels": torch.zeros(1, dtype=torch.long)}
    given["encoder_hidden_states"] = torch.empty(1, text, config.context_dim)
    if config.pooled_dim:
        given["pooled_projections"] = torch.empty(1, config.pooled_dim)
    if config.guidance_embeds:
        given["guidance"] = torch.empty(1)
    return given


@pytest.mark.parametrize(("size", "gmacs"), [("s", 6.06), ("b", 23.0), ("l", 80.7), ("xl", 118.7)])
def test_dit_costs_are_the_published_ones(size: str, gmacs: float) -> None:
    """The papers print these multiply-accumulates as GFLOPs."""
    with torch.device("meta"):
        ledger = analytic(build(f"dit-{size}/2"), 32, 32)
    assert ledger.macs / 1e9 == pytest.approx(gmacs, rel=2e-3)
    assert ledger.flops == 2 * ledger.macs


def test_flux_costs_are_the_known_ones() -> None:
    with torch.device("meta"):
        ledger = analytic(build("mmdit-flux"), 128, 128, text=512)
    assert ledger.macs / 1e9 == pytest.approx(37_192, rel=1e-4)
    share = ledger.parameters_by_kind()
    assert share["mlp"] / ledger.parameters == pytest.approx(0.482, abs=0.001)
    last = 2 * 3072 * (3072 + 1)  # the known share of modulation leaves the last layer's out
    assert (share["modulation"] - last) / ledger.parameters == pytest.approx(0.271, abs=0.001)


@pytest.mark.parametrize(
    ("name", "changes", "size", "text"),
    [
        ("dit-s/2", {}, (32, 32), 0),
        ("sit-b/4", {"depth": 2, "learn_sigma": False}, (16, 40), 0),
        ("mmdit-sd3", {"dual_depth": 3}, (64, 32), 77),
        ("mmdit-flux", {"dual_depth": 2, "single_depth": 3}, (32, 48), 40),
        ("emoji", {}, (32, 32), 12),
    ],
)
def test_analysis_equals_counting(
    name: str, changes: dict[str, Any], size: tuple[int, int], text: int
) -> None:
    with torch.device("meta"):
        model = build(name, **changes)
        inputs = inputs_for(model, size, text)
    told, seen = analytic(model, *size, text=text), counted(model, inputs)
    assert told.macs == seen.macs > 0
    assert told.parameters == seen.parameters
    assert told.tokens == seen.tokens
    if getattr(model.config, "single_depth", 0) == 0:  # counting cannot divide a map that two kinds share
        assert told.by_kind() == seen.by_kind()


def test_counting_on_real_tensors_agrees_with_the_meta_device() -> None:
    with torch.device("meta"):
        model = build("dit-s/8", depth=2)
        there = counted(model, inputs_for(model, (32, 32)))
    real = build("dit-s/8", depth=2)
    here = counted(real, inputs_for(real, (32, 32)))
    assert here.macs == there.macs
    assert [one.macs for one in here.parts] == [one.macs for one in there.parts]
    assert all(one.macs >= 0 for one in here.parts)
    assert next(one for one in here.parts if one.path == "").macs == 0


def test_counting_works_on_diffusers_transformers() -> None:
    with torch.device("meta"):
        sd3 = SD3Transformer2DModel(num_layers=2)
        inputs = {
            "hidden_states": torch.empty(1, 16, 32, 32),
            "encoder_hidden_states": torch.empty(1, 10, 4096),
            "pooled_projections": torch.empty(1, 2048),
            "timestep": torch.empty(1),
        }
        ledger = counted(sd3, inputs)
    width, tokens, text = 1152, 256, 10
    assert ledger.tokens == tokens
    assert ledger.by_kind()["mlp"] == 8 * width**2 * (2 * tokens + text)
    both = 4 * width**2 * (tokens + text) + 2 * (tokens + text) ** 2 * width
    last = both - width**2 * text  # the pre-only last block makes no text out
    assert ledger.by_kind()["attention"] == both + last
    assert ledger.by_kind()["modulation"] == width**2 * (6 + 6 + 6 + 2 + 2)
    with pytest.raises(TypeError, match="reports no costs"):
        analytic(sd3, 32, 32)


def test_counting_takes_packed_tokens() -> None:
    with torch.device("meta"):
        flux = FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
        inputs = {
            "hidden_states": torch.empty(1, 24, 64),
            "encoder_hidden_states": torch.empty(1, 8, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "img_ids": torch.empty(24, 3),
            "txt_ids": torch.empty(8, 3),
        }
        ledger = counted(flux, inputs)
    assert ledger.tokens == 24
    assert set(ledger.by_kind()) == set(KINDS)
    assert all(macs > 0 for macs in ledger.by_kind().values())


def test_summary_says_units() -> None:
    with torch.device("meta"):
        ledger = analytic(build("dit-s/2"), 32, 32)
    assert "GMACs" in str(ledger)
    assert "12.11" in str(ledger)
    plain = json.loads(json.dumps(ledger.to_dict()))
    assert plain["flops"] == 2 * plain["macs"]
    assert sum(plain["macs_per_token"].values()) == pytest.approx(plain["macs"] / 256)


def test_routed_modules_speak_for_themselves() -> None:
    class TwoOfEight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(8))

        def macs(self, rows: int, text: int = 0) -> int:
            return 2 * 16 * rows

        def activated_parameters(self) -> int:
            return 2 * 16

    outer = nn.Sequential(nn.Linear(4, 4, bias=False), TwoOfEight())
    assert macs_of(outer, 10) == 10 * (16 + 32)
    assert activated_of(outer) == 16 + 32


def test_a_forgotten_part_is_noticed() -> None:
    model = DiT(width=8, heads=2, depth=1, num_classes=2)
    model.extra = nn.Linear(3, 3)
    with pytest.raises(AssertionError, match="forgets"):
        analytic(model, 4, 4)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("transformer_blocks.0.attn.to_q", "attention"),
        ("transformer_blocks.0.attn.norm_q", "attention"),
        ("transformer_blocks.3.ff.net.0.proj", "mlp"),
        ("transformer_blocks.3.norm1.linear", "modulation"),
        ("single_transformer_blocks.3.proj_out", "mlp"),
        ("adaln_single.linear", "modulation"),
        ("time_text_embed.timestep_embedder.linear_1", "embed"),
        ("proj_out", "embed"),
        ("", "embed"),
    ],
)
def test_kinds_are_told_from_names(path: str, kind: str) -> None:
    assert kind_of(path) == kind
