from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acceleration import DeltaCache, accelerated
from dit.seams import announce
from dit.spec import parse


def schedule(method: DeltaCache, steps: int | None, count: int, blocks: int = 20) -> str:
    """Write a run as letters: C full, r rear, f front, w anything else reused."""
    letters = ""
    for step in range(count):
        span = method.span(step, steps, blocks)
        letter = (
            "r"
            if span.start and span.stop == blocks
            else "f"
            if not span.start and span.stop < blocks
            else "w"
        )
        letters += letter if method.reuses(step, steps) else "C"
    return letters


def states(run: Any) -> list[str]:
    return [cell["states"] for cell in run.report().cells]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "CCCrCrCrCrCrCfCfCfCC"),  # the paper's boundary: 12 of 20 steps
        ({"interval": 3}, "CCCrrCrrCrrCCfCffCfC"),  # the switch step is full
        ({"interval": 4, "mode": "rear", "warmup": 1}, "CCrrrCrrrCrrrCrrrCrC"),
        ({"mode": "front", "final_full": 3}, "CCCfCfCfCfCfCfCfCCCC"),
        ({"mode": "whole", "warmup": 18}, "C" * 20),
        ({"first_block": 3, "last_block": 7, "boundary": 0.5}, "CCCwCwCwCwCwCwCwCwCC"),
        ({"interval": 1}, "C" * 20),
        ({"boundary": 0.0}, "CCCfCfCfCfCfCfCfCfCC"),
        ({"boundary": 1.0}, "CCCrCrCrCrCrCrCrCrCC"),
    ],
)
def test_the_schedule_is_the_specified_one(settings: Any, expected: str) -> None:
    assert schedule(DeltaCache(**settings), 20, 20) == expected


def test_without_the_number_of_steps_the_range_never_changes() -> None:
    assert schedule(DeltaCache(), None, 8) == "CCCrCrCr"


@pytest.mark.parametrize(
    ("settings", "span"),
    [
        ({}, range(7, 28)),
        ({"mode": "front"}, range(21)),
        ({"mode": "whole"}, range(28)),
        ({"cached_fraction": 0.05, "mode": "front"}, range(1)),
        ({"first_block": 5}, range(5, 28)),
        ({"last_block": 5}, range(6)),
    ],
)
def test_the_range_is_the_specified_one(settings: Any, span: range) -> None:
    assert DeltaCache(**settings).span(0, 20, 28) == span


def test_the_predicted_speedup_nears_the_published_one() -> None:
    many = 2000
    assert DeltaCache().predicted_speedup(many, 28) == pytest.approx(1.60, abs=0.01)
    assert DeltaCache(cached_fraction=6 / 28).predicted_speedup(many, 28) == pytest.approx(1.12, abs=0.01)
    assert DeltaCache(interval=3).predicted_speedup(many, 28) == pytest.approx(2.0, abs=0.01)
    assert DeltaCache(interval=1).predicted_speedup(20, 28) == 1.0


def test_few_steps_get_careful_settings() -> None:
    assert DeltaCache.suited(4) == DeltaCache(mode="rear", cached_fraction=0.2, warmup=1)
    assert DeltaCache.suited(28) == DeltaCache()


def test_a_range_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match=r"last_block must be at least first_block \(4\), got 3"):
        parse(DeltaCache.__mro__[1], "delta-cache:first_block=4,last_block=3")


def test_a_shortened_call_adds_what_the_range_added_to_the_current_latent(toy: Any) -> None:
    """Against the plain formula: block by block, with the offset of the last full step."""
    with torch.no_grad():
        with accelerated(toy.model, DeltaCache(mode="rear", cached_fraction=0.5), steps=10):
            found = toy.run()
        for full, short in ((2, 3), (4, 5), (6, 7)):
            reached = []
            for step in (full, short):
                x = toy.x * (1 + step / 9)
                for block in toy.model.blocks[:3]:
                    x = block(x, temb=torch.tensor(1 - step / 10))
                reached.append(x)
            expected = reached[1] + (found[full] - reached[0])
            assert torch.allclose(found[short], expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["stage", "rear", "front", "whole"])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_injected_residuals_count_once(toy: Any, mode: str, inplace: bool, guard: Any, dtype: Any) -> None:
    toy.model.to(dtype)
    x, residuals = toy.x.to(dtype), [torch.randn(1, 5, 8, dtype=dtype) for _ in range(6)]
    tolerance = 1e-14 if dtype == torch.float64 else 2e-2
    with guard(), accelerated(toy.model, DeltaCache(mode=mode, interval=3), steps=12) as run:
        exact = toy.model(x, 1.0, residuals=residuals, inplace=inplace)
        for step in range(12):
            announce(toy.model, step=step)
            output = toy.model(x, 1.0, residuals=residuals, inplace=inplace)
            assert (output - exact).norm() / exact.norm() < tolerance
    assert run.report().reused > 0


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_blocks_that_write_into_their_input_are_exact_too(toy: Any, guard: Any) -> None:
    for block in toy.model.blocks[::2]:
        block.inplace = True
    with guard(), accelerated(toy.model, DeltaCache(mode="rear"), steps=8) as run:
        exact = toy.model(toy.x, 1.0)
        for step in range(8):
            announce(toy.model, step=step)
            assert torch.allclose(toy.model(toy.x, 1.0), exact, atol=1e-6)
    assert run.report().reused > 0


