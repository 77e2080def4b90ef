"""A model with adapters of its own and pictures to steer it by."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from control import _files
from control.base import Control
from control.easycontrol import EasyControl
from control.lora import LoRA
from control.relactrl import RelaCtrl
from control.unic_adapter import UNICAdapter
from pipelines import catalog
from pipelines.generate import generate
from pipelines.request import Request, RequestError

Folder = Callable[[str], Path]


def written(
    control: Control, path: Path, network: Any, about: dict[str, Any] | None = None, seed: int = 1
) -> Path:
    """Save an adapter with random weights that do something."""
    adapter = control.build(network)
    draw = torch.Generator().manual_seed(seed)
    for one in adapter.parameters():
        one.data = one.data + torch.randn(one.shape, generator=draw) * 0.3
    return _files.save(adapter, path, network, about)


@pytest.fixture(scope="module")
def place(folder_of: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with adapters of its own, and pictures beside it."""
    place = tmp_path_factory.mktemp("control")
    shutil.copytree(folder_of("ours"), place / "model")
    network = catalog.load(str(place / "model")).pipeline.transformer
    own = place / "model" / "adapters"
    own.mkdir()
    written(EasyControl(rank=4), own / "edges.safetensors", network, {"condition": "edges"})
    written(
        EasyControl(rank=2), own / "small.safetensors", network, {"condition": "masks", "size": 0.5}, seed=2
    )
    written(RelaCtrl(heads=1), own / "rela.safetensors", network, {"condition": "edges"}, seed=3)
    written(
        UNICAdapter(rank=2),
        own / "unic.safetensors",
        network,
        {"condition": "grey", "instruction": "a red cat"},
        seed=4,
    )
    written(LoRA(rank=4), place / "style.safetensors", network, seed=5)
    written(LoRA(rank=2), place / "other.safetensors", network, seed=6)
    image = Image.new("RGB", (50, 40), "white")
    ImageDraw.Draw(image).ellipse((8, 6, 34, 32), fill=(200, 30, 30))
    image.save(place / "pic.png")
    Image.new("RGB", (32, 32)).save(place / "black.png")
    Image.effect_noise((32, 32), 90).convert("RGB").save(place / "start.png")
    half = Image.new("L", (32, 32))
    half.paste(255, (0, 0, 16, 32))
    half.save(place / "half.png")
    return place


@pytest.fixture
def asked(place: Path) -> Request:
    return Request(prompt="a red cat", model=str(place / "model"), steps=4, width=32, height=32, seed=2)


def pixels(request: Request) -> str:
    return str(generate(request).report["pixels"])


# What is refused


def refused(request: Request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the words of a refusal that comes before any weights load."""
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "load_folder", lambda *_: pytest.fail("weights were loaded"))
        with pytest.raises(RequestError) as caught:
            generate(request)
    assert caught.value.field in ("controls", "loras", "mask")
    return str(caught.value)
