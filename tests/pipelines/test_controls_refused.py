"""Controls that are refused: bad pictures, adapters of other models and other weights, files that break; nothing is left behind."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from control import _files
from control.diffscaler import DiffScaler
from control.easycontrol import EasyControl
from control.lora import LoRA
from pipelines import catalog
from pipelines._planning import plan
from pipelines._steering_files import sketch
from pipelines.generate import generate
from pipelines.manifest import ManifestError
from pipelines.request import Request, RequestError

_place = importlib.util.spec_from_file_location("steered", Path(__file__).with_name("steered.py"))
assert _place is not None
assert _place.loader is not None
steered = importlib.util.module_from_spec(_place)
_place.loader.exec_module(steered)
Folder, written, place = steered.Folder, steered.written, steered.place
asked, pixels, refused = steered.asked, steered.pixels, steered.refused


def test_bad_pictures_are_refused_before_weights_load(
    place: Path, asked: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torn.png").write_bytes((place / "pic.png").read_bytes()[:60])
    for file, words in (("none.png", "readable"), ("black.png", "black all over")):
        assert words in refused(asked.replace(controls=(f"edges={place}/{file}",)), monkeypatch)
    assert "readable" in refused(asked.replace(controls=(f"edges={tmp_path}/torn.png",)), monkeypatch)
    assert "black all over" in refused(
        asked.replace(controls=(f"edges={place}/black.png:1,raw=true",)), monkeypatch
    )
    for region in ("black.png", "none.png"):
        text = f"edges={place}/pic.png:1,region={place}/{region}"
        assert refused(asked.replace(controls=(text,)), monkeypatch)


def test_a_folder_in_place_of_a_file_is_told_in_words(
    place: Path, asked: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "empty.png").write_bytes(b"")
    pic, here = place / "pic.png", str(place)
    region = f"{place}/style.safetensors:1,region={here}"
    for field, value, words in (
        ("controls", f"edges={here}", "a readable PNG, JPEG, WebP or BMP picture (is a directory)"),
        ("controls", f"edges={pic}:1,region={here}", "(is a directory)"),
        ("controls", f"{here}={pic}", "an adapter that is there: a .safetensors file"),
        ("loras", region, "(is a directory)"),
        ("loras", here, "an adapter that is there: a .safetensors file"),
    ):
        told = refused(asked.replace(**{field: (value,)}), monkeypatch)
        assert words in told
        assert "Errno" not in told
    told = refused(asked.replace(image=str(pic), mask=here, strength=1.0), monkeypatch)
    assert "the mask must be a readable PNG, JPEG, WebP or BMP picture (is a directory)" in told
    told = refused(asked.replace(controls=(f"edges={place}/empty.png",)), monkeypatch)
    assert "it is empty" in told


def test_adapters_that_do_not_fit_are_refused_before_weights_load(
    place: Path, asked: Request, folder_of: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pic = place / "pic.png"
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pth")
    flux = catalog.load(str(folder_of("flux"))).pipeline.transformer
    written(LoRA(rank=2), tmp_path / "flux.safetensors", flux)
    written(EasyControl(rank=2), tmp_path / "fluxed.safetensors", flux, {"condition": "canny"})
    save_file({"double_blocks.0.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "strange.safetensors")
    save_file(
        {
            f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.zeros(3, 3)
            for side in "AB"
        },
        tmp_path / "size.safetensors",
    )
    weights = load_file(place / "style.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: weights[first] * torch.nan}, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((place / "style.safetensors").read_bytes()[:900])
    for file, words in (
        ("old.pth", "pickle checkpoint"), ("flux.safetensors", "is for FluxTransformer2DModel"),
        ("strange.safetensors", "0/1 keys"),
        ("size.safetensors", "another size"), ("nan.safetensors", "no finite numbers"), ("cut.safetensors", "safetensors"),
        ("none.safetensors", "the model's own adapters are edges"),
    ):  # fmt: skip
        assert words in refused(asked.replace(loras=(f"{tmp_path}/{file}",)), monkeypatch)
    assert "is for Flux" in refused(
        asked.replace(controls=(f"{tmp_path}/fluxed.safetensors={pic}",)), monkeypatch
    )
    assert "did you mean 'edges'" in refused(asked.replace(controls=(f"edge={pic}",)), monkeypatch)
    assert "use --control" in refused(asked.replace(loras=("edges",)), monkeypatch)
    assert "@CONDITION or raw=true" in refused(
        asked.replace(controls=(f"{place}/style.safetensors={pic}",)), monkeypatch
    )
    dit = Request(class_label=3, model=str(folder_of("dit")), controls=(f"x={pic}",))
    assert "left out" in refused(dit, monkeypatch)


def test_another_base_is_told_by_its_digest_and_can_be_taken_all_the_same(
    place: Path, asked: Request, folder_of: Folder, tmp_path: Path
) -> None:
    network = sketch(place / "model")
    assert network is not None
    other = type(network).from_config(network.config)  # type: ignore[attr-defined]
    torch.manual_seed(9)
    for one in other.parameters():
        torch.nn.init.normal_(one, std=0.1)
    path = written(LoRA(rank=2), tmp_path / "foreign.safetensors", other)
    digest = _files.base_digest(other)
    with pytest.raises(RequestError, match=f"digest {digest}"):
        generate(asked.replace(loras=(str(path),)))
    assert generate(asked.replace(loras=(f"{path}:1,any_base=true",))).report["pixels"] != pixels(asked)


def test_a_failing_file_leaves_the_model_as_it_was(place: Path, asked: Request, tmp_path: Path) -> None:
    before = pixels(asked)
    network = catalog.load(asked.model).pipeline.transformer
    held = {name: dict(module.__dict__) for name, module in network.named_modules()}
    path = shutil.copy(place / "style.safetensors", tmp_path / "bad.safetensors")
    weights = load_file(path)
    last = list(weights)[-1]
    save_file(weights | {last: weights[last][:1, :1].contiguous()}, path)
    with pytest.raises(RequestError):
        generate(asked.replace(loras=(f"{place}/style.safetensors", str(path))))
    with pytest.raises(RequestError, match="instruction"):
        generate(asked.replace(controls=(f"edges={place}/pic.png:1,instruction=a cat",)))
    after = {name: dict(module.__dict__) for name, module in network.named_modules()}
    assert after.keys() == held.keys()
    assert all(after[name].keys() == held[name].keys() for name in held)
    assert pixels(asked) == before


def test_a_file_of_several_tasks_asks_for_one(place: Path, asked: Request, tmp_path: Path) -> None:
    network = catalog.load(asked.model).pipeline.transformer
    path = written(DiffScaler(tasks=("a", "b")), tmp_path / "tasks.safetensors", network)
    for text, words in ((f"{path}", "task=.., one of a, b"), (f"{path}:1,task=c", "no task 'c'")):
        with pytest.raises(RequestError, match=words):
            generate(asked.replace(loras=(text,)))
    assert pixels(asked.replace(loras=(f"{path}:1,task=a",))) != pixels(asked.replace(loras=(f"{path}:1,task=b",)))


def test_a_changed_file_is_read_again(place: Path, asked: Request, tmp_path: Path) -> None:
    path = tmp_path / "hot.safetensors"
    found = []
    for name in ("style", "other", "style"):
        shutil.copy(place / f"{name}.safetensors", path)
        found.append(pixels(asked.replace(loras=(str(path),))))
    assert found[0] == found[2] != found[1]


def test_a_manifest_names_adapters_that_do_not_fit_before_anything_is_made(
    place: Path, folder_of: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What `generate` would refuse in the middle of a batch is told with its line, however many rows name it."""
    for name in ("pic.png", "style.safetensors"):
        shutil.copy(place / name, tmp_path / name)
    flux = catalog.load(str(folder_of("flux"))).pipeline.transformer
    written(LoRA(rank=2), tmp_path / "flux.safetensors", flux)
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.safetensors")
    rows: list[dict[str, Any]] = [
        {"lora": "style.safetensors:0.5"}, {"lora": "flux.safetensors:0.5"}, {"lora": "flux.safetensors:0.7"},
        {"lora": "flux.safetensors:0"},  # off: it is not opened
        {"control": "edges=pic.png:0.8"}, {"control": "style.safetensors=pic.png"}, {"control": "edge=pic.png"},
        {"lora": "old.safetensors"},
    ]  # fmt: skip
    shared = {"prompt": "a red cat", "model": str(place / "model"), "steps": 4, "width": 32, "height": 32}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(shared | row) + "\n" for row in rows))
    monkeypatch.setattr(catalog, "load_folder", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ManifestError) as caught:
        plan(manifest, tmp_path / "out")
    found = [(one.line, one.field) for one in caught.value.problems]
    assert found == [(2, "loras"), (3, "loras"), (6, "controls"), (7, "controls"), (8, "loras")]
    for words in ("is for FluxTransformer2DModel", "@CONDITION or raw=true", "did you mean 'edges'", "pickle"):
        assert words in str(caught.value)
