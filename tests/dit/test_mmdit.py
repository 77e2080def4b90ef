"""MMDiT: the pre-only last block, masks, residuals, times a token, kinds of positions and of predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit.backbones.mmdit import MMDiT
from dit.grid import Grid
from dit.model import Context
from dit.modulation import ZeroModulation
from dit.prediction import SMALLEST_NOISE

TINY: dict[str, Any] = {
    "in_channels": 4, "patch_size": 2, "sample_size": 8, "width": 16, "heads": 2, "dual_depth": 2, "single_depth": 1,
    "mlp_ratio": 2.0, "context_dim": 6, "pooled_dim": 5,
}  # fmt: skip
TIMES = torch.tensor([20.0, 800.0])


def tiny(**changes: Any) -> Any:
    """A small network whose zero maps are filled, so that everything in it counts."""
    torch.manual_seed(0)
    model = MMDiT(**(TINY | changes)).eval()
    for one in model.parameters():
        if not one.any():
            nn.init.normal_(one, std=0.2)
    return model


def inputs(batch: int = 2, rows: int = 8, columns: int = 8, text: int = 3, **changes: Any) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, rows, columns, generator=draw),
        "timestep": TIMES[:batch],
        "encoder_hidden_states": torch.randn(batch, text, 6, generator=draw),
        "pooled_projections": torch.randn(batch, 5, generator=draw),
    } | changes


def velocity(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**given).sample
    return out


def differ(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, atol=1e-3)


def test_untrained_network_returns_zero() -> None:
    assert not velocity(MMDiT(**TINY), inputs()).any()


def test_every_input_matters() -> None:
    model = tiny()
    out = velocity(model, inputs())
    assert out.shape == (2, 4, 8, 8)
    for name, value in inputs().items():
        assert differ(velocity(model, inputs(**{name: value * 1.5})), out), name


def test_pre_only_last_block_passes_the_text_on_unchanged() -> None:
    model = tiny(single_depth=0)
    first, last = model.transformer_blocks
    text, image, temb = torch.randn(1, 3, 16), torch.randn(1, 16, 16), torch.randn(1, 16)
    context = Context(Grid(1, 4, 4), temb, rotary=model._rotary(Grid(1, 4, 4), 3, torch.device("cpu")))
    given = {"hidden_states": image, "encoder_hidden_states": text, "temb": temb, "context": context}
    kept, moved = last(**given)
    assert kept is text
    assert differ(moved, image)
    assert last.pre_only
    assert not hasattr(last, "ff_context")
    changed, _ = first(**given)
    assert not first.pre_only
    assert differ(changed, text)
    assert not any(
        block.pre_only for block in tiny().transformer_blocks
    )  # single blocks follow and read the text
    other = last(**(given | {"encoder_hidden_states": torch.randn(1, 3, 16)}))[1]
    assert differ(other, moved)


@pytest.mark.parametrize("single_depth", [0, 1])
@pytest.mark.parametrize("position", ["rope", "sincos", "both"])
def test_masked_padding_changes_nothing(position: str, single_depth: int) -> None:
    model = tiny(position=position, single_depth=single_depth)
    plain = inputs()
    out = velocity(model, plain)
    longer = torch.cat([plain["encoder_hidden_states"], 100 * torch.randn(2, 4, 6)], dim=1)
    mask = torch.arange(7).expand(2, 7) < 3
    padded = velocity(model, plain | {"encoder_hidden_states": longer, "encoder_attention_mask": mask})
    torch.testing.assert_close(padded, out, atol=1e-5, rtol=1e-4)
    whole = velocity(model, plain | {"encoder_attention_mask": torch.ones(2, 3, dtype=torch.long)})
    torch.testing.assert_close(whole, out, atol=1e-5, rtol=1e-4)
    assert differ(velocity(model, plain | {"encoder_hidden_states": longer}), out)


@pytest.mark.parametrize("single_depth", [0, 1])
@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_one_time_a_token_equals_one_a_sample_where_constant(prediction: str, single_depth: int) -> None:
    model = tiny(prediction_type=prediction, single_depth=single_depth)
    out = velocity(model, inputs())
    each = TIMES[:, None].expand(2, 16).contiguous()
    torch.testing.assert_close(velocity(model, inputs(timestep=each)), out, atol=1e-4, rtol=1e-4)
    each[1, 5] = 100.0
    assert differ(velocity(model, inputs(timestep=each))[1], out[1])


def test_residuals_are_added_after_the_blocks_they_belong_to() -> None:
    model = tiny()
    out = velocity(model, inputs())
    zeros = torch.zeros(2, 16, 16)
    nothing: dict[str, Any] = {
        "controlnet_block_samples": [zeros, zeros],
        "controlnet_single_block_samples": [zeros],
    }
    assert torch.equal(velocity(model, inputs(**nothing)), out)
    residual = torch.randn(2, 16, 16)
    seen: list[Tensor] = []
    hook = model.transformer_blocks[1].register_forward_pre_hook(
        lambda _m, _a, given: seen.append(given["hidden_states"]), with_kwargs=True
    )
    velocity(model, inputs())
    velocity(model, inputs(controlnet_block_samples=[residual, zeros]))
    velocity(model, inputs(controlnet_block_samples=[zeros, residual]))
    hook.remove()
    torch.testing.assert_close(seen[1], seen[0] + residual)
    assert torch.equal(seen[2], seen[0])
    one_for_both = velocity(model, inputs(controlnet_block_samples=[residual]))
    assert torch.equal(one_for_both, velocity(model, inputs(controlnet_block_samples=[residual, residual])))
    assert differ(velocity(model, inputs(controlnet_single_block_samples=[residual])), out)
    assert differ(velocity(model, inputs(controlnet_block_samples=[zeros, residual])), out)


def test_fewer_residuals_than_blocks_are_spread_evenly() -> None:
    model = tiny(dual_depth=4)
    a, b = torch.randn(2, 16, 16), torch.randn(2, 16, 16)
    spread = velocity(model, inputs(controlnet_block_samples=[a, b]))
    assert torch.equal(spread, velocity(model, inputs(controlnet_block_samples=[a, a, b, b])))
    assert differ(spread, velocity(model, inputs(controlnet_block_samples=[a, b, a, b])))


def test_predicted_picture_and_velocity_agree() -> None:
    """From v = noise - x and z = (1 - t) x + t noise follows x = z - t v, whatever the network says."""
    picture, straight = tiny(prediction_type="sample"), tiny()
    picture.load_state_dict(straight.state_dict())
    given = inputs()
    said = velocity(straight, given)  # here the last layer's own words
    found = velocity(picture, given)
    level = (TIMES / 1000).reshape(2, 1, 1, 1)
    torch.testing.assert_close(given["hidden_states"] - level * found, said, atol=1e-4, rtol=1e-4)


def test_predicted_picture_at_no_noise_stays_finite() -> None:
    model = tiny(prediction_type="sample")
    given = inputs(timestep=torch.zeros(2))
    out = velocity(model, given)
    assert bool(out.isfinite().all())
    bound = (given["hidden_states"].abs().max() + 100) / SMALLEST_NOISE
    assert float(out.abs().max()) < bound


def test_guidance_is_an_input_of_distilled_models() -> None:
    model = tiny(guidance_embeds=True)
    low, high = (velocity(model, inputs(guidance=torch.full((2,), scale))) for scale in (1.0, 4.0))
    assert differ(low, high)
    with pytest.raises(ValueError, match="pass guidance"):
        model(**inputs())
    assert tiny().guidance_embed is None


def test_pooled_path_can_be_left_out_but_not_forgotten() -> None:
    with pytest.raises(ValueError, match="pass pooled_projections"):
        tiny()(**inputs(pooled_projections=None))
    without = tiny(pooled_dim=None)
    assert torch.equal(velocity(without, inputs()), velocity(without, inputs(pooled_projections=None)))


@pytest.mark.parametrize("position", ["rope", "sincos", "both"])
def test_places_matter_and_sizes_may_change(position: str) -> None:
    model = tiny(position=position)
    wide = inputs(rows=4, columns=12)
    out = velocity(model, wide)
    assert out.shape == (2, 4, 4, 12)
    moved = velocity(model, wide | {"hidden_states": wide["hidden_states"].roll(2, dims=-1)})
    assert differ(moved.roll(-2, dims=-1), out)


def test_without_positions_a_shift_would_not_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control for the test above: with positions taken away, tokens may be permuted freely."""
    model = tiny(position="sincos")
    monkeypatch.setattr(
        "dit.backbones.mmdit.sincos_2d", lambda width, grid, device: torch.zeros(grid.tokens, width)
    )
    given = inputs(rows=4, columns=12)
    moved = velocity(model, given | {"hidden_states": given["hidden_states"].roll(2, dims=-1)})
    torch.testing.assert_close(moved.roll(-2, dims=-1), velocity(model, given), atol=1e-5, rtol=1e-4)


