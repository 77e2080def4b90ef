"""A run of the trainer, tiny: its loss falls, it goes on where it was stopped, and its recipe decides everything."""

from __future__ import annotations

import copy
import importlib
import json
import os
import pkgutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import training
from dit.backbones.mmdit import MMDiT
from training import stopping, train
from training.train import SHEET, Trainer


@pytest.fixture
def recipe(folder: Path, words: list[str]) -> dict[str, Any]:
    return {
        "data": {
            "folder": str(folder),
            "size": 64,
            "styles": ["fluent3d", "fluentbw", "noto"],
            "subgroups": [],
            "concepts": ["dog", "apple", "red heart"],
            "wordings": 3,
            "text_tokens": 6,
            "drop": 0.1,
        },
        "model": {
            "backbone": "mmdit",
            "in_channels": 3,
            "patch_size": 8,
            "sample_size": 32,
            "width": 32,
            "heads": 2,
            "dual_depth": 1,
            "single_depth": 1,
            "context_dim": 16,
            "pooled_dim": 16,
            "prediction_type": "sample",
        },
        "codec": {"scale": 2},
        "objective": {"mean": 0.3, "std": 1.2, "floor": 0.05},
        "optimizer": {
            "name": "muon",
            "rate": 3e-3,
            "matrix_rate": 5e-3,
            "decay": 0.01,
            "clip": 1.0,
            "ema": 0.9,
            "warmup": 3,
            "cooldown": 0.5,
        },
        "run": {
            "samples": 96,
            "batch": 8,
            "precision": "float32",
            "compile": False,
            "save_every": 60.0,
            "check_every": 6,
            "seed": 1,
        },
    }


def begun(recipe: dict[str, Any], out: Path) -> Trainer:
    trainer = Trainer(copy.deepcopy(recipe), out, None, None)
    trainer.load_data()
    return trainer


def test_a_run_learns_and_leaves_what_it_should(
    recipe: dict[str, Any], tmp_path: Path, words: list[str]
) -> None:
    trainer = Trainer(recipe, tmp_path / "run", None, None)
    trainer.run()
    assert (trainer.seen, trainer.master.steps) == (96, 12)
    assert [entry["seen"] for entry in trainer.log] == [48, 96]
    assert trainer.log[1]["learnt"] < trainer.log[0]["learnt"]
    assert not [word for word in words if "rocket" in word and word not in SHEET], (
        "a concept that was not chosen"
    )

    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert made == {"state.safetensors", "progress.json", "sheet.png", "sheets", "transformer"}
    progress = json.loads((tmp_path / "run" / "progress.json").read_text())
    assert progress["seen"] == 96
    assert progress["log"] == trainer.log
    assert Image.open(tmp_path / "run" / "sheet.png").size == (4 * 32 * 4, 4 * 32 * 4)
    saved = MMDiT.from_pretrained(tmp_path / "run" / "transformer")
    for name, value in trainer.master.averaged().items():
        torch.testing.assert_close(saved.get_parameter(name), value)


def test_the_held_out_pair_is_never_learnt(recipe: dict[str, Any], tmp_path: Path) -> None:
    trainer = begun(recipe, tmp_path)
    assert (len(trainer.train.latents), len(trainer.held.latents)) == (8, 1)
    assert not any(torch.equal(one, trainer.held.latents[0]) for one in trainer.train.latents)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(recipe: dict[str, Any], tmp_path: Path) -> None:
    whole = begun(recipe, tmp_path / "whole")
    losses = [whole.step() for _ in range(6)]

    first = begun(recipe, tmp_path / "parts")
    parts = [first.step() for _ in range(3)]
    first.save()
    second = begun(recipe, tmp_path / "parts")
    assert second.seen == 24
    parts += [second.step() for _ in range(3)]

    assert parts == losses
    for mine, other in zip(whole.master.weights, second.master.weights, strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(whole.master.average, second.master.average, strict=True):
        assert torch.equal(mine, other)


def signalled(kind: type[Trainer], at: int, number: int) -> type[Trainer]:
    """Return a trainer whose process gets a signal in the middle of its step `at`."""

    class Signalled(kind):  # type: ignore[misc,valid-type]
        def step(self) -> float:
            if self.steps() == at - 1:
                os.kill(os.getpid(), number)
            return float(super().step())

    return Signalled


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_the_run_and_the_same_command_goes_on(
    recipe: dict[str, Any], tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = begun(recipe, tmp_path / "whole")
    for _ in range(5):
        whole.step()

    before = [signal.getsignal(one) for one in stopping.SIGNALS]
    stopped = signalled(Trainer, 3, number)(copy.deepcopy(recipe), tmp_path / "run", None, None)
    with pytest.raises(SystemExit) as ended:
        stopped.run()
    assert ended.value.code == 128 + number
    assert [signal.getsignal(one) for one in stopping.SIGNALS] == before
    assert "saved after 24 samples" in capsys.readouterr().err
    assert {"state.safetensors", "transformer"} <= {path.name for path in (tmp_path / "run").iterdir()}

    again = begun(recipe, tmp_path / "run")
    assert (again.seen, again.master.steps) == (24, 3)
    for _ in range(2):
        again.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.master.weights, again.master.weights, strict=True))


