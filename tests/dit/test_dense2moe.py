"""Surgery on trained networks, ours and diffusers': the identity, the order of importance, the books, and saving."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from peft import LoraConfig
from torch import Tensor, nn

from acceleration.base import accelerated
from acceleration.delta_cache import DeltaCache
from dit.backbones.dit import DiT
from dit.backbones.mmdit import MMDiT
from dit.dense2moe import (
    convert,
    deal,
    load_converted,
    magnitude_scores,
    perceptrons_of,
    random_scores,
    save_converted,
    taylor_scores,
)
from dit.experts.mixture import layers_of, set_active
from dit.ledger import activated_of, analytic, counted, parameters_of


def _draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _prompt(width: int = 12, pooled: int = 8) -> dict[str, Any]:
    return {
        "encoder_hidden_states": _draw(2, 5, width, seed=2),
        "pooled_projections": _draw(2, pooled, seed=3),
        "timestep": torch.tensor([30.0, 700.0]),
    }


def _flux() -> Any:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    )  # fmt: skip


def _flux_inputs() -> dict[str, Any]:
    places = torch.stack(
        torch.meshgrid(torch.zeros(1), torch.arange(3.0), torch.arange(4.0), indexing="ij"), dim=-1
    )
    return _prompt() | {
        "hidden_states": _draw(2, 12, 4), "img_ids": places.reshape(-1, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


def _sd3() -> Any:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip


def _pixart() -> Any:
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=32,
        sample_size=8, patch_size=2, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip


def _pixart_inputs() -> dict[str, Any]:
    given = _prompt() | {"hidden_states": _draw(2, 4, 8, 8)}
    given.pop("pooled_projections")
    return given | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _mmdit(**changes: Any) -> Any:
    size: dict[str, Any] = {
        "in_channels": 4, "patch_size": 2, "sample_size": 8, "width": 32, "heads": 2, "dual_depth": 2, "single_depth": 2,
        "context_dim": 12, "pooled_dim": 8,
    }  # fmt: skip
    return MMDiT(**(size | changes))


def _dit(**changes: Any) -> Any:
    return DiT(**({"sample_size": 8, "width": 32, "depth": 2, "heads": 2, "num_classes": 5} | changes))


Case = tuple[Callable[[], Any], Callable[[], dict[str, Any]], int]

CASES: dict[str, Case] = {
    "dit": (
        _dit,
        lambda: {"hidden_states": _draw(2, 4, 8, 8), "timestep": torch.tensor([30.0, 700.0]), "class_labels": torch.tensor([1, 5])},
        2,
    ),
    "dit swiglu": (
        lambda: _dit(experts="dense:activation=swiglu"),
        lambda: {"hidden_states": _draw(2, 4, 8, 8), "timestep": torch.tensor([30.0, 700.0]), "class_labels": torch.tensor([1, 5])},
        2,
    ),
    "mmdit": (_mmdit, lambda: _prompt() | {"hidden_states": _draw(2, 4, 8, 8)}, 6),
    "flux": (_flux, _flux_inputs, 7),
    "sd3": (_sd3, lambda: _prompt() | {"hidden_states": _draw(2, 4, 8, 8)}, 5),
    "pixart": (_pixart, _pixart_inputs, 2),
}  # fmt: skip
OURS = ("dit", "dit swiglu", "mmdit")


def network(name: str) -> Any:
    """A network with its zero maps filled, so that everything in it counts."""
    torch.manual_seed(0)
    model = CASES[name][0]()
    for one in model.parameters():
        if not one.any():
            nn.init.normal_(one, std=0.1)
    return model.eval()


def run(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(**CASES[name][1](), return_dict=False)[0])


@pytest.mark.parametrize("name", CASES)
def test_all_experts_with_unit_gates_are_the_dense_network(name: str) -> None:
    model = network(name)
    plain = run(model, name)
    report = convert(model, "mixture", random_scores(model, 0))
    assert len(report.converted) == len(layers_of(model)) == CASES[name][2]
    assert report.left == {}
    assert not torch.allclose(run(model, name), plain, atol=1e-3)
    set_active(model, 12)
    torch.testing.assert_close(run(model, name), plain, atol=1e-5, rtol=1e-5)
    for layer in layers_of(model).values():
        nn.init.normal_(layer.gate.weight)
        layer.unit_gates = True
    torch.testing.assert_close(run(model, name), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_activated_parameters_are_three_eighths_of_the_perceptrons(name: str) -> None:
    model = network(name)
    before = parameters_of(model)
    maps = sum(
        one.first.weight.numel() + one.hidden * one.second.out_features for one in perceptrons_of(model)[0]
    )
    report = convert(model, "mixture", random_scores(model, 0))
    layers = layers_of(model).values()
    gates = sum(one.gate.weight.numel() for one in layers)
    biases = sum(0 if one.up_bias is None else one.up_bias.numel() * 10 // 12 for one in layers)
    shared = sum(one.down.shape[0] for path, one in layers_of(model).items() if path.endswith("proj_mlp"))
    if name == "mmdit":
        shared += (
            2 * 32
        )  # single blocks have a second bias, of the map out that the experts now have of their own
    assert report.parameters == before
    assert parameters_of(model) == before + gates + shared
    assert report.activated == activated_of(model) == before + gates + shared - maps * 5 // 8 - biases


@pytest.mark.parametrize("name", ["flux", "sd3", "mmdit"])
def test_the_ledger_counts_what_is_activated(name: str) -> None:
    model = network(name).to("meta")
    inputs = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in CASES[name][1]().items()}
    dense = counted(model, inputs)
    saved = convert(network(name), "mixture", random_scores(network(name), 0))
    assert saved.converted[0].expert * 12 + saved.converted[0].shared == saved.converted[0].hidden
    converted = network(name)
    convert(converted, "mixture", random_scores(converted, 0))
    sparse = counted(converted.to("meta"), inputs)
    assert sparse.activated == activated_of(converted)
    mlp = sum(one.numel() for p in perceptrons_of(network(name))[0] for one in (p.first.weight,)) * 2
    assert dense.activated - sparse.activated > 0.55 * mlp
    assert sparse.macs < dense.macs


def test_flux_has_the_sizes_of_the_paper() -> None:
    """11.9 billion parameters, 48.2 % of them in perceptrons, of which three eighths stay at work; told without any weights."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    maps = sum(2 * one.first.weight.numel() for one in perceptrons_of(model)[0])
    assert maps / 1e6 == pytest.approx(5739, rel=0.01)
    report = convert(model, "mixture", random_scores(model, 0))
    assert report.parameters / 1e6 == pytest.approx(11_901, rel=0.01)
    assert report.activated / 1e6 == pytest.approx(11_901 - 0.625 * 5739, rel=0.01)
    assert {(one.shared, one.expert) for one in report.converted} == {(3072, 768)}
    assert all(one.device.type == "meta" for one in model.parameters())


