"""What every backbone owes to diffusers and to itself, over the registry below, at tiny size.

diffusers' own caches: FirstBlockCache, TaylorSeer, pyramid attention broadcast, MagCache and layer skip of attention run on
ours and are tested here. Not usable, for reasons that lie in diffusers 0.42.1: FasterCache takes apart video-shaped
outputs; SeaCache needs the scheduler's sigmas in `cache_context` and does nothing without; TextKVCache knows one foreign
model; skipping whole blocks returns (image, text) whatever order a block declares, FLUX's included.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import LayerSkipConfig, MagCacheConfig, apply_layer_skip
from peft import LoraConfig
from torch import Tensor, nn

from dit.backbones.dig import DiG
from dit.backbones.dit import DiT
from dit.backbones.emmdit import EMMDiT
from dit.backbones.mask2dit import Mask2DiT
from dit.backbones.mmdit import MMDiT
from dit.backbones.ptdit import PTDiT
from dit.backbones.vdt import VDT
from dit.ledger import analytic, counted

pytestmark = pytest.mark.filterwarnings("ignore:.*attention backend.*:UserWarning")


@dataclass(frozen=True)
class Backbone:
    """One entry of the registry: a tiny network and what to feed it for a batch of two."""

    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    text: int = 0
    refused: tuple[str, ...] = ()  # caches of diffusers that cannot work here, and that the network refuses in words

    def network(self) -> Any:
        """Return the network with its zero maps filled, so that everything in it counts, in evaluation mode."""
        torch.manual_seed(0)
        model = self.make()
        for one in model.parameters():
            if not one.any():
                nn.init.normal_(one, std=0.1)
        return model.eval()


def _latents() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 12, generator=draw),
        "timestep": torch.tensor([30.0, 700.0]),
    }


def _prompt() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(2)
    return {
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=draw),
        "pooled_projections": torch.randn(2, 8, generator=draw),
        "encoder_attention_mask": torch.arange(5).expand(2, 5) < torch.tensor([[5], [3]]),
    }


def _mmdit(**changes: Any) -> MMDiT:
    size: dict[str, Any] = {
        "in_channels": 4, "patch_size": 2, "sample_size": 8, "width": 32, "heads": 2, "dual_depth": 2, "single_depth": 2,
        "mlp_ratio": 2.0, "context_dim": 12, "pooled_dim": 8, "position": "both",
    }  # fmt: skip
    return MMDiT(**(size | changes))


def _emmdit(**changes: Any) -> EMMDiT:
    size: dict[str, Any] = {
        "in_channels": 4, "patch_size": 2, "sample_size": 8, "width": 32, "heads": 2, "groups": [1, 2, 1], "ratios": [2, 4],
        "mlp_ratio": 2.0, "context_dim": 12, "pooled_dim": 8, "projection_dims": [],
    }  # fmt: skip
    return EMMDiT(**(size | changes))


def _ptdit(**changes: Any) -> PTDiT:
    size: dict[str, Any] = {
        "in_channels": 4, "out_channels": 8, "sample_size": 8, "width": 32, "depth": 3, "heads": 2, "mlp_ratio": 2.0,
        "context_dim": 12,
    }  # fmt: skip
    return PTDiT(**(size | changes))


def _mask2dit(**changes: Any) -> Mask2DiT:
    size: dict[str, Any] = {
        "in_channels": 4, "sample_height": 8, "sample_width": 12, "frames": 2, "width": 32, "depth": 3, "heads": 2,
        "mlp_ratio": 2.0, "time_dim": 12, "context_dim": 12, "caption_length": 3,
    }  # fmt: skip
    return Mask2DiT(**(size | changes))


def _story() -> dict[str, Any]:
    """Two scenes of two frames, captions of three tokens, of which some are padding."""
    draw = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 4, 8, 12, generator=draw),
        "timestep": torch.tensor([30.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 6, 12, generator=draw),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1]], dtype=torch.bool),
    }


def _vdt(**changes: Any) -> VDT:
    size: dict[str, Any] = {
        "in_channels": 4, "patch_size": 2, "sample_size": 8, "frames": 3, "width": 32, "depth": 3, "heads": 2, "mlp_ratio": 2.0,
    }  # fmt: skip
    return VDT(**(size | changes))


def _frames() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    return _latents() | {"hidden_states": torch.randn(2, 4, 3, 8, 12, generator=draw)}


def _given() -> dict[str, Any]:
    """A first frame for one clip, and the left half of the second for the other."""
    draw = torch.Generator().manual_seed(3)
    mask = torch.ones(2, 3, 8, 12)
    mask[0, 0], mask[1, 1, :, :6] = 0, 0
    return {"clean": torch.randn(2, 4, 3, 8, 12, generator=draw), "mask": mask}


def _beside() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(4)
    return {
        "condition_frames": torch.randn(2, 4, 2, 8, 12, generator=draw),
        "condition_index": torch.tensor([[-2, -1], [1, 7]]),
        "condition_mask": torch.tensor([[1, 1], [0, 1]]),
    }


def _words() -> dict[str, Any]:
    return {name: value for name, value in _prompt().items() if name != "pooled_projections"}


REGISTRY: dict[str, Backbone] = {
    "dit": Backbone(
        make=lambda: DiT(sample_size=8, width=32, depth=3, heads=2, mlp_ratio=2.0, num_classes=5),
        inputs=lambda: _latents() | {"class_labels": torch.tensor([1, 5])},
    ),
    "sit": Backbone(
        make=lambda: DiT(
            sample_size=8, width=32, depth=3, heads=2, mlp_ratio=2.0, num_classes=5, convention="sit"
        ),
        inputs=lambda: _latents() | {"class_labels": torch.tensor([1, 5])},
    ),
    "dense2moe dit": Backbone(
        make=lambda: DiT(
            sample_size=8, width=32, depth=3, heads=2, mlp_ratio=2.0, num_classes=5,
            experts="mixture:experts=3,expert_ratio=1",
        ),
        inputs=lambda: _latents() | {"class_labels": torch.tensor([1, 5])},
    ),
    "dense2moe mmdit": Backbone(
        make=lambda: _mmdit(experts="mixture:experts=3,expert_ratio=1"), inputs=lambda: _latents() | _prompt(), text=5
    ),
    "switch-dit": Backbone(
        make=lambda: DiT(sample_size=8, width=32, depth=3, heads=2, mlp_ratio=2.0, num_classes=5, experts="switch"),
        inputs=lambda: _latents() | {"class_labels": torch.tensor([1, 5])},
    ),
    "emmdit": Backbone(
        make=_emmdit, inputs=lambda: _latents() | _prompt(), text=5, refused=("first block", "mag")
    ),
    "emmdit sample": Backbone(
        make=lambda: _emmdit(prediction_type="sample", groups=[2], pooled_dim=None, modulation="adaln-single"),
        inputs=lambda: _latents() | _prompt(),
        text=5,
    ),
    "mmdit subregion": Backbone(
        make=lambda: _mmdit(mixer="subregion:pattern=4/1 2/2", modulation="adaln-affine"),
        inputs=lambda: _latents() | _prompt(),
        text=5,
    ),
    "dydit": Backbone(
        make=lambda: DiT(
            sample_size=8, width=32, depth=3, heads=2, mlp_ratio=2.0, num_classes=5,
            experts="dynamic:start_width=0,start_tokens=0",
        ),
        inputs=lambda: _latents() | {"class_labels": torch.tensor([1, 5])},
    ),
    "lit": Backbone(
        make=lambda: DiT(
            sample_size=8, width=32, depth=3, heads=2, mlp_ratio=2.0, num_classes=5, mixer="linear", experts="mix-ffn"
        ),
        inputs=lambda: _latents() | {"class_labels": torch.tensor([1, 5])},
    ),
    "dig": Backbone(
        make=lambda: DiG(
            sample_size=8, width=32, depth=3, heads=2, mlp_ratio=2.0, num_classes=5, experts="swiglu:multiple=8"
        ),
        inputs=lambda: _latents() | {"class_labels": torch.tensor([1, 5])},
    ),
    "mmdit linear": Backbone(
        make=lambda: _mmdit(mixer="linear:kernel=3", experts="mix-ffn"),
        inputs=lambda: _latents() | _prompt(),
        text=5,
    ),
    "mmdit gated": Backbone(
        make=lambda: _mmdit(mixer="gated", dual_depth=2, single_depth=0),
        inputs=lambda: _latents() | _prompt(),
        text=5,
    ),
    "ptdit": Backbone(make=_ptdit, inputs=lambda: _latents() | _words(), text=5),
    "ptdit release": Backbone(  # windows that do not divide the grid, and norms with weights
        make=lambda: _ptdit(
            mixer="proxy:height=3,width=2,proxy_columns=2,choice=corner", convention="release", norm_affine=True
        ),
        inputs=lambda: _latents() | _words(),
        text=5,
    ),
    "dit proxy": Backbone(
        make=lambda: DiT(
            sample_size=8, width=32, depth=3, heads=2, mlp_ratio=2.0, num_classes=5, mixer="proxy:height=2,width=3"
        ),
        inputs=lambda: _latents() | {"class_labels": torch.tensor([1, 5])},
    ),
    "mmdit proxy": Backbone(
        make=lambda: _mmdit(mixer="proxy:height=2,width=2", dual_depth=1), inputs=lambda: _latents() | _prompt(), text=5
    ),
    "mask2dit": Backbone(make=_mask2dit, inputs=_story, text=6),
    "mask2dit stored": Backbone(  # the table of one scene stretched over two, and all captions heard by all
        make=lambda: _mask2dit(position="stored", mixer="full", attention_bias=False, norm_affine=False),
        inputs=_story,
        text=6,
    ),
    "vdt": Backbone(
        make=lambda: _vdt(num_classes=5, learn_sigma=True, convention="ddpm"),
        inputs=lambda: _frames() | {"class_labels": torch.tensor([1, 5])},
    ),
    "vdt text": Backbone(
        make=lambda: _vdt(context_dim=12, pooled_dim=8, clean_time=True, prediction_type="sample"),
        inputs=lambda: _frames() | _prompt() | _given(),
        text=5,
    ),
    "vdt beside": Backbone(
        make=lambda: _vdt(conditioning="concatenate", clean_time=True, modulation="adaln-single"),
        inputs=lambda: _frames() | _given() | _beside(),
    ),
    "dit spacetime": Backbone(
        make=lambda: DiT(
            sample_size=8, width=32, depth=3, heads=2, mlp_ratio=2.0, num_classes=5, mixer="spacetime:qk_norm=true"
        ),
        inputs=lambda: _frames() | {"class_labels": torch.tensor([1, 5])},
    ),
    "lingen": Backbone(  # windows that do not divide the grid, review tokens that are means of several
        make=lambda: _vdt(depth=2, context_dim=12, mixer="lingen:frames=2,height=3,width=4,review=2,state=8"),
        inputs=lambda: _frames() | _words(),
        text=5,
    ),
    "mmdit": Backbone(make=_mmdit, inputs=lambda: _latents() | _prompt(), text=5),
    "mmdit pre-only": Backbone(
        make=lambda: _mmdit(single_depth=0, qk_norm=False, position="sincos"),
        inputs=lambda: _latents() | _prompt(),
        text=5,
    ),
    "mmdit sample": Backbone(
        make=lambda: _mmdit(prediction_type="sample", guidance_embeds=True, dual_depth=1, single_depth=2),
        inputs=lambda: _latents() | _prompt() | {"guidance": torch.tensor([1.0, 4.0])},
        text=5,
    ),
}


@pytest.fixture(params=sorted(REGISTRY))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return REGISTRY[request.param]


def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs).sample
    return out


def close(ours: Tensor, theirs: Tensor, share: float = 1e-5) -> bool:
    """Whether two tensors differ by no more than a share of the largest value."""
    return float((ours.float() - theirs.float()).abs().max()) <= share * float(theirs.abs().max())


@contextmanager
def calls(model: nn.Module, ending: str) -> Iterator[list[str]]:
    """Write down the calls of the submodules whose path ends so."""
    seen: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, path=path: seen.append(path))
        for path, module in model.named_modules()
        if path.endswith(ending)
    ]
    assert hooks, ending
    yield seen
    for hook in hooks:
        hook.remove()


def with_lora(model: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
    )
    model.add_adapter(config)
    return model


# What a network owes to itself


def test_shapes(backbone: Backbone) -> None:
    model, inputs = backbone.network(), backbone.inputs()
    out = run(model, inputs)
    batch, channels, *sides = inputs["hidden_states"].shape
    assert out.shape[0] == batch
    assert out.shape[1] % channels == 0
    assert list(out.shape[2:]) == sides
    assert out.dtype == torch.float32
    assert torch.equal(model(**inputs, return_dict=False)[0], out)


def test_gradients_reach_every_parameter(backbone: Backbone) -> None:
    model, inputs = backbone.network().train(), backbone.inputs()
    torch.manual_seed(0)
    out = model(**inputs).sample
    (out.square().mean() + sum(model.auxiliary_losses().values())).backward()
    without = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()]
    assert without == []


def test_gradients_reach_the_last_maps_of_an_untrained_network(backbone: Backbone) -> None:
    model = backbone.make()
    model(**backbone.inputs()).sample.sub(1).square().mean().backward()
    assert model.proj_out.proj.weight.grad is not None
    assert model.proj_out.proj.bias.grad.any()


def test_save_and_load_are_equal(backbone: Backbone, tmp_path: Path) -> None:
    model, inputs = backbone.network(), backbone.inputs()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (
        dict(again.config).items() >= {k: v for k, v in model.config.items() if not k.startswith("_")}.items()
    )
    assert torch.equal(run(again, inputs), run(model, inputs))


def test_checkpointing_is_equal(backbone: Backbone) -> None:
    model, inputs = backbone.network().train(), backbone.inputs()
    torch.manual_seed(3)
    plain = model(**inputs).sample
    plain.square().mean().backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters()}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    torch.manual_seed(3)
    with calls(model, ".attn") as seen:
        again = model(**inputs).sample
        forward = len(seen)
        again.square().mean().backward()
        assert len(seen) == 2 * forward  # the backward pass computed the blocks once more
    assert torch.equal(again, plain)
    for name, one in model.named_parameters():
        torch.testing.assert_close(one.grad, gradients[name], atol=1e-6, rtol=1e-5, msg=name)


def test_batch_of_two_equals_two_of_one(backbone: Backbone) -> None:
    model, inputs = backbone.network(), backbone.inputs()
    both = run(model, inputs)
    for i in range(2):
        one = run(model, {name: value[i : i + 1] for name, value in inputs.items()})
        assert close(one, both[i : i + 1])
    assert not close(both[:1], both[1:], 0.1)


def test_bf16_is_close_to_fp32(backbone: Backbone) -> None:
    model, inputs = backbone.network(), backbone.inputs()
    plain = run(model, inputs)
    half = run(copy.deepcopy(model).to(torch.bfloat16), inputs)
    assert half.dtype == torch.float32  # what goes in decides what comes out
    assert close(half, plain, 0.04)
    assert not torch.equal(half, plain)


def test_costs_are_told_right(backbone: Backbone) -> None:
    with torch.device("meta"):
        model = backbone.make()
        inputs = {
            name: torch.empty_like(value[:1], device="meta")
            for name, value in backbone.inputs().items()
            if name not in (_given() | _beside())  # costs are those of a clip alone
        }
        x = inputs["hidden_states"] = inputs["hidden_states"][..., :8]
        told = analytic(model, 8, 8, frames=x.shape[2] if x.dim() == 5 else 1, text=backbone.text)
        assert told.macs == counted(model, inputs).macs > 0


# What it owes to diffusers: adapters


def test_lora_round_trip(backbone: Backbone, tmp_path: Path) -> None:
    """`save_lora_adapter` writes names without a prefix, so its own file is read with prefix=None and by its name."""
    inputs = backbone.inputs()
    model = backbone.network()
    plain = run(model, inputs)
    adapted = run(with_lora(model), inputs)
    assert not close(adapted, plain, 1e-3)
    model.save_lora_adapter(tmp_path)
    other = backbone.network()
    other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(run(other, inputs), adapted)
    other.unload_lora()
    assert close(run(other, inputs), plain)  # the same weights at other addresses may be summed in another order


def test_lora_strength_of_one_call(backbone: Backbone) -> None:
    inputs = backbone.inputs()
    model = with_lora(backbone.network())
    full = run(model, inputs)
    half = run(model, inputs | {"joint_attention_kwargs": {"scale": 0.5}})
    assert not close(half, full, 1e-4)
    assert torch.equal(run(model, inputs), full)
    model.set_adapters("default", 0.5)
    assert close(run(model, inputs), half)


def test_lora_fuses_and_unfuses(backbone: Backbone) -> None:
    inputs = backbone.inputs()
    model = with_lora(backbone.network())
    adapted = run(model, inputs)
    model.fuse_lora()
    assert close(run(model, inputs), adapted)
    model.unfuse_lora()
    assert close(run(model, inputs), adapted)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_two_loras_add_up_by_their_weights(backbone: Backbone) -> None:
    inputs = backbone.inputs()
    model = with_lora(backbone.network())
    alone = run(model, inputs)
    torch.manual_seed(9)
    model.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name="second"
    )
    model.set_adapters(["default", "second"], [1.0, 1.0])
    both = run(model, inputs)
    assert not close(both, alone, 1e-3)
    model.set_adapters(["default"], [1.0])
    assert torch.equal(run(model, inputs), alone)


# What it owes to diffusers: attention backends


@pytest.mark.parametrize("name", ["native", "_native_math", "flex"])
def test_attention_backends_agree(backbone: Backbone, name: str) -> None:
    model, inputs = backbone.network(), backbone.inputs()
    plain = run(model, inputs)
    model.set_attention_backend(name)
    backends = {str(one._attention_backend.value) for one in model.attn_processors.values()}
    assert backends == {name}
    assert close(run(model, inputs), plain)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "package"), [("xformers", "xformers"), ("flash", "flash_attn")])
def test_attention_backends_of_other_packages_agree(backbone: Backbone, name: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    model = backbone.network().to("cuda", torch.bfloat16)
    inputs = {name: value.cuda() for name, value in backbone.inputs().items()}
    if "encoder_attention_mask" in inputs:
        inputs["encoder_attention_mask"] = None
    plain = run(model, inputs)
    model.set_attention_backend(name)
    assert close(run(model, inputs), plain, 0.04)


def test_fused_projections_agree(backbone: Backbone) -> None:
    model, inputs = backbone.network(), backbone.inputs()
    plain = run(model, inputs)
    model.fuse_qkv_projections()
    assert any(getattr(one, "fused_projections", False) for one in model.modules())
    assert close(run(model, inputs), plain)
    model.unfuse_qkv_projections()
    assert close(run(model, inputs), plain)


# What it owes to diffusers: memory and speed


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_moves_groups_and_changes_nothing(backbone: Backbone, kind: str) -> None:
    """On a machine without an accelerator both places are the processor; that the hooks run is what can be seen."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = backbone.network()
    inputs = {name: value.to(place) for name, value in backbone.inputs().items()}
    plain = run(model.to(place), inputs)
    more: dict[str, Any] = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.cpu().enable_group_offload(
        onload_device=place, offload_device=torch.device("cpu"), offload_type=kind, **more
    )
    hooked = [path for path, one in model.named_modules() if hasattr(one, "_diffusers_hook")]
    assert (
        any(path.startswith("transformer_blocks.") for path in hooked)
        or "single_transformer_blocks.0" in hooked
    )
    assert close(run(model, inputs), plain)


