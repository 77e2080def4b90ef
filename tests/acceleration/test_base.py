from __future__ import annotations

import copy
import gc
import json
import pickle
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import acceleration
from acceleration import Accelerator, DeltaCache, Refused, StepForecast, Untouched, accelerated, refusal
from dit.seams import announce
from dit.spec import kinds


def states(run: Any) -> list[str]:
    return [cell["states"] for cell in run.report().cells]


def test_importing_the_package_registers_the_methods() -> None:
    assert kinds(Accelerator)["delta-cache"] is DeltaCache
    assert set(acceleration.__all__) <= set(dir(acceleration))


def test_no_method_watches_and_changes_nothing(toy: Any) -> None:
    plain = toy.run()
    with accelerated(toy.model) as run:
        same = toy.run()
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    report = run.report()
    assert (report.calls, report.steps, report.blocks, report.computed, report.reused) == (10, 10, 6, 60, 0)
    assert report.summary() == "exact - 60 of 60 block calls computed (100%) in 10 calls"


def test_the_report_has_what_was_asked_beside_what_happened(toy: Any) -> None:
    with accelerated(toy.model, DeltaCache(mode="rear", cached_fraction=0.5), steps=10) as run:
        toy.run()
    report = run.report()
    assert report.requested == [DeltaCache(mode="rear", cached_fraction=0.5).to_dict()]
    assert report.effective == ["delta-cache: 3 of 10 calls reused blocks 3-5"]
    assert states(run) == ["CCCCCC"] * 3 + ["CCCRRR", "CCCCCC"] * 3 + ["CCCCCC"]
    assert (report.computed, report.reused, report.fraction) == (51, 9, 0.85)
    assert report.bytes == 5 * 8 * 4
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.cells[3] == {"run": 0, "branch": "call 1", "step": 3, "evaluation": 0, "states": "CCCRRR"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda net: (net, DeltaCache(), DeltaCache()),
            "both decide about which blocks are computed; choose one",
        ),
        (lambda net: (nn.Linear(1, 1), DeltaCache()), "delta-cache: Linear has no stack of repeated blocks"),
        (lambda net: (net, DeltaCache(last_block=6)), "there is no block 6: Toy has blocks 0 to 5"),
        (lambda net: (net, "delta-cache"), r"takes accelerators such as DeltaCache\(\), got str"),
        (lambda net: ("toy", DeltaCache()), "takes a transformer .*, got str"),
        (lambda net: (SimpleNamespace(transformer=net), DeltaCache()), "as in pipeline.transformer"),
        (lambda net: (net, DeltaCache), r"such as DeltaCache\(\), got the class DeltaCache"),
        (lambda net: (net, [DeltaCache()]), "got list of them: give one after the other"),
        (lambda net: (torch.compile(net), DeltaCache()), "is compiled as a whole.*compile_repeated_blocks"),
    ],
)
def test_what_cannot_work_is_refused_in_words_at_entry(toy: Any, make: Any, words: str) -> None:
    transformer, *methods = make(toy.model)
    with pytest.raises(Refused, match=words), accelerated(transformer, *methods):
        pass
    assert refusal(transformer, *methods) is not None
    assert refusal(toy.model, DeltaCache()) is None


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_is_accelerated_is_not_copied(toy: Any, copied: Any) -> None:
    """A copy would go on calling the blocks of the original, whatever became of its own weights."""
    pipeline = SimpleNamespace(transformer=toy.model)
    with accelerated(toy.model, DeltaCache(mode="rear"), steps=10) as run:
        for one in (toy.model, pipeline):
            if one is toy.model or copied is not copy.copy:
                with pytest.raises(
                    RuntimeError, match="Toy is accelerated and cannot be copied or pickled now"
                ):
                    copied(one)
        toy.run()
    assert run.report().reused > 0
    copied(toy.model)
    other = copy.deepcopy(toy.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert not torch.equal(other(toy.x, 1.0), toy.model(toy.x, 1.0))


def test_two_threads_at_the_same_time_are_told_apart(toy: Any) -> None:
    plain, inside, free, found = toy.run(), threading.Event(), threading.Event(), []

    def hold(*_: Any) -> None:
        inside.set()
        assert free.wait(120)

    with accelerated(toy.model, DeltaCache(interval=1), steps=10) as run:
        handle = toy.model.blocks[2].register_forward_hook(hold)
        thread = threading.Thread(target=lambda: found.append(toy.run()))
        thread.start()
        assert inside.wait(120)
        with pytest.raises(RuntimeError, match="two threads call Toy at the same time"):
            toy.run(1)
        handle.remove()
        free.set()
        thread.join(120)
        toy.run()  # one after the other is fine
    assert all(torch.equal(a, b) for a, b in zip(plain, found[0], strict=True))
    report = run.report()
    assert (report.calls, {cell["states"] for cell in report.cells}) == (20, {"CCCCCC"})


def test_more_steps_than_were_told_are_noted(toy: Any) -> None:
    with accelerated(toy.model, DeltaCache(), steps=4) as run:
        toy.run(10)
    (note,) = run.report().notes
    assert note.startswith("the run has more timesteps than the 4 steps that were told")
    with accelerated(toy.model, DeltaCache(), steps=10) as run:
        toy.run(10)
    assert not run.report().notes


def test_fewer_steps_than_were_told_are_noted_when_the_run_is_over(toy: Any) -> None:
    with accelerated(toy.model, DeltaCache(), steps=12) as run:
        toy.run(10)
        assert not run.report().notes, "more may come"
    (note,) = run.report().notes
    assert note.startswith("the run had 10 timesteps, fewer than the 12 steps that were told")
    with accelerated(toy.model, DeltaCache(), steps=12) as run:
        toy.run(10)
        toy.run(12)
        (note,) = run.report().notes
    assert "had 10 timesteps" in note
    with accelerated(toy.model, DeltaCache(), steps=10) as run:
        toy.run(10)
        toy.run(10)
    assert not run.report().notes


def test_a_model_compiled_in_place_is_refused(toy: Any) -> None:
    toy.model.compile(backend="eager")
    with pytest.raises(Refused, match="compiled as a whole"), accelerated(toy.model, DeltaCache()):
        pass


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": True}, {"calls_per_step": 1.5}])
def test_wrong_counts_are_refused(toy: Any, wrong: Any) -> None:
    with (
        pytest.raises(Refused, match="must be a whole number of at least 1, got"),
        accelerated(toy.model, **wrong),
    ):
        pass


def test_a_second_with_block_inside_is_refused_and_harms_nothing(toy: Any) -> None:
    with accelerated(toy.model, DeltaCache(mode="rear")) as run:
        with pytest.raises(Refused, match="already accelerated"), accelerated(toy.model, DeltaCache()):
            pass
        toy.run()
    assert run.report().reused > 0
    with accelerated(toy.model, DeltaCache(mode="rear")) as again:
        toy.run()
    assert states(again) == states(run)


def test_a_method_that_reused_nothing_raises_at_the_end(toy: Any) -> None:
    def growing() -> None:
        with torch.no_grad(), accelerated(toy.model, DeltaCache(), steps=6):
            for step in range(6):
                toy.model(torch.zeros(1, 2 + step, 8), 1 - step / 6)

    with pytest.raises(Untouched, match=r"delta-cache had no effect on Toy: .*nothing was recorded yet"):
        growing()
    assert not any("forward" in block.__dict__ for block in toy.model.blocks)


def test_a_transformer_whose_blocks_are_never_called_raises(toy: Any) -> None:
    toy.model.order = []

    def sampled() -> None:
        with accelerated(toy.model, DeltaCache()):
            toy.run()

    with pytest.raises(Untouched, match="none of its blocks was called"):
        sampled()


def test_nothing_raises_where_nothing_could_be_saved(toy: Any) -> None:
    with accelerated(toy.model, DeltaCache()):
        pass  # no call at all
    with accelerated(toy.model, DeltaCache(), steps=3):
        toy.run(3)  # warm-up and final step only
    with accelerated(toy.model, DeltaCache(interval=1)):
        toy.run()


def test_an_exception_is_not_covered_by_a_complaint(toy: Any) -> None:
    def broken() -> None:
        with accelerated(toy.model, DeltaCache(), steps=9):
            toy.model(torch.zeros(1, 2, 8), 1.0)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        broken()
    assert "_leapfrog_run" not in toy.model.__dict__


def test_a_forward_that_fails_costs_only_what_it_recorded(toy: Any) -> None:
    with torch.no_grad(), accelerated(toy.model, DeltaCache(mode="whole"), steps=10) as run:
        for step in range(10):
            toy.model.order = [0, 1, 2, 3, 4, 5] if step != 4 else [0, 1, 99]
            announce(toy.model, step=step)
            if step == 4:  # a full step, which would have recorded
                with pytest.raises(IndexError):
                    toy.model(toy.x, 1.0)
            else:
                toy.model(toy.x, 1.0)
    assert states(run) == ["CCCCCC"] * 3 + ["RRRRRR", "CC", "CCCCCC", "CCCCCC", "RRRRRR", "CCCCCC", "CCCCCC"]


def test_an_announced_run_begins_anew(toy: Any) -> None:
    with accelerated(toy.model, DeltaCache(mode="rear")) as run:
        announce(toy.model, steps=10)
        toy.run(10)
        announce(toy.model, steps=4)
        toy.run(4)
        run.begin(5)
        toy.run(5)
    cells = run.report().cells
    assert [cell["run"] for cell in cells] == [0] * 10 + [1] * 4 + [2] * 5
    # Of 4 steps only the last could be short, and the last is full; of 5 there is one more.
    assert states(run)[10:] == ["CCCCCC"] * 7 + ["CCRRRR", "CCCCCC"]
    assert run.clock.steps == 5


def test_a_run_that_begins_late_uses_nothing_of_the_run_before(toy: Any) -> None:
    with torch.no_grad(), accelerated(toy.model, DeltaCache(mode="whole")) as run:
        announce(toy.model, steps=10)
        toy.run(3)
        announce(toy.model, steps=10)
        announce(toy.model, step=3)  # image-to-image leaves the first steps out
        toy.model(toy.x, 0.7)
        announce(toy.model, step=4)
        toy.model(toy.x, 0.6)
        announce(toy.model, step=5)
        toy.model(toy.x, 0.5)
    assert states(run)[3:] == ["CCCCCC", "CCCCCC", "RRRRRR"]


@pytest.mark.parametrize("first", [0, 3])
def test_a_run_cut_short_and_begun_again_at_the_same_step(toy: Any, first: int) -> None:
    """A pipeline that begins at a later step (image to image, a second network) is cut there and called again."""

    def call(step: int, scale: float) -> Any:
        announce(toy.model, step=step, branch="cond")
        with torch.no_grad():
            return toy.model(toy.x * scale, 1 - step / 10)

    method = DeltaCache(mode="whole", interval=5, warmup=1, final_full=0)
    with accelerated(toy.model, method, steps=10):
        expected = [call(step, 1.0) for step in range(first, first + 3)]
    with accelerated(toy.model, method, steps=10) as run:
        call(first, 7.0)
        found = [call(step, 1.0) for step in range(first, first + 3)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert [cell["run"] for cell in run.report().cells] == [0, 1, 1, 1]


def test_two_pipelines_may_share_a_transformer_one_after_the_other(toy: Any) -> None:
    with accelerated(toy.model, DeltaCache(mode="rear"), steps=10):
        first = toy.run()
    with accelerated(toy.model, DeltaCache(mode="front"), steps=10):
        other = toy.run()
    with accelerated(toy.model, DeltaCache(mode="rear"), steps=10):
        again = toy.run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_what_was_stored_dies_with_the_block(toy: Any) -> None:
    with accelerated(toy.model, DeltaCache(mode="whole"), steps=10) as run:
        toy.run()
        kept = [
            weakref.ref(state.parts[0].added["hidden_states"])
            for _, state in run._kept.values()
            if state.parts
        ]
        assert kept
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_what_was_stored_dies_with_an_exception_too(toy: Any) -> None:
    kept: list[Any] = []

    def broken() -> None:
        with accelerated(toy.model, DeltaCache(mode="whole"), steps=10) as run:
            kept.append(run)
            toy.run(5)
            kept.append(weakref.ref(next(iter(run._kept.values()))[1].parts[0].added["hidden_states"]))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        broken()
    gc.collect()
    assert kept[1]() is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [None, DeltaCache(mode="whole"), StepForecast()], ids=str)
def test_what_is_not_finite_is_no_success(toy: Any, value: float, method: Accelerator | None) -> None:
    """Without a pipeline that looks at its picture: the report tells, of this run or of one before in the same block."""
    methods = () if method is None else (method,)
    with accelerated(toy.model, *methods, steps=10) as run:
        toy.run()
        assert run.report().failures == []
        toy.x = toy.x * value
        toy.run()
        toy.x = torch.ones(1, 5, 8)
        toy.run()
    report = run.report()
    assert report.failures == [
        "what the network returned in step 10 of call 1 is not finite (NaN or infinite)"
    ]
    assert report.summary().startswith("failed: what the network returned in step 10")
    assert report.to_dict()["failures"] == report.failures == run.report().failures


def test_a_block_called_by_itself_is_left_alone(toy: Any) -> None:
    with accelerated(toy.model) as run:
        toy.model.blocks[0](toy.x, temb=torch.zeros(1))
    assert run.report().computed == 0