def test_the_analytic_costs_of_a_converted_network_are_the_counted_ones() -> None:
    model = network("mmdit")
    convert(model, "mixture:active=3", random_scores(model, 0))
    inputs = {k: v[:1].to("meta") for k, v in CASES["mmdit"][1]().items()}
    assert analytic(model, 8, 8, text=5).macs == counted(model.to("meta"), inputs).macs


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded_it_is_equal(name: str, tmp_path: Path) -> None:
    model = network(name)
    convert(model, "mixture:active=3,balance=0.5", random_scores(model, 0))
    plain = run(model, name)
    save_converted(model, tmp_path)
    again = load_converted(tmp_path)
    assert torch.equal(run(again, name), plain)
    assert {one.balance for one in layers_of(again).values()} == {0.5}
    if name in OURS:
        torch.testing.assert_close(run(type(model).from_pretrained(tmp_path), name), plain)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no conversion\.json"):
        load_converted(tmp_path)


def test_the_most_important_channels_are_shared_and_the_rest_dealt_evenly() -> None:
    scores = torch.tensor([5.0, 1, 9, 2, 8, 3, 7, 4, 6, 0])
    shared, dealt = deal(scores, 4, 3)
    assert scores[shared].tolist() == [9, 8, 7, 6]
    assert scores[dealt].tolist() == [[5, 0], [4, 1], [3, 2]]


