"""A method that can have no effect is found out when the first step is over: the other steps are not spent."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from acceleration import (
    Accelerator,
    AdaSpa,
    DeltaCache,
    GuidanceSkip,
    StepForecast,
    TaylorCache,
    TokenMerge,
    Untouched,
    XAttention,
    accelerated,
)
from dit.backbones.mmdit import MMDiT

STEPS = 8


def mmdit() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = MMDiT(
        sample_size=8, in_channels=4, patch_size=1, width=16, heads=4, dual_depth=1, single_depth=1, context_dim=12,
        pooled_dim=0,
    ).eval()  # fmt: skip
    return net, {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 12)}


@torch.no_grad()
def run(
    net: Any, given: dict[str, Tensor], *methods: Accelerator, branches: int = 1, steps: int = STEPS
) -> None:
    with accelerated(net, *methods, steps=steps):
        for step in range(steps):
            for _ in range(branches):
                net(**given, timestep=torch.full((2,), 900.0 - 100 * step))


def spent(net: Any, given: dict[str, Tensor], *methods: Accelerator, branches: int = 1) -> tuple[int, str]:
    """Return how many forwards a run makes before it is refused, and in what words."""
    forwards: list[int] = []
    counting = net.register_forward_hook(lambda *_: forwards.append(1))
    try:
        with pytest.raises(Untouched) as told:
            run(net, given, *methods, branches=branches)
    finally:
        counting.remove()
    return len(forwards), str(told.value)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (AdaSpa(), "adaspa had no effect on MMDiT: it has 71 tokens, and min_tokens is 8192"),
        (XAttention(), "xattention had no effect on MMDiT: it has 71 tokens, and min_tokens is 8192"),
        (TokenMerge(), "token-merge had no effect on MMDiT: it has 64 tokens, and min_tokens is 256"),
        (GuidanceSkip(), "guidance-skip had no effect on MMDiT: no unconditional branch was seen"),
        (StepForecast(mask="1010"), "its mask is of 4 steps, the run has 8"),
    ],
)
def test_what_the_first_step_shows_ends_the_run(method: Accelerator, words: str) -> None:
    net, given = mmdit()
    before = {name: set(one.__dict__) for name, one in net.named_modules()}
    count, told = spent(net, given, method)
    assert words in told
    assert count == 1
    assert {name: set(one.__dict__) for name, one in net.named_modules()} == before
    with torch.no_grad():
        assert torch.isfinite(net(**given, timestep=torch.full((2,), 900.0)).sample).all()


def test_beside_a_method_with_effect(toy: Any) -> None:
    net, given = mmdit()
    assert spent(net, given, DeltaCache(), AdaSpa())[0] == 1


def test_the_first_step_is_whole_before_it_is_judged() -> None:
    """Guidance makes two calls a step: both belong to what is looked at."""
    net, given = mmdit()
    assert spent(net, given, AdaSpa(), branches=2)[0] == 2


@pytest.mark.parametrize("method", [DeltaCache(), TaylorCache()])
def test_blocks_that_are_never_called(toy: Any, method: Accelerator) -> None:
    toy.model.order, seen = [], []
    toy.model.register_forward_hook(lambda *_: seen.append(1))
    with (
        pytest.raises(Untouched, match="none of its blocks was called"),
        accelerated(toy.model, method, steps=10),
    ):
        toy.run(10)
    assert len(seen) == 1


@pytest.mark.parametrize("method", [DeltaCache(), TaylorCache(), DeltaCache(gate="first-block")])
def test_blocks_of_which_none_can_be_left_out(method: Accelerator) -> None:
    torch.manual_seed(0)
    net: Any = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    ).eval()  # fmt: skip
    given = {"sample": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 16)}
    count, told = spent(net, given, method)
    assert "CrossAttnDownBlock2D returns tuple, and only tensors can be reused" in told
    assert count == 1
    with torch.no_grad(), accelerated(net, StepForecast(), steps=STEPS) as found:  # which needs no blocks
        for step in range(STEPS):
            net(**given, timestep=torch.full((2,), 900.0 - 100 * step))
    assert found.report().forecast > 0


class Timeless(nn.Module):
    """A network whose calls do not tell when they are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@pytest.mark.parametrize("method", [DeltaCache(), TaylorCache(), StepForecast(), GuidanceSkip()])
def test_steps_that_cannot_be_told(method: Accelerator) -> None:
    net, seen = Timeless(), []
    net.register_forward_hook(lambda *_: seen.append(1))

    def sampled() -> None:
        with torch.no_grad(), accelerated(net, method, steps=STEPS):
            for _ in range(STEPS):
                net(torch.ones(1, 2, 4))

    with pytest.raises(Untouched, match="step could not be told"):
        sampled()
    assert len(seen) == 1


def test_a_run_of_one_step_is_judged_at_its_end() -> None:
    with pytest.raises(Untouched, match="min_tokens is 8192"):
        run(*mmdit(), AdaSpa(), steps=1)


def test_a_pass_that_writes_a_cache_is_no_first_step(toy: Any) -> None:
    """A reference picture is read in a pass of its own, without guidance, before the first step."""
    model, plain = toy.model, type(toy.model).forward

    class Caching(type(model)):  # type: ignore[misc]
        def forward(
            self, hidden_states: Tensor, timestep: Any, encoder_hidden_states: Tensor, kv_cache: Any = None,
            kv_cache_mode: str = "cached",
        ) -> Tensor:  # fmt: skip
            result: Tensor = plain(self, hidden_states + encoder_hidden_states, timestep)
            return result

    model.__class__ = Caching
    cond, free = torch.ones(1, 1, 8), torch.zeros(1, 1, 8)
    with torch.no_grad(), accelerated(model, GuidanceSkip(), steps=STEPS) as found:
        model(toy.x, 0.0, cond, kv_cache=object(), kv_cache_mode="extract")
        for step in range(STEPS):
            for text in (cond, free):
                model(toy.x, 1 - step / 10, text, kv_cache=object(), kv_cache_mode="cached")
    assert any(cell.get("unconditional") == "reused" for cell in found.report().cells)
