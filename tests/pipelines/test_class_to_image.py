"""The class-conditional pipeline, with our network and codec or diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dit.backbones.dit import DiT
from pipelines.class_to_image import ClassToImagePipeline
from pipelines.generate import generate
from pipelines.request import Request, RequestError
from pipelines.schedulers import EPSILON, scheduler_for

Folder = Callable[[str], Path]


def network(**more: Any) -> DiT:
    torch.manual_seed(2)
    made = DiT(in_channels=3, patch_size=2, sample_size=8, width=32, depth=2, heads=2, num_classes=10, **more)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


@pytest.fixture
def pipe() -> ClassToImagePipeline:
    made = ClassToImagePipeline(transformer=network(), scheduler=diffusers.DDIMScheduler(clip_sample=False))
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, labels: Any = 4, seeds: Any = (3,), steps: int = 6, **more: Any) -> np.ndarray:
    return np.asarray(pipe(labels, seeds=seeds, num_inference_steps=steps, output_type="np", **more).images)


def test_saved_pipelines_draw_the_same_and_labels_act(pipe: Any, tmp_path: Path) -> None:
    first = draw(pipe)
    assert first.shape == (1, 8, 8, 3)
    pipe.save_pretrained(tmp_path / "dit")
    again = ClassToImagePipeline.from_pretrained(tmp_path / "dit")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(first, draw(again))
    assert not np.allclose(first, draw(pipe, 5), atol=1e-3)


def test_batch_and_guidance_mode_do_not_matter(pipe: Any) -> None:
    both = draw(pipe, [4, 7], (3, 4))
    assert np.allclose(both[1], draw(pipe, 7, (4,))[0], atol=2e-5)
    assert np.allclose(draw(pipe, guidance_mode="sequential"), draw(pipe), atol=2e-5)


def test_the_null_class_stands_for_no_class(pipe: Any) -> None:
    seen: list[list[int]] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _m, _a, kw: seen.append(kw["class_labels"].tolist()), with_kwargs=True
    )
    draw(pipe, steps=1)
    draw(pipe, steps=1, guidance_scale=1.0)
    assert seen == [[10, 4], [4]]
    for label in (-1, 10):
        with pytest.raises(RequestError, match="0 to 9"):
            draw(pipe, label)


def test_guidance_needs_a_null_class() -> None:
    made = ClassToImagePipeline(transformer=network(null_class=False), scheduler=diffusers.DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    with pytest.raises(RequestError, match="guidance"):
        draw(made)
    assert draw(made, steps=1, guidance_scale=1.0).shape == (1, 8, 8, 3)


@pytest.mark.parametrize("name", sorted(EPSILON))
def test_every_scheduler_finds_the_picture_of_a_perfect_network(
    name: str, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = diffusers.DDIMScheduler().alphas_cumprod
    data = torch.linspace(-0.8, 0.8, 3 * 8 * 8).reshape(1, 3, 8, 8)

    def perfect(hidden_states: Any, timestep: Any, class_labels: Any, return_dict: bool = True) -> tuple[Any]:
        alpha = torch.from_numpy(np.interp(timestep.double().numpy(), np.arange(1000), kept.numpy())).float()[
            :, None, None, None
        ]
        return ((hidden_states - alpha.sqrt() * data) / (1 - alpha).sqrt(),)

    monkeypatch.setattr(pipe.transformer, "forward", perfect)
    pipe.scheduler = scheduler_for(name, pipe.scheduler)
    assert type(pipe.scheduler).__name__ == EPSILON[name]
    drawn = draw(pipe, steps=50, guidance_scale=2.0)
    assert np.abs(drawn[0].transpose(2, 0, 1) - (data[0].numpy() / 2 + 0.5)).max() < 0.02


def test_noise_drawn_between_steps_belongs_to_each_picture(pipe: Any) -> None:
    pipe.scheduler = diffusers.DDPMScheduler(clip_sample=False)
    both = draw(pipe, [4, 7], (3, 4), steps=20)
    assert np.allclose(both[1], draw(pipe, 7, (4,), steps=20)[0], atol=1e-4)


def test_a_learned_variance_is_used_where_the_scheduler_asks(pipe: Any) -> None:
    pipe.scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range")
    learned = draw(pipe, steps=20)
    pipe.scheduler = diffusers.DDPMScheduler(clip_sample=False)
    assert not np.allclose(learned, draw(pipe, steps=20), atol=1e-4)
    assert (
        scheduler_for("dpm++2m", diffusers.DDPMScheduler(variance_type="learned_range")).config.variance_type
        is None
    )


def test_flow_models_and_refused_schedulers() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    made = ClassToImagePipeline(transformer=network(convention="sit"), scheduler=flow)
    made.set_progress_bar_config(disable=True)
    seen: list[float] = []
    made.transformer.register_forward_pre_hook(
        lambda _m, _a, kw: seen.append(float(kw["timestep"][0])), with_kwargs=True
    )
    assert np.isfinite(draw(made, steps=4)).all()
    assert seen[0] == 1000.0
    with pytest.raises(RequestError, match="flow-matching"):
        scheduler_for("ddim", flow)


def test_diffusers_network_and_autoencoder_fit(folder_of: Folder) -> None:
    theirs = diffusers.DiTPipeline.from_pretrained(folder_of("dit"))
    made = ClassToImagePipeline(transformer=theirs.transformer, scheduler=theirs.scheduler, vae=theirs.vae)
    for one in (made, theirs):
        one.set_progress_bar_config(disable=True)
    mine = draw(made, 4, steps=4, guidance_scale=3.0)
    yours = theirs(
        [4],
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="np",
    )
    assert np.allclose(mine, yours.images, atol=2e-5), "the same pictures as diffusers' own pipeline"


def test_our_class_pipeline_through_the_door(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "dit")
    result = generate(Request(model=str(tmp_path / "dit"), class_label=4, steps=3, guidance=2.0))
    assert result.images[0].size == (8, 8)
    with pytest.raises(RequestError, match="class number from 0 to 9"):
        generate(Request(model=str(tmp_path / "dit"), class_label=10))
    with pytest.raises(RequestError, match="takes no prompt"):
        generate(Request(model=str(tmp_path / "dit"), prompt="a cat"))
