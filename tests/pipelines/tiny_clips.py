"""Our two video pipelines at tiny size, and a film for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dit.backbones.mask2dit import Mask2DiT
from dit.backbones.vdt import VDT
from pipelines.generate import generate
from pipelines.request import Request
from pipelines.story_to_video import StoryToVideoPipeline
from pipelines.text_to_image import TextToImagePipeline
from pipelines.text_to_video import TextToVideoPipeline

SIDE = 16


def awake(network: Any) -> Any:
    """Fill what begins at zero, so that prompts, masks and blocks show."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def saved(kind: Any, network: Any, folder_of: Any, place: Path) -> str:
    parts = TextToImagePipeline.from_pretrained(folder_of("ours")).components
    kind(**(parts | {"transformer": awake(network)}), text_length=16).save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def clips(folder_of: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder of a tiny VDT: clips of 4 frames, 16 px, latents of half that size."""
    torch.manual_seed(0)
    network = VDT(
        in_channels=3, sample_size=8, frames=4, width=32, depth=2, heads=2, mlp_ratio=2.0, context_dim=16, clean_time=True
    )  # fmt: skip
    return saved(TextToVideoPipeline, network, folder_of, tmp_path_factory.mktemp("vdt") / "model")


@pytest.fixture(scope="module")
def stories(folder_of: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder of a tiny Mask2DiT of two scenes of 2 frames, 16 px."""
    torch.manual_seed(0)
    network = Mask2DiT(
        in_channels=3, sample_height=8, sample_width=8, frames=2, scenes=2, width=32, depth=2, heads=2, time_dim=12,
        context_dim=16, caption_length=16,
    )  # fmt: skip
    return saved(StoryToVideoPipeline, network, folder_of, tmp_path_factory.mktemp("story") / "model")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of four pictures of 16 px."""
    folder = tmp_path_factory.mktemp("film")
    for index, one in enumerate(
        np.random.default_rng(2).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    ):
        Image.fromarray(one).save(folder / f"{index}.png")
    return folder


def frames_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(one)) for one in sorted(folder.iterdir())])


def made(asked: Request, **more: Any) -> np.ndarray:
    return np.stack([np.asarray(one) for one in generate(asked, **more).pictures[0].frames])
