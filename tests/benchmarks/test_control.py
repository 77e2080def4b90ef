"""The proof of control: its scores against plain counting, its goals, and that it steers what it says it steers."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks._control_scores import edge_f1, overlap, preferred, rising, score
from benchmarks.control import Bench, adapter_of, elsewhere, goals, subject, table, together
from control import Refused
from control._files import save
from control.easycontrol import EasyControl
from dit.backbones.mmdit import MMDiT
from dit.codec import ResampleCodec
from training.bases import base_of
from training.data import Pictures
from training.scenes import KINDS, Scene, Shape, as_pictures, draw, made_of


def plain_f1(made: np.ndarray, wanted: np.ndarray, within: float) -> float:
    a, b = np.argwhere(made).tolist(), np.argwhere(wanted).tolist()
    precision = sum(any(math.dist(p, q) <= within for q in b) for p in a) / len(a)
    recall = sum(any(math.dist(p, q) <= within for q in a) for p in b) / len(b)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("within", [0.0, 1.5, 2.0])
def test_f1_counts_edges_within_reach_both_ways(seed: int, within: float) -> None:
    dice = np.random.default_rng(seed)
    made, wanted = dice.random((2, 14, 11)) < 0.06
    assert edge_f1(made, wanted, within) == pytest.approx(plain_f1(made, wanted, within))


def test_f1_and_overlap_of_pictures_that_are_alike_empty_or_apart() -> None:
    none, some = np.zeros((8, 8), bool), np.eye(8, dtype=bool)
    assert (edge_f1(some, some), edge_f1(none, none), edge_f1(some, none), edge_f1(none, some)) == (
        1,
        1,
        0,
        0,
    )
    corner = np.zeros((8, 8), bool)
    corner[0, 7] = True
    other = np.zeros((8, 8), bool)
    other[7, 0] = True
    assert edge_f1(corner, other) == 0
    half = np.zeros((8, 8), bool)
    half[:4] = True
    assert (overlap(half, half), overlap(half, ~half), overlap(none, none)) == (1, 0, 1)
    assert overlap(half, np.ones((8, 8), bool)) == 0.5


def test_real_pictures_keep_to_their_own_conditions_and_not_to_others() -> None:
    pixels = shapes(4).pixels
    for kind in ("edges", "masks"):
        conditions = made_of(pixels, kind)
        assert score(kind, pixels, conditions) == 1
        assert score(kind, pixels, conditions.roll(1, 0)) < 0.95


def test_the_judge_prefers_what_is_nearer_in_its_features() -> None:
    court: Any = SimpleNamespace(features=lambda pixels: pixels.float().flatten(1))
    a, b = torch.randint(255, (2, 4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert preferred(court, a, a, b) == 1
    assert preferred(court, b, a, b) == 0


def test_a_sweep_rises_if_nothing_falls_below_what_was() -> None:
    assert rising([0.1, 0.2, 0.2, 0.9])
    assert rising([0.5, 0.497, 0.6])
    assert not rising([0.5, 0.49, 0.6])
    assert not rising([0.5, 0.497, 0.494]), "small falls do not add up"


def test_goals_and_table_say_what_was_reached() -> None:
    row = {
        "without": 0.2, "shuffled": 0.2, "adapter": 0.7, "ceiling": 1.0, "share_of_ceiling": 0.7, "times_without": 3.5,
        "strengths": {0.0: 0.2, 0.03: 0.3, 0.1: 0.4, 0.3: 0.5, 1.0: 0.7},
    }  # fmt: skip
    pair = {"both": 0.69, "swapped": 0.3, "two_at_once_loss": 0.014, "swapped_loss": 0.56}
    figures = {"alone": {"edges": row}, "together": {"edges": pair},
               "subject": {"subject_preferred": 0.95, "without": 0.5, "shuffled": 0.1}}  # fmt: skip
    reached = {one["what"]: one["met"] for one in goals(figures)}
    assert reached == {
        "edges: share_of_ceiling": False, "edges: times_without": True, "edges: two_at_once_loss": True,
        "edges: swapped_loss": True, "subject: subject_preferred": True,
    }  # fmt: skip
    lines = table(figures).splitlines()
    assert lines[2] == "| edges, F1 within 2 px | 0.200 | 0.200 | 0.700 | 1.000 | 0.700 | 0.690 | 0.300 |"
    assert lines[-1] == "| edges | 0.200 | 0.300 | 0.400 | 0.500 | 0.700 |"


def shapes(count: int) -> Pictures:
    kinds = list(KINDS)
    found = as_pictures([
        draw(Scene((Shape(kinds[i], "blue", (0.5, 0.5), 0.3, 0.4 * i),), "white", "plain"), 32) for i in range(count)
    ])  # fmt: skip
    for row in found.rows:
        row["style"] = "noto"
    return found


class Pipeline:
    """Stand-in for a pipeline: pictures show what the transformer says of the noise of each seed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer = MMDiT(
            in_channels=3, patch_size=4, sample_size=16, width=32, heads=2, dual_depth=1, single_depth=1, context_dim=16,
            pooled_dim=16,
        )  # fmt: skip
        for one in self.transformer.parameters():
            if not bool(one.detach().any()):
                torch.nn.init.normal_(one, std=0.2)
        self.codec, self.config = ResampleCodec(width=8, depth=1), {}
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.scheduler: Any = FlowMatchEulerDiscreteScheduler()
        self.used: list[tuple[str, int]] = []

    def __call__(
        self,
        prompts: list[str],
        *,
        seeds: Any,
        num_inference_steps: int,
        height: int | None = None,
        width: int | None = None,
        **_: object,
    ) -> Any:
        self.used.append((type(self.scheduler).__name__, num_inference_steps))
        shape = (3, (height or 32) // 2, (width or 32) // 2)
        noise = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        words = torch.zeros(len(prompts), 4, 16)
        said = self.transformer(
            noise, torch.full((len(prompts),), 500.0), encoder_hidden_states=words, pooled_projections=words[:, 0],
            return_dict=False,
        )[0]  # fmt: skip
        return SimpleNamespace(images=(self.codec.decode(said) + 1) / 2)


@pytest.fixture
def bench() -> Bench:
    return Bench(base_of(Pipeline()), shapes(3), steps=4, guidance=2.0, batch=2)


@torch.no_grad()
def test_pictures_are_steered_by_their_own_conditions_at_any_batch(bench: Bench) -> None:
    adapter = EasyControl(rank=2).build(bench.base.transformer)
    edges = made_of(bench.pictures.pixels, "edges")
    plain = bench.make()
    assert torch.equal(plain, bench.make([(adapter, edges, 0.0)])), "strength 0 is exactly off"
    steered = bench.make([(adapter, edges, 1.0)])
    assert not torch.equal(plain, steered)
    changed = edges.clone()
    changed[2] = 255 - changed[2]
    other = bench.make([(adapter, changed, 1.0)])
    assert torch.equal(steered[:2], other[:2])
    assert not torch.equal(steered[2], other[2])
    assert bench.made == 12
    own = type(bench.base.pipeline.scheduler)
    found = elsewhere(bench, "edges", adapter, edges)
    assert set(found) == {"dpm++2m, 4 steps", "heun, 4 steps", "euler, 4 steps", "32x48 px"}
    assert {name for name, _ in bench.base.pipeline.used} >= {
        "DPMSolverMultistepScheduler",
        "FlowMatchHeunDiscreteScheduler",
    }
    assert type(bench.base.pipeline.scheduler) is own, "the model's own is put back"


@torch.no_grad()
def test_two_at_once_and_swapped_are_two_different_things(bench: Bench) -> None:
    adapters = {kind: EasyControl(rank=2).build(bench.base.transformer) for kind in ("edges", "masks")}
    for one in adapters.values():
        for weight in one.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    found = together(bench, adapters, {"edges": {"adapter": 0.5}, "masks": {"adapter": 0.5}})
    for row in found.values():
        assert row["two_at_once_loss"] == pytest.approx(1 - row["both"] / 0.5)
    assert any(row["both"] != row["swapped"] for row in found.values())


@torch.no_grad()
def test_a_subject_is_judged_against_another_of_its_style(bench: Bench) -> None:
    def features(pixels: Tensor) -> Tensor:
        return pixels.float().flatten(1) + 1

    court: Any = SimpleNamespace(features=features, accuracy=lambda made, rows: {"pictures": len(rows)})
    found = subject(bench, EasyControl(rank=2).build(bench.base.transformer), court)
    assert 0 <= found["subject_preferred"] <= 1
    assert found["pictures"].shape == bench.pictures.pixels.shape


def test_a_file_for_another_condition_is_refused(bench: Bench, tmp_path: Path) -> None:
    adapter = EasyControl(rank=2).build(bench.base.transformer)
    about = {"condition": "masks", "recipe": {"condition": {"instruction": "fill it"}}}
    file = save(adapter, tmp_path / "one.safetensors", bench.base.transformer, about)
    with pytest.raises(Refused, match=r"one\.safetensors was trained for masks, and it is given as --edges"):
        adapter_of("edges", file, bench.base)
    taken: Any = adapter_of("masks", file, bench.base)
    assert taken.instruction == "fill it"
