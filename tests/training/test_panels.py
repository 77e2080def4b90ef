"""Training an In-Context LoRA, tiny: sets and captions are what they should be, the base keeps every byte, a run goes on."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from control import load
from control.in_context_lora import InContextLoRA
from dit.backbones.mmdit import MMDiT
from training.data import load_pictures
from training.distill import load_network
from training.panels import FILE, PanelTrainer, captions_of, digest_of, draw_sets, split_concepts


@pytest.fixture
def recipe(folder: Path, words: list[str], tmp_path: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    base = MMDiT(
        in_channels=3, patch_size=8, sample_size=32, width=32, heads=2, dual_depth=1, single_depth=1, context_dim=16,
        pooled_dim=16, prediction_type="sample",
    )  # fmt: skip
    for one in base.parameters():  # zero gates would hide what the adapter does
        torch.nn.init.normal_(one, std=0.1)
    base.save_pretrained(tmp_path / "base")
    return {
        "base": {"folder": str(tmp_path / "base")},
        "adapter": {"rank": 4, "panels": 2, "arrangement": "row"},
        "data": {
            "folder": str(folder), "size": 64, "styles": ["fluent3d", "fluentbw", "noto"], "subgroups": [], "concepts": [],
            "kinds": ["style", "concept"], "sets": 6, "held_sets": 2, "held_concepts": 0.5, "wordings": 3, "text_tokens": 32,
            "gutter": 0, "shift": 1, "given": 0.5, "drop": 0.1,
        },
        "codec": {"scale": 2},
        "objective": {"mean": 0.3, "std": 1.2, "floor": 0.05},
        "optimizer": {
            "name": "adamw", "rate": 2e-2, "matrix_rate": 2e-2, "decay": 0.0, "clip": 1.0, "ema": 0.9, "warmup": 2,
            "cooldown": 0.5,
        },
        "run": {
            "samples": 64, "batch": 4, "precision": "float32", "compile": False, "save_every": 60.0, "check_every": 8,
            "check_sets": 4, "seed": 1,
        },
    }  # fmt: skip


def begun(recipe: dict[str, Any], out: Path) -> PanelTrainer:
    trainer = PanelTrainer(copy.deepcopy(recipe), out, None, None)
    trainer.load_data()
    return trainer


def test_sets_share_what_their_kind_says(folder: Path) -> None:
    pictures = load_pictures(folder)
    rows = pictures.rows
    sets = draw_sets(rows, 10, 3, ("style", "concept"), random.Random(0))
    assert len({one.rows for one in sets}) == 10
    for one in sets:
        styles, concepts = ({rows[i][key] for i in one.rows} for key in ("style", "concept"))
        assert (len(styles), len(concepts)) == ((1, 3) if one.kind == "style" else (3, 1))
    assert {one.kind for one in sets} == {"style", "concept"}
    with pytest.raises(ValueError, match="make no 50 different sets of 4"):
        draw_sets(rows, 50, 4, ("style",), random.Random(0))
    with pytest.raises(ValueError, match="kinds are of style, concept"):
        draw_sets(rows, 1, 2, ("story",), random.Random(0))
    with pytest.raises(ValueError, match="at least 1"):
        draw_sets(rows, 0, 2, ("style",), random.Random(0))
    learnt, held = split_concepts(pictures, 0.5)
    assert not {row["concept"] for row in learnt.rows} & {row["concept"] for row in held.rows}
    assert all(row["split"] == "train" for row in learnt.rows)


def test_captions_name_every_panel_in_its_place(folder: Path) -> None:
    rows = load_pictures(folder).rows
    dice = random.Random(0)
    told = set()
    for one in draw_sets(rows, 10, 3, ("style", "concept"), dice) * 6:
        some = [rows[i] for i in one.rows]
        captions = captions_of(some, one.kind, dice)
        for row, text in zip(some, captions.panels, strict=True):
            assert row["concept"] in (text if one.kind == "style" else f"{captions.about} {text}")
        told.add((one.kind, bool(captions.about), "," in captions.panels[0]))
    assert len(told) == 5, "shared words stand in one place, in every panel, or (a style) nowhere"


def test_canvases_hold_their_panels_in_the_order_of_the_caption(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["data"] |= {"shift": 0, "given": 0.0}
    trainer = begun(recipe, tmp_path)
    canvases: Any = trainer.train
    assert canvases.latents.shape == (6, 3, 32, 64)
    for i in range(6):
        order = canvases.orders[i, 0].tolist()
        canvas = canvases.canvases(canvases.pixels[[i]][:, order])[0]
        both = canvases.latents[i]
        for place, one in enumerate(order):
            assert canvas[:, :, 32 * place : 32 * place + 32].equal(both[:, :, 32 * one : 32 * one + 32])


def test_a_run_learns_and_the_base_keeps_every_byte(recipe: dict[str, Any], tmp_path: Path) -> None:
    files = {file: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    base = digest_of(load_network(tmp_path / "base"))
    trainer = PanelTrainer(recipe, tmp_path / "run", None, None)
    trainer.run()
    assert trainer.log[-1]["learnt"] < trainer.log[0]["learnt"]
    assert digest_of(trainer.model.base) == base
    assert {file: file.read_bytes() for file in (tmp_path / "base").iterdir()} == files
    assert all(name.startswith("adapter.") for name in trainer.master.names)
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert made == {"state.safetensors", "progress.json", "sheet.png", "sheets", "adapter"}
    assert Image.open(tmp_path / "run" / "sheet.png").size == (4 * 64 * 2, 32 * 2)
    network = load_network(tmp_path / "base")
    adapter: Any = load(tmp_path / "run" / "adapter" / FILE, network)
    assert adapter.control == InContextLoRA(rank=4, panels=2, arrangement="row")
    for name, value in trainer.master.averaged().items():
        torch.testing.assert_close(adapter.get_parameter(name.removeprefix("adapter.")), value)


def test_a_changed_base_is_never_saved(recipe: dict[str, Any], tmp_path: Path) -> None:
    trainer = begun(recipe, tmp_path / "run")
    with torch.no_grad():
        next(trainer.model.base.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="base has changed"):
        trainer.save()
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(recipe: dict[str, Any], tmp_path: Path) -> None:
    whole = begun(recipe, tmp_path / "whole")
    losses = [whole.step() for _ in range(6)]
    first = begun(recipe, tmp_path / "parts")
    parts = [first.step() for _ in range(3)]
    first.save()
    second = begun(recipe, tmp_path / "parts")
    assert second.seen == 12
    assert parts + [second.step() for _ in range(3)] == losses
    for mine, other in zip(whole.master.weights, second.master.weights, strict=True):
        assert torch.equal(mine, other)


def test_given_panels_are_seen_clean_and_not_learnt(recipe: dict[str, Any], tmp_path: Path) -> None:
    trainer = begun(recipe, tmp_path)
    dice = torch.Generator().manual_seed(0)
    latents, prompts = trainer.train.draw(2, 0.0, dice)
    noise, times = torch.randn(latents.shape, generator=dice), torch.tensor([0.4, 0.9])
    seen: list[tuple[Any, ...]] = []
    trainer.model.base.register_forward_pre_hook(lambda _, args: seen.append(args))
    loss = trainer.loss_beside([1], latents, prompts, noise, times)
    noisy, each = seen[0]
    assert noisy[..., 32:].equal(latents[..., 32:])
    torch.testing.assert_close(noisy[1, ..., :32], 0.1 * latents[1, ..., :32] + 0.9 * noise[1, ..., :32])
    grid = each.reshape(2, 4, 8)
    assert bool((grid[..., 4:] == 0).all())
    assert grid[:, 0, 0].tolist() == pytest.approx([400, 900])
    other = noise.clone()
    other[..., 32:] = 5.0
    assert trainer.loss_beside([1], latents, prompts, other, times).equal(loss)
    assert not trainer.loss_beside([0], latents, prompts, other, times).equal(loss)


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("run", {"compile": True}, "compile must be false"),
        ("adapter", {"panels": 0}, "panels must be"),
        ("data", {"gutter": 3}, "multiple of 16 px"),
        ("data", {"text_tokens": 4}, "their last panels would have no caption"),
        ("data", {"sets": 5000}, "make no 5000 different sets"),
    ],
)
def test_recipes_that_cannot_work_are_refused(
    recipe: dict[str, Any], tmp_path: Path, section: str, change: dict[str, Any], words: str
) -> None:
    recipe[section] |= change
    with pytest.raises(ValueError, match=words):
        begun(recipe, tmp_path)
