from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit.seams import (
    Clock,
    Output,
    announce,
    around_blocks,
    around_calls,
    blocks_of,
    fingerprint,
    match,
    named_contexts,
    observed,
    patched,
    prompt_of,
    tensor_arguments,
    timestep_of,
)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        return hidden_states + self.linear(hidden_states)


class Dual(Inner):
    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden_states = hidden_states + self.linear(encoder_hidden_states)
        return encoder_hidden_states, hidden_states


class Net(nn.Module):
    """Two stacks that take turns, as in Latte, and a refiner before them."""

    def __init__(self) -> None:
        super().__init__()
        self.context_refiner = nn.ModuleList([Inner()])
        self.temporal = nn.ModuleList([Inner(), Inner()])
        self.spatial = nn.ModuleList([Inner(), Inner()])
        self.heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, hidden_states: Tensor, timestep: Tensor | float = 0.0) -> Tensor:
        hidden_states = self.context_refiner[0](hidden_states)
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            hidden_states = temporal(spatial(hidden_states))
        return hidden_states


# patched ---------------------------------------------------------------------------------------------------------


def test_patched_restores_absence_and_presence_also_after_an_exception() -> None:
    module = nn.Linear(1, 1)
    keys = list(module.__dict__)

    def failing() -> None:
        with patched(module, "forward", len):
            assert module.forward is len
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert list(module.__dict__) == keys
    module.__dict__["forward"] = max
    with patched(module, "forward", len), patched(module, "forward", min):
        assert module.forward is min
    assert module.__dict__["forward"] is max


def test_patched_says_so_when_its_value_was_replaced() -> None:
    module = nn.Linear(1, 1)

    def replaced() -> None:
        with patched(module, "forward", len):
            module.__dict__["forward"] = max

    with pytest.raises(RuntimeError, match=r"Linear\.forward was replaced inside"):
        replaced()
    assert "forward" not in module.__dict__


# blocks ----------------------------------------------------------------------------------------------------------


def test_blocks_are_the_stacks_of_the_main_path() -> None:
    assert [block.path for block in blocks_of(Net())] == [
        "temporal.0",
        "temporal.1",
        "spatial.0",
        "spatial.1",
    ]


def test_blocks_are_found_inside_a_wrapper() -> None:
    assert [block.path for block in blocks_of(nn.ModuleDict({"core": Net()}))][:1] == ["core.temporal.0"]


def test_no_blocks_is_said_in_words() -> None:
    found = blocks_of(nn.Sequential(nn.Linear(1, 1)))
    assert len(found) == 0
    assert found.reason == "Sequential has no stack of repeated blocks"


def test_the_order_of_execution_is_observed_not_assumed() -> None:
    net = Net()
    with observed(net) as visits:
        net(torch.zeros(1, 3, 4))
    assert [visit.path for visit in visits] == ["spatial.0", "temporal.0", "spatial.1", "temporal.1"]
    assert visits[0].streams == Output(Tensor, ("hidden_states",))
    assert "forward" not in net.spatial[0].__dict__


def test_a_block_is_left_out_by_not_calling_it() -> None:
    net, x = Net(), torch.randn(1, 3, 4)
    with around_blocks(blocks_of(net), lambda block, inner, args, kwargs: args[0]):
        assert torch.equal(net(x), net.context_refiner[0](x))
    assert not torch.equal(net(x), net.context_refiner[0](x))


def test_a_compiled_block_is_held_from_outside_its_graph() -> None:
    net, x, seen = Net(), torch.randn(1, 3, 4), []
    exact = net(x)
    for block in blocks_of(net):
        block.module.compile(backend="eager", fullgraph=True)

    def around(block: Any, inner: Any, args: Any, kwargs: Any) -> Any:
        seen.append((block.path, torch.compiler.is_compiling()))
        return inner(*args, **kwargs)

    with around_blocks(blocks_of(net), around):
        assert torch.allclose(net(x), exact)
    assert len(seen) == 4
    assert not any(compiling for _, compiling in seen)


def test_calls_are_seen_with_named_arguments_and_their_failure() -> None:
    net, log = Net(), []
    with around_calls(net, lambda given: log.append(sorted(given)), log.append):
        net(torch.zeros(1, 3, 4), timestep=1.0)
        with pytest.raises(RuntimeError):
            net(torch.zeros(1, 3, 5))
    assert log == [["hidden_states", "timestep"], False, ["hidden_states"], True]
    assert not net._forward_hooks
    assert not net._forward_pre_hooks
    assert not net._forward_hooks_always_called


# streams ---------------------------------------------------------------------------------------------------------