def test_a_second_signal_does_what_it_always_did() -> None:
    with stopping.heard() as came:
        os.kill(os.getpid(), signal.SIGINT)
        assert came == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_only_the_main_thread_listens() -> None:
    seen: list[Any] = []

    def inside() -> None:
        with stopping.heard() as came:
            seen.append((came, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [([], before)]


def test_every_trainer_is_stopped_in_the_same_way() -> None:
    for module in pkgutil.iter_modules(training.__path__):
        importlib.import_module(f"training.{module.name}")

    def below(kind: type) -> set[type]:
        return {one for child in kind.__subclasses__() for one in (child, *below(child))}

    found = {one for one in below(Trainer) if one.__module__.startswith("training.")}
    assert {one.__name__ for one in found} >= {"MotionTrainer", "AdapterTrainer", "Distiller", "PanelTrainer"}
    assert not [one.__name__ for one in found if {"run", "_train"} & set(vars(one))]


def test_checks_and_sheets_leave_no_trace_in_the_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    plain, looked_at = (begun(recipe, tmp_path / name) for name in ("a", "b"))
    first = looked_at.check()
    assert first == looked_at.check()
    looked_at.save()
    assert [plain.step() for _ in range(2)] == [looked_at.step() for _ in range(2)]


def test_a_broken_save_leaves_the_earlier_one(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = begun(recipe, tmp_path)
    trainer.step()
    trainer.save()
    before = (tmp_path / "state.safetensors").read_bytes()

    def torn(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    trainer.step()
    monkeypatch.setattr(train, "save_file", torn)
    with pytest.raises(OSError, match="No space"):
        trainer.save()
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert begun(recipe, tmp_path).master.steps == 1


def test_a_kill_between_two_files_leaves_counts_that_are_those_of_the_weights(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = begun(recipe, tmp_path)
    trainer.step()
    trainer.save()
    trainer.step()
    plain, moved = os.replace, []

    def killed(source: Path, target: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(Path(target).name)
        plain(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    monkeypatch.undo()
    assert moved == ["state.safetensors"]
    assert json.loads((tmp_path / "progress.json").read_text())["seen"] == 8, "the one for people is behind"
    again = Trainer(copy.deepcopy(recipe), tmp_path, None, None)
    assert (again.seen, again.master.steps) == (16, 2)


def test_a_run_of_an_earlier_version_goes_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    """It kept its counts in progress.json alone."""
    trainer = begun(recipe, tmp_path)
    trainer.step()
    trainer.save()
    save_file(load_file(tmp_path / "state.safetensors"), tmp_path / "state.safetensors")
    assert Trainer(copy.deepcopy(recipe), tmp_path, None, None).seen == 8


def test_the_recipe_decides_everything(recipe: dict[str, Any], tmp_path: Path) -> None:
    def weights(name: str, **run: Any) -> list[torch.Tensor]:
        changed = copy.deepcopy(recipe)
        changed["run"] |= run
        torch.manual_seed(hash(name) % 1000)
        trainer = begun(changed, tmp_path / name)
        for _ in range(2):
            trainer.step()
        return trainer.master.weights

    first = weights("a")
    assert all(torch.equal(a, b) for a, b in zip(first, weights("b"), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, weights("c", seed=2), strict=True))


def test_the_rate_warms_up_stays_and_falls(recipe: dict[str, Any], tmp_path: Path) -> None:
    trainer = Trainer(recipe, tmp_path, None, None)
    factors = []
    for steps, seen in ((0, 0), (1, 8), (2, 16), (6, 48), (9, 72), (12, 96)):
        trainer.master.steps, trainer.seen = steps, seen
        factors.append(trainer.factor())
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1 - 0.5**0.5, 0.02])


def test_by_the_clock_the_schedule_fits_into_the_minutes(recipe: dict[str, Any], tmp_path: Path) -> None:
    trainer = Trainer(recipe, tmp_path, 2.0, None)
    trainer.spent = 90.0
    assert trainer.progress() == pytest.approx(0.75)


def test_the_command_line_changes_single_settings(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(
        f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        for section, values in recipe.items()
    )
    (tmp_path / "tiny.toml").write_text(text)
    command = ["train", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", [*command, "--set", "run.samples=16", "--set", 'optimizer.name="adamw"'])
    train.main()
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert int(state["steps"]) == 2
    assert not any(name.startswith("optimizer.1.") for name in state), "AdamW alone"


def test_a_run_can_start_from_a_saved_transformer(recipe: dict[str, Any], tmp_path: Path) -> None:
    first = begun(recipe, tmp_path / "a")
    first.save()
    second = Trainer(copy.deepcopy(recipe), tmp_path / "b", None, tmp_path / "a" / "transformer")
    for mine, other in zip(first.master.average, second.master.weights, strict=True):
        torch.testing.assert_close(mine, other)