def test_rope_and_sincos_are_different_networks() -> None:
    rope, sincos = tiny(position="rope"), tiny(position="sincos")
    sincos.load_state_dict(rope.state_dict())
    assert differ(velocity(rope, inputs()), velocity(sincos, inputs()))


def test_rope_axes_are_taken_from_the_settings() -> None:
    rows, both = tiny(rope_axes=(0, 8, 0)), tiny()
    both.load_state_dict(rows.state_dict())
    given = inputs()
    turned = given["hidden_states"].roll(2, dims=-1)
    blind = velocity(rows, given | {"hidden_states": turned}).roll(-2, dims=-1)
    torch.testing.assert_close(blind, velocity(rows, given), atol=1e-5, rtol=1e-4)  # only rows are told apart
    assert differ(velocity(both, given | {"hidden_states": turned}).roll(-2, dims=-1), velocity(both, given))


@pytest.mark.parametrize("depths", [(2, 0), (0, 2), (1, 1)])
def test_either_kind_of_block_may_be_absent(depths: tuple[int, int]) -> None:
    model = tiny(dual_depth=depths[0], single_depth=depths[1])
    assert (len(model.transformer_blocks), len(model.single_transformer_blocks)) == depths
    out = velocity(model, inputs())
    assert differ(velocity(model, inputs(encoder_hidden_states=torch.randn(2, 3, 6))), out)


