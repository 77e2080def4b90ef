"""VDT: the released weights, both ways of giving frames, times, positions, and what it costs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acceleration import Accelerator, AdaSpa, Refused, Untouched, XAttention, accelerated
from benchmarks import fidelity
from dit.backbones.vdt import VDT
from dit.clip_masks import masked_mean, task_mask
from dit.convert import LayoutError, convert, find
from dit.experts.dense import Experts
from dit.grid import Grid
from dit.ledger import analytic, counted, parameters_of
from dit.presets import build
from dit.spec import kinds

FIXTURE = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "VDT"
TINY: dict[str, Any] = {
    "sample_size": 8, "frames": 4, "width": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0,
}  # fmt: skip
OFFICIAL: dict[str, Any] = {
    "input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3, "num_frames": 4,
}  # fmt: skip
TIMES = torch.tensor([20.0, 800.0])


def recorded() -> Path:
    if not FIXTURE.is_dir():
        pytest.skip("the recorded values of VDT are not beside this project")
    return FIXTURE


def filled(model: Any) -> Any:
    """Return a network whose zero maps are filled, so that everything in it counts."""
    torch.manual_seed(0)
    for one in model.parameters():
        if not one.any():
            nn.init.normal_(one, std=0.2)
    return model.eval()


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    return filled(VDT(**(TINY | changes)))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def answer(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(*args, **kwargs).sample
    return out


def near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


# The release


def test_recorded_values_are_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main([str(recorded()), "--mid"]) == 0
    assert "19 of 19 recorded tensors reproduced" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["S/2", "L/2"])
def test_the_released_sizes_load_strictly(size: str) -> None:
    tables = json.loads((recorded() / "keys.json").read_text())
    keys = next(table for name, table in tables.items() if name.startswith(f"VDT-{size} "))
    args = json.loads((recorded() / "config.json").read_text())["official_presets"][f"VDT-{size}"]
    model = convert({name: torch.empty(shape, device="meta") for name, shape in keys.items()}, "VDT", args)
    official = find("VDT").to_official(model)
    assert {name: list(one.shape) for name, one in official.items()} == keys
    with torch.device("meta"):
        preset = build(f"vdt-{size.lower()}")
    assert {k: v.shape for k, v in preset.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    own = ("frames", "convention", "learn_sigma", "default_class", "sample_size", "heads", "num_classes")
    assert all(preset.config[name] == model.config[name] for name in own)
    trained = {name: shape for name, shape in keys.items() if name not in ("pos_embed", "time_embed")}
    assert parameters_of(preset) == sum(math.prod(shape) for shape in trained.values())
    width = preset.config.width
    assert parameters_of(preset.transformer_blocks[0]) / width**2 == pytest.approx(23, abs=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn_sigma": False, "class_dropout_prob": 0.0, "num_frames": 3},
        {"mode": "image", "patch_size": 4, "mlp_ratio": 2.0, "in_channels": 3},
    ],
)
def test_any_configuration_goes_there_and_back(changes: dict[str, Any]) -> None:
    args = OFFICIAL | changes
    system = find("VDT")
    torch.manual_seed(0)
    model = filled(system.build(args, {}))
    official = system.to_official(model)
    assert (
        ("time_embed" in official) == ("blocks.1.temporal_fc.bias" in official) == (args.get("mode") is None)
    )
    assert len(official["y_embedder.embedding_table.weight"]) == 3 + (args.get("class_dropout_prob") is None)
    again = convert(official, "VDT", args)
    frames = 1 if "mode" in args else args["num_frames"]
    x = noise(2, frames, args.get("in_channels", 4), 8, 8)
    t, mask = torch.tensor([0, 700]), (noise(2, frames, 8, 8) > 0).long()
    cases = (
        {"x": x, "t": t},
        {"x": x, "t": t, "raw_x": x.flip(0), "mask.some": mask, "mask.all": torch.ones_like(mask)},
        {"x_start": x, "t": t, "noise": x.transpose(1, 2).flip(0), "mask": mask},
    )
    with torch.no_grad():
        for inputs in cases:
            ours, theirs = system.run(model, inputs), system.run(again, inputs)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
            assert all(value.isfinite().all() for value in ours.values())
        channels = x.shape[2] * (1 + args.get("learn_sigma", True))
        plain, masked = system.run(model, cases[0])["model"], system.run(model, cases[1])
        assert plain.shape == (2, frames, channels, 8, 8)
        assert torch.equal(masked["model.all"], plain)
        assert not torch.allclose(masked["model.some"], plain, atol=1e-2)
        assert ("vb" in system.run(model, cases[2])) == args.get("learn_sigma", True)


def test_the_loss_of_the_release_hangs_on_the_size_of_the_mask_and_ours_does_not() -> None:
    system = find("VDT")
    model = system.build(OFFICIAL | {"learn_sigma": False}, {})  # untrained: it predicts 0 everywhere
    x, t = noise(1, 4, 4, 8, 8), torch.tensor([500])
    drawn = torch.ones(1, 4, 4, 8, 8)
    for given, share in ((1, 0.75), (3, 0.25)):
        mask = task_mask("predict", 4, 8, 8, given=given)[None]
        with torch.no_grad():
            released = system.run(model, {"x_start": x, "t": t, "noise": drawn, "mask": mask})["mse"]
        assert released.item() == pytest.approx(share)
        assert masked_mean(drawn**2, mask).item() == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"blocks.0.temporal_mlp.weight": torch.zeros(1)}, "unknown weight 'blocks.0.temporal_mlp.weight'"),
        ({"time_embed": torch.zeros(1, 4, 32)}, "stored time_embed is not the one"),
        ({"time_embed": torch.zeros(1, 5, 32)}, "time_embed is \\(1, 5, 32\\), expected \\(1, 4, 32\\)"),
        ({"time_embed": None}, "time_embed is missing"),
    ],
)
def test_foreign_weights_and_arguments_are_refused(wrong: dict[str, Tensor | None], words: str) -> None:
    system = find("VDT")
    model = system.build(OFFICIAL, {})
    official = {k: v for k, v in (system.to_official(model) | wrong).items() if v is not None}
    with pytest.raises(LayoutError, match=words):
        system.to_ours(official, model)
    with pytest.raises(LayoutError, match="no argument 'colour'"):
        system.build(OFFICIAL | {"colour": 1}, {})
    with pytest.raises(LayoutError, match="a case has x and t"):
        system.run(model, {"x": noise(1, 4, 4, 8, 8)})


# What is given


@pytest.mark.parametrize("clean_time", [False, True])
def test_given_sites_are_looked_at_and_nothing_behind_them(clean_time: bool) -> None:
    model = tiny(clean_time=clean_time)
    x, clean = noise(2, 4, 4, 8, 8), noise(2, 4, 4, 8, 8, seed=2)
    mask = torch.stack([task_mask("predict", 4, 8, 8), task_mask("region", 4, 8, 8, box=(1, 0, 5, 8))])
    out = answer(model, x, TIMES, mask=mask, clean=clean)
    where = mask[:, None].bool()
    behind = answer(
        model, torch.where(where, x, x + 5), TIMES, mask=mask, clean=torch.where(where, clean - 5, clean)
    )
    assert torch.equal(behind, out)
    assert not torch.allclose(answer(model, x, TIMES, mask=mask, clean=clean + 1), out, atol=1e-2)
    assert not torch.allclose(answer(model, x, TIMES), out, atol=1e-2)
    nothing = torch.ones(4, 8, 8)
    near(answer(model, x, TIMES, mask=nothing, clean=clean), answer(model, x, TIMES))


@pytest.mark.parametrize("modulation", ["adaln-zero", "adaln-single"])
def test_clean_tokens_have_time_zero(modulation: str) -> None:
    """Two conditionings of a clip are chosen between token by token: the same as one time a token."""
    model, plain = tiny(clean_time=True, modulation=modulation), tiny(modulation=modulation)
    x, clean = noise(2, 4, 4, 8, 8), noise(2, 4, 4, 8, 8, seed=2)
    mask = torch.stack([task_mask("first-last", 4, 8, 8), task_mask("region", 4, 8, 8, box=(0, 0, 4, 6))])
    tokens = mask[:, :, ::2, ::2].flatten(1)
    out = answer(model, x, TIMES, mask=mask, clean=clean)
    near(out, answer(plain, x, TIMES[:, None] * tokens, mask=mask, clean=clean))
    assert not torch.allclose(out, answer(plain, x, TIMES, mask=mask, clean=clean), atol=1e-2)
    near(answer(model, x, TIMES[:, None].expand(2, 64), mask=mask, clean=clean), out)


def test_one_time_a_frame_is_spread_over_its_tokens() -> None:
    model = tiny()
    x, each = noise(2, 4, 4, 8, 8), torch.tensor([[0.0, 100.0, 500.0, 900.0], [3.0, 2.0, 1.0, 0.0]])
    near(answer(model, x, each), answer(model, x, each.repeat_interleave(16, 1)))
    near(answer(model, x, TIMES[:, None].expand(2, 4)), answer(model, x, TIMES))
    with pytest.raises(ValueError, match="one a clip, a frame or a token \\(4 frames, 64 tokens\\), got 5"):
        model(x, torch.zeros(2, 5))


def test_frames_beside_the_clip_are_frames_of_the_clip_but_for_their_mark() -> None:
    """Attention has no order: with the mark at zero, six frames of which two are given, and four beside two, are one network."""
    for clean_time in (False, True):
        beside, within = tiny(conditioning="concatenate", clean_time=clean_time), tiny(clean_time=clean_time)
        state = {name: one for name, one in beside.state_dict().items() if name != "given_embed.weight"}
        within.load_state_dict(state)
        whole, clean = noise(2, 4, 6, 8, 8), noise(2, 4, 6, 8, 8, seed=2)
        mask = task_mask("keyframes", 6, 8, 8, keyframes=(0, 3))
        given, rest = [0, 3], [1, 2, 4, 5]
        inputs = {"condition_frames": clean[:, :, given], "condition_index": torch.tensor(given)}
        expected = answer(within, whole, TIMES, mask=mask, clean=clean)[:, :, rest]
        found = answer(beside, whole[:, :, rest], TIMES, frame_index=torch.tensor(rest), **inputs)
        assert not torch.allclose(found, expected, atol=1e-3)
        beside.given_embed.weight.data.zero_()
        near(answer(beside, whole[:, :, rest], TIMES, frame_index=torch.tensor(rest), **inputs), expected)


@pytest.mark.parametrize("mixer", ["spacetime", "full"])
def test_any_count_of_frames_beside_and_absent_ones_are_not_heard(mixer: str) -> None:
    model = tiny(conditioning="concatenate", mixer=mixer)
    x, more = noise(2, 4, 3, 8, 8), noise(2, 4, 5, 8, 8, seed=2)
    places, there = torch.tensor([-1.0, 4.0, 0.5, 9.0, 2.0]), torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 0, 1]])
    out = answer(model, x, TIMES, condition_frames=more, condition_index=places, condition_mask=there)
    for i in range(2):
        heard = there[i].bool()
        alone = answer(
            model,
            x[i : i + 1],
            TIMES[i : i + 1],
            condition_frames=more[i : i + 1, :, heard],
            condition_index=places[heard],
        )
        near(alone, out[i : i + 1])
    none = answer(model, x, TIMES, condition_frames=more, condition_mask=torch.zeros(2, 5))
    near(none, answer(model, x, TIMES))


# Frames, times, pictures


@pytest.mark.parametrize("position", ["sincos", "rope", "both"])
@pytest.mark.parametrize("mixer", ["spacetime", "full"])
def test_order_is_in_the_positions_alone_and_frames_may_be_more_or_between(position: str, mixer: str) -> None:
    model = tiny(position=position, mixer=mixer)
    x, order = noise(2, 4, 6, 8, 8), torch.tensor([3, 0, 5, 1, 4, 2])
    out = answer(model, x, TIMES)  # six frames, made for four
    near(answer(model, x, TIMES, frame_index=torch.arange(6)), out)
    near(answer(model, x[:, :, order], TIMES, frame_index=order), out[:, :, order])
    halves = answer(model, x, TIMES, frame_index=torch.arange(6) / 2)
    assert not torch.allclose(halves, out, atol=1e-2)
    each = torch.stack([torch.arange(6), torch.arange(6) / 2])
    near(answer(model, x, TIMES, frame_index=each), torch.stack([out[0], halves[1]]))
    with pytest.raises(ValueError, match="one for each of 6 frames"):
        model(x, TIMES, frame_index=torch.arange(5))


@pytest.mark.parametrize("mixer", ["spacetime", "full"])
def test_rotary_positions_say_how_far_apart_tokens_are(mixer: str) -> None:
    model, x = tiny(position="rope", mixer=mixer), noise(2, 4, 4, 8, 8)
    out = answer(model, x, TIMES)
    near(answer(model, x, TIMES, frame_index=torch.arange(4) + 3), out)
    for other in ("sincos", "both"):
        table = tiny(position=other, mixer=mixer)
        assert (answer(table, x, TIMES, frame_index=torch.arange(4) + 3) - answer(table, x, TIMES)).abs().max() > 1e-2
    for axis, token in ((2, 1), (3, 2), (4, 2)):  # without positions, tokens in another order are answered in that order
        moved = answer(model, x.roll(token, axis), TIMES).roll(-token, axis)
        assert (moved - out).abs().max() > 1e-2


def test_rotary_positions_of_frames_beside_the_clip() -> None:
    model = tiny(position="rope", conditioning="concatenate")
    x, more = noise(2, 4, 4, 8, 8), noise(2, 4, 2, 8, 8, seed=3)
    given = {"condition_frames": more, "condition_index": torch.tensor([4, 6])}
    out = answer(model, x, TIMES, **given)
    later = {"condition_frames": more, "condition_index": torch.tensor([9, 11])}
    near(answer(model, x, TIMES, frame_index=torch.arange(4) + 5, **later), out)
    assert (answer(model, x, TIMES, **later) - out).abs().max() > 1e-2
    turned = {"condition_frames": more.flip(2), "condition_index": torch.tensor([6, 4])}
    near(answer(model, x, TIMES, **turned), out)


def test_rotary_positions_need_an_even_head_size() -> None:
    with pytest.raises(ValueError, match="even head size, got 3"):
        VDT(**(TINY | {"width": 12, "heads": 4, "position": "rope"}))
    with pytest.raises(ValueError, match="position is one of sincos, rope, both"):
        VDT(**(TINY | {"position": "learnt"}))


def test_a_picture_is_a_clip_of_one_frame() -> None:
    for changes in ({}, {"prediction_type": "sample", "clean_time": True}):
        model = tiny(**changes)
        x, clean, mask = noise(2, 4, 8, 12), noise(2, 4, 8, 12, seed=2), torch.ones(8, 12)
        mask[:4] = 0
        inputs = {"mask": mask[None], "clean": clean.unsqueeze(2)}
        clip = answer(model, x.unsqueeze(2), TIMES, **inputs)
        assert torch.equal(answer(model, x, TIMES, mask=mask, clean=clean), clip.squeeze(2))


def test_a_predicted_clip_is_told_as_velocity() -> None:
    model = tiny(prediction_type="sample")
    plain = tiny()
    x, each = noise(2, 4, 4, 8, 8), torch.tensor([[900.0, 100.0, 500.0, 300.0]] * 2)
    near(answer(model, x, TIMES), (x - answer(plain, x, TIMES)) / (TIMES / 1000)[:, None, None, None, None])
    near(answer(model, x, each), (x - answer(plain, x, each)) / (each / 1000)[:, None, :, None, None])


def test_only_the_whole_clip_at_once_lets_all_tokens_hear_each_other_in_one_block() -> None:
    reached = {}
    for mixer in ("spacetime", "full", "spacetime:temporal=false"):
        model = tiny(depth=1, mixer=mixer)
        x = noise(1, 4, 3, 4, 4).requires_grad_()
        model(x, TIMES[:1]).sample[0, :, 0, :2, :2].square().sum().backward()
        assert x.grad is not None
        reached[mixer] = (
            x.grad.abs().sum((0, 1)).unflatten(2, (2, 2)).unflatten(1, (2, 2)).sum((2, 4)) > 0
        ).tolist()
    every, none = [[True] * 2] * 2, [[False] * 2] * 2
    assert reached["full"] == [every] * 3
    assert (
        reached["spacetime"] == [every] * 3
    )  # over time first: then the frame brings the other places along
    assert reached["spacetime:temporal=false"] == [every, none, none]


# Text and classes


def test_masked_words_are_not_heard_and_an_empty_prompt_is_no_nan() -> None:
    model = tiny(context_dim=6)
    x, text = noise(2, 4, 4, 8, 8), noise(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    other = text.clone()
    other[0, 3:] += 1
    out = answer(model, x, TIMES, encoder_hidden_states=text, encoder_attention_mask=mask)
    assert out.isfinite().all()
    assert torch.equal(answer(model, x, TIMES, encoder_hidden_states=other, encoder_attention_mask=mask), out)
    other[0, 0] += 1
    assert not torch.allclose(
        answer(model, x, TIMES, encoder_hidden_states=other, encoder_attention_mask=mask)[0],
        out[0],
        atol=1e-4,
    )


def test_without_a_class_the_default_stands() -> None:
    x = noise(2, 4, 4, 8, 8)
    for default, label in ((None, 3), (1, 1)):
        model = tiny(num_classes=3, default_class=default)
        assert torch.equal(answer(model, x, TIMES), answer(model, x, TIMES, torch.tensor([label] * 2)))


def test_untrained_network_says_nothing() -> None:
    model = VDT(**TINY, context_dim=6)
    assert not answer(model, noise(2, 4, 4, 8, 8), TIMES, encoder_hidden_states=noise(2, 5, 6)).any()
    assert not any(block.text_attn.to_out[0].weight.any() for block in model.transformer_blocks)


@pytest.mark.parametrize(
    ("changes", "inputs", "words"),
    [
        ({}, {"mask": torch.ones(4, 8, 8)}, "mask and clean come together"),
        ({}, {"mask": torch.ones(3, 8, 8), "clean": noise(2, 4, 4, 8, 8)}, "takes \\(4, 8, 8\\) or \\(2, 4, 8, 8\\)"),
        ({}, {"encoder_hidden_states": noise(2, 5, 6)}, "has no place for encoder_hidden_states"),
        ({"context_dim": 6}, {}, "needs encoder_hidden_states"),
        ({"pooled_dim": 6}, {}, "needs pooled_projections"),
        ({}, {"class_labels": torch.tensor([0, 0])}, "no place for class_labels"),
        ({"num_classes": 2, "null_class": False}, {}, "class_labels must be given"),
        ({}, {"condition_frames": noise(2, 4, 1, 8, 8)}, "made with conditioning 'concatenate'"),
        ({"conditioning": "concatenate"}, {"condition_frames": noise(2, 4, 1, 8, 4)}, "got 4 x 2"),
        (
            {"conditioning": "concatenate"},
            {"condition_frames": noise(2, 4, 1, 8, 8), "condition_mask": torch.ones(2, 2)},
            "condition_mask: \\(2, 1\\)",
        ),
    ],
)  # fmt: skip
def test_inputs_it_has_no_place_for_are_refused(changes: Any, inputs: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny(**changes)(noise(2, 4, 4, 8, 8), TIMES, **inputs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 30}, "width must divide by heads and by 4"),
        ({"depth": 0}, "depth and frames are at least 1"),
        ({"sample_size": 7}, "sample_size=7"),
        ({"convention": "sit"}, "convention is one of ddpm, flow"),
        ({"conditioning": "cross"}, "conditioning is one of replace, concatenate"),
        ({"prediction_type": "sample", "learn_sigma": True}, "goes with convention 'flow'"),
        ({"default_class": 0}, "default_class is a row of the label table"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VDT(**(TINY | changes))


@pytest.mark.parametrize("name", sorted(kinds(Experts)))
def test_every_kind_of_experts_stands_in_its_block(name: str) -> None:
    model = tiny(experts=name, clean_time=True)
    x, clean, mask = noise(2, 4, 4, 8, 8), noise(2, 4, 4, 8, 8, seed=2), task_mask("image", 4, 8, 8)
    out = answer(model, x, TIMES, mask=mask, clean=clean)
    for i in range(2):
        near(answer(model, x[i : i + 1], TIMES[i : i + 1], mask=mask, clean=clean[i : i + 1]), out[i : i + 1])
    model.train()
    masked_mean(model(x, TIMES, mask=mask, clean=clean).sample ** 2, mask).sum().backward()
    for block in model.transformer_blocks:
        gradients = [one.grad for one in block.ff.parameters() if one.grad is not None]
        assert gradients
        assert all(one.isfinite().all() for one in gradients)
        assert any(one.any() for one in gradients)


# Costs and accelerators


@pytest.mark.parametrize("mixer", ["spacetime", "full", "spacetime:temporal=false"])
@pytest.mark.parametrize("grid", [Grid(1, 4, 4), Grid(5, 3, 2)])
def test_analysis_and_count_agree_on_any_clip(mixer: str, grid: Grid) -> None:
    with torch.device("meta"):
        model = VDT(**(TINY | {"mixer": mixer, "context_dim": 6, "conditioning": "concatenate"}))
        x, text = torch.empty(1, 4, grid.frames, 2 * grid.height, 2 * grid.width), torch.empty(1, 5, 6)
        inputs = {"hidden_states": x, "timestep": torch.empty(1), "encoder_hidden_states": text}
        found = counted(model, inputs)
    ours = analytic(model, *x.shape[-2:], frames=grid.frames, text=5)
    assert ours.macs == found.macs > 0
    assert ours.parameters == parameters_of(model)
    assert ours.tokens == grid.tokens


SETTINGS: dict[str, dict[str, Any]] = {  # so that short sequences are not left alone
    "adaspa": {"min_tokens": 2},
    "token-merge": {"min_tokens": 4},
    "xattention": {"min_tokens": 2},
}


@pytest.mark.parametrize("name", sorted(kinds(Accelerator)))
def test_accelerators_run_or_refuse_in_words(name: str) -> None:
    model = tiny(depth=4, clean_time=True)
    x, clean, mask = noise(1, 4, 4, 16, 16), noise(1, 4, 4, 16, 16, seed=2), task_mask("image", 4, 16, 16)
    method = kinds(Accelerator)[name](**SETTINGS.get(name, {}))

    def sample() -> Tensor:
        times = torch.linspace(1000, 100, 10)
        return torch.stack(
            [
                answer(model, x * (1 - i / 20), time.expand(1), mask=mask, clean=clean)
                for i, time in enumerate(times)
            ]
        )

    words, report, fast = "", None, None
    plain = sample()
    try:
        with accelerated(model, method, steps=10) as run:
            fast = sample()
        report = run.report()
    except (Refused, Untouched) as reason:
        words = str(reason)
    assert torch.equal(sample(), plain)
    if report is None:
        assert len(words.split()) > 8
        return
    assert fast is not None
    assert report.reused + report.forecast + report.merged + len(report.attention) > 0
    assert torch.linalg.vector_norm(fast - plain) < 0.2 * torch.linalg.vector_norm(plain)


SMALL: dict[str, Any] = {"min_tokens": 16, "dense_layers": 0, "measure": False}


@pytest.mark.parametrize("mixer", ["spacetime", "full"])
@pytest.mark.parametrize(
    "method",
    [
        AdaSpa(density=0.4, rows=8, block=4, guard=0.0, **SMALL),
        XAttention(threshold=0.5, stride=2, rows=16, block=16, **SMALL),
    ],
    ids=lambda method: method.name,
)
def test_sparse_attention_thins_long_rows_and_leaves_short_ones(method: Accelerator, mixer: str) -> None:
    model, x = tiny(mixer=mixer), noise(1, 4, 3, 16, 16)

    def sample() -> Tensor:
        times = torch.linspace(1000, 100, 8)
        return torch.stack([answer(model, x * (1 - i / 20), time.expand(1)) for i, time in enumerate(times)])

    plain = sample()
    with accelerated(model, method, steps=8) as run:
        fast = sample()
    assert torch.equal(sample(), plain)
    rows = run.report().attention
    assert len(rows) == (4 if mixer == "spacetime" else 2)
    long = rows[1::2] if mixer == "spacetime" else rows  # three frames are too few to leave any out
    assert all(row["sparse"] and row["density"] < 0.6 for row in long)
    assert all(not row["sparse"] for row in rows if row not in long)
    assert 0 < torch.linalg.vector_norm(fast - plain) < 0.2 * torch.linalg.vector_norm(plain)
