"""Plain LoRA: every layout against peft's own arithmetic, strengths, hot swap, and the traps of adapters that live in weights."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from control import Refused, Use, controlled, frozen
from control._files import load, save
from control._lora_files import translated
from control.easycontrol import EasyControl
from control.lora import LoRA, LoRAAdapter, _matched

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
Weights = dict[str, Tensor]
LAYERS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.1.ff.net.0.proj",
    "single_transformer_blocks.1.proj_mlp",
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def plain(model: Any, paths: tuple[str, ...] = LAYERS, rank: int = 3, seed: int = 0) -> Weights:
    """A LoRA with diffusers' names, without prefix."""
    found = {}
    for place, path in enumerate(paths):
        layer = model.get_submodule(path)
        found[f"{path}.lora_A.weight"] = draw(rank, layer.in_features, seed=seed + 2 * place)
        found[f"{path}.lora_B.weight"] = draw(layer.out_features, rank, seed=seed + 2 * place + 1)
    return found


def written(folder: Path, weights: Weights, name: str = "one.safetensors", **metadata: str) -> Path:
    save_file({key: x.contiguous().clone() for key, x in weights.items()}, folder / name, metadata=metadata)
    return folder / name


def prefixed(weights: Weights, prefix: str = "transformer.") -> Weights:
    return {prefix + key: x for key, x in weights.items()}


def by_peft(
    tiny: Any, *many: Weights, strengths: tuple[float, ...] = (), metadata: Any = None
) -> list[Tensor]:
    """What peft makes of LoRAs on a copy of the transformer."""
    model = copy.deepcopy(tiny.model)
    names = [f"lora{place}" for place in range(len(many))]
    for name, weights in zip(names, many, strict=True):
        model.load_lora_adapter(prefixed(weights), adapter_name=name, metadata=metadata)
    if strengths:
        model.set_adapters(names, weights=list(strengths))
    with torch.no_grad():
        other = copy.copy(tiny)
        other.model = model
        found: list[Tensor] = other.run(tiny.given())
    return found


def by_hand(tiny: Any, weights: Weights, strength: float = 1.0) -> list[Tensor]:
    """What a copy of the transformer answers with B A written into its weights."""
    other = copy.copy(tiny)
    other.model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        for key in [key for key in weights if key.endswith("lora_A.weight")]:
            path = key.removesuffix(".lora_A.weight")
            other.model.get_submodule(path).weight += (
                strength * weights[f"{path}.lora_B.weight"] @ weights[key]
            )
        found: list[Tensor] = other.run(tiny.given())
    return found


def ran(tiny: Any, *uses: Use, **about: Any) -> list[Tensor]:
    with torch.no_grad(), controlled(tiny.model, *uses, steps=4, **about):
        found: list[Tensor] = tiny.run(tiny.given())
    return found


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def flux(make: Any) -> Any:
    return make("flux")


def kohya(weights: Weights, prefix: str) -> Weights:
    found = {}
    for key, x in weights.items():
        path, _, side = key.removesuffix(".weight").rpartition(".")
        name = prefix + path.replace(".", "_")
        found[f"{name}.lora_{'down' if side == 'lora_A' else 'up'}.weight"] = x
        found[f"{name}.alpha"] = torch.tensor(3.0)
    return found


