"""Reproduction gives a verdict and names the ingredient that differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from acceleration.delta_cache import DeltaCache
from pipelines import catalog
from pipelines.generate import generate
from pipelines.repro import compare, repro
from pipelines.request import Request, RequestError, model_name

Copy = Callable[..., Path]


@pytest.fixture
def saved(tiny: str, tmp_path: Path) -> Path:
    return generate(Request(prompt="a red cat", model=tiny, steps=3, seed=5)).save(tmp_path / "cat.png")[0]


def rewritten(
    path: Path, change: Callable[[dict[str, Any]], None], pixels: Callable[[Any], Any] = lambda x: x
) -> Path:
    with Image.open(path) as opened:
        data = json.loads(opened.text["leapfrog"])  # type: ignore[attr-defined]
        picture = Image.fromarray(pixels(np.asarray(opened.convert("RGB")).copy()))
    change(data)
    info = PngInfo()
    info.add_text("leapfrog", json.dumps(data))
    target = path.with_name("changed.png")
    picture.save(target, pnginfo=info)
    return target


def test_the_same_picture_is_identical(saved: Path, tiny: str) -> None:
    verdict = repro(saved, model=tiny)
    assert (verdict.verdict, verdict.differs, verdict.same) == ("identical", {}, True)
    assert repro(saved.with_suffix(".json"), model=tiny).verdict == "identical", "the sidecar is enough"


def test_an_accelerated_picture_is_identical_too(tiny: str, tmp_path: Path) -> None:
    request = Request(
        prompt="a cat",
        model=tiny,
        steps=6,
        seed=2,
        images=2,
        accelerators=(DeltaCache(interval=3, warmup=1),),
    )
    for path in generate(request).save(tmp_path / "cat.png"):
        assert repro(path, model=tiny).verdict == "identical"


def test_nothing_that_a_file_names_is_opened(saved: Path, tiny: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="confirmed by you with --model"):
        repro(saved)
    start = tmp_path / "start.png"
    Image.effect_noise((32, 32), 90).convert("RGB").save(start)
    (path,) = generate(Request(prompt="a", model=tiny, steps=2, image=str(start))).save(tmp_path / "from.png")
    with pytest.raises(RequestError, match=r"start\.png"):
        repro(path, model=tiny)
    assert repro(path, model=tiny, image=str(start)).verdict == "identical"
    Image.effect_noise((32, 32), 20).convert("RGB").save(start)
    verdict = repro(path, model=tiny, image=str(start))
    assert verdict.verdict == "different"
    assert set(verdict.differs) == {"starting picture"}


def test_other_weights_are_named(saved: Path, copy_of: Copy) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of("ours")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("proj_out.weight") or "proj_out" in key)
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, file, {"format": "pt"})
    verdict = repro(saved, model=str(folder))
    assert not verdict.same
    assert set(verdict.differs) == {"weights"}
    assert "weights: was sha256:" in str(verdict)


def test_ingredients_one_by_one(tiny: str) -> None:
    base = generate(Request(prompt="a cat", model=tiny, steps=4)).report
    for name, changed in {
        "dtype": {"effective": base["effective"] | {"dtype": "bfloat16"}},
        "device": {"effective": base["effective"] | {"device_name": "another"}},
        "version of torch": {"versions": base["versions"] | {"torch": "1.0"}},
        "setting scheduler": {"effective": base["effective"] | {"scheduler": "Other"}},
        "accelerators": {"run": base["run"] | {"computed": 1}},
        "weights": {"weights": "sha256:0"},
    }.items():
        assert set(compare(base, base | changed)) == {name}
    assert compare(base, base) == {}


def test_dtype_and_device_that_took_effect_are_taken_again(tiny: str, tmp_path: Path) -> None:
    (path,) = generate(Request(prompt="a cat", model=tiny, steps=3, dtype="bfloat16")).save(
        tmp_path / "half.png"
    )
    auto = rewritten(path, lambda data: data["request"].update(dtype="auto"))
    assert repro(auto, model=tiny).verdict == "identical"


def test_a_picture_within_noise(saved: Path, tiny: str) -> None:
    def nudge(pixels: Any) -> Any:
        pixels[::2] = np.where(pixels[::2] < 255, pixels[::2] + 1, 254)
        return pixels

    near = rewritten(saved, lambda data: data["report"].update(pixels="sha256:another"), nudge)
    verdict = repro(near, model=tiny)
    assert verdict.verdict == "within noise"
    assert verdict.largest == 1
    assert verdict.rms is not None
    assert 0 < verdict.rms <= 1


def test_an_altered_picture_is_different(saved: Path, tiny: str) -> None:
    painted = rewritten(saved, lambda _data: None, lambda pixels: 255 - pixels)
    verdict = repro(painted, model=tiny)
    assert verdict.verdict == "different"
    assert "the file's own pixels" in verdict.differs


def test_an_edited_request_is_different(saved: Path, tiny: str) -> None:
    verdict = repro(rewritten(saved, lambda data: data["request"].update(seed=6)), model=tiny)
    assert verdict.verdict == "different"
    assert verdict.rms is not None
    assert verdict.rms > 1


def test_a_damaged_report_is_no_crash(saved: Path, tiny: str) -> None:
    for broken in (
        {},
        {"effective": 5, "run": [], "versions": None, "image": "x"},
        {"effective": {"dtype": "int4", "device": "../x"}},
    ):
        verdict = repro(rewritten(saved, lambda data, broken=broken: data.update(report=broken)), model=tiny)  # type: ignore[misc]
        assert verdict.verdict == "within noise"
        assert verdict.rms == 0
    assert catalog.shipped() is not None


def test_a_file_tells_no_path_of_the_computer_and_is_remade_when_its_model_is_named(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "secret-person"
    folder = home / "models" / "own-model"
    folder.parent.mkdir(parents=True)
    shutil.copytree(tiny, folder)
    monkeypatch.chdir(home)
    for number, model in enumerate((str(folder), "models/own-model", "./models/../models/own-model")):
        result = generate(Request(prompt="a red cat", model=model, steps=2, seed=5))
        result.report["warnings"].append(f"read {folder}/transformer and {Path(model).absolute()}")
        path = result.save(tmp_path / f"{number}.png")[0]
        files = {one: one.read_bytes() for one in (path, path.with_suffix(".json"))}
        files[Path("clip.mp4")] = result.pictures[0].file(".mp4")  # type: ignore[assignment]
        for name, data in files.items():
            assert b"own-model" in data, name
            assert b"secret-person" not in data, name
            assert b"models/" not in data, name
        assert Request.from_file(path).model == "own-model"
        assert result.request.model == model, "the one who asked still has it"
        assert repro(path, model=str(folder)).verdict == "identical"
        with pytest.raises(RequestError, match="confirmed by you with --model"):
            repro(path)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("emoji", "emoji"), ("some-org/some-model", "some-org/some-model"), ("/home/ann/dit", "dit"), ("/home/ann/dit/", "dit"),
        ("~/dit", "dit"), ("../../dit", "dit"), ("C:\\Users\\ann\\dit", "dit"), ("\\\\host\\share\\dit", "dit"),
        ("~nobody-of-this-name/dit", "dit"),
    ],
)  # fmt: skip
def test_what_a_model_is_called_to_others(model: str, told: str) -> None:
    assert model_name(model) == told
