"""A teacher and its student: stages, losses, resuming, on tiny networks and the tiny data set."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dit.backbones.mmdit import MMDiT
from dit.block_mixture import BlockMixture, group_blocks, groups_of
from dit.dense2moe import load_converted
from dit.experts.mixture import layers_of
from training import distill
from training.distill import Distiller, Weights, counterparts, feature_loss, features, stages_of

TEACHER: dict[str, Any] = {
    "in_channels": 3, "patch_size": 8, "sample_size": 32, "width": 32, "heads": 2, "dual_depth": 1, "single_depth": 3,
    "context_dim": 16, "pooled_dim": 16, "prediction_type": "sample",
}  # fmt: skip


@pytest.fixture
def recipe(folder: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    # Sample sheets are most of the time of a run this small, and they are the plain trainer's.
    monkeypatch.setattr(Distiller, "_sheet", lambda _: Image.new("RGB", (4, 4)))
    torch.manual_seed(5)
    teacher = MMDiT(**TEACHER)
    for one in teacher.parameters():
        if not one.any():
            torch.nn.init.normal_(one, std=0.3)
    teacher.save_pretrained(tmp_path / "teacher" / "transformer")
    return {
        "teacher": {"folder": str(tmp_path / "teacher")},
        "student": {"make": "mixture", "experts": "mixture", "batches": 2},
        "loss": {"task": 0.5, "output": 1.0, "variance": 0.0, "features": 0.5},
        "stage": [
            {"share": 0.4, "active": 0, "train": ["*", "!*.up*", "!*.down", "!*.gate.weight"]},
            {"share": 0.4, "active": 2, "train": ["*.up", "*.up_bias", "*.down", "*.gate.weight"]},
            {
                "share": 0.2,
                "train": ["*.router.*"],
                "blocks": {"single_transformer_blocks": {"size": 3, "active": 2}},
            },
        ],
        "data": {
            "folder": str(folder), "size": 64, "styles": ["fluent3d", "fluentbw", "noto"], "subgroups": [],
            "concepts": ["dog", "apple", "red heart"], "wordings": 2, "text_tokens": 6, "drop": 0.1,
        },
        "codec": {"scale": 2},
        "objective": {"mean": 0.3, "std": 1.2, "floor": 0.05},
        "optimizer": {
            "name": "muon", "rate": 3e-3, "matrix_rate": 5e-3, "decay": 0.01, "clip": 1.0, "ema": 0.9, "warmup": 2,
            "cooldown": 0.5,
        },
        "run": {
            "samples": 160, "batch": 8, "precision": "float32", "compile": False, "save_every": 60.0, "check_every": 10,
            "seed": 1,
        },
    }  # fmt: skip


def begun(recipe: dict[str, Any], out: Path) -> Distiller:
    trainer = Distiller(copy.deepcopy(recipe), out, None)
    trainer.load_data()
    return trainer


def apart(trainer: Distiller) -> float:
    """How far the student's output is from the teacher's on a fixed batch."""
    dice = torch.Generator().manual_seed(3)
    latents, prompts = trainer.train.draw(8, 0.0, dice)
    with torch.no_grad():
        trainer.loss(
            latents, prompts, torch.randn(latents.shape, generator=dice), torch.linspace(0.2, 0.9, 8)
        )
    return trainer.parts["output"]


def test_a_run_goes_through_its_stages_and_learns(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["loss"] |= {
        "task": 0.0
    }  # the teacher knows nothing of the pictures, and shall be imitated all the same
    recipe["optimizer"] |= {"rate": 1e-3, "matrix_rate": 1e-3}
    trainer = Distiller(recipe, tmp_path / "run", None)
    start = {name: one.detach().clone() for name, one in trainer.model.named_parameters()}
    assert {one.active for one in layers_of(trainer.model).values()} == {0}
    trainer.load_data()
    before = apart(trainer)
    for _ in range(8):
        trainer.step()
    assert trainer.stage == 0
    assert apart(trainer) < 0.8 * before
    shared = {n: one.detach().clone() for n, one in trainer.model.named_parameters()}
    trainer.step()
    assert trainer.stage == 1
    assert {one.active for one in layers_of(trainer.model).values()} == {2}
    for name, one in trainer.model.named_parameters():
        routed = name.endswith((".up", ".up_bias", ".down", ".gate.weight"))
        assert one.requires_grad == routed
        assert torch.equal(shared[name], start[name]) == routed, "the routed experts wait for their stage"
    trainer.run()
    assert trainer.stage == 2
    assert list(groups_of(trainer.model)) == ["single_transformer_blocks.0"]
    assert trainer.log[-1].keys() >= {"held_out", "teacher_held_out", "stage", "task", "output", "features"}
    again = load_converted(tmp_path / "run" / "transformer")
    averaged = trainer.master.averaged()
    assert all("router" in name for name in averaged)
    for name, one in again.named_parameters():
        torch.testing.assert_close(one, averaged.get(name, trainer.model.get_parameter(name)))


def test_a_run_stopped_in_any_stage_goes_on_as_if_it_had_not(recipe: dict[str, Any], tmp_path: Path) -> None:
    whole = begun(recipe, tmp_path / "whole")
    losses = [whole.step() for _ in range(20)]
    parts: list[float] = []
    for count in (5, 6, 7, 2):  # stops inside each stage
        part = begun(recipe, tmp_path / "parts")
        assert part.seen == 8 * len(parts)
        parts += [part.step() for _ in range(count)]
        part.save()
    assert part.stage == 2
    assert parts == losses
    assert (part.steps(), part.master.steps) == (20, 4)
    for (name, mine), (_, other) in zip(
        whole.model.named_parameters(), part.model.named_parameters(), strict=True
    ):
        assert torch.equal(mine, other), name


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(recipe: dict[str, Any], tmp_path: Path) -> None:
    torch._dynamo.reset()
    recipe["optimizer"]["name"] = "adamw"
    plain = begun(recipe, tmp_path / "plain")
    recipe["run"]["compile"] = True
    compiled = begun(recipe, tmp_path / "compiled")
    losses = [(plain.step(), compiled.step()) for _ in range(10)]
    assert compiled.stage == 1
    for one, other in losses:
        assert other == pytest.approx(one, rel=1e-2)
    assert all("load_balance" in one.auxiliary for one in layers_of(compiled.model).values())


def test_the_teacher_never_changes(recipe: dict[str, Any], tmp_path: Path) -> None:
    trainer = begun(recipe, tmp_path)
    before = {name: one.clone() for name, one in trainer.teacher.state_dict().items()}
    trainer.check()
    for _ in range(3):
        trainer.step()
    assert all(torch.equal(one, before[name]) for name, one in trainer.teacher.state_dict().items())


def test_a_student_by_inheritance_learns_too(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["student"] = {"make": "inherit", "experts": "dense:activation=gelu"}
    recipe["stage"] = [{"share": 1.0, "loss": {"features": 0.0}}]
    trainer = begun(recipe, tmp_path)
    assert trainer.model.config.experts == "dense:activation=gelu"
    first = trainer.step()
    for _ in range(8):
        last = trainer.step()
    assert last < first
    trainer.save()
    assert MMDiT.from_pretrained(tmp_path / "transformer").config.experts == "dense:activation=gelu"


def test_importance_comes_from_the_data(recipe: dict[str, Any], tmp_path: Path) -> None:
    def first_channel(kind: str) -> Tensor:
        recipe["student"]["importance"] = kind
        trainer = begun(recipe, tmp_path / kind)
        return next(iter(layers_of(trainer.model).values())).shared.net[0].proj.weight.detach()

    kinds = [first_channel(kind) for kind in ("taylor", "magnitude", "random")]
    assert not torch.equal(kinds[0], kinds[1])
    assert not torch.equal(kinds[0], kinds[2])
    recipe["student"]["importance"] = "size"
    with pytest.raises(ValueError, match="importance is one of taylor, magnitude, random, got 'size'"):
        Distiller(recipe, tmp_path / "x", None)


def test_the_losses_are_weighted(recipe: dict[str, Any], tmp_path: Path) -> None:
    def loss(**weights: float) -> float:
        recipe["loss"] = {"task": 0.0, "output": 0.0, "variance": 0.0, "features": 0.0} | weights
        recipe["stage"] = [{"share": 1.0, "active": 0}]
        return begun(recipe, tmp_path / str(weights)).step()

    output, task = loss(output=1.0), loss(task=1.0)
    assert loss(output=3.0) == pytest.approx(3 * output, rel=1e-5)
    assert loss(features=2.0) == pytest.approx(2 * output, rel=1e-5), (
        "feature losses are as large as the output's"
    )
    assert loss(output=1.0, task=0.5) == pytest.approx(output + 0.5 * task, rel=1e-5)


def test_feature_losses_share_the_budget_by_the_teachers_norms() -> None:
    teacher = [torch.ones(2, 3, 4), 3 * torch.ones(2, 3, 4)]
    student = [(teacher[0] + 0.01).requires_grad_(), (teacher[1] - 5).requires_grad_()]
    loss, errors = feature_loss(student, teacher, torch.tensor(0.7))
    assert float(loss.detach()) == pytest.approx(0.7)
    assert errors.tolist() == pytest.approx([1e-4, 25.0], rel=1e-3)
    loss.backward()
    assert student[0].grad is not None
    assert student[1].grad is not None
    # d(w e)/dx = 2 w (x - t) / numel, with w e = 0.7 * norm share
    assert float(student[0].grad.sum()) == pytest.approx(0.7 * 0.25 * 2 / 0.01, rel=1e-3)
    assert float(student[1].grad.sum()) == pytest.approx(-0.7 * 0.75 * 2 / 5, rel=1e-3)


def test_features_are_met_where_a_group_ends() -> None:
    teacher, student = (MMDiT(**TEACHER) for _ in range(2))
    student.load_state_dict(teacher.state_dict())
    assert counterparts(student, teacher) == [0, 1, 2, 3]
    group_blocks(student, {"single_transformer_blocks": BlockMixture(3, 3)})
    assert counterparts(student, teacher) == [0, 3]
    inputs = {
        "hidden_states": torch.randn(1, 3, 32, 32), "timestep": torch.tensor([400.0]),
        "encoder_hidden_states": torch.randn(1, 5, 16), "pooled_projections": torch.randn(1, 16),
    }  # fmt: skip
    with torch.no_grad(), features(teacher) as theirs:
        teacher(**inputs)
    with torch.no_grad(), features(student) as ours:
        student(**inputs)
    assert [one.shape for one in theirs] == [(1, 21, 32)] * 4
    assert len(ours) == 2
    torch.testing.assert_close(ours[1], theirs[3])
    with pytest.raises(ValueError, match="the teacher has 4 blocks and the student 2"):
        counterparts(MMDiT(**TEACHER | {"single_depth": 1}), teacher)


def test_wrong_recipes_are_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            Distiller(copy.deepcopy(recipe) | changes, tmp_path / "x", None)

    refused(
        r"shares must be above 0 and add up to 1, got \[0.4, 0.4\]", stage=[{"share": 0.4}, {"share": 0.4}]
    )
    refused("make is one of inherit, mixture, got 'prune'", student={"make": "prune"})
    refused("output must be 0 or more, got -1", loss={"output": -1})
    refused("unexpected keyword argument 'feature'", loss={"feature": 1})
    refused("no weight has a name like nothing", stage=[{"share": 1.0, "train": ["nothing"]}])
    refused("is no folder of a transformer or pipeline", teacher={"folder": str(tmp_path)})
    assert stages_of({})[0].train == ("*",)
    assert Weights().output == 0.5


def test_the_command_line_distils(
    recipe: dict[str, Any], written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["distill", str(written(recipe, tmp_path / "tiny.toml")), "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", [*command, "--set", "run.samples=80"])
    distill.main()
    assert json.loads((tmp_path / "run" / "progress.json").read_text())["seen"] == 80
    assert groups_of(load_converted(tmp_path / "run" / "transformer"))


def test_a_linear_student_starts_fitted_and_is_not_fitted_again(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["student"] = {"make": "inherit", "mixer": "linear:heads=2,kernel=3", "load": "qkvo"}
    recipe["stage"] = [{"share": 1.0, "loss": {"features": 0.0}}]
    kernels = [
        one
        for name, one in begun(recipe, tmp_path / "plain").model.named_parameters()
        if ".conv.weight" in name
    ]
    assert not any(one.any() for one in kernels)
    recipe["student"]["fit"] = 3
    trainer = begun(recipe, tmp_path / "fitted")
    kernels = [one for name, one in trainer.model.named_parameters() if ".conv.weight" in name]
    assert len(kernels) == 4
    assert all(one.any() for one in kernels)
    trainer.step()
    trainer.save()
    monkeypatch.setattr(Distiller, "fit", lambda *_: pytest.fail("fitted again"))
    again = begun(recipe, tmp_path / "fitted")
    for (name, one), other in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name