def test_blocks_of_both_kinds_return_text_first() -> None:
    model = tiny()
    given = {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "temb": torch.randn(1, 16),
        "context": Context(Grid(1, 4, 4), torch.randn(1, 16)),
    }
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
        text, image = block(**given)
        assert (text.shape, image.shape) == ((1, 3, 16), (1, 16, 16))


def test_text_can_be_swapped() -> None:
    """Swapping prompts within a batch swaps nothing else: samples do not hear each other."""
    model = tiny()
    given = inputs()
    swapped = {name: value.flip(0) for name, value in given.items()}
    torch.testing.assert_close(velocity(model, swapped).flip(0), velocity(model, given), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_qk_norm_keeps_logits_bounded() -> None:
    model = tiny(dual_depth=1, single_depth=0)
    attn = model.transformer_blocks[0].attn
    q, k, _ = attn.project(1e4 * torch.randn(1, 16, 16))
    assert float((q.flatten(2) @ k.flatten(2).transpose(1, 2)).abs().max()) <= 16.01
    loud = tiny(dual_depth=1, single_depth=0, qk_norm=False).transformer_blocks[0].attn
    q, k, _ = loud.project(1e4 * torch.randn(1, 16, 16))
    assert float((q.flatten(2) @ k.flatten(2).transpose(1, 2)).abs().max()) > 1e4


def test_modulation_starts_at_zero() -> None:
    model = MMDiT(**TINY)
    slots = [one for one in model.modules() if isinstance(one, ZeroModulation)]
    assert len(slots) == 2 * 2 + 1 + 1
    assert not any(one.linear.weight.any() or one.linear.bias.any() for one in slots)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 18}, "width=18"),
        ({"dual_depth": 0, "single_depth": 0}, "at least one block"),
        ({"position": "learned"}, "rope, sincos or both"),
        ({"prediction_type": "noise"}, "velocity or sample"),
        ({"rope_axes": (2, 2, 2)}, "adding up to the head size 8"),
        ({"rope_axes": (1, 3, 4)}, "even counts"),
        ({"width": 12}, "even counts"),
        ({"experts": "densee"}, "did you mean 'dense'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MMDiT(**(TINY | changes))
