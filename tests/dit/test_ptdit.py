"""PT-DiT: recorded values of the release, its layout at full size, times in order, clips, sizes and accelerators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acceleration import Accelerator, Refused, Untouched, accelerated
from benchmarks import fidelity
from dit.backbones.ptdit import PTDiT, mixed
from dit.convert import LayoutError, convert, find
from dit.grid import Grid
from dit.ledger import analytic, counted, parameters_of
from dit.partition import Window
from dit.presets import build, settings
from dit.spec import kinds

FIXTURE = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "PT-DiT"
TINY: dict[str, Any] = {"sample_size": 8, "width": 32, "depth": 2, "heads": 2, "context_dim": 6}
TIMES = torch.tensor([20.0, 800.0])
OFFICIAL: dict[str, Any] = {
    "num_heads": 2, "head_dim": 24, "num_layers": 2, "cross_attention_dim": 48, "sample_size": 8, "frame": 1, "patch_size": 2,
    "caption_channels": 6, "compress_ratios": [1, 4, 4], "proxy_compress_ratios": [1, 4, 4], "in_channels": 4,
    "out_channels": 8, "attention_bias": True, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "shift_window": True,
}  # fmt: skip


def recorded() -> Path:
    if not FIXTURE.is_dir():
        pytest.skip("the recorded values of PT-DiT are not beside this project")
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
    return filled(PTDiT(**(TINY | changes)))


def pictures(*shape: int) -> tuple[Tensor, Tensor]:
    """Return noisy pictures or clips of a shape, and a prompt for each."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=draw), torch.randn(shape[0], 5, 6, generator=draw)


# The release


def test_recorded_values_are_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    folder = recorded()
    assert fidelity.main([str(folder), "--mid", "--tolerance", "2e-5"]) == 0
    assert "16 of 16 recorded tensors reproduced" in capsys.readouterr().out


def test_times_of_other_samples_are_what_the_recording_needs() -> None:
    """The right order does not reproduce the case of two times, and does reproduce the case of one."""
    folder = recorded()
    config = json.loads((folder / "config.json").read_text())
    cases = find("PT-DiT").complete(fidelity.read_cases(fidelity.read_safetensors(folder / "io.safetensors")))
    model = convert(
        fidelity.read_safetensors(folder / "weights.safetensors"), "PT-DiT", config["args"], config["run"]
    )
    model.register_to_config(mixed_times=False)
    with torch.no_grad():
        errors = [
            fidelity.difference(find("PT-DiT").run(model, case.inputs)["sample"], case.outputs["sample"])
            for case in cases[:2]
        ]
    assert errors[0] < 2e-5
    assert errors[1] > 0.1


def test_the_released_size_loads_strictly() -> None:
    folder = recorded()
    keys = json.loads((folder / "keys.json").read_text())["Qihoo-T2I"]
    args = json.loads((folder / "config.json").read_text())["official_presets"][
        "Qihoo-T2I (image, 1024 px sampling)"
    ]
    state = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    model = convert(state, "PT-DiT", args)
    assert {name: tuple(one.shape) for name, one in find("PT-DiT").to_official(model).items()} == {
        name: tuple(shape) for name, shape in keys.items()
    }
    with torch.device("meta"):
        preset = build("qihoo-t2i")
    assert {k: v.shape for k, v in preset.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    same = ("position_scale", "frames", "convention", "mixed_times", "out_channels", "mixer", "sample_size")
    assert convert(state, "PT-DiT", args).window == preset.window
    assert all(preset.config[name] == model.config[name] for name in same if name != "mixer")


@pytest.mark.parametrize(
    "changes",
    [
        {"frame": 3, "compress_ratios": [2, 2, 4], "proxy_compress_ratios": [2, 1, 2]},
        {"shift_window": False, "attention_bias": False},
        {"norm_elementwise_affine": True, "norm_eps": 1e-5, "activation_fn": "geglu"},
        {"sample_size": 128, "head_dim": 24},
        {
            "caption_channels": None,
            "out_channels": None,
            "compress_ratios": None,
            "proxy_compress_ratios": None,
        },
    ],
)
def test_any_configuration_goes_there_and_back(changes: dict[str, Any]) -> None:
    args = OFFICIAL | changes
    system = find("PT-DiT")
    torch.manual_seed(0)
    model = filled(system.build(args, {}))
    official = system.to_official(model)
    sized = {name for name in official if "resolution_embedder" in name or "aspect_ratio_embedder" in name}
    assert len(sized) == (8 if args["sample_size"] == 128 else 0)
    assert ("transformer_blocks.0.linear_2.weight" in official) == args["shift_window"]
    assert ("transformer_blocks.0.norm_before.weight" in official) == args["norm_elementwise_affine"]
    again = convert(official, "PT-DiT", args)
    text = args["caption_channels"] or 48
    draw = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 4, args["frame"], 8, 8, generator=draw),
        "timestep": TIMES,
        "encoder_hidden_states": torch.randn(2, 5, text, generator=draw),
    }
    with torch.no_grad():
        out = system.run(model, inputs)["sample"]
        assert torch.equal(system.run(again, inputs)["sample"], out)
    assert out.shape == (2, args["out_channels"] or 4, args["frame"], 8, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "layer_norm"}, "norm_type must be ada_norm_single"),
        ({"cross_attention_dim": 20}, "num_heads \\* head_dim = 48"),
        ({"frame": None}, "frame must be given"),
        ({"compress_ratios": [1, 4]}, "three sides of at least 1"),
        ({"proxy_compress_ratios": [1, 8, 8]}, "larger than the window"),
        ({"colour": 1}, "has no argument 'colour'"),
    ],
)
def test_arguments_that_the_release_cannot_run_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        find("PT-DiT").build(OFFICIAL | changes, {})


