"""The text-to-image pipeline: seeds, guidance, schedulers, interruption, images to start from, LoRA, saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from acceleration.base import accelerated
from acceleration.delta_cache import DeltaCache
from pipelines.request import RequestError
from pipelines.schedulers import FLOW, scheduler_for
from pipelines.text_to_image import TextToImagePipeline

Folder = Callable[[str], Path]
STEPS = 40


@pytest.fixture
def pipe(folder_of: Folder) -> TextToImagePipeline:
    made = TextToImagePipeline.from_pretrained(folder_of("ours"))
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, prompt: Any = "a red cat", seeds: Any = (3,), steps: int = 5, **more: Any) -> np.ndarray:
    return np.asarray(
        pipe(prompt, seeds=seeds, num_inference_steps=steps, **({"output_type": "np"} | more)).images
    )


def counted(pipe: Any) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    return calls


def test_saved_and_loaded_pipelines_draw_the_same(pipe: Any, tmp_path: Path) -> None:
    first = draw(pipe)
    pipe.save_pretrained(tmp_path / "again")
    assert np.array_equal(first, draw(TextToImagePipeline.from_pretrained(tmp_path / "again")))
    assert first.shape == (1, 32, 32, 3)
    assert first.std() > 0.01


def test_a_seed_decides_a_picture_whatever_its_batch(pipe: Any) -> None:
    prompts = ["a red cat", "the blue house", "a dog"]
    batch = draw(pipe, prompts, (3, 4, 5))
    for i in range(3):
        assert np.allclose(batch[i], draw(pipe, prompts[i], (3 + i,))[0], atol=2e-5), "alone as in the batch"
    assert not np.allclose(batch[0], draw(pipe, prompts[0], (9,))[0], atol=1e-3), (
        "another seed is another picture"
    )
    assert not np.allclose(batch[0], draw(pipe, prompts[2], (3,))[0], atol=1e-3), (
        "another prompt is another picture"
    )


def test_generators_and_seeds_agree(pipe: Any) -> None:
    generator = torch.Generator("cpu").manual_seed(3)
    assert np.array_equal(draw(pipe), draw(pipe, seeds=None, generator=generator))
    with pytest.raises(RequestError, match="seeds"):
        draw(pipe, seeds=(1, 2))
    with pytest.raises(RequestError, match="generator"):
        draw(pipe, seeds=(1,), generator=generator)


def test_guidance_in_one_call_and_in_two_agree(pipe: Any) -> None:
    batched = draw(pipe, guidance_mode="batched")
    calls = counted(pipe)
    sequential = draw(pipe, guidance_mode="sequential")
    assert np.allclose(batched, sequential, atol=2e-5)
    assert [len(one["hidden_states"]) for one in calls] == [1] * 10


def test_no_guidance_is_one_call_of_one_branch(pipe: Any) -> None:
    calls = counted(pipe)
    plain = draw(pipe, guidance_scale=1.0)
    assert [len(one["hidden_states"]) for one in calls] == [1] * 5
    assert not np.allclose(plain, draw(pipe, guidance_scale=4.0), atol=1e-3)
    assert len(calls[5]["hidden_states"]) == 2


def test_a_negative_prompt_acts(pipe: Any) -> None:
    assert not np.allclose(draw(pipe), draw(pipe, negative_prompt="a dog"), atol=1e-4)
    assert np.array_equal(draw(pipe), draw(pipe, negative_prompt=""))
    with pytest.raises(RequestError, match="negative_prompt"):
        draw(pipe, negative_prompt=["a", "b"])


@pytest.mark.parametrize("name", sorted(FLOW))
def test_every_scheduler_comes_near_the_same_picture(name: str, pipe: Any) -> None:
    many = draw(pipe, steps=STEPS, guidance_scale=1.5)
    pipe.scheduler = scheduler_for(name, pipe.scheduler)
    assert type(pipe.scheduler).__name__ == FLOW[name]
    calls = counted(pipe)
    other = draw(pipe, steps=STEPS, guidance_scale=1.5)
    assert np.sqrt(((many - other) ** 2).mean()) < 0.06
    assert len(calls) == (2 * STEPS - 1 if name == "heun" else STEPS)
    times = [float(one["timestep"][0]) for one in calls]
    assert times == sorted(times, reverse=True)
    assert 990 <= times[0] <= 1000
    assert times[-1] >= 0
    exact = [float(one) * 1000 for one in pipe.scheduler.sigmas[: len(times)]]
    assert np.allclose(times, exact, atol=1e-3), "the network hears the exact noise level, not a rounded one"


def test_heun_announces_a_step_twice(pipe: Any) -> None:
    pipe.scheduler = scheduler_for("heun", pipe.scheduler)
    with accelerated(pipe.transformer) as run:
        draw(pipe, steps=4, guidance_scale=1.0)
    cells = [(cell["step"], cell["evaluation"]) for cell in run.report().cells]
    assert cells == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]


@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_branches_and_steps_are_announced(mode: str, pipe: Any) -> None:
    with accelerated(pipe.transformer, DeltaCache(interval=2, warmup=1)) as run:
        draw(pipe, steps=6, guidance_mode=mode)
    report = run.report()
    names = {"batched": {"uncond+cond"}, "sequential": {"cond", "uncond"}}[mode]
    assert {cell["branch"] for cell in report.cells} == names
    assert report.steps == 6
    assert report.reused > 0


def test_interruption_stops_within_a_step_and_never_decodes(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, seen = counted(pipe), []
    monkeypatch.setattr(pipe.codec, "decode", lambda _: pytest.fail("decoded"))

    def stop(pipeline: Any, index: int, _time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        seen.append(index)
        pipeline._interrupt = index == 2
        return inputs

    assert pipe("a cat", seeds=[0], num_inference_steps=9, callback_on_step_end=stop).images == []
    assert seen == [0, 1, 2]
    assert len(calls) == 3
    monkeypatch.undo()
    assert len(pipe("a cat", seeds=[0], num_inference_steps=2).images) == 1, "the next run is not interrupted"


def test_a_callback_may_change_the_latents(pipe: Any) -> None:
    changed = draw(pipe, callback_on_step_end=lambda _p, _i, _t, given: {"latents": given["latents"] * 0})
    assert not np.allclose(changed, draw(pipe), atol=1e-3)
    assert np.array_equal(draw(pipe, callback_on_step_end=lambda *_: None), draw(pipe))


@pytest.mark.parametrize("scheduler", ["default", "heun", "dpm++2m", "unipc"])
def test_strength_says_how_far_to_go_from_a_picture(scheduler: str, pipe: Any) -> None:
    pipe.scheduler = scheduler_for(scheduler, pipe.scheduler)
    start = Image.new("RGB", (40, 40), (200, 30, 60))
    target = np.asarray(start.resize((32, 32)), dtype=np.float32) / 255
    calls = counted(pipe)
    gaps = []
    for strength in (0.1, 0.5, 1.0):
        calls.clear()
        gaps.append(float(np.abs(draw(pipe, steps=10, image=start, strength=strength)[0] - target).mean()))
        steps = round(10 * strength)
        assert len(calls) == (2 * steps - 1 if scheduler == "heun" else steps)
    assert gaps[0] < gaps[1] < gaps[2]
    assert gaps[0] < 0.1


def test_bad_arguments_are_refused_before_any_step(pipe: Any) -> None:
    calls = counted(pipe)
    for given, field in (
        ({"height": 33}, "height"), ({"width": 4}, "width"), ({"guidance_mode": "both"}, "guidance_mode"),
        ({"output_type": "jpeg"}, "output_type"), ({"steps": 0}, "num_inference_steps"),
        ({"image": Image.new("RGB", (8, 8)), "strength": 0.0}, "strength"),
    ):  # fmt: skip
        with pytest.raises(RequestError) as caught:
            draw(pipe, **given)
        assert caught.value.field == field
    assert not calls


def test_other_sizes_and_output_types(pipe: Any) -> None:
    assert draw(pipe, height=16, width=48).shape == (1, 16, 48, 3)
    (picture,) = pipe("a cat", seeds=[3], num_inference_steps=2).images
    array = draw(pipe, "a cat", steps=2)[0]
    assert np.array_equal(np.asarray(picture), np.rint(array * 255).astype(np.uint8))
    assert pipe("a cat", seeds=[3], num_inference_steps=2, output_type="latent").images.shape == (
        1,
        3,
        16,
        16,
    )
    assert pipe("a cat", seeds=[3], num_inference_steps=2, output_type="pt", return_dict=False)[0].shape == (
        1,
        3,
        32,
        32,
    )


def test_long_prompts_are_cut_and_counted(pipe: Any) -> None:
    found = pipe.encode_prompt(["cat " * 40])
    assert found.tokens.shape[1] == 16
    assert pipe.prompt_lengths == (42,)


def test_a_bf16_pipeline_is_close(folder_of: Folder, pipe: Any) -> None:
    half = TextToImagePipeline.from_pretrained(folder_of("ours"), dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.dtype == torch.bfloat16
    assert np.sqrt(((draw(half, guidance_scale=1.5) - draw(pipe, guidance_scale=1.5)) ** 2).mean()) < 0.05


def test_lora_round_trip(pipe: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    plain = draw(pipe)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "one"
    )
    with_lora = draw(pipe)
    assert not np.allclose(plain, with_lora, atol=1e-3)
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="one")
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    pipe.unload_lora_weights()
    assert np.allclose(plain, draw(pipe), atol=1e-5)
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".safetensors"
    pipe.load_lora_weights(tmp_path / file.name)
    assert np.allclose(with_lora, draw(pipe), atol=1e-5)
    pipe.unload_lora_weights()
    assert np.allclose(plain, draw(pipe), atol=1e-5)


def test_a_pickled_lora_is_refused(pipe: Any, tmp_path: Path) -> None:
    torch.save({"transformer.x.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(RequestError, match="pickle"):
        pipe.load_lora_weights(tmp_path / "lora.safetensors")


def test_a_pipeline_without_a_codec_works_on_pixels(pipe: Any) -> None:
    pixels = TextToImagePipeline(
        transformer=pipe.transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer,
    )  # fmt: skip
    pixels.set_progress_bar_config(disable=True)
    assert draw(pixels, height=32, width=32, steps=2).shape == (1, 32, 32, 3)
    start = Image.effect_noise((16, 16), 90).convert("RGB")
    near = draw(pixels, image=start, strength=0.01, steps=100)
    assert np.abs(near[0] - np.asarray(start, dtype=np.float32) / 255).mean() < 0.1


def test_the_shared_text_model_is_neither_saved_nor_lost(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit.text.load_minilm", lambda _dtype: (pipe.tokenizer, pipe.text_encoder))
    made = TextToImagePipeline(
        transformer=pipe.transformer,
        scheduler=pipe.scheduler,
        codec=pipe.codec,
        text_model="all-MiniLM-L6-v2",
        text_length=16,
    )
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small" / "text_encoder").exists()
    again = TextToImagePipeline.from_pretrained(tmp_path / "small")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(pipe), draw(again))
    with pytest.raises(ValueError, match="text_model"):
        TextToImagePipeline(transformer=pipe.transformer, scheduler=pipe.scheduler, text_model="other")


def test_diffusers_offload_and_placing_calls_work(pipe: Any) -> None:
    before = draw(pipe)
    pipe.to("cpu")
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert np.allclose(before, draw(pipe), atol=1e-6)
