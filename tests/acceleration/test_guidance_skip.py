from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from acceleration import DeltaCache, GuidanceSkip, TaylorCache, Untouched, accelerated
from acceleration._guidance import doubled, halves, joined, leaves, mapped
from dit.seams import announce

STEPS = 10


class Guided:
    """A toy whose prompt matters, and the calls of a guided run on it: cond and uncond in turn, or both in one batch."""

    def __init__(self, toys: Any) -> None:
        sampler = toys()
        self.model, plain = sampler.model, type(sampler.model).forward
        torch.manual_seed(1)
        self.x, self.cond, self.uncond = sampler.x, torch.randn(1, 1, 8), torch.randn(1, 1, 8)

        class Prompted(type(self.model)):  # type: ignore[misc]
            def forward(
                self, hidden_states: Tensor, timestep: Any, encoder_hidden_states: Tensor, **more: Any
            ) -> Tensor:
                return plain(self, hidden_states + encoder_hidden_states, timestep, **more)

        self.model.__class__ = Prompted

    def moved(self, step: int) -> Tensor:
        return self.x * (1 + step / 9)

    @torch.no_grad()
    def call(self, step: int, prompt: str, time: float | None = None) -> Tensor:
        at = 1 - step / STEPS if time is None else time
        if prompt == "both":
            x, text = torch.cat([self.moved(step)] * 2), torch.cat([self.uncond, self.cond])
            return self.model(x, torch.full((2,), at), encoder_hidden_states=text)
        return self.model(self.moved(step), at, encoder_hidden_states=getattr(self, prompt))

    def sequential(self, named: bool = True, order: tuple[str, ...] = ("cond", "uncond")) -> list[Tensor]:
        """Return uncond and cond of every step in one tensor [2, N, D]."""
        outputs = []
        for step in range(STEPS):
            found = {}
            for name in order:
                if named:
                    announce(self.model, step=step, branch=name)
                found[name] = self.call(step, name)
            outputs.append(torch.cat([found["uncond"], found["cond"]]))
        return outputs

    def batched(self, stop: int = STEPS) -> list[Tensor]:
        return [self.call(step, "both") for step in range(stop)]


@pytest.fixture
def guided(toys: Any) -> Guided:
    return Guided(toys)


