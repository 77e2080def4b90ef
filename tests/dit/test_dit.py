"""DiT: starts as the identity, guidance, directions of time, per-token times, and sizes it was not made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit.backbones.dit import DiT, guide, guided
from dit.embeddings import sincos_2d
from dit.experts.dense import Dense
from dit.grid import Grid, patchify
from dit.mixers.full import Full
from dit.model import Context

TINY: dict[str, Any] = {"sample_size": 8, "width": 16, "depth": 2, "heads": 2, "num_classes": 5}


def tiny(**changes: Any) -> Any:
    """A small network whose zero maps are filled, so that everything in it counts."""
    torch.manual_seed(0)
    model = DiT(**(TINY | changes)).eval()
    for one in model.parameters():
        if not one.any():
            nn.init.normal_(one, std=0.2)
    return model


def pictures(batch: int = 2, channels: int = 4, rows: int = 8, columns: int = 8) -> Tensor:
    return torch.randn(batch, channels, rows, columns, generator=torch.Generator().manual_seed(1))


TIMES, LABELS = torch.tensor([20.0, 800.0]), torch.tensor([3, 5])


def test_untrained_network_returns_zero_and_its_blocks_change_nothing() -> None:
    model = DiT(**TINY)
    assert not model(pictures(), TIMES, LABELS).sample.any()
    tokens, temb = torch.randn(2, 16, 16), torch.randn(2, 16)
    for block in model.transformer_blocks:
        assert torch.equal(
            block(hidden_states=tokens, temb=temb, context=Context(Grid(1, 4, 4), temb)), tokens
        )


def test_forward_is_the_sum_of_its_parts() -> None:
    model = tiny(depth=1)
    x = pictures()
    tokens = patchify(x, (1, 2, 2)) @ model.x_embedder.proj.weight.T + model.x_embedder.proj.bias
    tokens = tokens + sincos_2d(16, Grid(1, 4, 4))
    temb = model.time_embed(TIMES, torch.float32) + model.label_embed.embedding_table.weight[LABELS]
    block = model.transformer_blocks[0]
    six = [one.unsqueeze(1) for one in block.modulation.linear(nn.functional.silu(temb)).chunk(6, 1)]

    def norm(value: Tensor) -> Tensor:
        return nn.functional.layer_norm(value, (16,), eps=1e-6)

    tokens = tokens + six[2] * block.attn(norm(tokens) * (1 + six[1]) + six[0])
    tokens = tokens + six[5] * block.ff(norm(tokens) * (1 + six[4]) + six[3])
    shift, scale = (
        one.unsqueeze(1) for one in model.modulation_out.linear(nn.functional.silu(temb)).chunk(2, 1)
    )
    out = model.proj_out.proj(norm(tokens) * (1 + scale) + shift)
    torch.testing.assert_close(patchify(model(x, TIMES, LABELS).sample, (1, 2, 2)), out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "channels"),
    [
        ({}, 8),
        ({"learn_sigma": False}, 4),
        ({"convention": "sit"}, 4),
        ({"convention": "flow"}, 4),
        ({"in_channels": 1}, 2),
    ],
)
def test_output_channels(changes: dict[str, Any], channels: int) -> None:
    model = tiny(**changes)
    x = pictures(channels=model.config.in_channels, rows=4, columns=12)
    assert model(x, TIMES, LABELS).sample.shape == (2, channels, 4, 12)
    assert torch.equal(model(x, TIMES, LABELS, return_dict=False)[0], model(x, TIMES, LABELS).sample)


def test_time_label_and_place_matter() -> None:
    model = tiny()
    x = pictures()
    out = model(x, TIMES, LABELS).sample
    assert not torch.allclose(model(x, TIMES + 50, LABELS).sample, out, atol=1e-3)
    assert not torch.allclose(model(x, TIMES, LABELS - 1).sample, out, atol=1e-3)
    assert not torch.allclose(model(x.flip(-1), TIMES, LABELS).sample.flip(-1), out, atol=1e-3)


def test_one_time_a_token_equals_one_a_sample_where_constant() -> None:
    model = tiny()
    x = pictures()
    out = model(x, TIMES, LABELS).sample
    each = TIMES[:, None].expand(2, 16).contiguous()
    torch.testing.assert_close(model(x, each, LABELS).sample, out, atol=1e-5, rtol=1e-4)
    each[0, 3] = 900.0
    assert not torch.allclose(model(x, each, LABELS).sample[0], out[0], atol=1e-3)


def test_sit_runs_the_flow_network_against_time_and_sign() -> None:
    sit, flow = tiny(convention="sit"), tiny(convention="flow")
    flow.load_state_dict(sit.state_dict())
    x = pictures()
    towards_noise = sit(x, TIMES, LABELS).sample
    towards_picture = flow(x, 1 - TIMES / 1000, LABELS).sample
    torch.testing.assert_close(towards_noise, -towards_picture)
    assert not torch.allclose(towards_noise, -flow(x, TIMES, LABELS).sample, atol=1e-3)


def test_flow_network_is_the_plain_one_without_the_variance() -> None:
    flow, plain = tiny(convention="flow"), tiny()
    flow.load_state_dict(plain.state_dict())
    torch.testing.assert_close(
        flow(pictures(), TIMES, LABELS).sample, plain(pictures(), TIMES, LABELS).sample[:, :4]
    )


@pytest.mark.parametrize("channels", [None, 3])
def test_guidance_acts_on_the_channels_it_is_given(channels: int | None) -> None:
    model = tiny()
    x, labels = pictures(), torch.tensor([0, 4])
    with torch.no_grad():
        cond = model(x, TIMES, labels).sample
        uncond = model(x, TIMES, torch.tensor([5, 5])).sample
        found = guided(model, x, TIMES, labels, 3.0, channels=channels)
    count = channels or 4
    torch.testing.assert_close(found[:, :count], (3 * cond - 2 * uncond)[:, :count], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[:, count:], cond[:, count:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(guided(model, x, TIMES, labels, 1.0), cond, atol=1e-5, rtol=1e-4)


def test_guide_takes_a_tensor_as_scale() -> None:
    cond, uncond = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    assert torch.equal(guide(cond, uncond, torch.tensor(2.0), 4), guide(cond, uncond, 2.0, 4))


def test_guidance_needs_a_null_class() -> None:
    model = tiny(null_class=False)
    assert model.label_embed.embedding_table.weight.shape[0] == 5
    with pytest.raises(ValueError, match="no null class"):
        guided(model, pictures(), TIMES, LABELS, 2.0)


def test_slots_are_filled_by_settings() -> None:
    model = tiny(mixer=Full(qk_norm=True), experts="dense:activation=geglu")
    assert isinstance(model.transformer_blocks[0].attn.norm_q, nn.RMSNorm)
    assert model.config.mixer == Full(qk_norm=True).to_dict()
    assert model.config.experts == "dense:activation=geglu"
    again = DiT.from_config(model.config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert tiny(experts=Dense(activation="gelu")).transformer_blocks[0].ff.net[2].in_features == 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 18}, "width must divide by heads and by 4, got width=18"),
        ({"heads": 3}, "heads=3"),
        ({"depth": 0}, "depth=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"patch_size": 3}, "sample_size=8, patch_size=3"),
        ({"convention": "edm"}, "one of ddpm, flow, sit, got 'edm'"),
        ({"mixer": "ful"}, "did you mean 'full'"),
        ({"modulation": "adaln-zer"}, "did you mean 'adaln-zero'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DiT(**(TINY | changes))


def test_sides_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be cut into patches"):
        tiny()(pictures(rows=7), TIMES, LABELS)


def test_a_few_steps_of_training_learn_the_classes() -> None:
    torch.manual_seed(0)
    model = DiT(
        in_channels=1,
        patch_size=2,
        sample_size=4,
        width=16,
        depth=1,
        heads=2,
        num_classes=2,
        convention="flow",
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        labels = torch.randint(0, 2, (32,))
        clean = (labels * 2.0 - 1).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        noise, t = torch.randn(32, 1, 4, 4), torch.rand(32)
        mixed = torch.lerp(clean, noise, t.reshape(-1, 1, 1, 1))
        loss = (model(mixed, t * 1000, labels).sample - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