def test_arguments_are_named_in_the_order_of_the_signature() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    found = tensor_arguments(Dual(), (x,), {"temb": None, "encoder_hidden_states": y})
    assert list(found) == ["hidden_states", "encoder_hidden_states"]


def test_the_source_tells_streams_of_equal_shape_apart() -> None:
    x, y, t = torch.zeros(1, 3, 4), torch.ones(1, 3, 4), torch.zeros(1, 4)
    given = {"hidden_states": x, "encoder_hidden_states": y, "temb": t}
    assert match(Dual(), given, (y, x)) == Output(tuple, ("encoder_hidden_states", "hidden_states"))
    assert match(Dual(), given, [None, x]) == Output(list, (None, "hidden_states"))


def unreadable(code: str) -> nn.Module:
    """Make a block whose source nobody can read."""
    space: dict[str, Any] = {"nn": nn}
    exec(f"class Odd(nn.Module):\n    def forward(self, a, b):\n        return {code}", space)
    return space["Odd"]()  # type: ignore[no-any-return]


def test_without_source_the_shapes_decide() -> None:
    a, b = torch.zeros(1, 3, 4), torch.zeros(1, 5, 4)
    assert match(unreadable("b, a"), {"a": a, "b": b}, (b, a)) == Output(tuple, ("b", "a"))
    assert match(unreadable("a"), {"a": a, "b": a}, a) == Output(Tensor, ("a",))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ((torch.zeros(1, 3), torch.zeros(1, 3)), "Odd is ambiguous: 2 outputs fit several of its inputs"),
        (torch.zeros(2, 3), r"a tensor of shape \(2, 3\) that none of its inputs has"),
        ((torch.zeros(1, 3), {"k": 1}), "Odd returns dict, and only tensors can be reused"),
        (None, "Odd returns no tensor"),
    ],
)
def test_what_is_no_set_of_streams_is_said_in_words(output: Any, words: str) -> None:
    x, y = torch.zeros(1, 3), torch.ones(1, 3)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(match(unreadable("b, a"), {"a": x, "b": y}, output))


def test_an_output_is_split_and_joined_in_its_own_form() -> None:
    form, x, y = Output(tuple, ("b", None, "a")), torch.zeros(1), torch.ones(1)
    assert form.split((y, None, x)) == {"b": y, "a": x}
    assert form.join({"a": x, "b": y, "c": x}) == (y, None, x)
    assert Output(Tensor, ("a",)).join({"a": x}) is x


# clock -----------------------------------------------------------------------------------------------------------


def told(clock: Clock, *times: float | None, prompt: Any = None) -> list[tuple[int, int, str, int]]:
    moments = [clock.tick(time, prompt) for time in times]
    return [(one.run, one.step, one.branch, one.evaluation) for one in moments]


@pytest.mark.parametrize("times", [(999, 500, 1), (0.0, 0.5, 0.9)], ids=["falling", "rising"])
def test_a_change_of_the_timestep_is_a_step(times: tuple[float, ...]) -> None:
    clock = Clock()
    assert told(clock, *times) == [(0, 0, "call 1", 0), (0, 1, "call 1", 0), (0, 2, "call 1", 0)]
    assert told(clock, *times) == [(1, 0, "call 1", 0), (1, 1, "call 1", 0), (1, 2, "call 1", 0)]


def test_a_run_cut_short_ends_when_the_time_turns_back() -> None:
    clock = Clock()
    assert [step for _, step, _, _ in told(clock, 9, 8, 9, 8, 7)] == [0, 1, 0, 1, 2]
    assert clock.run == 1


def test_branches_are_the_places_of_calls_in_a_step() -> None:
    assert [(step, branch) for _, step, branch, _ in told(Clock(), 9, 9, 8, 8)] == [
        (0, "call 1"), (0, "call 2"), (1, "call 1"), (1, "call 2"),
    ]  # fmt: skip


def test_calls_per_step_tells_evaluations_from_branches() -> None:
    found = told(Clock(calls_per_step=2), 9, 9, 8, 8, 8, 8)
    assert [(branch, evaluation) for _, _, branch, evaluation in found[2:]] == [
        ("call 1", 0), ("call 2", 0), ("call 1", 1), ("call 2", 1),
    ]  # fmt: skip


def test_a_branch_is_known_by_its_prompt_wherever_it_is_called() -> None:
    clock, free, cond = Clock(), torch.zeros(1), torch.ones(1)
    for time in (9, 8):
        assert [clock.tick(time, one).branch for one in (free, cond)] == ["call 1", "call 2"]
    assert clock.tick(7, cond).branch == "call 2"  # guidance is off: the first call is another branch now
    assert clock.tick(6, free).branch == "call 1"
    assert clock.tick(6, torch.zeros(1)).branch == "call 3"


