"""PT-DiT in the text-to-image pipeline: words and a mask, no pooled prompt; saved and loaded by the catalog."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit.backbones.ptdit import PTDiT
from pipelines import catalog
from pipelines.text_to_image import TextToImagePipeline


@pytest.fixture(scope="module")
def folder(folder_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved pipeline: the tiny model's parts around a PT-DiT."""
    parts = TextToImagePipeline.from_pretrained(folder_of("ours")).components
    torch.manual_seed(0)
    network = PTDiT(
        in_channels=3,
        sample_size=16,
        width=32,
        depth=2,
        heads=2,
        context_dim=16,
        mixer="proxy:height=3,width=3",
    )
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    place = tmp_path_factory.mktemp("ptdit") / "model"
    TextToImagePipeline(**(parts | {"transformer": network.eval()}), text_length=16).save_pretrained(place)
    return place


def draw(pipe: Any, prompt: Any = "a red cat", seeds: Any = (3,), **more: Any) -> np.ndarray:
    return np.asarray(pipe(prompt, seeds=seeds, num_inference_steps=3, output_type="np", **more).images)


def test_the_catalog_loads_it_and_it_draws_any_size(folder: Path) -> None:
    loaded = catalog.load(str(folder))
    pipe = loaded.pipeline
    assert isinstance(pipe.transformer, PTDiT)
    assert (loaded.card.width, loaded.card.multiple) == (32, 4)
    picture = draw(pipe)
    assert picture.shape == (1, 32, 32, 3)
    assert picture.std() > 0.01
    assert draw(pipe, height=20, width=48).shape == (1, 20, 48, 3)
    catalog.unload()


def test_prompt_seed_and_company_decide_as_they_should(folder: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe)
    assert np.array_equal(plain, draw(pipe))
    assert np.allclose(plain, draw(pipe, guidance_mode="sequential"), atol=2e-5)
    assert np.allclose(plain[0], draw(pipe, ["a dog", "a red cat"], (9, 3))[1], atol=2e-5)
    assert not np.allclose(plain, draw(pipe, "a dog"), atol=1e-3)
    assert not np.allclose(plain, draw(pipe, seeds=(4,)), atol=1e-3)