@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16])
def test_layerwise_casting_stores_in_eight_bits(backbone: Backbone, start: torch.dtype) -> None:
    model, inputs = backbone.network(), backbone.inputs()
    plain = run(model, inputs)
    model = model.to(start)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    stored = {name for name, one in model.named_parameters() if one.dtype == torch.float8_e4m3fn}
    assert any(name.endswith("attn.to_q.weight") for name in stored)
    assert not any("norm_q" in name or name.startswith("proj_out") for name in stored)
    out = run(model, inputs)
    assert close(out, plain, 0.2)
    assert not close(out, plain, 1e-4)


def test_blocks_compile_without_a_break(backbone: Backbone) -> None:
    torch._dynamo.reset()
    model, inputs = backbone.network(), backbone.inputs()
    plain = run(model, inputs)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert close(run(model, inputs), plain)
    compiled = [one for one in model.modules() if one._compiled_call_impl is not None]
    assert len(compiled) == len(model.transformer_blocks) + len(
        getattr(model, "single_transformer_blocks", [])
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_blocks_compile_with_inductor(name: str) -> None:
    torch._dynamo.reset()
    backbone = REGISTRY[name]
    model, inputs = backbone.network(), backbone.inputs()
    plain = run(model, inputs)
    model.compile_repeated_blocks(fullgraph=True)
    assert close(run(model, inputs), plain, 1e-4)


# What it owes to diffusers: its own caches

CACHES: dict[str, tuple[Callable[[], Any], str]] = {
    "first block": (lambda: FirstBlockCacheConfig(threshold=1e6), ".norm1"),
    "taylor": (lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1), ".to_k"),
    "mag": (
        lambda: MagCacheConfig(
            mag_ratios=torch.ones(8),
            num_inference_steps=8,
            threshold=1.0,
            max_skip_steps=1,
            retention_ratio=0.1,
        ),
        ".norm1",
    ),
    "broadcast": (
        lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1001),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: 500,
        ),
        ".to_k",
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_of_diffusers_save_calls_and_leave_no_trace(backbone: Backbone, name: str) -> None:
    config, ending = CACHES[name]
    model, inputs = backbone.network(), backbone.inputs()
    if name in ("first block", "mag") and len(model.transformer_blocks) == 1:
        ending = ".modulation"
    steps = [inputs | {"hidden_states": inputs["hidden_states"] * (1 - 0.02 * i)} for i in range(4)]
    if name in backbone.refused:
        with pytest.raises(ValueError, match="replaces all blocks"):
            model.enable_cache(config())
        return
    plain = [run(model, given) for given in steps]
    with calls(model, ending) as seen:
        for given in steps:
            run(model, given)
    model.enable_cache(config())
    assert model.is_cache_enabled
    with calls(model, ending) as fewer:
        found = []
        for given in steps:
            with model.cache_context("cond"):
                found.append(run(model, given))
    assert 0 < len(fewer) < len(seen)
    assert close(found[0], plain[0])
    assert all(close(ours, theirs, 0.25) for ours, theirs in zip(found, plain, strict=True))
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))
    model.disable_cache()
    assert torch.equal(run(model, steps[2]), plain[2])


def test_first_block_cache_keeps_branches_apart(backbone: Backbone) -> None:
    model, inputs = backbone.network(), backbone.inputs()
    if "first block" in backbone.refused:
        return
    other = inputs | {"hidden_states": inputs["hidden_states"].flip(0)}
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        first = run(model, inputs)
    with model.cache_context("uncond"):
        second = run(model, other)
    model.disable_cache()
    assert close(first, run(model, inputs))
    assert close(second, run(model, other))


def test_attention_of_one_block_can_be_skipped(backbone: Backbone) -> None:
    model, inputs = backbone.network(), backbone.inputs()
    plain = run(model, inputs)
    skip = LayerSkipConfig(
        indices=[0], fqn="transformer_blocks", skip_attention=True, skip_attention_scores=False, skip_ff=False
    )
    apply_layer_skip(model, skip)
    with calls(model, "transformer_blocks.0.attn.to_q") as seen:
        out = run(model, inputs)
    assert [path for path in seen if path.startswith("transformer_blocks")] == []
    assert not close(out, plain, 1e-3)
