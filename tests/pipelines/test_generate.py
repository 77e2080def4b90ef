"""One door for every pipeline: ours and seven families of diffusers; progress, cancelling, reports, refusals."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from acceleration.delta_cache import DeltaCache
from pipelines import catalog
from pipelines.generate import Cancelled, Progress, check, generate
from pipelines.request import Request, RequestError
from pipelines.result import pixel_hash

Folder = Callable[[str], Path]
Copy = Callable[..., Path]
FAMILIES = ["ours", "flux", "sd3", "pixart", "sana", "wan", "lumina2", "dit"]


def wanted(name: str, folder_of: Folder, **more: Any) -> Request:
    task: dict[str, Any] = (
        {"class_label": 3} if name == "dit" else {"prompt": "a red cat", "width": 32, "height": 32}
    )
    if name == "wan":
        task["frames"] = 5
    return Request(**({"model": str(folder_of(name)), "steps": 4, "seed": 3} | task | more))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_goes_through_the_door(name: str, folder_of: Folder, tmp_path: Path) -> None:
    told: list[Progress] = []
    request = wanted(name, folder_of)
    result = generate(request, on_step=told.append)
    assert result.images[0].size == ((16, 16) if name == "dit" else (32, 32))
    assert len(result.clips[0]) == (5 if name == "wan" else 1)
    assert result.ok
    assert not result.report["warnings"]
    assert [one.phase for one in told] == ["load", "encode", *["denoise"] * 4, "decode"]
    assert [one.step for one in told if one.phase == "denoise"] == [1, 2, 3, 4]
    assert {one.steps for one in told if one.phase == "denoise"} == {4}
    run, effective = result.report["run"], result.report["effective"]
    assert run["computed"] == run["blocks"] * run["calls"]
    assert run["calls"] in (4, 8)
    assert (effective["steps"], effective["dtype"], effective["device"]) == (4, "float32", "cpu")
    (path,) = result.save(tmp_path / "x.png")
    assert Request.from_file(path).replace(model=request.model) == request, (
        "a file names the model without its folder"
    )
    again = generate(request)
    assert again.report["pixels"] == result.report["pixels"], "the same request gives the same pixels"
    assert generate(request.replace(seed=4)).report["pixels"] != result.report["pixels"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_accelerated_and_exact_again(name: str, folder_of: Folder) -> None:
    request = wanted(name, folder_of)
    exact = generate(request)
    fast = generate(
        request.replace(accelerators=(DeltaCache(interval=2, warmup=1, mode="rear", cached_fraction=0.5),))
    )
    assert fast.report["run"]["reused"] > 0
    assert fast.report["run"]["computed"] + fast.report["run"]["reused"] == exact.report["run"]["computed"]
    assert not fast.report["exact"]
    assert "delta-cache" in fast.report["summary"]
    assert generate(request).report["pixels"] == exact.report["pixels"], "switching off restores exactness"
    neutral = generate(request.replace(accelerators=(DeltaCache(interval=1),)))
    assert neutral.report["pixels"] == exact.report["pixels"]


def test_two_transformers_are_both_accelerated_and_reported(folder_of: Folder) -> None:
    request = wanted("wan22", folder_of, steps=12)
    exact = generate(request)
    fast = generate(
        request.replace(accelerators=(DeltaCache(interval=2, warmup=1, mode="whole", final_full=0),))
    )
    for name in ("run", "run_2"):
        assert exact.report[name]["calls"] == fast.report[name]["calls"] > 0
        assert exact.report[name]["reused"] == 0
        assert fast.report[name]["reused"] > 0
    assert fast.report["summary"].count("delta-cache") == 2
    assert generate(request).report["pixels"] == exact.report["pixels"]


@pytest.mark.parametrize("name", FAMILIES)
def test_cancelling_stops_within_a_step_and_never_decodes(
    name: str, folder_of: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = wanted(name, folder_of, steps=8)
    loaded = catalog.load(request.model)
    codec = getattr(loaded.pipeline, "codec", None) or loaded.pipeline.vae
    monkeypatch.setattr(codec, "decode", lambda *_, **__: pytest.fail("decoded"))
    calls: list[int] = []
    handle = loaded.pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(Cancelled, match="step 2 of 8"):
        generate(request, on_step=lambda told: told.step < 2)
    handle.remove()
    assert len(calls) in (2, 4)
    calls.clear()
    with pytest.raises(Cancelled):
        generate(request, on_step=lambda told: told.phase != "decode")
    monkeypatch.undo()
    hooks = loaded.pipeline.transformer._forward_hooks, loaded.pipeline.transformer._forward_pre_hooks
    assert hooks == ({}, {}), "nothing of a cancelled run stays attached"
    assert generate(request).ok


def test_cancelling_before_anything_is_loaded(tiny: str, forgotten: None) -> None:
    with pytest.raises(Cancelled):
        generate(Request(prompt="a cat", model=tiny), on_step=lambda _: False)
    assert not catalog._loaded


def test_pictures_of_a_request_can_be_made_alone(tiny: str, tmp_path: Path) -> None:
    several = generate(Request(prompt="a red cat", model=tiny, steps=3, seed=5, images=3))
    assert len({pixel_hash([one]) for one in several.images}) == 3
    for i, path in enumerate(several.save(tmp_path / "cat.png")):
        alone = generate(Request.from_file(path).replace(model=tiny))
        assert (
            alone.report["pixels"]
            == pixel_hash([several.images[i]])
            == several.report["pictures"][i]["pixels"]
        )
    timings = several.report["timings"]
    assert set(timings) == {"load", "encode", "denoise", "decode", "save"}
    assert timings["denoise"] == pytest.approx(
        sum(one.report["timings"]["denoise"] for one in several.pictures)
    )


def test_the_report_tells_what_took_effect(tiny: str) -> None:
    report = generate(Request(prompt="cat " * 60, model=tiny, steps=2, scheduler="unipc", guidance=2)).report
    assert report["requested"]["dtype"] == "auto"
    assert report["effective"]["dtype"] == "float32"
    assert report["effective"]["scheduler"] == "UniPCMultistepScheduler"
    assert report["effective"]["guidance"] == 2.0
    assert report["weights"].startswith("sha256:")
    assert {"torch", "diffusers", "python", "leapfrog"} <= set(report["versions"])
    assert report["peak_memory_mb"]["process"] > 10
    assert "62 tokens" in report["warnings"][0]
    assert "reads 16" in report["warnings"][0]
    json.dumps(report, allow_nan=False)


def test_the_models_own_scheduler_stands_again(tiny: str) -> None:
    before = catalog.load(tiny).pipeline.scheduler
    generate(Request(prompt="a cat", model=tiny, steps=2, scheduler="heun"))
    assert catalog.load(tiny).pipeline.scheduler is before
    assert type(before).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert before.step_index is None, "a run works on a scheduler of its own"


@pytest.mark.parametrize("name", ["sd3", "sana", "wan"])
def test_schedulers_can_be_chosen_for_others_too(name: str, folder_of: Folder) -> None:
    result = generate(wanted(name, folder_of, scheduler="dpm++2m"))
    assert result.report["effective"]["scheduler"] == "DPMSolverMultistepScheduler"


def test_a_scheduler_that_a_pipeline_cannot_drive_is_refused_in_words(folder_of: Folder) -> None:
    with pytest.raises(RequestError, match="scheduler must be one that this pipeline can drive"):
        generate(wanted("flux", folder_of, scheduler="heun"))
    with pytest.raises(RequestError, match="flow-matching"):
        generate(wanted("flux", folder_of, scheduler="ddim"))


@pytest.mark.parametrize("name", ["ours", "flux", "sd3"])
def test_starting_from_a_picture(name: str, folder_of: Folder, tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    Image.effect_noise((32, 32), 90).convert("RGB").save(start)
    request = wanted(name, folder_of, image=str(start), strength=0.5, steps=4)
    result = generate(request)
    assert result.images[0].size == (32, 32)
    assert result.report["run"]["steps"] == 2
    assert result.report["image"]["name"] == "start.png"
    assert result.report["pixels"] != generate(request.replace(image=None)).report["pixels"]


def test_a_bad_starting_picture_is_refused_before_loading(tiny: str, tmp_path: Path, forgotten: None) -> None:
    text, wide = tmp_path / "x.png", tmp_path / "wide.png"
    text.write_text("no picture")
    Image.new("L", (8, 8)).save(wide)
    huge = {}
    for side in (9_000, 10_000, 20_000):  # above our limit, above the library's warning, above its error
        data = bytearray(wide.read_bytes())
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        (tmp_path / f"{side}.png").write_bytes(data)
        huge[tmp_path / f"{side}.png"] = "64 million pixels"
    for path, words in {
        tmp_path / "none.png": "readable",
        text: "readable",
        tmp_path: "readable",
    }.items() | huge.items():
        with pytest.raises(RequestError, match=words) as caught:
            generate(Request(prompt="a cat", model=tiny, image=str(path)))
        assert caught.value.field == "image"


def test_a_pipeline_without_pictures_as_input_says_so(folder_of: Folder, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "start.png")
    with pytest.raises(RequestError, match="cannot start from a picture"):
        generate(wanted("dit", folder_of, image=str(tmp_path / "start.png")))


def test_sizes_are_checked_before_weights_load(tiny: str, folder_of: Folder, forgotten: None) -> None:
    for request, field, words in (
        (Request(prompt="a", model=tiny, width=36), "width", "multiple of 8"),
        (Request(prompt="a", model=str(folder_of("lumina2")), height=40), "height", "multiple of 16"),
        (Request(prompt="a", model=str(folder_of("wan")), height=36), "height", "multiple of 16"),
        (Request(prompt="a", model=tiny, frames=5), "frames", "still pictures"),
        (Request(class_label=1, model=tiny), "class_label", "takes a prompt"),
        (Request(prompt="a", model=str(folder_of("dit"))), "class_label", "0 to 999"),
        (Request(class_label=1000, model=str(folder_of("dit"))), "class_label", "0 to 999"),
    ):
        with pytest.raises(RequestError, match=words) as caught:
            generate(request)
        assert caught.value.field == field
    assert not catalog._loaded


def test_a_shipped_models_limits_are_kept() -> None:
    card = catalog.Card(name="small", multiple=8, low=64, high=128)
    check(Request(prompt="a", width=128, height=64), card)
    for side in (32, 136, 68):
        with pytest.raises(RequestError, match="from 64 to 128 px for small"):
            check(Request(prompt="a", width=side), card)


def test_fields_without_use_are_refused_not_ignored(folder_of: Folder) -> None:
    with pytest.raises(RequestError, match="width must be left out"):
        generate(wanted("dit", folder_of, width=32))
    with pytest.raises(RequestError, match="negative_prompt must be left out"):
        generate(wanted("dit", folder_of, negative_prompt="dog"))


def test_a_negative_prompt_reaches_flux_by_true_guidance(folder_of: Folder) -> None:
    request = wanted("flux", folder_of, negative_prompt="a dog", guidance=3.0)
    result = generate(request)
    assert result.report["run"]["calls"] == 8
    assert result.report["effective"]["guidance"] == 3.0


def test_an_accelerator_that_cannot_serve_is_refused_before_the_run(tiny: str) -> None:
    with pytest.raises(RequestError, match="no block 60"):
        generate(Request(prompt="a", model=tiny, accelerators=(DeltaCache(first_block=50, last_block=60),)))


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "NaN"), (0.0, "one colour")])
def test_nan_and_empty_pictures_are_never_a_success(
    value: float, words: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = catalog.load(tiny).pipeline.codec
    monkeypatch.setattr(codec, "decode", lambda latents: torch.full((1, 3, 32, 32), value))
    result = generate(Request(prompt="a cat", model=tiny, steps=2))
    assert not result.ok
    assert words in result.report["failures"][0]
    assert words in result.report["warnings"][-1]


def test_nan_in_a_foreign_pipeline_is_noticed_too(folder_of: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    request = wanted("sana", folder_of)
    transformer = catalog.load(request.model).pipeline.transformer
    inner = transformer.forward
    monkeypatch.setattr(transformer, "forward", lambda *a, **k: tuple(x * np.nan for x in inner(*a, **k)))
    assert "NaN" in generate(request).report["failures"][0]


def test_phases_add_up_to_the_time_of_the_run(tiny: str) -> None:
    import time

    start = time.perf_counter()
    result = generate(Request(prompt="a cat", model=tiny, steps=6))
    whole = time.perf_counter() - start
    assert 0.5 * whole < sum(result.report["timings"].values()) <= whole
