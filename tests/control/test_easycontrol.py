"""EasyControl on every family it serves: off is off, the cache skips and never goes stale, conditions stay apart."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from acceleration.adaspa import AdaSpa
from acceleration.base import accelerated
from acceleration.delta_cache import DeltaCache
from acceleration.taylor_cache import TaylorCache
from control._condition import ConditionPass
from control._memory import Memory
from control._tokens import KeyValues
from control.base import Refused, Use, controlled, frozen
from control.easycontrol import EasyControl, EasyControlAdapter
from dit.seams import Attending, announce, attention_seam, blocks_of

Easy = Callable[..., Use]
FIXTURES = Path(__file__).parents[2].parent / "shared" / "fixtures"


def steered(
    tiny: Any, given: dict[str, Any], *uses: Use, memory: Memory | None = None, **about: Any
) -> list[Tensor]:
    with torch.no_grad(), controlled(tiny.model, *uses, steps=4, memory=memory, **about):
        found: list[Tensor] = tiny.run(given)
    return found


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_strength_zero_is_bit_equal_and_one_is_not(tiny: Any, easy: Easy) -> None:
    given = tiny.given()
    with torch.no_grad():
        plain = tiny.run(given)
    before = dict(tiny.model.__dict__)
    with torch.no_grad(), controlled(tiny.model, easy(tiny, strength=0.0)) as run:
        assert tiny.model.__dict__ == before, "nothing may be attached"
        assert same(tiny.run(given), plain)
    assert run.report().calls == 0
    assert apart(steered(tiny, given, easy(tiny)), plain) > 1e-3


def test_strength_is_continuous_and_grows(tiny: Any, easy: Easy) -> None:
    given = tiny.given()
    with torch.no_grad():
        plain = tiny.run(given)
    use = easy(tiny)

    def at(strength: float) -> list[Tensor]:
        return steered(tiny, given, Use(use.adapter, use.condition, strength))

    sizes = [apart(at(strength), plain) for strength in (1e-6, 1e-3, 0.1, 1.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 1e-4 < sizes[-1]
    assert apart(at(1.0), at(1.0 + 1e-6)) < 1e-4, "the path without a bias is the limit of the one with it"


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_cache_on_equals_cache_off_bit_for_bit(tiny: Any, easy: Easy, count: int, kind: torch.dtype) -> None:
    given = {
        key: x.to(kind) if x.is_floating_point() and "ids" not in key else x
        for key, x in tiny.given(2).items()
    }
    tiny.model.to(kind)
    try:
        uses = [
            easy(tiny, seed, conditioning="prompt" if seed % 2 else "null") for seed in range(1, 1 + count)
        ]
        on, off = Memory(), Memory(entries=0)
        found = steered(tiny, given, *uses, memory=on)
        assert same(found, steered(tiny, given, *uses, memory=off))
        assert (on.misses, on.hits) == (min(count, 2), 3 * min(count, 2)), (
            "one pass for each group, then memory"
        )
        assert off.misses == 4 * min(count, 2)
        assert on.bytes > 0 == off.bytes
    finally:
        tiny.model.float()


def linear_flops(tiny: Any, given: dict[str, Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        tiny.call(given)
    return sum(
        count for op, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)
    )


def test_cached_step_has_the_linear_flops_of_a_step_without_control(tiny: Any, easy: Easy) -> None:
    given = tiny.given()
    with torch.no_grad():
        plain = linear_flops(tiny, given)
        with controlled(tiny.model, easy(tiny), easy(tiny, 2)):
            first, second = linear_flops(tiny, given), linear_flops(tiny, given)
    assert first > 2 * plain, "the first step runs both conditions through the blocks"
    assert second == plain


def test_memory_survives_prompt_seed_and_guidance_without_a_prompt_of_its_own(tiny: Any, easy: Easy) -> None:
    use, memory = easy(tiny), Memory()
    steered(tiny, tiny.given(seed=1), use, memory=memory)
    found = steered(
        tiny, tiny.given(batch=2, seed=2), use, memory=memory
    )  # other prompt, noise and batch (guidance)
    assert (memory.misses, memory.hits) == (1, 7)
    assert same(found, steered(tiny, tiny.given(batch=2, seed=2), use))


def test_what_earlier_prompts_left_is_forgotten(make: Any, easy: Easy) -> None:
    tiny = make("mmdit")
    use = easy(tiny, conditioning="prompt")
    with torch.no_grad(), controlled(tiny.model, use, steps=4) as run:
        sizes = []
        for seed in range(4):
            announce(tiny.model, steps=4)
            tiny.run(tiny.given(seed=seed))
            sizes.append(run.report().bytes)
    assert sizes == [sizes[0], 2 * sizes[0], 2 * sizes[0], 2 * sizes[0]]
    assert run.memory.misses == 4


CHANGES: dict[str, Callable[[Any, dict[str, Any], Use], Any]] = {
    "condition written": lambda tiny, given, use: use.condition.add_(0.5),
    "adapter written": lambda tiny, given, use: next(use.adapter.parameters()).mul_(2),
    "adapter written past its version": lambda tiny, given, use: next(use.adapter.parameters()).data.mul_(2),
    "adapter weight": lambda tiny, given, use: setattr(
        use.adapter, "control", use.adapter.control.replace(lora_weight=0.5)
    ),
    "prompt": lambda tiny, given, use: given["pooled_projections"].add_(1),
    "new prompt": lambda tiny, given, use: given.update(pooled_projections=given["pooled_projections"] + 1),
    "base merged": lambda tiny, given, use: _first_key(tiny).data.mul_(1.5),
    "base written": lambda tiny, given, use: _first_key(tiny).mul_(1.5),
}


def _first_key(tiny: Any) -> Tensor:
    found: Tensor = next(x for name, x in tiny.model.named_parameters() if name.endswith("attn.to_k.weight"))
    return found


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("kind", ["flux", "mmdit"])
def test_what_is_kept_never_goes_stale(make: Any, easy: Easy, kind: str, change: str) -> None:
    tiny = make(kind)
    given, use, memory = tiny.given(), easy(tiny, conditioning="prompt"), Memory()
    weights = {name: x.clone() for name, x in tiny.model.state_dict().items()}
    try:
        with torch.no_grad():
            before = steered(tiny, given, use, memory=memory)
            CHANGES[change](tiny, given, use)
            after = steered(tiny, given, use, memory=memory)
            assert same(after, steered(tiny, given, use)), "as a run that starts with nothing kept"
            assert not same(after, before)
    finally:
        tiny.model.load_state_dict(weights)


def test_another_size_of_the_picture_asks_for_another_pass(tiny: Any, easy: Easy) -> None:
    use, memory = easy(tiny), Memory()
    steered(tiny, tiny.given(), use, memory=memory)
    wide = tiny.given(rows=4, columns=16)
    assert same(steered(tiny, wide, use, memory=memory), steered(tiny, wide, use))
    assert memory.misses == 2


@pytest.mark.parametrize("size", [(4, 4), (2, 12), (16, 6)])
def test_condition_of_any_size_and_aspect(tiny: Any, easy: Easy, size: tuple[int, int]) -> None:
    given = tiny.given()
    with torch.no_grad():
        plain = tiny.run(given)
    for positions in ("corner", "center"):
        use = easy(tiny, condition=tiny.condition(*size), positions=positions)
        found = steered(tiny, given, use)
        assert apart(found, plain) > 1e-3
        assert all(bool(torch.isfinite(x).all()) for x in found)


def pass_over(tiny: Any, uses: list[Use]) -> list[tuple[Tensor, Tensor]]:
    first = uses[0].condition
    walk = ConditionPass(
        tiny.model, [use.adapter for use in uses], [use.condition for use in uses],  # type: ignore[misc]
        grid=(4, 6), pooled=tiny.draw(len(first), 12), guidance=torch.ones(len(first)), dtype=torch.float32,
    )  # fmt: skip
    return [(step.k, step.v) for step in walk.steps()]


@torch.no_grad()
def test_conditions_are_isolated_and_the_batched_pass_equals_single_ones(tiny: Any, easy: Easy) -> None:
    one, two = easy(tiny, 1), easy(tiny, 2, positions="center")
    other = Use(two.adapter, two.condition + 1)
    both, changed = pass_over(tiny, [one, two]), pass_over(tiny, [one, other])
    alone = [pass_over(tiny, [use]) for use in (one, two)]
    for place, ((k, v), (k2, v2)) in enumerate(zip(both, changed, strict=True)):
        assert torch.equal(k[:1], k2[:1])
        assert torch.equal(v[:1], v2[:1])
        assert place == 0 or not torch.equal(v[1:], v2[1:])
        for number in (0, 1):
            for ours, single in zip((k, v), alone[number][place], strict=True):
                torch.testing.assert_close(ours[number : number + 1], single, atol=1e-5, rtol=1e-5)


def test_two_conditions_differ_from_one_and_from_each_other_swapped(tiny: Any, easy: Easy) -> None:
    given = tiny.given()
    one, two = easy(tiny, 1), easy(tiny, 2)
    found = steered(tiny, given, one, two)
    assert apart(found, steered(tiny, given, one)) > 1e-3
    swapped = [Use(one.adapter, two.condition), Use(two.adapter, one.condition)]
    assert apart(found, steered(tiny, given, *swapped)) > 1e-3, "each condition goes through its own adapter"
    assert apart(found, steered(tiny, given, two, one)) < 1e-4, "their order does not matter"


def test_outside_the_window_nothing_is_computed(tiny: Any, easy: Easy) -> None:
    given = tiny.given()
    with torch.no_grad():
        plain = tiny.run(given)
    whole = easy(tiny)
    use, memory = Use(whole.adapter, whole.condition, start=0.5, end=0.75), Memory(entries=0)
    found = steered(tiny, given, use, memory=memory)
    assert memory.misses == 1, "one pass, in the only step of the window"
    assert [torch.equal(a, b) for a, b in zip(found, plain, strict=True)] == [True, True, False, True]
    assert torch.equal(found[2], steered(tiny, given, whole)[2])
    with pytest.raises(Refused, match="number of steps"), torch.no_grad(), controlled(tiny.model, use):
        tiny.run(given)


def heard_first(tiny: Any, given: dict[str, Any], *uses: Use) -> Tensor:
    """What the picture's tokens hear in the first block."""
    seen: list[Tensor] = []
    attn = next(module for name, module in tiny.model.named_modules() if name.endswith("blocks.0.attn"))

    def keep(_module: Any, _args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = attn.register_forward_hook(keep)
    try:
        with torch.no_grad(), controlled(tiny.model, *uses):
            tiny.call(given)
    finally:
        handle.remove()
    return seen[0]


def test_region_leaves_the_rest_of_the_picture_alone(tiny: Any, easy: Easy) -> None:
    given = tiny.given()
    use = easy(tiny)
    half = torch.zeros(8, 12)
    half[:, :6] = 1
    region = Use(use.adapter, use.condition, region=half)
    plain, found = heard_first(tiny, given), heard_first(tiny, given, region)
    changed = (found - plain).abs().amax(dim=(0, 2)) > 1e-6
    picture = changed[-24:].reshape(4, 6) if len(changed) > 24 else changed.reshape(4, 6)
    assert bool(picture[:, :3].all())
    assert not bool(picture[:, 3:].any())
    assert not bool(changed[:-24].any()), "and the text does not carry it there"
    everywhere = Use(use.adapter, use.condition, region=torch.ones(3, 3))
    assert apart(steered(tiny, given, everywhere), steered(tiny, given, use)) < 1e-4
    words = Use(use.adapter, use.condition, region=half, region_text=1.0)
    assert apart(steered(tiny, given, words), steered(tiny, given, region)) > 1e-5


def test_prompt_mask_is_kept_beside_condition_and_region(make: Any, easy: Easy) -> None:
    tiny = make("mmdit")
    given = tiny.given(2)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    other = given | {"encoder_hidden_states": given["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][~mask.bool()] += 3.0  # what is masked must not be heard
    use = easy(tiny)
    for one in (
        use,
        Use(use.adapter, use.condition, 0.5),
        Use(use.adapter, use.condition, region=torch.eye(4)),
    ):
        ours = steered(tiny, given | {"encoder_attention_mask": mask}, one)
        assert apart(ours, steered(tiny, other | {"encoder_attention_mask": mask}, one)) < 1e-5
        assert apart(ours, steered(tiny, given, one)) > 1e-4


def test_chosen_blocks_alone_hear_it_and_the_pass_ends_with_the_last(make: Any, easy: Easy) -> None:
    tiny = make("flux")
    given = tiny.given()
    seen: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, module in tiny.model.named_modules()
        if name.endswith("attn.to_k")
    ]
    try:
        with torch.no_grad(), controlled(tiny.model, easy(tiny, blocks=(0, 2))) as run:
            tiny.call(given)
    finally:
        for handle in handles:
            handle.remove()
    assert run.report().uses[0]["acted"] == 2
    assert seen.count("single_transformer_blocks.0.attn.to_k") == 2
    assert seen.count("single_transformer_blocks.1.attn.to_k") == 1, (
        "the pass over the condition ended before"
    )


def reference(tiny: Any, given: dict[str, Any], use: Use, *, beside: bool = False) -> Tensor:
    """FLUX with one condition as one masked sequence [text, noise, condition], written for this test.

    `beside` puts the LoRA of the map out beside it, as an ordinary LoRA would stand: what the released weights are not.
    """
    from diffusers.models.embeddings import apply_rotary_emb

    model, adapter = tiny.model, use.adapter
    lora: dict[str, Tensor] = adapter.state_dict()
    latent = use.condition
    packed = torch.nn.functional.unfold(latent, 2, stride=2).transpose(1, 2)
    text = model.context_embedder(given["encoder_hidden_states"])
    noise, cond = model.x_embedder(given["hidden_states"]), model.x_embedder(packed)
    L, N, M = text.shape[1], noise.shape[1], cond.shape[1]
    time = torch.tensor([500.0])
    temb, still = (
        model.time_text_embed(t, given["guidance"] * 1000, given["pooled_projections"])
        for t in (time, time * 0)
    )
    rows, columns = latent.shape[2] // 2, latent.shape[3] // 2
    where = [(0.0, i * 4 / rows, j * 6 / columns) for i in range(rows) for j in range(columns)]
    ids = torch.cat([given["txt_ids"], given["img_ids"], torch.tensor(where)])
    rotary = model.pos_embed(ids)
    mask = torch.ones(L + N + M, L + N + M, dtype=torch.bool)
    mask[L + N :, : L + N] = False

    def attend(attn: Any, path: str, x: Tensor, words: Tensor | None) -> Tensor:
        def project(name: str) -> Tensor:
            low = x[:, -M:] @ lora[f"{path}.{name}.lora_A.weight"].T @ lora[f"{path}.{name}.lora_B.weight"].T
            out: Tensor = getattr(attn, name)(x)
            return torch.cat([out[:, :-M], out[:, -M:] + low], dim=1).unflatten(-1, (2, -1))

        q, k, v = attn.norm_q(project("to_q")), attn.norm_k(project("to_k")), project("to_v")
        if words is not None:
            q = torch.cat([attn.norm_added_q(attn.add_q_proj(words).unflatten(-1, (2, -1))), q], dim=1)
            k = torch.cat([attn.norm_added_k(attn.add_k_proj(words).unflatten(-1, (2, -1))), k], dim=1)
            v = torch.cat([attn.add_v_proj(words).unflatten(-1, (2, -1)), v], dim=1)
        q, k = (apply_rotary_emb(one, rotary, sequence_dim=1) for one in (q, k))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask, -1e20).softmax(-1)
        return torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)

    for i, block in enumerate(model.transformer_blocks):
        path = f"transformer_blocks.{i}.attn"
        inner, gate, shift, scale, gate_ff = block.norm1(noise, emb=temb)
        inner_c, gate_c, shift_c, scale_c, gate_ff_c = block.norm1(cond, emb=still)
        inner_t, gate_t, shift_t, scale_t, gate_ff_t = block.norm1_context(text, emb=temb)
        heard = attend(block.attn, path, torch.cat([inner, inner_c], dim=1), inner_t)
        out, out_c = block.attn.to_out[0](heard[:, L : L + N]), block.attn.to_out[0](heard[:, L + N :])
        low = heard[:, L + N :] if beside else out_c
        out_c = (
            out_c
            + low
            @ lora[f"{path}.to_out.0.post_lora_A.weight"].T
            @ lora[f"{path}.to_out.0.post_lora_B.weight"].T
        )
        noise, cond = noise + gate[:, None] * out, cond + gate_c[:, None] * out_c
        text = text + gate_t[:, None] * block.attn.to_add_out(heard[:, :L])
        noise = noise + gate_ff[:, None] * block.ff(
            block.norm2(noise) * (1 + scale[:, None]) + shift[:, None]
        )
        cond = cond + gate_ff_c[:, None] * block.ff(
            block.norm2(cond) * (1 + scale_c[:, None]) + shift_c[:, None]
        )
        text = text + gate_ff_t[:, None] * block.ff_context(
            block.norm2_context(text) * (1 + scale_t[:, None]) + shift_t[:, None]
        )
    joint = torch.cat([text, noise], dim=1)
    for i, block in enumerate(model.single_transformer_blocks):
        inner, gate = block.norm(joint, emb=temb)
        inner_c, gate_c = block.norm(cond, emb=still)
        whole = torch.cat([inner, inner_c], dim=1)
        heard = attend(block.attn, f"single_transformer_blocks.{i}.attn", whole, None)
        out = block.proj_out(torch.cat([heard, block.act_mlp(block.proj_mlp(whole))], dim=2))
        joint, cond = joint + gate[:, None] * out[:, : L + N], cond + gate_c[:, None] * out[:, L + N :]
    found: Tensor = model.proj_out(model.norm_out(joint[:, L:], temb))
    return found


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 12), (4, 6), (6, 4)])
def test_equals_one_masked_sequence(make: Any, easy: Easy, size: tuple[int, int]) -> None:
    tiny = make("flux")
    given = tiny.given()
    use = easy(tiny, condition=tiny.condition(*size), conditioning="prompt")
    with controlled(tiny.model, use):
        ours = tiny.call(given)
    theirs, size_of = reference(tiny, given, use), float(ours.abs().max())
    assert float((ours - theirs).abs().max()) < 1e-5 * max(1.0, size_of)
    assert float((ours - reference(tiny, given, use, beside=True)).abs().max()) > 1e-3