def bands(run: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for cell in run.report().cells:
        found.setdefault(cell["branch"], []).append(cell["states"])
    return found


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


def test_the_distance_of_the_branches_is_reused(guided: Guided) -> None:
    plain = guided.sequential()
    with accelerated(guided.model, GuidanceSkip(interval=3), steps=STEPS) as run:
        fast = guided.sequential()
    spared = [3, 4, 6, 7]  # of ten steps the first two, every third, and the last are computed
    for step, (exact, found) in enumerate(zip(plain, fast, strict=True)):
        last = 2 if step < 5 else 5
        expected = exact[1] - (plain[last][1] - plain[last][0]) if step in spared else exact[0]
        assert torch.equal(exact[1], found[1])
        assert torch.allclose(found[0], expected, atol=1e-6)
        assert torch.equal(found[0], exact[0]) is (step not in spared)
    assert bands(run) == {
        "cond": ["CCCCCC"] * STEPS,
        "uncond": ["RRRRRR" if step in spared else "CCCCCC" for step in range(STEPS)],
    }
    report = run.report()
    assert (report.computed, report.reused, report.bytes) == (16 * 6, 4 * 6, 5 * 8 * 4)
    assert report.effective == ["guidance-skip: of the unconditional forwards 4 reused, 6 computed"]
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert "forward" not in guided.model.__dict__


def test_a_forecast_follows_what_changes_evenly(guided: Guided) -> None:
    drift, plain = torch.randn(1, 5, 8), type(guided.model).forward

    class Drifting(type(guided.model)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, timestep: float, encoder_hidden_states: Tensor) -> Tensor:
            out = plain(self, hidden_states, 0.5, torch.zeros(1, 1, 8))
            return out + (1 - timestep) ** 2 * drift * encoder_hidden_states.sum()

    guided.model.__class__ = Drifting
    exact = guided.sequential()
    errors = {}
    for order in (0, 1, 2):
        mode = {"mode": "forecast", "order": order} if order else {}
        with accelerated(guided.model, GuidanceSkip(interval=3, warmup=3, **mode), steps=STEPS) as run:  # type: ignore[arg-type]
            found = guided.sequential()
        errors[order] = max(float((a - b).abs().max()) for a, b in zip(exact, found, strict=True))
        assert set("".join(bands(run)["uncond"])) == {"C", "F" if order else "R"}
    assert errors[0] > 2 * errors[1] > 0
    assert errors[2] < 1e-4 * errors[1]


def test_without_guidance_in_between_the_conditional_output_stands_in(guided: Guided) -> None:
    plain = guided.sequential()
    with accelerated(guided.model, GuidanceSkip(mode="cond"), steps=STEPS) as run:
        fast = guided.sequential()
    assert torch.equal(fast[3][0], plain[3][1])
    assert torch.equal(fast[4], plain[4])
    assert run.report().bytes == 0
    assert "3 left out, 7 computed" in run.report().effective[0]


def test_guidance_may_be_limited_to_an_interval(guided: Guided) -> None:
    method = GuidanceSkip(interval=1, guide_from=0.2, guide_to=0.7)
    plain = guided.sequential()
    with accelerated(guided.model, method, steps=STEPS) as run:
        fast = guided.sequential()
    for step in range(STEPS):
        assert torch.equal(fast[step][0], plain[step][0 if 2 <= step < 7 else 1])
    assert run.report().effective == ["guidance-skip: of the unconditional forwards 5 left out, 5 computed"]
    with pytest.raises(ValueError, match=r"guide_to must be more than guide_from \(0.5\), got 0.5"):
        GuidanceSkip(guide_from=0.5, guide_to=0.5)
    with accelerated(guided.model, GuidanceSkip(guide_to=0.5)) as run:
        guided.sequential()
    assert any("number of steps is unknown" in note for note in run.report().notes)


@pytest.mark.parametrize("method", [GuidanceSkip(), GuidanceSkip(mode="forecast"), GuidanceSkip(mode="cond")])
def test_a_doubled_batch_gives_what_two_calls_give(guided: Guided, method: GuidanceSkip) -> None:
    with accelerated(guided.model, method, steps=STEPS) as run:
        two = guided.sequential()
    with accelerated(guided.model, method, steps=STEPS) as other:
        one, again = guided.batched(), guided.batched()
    assert close(one, two)
    assert close(one, again)
    assert {name: states[:STEPS] for name, states in bands(other).items()} == bands(run)


def test_the_first_half_may_be_the_conditional_one(guided: Guided) -> None:
    with accelerated(guided.model, GuidanceSkip(unconditional="second"), steps=STEPS):
        fast = guided.batched()
    plain = guided.batched()
    assert torch.allclose(fast[3][0], plain[3][0], atol=1e-6)
    assert not torch.allclose(fast[3][1], plain[3][1], atol=1e-6)


def test_unnamed_calls_are_told_by_their_order(guided: Guided) -> None:
    with accelerated(guided.model, GuidanceSkip(), steps=STEPS):
        named = guided.sequential()
    with accelerated(guided.model, GuidanceSkip(), steps=STEPS) as run:
        unnamed = guided.sequential(named=False)
    assert close(named, unnamed)
    assert set("".join(bands(run)["call 2"])) == {"C", "R"}


def test_truncated_guidance_and_a_shrinking_batch(guided: Guided) -> None:
    plain = guided.batched()
    with accelerated(guided.model, GuidanceSkip(), steps=STEPS) as run:
        found = guided.batched(6)
        found += [guided.call(step, "cond") for step in range(6, STEPS)]
    assert bands(run)["uncond"] == ["CCCCCC"] * 3 + ["RRRRRR", "CCCCCC", "RRRRRR"]
    assert all(torch.allclose(found[step], plain[step][1:], atol=1e-6) for step in range(6, STEPS))


@pytest.mark.parametrize("begin", [0, 3])
def test_guiders_of_diffusers_name_the_branches_and_may_begin_late(guided: Guided, begin: int) -> None:
    with accelerated(guided.model, GuidanceSkip(), steps=STEPS) as run:
        for step in range(STEPS):
            for name in ("cond", "uncond")[: 1 + (step >= begin)]:
                announce(guided.model, branch=f"pred_{name}")
                guided.call(step, name)
    spared = [cell["step"] for cell in run.report().cells if cell.get("unconditional") == "reused"]
    assert spared == ([3, 5, 7] if begin == 0 else [5, 7])


def test_nothing_is_silent(guided: Guided) -> None:
    def alone() -> None:
        with accelerated(guided.model, GuidanceSkip(), steps=STEPS):
            for step in range(STEPS):
                guided.call(step, "cond")

    def reversed_order() -> None:
        with accelerated(guided.model, GuidanceSkip(), steps=STEPS):
            guided.sequential(order=("uncond", "cond"))

    def two_pictures() -> None:  # of two prompts, not two branches
        with torch.no_grad(), accelerated(guided.model, GuidanceSkip(), steps=STEPS):
            for step in range(STEPS):
                x = torch.cat([guided.moved(step), guided.moved(step + 1)])
                guided.model(
                    x, 1 - step / STEPS, encoder_hidden_states=torch.cat([guided.cond, guided.uncond])
                )

    for play, words in (
        (alone, "no unconditional branch was seen: guidance is off"),
        (reversed_order, "no conditional forward came before it"),
        (two_pictures, "no unconditional branch was seen"),
    ):
        with pytest.raises(Untouched, match=words):
            play()
    with accelerated(guided.model, GuidanceSkip(), steps=STEPS):
        for step in range(2):  # nothing could be spared in two steps
            guided.call(step, "both")


def test_identical_inputs_give_no_error(guided: Guided) -> None:
    exact = guided.call(0, "both", 1.0)
    for method in (GuidanceSkip(interval=4), GuidanceSkip(interval=4, mode="forecast", order=2)):
        with accelerated(guided.model, method, steps=STEPS) as run:
            for step in range(STEPS):
                announce(guided.model, step=step, branch="uncond+cond")
                assert torch.allclose(guided.call(0, "both", 1.0), exact, atol=1e-6)
        assert run.report().computed < run.report().calls * 6


def test_a_corrector_of_a_spared_predictor_is_computed(guided: Guided) -> None:
    for told in (True, False):
        with accelerated(guided.model, GuidanceSkip(warmup=1), steps=STEPS) as run:
            for index in range(2 * STEPS - 1):
                step = index // 2 if told else (index + 1) // 2
                for name in ("cond", "uncond"):
                    announce(guided.model, step=step if told else None, branch=name)
                    guided.call(step, name, 1 - (index + 1) // 2 / STEPS)
        spared = [set(states) == {"R"} for states in bands(run)["uncond"]]
        assert any(spared)
        assert not any(spared[index] and spared[index + 1] for index in range(0, 2 * STEPS - 2, 2))


@pytest.mark.parametrize("inner", [DeltaCache(interval=3), TaylorCache(interval=2)], ids=str)
@pytest.mark.parametrize("play", ["sequential", "batched"])
def test_caches_around_blocks_keep_their_state_inside(guided: Guided, inner: Any, play: str) -> None:
    with accelerated(guided.model, inner, steps=STEPS) as run:
        alone = guided.sequential()
    expected = bands(run)["cond"]
    with accelerated(guided.model, inner, GuidanceSkip(interval=4), steps=STEPS) as run:
        both = getattr(guided, play)()
    assert bands(run)["cond"] == expected
    assert all(torch.allclose(a[1], b[1], atol=1e-5) for a, b in zip(alone, both, strict=True))
    uncond = bands(run)["uncond"]
    assert sum(cell.get("answered", False) for cell in run.report().cells) == sum(
        cell.get("unconditional") == "reused" for cell in run.report().cells
    )
    assert uncond[2] == "CCCCCC"
    report = run.report()
    assert len(report.effective) == 2
    short = sum(set(states) != {"C"} for states in expected)
    assert (
        f"{inner.name}: {short}" in report.effective[0]
    )  # what was answered as a whole is not counted as its own
    tensor = 5 * 8 * 4
    assert report.bytes >= 3 * tensor  # a residual for each branch, and the distance of the branches


def test_another_size_and_an_interrupted_run(guided: Guided) -> None:
    with accelerated(guided.model, GuidanceSkip(), steps=STEPS):
        expected = guided.batched()
    small, large = guided.x[:, :3], guided.x

    def broken() -> None:
        with accelerated(guided.model, GuidanceSkip(), steps=STEPS) as run:
            guided.x = small
            guided.batched(4)
            guided.x = large
            assert close(guided.batched(), expected)
            guided.model.order = [0, 99]
            assert run.report().reused > 0
            guided.batched()

    with pytest.raises(IndexError):
        broken()
    guided.model.order = list(range(6))
    assert "forward" not in guided.model.__dict__
    with accelerated(guided.model, GuidanceSkip(), steps=STEPS):
        assert close(guided.batched(), expected)


def test_what_a_schedule_promises() -> None:
    assert GuidanceSkip().predicted_speedup(20, 12) == 40 / 32
    assert GuidanceSkip(interval=1).predicted_speedup(20, 12) == 1
    assert GuidanceSkip(interval=1, guide_to=0.5).predicted_speedup(20, 12) == 40 / 30


def test_a_batch_is_taken_apart_by_its_arguments() -> None:
    x, text = torch.randn(1, 4, 2, 2).expand(2, -1, -1, -1), torch.randn(2, 3, 8)
    given = {
        "hidden_states": x, "encoder_hidden_states": text, "timestep": torch.ones(2), "img_ids": torch.zeros(2, 3),
        "guidance": None, "img_shapes": [[(1, 2, 2)]] * 2, "size": (2, 2), "return_dict": False,
        "controlnet_block_samples": [torch.zeros(2, 4), torch.zeros(2, 4)],
        "added": {"resolution": torch.zeros(2, 2), "scale": 1.0},
    }  # fmt: skip
    parts = halves(given)
    assert parts is not None
    assert torch.equal(parts[1]["encoder_hidden_states"], text[1:])
    assert parts[1]["timestep"].shape == (1,)
    assert parts[1]["img_ids"].shape == (2, 3)  # positions, one table for all
    assert parts[0]["img_shapes"] == [[(1, 2, 2)]]
    assert parts[0]["size"] == (2, 2)
    assert [one.shape for one in parts[0]["controlnet_block_samples"]] == [(1, 4)] * 2
    assert parts[0]["added"]["resolution"].shape == (1, 2)
    assert doubled(given)
    assert not doubled(given | {"encoder_hidden_states": text[:1].expand(2, -1, -1)} | {"added": {}})
    assert halves(given | {"hidden_states": torch.randn(3, 4, 2, 2)}) is None
    assert halves(given | {"encoder_hidden_states": torch.randn(6, 3, 8)}) is None  # folded into the batch


def test_every_form_of_output_is_put_together_again() -> None:
    a, b = torch.randn(1, 3), torch.randn(1, 3)
    model = joined(Transformer2DModelOutput(sample=a), Transformer2DModelOutput(sample=b))
    assert isinstance(model, Transformer2DModelOutput)
    assert torch.equal(model.sample, torch.cat([a, b]))
    assert torch.equal(joined((a, None), (b, None))[0], torch.cat([a, b]))
    assert joined(([a],), ([b],), listed=True) == ([a, b],)
    assert [one.shape for one in leaves((a, torch.ones(2, dtype=torch.long), [b]))] == [(1, 3)] * 2
    assert torch.equal(mapped(model, torch.neg).sample, -model.sample)