def test_a_context_of_the_streams_shape_is_no_stream(toy: Any) -> None:
    class Hints(nn.Module):
        """Returns something new of the shape of its input, which the next block never gets (as in VACE)."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden_states: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
            control = control + self.linear(hidden_states)
            hidden_states = self.linear(control)
            return hidden_states, control

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Hints() for _ in range(4)])

        def forward(self, hidden_states: Tensor, timestep: float) -> Tensor:
            control, total = hidden_states * 1.0, hidden_states
            for block in self.blocks:
                hint, control = block(hidden_states, control)
                total = total + hint
            return total

    net = Net()
    with torch.no_grad():
        plain = [net(toy.x * (1 + step), 1 - step / 6) for step in range(6)]
        with accelerated(net, DeltaCache(interval=1)) as neutral:
            same = [net(toy.x * (1 + step), 1 - step / 6) for step in range(6)]
    assert neutral.report().reused == 0
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))

    def sampled() -> None:
        with torch.no_grad(), accelerated(net, DeltaCache(mode="whole"), steps=6):
            for step in range(6):
                net(toy.x * (1 + step), 1 - step / 6)

    with pytest.raises(
        RuntimeError, match="what Hints returns as hidden_states does not reach the next block"
    ):
        sampled()


def test_a_stream_that_only_some_blocks_write_is_carried_on(toy: Any) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            encoder_hidden_states = encoder_hidden_states + self.linear(hidden_states).mean(1, keepdim=True)
            hidden_states = hidden_states + self.linear(encoder_hidden_states).mean(1, keepdim=True)
            return encoder_hidden_states, hidden_states

    class Reads(Writes):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:  # type: ignore[override]
            return hidden_states + self.linear(encoder_hidden_states).mean(1, keepdim=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Writes(), Reads(), Writes(), Reads()])

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: float) -> Tensor:
            x, y = hidden_states, encoder_hidden_states
            for block in self.blocks:
                if isinstance(block, Reads):
                    x = block(x, y)
                else:
                    y, x = block(x, y)
            return torch.cat([x, y], dim=1)

    net, text = Net(), torch.randn(1, 3, 8)
    with torch.no_grad(), accelerated(net, DeltaCache(mode="whole"), steps=8) as run:
        exact = net(toy.x, text, 1.0)
        for step in range(8):
            announce(net, step=step)
            assert torch.allclose(net(toy.x, text, 1.0), exact, atol=1e-5)
    assert "RRRR" in states(run)


def test_a_model_without_time_is_served_only_with_both_counts(toy: Any) -> None:
    class Timeless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = toy.model.blocks

        def forward(self, x: Tensor) -> Tensor:
            for block in self.core:
                x = block(x, temb=torch.zeros(1))
            return x

    net = Timeless()

    def sampled(**counts: int) -> list[str]:
        with torch.no_grad(), accelerated(net, DeltaCache(mode="whole", warmup=1), **counts) as run:
            for step in range(6):
                net(toy.x * step)
                net(toy.x * -step)
        return states(run)

    with pytest.raises(RuntimeError, match="give steps= and calls_per_step="):
        sampled(steps=6)
    assert "".join(one[0] for one in sampled(steps=6, calls_per_step=2)) == "CCCCRRCCRRCC"


def test_one_warm_up_step_is_enough(toy: Any) -> None:
    with accelerated(toy.model, DeltaCache.suited(4), steps=4) as run:
        toy.run(4)
    assert states(run) == ["CCCCCC", "CCCCCC", "CCCCCR", "CCCCCC"]


def test_blocks_of_a_side_path_do_not_shift_the_range(toy: Any) -> None:
    toy.model.order = [0, 1, 2, 3]  # two blocks exist and are never called
    with accelerated(toy.model, DeltaCache(mode="rear", cached_fraction=0.5), steps=10) as run:
        toy.run()
    assert states(run)[3] == "CCRR"


def test_blocks_in_another_order_are_computed(toy: Any) -> None:
    with (
        torch.no_grad(),
        accelerated(toy.model, DeltaCache(mode="whole", interval=4, warmup=1), steps=10) as run,
    ):
        for step in range(10):
            toy.model.order = [0, 1, 2, 3, 4, 5] if step != 3 else [0, 2, 1, 3, 4, 5]
            toy.model(toy.x, 1 - step / 10)
    assert states(run)[1:6] == ["CCCCCC", "RRRRRR", "RCCRRR", "CCCCCC", "CCCCCC"]
    assert "the order of the blocks changed" in " ".join(run.report().notes)


def test_a_branch_that_was_off_for_long_is_computed_first(toy: Any) -> None:
    with torch.no_grad(), accelerated(toy.model, DeltaCache(mode="whole"), steps=14) as run:
        for step in range(14):
            for branch in ("cond", "uncond"):
                if branch == "cond" or step not in (4, 5, 6):
                    announce(toy.model, step=step, branch=branch)
                    toy.model(toy.x, 1.0)
    letters = {
        branch: "".join(cell["states"][0] for cell in run.report().cells if cell["branch"] == branch)
        for branch in ("cond", "uncond")
    }
    assert letters["cond"] == "CCCRCRCRCRCRCC"
    assert letters["uncond"] == "CCCR" + "CCRCRCC"  # steps 7 to 13; at step 7 what it knows is of step 2


def test_a_branch_that_missed_the_switch_does_not_reuse_the_other_range(toy: Any) -> None:
    with torch.no_grad(), accelerated(toy.model, DeltaCache(interval=4), steps=20) as run:
        for step in range(20):
            if step != 12:
                announce(toy.model, step=step)
                toy.model(toy.x, 1.0)
    found = {cell["step"]: cell["states"] for cell in run.report().cells}
    assert found[11] == "CCRRRR"
    assert found[13] == "CCCCCC"
    assert found[15] == "RRRRCC"


def test_a_size_that_changes_inside_is_computed(toy: Any) -> None:
    with (
        torch.no_grad(),
        accelerated(toy.model, DeltaCache(mode="whole", interval=3, warmup=1), steps=8) as run,
    ):
        for step in range(8):
            toy.model.tokens = 3 if step == 3 else None
            assert toy.model(toy.x, 1 - step / 8).shape[1] == (toy.model.tokens or 5)
    assert states(run)[1:5] == ["CCCCCC", "RRRRRR", "CCCCCC", "CCCCCC"]


def test_predictor_and_corrector_reuse_each_their_own(toy: Any) -> None:
    latents = (toy.x, toy.x * 3)
    with (
        torch.no_grad(),
        accelerated(toy.model, DeltaCache(mode="whole", interval=4, warmup=1), steps=9) as run,
    ):
        outputs = {}
        for step in range(9):
            for evaluation, x in enumerate(latents):
                announce(toy.model, step=step, branch="cond")
                outputs[step, evaluation] = toy.model(x, 0.5 - evaluation / 100)
    shortened = [(cell["step"], cell["evaluation"]) for cell in run.report().cells if "R" in cell["states"]]
    assert shortened == [(2, 0), (3, 0), (4, 0), (6, 0), (7, 0)]  # each corrector after them is full
    for step, evaluation in shortened:
        assert torch.allclose(outputs[step, evaluation], outputs[0, evaluation], atol=1e-5)


def test_unknown_steps_are_remarked(toy: Any) -> None:
    with accelerated(toy.model, DeltaCache()) as run:
        toy.run()
    assert ["give steps=" in note for note in run.report().notes] == [True]


def test_gradients_flow_and_recomputing_is_left_alone(toy: Any) -> None:
    x = toy.x.clone().requires_grad_()
    with accelerated(toy.model, DeltaCache(mode="whole"), steps=6) as run:
        for step in range(6):
            output = toy.model(x, 1 - step / 6)
            (gradient,) = torch.autograd.grad(output.sum(), x)
            if step == 3:
                assert torch.equal(gradient, torch.ones_like(x))  # what is reused is a constant
    assert run.report().reused > 0

    toy.model.gradient_checkpointing = True
    with accelerated(toy.model, DeltaCache(mode="whole"), steps=6) as run:
        for step in range(6):
            toy.model(x, 1 - step / 6)
    assert run.report().reused == 0


def test_half_of_a_group_offloading_with_streams_is_refused(toy: Any) -> None:
    class Registry:
        hooks = {"lazy_prefetch_group_offloading": object()}

    toy.model.blocks[0].__dict__["_diffusers_hook"] = Registry()
    assert "group offloading with streams" in (DeltaCache().refuses(toy.model) or "")
