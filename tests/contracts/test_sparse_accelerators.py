"""Sparse attention on tiny random models of diffusers' own classes: with effect or refused in words, and gone without a trace."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

import acceleration.adaspa as adaspa_module
from acceleration import (
    Accelerator,
    AdaSpa,
    DeltaCache,
    Untouched,
    XAttention,
    _attending,
    accelerated,
    refusal,
)
from dit.seams import announce

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

# Small tiles for small models; nothing is timed, so the outcome is the same on every machine.
SMALL: dict[str, Any] = {"min_tokens": 16, "dense_layers": 0, "measure": False}
METHODS = [
    AdaSpa(density=0.4, rows=8, block=4, guard=0.0, **SMALL),
    XAttention(threshold=0.5, stride=2, rows=16, block=16, **SMALL),
]
NO_SELF_ATTENTION = ("SanaTransformer2DModel",)  # its self-attention is linear


def state_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {
            key: {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
            for key, value in module.__dict__.items()
        }
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_runs_with_effect_or_says_why_not(tiny: Any, method: Accelerator) -> None:
    given, before = tiny.inputs(rows=16), state_of(tiny.model)
    plain = tiny.sample(given)
    if type(tiny.model).__name__ in NO_SELF_ATTENTION:
        with (
            pytest.raises(Untouched, match="cross-attention"),
            accelerated(tiny.model, method, steps=tiny.steps),
        ):
            tiny.sample(given)
        assert state_of(tiny.model) == before
        return
    with accelerated(tiny.model, method, steps=tiny.steps) as run:
        first, second = tiny.sample(given), tiny.sample(given)
    report = run.report()
    assert state_of(tiny.model) == before
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, tiny.sample(given), strict=True))
    letters = "".join(cell["states"] for cell in report.cells)
    assert report.sparse == letters.count("S") > 0
    assert report.computed == len(letters)
    thinned = [row for row in report.attention if row["sparse"]]
    assert thinned
    assert all(0 < row["density"] < 1 and 0 < row["recall"] <= 1 for row in thinned)
    assert not all(torch.equal(a, b) for a, b in zip(plain, first, strict=True))
    assert torch.equal(plain[0], first[0])  # the warm-up is dense
    assert report.bytes > 0 or isinstance(method, XAttention)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_branches_do_not_mix(tiny: Any, method: Accelerator) -> None:
    if type(tiny.model).__name__ in NO_SELF_ATTENTION:
        assert refusal(tiny.model, method) is None
        return
    cond, free = tiny.inputs(rows=8), tiny.inputs(rows=8)
    alone = []
    for given in (cond, free):
        with contextlib.suppress(Untouched), accelerated(tiny.model, method, steps=tiny.steps):
            alone.append(tiny.sample(given))
    name = next(iter(cond))
    with contextlib.suppress(Untouched), accelerated(tiny.model, method, steps=tiny.steps):
        for step in range(tiny.steps):
            scale, time = 1 - step / (2 * tiny.steps), 1 - step / tiny.steps
            for given, expected in ((cond, alone[0]), (free, alone[1])):
                x = given[name]
                moved = [one * scale for one in x] if isinstance(x, list) else x * scale
                assert torch.equal(tiny.call(given | {name: moved}, time), expected[step])


# Where 5 tokens of text stand among the keys: by the source of diffusers' attention processors, not by what we recognise.
TEXT = {
    "FluxTransformer2DModel": "first", "Flux2Transformer2DModel": "first", "QwenImageTransformer2DModel": "first",
    "CogVideoXTransformer3DModel": "first", "SD3Transformer2DModel": "last", "HunyuanVideoTransformer3DModel": "last",
    "ZImageTransformer2DModel": "last", "WanTransformer3DModel": "none", "PixArtTransformer2DModel": "none",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("name", TEXT)
def test_text_is_heard_and_asks_in_full(
    name: str, method: Any, tables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tiles that a kernel is really given; tiles of the picture alone are left out."""
    given: list[tuple[Any, ...]] = []
    inner = _attending.sparse_attention

    def seen(q: Any, k: Any, v: Any, kept: Any, rows: int, block: int, **more: Any) -> Any:
        given.append((kept, q.shape[2], k.shape[2], rows, block))
        return inner(q, k, v, kept, rows, block, **more)

    monkeypatch.setattr(_attending, "sparse_attention", seen)
    tiny = tables.build(name)
    with accelerated(tiny.model, method, steps=tiny.steps):
        tiny.sample(tiny.inputs(rows=16))
    whole = max((one[2] for one in given), default=0)
    left_out = False
    for kept, queries, keys, rows, block in given:
        assert queries == keys  # self- or joint attention
        if keys < whole:
            continue  # a refiner of Z-Image, which hears the picture alone
        text = {"first": range(5), "last": range(keys - 5, keys), "none": range(0)}[TEXT[name]]
        asking, heard = sorted({place // rows for place in text}), sorted({place // block for place in text})
        assert kept[:, :, asking].all()
        assert kept[..., heard].all()
        left_out = left_out or not kept.all()
        assert not text or any(len(one) < kept.shape[place] for place, one in ((2, asking), (3, heard)))
    assert left_out


def test_a_second_search_uses_the_sums_of_the_first_and_masks_are_bits(
    tables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each layer and each guidance branch its own."""
    sums: list[tuple[Any, Any]] = []
    inner = adaspa_module.block_mass

    def mass(*args: Any, **given: Any) -> Any:
        found = inner(*args, **given)
        sums.append((given["lse"], found[1]))
        return found

    monkeypatch.setattr(adaspa_module, "block_mass", mass)
    tiny = tables.build("FluxTransformer2DModel")
    prompts = {name: tiny.inputs(rows=8) for name in ("cond", "uncond")}
    method = METHODS[0].replace(warmup=0.25, search_again=0.5)
    with accelerated(tiny.model, method, steps=8) as run:
        for step in range(8):
            for branch, given in prompts.items():
                announce(tiny.model, step=step, branch=branch)
                tiny.call(given, 1 - step / 8)
        layers = [one for _, kept in run._kept.values() for one in kept.values()]
    assert len(layers) == 2 * 4  # two branches, four layers
    assert len(sums) == 2 * len(layers)
    first, second = sums[: len(layers)], sums[len(layers) :]
    assert all(before is None for before, _ in first)
    assert [id(before) for before, _ in second] == [id(after) for _, after in first]
    assert len({id(one.mask.data) for one in layers}) == len(layers)
    for one in layers:
        assert one.mask.data.dtype == torch.uint8
        assert one.mask.bytes == one.mask.tiles()[..., 0].numel() * -(-one.mask.width // 8)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_stands_in_padding_changes_nothing(tables: Any, method: Accelerator) -> None:
    """Qwen-Image and HunyuanVideo hand on which keys of the prompt count."""
    for name in ("QwenImageTransformer2DModel", "HunyuanVideoTransformer3DModel"):
        tiny = tables.build(name)
        given = tiny.inputs(rows=16)
        mask = next(key for key in given if key.endswith("mask"))
        given[mask] = given[mask].clone()
        given[mask][:, 3:] = 0
        other = given | {"encoder_hidden_states": given["encoder_hidden_states"].clone()}
        other["encoder_hidden_states"][:, 3:] = 9.0
        outputs = []
        for one in (given, other):
            with accelerated(tiny.model, method, steps=4) as run:
                outputs.append([tiny.call(one, 1 - step / 4) for step in range(4)])
            assert run.report().sparse > 0
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*outputs, strict=True)), name


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_goes_with_a_cache_around_the_blocks(tiny: Any, method: Accelerator) -> None:
    if type(tiny.model).__name__ in NO_SELF_ATTENTION:
        return
    given, before = tiny.inputs(rows=16), state_of(tiny.model)
    with accelerated(
        tiny.model, DeltaCache(mode="rear", warmup=3, cached_fraction=0.5), method, steps=tiny.steps
    ) as run:
        tiny.sample(given)
    letters = "".join(cell["states"] for cell in run.report().cells)
    assert letters.count("S") > 0
    assert letters.count("R") > 0
    assert state_of(tiny.model) == before