def test_prompts_made_anew_at_every_call_go_by_place() -> None:
    clock = Clock()
    for time in (9, 8, 7):
        for place in (1, 2):
            prompt = torch.zeros(1)
            assert clock.tick(time, prompt).branch == f"call {place}"
            del prompt
            gc.collect()


def test_two_evaluations_are_two_trajectories_and_the_corrector_knows_its_predictor() -> None:
    clock, prompt = Clock(), torch.zeros(1)
    moments = [clock.tick(time, prompt) for time in (9, 8, 8, 7, 7, 6)]
    assert [(one.step, one.evaluation) for one in moments] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    assert [one.corrects for one in moments] == [None, None, None, (1, 1), None, (2, 1)]


def test_an_announcement_wins_over_everything() -> None:
    clock = Clock()
    clock.begin(20)
    clock.announce(4, "cond")
    first = clock.tick(9)
    clock.announce(4, "cond")
    second = clock.tick(8)
    assert (first.step, first.branch, first.evaluation, first.corrects) == (4, "cond", 0, None)
    assert (second.step, second.evaluation, second.corrects) == (4, 1, (4, 0))
    assert clock.tick(8).step == 4  # not announced, same time: the same step
    assert clock.tick(7).step == 5
    clock.announce(0)
    assert (clock.tick(7).step, clock.run, clock.steps) == (0, 1, 20)


def test_an_announced_call_does_not_wait_for_the_device() -> None:
    clock = Clock()
    clock.announce(0)
    clock.tick(lambda: pytest.fail("the timestep was read"))


def test_without_time_the_step_is_unknown_unless_both_counts_are_given() -> None:
    assert not Clock().tick(None).known
    clock = Clock(steps=2, calls_per_step=2)
    assert [(one[0], one[1], one[2]) for one in told(clock, *[None] * 5)] == [
        (0, 0, "call 1"), (0, 0, "call 2"), (0, 1, "call 1"), (0, 1, "call 2"), (1, 0, "call 1"),
    ]  # fmt: skip


def test_a_time_that_never_changes_is_not_taken_for_guidance() -> None:
    clock = Clock()
    assert [clock.tick(5.0).known for _ in range(14)] == [True] * 12 + [False] * 2


def test_cache_context_names_the_branch() -> None:
    class Cached(Net):
        name = ""

        @contextmanager
        def cache_context(self, name: str, **about: Any) -> Iterator[None]:
            self.name, before = name, self.name
            yield
            self.name = before

    net, clock = Cached(), Clock()
    with named_contexts(net, clock):
        with net.cache_context("uncond", step_index=3, num_inference_steps=9):
            assert net.name == "uncond"  # diffusers' own still happens
            moment = clock.tick(1.0)
        assert (moment.branch, moment.step, clock.steps) == ("uncond", 3, 9)
        assert clock.tick(0.5).branch == "call 1"
    assert "cache_context" not in net.__dict__


def test_announce_without_a_run_does_nothing() -> None:
    net = Net()
    before = dict(net.__dict__)
    announce(net, steps=3, step=0, branch="cond")
    assert net.__dict__ == before


# arguments of a call -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "time"),
    [
        ({"timestep": torch.tensor([[0.0, 7.0]])}, 7.0),
        ({"timestep": None, "t": 3}, 3.0),
        ({"sigma": 0.5}, 0.5),
        ({"hidden_states": torch.zeros(1)}, None),
    ],
)
def test_the_timestep_is_a_number_or_the_largest_of_many(given: dict[str, Any], time: float | None) -> None:
    assert timestep_of(given)() == time


def test_the_prompt_is_the_first_of_a_list() -> None:
    x = torch.zeros(1)
    assert prompt_of({"cap_feats": [[x], torch.ones(1)]}) is x
    assert prompt_of({"encoder_hidden_states": None}) is None


def test_the_fingerprint_keeps_shapes_and_flags_but_not_time_or_contents() -> None:
    base = {"x": torch.zeros(1, 2), "timestep": 5, "guidance": 1.0, "skip_layers": [1], "kw": {"scale": 0.5}}
    same = base | {"x": torch.ones(1, 2), "timestep": 4, "guidance": 2.0}
    assert fingerprint(base) == fingerprint(same)
    for change in (
        {"x": torch.zeros(2, 2)},
        {"x": torch.zeros(1, 2).double()},
        {"skip_layers": [2]},
        {"kw": {"scale": 1.0}},
        {"controlnet_block_samples": [torch.zeros(1)]},
    ):
        assert fingerprint(base) != fingerprint(base | change)
