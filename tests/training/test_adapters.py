"""Training adapters, tiny: only their own weights move, the base keeps its bytes, a stopped run goes on, its file can be used."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from control import Refused, Use, controlled, load
from dit.backbones.mmdit import MMDiT
from dit.codec import ResampleCodec
from training import adapters, bases
from training.adapters import AdapterTrainer, check_recipe, moved
from training.bases import Base, base_of, weights_digest


def network(seed: int = 0) -> MMDiT:
    torch.manual_seed(seed)
    made = MMDiT(
        in_channels=3, patch_size=4, sample_size=32, width=32, heads=2, dual_depth=1, single_depth=1, context_dim=16,
        pooled_dim=16, prediction_type="sample",
    )  # fmt: skip
    for (
        one
    ) in made.parameters():  # an untrained network's last map is 0, and nothing would be learnt through it
        if not bool(one.detach().any()):
            torch.nn.init.normal_(one, std=0.05)
    return made


@pytest.fixture
def base(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Base:
    from training import train

    monkeypatch.setattr(bases, "encode", train.encode)  # the stand-in of `words`
    pipeline = SimpleNamespace(
        transformer=network(),
        codec=ResampleCodec(width=8, depth=1),
        tokenizer=None,
        text_encoder=None,
        config={},
    )
    return base_of(pipeline, "tiny")


@pytest.fixture
def recipe(adapter_recipe: dict[str, Any]) -> dict[str, Any]:
    return adapter_recipe


def begun(recipe: dict[str, Any], out: Path, base: Base) -> AdapterTrainer:
    trainer = AdapterTrainer(copy.deepcopy(recipe), out, None, base=base)
    trainer.load_data()
    return trainer


KINDS: list[dict[str, Any]] = [
    {"name": "easycontrol", "rank": 4},
    {"name": "relactrl", "heads": 2},
    {"name": "unic-adapter", "rank": 4},
    {"name": "lora", "rank": 4},
    {"name": "diffscaler", "rank": 2},
    {"name": "td-lora", "rank": 2, "experts": 2},
]


@pytest.mark.parametrize("settings", KINDS, ids=lambda one: one["name"])
def test_every_kind_learns_by_its_own_weights_alone(
    recipe: dict[str, Any], tmp_path: Path, base: Base, settings: dict[str, Any]
) -> None:
    recipe["control"] = settings
    if settings["name"] in ("lora", "diffscaler", "td-lora"):
        recipe["condition"] = {"kind": "none"}
    before = weights_digest(base.transformer)
    trainer = begun(recipe, tmp_path, base)
    started = {name: x.detach().clone() for name, x in trainer.model.named_parameters()}
    for _ in range(3):
        assert math.isfinite(trainer.step())
    assert weights_digest(base.transformer) == before
    assert all(one.grad is None and not one.requires_grad for one in base.transformer.parameters())
    changed = [name for name, x in trainer.model.named_parameters() if not torch.equal(x, started[name])]
    assert len(changed) > len(started) / 2
    trainer.save()

    loaded = load(tmp_path / "adapter.safetensors", base.transformer)
    assert loaded.control == trainer.model.control
    for name, value in trainer.master.averaged().items():
        torch.testing.assert_close(loaded.get_parameter(name), value)


def test_a_run_leaves_what_it_should_and_says_what_it_is(
    recipe: dict[str, Any], tmp_path: Path, base: Base
) -> None:
    trainer = AdapterTrainer(recipe, tmp_path / "run", None, base=base)
    trainer.run()
    assert (trainer.seen, trainer.master.steps) == (32, 8)
    assert [entry["seen"] for entry in trainer.log] == [16, 32]
    assert set(trainer.log[0]) >= {"loss", "learnt", "held_out", "shuffled", "without"}
    assert trainer.log[0]["without"] == trainer.log[1]["without"], "without the adapter nothing changes"
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert made == {"state.safetensors", "progress.json", "sheet.png", "sheets", "adapter.safetensors"}
    assert Image.open(tmp_path / "run" / "sheet.png").size == (64 * 2, 64 * 2 * 3), (
        "condition, made, real; one held out"
    )
    with safe_open(tmp_path / "run" / "adapter.safetensors", "pt") as opened:
        metadata = opened.metadata()
    about = json.loads(metadata["about"])
    assert (about["condition"], about["preprocessor"], about["seen"]) == ("edges", "canny", 32)
    assert metadata["base"] == trainer.digest
    assert json.loads(metadata["control"])["name"] == "easycontrol"


def test_the_saved_adapter_does_in_use_what_it_learnt(
    recipe: dict[str, Any], tmp_path: Path, base: Base
) -> None:
    recipe["run"]["samples"] = 400
    recipe["data"] |= {"copies": 1, "drop": 0.0}
    recipe["condition"]["drop"] = 0.0
    trainer = AdapterTrainer(recipe, tmp_path, None, base=base)
    trainer.run()
    dice = torch.Generator().manual_seed(5)
    drawn = trainer.draw(trainer.train, 32, dice, drop=False)
    noise, times = torch.randn(drawn[0].shape, generator=dice), torch.linspace(0.1, 0.9, 32)
    loaded = load(tmp_path / "adapter.safetensors", base.transformer)

    @torch.no_grad()
    def loss(condition: Tensor | None) -> float:
        def denoise(noisy: Tensor, level: Tensor) -> Tensor:
            return base.velocity(noisy, level, drawn[2])

        if condition is None:
            return float(trainer.objective.losses(denoise, drawn[0], noise, times).mean())
        with controlled(base.transformer, Use(loaded, condition)):
            return float(trainer.objective.losses(denoise, drawn[0], noise, times).mean())

    assert drawn[1] is not None
    true = loss(drawn[1])
    assert true < 0.9 * loss(None)
    assert true < loss(drawn[1].roll(1, 0)), "a bar's place is heard from its edges"


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    recipe: dict[str, Any], tmp_path: Path, base: Base
) -> None:
    whole = begun(recipe, tmp_path / "whole", base)
    losses = [whole.step() for _ in range(6)]
    first = begun(recipe, tmp_path / "parts", base)
    parts = [first.step() for _ in range(3)]
    first.save()
    second = begun(recipe, tmp_path / "parts", base)
    assert second.seen == 12
    parts += [second.step() for _ in range(3)]
    assert parts == losses
    for mine, other in zip(whole.master.weights, second.master.weights, strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(whole.master.average, second.master.average, strict=True):
        assert torch.equal(mine, other)


def test_a_run_beside_other_weights_or_with_other_settings_is_not_taken_up(
    recipe: dict[str, Any], tmp_path: Path, base: Base
) -> None:
    trainer = begun(recipe, tmp_path, base)
    trainer.step()
    trainer.save()
    other = copy.deepcopy(recipe)
    other["control"]["lora_weight"] = 0.5
    with pytest.raises(Refused, match=r"holds a run with control .* give another --out"):
        AdapterTrainer(other, tmp_path, None, base=base)
    base.transformer = base.pipeline.transformer = network(seed=9).eval().requires_grad_(False)
    with pytest.raises(Refused, match="holds a run with base"):
        AdapterTrainer(copy.deepcopy(recipe), tmp_path, None, base=base)


def test_a_run_starts_from_a_file_of_the_same_kind_only(
    recipe: dict[str, Any], tmp_path: Path, base: Base
) -> None:
    first = begun(recipe, tmp_path / "a", base)
    first.step()
    first.save()
    file = tmp_path / "a" / "adapter.safetensors"
    second = AdapterTrainer(copy.deepcopy(recipe), tmp_path / "b", None, file, base)
    for mine, other in zip(first.master.average, second.master.weights, strict=True):
        torch.testing.assert_close(mine, other)
    recipe["control"] = {"name": "lora"}
    recipe["condition"] = {"kind": "none"}
    with pytest.raises(Refused, match="the file holds easycontrol, the recipe asks for lora"):
        AdapterTrainer(copy.deepcopy(recipe), tmp_path / "c", None, file, base)


def test_numbers_that_are_none_are_refused_and_change_nothing(
    recipe: dict[str, Any], tmp_path: Path, base: Base
) -> None:
    trainer = begun(recipe, tmp_path, base)
    trainer.step()
    weights = [one.detach().clone() for one in trainer.master.weights]
    assert trainer.train.conditions is not None
    kept = trainer.train.conditions.clone()
    trainer.train.conditions[:] = math.nan
    with pytest.raises(Refused, match="condition holds values that are no finite numbers"):
        trainer.step()
    trainer.train.conditions[:] = kept
    trainer.train.latents[:] = math.nan
    with pytest.raises(FloatingPointError, match="the loss is nan in step 1"):
        trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.master.weights, strict=True))


def test_several_noises_of_a_picture_share_its_condition(
    recipe: dict[str, Any], tmp_path: Path, base: Base
) -> None:
    recipe["run"] |= {"batch": 8, "noises": 4}
    trainer = begun(recipe, tmp_path, base)
    seen: list[tuple[int, int]] = []
    inner = trainer.losses

    def losses(drawn: Any, noise: Tensor, times: Tensor) -> Tensor:
        assert torch.equal(drawn[0][:2], drawn[0][6:])
        seen.append((len(drawn[1]), len(noise)))
        alone = inner((drawn[0], drawn[1].repeat(4, 1, 1, 1), drawn[2]), noise, times)
        together = inner(drawn, noise, times)
        torch.testing.assert_close(alone, together)
        return together

    trainer.losses = losses  # type: ignore[method-assign]
    trainer.step()
    assert seen == [(2, 8)]
    assert trainer.seen == 8


def test_a_base_that_has_changed_is_not_saved_beside(
    recipe: dict[str, Any], tmp_path: Path, base: Base
) -> None:
    trainer = begun(recipe, tmp_path, base)
    with torch.no_grad():
        next(base.transformer.parameters()).view(-1)[0].add_(1e-3)
    with pytest.raises(RuntimeError, match="base's weights have changed"):
        trainer.save()
    assert not (tmp_path / "adapter.safetensors").exists()


def test_conditions_move_with_their_pictures_and_some_are_blank(
    recipe: dict[str, Any], tmp_path: Path, base: Base
) -> None:
    recipe["data"] |= {"copies": 6, "shift": 6}
    trainer = begun(recipe, tmp_path, base)
    assert len(trainer.train) == 6 * 11
    assert len(trainer.held) == 1
    latents, conditions = trainer.train.latents.float(), trainer.train.conditions
    assert conditions is not None
    tops = latents.mean(dim=(1, 3)) < 0.9  # rows of a bar on white
    lit = conditions.float().mean(dim=(1, 3)) > -0.9  # rows of its edges
    moves = 0
    for bar, edge in zip(tops, lit, strict=True):
        rows, lines = torch.nonzero(bar).flatten(), torch.nonzero(edge).flatten()
        ends = {int(rows.min()), int(rows.max())} - {0, 31}
        assert all(min(abs(int(line) - end) for end in ends) <= 1 for line in lines)
        moves += int(rows.min()) % 8 != 0
    assert moves > 20
    dice = torch.Generator().manual_seed(0)
    drawn = trainer.draw(trainer.train, 400, dice, drop=True)
    assert drawn[1] is not None
    blank = (drawn[1] == -1).flatten(1).all(dim=1).float().mean()
    assert 0.1 < float(blank) < 0.3
    empty = trainer.words["encoder_hidden_states"][0]
    unasked = (drawn[2]["encoder_hidden_states"] == empty).flatten(1).all(dim=1).float().mean()
    assert 0.1 < float(unasked) < 0.3


def test_scenes_are_learnt_with_their_exact_truth(recipe: dict[str, Any], tmp_path: Path, base: Base) -> None:
    recipe["data"] |= {"scenes": 40, "copies": 1, "shift": 0, "mirror": 0.0}
    recipe["condition"] = {"kind": "depth", "size": 0.5}
    trainer = begun(recipe, tmp_path, base)
    assert (len(trainer.train), len(trainer.held)) == (38, 2)
    assert trainer.train.conditions is not None
    assert trainer.train.conditions.shape[1:] == (3, 16, 16), "half the side of the picture's 32"
    assert math.isfinite(trainer.step())


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        (
            "condition",
            "kind",
            "pose",
            "condition.kind must be one of none, edges, masks, subject, got 'pose'",
        ),
        ("condition", "drop", 2, "condition.drop must be from 0 to 1, got 2"),
        ("condition", "size", 0, "condition.size must be above 0 and at most 1, got 0"),
        ("data", "mirror", -1, "data.mirror must be from 0 to 1, got -1"),
        ("run", "compile", True, "run.compile must be false"),
        ("run", "noises", 3, "run.noises must be a whole number that divides run.batch=4, got 3"),
    ],
)
def test_a_wrong_recipe_is_told_in_words(
    recipe: dict[str, Any], section: str, key: str, value: Any, words: str
) -> None:
    recipe["run"]["compile"] = False
    recipe[section][key] = value
    with pytest.raises(ValueError, match=words):
        check_recipe(recipe)


def test_the_command_line_reads_the_recipe(
    recipe: dict[str, Any], tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(
        f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        for section, values in recipe.items()
    )
    (tmp_path / "tiny.toml").write_text(text)
    monkeypatch.setattr(adapters, "load_base", lambda model: base)
    out = tmp_path / "run"
    monkeypatch.setattr(
        "sys.argv", ["adapters", str(tmp_path / "tiny.toml"), "--out", str(out), "--set", "run.samples=8"]
    )
    adapters.main()
    assert json.loads((out / "progress.json").read_text())["seen"] == 8


def test_pictures_are_moved_by_whole_pixels() -> None:
    picture = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(1, 3, 4, 4)
    down = moved(picture, [(-1, 0, False)], 255)
    assert torch.equal(down[0, :, 1:], picture[0, :, :-1])
    assert (down[0, :, 0] == 255).all()
    assert torch.equal(moved(picture, [(0, 0, True)], 0), picture.flip(-1))