@torch.no_grad()
def test_a_condition_alone_is_what_the_transformer_makes_of_a_picture_alone(tiny: Any, easy: Easy) -> None:
    """Without text, at time 0 and with an empty prompt, the transformer's own keys and values are those of the pass."""
    use = easy(tiny, lora_weight=0.0)
    latent = use.condition
    given = tiny.given() | {
        "pooled_projections": torch.zeros(1, 12),
        "encoder_hidden_states": torch.zeros(1, 0, 16),
    }
    given["hidden_states"] = latent
    if "img_ids" in given:
        given["hidden_states"] = torch.nn.functional.unfold(latent, 2, stride=2).transpose(1, 2)
        given |= {"txt_ids": torch.zeros(0, 3), "guidance": torch.ones(1)}
    own: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(call: Attending) -> Tensor:
        own[call.path] = (call.k, call.v)
        return call.exact()

    with attention_seam(tiny.model, keep):
        tiny.call(given, 0.0)
    walk = ConditionPass(
        tiny.model, [use.adapter], [latent],  # type: ignore[list-item]
        grid=(4, 6), pooled=torch.zeros(1, 12), guidance=torch.ones(1), dtype=torch.float32,
    )  # fmt: skip
    steps = list(walk.steps())
    assert len(steps) == len(blocks_of(tiny.model))
    for step in steps:
        for ours, theirs in zip((step.k, step.v), own[step.place.layer], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_base_is_untouched_also_after_an_exception(tiny: Any, easy: Easy) -> None:
    model, given = tiny.model, tiny.given()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    held = {name: dict(module.__dict__) for name, module in model.named_modules()}
    hooks = {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    with torch.no_grad():
        plain = tiny.run(given)
    with contextlib.suppress(KeyboardInterrupt), torch.no_grad(), controlled(model, easy(tiny)):
        tiny.call(given)
        raise KeyboardInterrupt
    with pytest.raises(Refused, match="3 conditions for a batch of 2"), torch.no_grad():
        with controlled(model, easy(tiny, condition=tiny.condition(batch=3))):
            tiny.call(tiny.given(2))
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == held
    assert hooks == {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        assert same(tiny.run(given), plain)


def test_one_condition_for_each_sample_of_a_guided_batch(tiny: Any, easy: Easy) -> None:
    use = easy(tiny, condition=tiny.condition(batch=2), conditioning="prompt")
    given = tiny.given(4)
    found = steered(tiny, given, use)[0]
    ids = {name: x for name, x in given.items() if name.endswith("ids")}
    for sample in range(4):
        one = {name: x[sample : sample + 1] for name, x in given.items() if name not in ids} | ids
        alone = Use(use.adapter, use.condition[sample % 2][None])
        torch.testing.assert_close(found[sample][None], steered(tiny, one, alone)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [DeltaCache(), DeltaCache(mode="whole"), TaylorCache()])
def test_inside_accelerators_equal_steps_have_no_error(tiny: Any, easy: Easy, method: Any) -> None:
    given, use = tiny.given(), easy(tiny)
    with torch.no_grad(), controlled(tiny.model, use):
        exact = tiny.call(given)
        with accelerated(tiny.model, method, steps=8) as run:
            for step in range(8):
                announce(tiny.model, step=step)
                found = tiny.call(given)
                assert float((found - exact).abs().max()) < 2e-6 * max(1.0, float(exact.abs().max()))
    report = run.report()
    assert report.reused + report.forecast > 0


def test_who_listens_inside_sees_longer_calls_of_the_same_kind(tiny: Any, easy: Easy) -> None:
    given = tiny.given()

    def heard(*uses: Use) -> dict[str, Attending]:
        seen: dict[str, Attending] = {}

        def keep(call: Attending) -> Tensor:
            seen[call.path] = call
            return call.exact()

        with torch.no_grad(), controlled(tiny.model, *uses), attention_seam(tiny.model, keep):
            tiny.call(given)
        return seen

    plain, found = heard(), heard(easy(tiny), easy(tiny, 2))
    assert plain.keys() == found.keys()
    for path, call in found.items():
        own, more = plain[path], 0 if path.endswith("attn2") else 2 * 24
        assert (call.kind, call.query_text) == (own.kind, own.query_text)
        assert call.text == (own.text[0], own.text[1] + more)
        assert call.k.shape[2] == own.k.shape[2] + more
        assert call.mask is None, "nothing is masked at strength 1"


@pytest.mark.parametrize("kind", ["flux", "mmdit"])
def test_sparse_attention_thins_the_longer_calls_out(make: Any, easy: Easy, kind: str) -> None:
    tiny = make(kind)
    use = easy(tiny, condition=tiny.condition(32, 32))
    given = tiny.given(rows=32, columns=32)
    method = AdaSpa(min_tokens=64, measure=False)
    with torch.no_grad(), controlled(tiny.model, use), accelerated(tiny.model, method, steps=6) as run:
        for step in range(6):
            announce(tiny.model, step=step)
            tiny.call(given)
    report = run.report()
    assert report.sparse > 0
    assert {row["tokens"] for row in report.attention} == {5 + 256 + 256}


def test_beneath_a_cache_of_diffusers(make: Any, easy: Easy) -> None:
    from diffusers import FirstBlockCacheConfig

    tiny = copy.deepcopy(make("flux"))
    given, use = tiny.given(), easy(tiny)
    with torch.no_grad():
        exact = steered(tiny, given, use)[0]
        tiny.model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        try:
            with controlled(tiny.model, use) as run, tiny.model.cache_context("cond"):
                found = [tiny.call(given, 1000.0) for _ in range(3)]
            assert run.report().uses[0]["acted"] == 4 + 1 + 1, "the cache did skip the later blocks"
            assert all(float((x - exact).abs().max()) < 1e-5 for x in found)
            assert tiny.model.is_cache_enabled, "and it is on again"
        finally:
            tiny.model.disable_cache()


def test_training_reaches_its_own_weights_alone(tiny: Any) -> None:
    adapter = EasyControl(rank=2).build(tiny.model)
    tiny.model.requires_grad_(True)
    before = {name: x.clone() for name, x in tiny.model.state_dict().items()}
    use, given = Use(adapter, tiny.condition()), tiny.given()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    losses = []
    try:
        with frozen(tiny.model), controlled(tiny.model, use) as run:
            for _ in range(3):
                optimizer.zero_grad()
                loss = tiny.call(given).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        assert run.memory.bytes == 0, "nothing is kept while weights change"
        assert all(one.grad is None for one in tiny.model.parameters())
        assert all(one.requires_grad for one in tiny.model.parameters())
        assert (
            sum(float(one.grad.abs().sum()) > 0 for one in adapter.parameters() if one.grad is not None) > 4
        )
        assert losses[-1] < losses[0]
        assert all(torch.equal(x, before[name]) for name, x in tiny.model.state_dict().items())
    finally:
        tiny.model.requires_grad_(False)


def test_recomputed_blocks_are_refused(make: Any, easy: Easy) -> None:
    tiny = make("flux")
    tiny.model.enable_gradient_checkpointing()
    try:
        with pytest.raises(Refused, match="gradient_checkpointing"), controlled(tiny.model, easy(tiny)):
            tiny.call(tiny.given())
    finally:
        tiny.model.disable_gradient_checkpointing()


def test_beside_what_diffusers_does_to_a_model(make: Any, easy: Easy, tmp_path: Path) -> None:
    """Fused projections, layers kept in fp8, saving while attached, a LoRA of peft, its scale of one call."""
    from peft import LoraConfig

    for kind in ("flux", "mmdit"):
        tiny = copy.deepcopy(make(kind))
        given, use = tiny.given(), easy(tiny)
        exact = steered(tiny, given, use)
        with controlled(tiny.model, use):
            tiny.model.save_pretrained(tmp_path / kind)
        again = type(tiny.model).from_pretrained(tmp_path / kind)
        assert all(torch.equal(x, tiny.model.state_dict()[name]) for name, x in again.state_dict().items())
        with torch.no_grad():
            tiny.model.fuse_qkv_projections()
        assert apart(steered(tiny, given, use), exact) < 1e-5
        tiny.model.unfuse_qkv_projections()
        tiny.model.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
        styled = steered(tiny, given, use)
        assert apart(styled, exact) > 1e-3
        with torch.no_grad(), controlled(tiny.model, use) as run:
            tiny.call(given | {"joint_attention_kwargs": {"scale": 0.5}})
        assert "scale" in run.report().notes[0]
        tiny.model.unload_lora()
        assert apart(steered(tiny, given, use), exact) < 1e-5
        tiny.model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        light = steered(tiny, given, use)
        assert 0 < apart(light, exact) < 0.3 * max(float(x.abs().max()) for x in exact)


def test_offloading_by_blocks_is_refused_and_by_leaves_served(make: Any, easy: Easy) -> None:
    given = make("flux").given()
    for kind, refused in (("block_level", True), ("leaf_level", False)):
        tiny = copy.deepcopy(make("flux"))
        use = easy(tiny)
        exact = steered(tiny, given, use)
        about = {"num_blocks_per_group": 1} if refused else {}
        tiny.model.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **about)
        if refused:
            with pytest.raises(Refused, match="leaf_level"), controlled(tiny.model, use):
                pass
        else:
            assert same(steered(tiny, given, use), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_on_a_gpu_kept_anew_and_on_the_cpu_are_bit_equal(make: Any, easy: Easy, kind: torch.dtype) -> None:
    tiny = copy.deepcopy(make("flux"))
    given = {name: x.to("cuda", x.dtype if "ids" in name else kind) for name, x in tiny.given(2).items()}
    tiny.model.to("cuda", kind)
    uses = [easy(tiny), easy(tiny, 2, positions="rows")]
    time = torch.full((2,), 0.5, device="cuda", dtype=kind)
    found = []
    for memory in (Memory(), Memory(entries=0), Memory(place="cpu")):
        with torch.no_grad(), controlled(tiny.model, *uses, memory=memory):
            found.append([tiny.model(**given, timestep=time, return_dict=False)[0] for _ in range(3)])
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_compiled_blocks_and_other_backends_are_refused_in_words(make: Any, easy: Easy) -> None:
    tiny = copy.deepcopy(make("flux"))
    use = easy(tiny)
    tiny.model.transformer_blocks[0].compile()
    with pytest.raises(Refused, match="is compiled"), controlled(tiny.model, use):
        pass
    with (
        pytest.raises(Refused, match="compiled as a whole"),
        controlled(torch.compile(make("flux").model), use),
    ):
        pass


def test_fp8_store_is_half_of_bf16_and_near(tiny: Any, easy: Easy) -> None:
    given, use = tiny.given(), easy(tiny)
    exact, small = Memory(), Memory(storage="fp8")
    near, whole = steered(tiny, given, use, memory=small), steered(tiny, given, use, memory=exact)
    depth, width, tokens = len(blocks_of(tiny.model)), 24, 24
    assert exact.bytes == depth * 2 * tokens * width * 4
    assert small.bytes == depth * 2 * (tokens * width + 2 * 4), "one byte a value, one scale a head"
    with torch.no_grad():
        plain = tiny.run(given)
    assert 0 < apart(near, whole) < 0.25 * apart(whole, plain)
    assert same(near, steered(tiny, given, use, memory=Memory(storage="fp8", entries=0)))


def test_stored_pairs_come_back_as_they_were() -> None:
    k, v = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5) * 100
    kept = KeyValues({"a": (k, v), "b": (v, k)}, place="cpu")
    assert kept.layers == ("a", "b")
    for _ in range(2):
        assert all(torch.equal(x, y) for x, y in zip(kept.pair("b"), (v, k), strict=True))
        assert all(torch.equal(x, y) for x, y in zip(kept.pair("a"), (k, v), strict=True))
    small = KeyValues({"a": (k.bfloat16(), v.bfloat16())}, storage="fp8").pair("a")
    assert small[0].dtype == torch.bfloat16
    torch.testing.assert_close(small[1].float(), v, rtol=0.1, atol=2.0)


def test_beside_the_picture_and_behind_it(make: Any, easy: Easy) -> None:
    given = make("flux").given()
    made = {mode: easy(make("flux"), positions=mode, offset=8) for mode in ("corner", "rows", "frame")}
    found = [steered(make("flux"), given, use)[0] for use in made.values()]
    assert apart([found[0], found[1]], [found[1], found[2]]) > 1e-4
    adapter: Any = made["rows"].adapter
    assert adapter.positions((4, 6), (2, 2), torch.device("cpu")).tolist() == [
        [0, 8, 0],
        [0, 8, 1],
        [0, 9, 0],
        [0, 9, 1],
    ]
    adapter.control = adapter.control.replace(positions="center")
    assert adapter.positions((4, 4), (2, 2), torch.device("cpu"))[:, 1].tolist() == [0.5, 0.5, 2.5, 2.5]
    tall = make("flux").given(rows=20)
    with (
        torch.no_grad(),
        controlled(make("flux").model, easy(make("flux"), positions="rows", offset=8)) as run,
    ):
        make("flux").call(tall)
    assert "overlap" in run.report().notes[0]


def test_refusals_in_words(make: Any, easy: Easy) -> None:
    from diffusers import PixArtTransformer2DModel

    from dit.backbones.mmdit import MMDiT

    flux, sd3 = make("flux"), make("sd3")
    assert "use corner or center" in str(EasyControl(positions="rows").refuses(sd3.model))
    plain = MMDiT(width=24, heads=2, dual_depth=1, single_depth=0, context_dim=8, pooled_dim=8)
    assert "rope_axes" in str(EasyControl(positions="frame").refuses(plain))
    assert "there is no block 9" in str(EasyControl(blocks=(9,)).refuses(flux.model))
    pixart = PixArtTransformer2DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=4, cross_attention_dim=4
    )
    assert "FluxTransformer2DModel" in str(EasyControl().refuses(pixart))
    small: dict[str, Any] = {"width": 24, "heads": 2, "dual_depth": 1, "single_depth": 0, "context_dim": 8}
    assert "not by full attention" in str(EasyControl().refuses(MMDiT(**small, mixer="linear")))
    assert "router" in str(EasyControl().refuses(MMDiT(**small, experts="dynamic")))
    with pytest.raises(ValueError, match="blocks"):
        EasyControl(blocks=(-1,))
    use = easy(flux)
    for condition, words in (
        (None, "needs a condition"),
        ("edges.png", r"condition must be a tensor \[B, 4, H, W\], got str"),
        (torch.zeros(1, 3, 8, 8), r"got shape \(1, 3, 8, 8\)"),
        (torch.zeros(1, 4, 7, 8), "divide by 2"),
        (torch.full((1, 4, 8, 8), float("nan")), "no finite numbers"),
    ):
        with pytest.raises(Refused, match=words), controlled(flux.model, Use(use.adapter, condition)):
            pass
    with (
        pytest.raises(Refused, match="another transformer"),
        controlled(sd3.model, easy(make("mmdit-single"))),
    ):
        pass


def test_adapters_have_one_lora_for_each_projection(tiny: Any) -> None:
    adapter = EasyControl(rank=3).build(tiny.model)
    assert isinstance(adapter, EasyControlAdapter)
    paths = {name.removesuffix(".weight").rsplit(".", 1)[0] for name in adapter.state_dict()}
    modules = dict(tiny.model.named_modules())
    assert paths == {
        name for name in modules if ".attn.to_" in name and name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    }  # fmt: skip
    assert all(not x.any() for name, x in adapter.state_dict().items() if "lora_B" in name)


@pytest.mark.skipif(not (FIXTURES / "EasyControl").is_dir(), reason="the recorded runs are not here")
def test_recorded_runs_of_the_released_code_are_reproduced() -> None:
    from benchmarks.fidelity import HIT, compare

    report = compare(FIXTURES / "EasyControl", mid=True)
    assert report.problem == ""
    assert report.status == HIT
    assert len(report.rows) == 32


def test_converter_takes_other_configurations() -> None:
    from control.convert.easycontrol import EasyControlSystem
    from dit.convert.base import Case, LayoutError, load

    transformer = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 12}
    transformer |= {"num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 6}
    args = {
        "transformer": transformer | {"axes_dims_rope": [4, 4, 4]},
        "rank": 2,
        "cond_size": 48,
        "n_loras": 1,
    }
    found = EasyControlSystem("EasyControl")
    model = found.build(args, {"latent_height": 4, "latent_width": 10})
    state = found.to_official(model)
    assert "transformer_blocks.0.attn.processor.proj_loras.0.up.weight" in state
    load(model, found.to_ours(state, model), "EasyControl")
    given = {
        "hidden_states": torch.randn(1, 10, 16), "cond_hidden_states": torch.randn(1, 9, 16), "timestep": torch.ones(1),
        "encoder_hidden_states": torch.randn(1, 3, 8), "pooled_projections": torch.randn(1, 6),
    }  # fmt: skip
    case = found.complete([Case("case0", given, {"sample": torch.zeros(1, 10, 16)})])[0]
    with torch.no_grad():
        assert found.run(model, case.inputs)["sample"].shape == (1, 10, 16)
    with pytest.raises(LayoutError, match="cond_hidden_states"):
        found.run(model, {"hidden_states": given["hidden_states"]})
    with pytest.raises(LayoutError, match="conditions of 9"):
        found.run(model, given | {"cond_hidden_states": torch.randn(1, 8, 16)})
    with pytest.raises(LayoutError, match="n_loras"):
        found.build({"transformer": transformer, "rank": 2, "cond_size": 48}, {})