def _trained() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A small class-conditional network that has learnt to denoise four patterns, and its loss on a batch."""
    torch.manual_seed(0)
    model = _dit(convention="flow", learn_sigma=False, num_classes=4, in_channels=1)
    patterns = torch.sign(_draw(4, 1, 8, 8, seed=8))

    def loss(seed: int) -> Tensor:
        dice = torch.Generator().manual_seed(seed)
        labels = torch.randint(4, (16,), generator=dice)
        time = torch.rand(16, 1, 1, 1, generator=dice)
        noise = torch.randn(16, 1, 8, 8, generator=dice)
        picture = patterns[labels]
        out = model((1 - time) * picture + time * noise, time.flatten() * 1000, labels, return_dict=False)[0]
        return torch.nn.functional.mse_loss(out, noise - picture)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(150):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    return model, loss


def test_taylor_beats_magnitude_and_random_right_after_splitting() -> None:
    model, loss = _trained()
    scores = {
        "taylor": taylor_scores(model, [lambda i=i: loss(10_000 + i) for i in range(8)]),
        "magnitude": magnitude_scores(model),
        "random": random_scores(model, 0),
    }
    assert all(one.grad is None for one in model.parameters())
    found = {"dense": _mean(loss)}
    dense = copy.deepcopy(model.state_dict())
    for kind, one in scores.items():
        fresh = _dit(convention="flow", learn_sigma=False, num_classes=4, in_channels=1)
        fresh.load_state_dict(dense)
        convert(fresh, "mixture:active=0", one)
        found[kind] = _mean(loss, fresh)
    assert found["dense"] < found["taylor"] < found["magnitude"] < found["random"]


def _mean(loss: Callable[[int], Tensor], instead: nn.Module | None = None) -> float:
    """Loss over held-out batches, of the trained network or of another in its place."""
    cells: Any = loss.__closure__
    cell = next(one for one in cells if isinstance(one.cell_contents, nn.Module))
    before = cell.cell_contents
    cell.cell_contents = instead or before
    with torch.no_grad():
        total = sum(float(loss(20_000 + i)) for i in range(8)) / 8
    cell.cell_contents = before
    return total


def test_what_has_no_perceptrons_is_refused_in_words() -> None:
    sana = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12, sample_size=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"no two-layer perceptrons.*transformer_blocks\.0\.ff: GLUMBConv"):
        convert(sana, "mixture", {})


def test_wrong_requests_change_nothing() -> None:
    model = network("flux")
    plain = run(model, "flux")
    scores = dict(random_scores(model, 0))
    with pytest.raises(ValueError, match="must be a mixture, got dense"):
        convert(model, "dense", scores)
    with pytest.raises(ValueError, match="too few"):
        convert(model, "mixture:experts=500", scores)
    missing = scores.pop("single_transformer_blocks.2.proj_mlp")
    with pytest.raises(
        ValueError, match=r"no importance for the 128 .* single_transformer_blocks\.2\.proj_mlp"
    ):
        convert(model, "mixture", scores)
    with pytest.raises(ValueError, match="no importance"):
        convert(model, "mixture", scores | {"single_transformer_blocks.2.proj_mlp": missing[:3]})
    assert torch.equal(run(model, "flux"), plain)


@pytest.mark.parametrize("name", ["flux", "sd3", "mmdit"])
def test_gradients_lora_and_accelerators_work_on_a_converted_network(name: str) -> None:
    model = network(name)
    convert(model, "mixture:experts=3,expert_ratio=1,active=2", random_scores(model, 0))
    inputs = CASES[name][1]()
    model(**inputs, return_dict=False)[0].square().mean().backward()
    silent = [
        n for n, one in layers_of(model).items() if not one.gate.weight.grad.any() or not one.down.grad.any()
    ]
    # The text of the last dual-stream block of SD3 is dropped, so nothing reaches what made it.
    assert silent == []
    model.zero_grad()
    plain = run(model, name)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "gate"], init_lora_weights=False))
    assert not torch.allclose(run(model, name), plain, atol=1e-4)
    model.disable_adapters()
    torch.testing.assert_close(run(model, name), plain)
    with accelerated(model, DeltaCache(interval=2), steps=10) as done, torch.no_grad():
        for step in range(10):
            model(**inputs | {"timestep": inputs["timestep"] * 0 + 900 - 90 * step})
    assert done.report().to_dict()["reused"] > 0
