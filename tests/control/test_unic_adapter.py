"""UNIC-Adapter: recorded values of the release, its layout, the second stream, the crossing, keeping, guidance, training."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acceleration import accelerated
from acceleration.delta_cache import DeltaCache
from acceleration.taylor_cache import TaylorCache
from acceleration.xattention import XAttention
from benchmarks import fidelity
from control import _files
from control._backbones import facts_of
from control._memory import Memory
from control.base import Refused, Use, controlled, frozen
from control.easycontrol import EasyControl
from control.unic_adapter import Instructed, ThreeWay, UNICAdapter, released
from dit.convert import LayoutError, convert, find
from dit.seams import announce, around_blocks, blocks_of

FIXTURE = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "UNIC-Adapter"


def recorded() -> Path:
    if not FIXTURE.is_dir():
        pytest.skip("the recorded values of UNIC-Adapter are not beside this project")
    return FIXTURE


def condition(tiny: Any, rows: int = 8, columns: int = 12, seed: int = 5, batch: int = 1) -> Instructed:
    return Instructed(
        tiny.draw(batch, tiny.channels, rows, columns, seed=seed),
        tiny.draw(batch, 5, 16, seed=seed + 1),
        tiny.draw(batch, 12, seed=seed + 2),
    )


def built(tiny: Any, seed: int = 1, **settings: Any) -> Any:
    """Return an adapter whose weights do something."""
    adapter = UNICAdapter(**({"rank": 4} | settings)).build(tiny.model)
    generator = torch.Generator().manual_seed(seed)
    for name, one in adapter.named_parameters():
        if "lora" in name or "gate" in name:
            one.data = torch.randn(one.shape, generator=generator) * 0.4
    return adapter.requires_grad_(False)


def use_of(tiny: Any, seed: int = 1, given: Instructed | None = None, **about: Any) -> Use:
    settings = {name: about.pop(name) for name in ("stream", "time", "queries", "gated") if name in about}
    return Use(built(tiny, seed, **settings), given or condition(tiny, seed=seed + 50), **about)


@contextmanager
def calls_of(*roots: nn.Module) -> Iterator[list[str]]:
    """Write down every call of a layer (a module without children) below the roots."""
    seen: list[str] = []
    with ExitStack() as stack:
        for place, root in enumerate(roots):
            for name, one in root.named_modules():
                if not any(True for _ in one.children()):
                    handle = one.register_forward_hook(
                        lambda *_, name=f"{place}:{name}": seen.append(name)  # type: ignore[misc]
                    )
                    stack.callback(handle.remove)
        yield seen


@torch.no_grad()
def sampled(tiny: Any, use: Use, *, memory: Memory | None = None, batch: int = 1) -> list[Tensor]:
    given = tiny.given(batch)
    with controlled(tiny.model, use, memory=memory):
        return tiny.run(given)


# The release


def test_the_release_is_reproduced() -> None:
    report = fidelity.compare(recorded(), mid=True)
    assert report.status == fidelity.HIT, report.problem or [one for one in report.rows if not one.passed]
    assert len(report.rows) == 16


def test_the_released_layouts_load_strictly_and_come_back() -> None:
    layouts = json.loads((recorded() / "keys.json").read_text(encoding="utf-8"))
    presets = json.loads((recorded() / "config.json").read_text(encoding="utf-8"))["official_presets"]
    for name, keys in layouts.items():
        state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
        model = convert(state, "UNIC-Adapter", presets[name])
        back = find("UNIC-Adapter").to_official(model)
        assert {key: list(x.shape) for key, x in back.items()} == keys
    state.pop("transformer_blocks.3.to_q_control.weight")
    with pytest.raises(LayoutError, match=r"transformer_blocks\.3\.to_q_control\.weight"):
        convert(state, "UNIC-Adapter", presets[name])


def test_a_second_table_of_other_positions_is_refused() -> None:
    with torch.device("cpu"):
        model = find("UNIC-Adapter").build(
            {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "sample_size": 4, "caption_projection_dim": 16,
             "joint_attention_dim": 8, "pooled_projection_dim": 8, "pos_embed_max_size": 4}, {},
        )  # fmt: skip
    state = find("UNIC-Adapter").to_official(model)
    state["pos_embed_control.pos_embed"] = state["pos_embed_control.pos_embed"] + 0.1
    with pytest.raises(LayoutError, match="pos_embed_control"):
        find("UNIC-Adapter").to_ours(state, model)


def test_a_released_file_is_recognised_by_its_content(make: Callable[[str], Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tiny = make("sd3.5")
    adapter = released().build(tiny.model)
    for one in adapter.parameters():
        one.data = torch.randn_like(one)
    # `contiguous`: a file holds every tensor by itself
    state = {key: x.contiguous() for key, x in {**tiny.model.state_dict(), **adapter.state_dict()}.items()}
    save_file(state, tmp_path / "unic.safetensors")
    found = _files.load(tmp_path / "unic.safetensors", tiny.model)
    assert found.control == released()
    assert all(torch.equal(x, adapter.state_dict()[key]) for key, x in found.state_dict().items())
    assert found.coverage.used == len(adapter.state_dict())
    with pytest.raises(Refused, match="Stable Diffusion 3"):
        _files.load(tmp_path / "unic.safetensors", make("flux").model)
    torch.save(state, tmp_path / "unic.pth")
    with pytest.raises(Refused, match=r"pickle.*save_file"):
        _files.load(tmp_path / "unic.pth", tiny.model)


# The second stream


@pytest.mark.parametrize("stream", ["light", "full"])
def test_a_fresh_stream_given_the_noise_is_the_main_stream(make: Any, stream: str) -> None:
    """Own weights begin as the base's and a LoRA as nothing, so picture and prompt run through both alike."""
    for kind in ("flux", "mmdit", "mmdit-single"):
        tiny = make(kind)
        given, latent = tiny.given(), tiny.draw(1, 4, 8, 12, seed=9)
        if kind == "flux":
            packed = latent.reshape(1, 4, 4, 2, 6, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 24, 16)
            given["hidden_states"] = packed
        else:
            given["hidden_states"] = latent
        seen = []

        def around(block: Any, inner: Any, args: Any, kwargs: Any, seen: list[Any] = seen) -> Any:
            seen.append(inner(*args, **kwargs))
            return seen[-1]

        with torch.no_grad(), around_blocks(blocks_of(tiny.model), around):
            tiny.call(given, 500.0)
        adapter = UNICAdapter(stream=stream, time="current").build(tiny.model)
        same = Instructed(latent, given["encoder_hidden_states"], given["pooled_projections"])
        with torch.no_grad():
            steps = list(
                adapter.steps(
                    tiny.model,
                    same,
                    time=torch.full((1,), 500.0 * tiny.scale),
                    guidance=given.get("guidance"),
                    grid=(4, 6),
                    dtype=torch.float32,
                    whole=True,
                )
            )
        assert len(steps) == len(seen)
        # The light stream has no LoRA behind the last keys; without one it is the base all the same.
        for step, (text, image) in zip(steps, seen, strict=True):
            torch.testing.assert_close(step.image, image, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(step.text, text, atol=2e-5, rtol=1e-5)


def test_a_full_stream_shares_only_the_perceptrons(tiny: Any) -> None:
    adapter = built(tiny, stream="full", time="current")
    base = {one.data_ptr() for one in tiny.model.parameters()}
    assert not any(one.data_ptr() in base for one in adapter.parameters())
    given, dtype = condition(tiny), torch.float32
    with calls_of(tiny.model) as seen, torch.no_grad():
        list(
            adapter.steps(
                tiny.model,
                given,
                time=torch.zeros(1),
                guidance=torch.ones(1) if tiny.name == "flux" else None,
                grid=(4, 6),
                dtype=dtype,
                whole=True,
            )
        )
    weighted = {
        name[2:] for name in seen if any(True for _ in tiny.model.get_submodule(name[2:]).parameters())
    }
    shared = (".ff.", ".ff_context.", ".proj_mlp", ".proj_out")
    assert weighted
    assert all(any(word in f"{name}." for word in shared) for name in weighted), sorted(weighted)


# The crossing


def _turned(x: Tensor, where: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Rotate [B, K, N, head size] by positions [N, 3] as complex numbers."""
    powers = [10000.0 ** (-torch.arange(0, size, 2) / size) for size in axes]
    turn = torch.cat([where[:, i : i + 1] * power for i, power in enumerate(powers) if len(power)], dim=1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(turn), turn)).flatten(-2)


def test_what_is_heard_is_added_before_the_map_out(tiny: Any) -> None:
    """In the first block, against softmax attention written out, with rotations as complex numbers."""
    use = use_of(tiny, stream="full", time="zero", strength=0.7)
    adapter: Any = use.adapter
    facts: Any = facts_of(tiny.model)
    place = facts.places(tiny.model)[0]
    out = place.attn.to_out[0] if getattr(place.attn, "to_out", None) is not None else place.block.proj_out
    seen: dict[str, Any] = {}
    given = tiny.given()

    def keep(name: str) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            seen[name] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return hook

    handles = [
        place.attn.register_forward_pre_hook(keep("given"), with_kwargs=True),
        out.register_forward_pre_hook(keep("out"), with_kwargs=True),
    ]
    with torch.no_grad():
        tiny.call(given)
        plain = seen["out"]
        with controlled(tiny.model, use):
            tiny.call(given)
        for handle in handles:
            handle.remove()
        guidance = torch.ones(1) if "guidance" in given else None
        step = next(adapter.steps(
            tiny.model, use.condition, time=torch.zeros(1), guidance=guidance, grid=(4, 6), dtype=torch.float32,
        ))  # fmt: skip
        image = seen["given"][:, -24:]
        q = adapter.get_submodule(f"{place.path}.to_q_control")(image).unflatten(-1, (2, 12)).transpose(1, 2)
        where = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0))
        rotates = facts.angles(tiny.model, where) is not None
        q = _turned(q, where, (4, 4, 4) if rotates else (0, 6, 6))
        heard = (q @ step.k.transpose(-1, -2) / 12**0.5).softmax(dim=-1) @ step.v
        gate = adapter.get_submodule(place.path).gate_control
        expected = 0.7 * heard.transpose(1, 2).flatten(2) * gate
    changed = (seen["out"] - plain)[..., :24]
    torch.testing.assert_close(changed[:, -24:], expected, atol=1e-5, rtol=1e-4)
    if changed.shape[1] > 24:
        assert not changed[:, :-24].any()  # the text asks nothing where the queries are the picture's own


def test_the_queries_of_the_base_ask_for_the_text_too(make: Any) -> None:
    for kind in ("flux", "mmdit"):
        tiny = make(kind)
        use = use_of(tiny, queries="base")
        place = facts_of(tiny.model).places(tiny.model)[-1]  # type: ignore[union-attr]
        seen: list[Tensor] = []
        handle = place.block.proj_out.register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            tiny.call(tiny.given())
            with controlled(tiny.model, use) as run:
                tiny.call(tiny.given())
        handle.remove()
        assert (seen[1] - seen[0])[:, :5, :24].any()
        assert run.report().uses[0]["acted"] == 4
        assert not any("to_q_control" in name for name, _ in use.adapter.named_parameters())
    with (
        pytest.raises(Refused, match="queries='own'"),
        controlled(make("sd3").model, use_of(make("sd3"), queries="base")),
    ):
        pass


def test_a_fresh_adapter_changes_nothing_and_strength_zero_attaches_nothing(tiny: Any) -> None:
    given = tiny.given()
    fresh = UNICAdapter().build(tiny.model)
    before = {key: x.clone() for key, x in tiny.model.state_dict().items()}
    with torch.no_grad():
        plain = tiny.call(given)
        with controlled(tiny.model, Use(fresh, condition(tiny))):
            assert torch.equal(tiny.call(given), plain)
        off, on = use_of(tiny, strength=0.0), use_of(tiny)
        with calls_of(off.adapter) as seen, controlled(tiny.model, off) as run:
            assert torch.equal(tiny.call(given), plain)
        assert not seen
        assert run.report().uses[0]["calls"] == 0
        small = []
        for strength in (1e-4, 1.0):
            with controlled(tiny.model, Use(on.adapter, on.condition, strength=strength)):
                small.append(float((tiny.call(given) - plain).abs().max()))
        assert 0 < small[0] < 1e-2 < small[1]
        assert torch.equal(tiny.call(given), plain)
    assert all(torch.equal(x, before[key]) for key, x in tiny.model.state_dict().items())
    assert "forward" not in tiny.model.__dict__


def test_a_region_confines_it_and_sizes_may_differ(tiny: Any) -> None:
    region = torch.zeros(8, 12)
    region[:, :6] = 1
    with torch.no_grad():
        given = tiny.given()
        for use in (
            use_of(tiny, region=region),
            use_of(tiny, given=condition(tiny, rows=4, columns=8)),
            use_of(tiny, stream="full", given=condition(tiny, rows=12, columns=4)),
        ):
            with controlled(tiny.model, use):
                assert torch.isfinite(tiny.call(given)).all()
        place = facts_of(tiny.model).places(tiny.model)[0]  # type: ignore[union-attr]
        seen: list[Any] = []
        handle = place.block.register_forward_hook(lambda *args, seen=seen: seen.append(args[-1]))
        tiny.call(given)
        with controlled(tiny.model, use_of(tiny, region=region)):
            tiny.call(given)
        handle.remove()
    changed = (seen[1][1] - seen[0][1]).abs().amax(dim=(0, 2)).reshape(4, 6)
    assert (changed[:, :3] > 1e-4).all()
    assert (changed[:, 3:] < 1e-5).all()


# Keeping


@pytest.mark.parametrize("stream", ["light", "full"])
def test_a_kept_stream_gives_the_same_bits_and_is_computed_once(tiny: Any, stream: str) -> None:
    use = use_of(tiny, stream=stream)
    kept, anew = Memory(), Memory(entries=0)
    on, off = sampled(tiny, use, memory=kept), sampled(tiny, use, memory=anew)
    assert all(torch.equal(a, b) for a, b in zip(on, off, strict=True))
    assert (kept.misses, kept.hits, anew.misses) == (1, 3, 4)
    other = tiny.given(seed=3)  # another prompt and seed
    with torch.no_grad(), controlled(tiny.model, use, memory=kept):
        tiny.call(other)
    assert kept.misses == 1


def test_a_kept_step_computes_nothing_of_the_second_stream(tiny: Any) -> None:
    use = use_of(tiny, stream="full")
    given = tiny.given()
    with torch.no_grad():
        with calls_of(tiny.model) as plain:
            tiny.call(given)
        with controlled(tiny.model, use):
            tiny.call(given)
            with calls_of(tiny.model, use.adapter) as seen:
                tiny.call(given)
    assert sorted(one for one in seen if one.startswith("0:")) == sorted(plain)
    mine = [one for one in seen if one.startswith("1:")]
    assert len(mine) == len(blocks_of(tiny.model))
    assert all(one.endswith("to_q_control") for one in mine)


def test_what_is_kept_never_goes_stale(tiny: Any) -> None:
    use, memory = use_of(tiny), Memory()
    sampled(tiny, use, memory=memory)
    image, text = use.condition.image, use.condition.text
    for change in (
        lambda: image.mul_(0.5), lambda: text.add_(1), lambda: next(use.adapter.parameters()).data.mul_(2),
    ):  # fmt: skip
        change()
        found = sampled(tiny, use, memory=memory)
        fresh = sampled(tiny, use)
        assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True))
    assert memory.misses == 4


def test_the_step_s_own_time_is_never_kept(make: Any) -> None:
    tiny = make("sd3")
    use, memory = use_of(tiny, stream="full", time="current", gated=False), Memory()
    given = tiny.given()
    with torch.no_grad():
        with controlled(tiny.model, use, memory=memory) as run:
            found = tiny.run(given)
        assert run.report().uses[0]["passes"] == 4
        assert memory.bytes == 0
        with controlled(tiny.model, use):
            assert torch.equal(tiny.call(given, 250.0), found[-1])


def test_nothing_is_computed_outside_the_window(tiny: Any) -> None:
    use = use_of(tiny, start=0.5, end=0.75, time="current")
    given = tiny.given()
    with torch.no_grad():
        plain = tiny.run(given)
        with calls_of(use.adapter) as seen, controlled(tiny.model, use, steps=4) as run:
            found = []
            counts = []
            for time in (1000.0, 750.0, 500.0, 250.0):
                found.append(tiny.call(given, time))
                counts.append(len(seen))
    assert [torch.equal(a, b) for a, b in zip(found, plain, strict=True)] == [True, True, False, True]
    assert counts[0] == counts[1] == 0 < counts[2] == counts[3]
    assert run.report().uses[0]["passes"] == 1


# Guidance


@pytest.mark.parametrize("time", ["zero", "current"])
def test_three_way_guidance_is_three_calls(tiny: Any, time: str) -> None:
    adapter = built(tiny, time=time)
    given, other = tiny.given(seed=1), tiny.given(seed=2)
    guidance = ThreeWay(image_instruction=1.3, prompt=3.0)
    mine = condition(tiny)
    nothing = Instructed(
        torch.zeros_like(mine.image), tiny.draw(1, 5, 16, seed=70), tiny.draw(1, 12, seed=71)
    )
    prompts = ("encoder_hidden_states", "pooled_projections")
    negative = given | {name: other[name] for name in prompts}
    with torch.no_grad():
        apart = []
        for inputs, one in ((negative, nothing), (negative, mine), (given, mine)):
            with controlled(tiny.model, Use(adapter, one)):
                apart.append(tiny.call(inputs))
        expected = apart[0] + 1.3 * (apart[1] - apart[0]) + 3.0 * (apart[2] - apart[1])
        batch = {
            name: guidance.prompts(negative[name], x) if name not in ("img_ids", "txt_ids") else x
            for name, x in given.items()
        }
        rows = Instructed(
            guidance.conditions(nothing.image, mine.image), guidance.conditions(nothing.text, mine.text),
            guidance.conditions(nothing.pooled, mine.pooled),  # type: ignore[arg-type]
        )  # fmt: skip
        with controlled(tiny.model, Use(adapter, rows)):
            together = guidance.combined(tiny.call(batch))
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)


def test_calls_without_weight_are_not_made() -> None:
    u, n, f = (torch.randn(2, 3) for _ in range(3))
    for image, prompt, calls in (
        (1.0, 3.0, ("instructed", "full")), (2.0, 2.0, ("unconditional", "full")), (1.0, 1.0, ("full",)),
        (1.5, 0.0, ("unconditional", "instructed")), (0.0, 0.0, ("unconditional",)),
    ):  # fmt: skip
        guidance = ThreeWay(image, prompt)
        assert guidance.calls == calls
        torch.testing.assert_close(guidance.combined(guidance.stack(u, n, f)), guidance.mixed(u, n, f))


# Together with others


def test_two_at_once_act_both_and_beside_easycontrol(tiny: Any, easy: Any) -> None:
    first, second = use_of(tiny, 1), use_of(tiny, 2, stream="full")
    given = tiny.given()
    with torch.no_grad():
        alone = []
        for uses in ((first,), (second,), (first, second), (second, first)):
            with controlled(tiny.model, *uses) as run:
                alone.append(tiny.call(given))
            assert all(row["acted"] == len(blocks_of(tiny.model)) for row in run.report().uses)
        assert not torch.allclose(alone[2], alone[0], atol=1e-3)
        assert not torch.allclose(alone[2], alone[1], atol=1e-3)
        torch.testing.assert_close(alone[2], alone[3], atol=1e-4, rtol=1e-4)
        both = []
        other = easy(tiny, 3)
        assert isinstance(other.adapter.control, EasyControl)
        for uses in ((first, other), (other, first)):
            with controlled(tiny.model, *uses) as run:
                both.append(tiny.call(given))
            assert all(row["acted"] for row in run.report().uses)
        torch.testing.assert_close(both[0], both[1], atol=1e-4, rtol=1e-4)


def test_batches_share_a_condition_or_have_one_each(tiny: Any) -> None:
    adapter, two = built(tiny), condition(tiny, batch=2)
    given = tiny.given(2)
    with torch.no_grad():
        with controlled(tiny.model, Use(adapter, two)):
            found = tiny.call(given)
        for place in (0, 1):
            one = Instructed(*(x[place : place + 1] for x in (two.image, two.text, two.pooled)))  # type: ignore[index]
            with controlled(tiny.model, Use(adapter, one)):
                torch.testing.assert_close(tiny.call(given)[place], found[place], atol=1e-4, rtol=1e-4)
        with (
            pytest.raises(Refused, match="3 conditions for a batch of 2"),
            controlled(tiny.model, Use(adapter, condition(tiny, batch=3))),
        ):
            tiny.call(given)


def accelerations() -> list[Any]:
    return [
        DeltaCache(interval=2, mode="rear", warmup=1, final_full=0),
        DeltaCache(interval=3, mode="whole", warmup=1, final_full=0, cached_fraction=1.0),
        TaylorCache(interval=2, warmup=1, final_full=0),
    ]


@pytest.mark.parametrize("place", range(3))
def test_a_step_that_is_reused_holds_what_was_added_once(tiny: Any, place: int) -> None:
    """The same inputs in every step: what a cache gives back must be what would have been computed."""
    use, given = use_of(tiny), tiny.given()
    with torch.no_grad():
        with controlled(tiny.model, use):
            exact = tiny.call(given)
        with (
            controlled(tiny.model, use, steps=6),
            accelerated(tiny.model, accelerations()[place], steps=6) as run,
        ):
            for step in range(6):
                announce(tiny.model, step=step)
                torch.testing.assert_close(tiny.call(given), exact, atol=1e-5, rtol=1e-5)
    assert run.report().reused + run.report().forecast > 0


def test_sparse_attention_thins_out_the_main_path_alone(tiny: Any) -> None:
    """What steers stays exact, so the error of the accelerator does not grow by it."""
    use, given = use_of(tiny, given=condition(tiny, 16, 16)), tiny.given(rows=16, columns=16)
    sparse = XAttention(
        threshold=0.5, rows=16, block=16, stride=4, min_tokens=16, warmup=0.0, dense_layers=0, measure=False
    )
    with torch.no_grad():
        errors = []
        for uses in ((), (use,)):
            with controlled(tiny.model, *uses):
                exact = tiny.call(given)
                with accelerated(tiny.model, sparse, steps=2) as run:
                    for step in range(2):
                        announce(tiny.model, step=step)
                        found = tiny.call(given)
                assert run.report().sparse
                assert not any("#1" in row["layer"] for row in run.report().attention)
            errors.append(float((found - exact).norm() / exact.norm()))
    assert 0 < errors[1] < 1.25 * errors[0]


def test_an_interrupted_block_leaves_no_trace(tiny: Any) -> None:
    given, use = tiny.given(), use_of(tiny)
    before = [path for path, one in tiny.model.named_modules() if "forward" in one.__dict__]
    hooks = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in tiny.model.modules())
    with torch.no_grad():
        plain = tiny.call(given)
        broken = given | {"encoder_hidden_states": given["encoder_hidden_states"][..., :3]}
        with pytest.raises(RuntimeError), controlled(tiny.model, use):
            tiny.call(broken)
        with controlled(tiny.model, use):
            tiny.call(given)
        assert torch.equal(tiny.call(given), plain)
    assert hooks == sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in tiny.model.modules())
    assert [path for path, one in tiny.model.named_modules() if "forward" in one.__dict__] == before


@pytest.mark.parametrize("stream", ["light", "full"])
@pytest.mark.parametrize("kind", ["sd3.5", "mmdit"])
def test_half_precision_and_layers_kept_in_fp8(make: Any, kind: str, stream: str) -> None:
    tiny = make(kind)
    given = tiny.given()
    with torch.no_grad(), controlled(tiny.model, use_of(tiny, stream=stream)):
        exact = tiny.call(given)
    for allowed, change in ((0.03, "half"), (0.15, "fp8")):
        other = dataclasses.replace(tiny, model=copy.deepcopy(tiny.model))
        inputs = given
        if change == "half":
            other.model.to(torch.bfloat16)
            inputs = {name: x.to(torch.bfloat16) for name, x in given.items()}
        else:
            other.model.enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
            )
        use = use_of(other, stream=stream)
        use.adapter.to(inputs["hidden_states"].dtype)
        with torch.no_grad(), controlled(other.model, use):
            found = other.call(inputs)
        assert found.dtype == inputs["hidden_states"].dtype
        assert 0 < float((found.float() - exact).norm() / exact.norm()) < allowed


# Training and files


@pytest.mark.parametrize("stream", ["light", "full"])
def test_training_reaches_its_own_weights_alone(tiny: Any, stream: str) -> None:
    adapter = built(tiny, stream=stream).requires_grad_(True)
    before = {key: x.clone() for key, x in tiny.model.state_dict().items()}
    tiny.model.requires_grad_(True)
    try:
        with frozen(tiny.model), controlled(tiny.model, Use(adapter, condition(tiny))):
            tiny.call(tiny.given()).pow(2).mean().backward()
        assert not any(one.grad is not None for one in tiny.model.parameters())
    finally:
        tiny.model.requires_grad_(False)
    last = blocks_of(tiny.model).blocks[-1].path
    reached = {name for name, one in adapter.named_parameters() if one.grad is not None and one.grad.any()}
    missed = {name for name, _ in adapter.named_parameters()} - reached
    # Only keys and values of the last block are heard. A key's bias shifts all scores of a query alike, but for rotation.
    unheard = {name for name in missed if name.startswith(last)}
    assert missed <= unheard if stream == "full" else not missed, sorted(missed)
    torch.optim.SGD(adapter.parameters(), lr=0.1).step()
    assert all(torch.equal(x, before[key]) for key, x in tiny.model.state_dict().items())


@pytest.mark.parametrize("settings", [{}, {"stream": "full", "time": "current", "gated": False}])
def test_saved_and_loaded_again(tiny: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    adapter = built(tiny, **settings)
    file = _files.save(adapter, tmp_path / "unic.safetensors", tiny.model, {"steps": 7})
    found = _files.load(file, tiny.model)
    assert found.control == adapter.control
    assert json.loads(_files.read(file).metadata["about"]) == {"steps": 7}
    given, use = condition(tiny), tiny.given()
    with torch.no_grad():
        results = []
        for one in (adapter, found):
            with controlled(tiny.model, Use(one, given)):
                results.append(tiny.call(use))
    assert torch.equal(*results)


def test_bad_input_is_refused_in_words(make: Any) -> None:
    tiny = make("sd3")
    adapter, good = built(tiny), condition(tiny)
    for given, words in (
        (good.image, "Instructed"),
        (Instructed(good.image[:, :3], good.text), r"image must be a tensor \[B, 4, any, any\]"),
        (Instructed(good.image[..., :7], good.text), "sides that divide by 2"),
        (Instructed(good.image, good.text[..., :3]), r"text must be a tensor \[B, any, 16\]"),
        (Instructed(good.image, good.text, good.pooled[:, :5]), r"pooled must be a tensor \[B, 12\]"),  # type: ignore[index]
        (Instructed(good.image * float("nan"), good.text), "no finite numbers"),
        (Instructed(good.image.repeat(2, 1, 1, 1), good.text.repeat(3, 1, 1)), "of one batch"),
        (None, "needs a condition"),
    ):
        with pytest.raises(Refused, match=words), controlled(tiny.model, Use(adapter, given)):
            pass
    with (
        pytest.raises(Refused, match="another transformer"),
        controlled(make("mmdit-single").model, Use(adapter, good)),
    ):
        pass
    with pytest.raises(Refused, match="not known here"):
        UNICAdapter().load(nn.Linear(2, 2), {})
    with pytest.raises(Refused, match="problems"):
        UNICAdapter().load(tiny.model, {"strange": torch.zeros(1)})
