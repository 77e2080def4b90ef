"""RelaCtrl: the recording, the released layout, the mixer, strength and window, accelerators, costs, training, files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from acceleration import DeltaCache, TaylorCache, accelerated
from benchmarks import fidelity
from control._files import load, save
from control._shuffle import SegmentAttention, ShuffleMixer, shuffle_reference, widths
from control._trunk import Shape
from control.base import Refused, Use, controlled, frozen
from control.convert.relactrl import to_official
from control.relactrl import GROUPS, PLACES, ControlBlock, RelaCtrl, RelaCtrlAdapter, released
from dit.convert import LayoutError, convert, find
from dit.ledger import counted, parameters_of
from dit.seams import around_blocks, blocks_of

NARROW = RelaCtrl(heads=1)  # the tiny transformers have 24 channels


def picture_inputs(draw: Any, batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {"hidden_states": draw(batch, 4, rows, columns), "encoder_hidden_states": draw(batch, 5, 16)}


def class_inputs(draw: Any, batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {"hidden_states": draw(batch, 4, rows, columns), "class_labels": torch.arange(batch) % 5}


def pixart(size: int = 12, layers: int = 4) -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=size, in_channels=4, out_channels=8, num_layers=layers, sample_size=16,
        cross_attention_dim=2 * size, caption_channels=16,
    )  # fmt: skip


def dit(**changes: Any) -> Any:
    from dit.backbones.dit import DiT

    settings = {"in_channels": 4, "sample_size": 16, "width": 24, "depth": 4, "heads": 2, "num_classes": 5}
    return DiT(**(settings | changes))


OWN: dict[str, tuple[Callable[[], Any], Any]] = {
    "pixart": (pixart, picture_inputs),
    "dit": (dit, class_inputs),
    "dit-single": (lambda: dit(modulation="adaln-single"), class_inputs),
}
KINDS = ["dit", "dit-single", "flux", "mmdit", "mmdit-dual", "mmdit-single", "pixart", "sd3", "sd3.5"]


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


def shaken(adapter: RelaCtrlAdapter, seed: int = 1) -> RelaCtrlAdapter:
    draw = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        size = parameter.shape[1] ** -0.5 if parameter.dim() == 2 and parameter.shape[0] > 6 else 0.3
        parameter.data = torch.randn(parameter.shape, generator=draw) * size
    return adapter.eval()


def use_of(tiny: Any, seed: int = 1, settings: RelaCtrl = NARROW, **about: Any) -> Use:
    condition = about.pop("condition", tiny.condition(seed=seed + 50))
    return Use(shaken(settings.build(tiny.model), seed), condition, **about)


@contextmanager
def counting(adapter: Any) -> Iterator[list[int]]:
    """Count the calls of control blocks."""
    seen: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: seen.append(number))
        for number, block in enumerate(adapter.blocks)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


# The recording and the released layout


def test_the_recording_is_reproduced(shared: Path) -> None:
    report = fidelity.compare(shared / "fixtures" / "RelaCtrl", mid=True)
    assert not report.problem
    assert len(report.rows) == 14
    assert all(row.passed and row.difference <= 1e-5 for row in report.rows)


def record(folder: Path, dim: int, blocks: list[int], tokens: int, batch: int) -> None:
    """Write a recording of another configuration, computed by the reference value by value."""
    torch.manual_seed(3)
    model = convert_empty(dim, blocks)
    io: dict[str, Tensor] = {}
    stream = torch.randn(batch, tokens, dim)
    for number, block in enumerate(model.blocks):
        assert isinstance(block, ControlBlock)
        x, time = torch.randn(batch, tokens, dim), torch.randn(batch, 6 * dim)
        draws = block.mixer.drawn(tokens, torch.device("cpu"))
        name = f"case{number}"
        io |= {f"{name}.in.x": x, f"{name}.in.t": time, f"{name}.in.perm_channels": draws.channels.int()}
        io |= {f"{name}.in.perm_tokens.{j}": order for j, order in enumerate(draws.values)}
        if number == 0:
            io[f"{name}.in.c"] = stream
        with torch.no_grad():
            both = x + block.before_proj(stream) if blocks[number] == 0 else stream + block.before_proj(x)
            stream = shuffle_reference(block.mixer, both, time.view(batch, 1, 6, dim), draws)
            io |= {f"{name}.out.c": stream, f"{name}.out.c_skip": block.after_proj(stream)}
    folder.mkdir()
    save_file({key: x.contiguous() for key, x in io.items()}, folder / "io.safetensors")
    save_file(to_official(model.state_dict()), folder / "weights.safetensors")
    config = {"system": "RelaCtrl", "args": {"dim": dim, "blocks": blocks}, "run": {}}
    (folder / "config.json").write_text(json.dumps(config))


def convert_empty(dim: int, blocks: list[int]) -> Any:
    return shaken(find("RelaCtrl").build({"dim": dim, "blocks": blocks}, {}), 4)


@pytest.mark.parametrize(
    ("dim", "blocks", "tokens", "batch"), [(64, [1], 4, 1), (256, [0, 1, 2], 12, 2), (128, [4, 3, 5], 8, 1)]
)
def test_other_configurations_work_by_the_same_command(
    tmp_path: Path, dim: int, blocks: list[int], tokens: int, batch: int
) -> None:
    record(tmp_path / "other", dim, blocks, tokens, batch)
    assert fidelity.main([str(tmp_path / "other"), "--mid"]) == fidelity.HIT


def test_a_wrong_permutation_or_weight_is_a_miss(tmp_path: Path) -> None:
    record(tmp_path / "other", 64, [1, 4], 8, 1)
    file = tmp_path / "other" / "io.safetensors"
    io = fidelity.read_safetensors(file)
    io["case1.in.perm_tokens.0"] = io["case1.in.perm_tokens.0"].flip(0)
    save_file({key: x.clone() for key, x in io.items()}, file)
    report = fidelity.compare(tmp_path / "other")
    assert [row.passed for row in report.rows] == [True, True, False, False]


def test_the_released_keys_load_strictly_and_come_back(shared: Path) -> None:
    file = shared / "fixtures" / "RelaCtrl" / "keys.json"
    shapes = json.loads(file.read_text())["RelaCtrl control blocks for PixArt-alpha"]
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model = convert(state, "RelaCtrl", {})
    assert {key: list(x.shape) for key, x in to_official(model.state_dict()).items()} == shapes
    assert parameters_of(model) == pytest.approx(45.6e6, rel=0.005)
    del state["controlnet.3.after_proj.bias"]
    with pytest.raises(LayoutError, match=r"missing blocks\.3\.after_proj\.bias"):
        convert(state, "RelaCtrl", {})


@pytest.mark.parametrize(
    ("width", "groups", "expected"),
    [
        (1152, 6, [192] * 6),
        (1152, 4, [288] * 4),
        (192, 2, [96, 96]),
        (256, 6, [32, 32, 32, 32, 64, 64]),
        (160, 2, [64, 96]),
        (96, 1, [96]),
    ],
)
def test_channels_are_dealt_as_released(width: int, groups: int, expected: list[int]) -> None:
    assert list(widths(width, groups, 32)) == expected


def test_channels_that_cannot_be_dealt_are_refused() -> None:
    with pytest.raises(Refused, match="allowed is 1 to 2"):
        widths(64, 3, 32)
    with pytest.raises(Refused, match="divides by 8 x heads = 32"):
        widths(100, 2, 32)


def test_a_released_file_steers_pixart_by_the_released_schedule(tmp_path: Path) -> None:
    """Against a loop written from the schedule: the last residual is added before every block from 1 on."""
    torch.manual_seed(0)
    model = pixart(96, 5).eval().requires_grad_(False)
    blocks = convert_empty(192, [0, 1, 2])
    state = to_official(blocks.state_dict()) | {"base_model.x_embedder.proj.bias": torch.zeros(192)}
    save_file(state, tmp_path / "file.safetensors")
    adapter = load(tmp_path / "file.safetensors", model)
    assert isinstance(adapter, RelaCtrlAdapter)
    assert (adapter.places, adapter.control.hold_residual) == ((0, 2, 3), True)
    assert str(adapter.coverage).startswith(f"{len(state) - 1}/{len(state)} keys")
    given = picture_inputs(torch.randn, 1, 8, 8) | {"timestep": torch.tensor([500.0])}
    condition = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        with controlled(model, Use(adapter, condition)):
            ours = model(**given).sample
        time = model.adaln_single(given["timestep"], None, batch_size=1, hidden_dtype=torch.float32)[0]
        stream, skip = model.pos_embed(condition), None
        # behind block: the control block that runs (None: the residual before is added again)
        schedule = {0: 0, 1: None, 2: 1, 3: 2}
        handles = []
        for index, number in schedule.items():

            def after(_m: Any, _a: Any, x: Tensor, number: int | None = number) -> Tensor:
                nonlocal stream, skip
                if number is not None:
                    block: Any = adapter.blocks[number]
                    both = x + block.before_proj(stream) if number == 0 else stream + block.before_proj(x)
                    draws = block.mixer.fixed(x.shape[1], x.device)
                    stream = shuffle_reference(block.mixer, both, time.view(1, 1, 6, 192), draws)
                    skip = block.after_proj(stream)
                return x + skip

            handles.append(model.transformer_blocks[index].register_forward_hook(after))
        theirs = model(**given).sample
        for handle in handles:
            handle.remove()
    assert float((ours - theirs).abs().max()) < 1e-4
    assert float((ours - model(**given).sample).abs().max()) > 0.01


def test_a_released_file_is_refused_elsewhere(tmp_path: Path, ready: Any) -> None:
    save_file(to_official(convert_empty(192, [0, 1]).state_dict()), tmp_path / "file.safetensors")
    with pytest.raises(Refused, match="holds control blocks for PixArt, and MMDiT"):
        load(tmp_path / "file.safetensors", ready("mmdit").model)


# The mixer


@pytest.mark.parametrize(
    ("parts", "heads", "segments", "tokens"),
    [((16, 8), 1, 4, 12), ((8,), 2, 4, 6), ((24, 8, 8), 2, 3, 9), ((16,), 4, 5, 7)],
)
def test_the_mixer_equals_its_reference(
    parts: tuple[int, ...], heads: int, segments: int, tokens: int
) -> None:
    torch.manual_seed(0)
    mixer = ShuffleMixer(parts, heads, segments, rows=3, seed=7)
    x, vectors = torch.randn(2, tokens, sum(parts)), torch.randn(2, 1, 3, sum(parts))
    for draws in (mixer.fixed(tokens, x.device), mixer.drawn(tokens, x.device)):
        with torch.no_grad():
            ours, theirs = mixer(x, vectors, draws), shuffle_reference(mixer, x, vectors, draws)
        assert float((ours - theirs).abs().max()) < 1e-5
    assert not torch.equal(ours, x)


def test_permutations_hang_on_the_seed_alone() -> None:
    a, b, c = (ShuffleMixer((16, 16, 8), 1, 4, rows=3, seed=seed) for seed in (7, 7, 8))
    torch.manual_seed(1)
    first = a.fixed(12, torch.device("cpu"))
    torch.manual_seed(2)
    second = b.fixed(12, torch.device("cpu"))
    other = c.fixed(12, torch.device("cpu"))
    assert torch.equal(first.channels, second.channels)
    assert all(torch.equal(one, two) for one, two in zip(first.values, second.values, strict=True))
    assert not torch.equal(first.channels, other.channels)
    assert not torch.equal(first.values[0], other.values[0])
    assert sorted(first.values[2].tolist()) == list(range(96))
    assert first.values[0] is first.values[1]  # groups of one width share what is stored


def test_permutations_of_an_inference_serve_training_too() -> None:
    mixer = ShuffleMixer((8,), 1, 4, rows=3, seed=7)
    with torch.inference_mode():
        mixer.fixed(4, torch.device("cpu"))
    x = torch.randn(1, 4, 8, requires_grad=True)
    mixer(x, torch.randn(1, 1, 3, 8), mixer.fixed(4, x.device)).sum().backward()
    assert x.grad is not None
    sizes = [mixer.fixed(tokens, x.device).values[0].numel() for tokens in range(5, 12)]
    assert sizes == [8 * tokens for tokens in range(5, 12)]
    assert len(mixer._fixed) == 4  # those of older sizes are gone


def test_generated_pictures_do_not_hang_on_the_global_generator(ready: Any) -> None:
    tiny = ready("mmdit")
    given = tiny.given()

    def run(settings: RelaCtrl, seed: int) -> Tensor:
        use = use_of(tiny, settings=settings)
        torch.manual_seed(seed)
        with torch.no_grad(), controlled(tiny.model, use):
            return tiny.call(given)

    assert torch.equal(run(NARROW, 1), run(NARROW, 2))
    drawn = NARROW.replace(shuffle="drawn")
    assert torch.equal(run(drawn, 1), run(drawn, 1))
    assert not torch.equal(run(drawn, 1), run(drawn, 2))
    assert not torch.equal(run(NARROW, 1), run(NARROW.replace(seed=5), 1))


# On every transformer


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_the_identity_and_a_trained_one_acts(kind: str, ready: Any) -> None:
    tiny = ready(kind)
    given = tiny.given()
    with torch.no_grad():
        plain = tiny.call(given)
        with controlled(tiny.model, Use(NARROW.build(tiny.model), tiny.condition())):
            assert torch.equal(tiny.call(given), plain)
        use = use_of(tiny)
        with controlled(tiny.model, use) as run:
            steered = tiny.call(given)
            other = tiny.call(tiny.given(rows=4, columns=6), 500.0)  # stretched condition
        assert run.report().uses[0]["acted"] == 2 * len(use.adapter.places)
        assert "was stretched" in run.report().notes[0]
        assert float((steered - plain).norm() / plain.norm()) > 0.01
        assert other.isfinite().all()
        assert torch.equal(tiny.call(given), plain)
    assert not any("forward" in vars(block.module) for block in blocks_of(tiny.model))


@pytest.mark.parametrize("kind", ["flux", "pixart"])
def test_a_batch_equals_its_samples(kind: str, ready: Any) -> None:
    tiny = ready(kind)
    given, condition = tiny.given(batch=2), tiny.condition(batch=2)
    use = use_of(tiny, condition=condition)
    with torch.no_grad():
        with controlled(tiny.model, use):
            both = tiny.call(given)
        for place in range(2):
            alone = {
                name: x[place : place + 1] if len(x) == 2 and not name.endswith("ids") else x
                for name, x in given.items()
            }
            with controlled(tiny.model, Use(use.adapter, condition[place : place + 1])):
                assert float((tiny.call(alone) - both[place : place + 1]).abs().max()) < 1e-4
        with pytest.raises(Refused, match="2 conditions for a batch of 3"), controlled(tiny.model, use):
            tiny.call(tiny.given(batch=3))


def test_an_odd_count_of_tokens_works(ready: Any) -> None:
    tiny = ready("dit")
    use = use_of(tiny, condition=tiny.condition(6, 10))
    with torch.no_grad(), controlled(tiny.model, use):
        assert tiny.call(tiny.given(rows=6, columns=10)).isfinite().all()


def test_strength_zero_attaches_nothing(ready: Any) -> None:
    tiny = ready("mmdit")
    given, use = tiny.given(), use_of(tiny, strength=0.0)
    with torch.no_grad(), counting(use.adapter) as calls:
        plain = tiny.call(given)
        with controlled(tiny.model, use):
            assert not any("forward" in vars(block.module) for block in blocks_of(tiny.model))
            assert torch.equal(tiny.call(given), plain)
    assert not calls


def test_strength_is_continuous_and_grows(ready: Any) -> None:
    tiny = ready("sd3")
    given, strong = tiny.given(), use_of(tiny)
    differences = []
    with torch.no_grad():
        plain = tiny.call(given)
        for strength in (1e-4, 0.1, 0.4, 1.0):
            with controlled(tiny.model, Use(strong.adapter, strong.condition, strength)):
                differences.append(float((tiny.call(given) - plain).norm() / plain.norm()))
    assert differences[0] < 1e-3
    assert differences == sorted(differences)


def test_outside_of_its_window_nothing_is_computed(ready: Any) -> None:
    tiny = ready("pixart")
    given, use = tiny.given(), use_of(tiny, start=0.25, end=0.75)
    with torch.no_grad(), counting(use.adapter) as calls:
        plain = tiny.run(given)
        with controlled(tiny.model, use, steps=4) as run:
            steered = tiny.run(given)
    assert [torch.equal(a, b) for a, b in zip(plain, steered, strict=True)] == [True, False, False, True]
    assert len(calls) == 2 * len(use.adapter.places)
    assert run.report().uses[0]["calls"] == 2


def test_a_region_ends_where_it_ends(ready: Any) -> None:
    """Behind the last block no token hears another, so outside of the region nothing changes."""
    tiny = ready("dit")
    region = torch.zeros(8, 12)
    region[:, :6] = 1
    use = use_of(tiny, settings=NARROW.replace(places=(3,)), region=region)
    with torch.no_grad():
        plain = tiny.call(tiny.given())
        with controlled(tiny.model, use):
            changed = (tiny.call(tiny.given()) - plain).abs()
    assert float(changed[..., 6:].max()) == 0
    assert float(changed[..., :6].min(dim=1).values.max()) > 1e-3


def test_two_adapters_add_up_whatever_their_order(ready: Any) -> None:
    tiny = ready("flux")
    last = NARROW.replace(places=(3,))
    a, b = use_of(tiny, 1, last), use_of(tiny, 2, last, strength=0.5)
    seen: list[Tensor] = []

    def watch(*uses: Use) -> Tensor:
        handle = tiny.model.norm_out.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        with controlled(tiny.model, *uses):
            out = tiny.call(tiny.given())
        handle.remove()
        return out

    with torch.no_grad():
        plain = tiny.call(tiny.given())
        assert float((watch(a, b) - watch(b, a)).abs().max()) < 1e-5
        watch(a)
        watch(b)
        with controlled(tiny.model, Use(NARROW.build(tiny.model), tiny.condition())):
            handle = tiny.model.norm_out.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
            tiny.call(tiny.given())
            handle.remove()
        assert torch.equal(tiny.call(tiny.given()), plain)
    both, _, alone_a, alone_b, bare = seen
    assert float((both - bare - (alone_a - bare) - (alone_b - bare)).abs().max()) < 1e-4
    assert float((alone_b - bare).abs().max()) > 0.01


def test_it_stands_beside_another_way_to_steer(ready: Any, easy: Any) -> None:
    tiny = ready("flux")
    given, ours, other = tiny.given(), use_of(tiny), easy(tiny)
    with torch.no_grad():
        with controlled(tiny.model, ours, other) as run:
            both = tiny.call(given)
        assert all(row["acted"] for row in run.report().uses)
        with controlled(tiny.model, other, ours):
            assert torch.equal(tiny.call(given), both)
        with controlled(tiny.model, ours):
            assert not torch.equal(tiny.call(given), both)


def test_half_precision_is_close(ready: Any) -> None:
    tiny = ready("mmdit")
    given, use = tiny.given(), use_of(tiny)
    with torch.no_grad():
        plain = tiny.call(given)
        with controlled(tiny.model, use):
            exact = tiny.call(given)
        half = RelaCtrlAdapter(use.adapter.control, use.adapter.shape).bfloat16()
        half.load_state_dict(use.adapter.state_dict())
        with controlled(tiny.model, Use(half, use.condition)):
            close = tiny.call(given)
    assert close.dtype == exact.dtype
    assert float((close - exact).norm()) < 0.05 * float((exact - plain).norm())


# Under accelerators


@pytest.mark.parametrize("kind", ["dit", "flux", "mmdit", "pixart", "sd3"])
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
    given = tiny.given()
    held = kind == "pixart"
    last = len(blocks_of(tiny.model)) - 1
    use = use_of(tiny, settings=NARROW.replace(places=(0, 1) if held else (0, 1, last), hold_residual=held))
    time = 500.0 if kind in ("dit", "mmdit") else 400.0
    states: list[str] = []
    with torch.no_grad(), controlled(tiny.model, use), counting(use.adapter) as calls:
        exact = tiny.call(given, time)
        full = len(calls)
        with accelerated(tiny.model, method) as run:
            from dit.seams import announce

            announce(tiny.model, steps=5)
            for step in range(5):
                announce(tiny.model, step=step, branch="only")
                out = tiny.call(given, time)
                assert float((out - exact).norm() / exact.norm()) < 1e-6
            states = [cell["states"] for cell in run.report().cells]
    assert any("R" in one or "F" in one for one in states)
    assert len(calls) < 6 * full  # a block that was not computed did not run its control block either


def test_accelerators_of_attention_see_the_transformers_own_alone(ready: Any) -> None:
    from dit.seams import attention_seam

    tiny = ready("mmdit")
    given, use, seen = tiny.given(), use_of(tiny), []

    def answer(call: Any) -> Tensor:
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


def test_a_residual_counted_twice_would_show(ready: Any) -> None:
    """The control of the test above: a residual added outside of the blocks, behind what is reused, is not the same."""
    tiny = ready("mmdit")
    given = tiny.given()
    use = use_of(tiny, settings=NARROW.replace(places=(0, 1, 2)))
    with torch.no_grad():
        with controlled(tiny.model, use):
            exact = tiny.call(given)
        with controlled(tiny.model, Use(use.adapter, use.condition, 2.0)):
            twice = tiny.call(given)
    assert float((twice - exact).norm() / exact.norm()) > 0.01


@pytest.mark.parametrize("cache_first", [True, False])
def test_the_residual_lies_beneath_diffusers_cache(cache_first: bool, ready: Any) -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    tiny = ready("flux")
    given, use = tiny.given(), use_of(tiny, settings=NARROW.replace(places=(0, 1, 2)))
    with torch.no_grad():
        with controlled(tiny.model, use):
            exact = tiny.call(given)
        try:
            if cache_first:
                tiny.model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
            with controlled(tiny.model, use), counting(use.adapter) as calls:
                if not cache_first:
                    tiny.model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
                with tiny.model.cache_context("only"):
                    outs = [tiny.call(given) for _ in range(3)]
        finally:
            tiny.model.disable_cache()
    assert len(calls) == 3 + 1 + 1  # the first block alone in the second and third call
    assert all(float((out - exact).norm() / exact.norm()) < 1e-6 for out in outs)


# Costs


@pytest.mark.parametrize(("side", "expected"), [(64, 0.175), (128, 0.185)])
def test_it_costs_about_15_percent_of_a_controlnet_of_half_the_blocks(side: int, expected: float) -> None:
    """PixArt-alpha at 512 and 1024 px, counted on the meta device: parameters and multiply-accumulates of what is added."""
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            caption_channels=4096, sample_size=128, use_additional_conditions=False
        )
        given = picture_inputs(torch.randn, 1, side, side) | {"timestep": torch.zeros(1)}
        given["encoder_hidden_states"] = torch.randn(1, 120, 4096)
        adapter = released().build(model)
    tokens = side * side // 4
    copied = tuple(f"transformer_blocks.{index}." for index in range(13))  # its ControlNet copies 13 blocks
    half = [part for part in counted(model, given).parts if (part.path + ".").startswith(copied)]
    maps = 14 * 1152 * 1152  # zero maps: one before the first block, one behind each
    parameters = sum(part.parameters for part in half) + maps + 14 * 1152
    macs = sum(part.macs for part in half) + tokens * maps
    ratio = adapter.macs(tokens) / macs
    assert parameters == pytest.approx(294e6, rel=0.02)  # as the paper says
    assert parameters_of(adapter) / parameters == pytest.approx(0.155, abs=0.005)
    assert ratio == pytest.approx(expected, abs=0.003)
    # The paper's 46.7 against 271 counts maps alone, at 1024 tokens.
    mapped = adapter.macs(tokens) - sum(
        2 * tokens * tokens // 4 * group.proj.in_features
        for group in adapter.modules()
        if isinstance(group, SegmentAttention)
    )
    assert mapped == pytest.approx(46.7e9 * tokens / 1024, rel=0.01)


def test_the_analytic_cost_is_the_counted_one() -> None:
    shape = Shape(64, 8, 48, vectors=False)
    with torch.device("meta"):
        adapter = RelaCtrlAdapter(RelaCtrl(heads=2), shape)
        image = stream = torch.zeros(1, 24, 64)
        conditioning = torch.zeros(1, 48)
    counter = FlopCounterMode(display=False)
    draws = [block.mixer.identity(24, image.device) for block in adapter.blocks]
    with counter, torch.no_grad():
        vectors = adapter.vectors(conditioning)
        for block, draw in zip(adapter.blocks, draws, strict=True):
            stream, _ = block(image, stream, vectors, draw)
    attention = sum(
        2 * 24 * (24 // 4) * group.proj.in_features
        for group in adapter.modules()
        if isinstance(group, SegmentAttention)
    )
    # On the meta device attention counts as matrix products or not at all, as the version of torch has it.
    assert adapter.macs(24) - counter.get_total_flops() // 2 in (0, attention)
    assert attention > 0


# Training and files


@pytest.mark.parametrize("kind", ["mmdit", "pixart"])
def test_training_reaches_its_own_weights_and_no_others(kind: str, ready: Any) -> None:
    tiny = ready(kind)
    tiny.model.requires_grad_(True)
    before = {name: x.clone() for name, x in tiny.model.state_dict().items()}
    adapter = NARROW.build(tiny.model)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    given, condition = tiny.given(batch=2), tiny.condition(batch=2)
    losses = []
    try:
        with frozen(tiny.model), controlled(tiny.model, Use(adapter, condition)):
            for _ in range(12):
                out = tiny.call(given)
                loss = (out[:, :4] - condition).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        assert losses[-1] < 0.9 * losses[0]
        assert all(x.grad is not None and bool(x.grad.any()) for x in adapter.parameters())
        assert all(x.grad is None and x.requires_grad for x in tiny.model.parameters())
        assert all(torch.equal(x, before[name]) for name, x in tiny.model.state_dict().items())
    finally:
        tiny.model.requires_grad_(False)


def test_saved_and_loaded_it_does_the_same(tmp_path: Path, ready: Any) -> None:
    tiny = ready("mmdit")
    given, use = tiny.given(), use_of(tiny, settings=NARROW.replace(seed=9, segments=2))
    file = save(use.adapter, tmp_path / "edges.safetensors", tiny.model, {"steps": 12})
    again = load(file, tiny.model)
    assert again.control == use.adapter.control
    assert again.control.places == (0, 1, 2)  # written out, so that a later default changes nothing
    with torch.no_grad():
        with controlled(tiny.model, use):
            expected = tiny.call(given)
        with controlled(tiny.model, Use(again, use.condition)):
            assert torch.equal(tiny.call(given), expected)
    with pytest.raises(Refused, match=r"edges\.safetensors is for MMDiT of width 24"):
        load(file, ready("flux").model)


# Refusals


def test_settings_are_checked() -> None:
    for wrong, words in (
        ({"places": (3, 1)}, "places must rise"),
        ({"places": (-1,)}, "whole numbers of at least 0"),
        ({"places": (0, 1), "groups": (2,)}, "one for each"),
        ({"groups": (2,)}, "groups go with places"),
        ({"shuffle": "none"}, "one of fixed, drawn"),
    ):
        with pytest.raises(ValueError, match=words):
            RelaCtrl(**wrong)


def test_the_papers_places_are_the_default_and_scale_with_depth() -> None:
    full = RelaCtrl().resolved(Shape(1152, 28, 6912, vectors=True))
    assert (full.places, full.groups) == (PLACES, GROUPS)
    small = RelaCtrl().resolved(Shape(256, 10, 256, vectors=False))
    assert small.places == (0, 1, 2, 3, 6)
    assert small.groups == (6, 6, 2, 6, 6)


def test_what_cannot_work_is_refused_in_words(ready: Any) -> None:
    tiny = ready("mmdit")
    good = use_of(tiny)
    for settings, words in (
        (RelaCtrl(), "24 channels do not divide by 8 x heads = 32; heads that fit: 1, 3"),
        (NARROW.replace(places=(4,)), "there is no block 4: the blocks are 0 to 3"),
        (NARROW.replace(places=(1,), groups=(4,)), "at most 3 groups of 8, got 4"),
    ):
        assert words in str(settings.refuses(tiny.model))
        with pytest.raises(Refused, match="relactrl"):
            settings.build(tiny.model)
    for condition, words in (
        (torch.zeros(1, 3, 8, 12), r"condition must be a tensor \[B, 4, H, W\], got shape \(1, 3, 8, 12\)"),
        ("edges.png", "got str"),
        (torch.full((1, 4, 8, 12), torch.nan), "no finite numbers"),
        (None, "needs a condition"),
    ):
        with pytest.raises(Refused, match=words), controlled(tiny.model, Use(good.adapter, condition)):
            pass
    with pytest.raises(Refused, match="for another transformer"), controlled(ready("dit-single").model, good):
        pass
    assert not any("forward" in vars(block.module) for block in blocks_of(tiny.model))


def test_transformers_of_other_kinds_are_refused() -> None:
    from diffusers import SanaTransformer2DModel

    from dit.backbones.dig import DiG

    with torch.device("meta"):
        sana = SanaTransformer2DModel(
            num_layers=1, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
            num_cross_attention_heads=2, cross_attention_head_dim=8,
        )  # fmt: skip
        dig = DiG(width=24, depth=2, heads=2, mixer="full", experts="dense")
    assert "SanaTransformer2DModel is not known here" in str(NARROW.refuses(sana))
    assert "other orders" in str(NARROW.refuses(dig))
    with pytest.raises(Refused, match="is not known here"):
        NARROW.build(sana)


def test_recomputed_blocks_are_refused(ready: Any) -> None:
    tiny = ready("mmdit")
    use = use_of(tiny)
    tiny.model.enable_gradient_checkpointing()
    try:
        with pytest.raises(Refused, match="disable_gradient_checkpointing"), controlled(tiny.model, use):
            tiny.call(tiny.given())
    finally:
        tiny.model.disable_gradient_checkpointing()


def test_an_exception_leaves_no_trace(ready: Any) -> None:
    tiny = ready("sd3")
    given, use = tiny.given(), use_of(tiny)
    with torch.no_grad():
        plain = tiny.call(given)
        with pytest.raises(TypeError), controlled(tiny.model, use):
            tiny.model(**given, strange=1)
        assert torch.equal(tiny.call(given), plain)


def test_a_control_block_that_was_skipped_leaves_what_it_gave_last(ready: Any) -> None:
    """Without an accelerator nothing is kept; with one, a later control block goes on from the last stream."""
    tiny = ready("dit")
    given, use = tiny.given(), use_of(tiny, settings=NARROW.replace(places=(0, 2)))
    with torch.no_grad():
        with controlled(tiny.model, use) as run:
            tiny.call(given)
        assert "kept_bytes" not in run.report().uses[0]
        with controlled(tiny.model, use) as run, counting(use.adapter) as calls:
            method = DeltaCache(warmup=1, interval=4, first_block=0, last_block=1, final_full=0)
            with accelerated(tiny.model, method) as accelerator:
                outs = [tiny.call(given, time) for time in (500.0, 499.999, 499.998)]
        assert [cell["states"] for cell in accelerator.report().cells] == ["CCCC", "CCCC", "RRCC"]
        assert calls == [0, 1, 0, 1, 1]
        assert float((outs[2] - outs[0]).norm() / outs[0].norm()) < 1e-3
        assert run.report().uses[0]["kept_bytes"] == 2 * 2 * 24 * 24 * 4  # two streams and two residuals


def test_blocks_are_skipped_with_their_residual(ready: Any) -> None:
    tiny = ready("dit")
    use = use_of(tiny, settings=NARROW.replace(places=(1,)))
    block = blocks_of(tiny.model).blocks[1]

    def skip(_block: Any, _inner: Any, _args: Any, kwargs: Any) -> Any:
        return kwargs["hidden_states"]

    from dit.seams import Blocks

    with torch.no_grad(), counting(use.adapter) as calls:
        with around_blocks(Blocks((block,)), skip):
            bare = tiny.call(tiny.given())
        with pytest.raises(RuntimeError, match="changed nothing"), controlled(tiny.model, use):
            with around_blocks(Blocks((block,)), skip):
                assert torch.equal(tiny.call(tiny.given()), bare)
    assert not calls
