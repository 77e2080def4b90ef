"""Mask2DiT: recorded values of the release, CogVideoX as its one-scene case, times of scenes, captions, sizes, accelerators."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn

import dit.mixers.scenes
from acceleration import Accelerator, Refused, Untouched, accelerated
from benchmarks import fidelity
from dit.backbones.mask2dit import Mask2DiT
from dit.convert import LayoutError, convert, find
from dit.grid import Grid
from dit.ledger import analytic, parameters_of
from dit.presets import build
from dit.segments import Segments
from dit.spec import kinds

FIXTURE = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "Mask2DiT"
TINY: dict[str, Any] = {
    "in_channels": 4, "sample_height": 8, "sample_width": 8, "frames": 2, "scenes": 3, "width": 32, "depth": 2, "heads": 2,
    "time_dim": 12, "context_dim": 6, "caption_length": 3,
}  # fmt: skip
OFFICIAL: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 12,
    "text_embed_dim": 6, "num_layers": 2, "sample_width": 6, "sample_height": 4, "sample_frames": 9, "max_text_seq_length": 5,
}  # fmt: skip


def recorded() -> Path:
    if not FIXTURE.is_dir():
        pytest.skip("the recorded values of Mask2DiT are not beside this project")
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
    return filled(Mask2DiT(**(TINY | changes)))


def story(scenes: int = 3, frames: int = 6, words: int = 3, side: int = 8) -> dict[str, Any]:
    """A noisy clip for each of two samples, and captions of `words` tokens."""
    draw = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, frames, side, side, generator=draw),
        "timestep": torch.tensor([30.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, scenes * words, 6, generator=draw),
    }


def answer(model: Any, inputs: dict[str, Any], **changes: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**(inputs | changes)).sample
    return out


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


# The release


def test_recorded_values_are_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    folder = recorded()
    assert fidelity.main([str(folder), "--mid", "--tolerance", "5e-6"]) == 0
    assert "21 of 21 recorded tensors reproduced" in capsys.readouterr().out


def test_the_recorded_rotary_table_is_the_one_we_compute() -> None:
    """The recording has a plane half as large as the trained one: its positions are spread over all of that."""
    folder = recorded()
    config = json.loads((folder / "config.json").read_text())
    cases = find("Mask2DiT").complete(
        fidelity.read_cases(fidelity.read_safetensors(folder / "io.safetensors"))
    )
    model: Any = find("Mask2DiT").build(config["args"], {})
    grid = Grid(config["run"]["num_scenes"] * config["run"]["frames_per_scene"], 2, 3)
    table = model.rotary(grid)
    assert table is not None
    for ours, name in zip(table, ("rope_cos", "rope_sin"), strict=True):
        torch.testing.assert_close(ours, cases[1].inputs[name], atol=1e-6, rtol=0)


def test_the_mask_is_what_the_recording_needs() -> None:
    folder = recorded()
    config = json.loads((folder / "config.json").read_text())
    system = find("Mask2DiT")
    case = system.complete(fidelity.read_cases(fidelity.read_safetensors(folder / "io.safetensors")))[1]
    state = fidelity.read_safetensors(folder / "weights.safetensors")
    errors = []
    for version in (2, 5):
        model = convert(state, "Mask2DiT", config["args"] | {"attn_msk_version": version})
        with torch.no_grad():
            errors.append(far(system.run(model, case.inputs)["sample"], case.outputs["sample"]))
    assert errors[0] < 1e-5 < 1e-2 < errors[1]


def test_the_released_size_loads_strictly() -> None:
    folder = recorded()
    (keys,) = json.loads((folder / "keys.json").read_text()).values()
    presets = json.loads((folder / "config.json").read_text())["official_presets"]
    (args,) = (found for name, found in presets.items() if name.startswith("CogVideoX-5B"))
    state = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    model = convert(state, "Mask2DiT", args)
    assert {name: list(one.shape) for name, one in find("Mask2DiT").to_official(model).items()} == keys
    with torch.device("meta"):
        preset = build("mask2dit-5b")
    assert {k: v.shape for k, v in preset.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    own = ("frames", "sample_height", "sample_width", "caption_length", "position", "norm_eps")
    assert all(preset.config[name] == model.config[name] for name in own)
    assert 5e9 < parameters_of(model) < 6e9
    scenes = analytic(model, 60, 90, frames=39, text=678).macs
    with torch.device("meta"):
        full = analytic(build("mask2dit-5b", mixer="full"), 60, 90, frames=39, text=678).macs
    assert 0.98 * full < scenes < full  # most of the pairs are of the videos


PATCHED = {"patch_size_t": 2, "use_rotary_positional_embeddings": True}
LEARNED = {"use_learned_positional_embeddings": True, "use_rotary_positional_embeddings": True}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rotary_positional_embeddings": True, "attention_bias": False, "norm_elementwise_affine": False},
        {"spatial_interpolation_scale": 1.25, "temporal_interpolation_scale": 2.0, "activation_fn": "geglu"},
        {"flip_sin_to_cos": False, "patch_bias": False, "norm_eps": 1e-3, "out_channels": 3},
        {"temporal_compression_ratio": 2, "sample_frames": 5, "time_embed_dim": 32},
        LEARNED,
        PATCHED | {"patch_bias": False, "sample_frames": 13},
    ],
)
def test_one_scene_is_cogvideox(changes: dict[str, Any]) -> None:
    """With one caption the released network is CogVideoX, of which diffusers has its own: all our layouts against that."""
    args = OFFICIAL | changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = filled(CogVideoXTransformer3DModel(**args)).float()  # one buffer is made in double
    state = {name: one.detach().clone() for name, one in theirs.state_dict().items()}
    if "patch_embed.pos_embedding" in state:  # any trained values, those of the text too
        torch.nn.init.normal_(state["patch_embed.pos_embedding"])
        theirs.load_state_dict(state)
    ours: Any = convert(state, "Mask2DiT", args)
    back = find("Mask2DiT").to_official(ours)
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    frames = (args["sample_frames"] - 1) // args.get("temporal_compression_ratio", 4) + 1
    draw = torch.Generator().manual_seed(1)
    clip = torch.randn(2, frames, 4, 4, 6, generator=draw)
    text, time = torch.randn(2, 5, 6, generator=draw), torch.tensor([7, 800])
    grid = Grid(frames // (args.get("patch_size_t") or 1), 2, 3)
    inputs = {"hidden_states": clip, "timestep": time, "encoder_hidden_states": text}
    table = ours.rotary(grid)
    expected = answer(theirs, inputs, image_rotary_emb=table)
    found = answer(ours, inputs, hidden_states=clip.transpose(1, 2)).transpose(1, 2)
    assert found.shape == expected.shape
    assert far(found, expected) < 2e-5
    told = {} if table is None else {"rope_cos": table[0], "rope_sin": table[1]}
    with torch.no_grad():
        assert far(find("Mask2DiT").run(ours, inputs | told)["sample"], expected) < 2e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_msk_version": 3}, "attn_msk_version must be 2 or 5, .* got 3"),
        ({"freq_shift": 1}, "freq_shift must be 0, got 1"),
        ({"timestep_activation_fn": "gelu"}, "timestep_activation_fn must be silu"),
        ({"use_learned_positional_embeddings": True}, "False without rotary positions, got True"),
        ({"patch_size_t": 2}, "patch_size_t must be None without rotary"),
        ({"num_heads": 2}, "has no argument 'num_heads'"),
    ],
)
def test_arguments_that_cannot_be_run_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        find("Mask2DiT").build(OFFICIAL | changes, {})


def test_unknown_weights_and_inputs_are_refused() -> None:
    system = find("Mask2DiT")
    model = system.build(OFFICIAL, {})
    official = system.to_official(model)
    with pytest.raises(LayoutError, match=r"unknown weight 'patch_embed\.more'"):
        system.to_ours(official | {"patch_embed.more": torch.zeros(1)}, model)
    with pytest.raises(LayoutError, match="a case has hidden_states"):
        system.run(model, {"hidden_states": torch.zeros(1)})


# Scenes


def test_in_the_first_block_a_scene_hears_its_own_caption_alone() -> None:
    """End to end a caption reaches other scenes through their videos, but only from the second block on."""
    for depth, mixer, leaks in ((1, "scenes", False), (2, "scenes", True), (1, "full", True)):
        model, inputs = tiny(depth=depth, mixer=mixer), story()
        text = inputs["encoder_hidden_states"].requires_grad_()
        out = model(**inputs).sample
        for scene in range(3):
            told = out[:, :, 2 * scene : 2 * scene + 2].square().sum()
            (gradient,) = torch.autograd.grad(told, text, retain_graph=True)
            for caption in range(3):
                part = gradient[:, 3 * caption : 3 * caption + 3]
                assert bool(part.any()) == (leaks or caption == scene)


def test_scenes_and_captions_of_any_length_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(), story(frames=7)
    lengths = {"scene_texts": [2, 0, 7], "scene_frames": [1, 4, 2]}
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    found = answer(model, inputs, **lengths, encoder_attention_mask=mask)
    assert found.shape == inputs["hidden_states"].shape

    def reference(*args: Any, segments: Segments, processor: Any = None) -> Tensor:
        return dit.mixers.scenes.attend_scenes_reference(*args, segments=segments)

    monkeypatch.setattr("dit.mixers.scenes.attend_scenes", reference)
    assert far(answer(model, inputs, **lengths, encoder_attention_mask=mask), found) < 1e-5
    assert far(answer(model, inputs, scene_texts=[3, 3, 3], scene_frames=[1, 4, 2]), found) > 1e-3


def test_padding_that_is_masked_changes_nothing() -> None:
    model, inputs = tiny(), story()
    mask = torch.tensor([1, 1, 0] * 3, dtype=torch.bool).expand(2, 9)
    other = inputs["encoder_hidden_states"].clone()
    other[:, 2::3] += 5
    plain = answer(model, inputs, encoder_attention_mask=mask)
    assert far(answer(model, inputs, encoder_attention_mask=mask, encoder_hidden_states=other), plain) < 1e-6
    short = other.reshape(2, 3, 3, 6)[:, :, :2].flatten(1, 2)
    assert far(answer(model, inputs, encoder_hidden_states=short, scene_texts=[2, 2, 2]), plain) < 1e-5
    assert far(answer(model, inputs, encoder_hidden_states=other), plain) > 1e-3


@pytest.mark.parametrize("position", ["rope", "sincos", "stored"])
def test_more_scenes_and_other_sizes_than_trained(position: str) -> None:
    model = tiny(position=position)
    for scenes, frames, side in ((5, 10, 8), (1, 1, 8), (2, 6, 12)):
        inputs = story(scenes, frames, side=side)
        out = answer(model, inputs)
        assert out.shape == inputs["hidden_states"].shape
        assert out.isfinite().all()
    picture = story(1, 1)
    flat = picture["hidden_states"][:, :, 0]
    assert torch.equal(answer(model, picture, hidden_states=flat), answer(model, picture)[:, :, 0])


def test_every_scene_has_its_own_time() -> None:
    model, inputs = tiny(), story()
    time = inputs["timestep"]
    plain = answer(model, inputs)
    assert far(answer(model, inputs, timestep=time[:, None].expand(2, 3)), plain) < 1e-5
    given = time[:, None].repeat(1, 3)
    given[:, :2] = 0  # the first two scenes are known
    extended = answer(model, inputs, timestep=given)
    assert far(extended[:, :, 4:], plain[:, :, 4:]) > 1e-3
    swapped = answer(model, inputs, timestep=given.flip(1))
    assert far(swapped, extended) > 1e-3
    # the time enters the last layer too: a network without blocks that count still tells the scenes apart
    for one in model.transformer_blocks.parameters():
        nn.init.zeros_(one)
    bare = answer(model, inputs, timestep=given)
    assert far(bare[:, :, 4:], answer(model, inputs)[:, :, 4:]) < 1e-5
    still = answer(model, inputs, timestep=torch.zeros(2))
    assert far(bare[:, :, :4], still[:, :, :4]) < 1e-6 < 1e-3 < far(bare[:, :, 4:], still[:, :, 4:])


def test_times_of_scenes_and_checkpointing_and_half_precision() -> None:
    model, inputs = tiny().train(), story()
    inputs["timestep"] = torch.tensor([[0.0, 0.0, 500.0], [0.0, 900.0, 900.0]])
    plain = model(**inputs).sample
    plain.square().mean().backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters()}
    assert all(bool(one.any()) for one in gradients.values())
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model(**inputs).sample.square().mean().backward()
    for name, one in model.named_parameters():
        torch.testing.assert_close(one.grad, gradients[name], atol=1e-6, rtol=1e-5)
    half = answer(model.eval().to(torch.bfloat16), inputs)
    assert far(half, plain.detach()) < 0.04 * float(plain.detach().abs().max())


def test_experts_that_read_the_time_need_one_as_wide_as_the_tokens() -> None:
    inputs = story()
    wide = tiny(time_dim=32, experts="switch")
    both = inputs | {"timestep": inputs["timestep"][:, None].expand(2, 3)}
    assert far(answer(wide, inputs), answer(wide, both)) < 1e-4
    with pytest.raises(ValueError, match="switch experts read the time"):
        answer(tiny(experts="switch"), inputs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timestep": torch.zeros(2, 2)}, "one time a sample or one a scene, got 2 for 3 scenes"),
        ({"scene_frames": [2, 2, 3]}, "scenes of 2, 2, 3 frames do not fit 3 captions and 6 frames"),
        ({"encoder_hidden_states": torch.zeros(2, 12, 6)}, "6 frames do not divide into 4 scenes"),
        ({"encoder_hidden_states": torch.zeros(2, 10, 6)}, "10 text tokens are not captions of 3, 3, 3"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        answer(tiny(), story(), **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 40, "heads": 2}, "head size that divides by 16, got 20"),
        ({"position": "sincos", "width": 40, "heads": 2}, "width that divides by 16, got 40"),
        ({"position": "alibi"}, "one of rope, sincos, stored, got 'alibi'"),
        ({"mixer": "linear"}, "its mixer is scenes, or full .* got linear"),
        ({"frames": 1, "patch_frames": 2}, "hold at least one patch"),
        ({"caption_length": 0}, "caption_length=0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Mask2DiT(**(TINY | changes))


def test_patches_of_several_frames_are_cut_within_scenes() -> None:
    model = tiny(patch_frames=2, frames=4)
    inputs = story(frames=12)
    out = answer(model, inputs, scene_frames=[2, 6, 4])
    assert out.shape == inputs["hidden_states"].shape
    with pytest.raises(ValueError, match="scene_frames must divide by patch_frames 2"):
        answer(model, inputs, scene_frames=[3, 5, 4])


# What spends less

SETTINGS: dict[str, dict[str, Any]] = {  # so that short sequences are not left alone
    "adaspa": {"min_tokens": 2},
    "token-merge": {"min_tokens": 4},
    "xattention": {"min_tokens": 2},
}


@pytest.mark.parametrize("name", sorted(kinds(Accelerator)))
def test_accelerators_run_or_refuse_in_words(name: str) -> None:
    model = tiny(depth=4)
    inputs = {key: value[:1] for key, value in story().items()}
    method = kinds(Accelerator)[name](**SETTINGS.get(name, {}))

    def sample() -> Tensor:
        times = torch.linspace(1000, 100, 10)
        return torch.stack(
            [
                answer(
                    model,
                    inputs,
                    hidden_states=inputs["hidden_states"] * (1 - i / 20),
                    timestep=torch.tensor(
                        [[0.0, 0.0, float(time)]]
                    ),  # an extension: the first scenes are given
                )
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
    assert torch.linalg.vector_norm(fast - plain) < 0.3 * torch.linalg.vector_norm(plain)