LAYOUTS: dict[str, Callable[[Weights], Weights]] = {
    "diffusers": prefixed,
    "no prefix": lambda w: w,
    "peft": lambda w: prefixed(w, "base_model.model."),
    "peft with the adapter's name": lambda w: {
        f"base_model.model.{key.replace('.weight', '.default.weight')}": x for key, x in w.items()
    },
    "diffusion_model": lambda w: prefixed(w, "diffusion_model."),
    "older diffusers": lambda w: {
        f"transformer.{key.replace('lora_A', 'lora.down').replace('lora_B', 'lora.up')}": x
        for key, x in w.items()
    },
    "kohya unet": lambda w: kohya(w, "lora_unet_"),
    "kohya transformer": lambda w: kohya(w, "lora_transformer_"),
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_spelling_is_read(flux: Any, tmp_path: Path, layout: str) -> None:
    weights = plain(flux.model)
    file = LAYOUTS[layout](weights)
    adapter = load(written(tmp_path, file), flux.model)
    assert isinstance(adapter, LoRAAdapter)
    assert str(adapter.coverage) == "8/8 keys"
    found = ran(flux, Use(adapter))
    assert apart(found, by_peft(flux, weights)) < 2e-5
    assert apart(found, ran(flux)) > 1e-3


def test_xlabs_files_are_converted(flux: Any, tmp_path: Path) -> None:
    parts = {"qkv_lora1": 72, "qkv_lora2": 72, "proj_lora1": 24, "proj_lora2": 24}
    file = {}
    for place, (name, out) in enumerate(parts.items()):
        file[f"double_blocks.1.processor.{name}.down.weight"] = draw(2, 24, seed=place)
        file[f"double_blocks.1.processor.{name}.up.weight"] = draw(out, 2, seed=place + 9)
    adapter = load(written(tmp_path, file), flux.model)
    assert str(adapter.coverage) == "16/16 keys"
    names = (
        ("to_q", "to_k", "to_v"),
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        ("to_out.0",),
        ("to_add_out",),
    )
    expected = {}
    for (part, _), layers in zip(parts.items(), names, strict=True):
        up = file[f"double_blocks.1.processor.{part}.up.weight"].chunk(len(layers))
        for layer, one in zip(layers, up, strict=True):
            path = f"transformer_blocks.1.attn.{layer}"
            expected[f"{path}.lora_A.weight"] = file[f"double_blocks.1.processor.{part}.down.weight"]
            expected[f"{path}.lora_B.weight"] = one
    assert apart(ran(flux, Use(adapter)), by_hand(flux, expected)) < 2e-5


def test_kohya_files_for_flux_are_converted_with_their_alpha(flux: Any, tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = draw(4, 24), draw(72, 4, seed=1)
    file = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(2.0),
    }
    adapter = load(written(tmp_path, file), flux.model)
    expected = {}
    for layer, one in zip(("to_q", "to_k", "to_v"), up.chunk(3), strict=True):
        path = f"transformer_blocks.0.attn.{layer}"
        expected |= {f"{path}.lora_A.weight": down * 0.5, f"{path}.lora_B.weight": one}
    assert apart(ran(flux, Use(adapter)), by_hand(flux, expected)) < 2e-5


def _bfl() -> Weights:
    """A released control LoRA's keys at rank 2: diffusers' converter knows one size alone, that of FLUX."""
    width = 3072
    shapes: dict[str, tuple[int, int]] = {"img_in": (128, width), "txt_in": (4096, width)}
    shapes |= {"final_layer.linear": (width, 64), "final_layer.adaLN_modulation.1": (width, 2 * width)}
    for name, inner in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        shapes |= {f"{name}.in_layer": (inner, width), f"{name}.out_layer": (width, width)}
    norms = []
    for place in range(19):
        for side in ("img", "txt"):
            block = f"double_blocks.{place}.{side}"
            shapes |= {f"{block}_mod.lin": (width, 6 * width), f"{block}_attn.qkv": (width, 3 * width)}
            shapes |= {f"{block}_attn.proj": (width, width), f"{block}_mlp.0": (width, 4 * width)}
            shapes[f"{block}_mlp.2"] = (4 * width, width)
            norms += [f"{block}_attn.norm.{one}_norm.scale" for one in ("query", "key")]
    for place in range(38):
        block = f"single_blocks.{place}"
        shapes |= {f"{block}.linear1": (width, 7 * width), f"{block}.linear2": (5 * width, width)}
        shapes[f"{block}.modulation.lin"] = (width, 3 * width)
        norms += [f"{block}.norm.{one}_norm.scale" for one in ("query", "key")]
    found = {name: torch.ones(128) for name in norms}
    for path, (inner, out) in shapes.items():
        found |= {
            f"{path}.lora_A.weight": torch.zeros(2, inner),
            f"{path}.lora_B.weight": torch.zeros(out, 2),
        }
        found[f"{path}.lora_B.bias"] = torch.zeros(out)
    return found


def test_every_key_of_a_released_control_lora_finds_its_place(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    from control._files import read

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    weights = translated(read(written(tmp_path, _bfl())), model)
    shapes, norms, left = _matched(model, weights)
    assert not left
    assert len(norms) == 19 * 4 + 38 * 2
    # 4 layers of each time, guidance and pooled prompt, 3 embedders and maps out, 14 and 6 in each block
    assert len(shapes) == 6 + 4 + 19 * 14 + 38 * 6
    assert shapes["x_embedder"].in_features == 128
    assert all(one.bias for one in shapes.values())


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_a_usual_flux_file_finds_all_its_places(tmp_path: Path) -> None:
    """Eight projections in each of FLUX's 19 blocks of two streams, with two keys each, at FLUX's own size."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel()
    names = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    file = {}
    for path in (
        f"transformer.transformer_blocks.{place}.attn.{name}" for place in range(19) for name in names
    ):
        file |= {f"{path}.lora_A.weight": torch.zeros(1, 3072), f"{path}.lora_B.weight": torch.zeros(3072, 1)}
    assert str(load(written(tmp_path, file), model).coverage) == "304/304 keys"


def test_a_header_whose_length_looks_like_a_pickle_is_read(flux: Any, tmp_path: Path) -> None:
    weights = prefixed(plain(flux.model, LAYERS[:1]))
    starts = set()
    for length in range(0, 640, 8):
        path = written(tmp_path, weights, about="x" * length)
        starts.add(path.read_bytes()[:2])
        assert str(load(path, flux.model).coverage) == "2/2 keys"
    assert b"\x80\x02" in starts


def test_layers_kept_in_fp8_and_weights_in_bf16(flux: Any) -> None:
    weights, other = plain(flux.model), copy.copy(flux)
    other.model = copy.deepcopy(flux.model)
    other.model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    found = ran(other, Use(LoRA().load(other.model, weights)))
    paths = {one: path for path, one in other.model.named_modules()}
    rounded = copy.copy(flux)
    rounded.model = copy.deepcopy(flux.model)
    with torch.no_grad():
        for one in other.model.modules():
            for name, kept in one.named_parameters(recurse=False):
                if kept.dtype == torch.float8_e4m3fn:
                    getattr(rounded.model.get_submodule(paths[one]), name).copy_(kept.float())
    wanted = ran(rounded, Use(LoRA().load(rounded.model, weights)))
    size = max(float((a - b).abs().max()) for a, b in zip(wanted, ran(rounded), strict=True))
    assert apart(found, wanted) < 0.01 * size  # the adapter's own weights are in bf16 there
    assert {one.dtype for one in LoRA().load(copy.deepcopy(flux.model).bfloat16(), weights).parameters()} == {
        torch.bfloat16
    }


def test_a_control_lora_reads_a_picture_beside_the_noise(flux: Any, tmp_path: Path) -> None:
    """Widened first layer, biases and norms, against a copy of the transformer that has been widened by hand."""
    norm = "transformer_blocks.0.attn.norm_q"
    bias, scale = draw(24, seed=5), 1 + draw(12, seed=6)
    file = {
        "x_embedder.lora_A.weight": draw(2, 32, seed=3), "x_embedder.lora_B.weight": draw(24, 2, seed=4),
        "x_embedder.lora_B.bias": bias, f"{norm}.weight": scale,
    }  # fmt: skip
    adapter = load(written(tmp_path, prefixed(file)), flux.model)
    assert str(adapter.coverage) == "4/4 keys"
    picture = flux.condition()
    found = ran(flux, Use(adapter, picture))
    b, c, h, w = picture.shape
    tokens = picture.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)
    wide = flux.given() | {"hidden_states": torch.cat([flux.given()["hidden_states"], tokens], dim=-1)}
    other = copy.copy(flux)
    other.model = copy.deepcopy(flux.model)
    layer = torch.nn.Linear(32, 24)
    old = other.model.x_embedder
    with torch.no_grad():
        layer.weight.copy_(file["x_embedder.lora_B.weight"] @ file["x_embedder.lora_A.weight"])
        layer.weight[:, :16] += old.weight
        layer.bias.copy_(old.bias + bias)
        other.model.x_embedder = layer
        other.model.get_submodule(norm).weight.copy_(scale)
        expected = other.run(wide)
        with controlled(flux.model, Use(adapter)):
            assert apart(flux.run(wide), expected) < 1e-5, "or the caller has put them side by side"
    assert apart(found, expected) < 1e-5
    with (
        torch.no_grad(),
        pytest.raises(Refused, match="give a condition"),
        controlled(flux.model, Use(adapter)),
    ):
        flux.call(flux.given())
    with pytest.raises(Refused, match=r"condition must be a tensor \[B, 4, H, W\]"):
        ran(flux, Use(adapter, flux.draw(1, 3, 8, 8)))
    again = load(save(adapter, tmp_path / "ours.safetensors", flux.model), flux.model)
    assert apart(ran(flux, Use(again, picture)), found) == 0
    with pytest.raises(Refused, match="has a bias or reads more channels"):
        adapter.merged(flux.model)


def test_easycontrol_files_go_to_easycontrol(flux: Any, easy: Any, tmp_path: Path) -> None:
    from control.easycontrol import to_official

    file = written(tmp_path, to_official(easy(flux).adapter.state_dict(), 0))
    assert isinstance(load(file, flux.model).control, EasyControl)


def test_what_found_no_place_is_told(flux: Any, tmp_path: Path) -> None:
    extra = {f"text_encoder.layers.0.q.lora_{side}.weight": draw(2, 2) for side in "AB"}
    adapter = load(written(tmp_path, prefixed(plain(flux.model)) | extra), flux.model)
    assert str(adapter.coverage).startswith("8/10 keys (no place for text_encoder.layers.0.q.lora_A.weight")
    with torch.no_grad(), controlled(flux.model, Use(adapter)) as run:
        flux.call(flux.given())
    assert run.report().uses[0]["coverage"] == str(adapter.coverage)
    assert run.report().uses[0]["layers"] == "4/4"


OTHERS = {
    "FLUX": "transformer.single_transformer_blocks.30.attn.to_q",
    "Stable Diffusion 3": "transformer.transformer_blocks.20.attn.add_q_proj",
    "Qwen-Image": "transformer.transformer_blocks.50.img_mlp.net.2",
    "Wan": "diffusion_model.blocks.3.self_attn.q",
    r"Stable Diffusion \(U-Net\)": "lora_unet_down_blocks_0_attentions_0_proj_in",
    "a text encoder": "text_encoder.text_model.layers.0.q_proj",
}


@pytest.mark.parametrize("family", sorted(OTHERS))
@pytest.mark.parametrize("kind", ["flux", "mmdit-dual"])
def test_a_file_without_a_place_is_told_by_its_family(
    make: Any, tmp_path: Path, family: str, kind: str
) -> None:
    tiny, path = make(kind), OTHERS[family]
    file = {f"{path}.lora_A.weight": draw(2, 24), f"{path}.lora_B.weight": draw(24, 2)}
    with pytest.raises(
        Refused, match=rf"0/2 keys have a place in {type(tiny.model).__name__}.* LoRA for {family}"
    ):
        load(written(tmp_path, file), tiny.model)


FIRST = LAYERS[0]
WRONG: dict[str, tuple[Callable[[Weights], Any], str]] = {
    "half a layer": (lambda w: w.pop(f"{FIRST}.lora_B.weight"), rf"missing {FIRST}.lora_B.weight"),
    "two ranks": (lambda w: w.update({f"{FIRST}.lora_A.weight": draw(5, 24)}), r"lora_A is \(5, 24\)"),
    "another width": (lambda w: w.update({f"{FIRST}.lora_A.weight": draw(3, 3072)}), "another size of FLUX"),
    "a LoKr": (lambda w: w.update({f"{FIRST}.lokr_w1": draw(2, 2)}), "is a LoKr and no plain LoRA"),
    "a LoHa": (lambda w: w.update({f"{FIRST}.hada_w1_a": draw(2, 2)}), "is a LoHa"),
    "a DoRA": (lambda w: w.update({f"{FIRST}.lora_magnitude_vector": draw(24)}), "is a DoRA"),
    "NaN": (lambda w: w[f"{FIRST}.lora_A.weight"].fill_(float("nan")), "no finite numbers"),
    "one layer twice": (lambda w: w.update({f"transformer.{FIRST}.lora_A.weight": draw(3, 24)}), "two keys of the file"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(WRONG))
def test_a_file_that_does_not_fit_is_refused_whole(flux: Any, tmp_path: Path, case: str) -> None:
    change, words = WRONG[case]
    weights = plain(flux.model)
    change(weights)
    before = dict(flux.model.__dict__)
    with pytest.raises(Refused, match=words):
        load(written(tmp_path, weights), flux.model)
    assert flux.model.__dict__ == before


def test_a_broken_file_of_a_family_is_told_as_such(flux: Any, tmp_path: Path) -> None:
    file = {key: x for key, x in _bfl().items() if not key.startswith("time_in")}
    with pytest.raises(Refused, match="LoRA for FLUX, and diffusers cannot read it"):
        load(written(tmp_path, file), flux.model)


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_of_pefts_metadata_counts(flux: Any, tmp_path: Path, rslora: bool) -> None:
    weights = plain(flux.model, LAYERS[:2], rank=4)
    settings = {"r": 4, "lora_alpha": 2, "alpha_pattern": {LAYERS[1]: 12}, "use_rslora": rslora,
                "target_modules": list(LAYERS[:2])}  # fmt: skip
    metadata = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    adapter = load(written(tmp_path, prefixed(weights), lora_adapter_metadata=metadata), flux.model)
    expected = by_peft(flux, weights, metadata=json.loads(metadata))
    assert apart(ran(flux, Use(adapter)), expected) < 2e-5
    assert apart(expected, by_peft(flux, weights)) > 1e-3


def test_several_with_weights(flux: Any) -> None:
    many = [plain(flux.model, seed=seed) for seed in (0, 40)]
    uses = [Use(LoRA().load(flux.model, one), strength=s) for one, s in zip(many, (0.7, 0.3), strict=True)]
    assert apart(ran(flux, *uses), by_peft(flux, *many, strengths=(0.7, 0.3))) < 2e-5


def test_weight_of_every_step(flux: Any) -> None:
    adapter = LoRA().load(flux.model, plain(flux.model))
    found = ran(flux, Use(adapter, strength=(0.0, 0.5, 1.0, 2.0)))
    for step, strength in enumerate((0.0, 0.5, 1.0, 2.0)):
        assert torch.equal(found[step], ran(flux, Use(adapter, strength=strength))[step])
    late = ran(flux, Use(adapter, strength=lambda over: 2 * over, start=0.5))
    assert torch.equal(late[0], ran(flux)[0])
    assert torch.equal(late[3], ran(flux, Use(adapter, strength=1.5))[3])


def test_strength_never_leaks_into_the_next_run(flux: Any) -> None:
    adapter, before = LoRA().load(flux.model, plain(flux.model)), ran(flux)
    whole = ran(flux, Use(adapter))
    ran(flux, Use(adapter, strength=0.1))
    ran(flux, Use(adapter, strength=(3.0, 0.0)))
    with (
        contextlib.suppress(ZeroDivisionError),
        torch.no_grad(),
        controlled(flux.model, Use(adapter, strength=5.0)),
    ):
        flux.call(flux.given())
        raise ZeroDivisionError
    assert apart(ran(flux, Use(adapter)), whole) == 0
    assert apart(ran(flux), before) == 0


def test_another_file_takes_its_place_also_while_attached(flux: Any, tmp_path: Path) -> None:
    one, two = plain(flux.model, LAYERS[:2]), plain(flux.model, LAYERS[1:], rank=9, seed=70)
    first = load(written(tmp_path, one), flux.model)
    assert isinstance(first, LoRAAdapter)
    other = LoRA().load(flux.model, plain(flux.model, seed=90))
    path = written(tmp_path, two, "two.safetensors")
    given = flux.given()
    with torch.no_grad(), controlled(flux.model, Use(first), Use(other)) as run:
        flux.call(given)
        first.swap(path, flux.model)
        swapped = flux.call(given)
    assert run.report().uses[0]["coverage"] == "6/6 keys"
    expected = LoRA().load(flux.model, two)
    with torch.no_grad(), controlled(flux.model, Use(expected), Use(other)):
        assert float((swapped - flux.call(given)).abs().max()) < 1e-6
    assert apart(ran(flux, Use(first)), ran(flux, Use(expected))) == 0
    assert not any(one._forward_hooks for one in flux.model.modules())


def test_a_swap_that_fails_leaves_the_old_one_working(flux: Any, easy: Any, tmp_path: Path) -> None:
    adapter = load(written(tmp_path, plain(flux.model)), flux.model)
    assert isinstance(adapter, LoRAAdapter)
    use, kept = Use(adapter), {key: x.clone() for key, x in adapter.state_dict().items()}
    expected = ran(flux, use)
    broken = plain(flux.model)
    broken.pop(f"{FIRST}.lora_B.weight")
    files = [
        written(tmp_path, broken, "broken.safetensors"),
        written(tmp_path, {"blocks.0.attn1.q.lora_A.weight": draw(2, 2)}, "other.safetensors"),
        save(easy(flux).adapter, tmp_path / "easy.safetensors", flux.model),
        tmp_path / "missing.safetensors",
    ]
    with torch.no_grad(), controlled(flux.model, use):
        for file in files:
            with pytest.raises((Refused, FileNotFoundError)):
                adapter.swap(file, flux.model)
            assert torch.equal(flux.run(flux.given())[0], expected[0])
    assert all(torch.equal(x, kept[key]) for key, x in adapter.state_dict().items())
    assert str(adapter.coverage) == "8/8 keys"


def test_trap_a_call_with_scale_0_resets_no_strength(flux: Any) -> None:
    """peft's adapters come back from `scale=0` with strength 1; ours and theirs are looked at side by side."""
    use = Use(LoRA().load(flux.model, plain(flux.model)), strength=0.5)
    given = flux.given()
    with torch.no_grad(), controlled(flux.model, use):
        before = flux.call(given)
        none = flux.call(given | {"joint_attention_kwargs": {"scale": 0.0}})
        assert torch.equal(flux.call(given), before)
        assert torch.equal(none, before), "the scale is one of peft's adapters"


def test_trap_fused_projections_would_silence_it(make: Any) -> None:
    flux = make("flux")
    model = copy.deepcopy(flux.model)
    adapter = LoRA().load(model, plain(model))
    model.fuse_qkv_projections()
    with (
        pytest.raises(Refused, match=r"to_q is not computed while projections are fused"),
        controlled(model, Use(adapter)),
    ):
        pass
    model.unfuse_qkv_projections()
    with controlled(model, Use(adapter)):
        pass


def test_trap_saving_while_it_is_attached_saves_the_plain_transformer(flux: Any, tmp_path: Path) -> None:
    use = Use(LoRA().load(flux.model, plain(flux.model)))
    with controlled(flux.model, use):
        flux.model.save_pretrained(tmp_path)
    again, info = type(flux.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in flux.model.state_dict().items())


def test_trap_a_file_that_diffusers_saved_without_prefix_is_read(flux: Any, tmp_path: Path) -> None:
    model, weights = copy.deepcopy(flux.model), plain(flux.model)
    model.load_lora_adapter(prefixed(weights), adapter_name="one")
    model.save_lora_adapter(tmp_path, adapter_name="one")
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert not any(key.startswith("transformer.") for key in load_file(file))
    assert apart(ran(flux, Use(load(file, flux.model))), by_peft(flux, weights)) < 2e-5


def test_plain_diffusers_reads_what_is_saved_here(flux: Any, tmp_path: Path) -> None:
    adapter = LoRA().load(flux.model, plain(flux.model))
    file = save(adapter, tmp_path / "ours.safetensors", flux.model)
    model = copy.deepcopy(flux.model)
    model.load_lora_adapter(tmp_path, weight_name=file.name)
    other = copy.copy(flux)
    other.model = model
    with torch.no_grad():
        assert apart(other.run(flux.given()), ran(flux, Use(adapter))) < 2e-5


def test_beside_an_adapter_of_peft(flux: Any) -> None:
    """Both act, and the layers that peft has wrapped are still found by their own names."""
    one, two = plain(flux.model), plain(flux.model, seed=40)
    other = copy.copy(flux)
    other.model = copy.deepcopy(flux.model)
    other.model.load_lora_adapter(prefixed(one), adapter_name="one")
    adapter = LoRA().load(other.model, two)
    assert str(adapter.coverage) == "8/8 keys"
    assert apart(ran(other, Use(adapter)), by_peft(flux, one, two, strengths=(1.0, 1.0))) < 2e-5
    other.model.fuse_lora()
    with pytest.raises(Refused, match="unfuse_lora"):
        ran(other, Use(adapter))


def test_merged_weights_give_what_the_adapter_gives(tiny: Any) -> None:
    adapter = LoRA(rank=3, targets=("to_q", "ff")).build(tiny.model)
    for place, one in enumerate(adapter.parameters()):
        one.data = draw(*one.shape, seed=place)
    before = {key: x.clone() for key, x in tiny.model.state_dict().items()}
    other = copy.copy(tiny)
    other.model = copy.deepcopy(tiny.model)
    other.model.load_state_dict(adapter.merged(tiny.model, 0.6), strict=False)
    with torch.no_grad():
        assert apart(other.run(tiny.given()), ran(tiny, Use(adapter, strength=0.6))) < 2e-5
    assert all(torch.equal(x, before[key]) for key, x in tiny.model.state_dict().items())


def test_on_the_class_to_image_network_and_a_transformer_of_another_family(tmp_path: Path) -> None:
    from diffusers import PixArtTransformer2DModel

    from dit.backbones.dit import DiT

    torch.manual_seed(0)
    dit = DiT(in_channels=4, patch_size=2, sample_size=8, width=24, depth=2, heads=2, num_classes=3)
    pixart = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=12, num_attention_heads=2, in_channels=4,
        cross_attention_dim=24, caption_channels=16, out_channels=4, use_additional_conditions=False,
    )  # fmt: skip
    x, time = draw(2, 4, 8, 8), torch.tensor([500, 500])
    calls: dict[str, Callable[[], Tensor]] = {
        "dit": lambda: dit(hidden_states=x, timestep=time, class_labels=torch.tensor([0, 1])).sample,
        "pixart": lambda: pixart(x, encoder_hidden_states=draw(2, 5, 16), timestep=time).sample,
    }
    for name, model in (("dit", dit), ("pixart", pixart)):
        for one in model.parameters():
            one.data = torch.randn_like(one) * 0.2
        adapter = LoRA(rank=2).build(model.eval())
        for place, one in enumerate(adapter.parameters()):
            one.data = draw(*one.shape, seed=place)
        weights = prefixed({key: x.detach() for key, x in adapter.state_dict().items()})
        again = load(written(tmp_path, weights, f"{name}.safetensors"), model)
        with torch.no_grad():
            with controlled(model, Use(again)):
                found = calls[name]()
            before = calls[name]()
            model.load_state_dict(adapter.merged(model), strict=False)
            assert float((calls[name]() - found).abs().max()) < 2e-5
        assert float((found - before).abs().max()) > 1e-4


def test_gradients_are_the_same_where_blocks_are_computed_again(flux: Any) -> None:
    model = copy.deepcopy(flux.model)
    adapter = LoRA(rank=2).load(model, plain(model)).requires_grad_(True)
    other = copy.copy(flux)
    other.model = model

    def gradients() -> list[Tensor]:
        adapter.zero_grad()
        with frozen(model), controlled(model, Use(adapter, strength=0.5)):
            other.call(flux.given()).square().mean().backward()
        return [one.grad.clone() for one in adapter.parameters() if one.grad is not None]

    expected = gradients()
    model.enable_gradient_checkpointing()
    assert len(expected) == 8
    assert apart(gradients(), expected) < 1e-6
    timed = Use(adapter, start=0.5)
    with pytest.raises(Refused, match="one strength for all steps"), controlled(model, timed, steps=4):
        pass


def test_what_cannot_work_is_refused_at_entry(flux: Any, make: Any) -> None:
    adapter = LoRA().load(flux.model, plain(flux.model))
    cases = [
        (Use(adapter, region=torch.ones(2, 2)), "cannot be held to a region"),
        (Use(adapter, torch.ones(1, 4, 8, 8)), "takes no condition"),
    ]
    for use, words in cases:
        with pytest.raises(Refused, match=words), controlled(flux.model, use):
            pass
    with pytest.raises(Refused, match="for another transformer"), controlled(make("sd3").model, Use(adapter)):
        pass
    with pytest.raises(Refused, match=r"no layers called to_nothing; it has .*to_q"):
        LoRA(targets=("to_nothing",)).build(flux.model)
    with pytest.raises(ValueError, match="targets must be names of layers"):
        LoRA(targets=())
    model = copy.deepcopy(flux.model)
    model.transformer_blocks[0].compile()
    with pytest.raises(Refused, match="it is compiled"), controlled(model, Use(adapter)):
        pass
