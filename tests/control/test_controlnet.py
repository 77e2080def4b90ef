"""ControlNet: the copies, a branch written out by hand, strength and window, accelerators, training, files, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from acceleration import DeltaCache, TaylorCache, accelerated
from control._files import load, save
from control.base import Refused, Use, controlled, frozen
from control.controlnet import ControlNet, ControlNetAdapter, copied
from control.relactrl import RelaCtrl
from dit.seams import announce, attention_seam, blocks_of

HALF = {
    "flux": 2,
    "sd3": 1,
    "sd3.5": 1,
    "mmdit": 2,
    "mmdit-dual": 1,
    "mmdit-single": 1,
    "pixart": 2,
    "dit": 2,
}
KINDS = sorted(HALF)


def pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=4, sample_size=16,
        cross_attention_dim=24, caption_channels=16,
    )  # fmt: skip


def dit() -> Any:
    from dit.backbones.dit import DiT

    return DiT(in_channels=4, sample_size=16, width=24, depth=4, heads=2, num_classes=5)


def words_inputs(draw: Any, batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {"hidden_states": draw(batch, 4, rows, columns), "encoder_hidden_states": draw(batch, 5, 16)}


def class_inputs(draw: Any, batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {"hidden_states": draw(batch, 4, rows, columns), "class_labels": torch.arange(batch) % 5}


OWN: dict[str, tuple[Callable[[], Any], Any]] = {"pixart": (pixart, words_inputs), "dit": (dit, class_inputs)}


@pytest.fixture
def ready(make: Any) -> Callable[[str], Any]:
    def found(kind: str) -> Any:
        if kind not in OWN:
            return make(kind)
        torch.manual_seed(0)
        build, inputs = OWN[kind]
        model = build()
        for parameter in model.parameters():  # zero gates would hide what a block does
            nn.init.normal_(parameter, std=0.2)
        return type(make("mmdit"))(kind, model.eval().requires_grad_(False), 4, inputs)

    return found


def shaken(adapter: Any, seed: int = 1) -> Any:
    """Give the maps weights, and the copies others than they were copied with."""
    draw = torch.Generator().manual_seed(seed)
    for name, one in adapter.named_parameters():
        size = 0.3 if "_proj." in name and not name.startswith("blocks.") else 0.02
        one.data = one.data + torch.randn(one.shape, generator=draw).to(one) * size
    return adapter.requires_grad_(False).eval()


def use_of(tiny: Any, seed: int = 1, copies: int | None = None, **about: Any) -> Use:
    condition = about.pop("condition", tiny.condition(seed=seed + 50))
    return Use(shaken(ControlNet(copies=copies).build(tiny.model), seed), condition, **about)


def called(tiny: Any, given: dict[str, Any], *uses: Use) -> Tensor:
    with torch.no_grad(), controlled(tiny.model, *uses):
        found: Tensor = tiny.call(given)
    return found


@contextmanager
def counting(adapter: Any) -> Iterator[list[int]]:
    """Count the calls of copies."""
    seen: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: seen.append(number))
        for number, block in enumerate(adapter.blocks)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


# The copies


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_half_is_copied_and_nothing_is_shared(kind: str, ready: Any) -> None:
    model = ready(kind).model
    adapter = ControlNet().build(model)
    blocks = [block.module for block in blocks_of(model)]
    assert (len(adapter.blocks), adapter.control.copies) == (HALF[kind], HALF[kind])
    for block, own in zip(blocks, adapter.blocks, strict=False):
        assert type(own) is type(block)
        theirs, ours = block.state_dict(), own.state_dict()
        assert list(theirs) == list(ours)
        assert all(torch.equal(x, ours[name]) for name, x in theirs.items())
        assert not {x.data_ptr() for x in theirs.values()} & {x.data_ptr() for x in ours.values()}
    maps = [adapter.before_proj, *adapter.after_proj]
    assert len(maps) == HALF[kind] + 1
    assert not any(bool(x.any()) for one in maps for x in one.parameters())
    assert all(one.requires_grad for one in adapter.parameters())


def test_a_copy_carries_nothing_that_was_hung_on_its_block(ready: Any) -> None:
    tiny = ready("mmdit")
    block = blocks_of(tiny.model).blocks[0].module
    seen: list[str] = []
    handle = block.attn.register_forward_pre_hook(lambda *_: seen.append("heard"))
    with controlled(tiny.model, use_of(tiny)):
        assert "forward" in vars(block)
        own = copied(block)
    assert "forward" not in vars(own)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in own.modules())
    assert block.attn._forward_pre_hooks, "and the block keeps its own"
    handle.remove()


@pytest.mark.parametrize("kind", ["flux", "sd3.5", "mmdit", "pixart", "dit"])
def test_it_is_the_branch_written_out_by_hand(kind: str, ready: Any) -> None:
    """x0 + Z(c) -> copy 0 -> copy 1 ...; what copy i gives is mapped and added behind block i, the words go their own way."""
    tiny = ready(kind)
    given, use = tiny.given(), use_of(tiny)
    adapter, model = use.adapter, tiny.model
    own: dict[str, Tensor] = {}
    latent = use.condition
    with torch.no_grad():
        if kind == "flux":
            x = latent.reshape(1, 4, 4, 2, 6, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 24, 16)
            tokens = model.x_embedder(x)
        elif kind == "dit":
            from dit.embeddings import sincos_2d
            from dit.grid import Grid

            tokens = model.x_embedder(latent) + sincos_2d(24, Grid(1, 4, 6), latent.device)
        else:
            tokens = (model.x_embedder if kind == "mmdit" else model.pos_embed)(latent)

        def behind(number: int) -> Callable[..., Any]:
            def after(_module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
                named = dict(kwargs)
                if args:
                    named["hidden_states"] = args[0]
                if number == 0:
                    named["hidden_states"] = named["hidden_states"] + adapter.before_proj(tokens)
                made = adapter.blocks[number](**(named | own))
                pair = isinstance(made, tuple)
                own["hidden_states"] = made[1] if pair else made
                if pair:
                    own["encoder_hidden_states"] = made[0]
                added = adapter.after_proj[number](own["hidden_states"])
                return (output[0], output[1] + added) if pair else output + added

            return after

        plain = tiny.call(given)
        blocks = [block.module for block in blocks_of(model)]
        handles = [
            blocks[number].register_forward_hook(behind(number), with_kwargs=True)
            for number in range(HALF[kind])
        ]
        theirs = tiny.call(given)
        for handle in handles:
            handle.remove()
    ours = called(tiny, given, use)
    assert float((ours - theirs).abs().max()) < 1e-5 * max(1.0, float(theirs.abs().max()))
    assert float((ours - plain).norm() / plain.norm()) > 0.01


# On every transformer


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_the_identity_and_a_trained_one_acts(kind: str, ready: Any) -> None:
    tiny = ready(kind)
    given = tiny.given()
    with torch.no_grad():
        plain = tiny.call(given)
        with controlled(tiny.model, Use(ControlNet().build(tiny.model), tiny.condition())):
            assert torch.equal(tiny.call(given), plain)
        use = use_of(tiny)
        with controlled(tiny.model, use) as run:
            steered = tiny.call(given)
            other = tiny.call(tiny.given(rows=4, columns=6), 500.0)
        assert run.report().uses[0]["acted"] == 2 * HALF[kind]
        assert "was stretched" in run.report().notes[0]
        assert float((steered - plain).norm() / plain.norm()) > 0.01
        assert other.isfinite().all()
        assert torch.equal(tiny.call(given), plain)
        assert not torch.equal(called(tiny, given, Use(use.adapter, tiny.condition(seed=9))), steered)
    assert not any("forward" in vars(block.module) for block in blocks_of(tiny.model))


@pytest.mark.parametrize("kind", ["flux", "pixart"])
def test_a_batch_equals_its_samples(kind: str, ready: Any) -> None:
    tiny = ready(kind)
    given, condition = tiny.given(batch=2), tiny.condition(batch=2)
    use = use_of(tiny, condition=condition)
    both = called(tiny, given, use)
    for place in range(2):
        alone = {
            name: x[place : place + 1] if len(x) == 2 and not name.endswith("ids") else x
            for name, x in given.items()
        }
        one = called(tiny, alone, Use(use.adapter, condition[place : place + 1]))
        assert float((one - both[place : place + 1]).abs().max()) < 1e-4
    with pytest.raises(Refused, match="2 conditions for a batch of 3"):
        called(tiny, tiny.given(batch=3), use)


def test_strength_zero_attaches_nothing_and_more_of_it_does_more(ready: Any) -> None:
    tiny = ready("sd3")
    given, strong = tiny.given(), use_of(tiny)
    with torch.no_grad(), counting(strong.adapter) as calls:
        plain = tiny.call(given)
        with controlled(tiny.model, Use(strong.adapter, strong.condition, 0.0)):
            assert not any("forward" in vars(block.module) for block in blocks_of(tiny.model))
            assert torch.equal(tiny.call(given), plain)
    assert not calls
    differences = [
        float((called(tiny, given, Use(strong.adapter, strong.condition, one)) - plain).norm() / plain.norm())
        for one in (1e-4, 0.1, 0.4, 1.0)
    ]
    assert differences[0] < 1e-2 * differences[-1]
    assert differences == sorted(differences)


def test_outside_of_its_window_nothing_is_computed(ready: Any) -> None:
    tiny = ready("flux")
    given, use = tiny.given(), use_of(tiny, start=0.25, end=0.75)
    with torch.no_grad(), counting(use.adapter) as calls:
        plain = tiny.run(given)
        with controlled(tiny.model, use, steps=4) as run:
            steered = tiny.run(given)
    assert [torch.equal(a, b) for a, b in zip(plain, steered, strict=True)] == [True, False, False, True]
    assert calls == [0, 1, 0, 1]
    assert run.report().uses[0]["calls"] == 2


def test_a_region_ends_where_it_ends(ready: Any) -> None:
    """Where every block is copied, the last residual alone is behind all attention; so look at what is added, not at pictures."""
    tiny = ready("dit")
    region = torch.zeros(8, 12)
    region[:, :6] = 1
    use = use_of(tiny, copies=4, region=region)
    for one in use.adapter.after_proj[:3]:
        nn.init.zeros_(one.weight)
        nn.init.zeros_(one.bias)
    with torch.no_grad():
        plain = tiny.call(tiny.given())
    changed = (called(tiny, tiny.given(), use) - plain).abs()
    assert float(changed[..., 6:].max()) == 0
    assert float(changed[..., :6].min(dim=1).values.max()) > 1e-3


def test_several_add_up_whatever_their_order(ready: Any) -> None:
    tiny = ready("mmdit")
    given = tiny.given()
    a, b, other = (
        use_of(tiny, 1),
        use_of(tiny, 2, copies=1, strength=0.5),
        RelaCtrl(heads=1).build(tiny.model),
    )
    for one in other.parameters():
        one.data = one.data + torch.randn(one.shape, generator=torch.Generator().manual_seed(3)) * 0.1
    beside = Use(other.requires_grad_(False), tiny.condition(seed=3))
    both = called(tiny, given, a, b)
    assert float((called(tiny, given, b, a) - both).abs().max()) < 1e-5
    assert min(float((called(tiny, given, one) - both).abs().max()) for one in (a, b)) > 1e-3
    with torch.no_grad(), controlled(tiny.model, a, beside) as run:
        mixed = tiny.call(given)
    assert all(row["acted"] for row in run.report().uses)
    assert not torch.equal(mixed, called(tiny, given, a))


def test_half_precision_beside_a_whole_transformer_is_close(ready: Any) -> None:
    for kind in ("mmdit", "flux"):
        tiny = ready(kind)
        given, use = tiny.given(), use_of(tiny)
        exact = called(tiny, given, use)
        with torch.no_grad():
            plain = tiny.call(given)
        use.adapter.bfloat16()
        close = called(tiny, given, use)
        assert close.dtype == exact.dtype
        assert 0 < float((close - exact).norm()) < 0.05 * float((exact - plain).norm())


# Under accelerators


@pytest.mark.parametrize("kind", ["flux", "mmdit", "pixart"])
@pytest.mark.parametrize(
    "method",
    [
        DeltaCache(warmup=1, interval=3, final_full=0),
        DeltaCache(warmup=1, mode="front", final_full=0),
        TaylorCache(warmup=1, final_full=0),
    ],
    ids=["rear", "front", "taylor"],
)
def test_a_reused_block_has_its_residual_once(kind: str, method: Any, ready: Any) -> None:
    """Identical inputs in every step: whatever is reused, the error is 0 (float rounding where deltas are added)."""
    tiny = ready(kind)
    given, use = tiny.given(), use_of(tiny, copies=3)
    time = 500.0 if kind == "mmdit" else 400.0
    with torch.no_grad(), controlled(tiny.model, use) as steered, counting(use.adapter) as calls:
        exact = tiny.call(given, time)
        with accelerated(tiny.model, method):
            announce(tiny.model, steps=5)
            for step in range(5):
                announce(tiny.model, step=step, branch="only")
                out = tiny.call(given, time)
                assert float((out - exact).norm() / exact.norm()) < 2e-6
    assert len(calls) < 6 * 3, "a block that was not computed did not run its copy either"
    tokens, words = 24 * 24 * 4, 5 * 24 * 4  # bytes of the picture's and of the text's stream
    kept = 3 * (2 * tokens + (0 if kind == "pixart" else words))
    assert steered.report().uses[0]["kept_bytes"] == kept


def test_a_window_that_begins_where_a_block_is_left_out_acts_all_the_same(ready: Any) -> None:
    tiny = ready("mmdit")
    given, use = tiny.given(), use_of(tiny, copies=3, start=0.25)
    front = DeltaCache(warmup=1, interval=4, mode="front", cached_fraction=0.5, final_full=0)
    with torch.no_grad(), controlled(tiny.model, use, steps=4) as run, counting(use.adapter) as calls:
        with accelerated(tiny.model, front, steps=4):
            assert all(one.isfinite().all() for one in tiny.run(given))
    assert calls
    assert run.report().uses[0]["acted"] == len(calls)


def test_accelerators_of_attention_see_the_transformers_own_alone(ready: Any) -> None:
    for kind in ("mmdit", "flux"):
        tiny = ready(kind)
        given, use, seen = tiny.given(), use_of(tiny), []

        def answer(call: Any, seen: list[str] = seen) -> Tensor:
            seen.append(call.path)
            out: Tensor = call.exact()
            return out

        with torch.no_grad(), attention_seam(tiny.model, answer):
            tiny.call(given)
            plain = list(seen)
            with controlled(tiny.model, use):
                tiny.call(given)
        assert len(plain) == 4
        assert seen == plain * 2


# Training and files


@pytest.mark.parametrize("kind", ["mmdit", "flux", "sd3"])
def test_training_reaches_its_own_weights_and_no_others(kind: str, ready: Any) -> None:
    tiny = ready(kind)
    tiny.model.requires_grad_(True)
    before = {name: x.clone() for name, x in tiny.model.state_dict().items()}
    adapter = ControlNet().build(tiny.model)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    given, condition = tiny.given(batch=2), tiny.condition(batch=2)
    losses = []
    try:
        with frozen(tiny.model), controlled(tiny.model, Use(adapter, condition)):
            for _ in range(12):
                out = tiny.call(given)
                loss = (out[:, :4] - 3).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        assert losses[-1] < 0.9 * losses[0]
        still = [name for name, x in adapter.named_parameters() if x.grad is None]
        # What the last copy makes of the text is heard by nobody.
        last = f"blocks.{HALF[kind] - 1}."
        assert all(name.startswith(last) for name in still), still
        assert bool(adapter.before_proj.weight.any()), "the first map has left zero"
        assert all(x.grad is None and x.requires_grad for x in tiny.model.parameters())
        assert all(torch.equal(x, before[name]) for name, x in tiny.model.state_dict().items())
    finally:
        tiny.model.requires_grad_(False)


def test_saved_and_loaded_it_does_the_same(tmp_path: Path, ready: Any) -> None:
    tiny = ready("flux")
    given, use = tiny.given(), use_of(tiny, copies=3)
    file = save(use.adapter, tmp_path / "edges.safetensors", tiny.model, {"steps": 12})
    again = load(file, tiny.model)
    assert isinstance(again, ControlNetAdapter)
    assert again.control == ControlNet(copies=3)
    assert torch.equal(called(tiny, given, Use(again, use.condition)), called(tiny, given, use))
    with safe_open(file, "pt") as opened:
        metadata, keys = opened.metadata(), set(opened.keys())
    assert json.loads(metadata["control"]) == {"name": "controlnet", "copies": 3}
    assert {
        "transformer.before_proj.weight",
        "transformer.after_proj.2.bias",
        "transformer.blocks.0.attn.to_q.weight",
    } < keys
    with pytest.raises(Refused, match=r"edges\.safetensors is for FluxTransformer2DModel of width 24"):
        load(file, ready("mmdit").model)


# Refusals


def test_what_cannot_work_is_refused_in_words(ready: Any) -> None:
    tiny = ready("mmdit")
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="copies"):
            ControlNet(copies=wrong)
    assert ControlNet(copies=5).refuses(tiny.model) == "it has 4 blocks, and 5 are to be copied"
    with pytest.raises(Refused, match="controlnet: it has 4 blocks"):
        ControlNet(copies=5).build(tiny.model)
    good = use_of(tiny)
    for condition, words in (
        (torch.zeros(1, 3, 8, 12), r"condition must be a tensor \[B, 4, H, W\], got shape \(1, 3, 8, 12\)"),
        ("edges.png", "got str"),
        (torch.full((1, 4, 8, 12), torch.nan), "no finite numbers"),
        (None, "needs a condition"),
    ):
        with pytest.raises(Refused, match=words), controlled(tiny.model, Use(good.adapter, condition)):
            pass
    for other, words in (
        ("mmdit-single", "for another transformer"),
        ("flux", "0 is a FluxTransformerBlock, and its copy a DualBlock"),
    ):
        with pytest.raises(Refused, match=words), controlled(ready(other).model, good):
            pass
    assert not any("forward" in vars(block.module) for block in blocks_of(tiny.model))


def test_blocks_that_cannot_be_copied_are_refused() -> None:
    from diffusers import SanaTransformer2DModel
    from peft import LoraConfig

    from dit.backbones.dit import DiT

    with torch.device("meta"):
        sana = SanaTransformer2DModel(
            num_layers=1, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
            num_cross_attention_heads=2, cross_attention_head_dim=8,
        )  # fmt: skip
    assert "SanaTransformer2DModel is not known here" in str(ControlNet().refuses(sana))
    routed = DiT(in_channels=4, sample_size=16, width=24, depth=4, heads=2, num_classes=5, experts="dynamic")
    assert "decides by a router" in str(ControlNet().refuses(routed))
    adapted = dit()
    adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(Refused, match="peft has put an adapter"):
        ControlNet().build(adapted)
    quantised = nn.Sequential(nn.Linear(4, 4))
    quantised[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(Refused, match="quantised"):
        copied(quantised)


def test_blocks_computed_again_are_refused(ready: Any) -> None:
    tiny = ready("mmdit")
    use = Use(ControlNet().build(tiny.model), tiny.condition())
    tiny.model.enable_gradient_checkpointing()
    try:
        with pytest.raises(Refused, match="disable_gradient_checkpointing"), controlled(tiny.model, use):
            tiny.call(tiny.given())
    finally:
        tiny.model.disable_gradient_checkpointing()