def test_foreign_weights_are_refused() -> None:
    system = find("PT-DiT")
    model = system.build(OFFICIAL, {})
    official = system.to_official(model)
    for wrong, words in (
        ({k: v for k, v in official.items() if k != "pos_embed.pos_embed"}, "is this the official layout"),
        (official | {"blocks.0.weight": torch.zeros(1)}, "unknown weight 'blocks.0.weight'"),
        (official | {"pos_embed.pos_embed": official["pos_embed.pos_embed"] + 1}, "largest difference 1"),
    ):
        with pytest.raises(LayoutError, match=words):
            system.to_ours(wrong, model)


# Times


def test_every_sample_keeps_its_time() -> None:
    model, wrong = tiny(), tiny(mixed_times=True)
    x, text = pictures(2, 4, 8, 8)
    with torch.no_grad():
        both = model(x, TIMES, text).sample
        for i in range(2):
            alone = model(x[i : i + 1], TIMES[i : i + 1], text[i : i + 1]).sample
            torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(wrong(x, TIMES, text).sample, both, atol=0.05)
        same = TIMES[:1].expand(2)
        assert torch.equal(wrong(x, same, text).sample, model(x, same, text).sample)


def test_mixed_times_are_dealt_out_window_by_window() -> None:
    window = Window(
        Grid(1, 4, 6), (1, 2, 2)
    )  # 6 windows, 3 samples: window r of the batch gets sample r modulo 3
    dealt = mixed(torch.arange(3.0)[:, None], window)
    assert dealt.shape == (3, 24, 1)
    assert window.split(dealt)[:, 0, 0].tolist() == [row % 3 for row in range(18)]


def test_one_time_a_token_equals_one_a_sample_where_constant() -> None:
    model = tiny(mixer="proxy:height=3,width=2")
    x, text = pictures(2, 4, 8, 8)
    each = TIMES[:, None].expand(2, 16).contiguous()
    with torch.no_grad():
        out = model(x, TIMES, text).sample
        torch.testing.assert_close(model(x, each, text).sample, out, atol=1e-5, rtol=1e-5)
        each[0, 3] = 900.0
        assert not torch.allclose(model(x, each, text).sample[0], out[0], atol=1e-3)


# Pictures and clips


def test_a_picture_is_a_clip_of_one_frame() -> None:
    model = tiny(out_channels=8)
    x, text = pictures(2, 4, 6, 10)
    with torch.no_grad():
        picture, clip = model(x, TIMES, text).sample, model(x.unsqueeze(2), TIMES, text).sample
    assert picture.shape == x.shape
    assert torch.equal(clip.squeeze(2), picture)


def test_frames_hear_each_other() -> None:
    model = tiny(frames=4, mixer="proxy:frames=2,height=2,width=2")
    x, text = pictures(1, 4, 5, 6, 6)
    x.requires_grad_()
    out = model(x, TIMES[:1], text).sample
    assert out.shape == x.shape
    (gradient,) = torch.autograd.grad(out[0, :, 0].square().sum(), x)
    assert gradient[0].abs().sum((0, 2, 3)).all()


def test_the_release_is_the_same_network_of_the_other_sign() -> None:
    flow, release = tiny(out_channels=8), tiny(out_channels=8, convention="release")
    x, text = pictures(2, 4, 8, 8)
    with torch.no_grad():
        out = flow(x, TIMES, text).sample
        assert torch.equal(release(x, TIMES, text).sample, -out)
        assert torch.equal(release.predict(x, TIMES, text)[:, :4], out)
    assert release.predict(x, TIMES, text).shape == (2, 8, 8, 8)


def test_masked_words_are_not_heard_and_an_empty_prompt_is_no_nan() -> None:
    model = tiny()
    x, text = pictures(2, 4, 8, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    other = text.clone()
    other[0, 3:] += 1
    with torch.no_grad():
        out = model(x, TIMES, text, mask).sample
        assert torch.equal(model(x, TIMES, other, mask).sample, out)
        torch.testing.assert_close(
            model(x, TIMES, text).sample[1], out[1]
        )  # nothing kept: all heard, as in the release
        other[0, 0] += 1
        assert not torch.allclose(model(x, TIMES, other, mask).sample, out, atol=1e-4)


def test_sizes_are_told_to_networks_that_ask() -> None:
    model = tiny(width=48, size_embeds=True, codec_scale=8)
    x, text = pictures(2, 4, 8, 12)
    told = {"resolution": torch.tensor([[64.0, 96.0]] * 2), "aspect_ratio": torch.tensor([[64 / 96]] * 2)}
    with torch.no_grad():
        out = model(x, TIMES, text).sample
        assert torch.equal(model(x, TIMES, text, added_cond_kwargs=told).sample, out)
        told["resolution"] = told["resolution"] * 2
        assert not torch.allclose(model(x, TIMES, text, added_cond_kwargs=told).sample, out, atol=1e-3)


def test_untrained_network_says_nothing_and_its_zero_maps_are_zero() -> None:
    model = PTDiT(**TINY)
    x, text = pictures(2, 4, 8, 8)
    assert not model(x, TIMES, text).sample.any()
    for block in model.transformer_blocks:
        for linear in (block.proxies.proj_out, block.shift_out):
            assert not linear.weight.any()
            assert not linear.bias.any()


# Sizes and costs


@pytest.mark.parametrize(("size", "side"), [("s", 256), ("b", 512), ("l", 1024), ("xl", 1024), ("h", 2048)])
def test_presets_have_the_published_sizes(size: str, side: int) -> None:
    published = {
        "s": (10, 288, 6),
        "b": (12, 640, 10),
        "l": (28, 864, 12),
        "xl": (28, 1152, 16),
        "h": (30, 1440, 20),
    }
    with torch.device("meta"):
        model = build(f"pt-dit-{size}/{side}")
    depth, width, heads = published[size]
    assert (model.config.depth, model.config.width, model.config.heads) == (depth, width, heads)
    assert model.config.sample_size == side // 8
    assert model.window == (1, side // 128, side // 128)
    assert parameters_of(model.transformer_blocks[0]) / width**2 == pytest.approx(30, abs=0.15)
    if size == "xl":
        assert parameters_of(model) / 1e6 == pytest.approx(1142, rel=0.01)
    assert settings("qihoo-t2v")["frames"] == 24


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 6, 10), (4, 3, 6, 6)])
@pytest.mark.parametrize("mixer", ["proxy", "proxy:frames=2,height=2,width=3,proxy_rows=2,shift=false"])
def test_analysis_and_count_agree_on_any_grid(mixer: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = PTDiT(**(TINY | {"mixer": mixer, "width": 48, "size_embeds": True}))
        x, text = torch.empty(1, *shape), torch.empty(1, 5, 6)
        found = counted(
            model, {"hidden_states": x, "timestep": torch.empty(1), "encoder_hidden_states": text}, tokens=1
        )
    frames = shape[1] if len(shape) == 4 else 1
    ours = analytic(model, *shape[-2:], frames=frames, text=5)
    assert ours.macs == found.macs > 0
    assert ours.parameters == parameters_of(model)


SETTINGS: dict[str, dict[str, Any]] = {  # so that short sequences are not left alone
    "adaspa": {"min_tokens": 2},
    "token-merge": {"min_tokens": 4},
    "xattention": {"min_tokens": 2},
}


@pytest.mark.parametrize("name", sorted(kinds(Accelerator)))
def test_accelerators_run_or_refuse_in_words(name: str) -> None:
    model = tiny(depth=4, mixer="proxy:height=2,width=2")
    x, text = pictures(1, 4, 16, 16)
    method = kinds(Accelerator)[name](**SETTINGS.get(name, {}))

    def sample() -> Tensor:
        times = torch.linspace(1000, 100, 10)
        return torch.stack(
            [model(x * (1 - i / 20), time.expand(1), text).sample for i, time in enumerate(times)]
        )

    words, report, fast = "", None, None
    with torch.no_grad():
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 40}, "divide by heads and by 16"),
        ({"size_embeds": True}, "divides by 3, got 32"),
        ({"sample_size": 7}, "sample_size=7"),
        ({"convention": "ddpm"}, "one of flow, release"),
        ({"mixer": "full"}, "its mixer is proxy, got full"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PTDiT(**(TINY | changes))
