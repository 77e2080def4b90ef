"""Controls, LoRAs and masks through the one door: text forms, adapters found and refused, reports, repeats, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from control import _files
from control.base import Control
from control.easycontrol import EasyControl
from control.lora import LoRA
from control.relactrl import RelaCtrl
from control.unic_adapter import UNICAdapter
from pipelines import catalog, cli, controls, machine
from pipelines._steering_files import sketch
from pipelines.generate import generate
from pipelines.repro import repro
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


# Text forms


def test_text_dictionary_and_object_are_one(tmp_path: Path) -> None:
    texts = (
        "edges=pic.png:0.8",
        "edges@canny:low=0.02,high=0.5=a b,c.png:1,start=0.25,end=0.5,region=m.png",
        "./x.safetensors=C:\\pictures\\1.png,raw=true,curve=1/0.5/0",
    )
    request = Request(
        prompt="a", controls=texts, loras=("style.safetensors:0.7", "x.safetensors,start=0.5,task=cats")
    )
    first, second, third = (one.to_dict() for one in request.controls)
    assert (first["adapter"], first["file"], first["strength"]) == ("edges", "pic.png", 0.8)
    assert (second["condition"], second["file"], second["end"]) == (
        "canny:low=0.02,high=0.5",
        "a b,c.png",
        0.5,
    )
    assert (third["file"], third["raw"], third["curve"]) == ("C:\\pictures\\1.png", True, [1.0, 0.5, 0.0])
    again = Request.from_dict(json.loads(json.dumps(request.to_dict())))
    assert again == request
    texts_again = [one.text for one in request.controls]  # type: ignore[attr-defined]
    assert Request(prompt="a", controls=texts_again).controls == request.controls
    assert Request.from_dict({"prompt": "a"}).controls == (), "a file from before has none"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("edges", "no adapter in front of ="), ("=pic.png", "no adapter"), ("edges=", "no file"), ("edges=p.png:-1", "0 to 10"),
        ("edges=p.png:nan", "finite"), ("edges=p.png:99", "0 to 10"), ("edges=p.png:1,strat=2", "no setting strat"),
        ("edges@cany=p.png", "did you mean 'canny'"), ("edges@canny:low=7=p.png", "0 to 1"),
        ("edges=p.png:1,start=0.5,end=0.5", "below"),
        ("edges=p.png:1,curve=1", "2 to 1000"), ("edges=p.png:1,curve=a/b", "with / between"),
        ("edges@canny=p.png:1,raw=true", "raw"),
        ("edges=p\x00.png", "printable"), ("edges=" + "x" * 5000, "4096"),
    ],
)  # fmt: skip
def test_bad_texts_name_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(RequestError, match="controls must be") as caught:
        Request(prompt="a", controls=(text,))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_same_twice_and_too_many_are_refused() -> None:
    for field, values in (
        ("loras", ("x.safetensors:1", "x.safetensors:0.5")), ("controls", ("edges=a.png", "edges=a.png:1.0")),
        ("loras", [f"{i}.safetensors" for i in range(9)]), ("controls", 5), ("loras", (5,)),
        ("controls", ({"name": "control", "adapter": "a", "file": "b", "more": 1},)),
        ("loras", ({"name": "control", "file": "x"},)),
    ):  # fmt: skip
        with pytest.raises(RequestError) as caught:
            Request(prompt="a", **{field: values})  # type: ignore[arg-type]
        assert caught.value.field == field
    assert len(Request(prompt="a", controls=("edges=a.png", "edges=b.png")).controls) == 2, (
        "two pictures, one adapter"
    )


@settings(max_examples=60, deadline=None)
@given(
    st.from_regex(r"[a-z]{1,8}(\.safetensors)?", fullmatch=True), st.from_regex(r"[\w ,.()/-]{0,20}\w\.png", fullmatch=True),
    st.floats(0, 10), st.floats(0, 0.4), st.floats(0.5, 1),
)  # fmt: skip
def test_any_choice_survives_its_text(
    adapter: str, file: str, strength: float, start: float, end: float
) -> None:
    one = controls.ControlChoice(adapter=adapter, file=file.strip(), strength=strength, start=start, end=end)
    assert controls.read_all(controls.ControlChoice, one.text) == (one,)


# What it does


def test_controls_steer_and_leave_nothing_behind(place: Path, asked: Request, tmp_path: Path) -> None:
    plain = pixels(asked)
    request = asked.replace(
        controls=(f"edges={place}/pic.png:0.8",), loras=(f"{place}/style.safetensors:0.7",)
    )
    found = generate(request)
    rows = found.report["steering"]["parts"]
    assert found.report["pixels"] != plain
    assert [row["coverage"] for row in rows] == ["28/28 keys", "28/28 keys"]
    assert [row["strength"] for row in rows] == [0.8, 0.7]
    assert (rows[0]["made_by"], rows[0]["condition_size"]) == ("canny", [32, 32])
    assert rows[0]["acted"] == 4 * rows[0]["calls"] > 0, "four blocks hear it in every call"
    assert "edges 0.8 (28/28 keys)" in found.report["summary"]
    (path,) = found.save(tmp_path / "x.png")
    assert Request.from_file(path) == asked.replace(controls=("edges=pic.png:0.8",), loras=("style.safetensors:0.7",))
    assert str(place).encode() not in path.read_bytes().replace(asked.model.encode(), b""), "names, not places"
    assert str(place) not in path.with_suffix(".json").read_text().replace(asked.model, "")
    assert pixels(asked) == plain, "the next request knows nothing of it"
    assert pixels(request) == found.report["pixels"]
    assert pixels(asked.replace(controls=request.controls)) != found.report["pixels"], "the LoRA is gone too"


def test_strength_0_opens_and_changes_nothing(place: Path, asked: Request) -> None:
    off = asked.replace(
        controls=("none=nowhere.png:0", "edges=x.png:1,curve=0/0"), loras=("missing.safetensors:0",)
    )
    found = generate(off)
    assert found.report["pixels"] == pixels(asked)
    assert [row["calls"] for row in found.report["steering"]["parts"]] == [0, 0, 0]


def test_windows_curves_regions_and_several(place: Path, asked: Request) -> None:
    def calls(text: str) -> int:
        return int(generate(asked.replace(controls=(text,))).report["steering"]["parts"][0]["calls"])

    edges = f"edges={place}/pic.png:1"
    assert [
        calls(edges),
        calls(f"{edges},end=0.5"),
        calls(f"{edges},start=0.75"),
        calls(f"{edges},curve=1/0/0/0"),
    ] == [4, 2, 1, 1]
    whole, part = (
        pixels(asked.replace(controls=(text,))) for text in (edges, f"{edges},region={place}/half.png")
    )
    assert len({whole, part, pixels(asked)}) == 3
    both = generate(
        asked.replace(
            controls=(edges, f"small={place}/pic.png", f"rela={place}/pic.png:0.5", f"unic={place}/pic.png")
        )
    )
    rows = both.report["steering"]["parts"]
    assert [row["control"]["name"] for row in rows] == [
        "easycontrol",
        "easycontrol",
        "relactrl",
        "unic-adapter",
    ]
    assert all(row["acted"] for row in rows)
    assert rows[1]["condition_size"] == [16, 16], "a condition may be smaller, as it was trained"


def test_a_condition_may_be_chosen_or_given_raw(place: Path, asked: Request) -> None:
    def made(text: str) -> Any:
        return generate(asked.replace(controls=(text,))).report

    own, canny, grey = (made(f"edges{how}={place}/pic.png") for how in ("", "@canny", "@grey"))
    assert own["pixels"] == canny["pixels"] != grey["pixels"]
    shown = controls.preview("canny", place / "pic.png", (32, 32))
    shown.save(place / "lines.png")
    assert made(f"edges={place}/lines.png:1,raw=true")["pixels"] == own["pixels"], (
        "a preview is what the adapter is given"
    )


def test_several_pictures_share_one_pass(place: Path, asked: Request) -> None:
    request = asked.replace(controls=(f"edges={place}/pic.png",), images=3)
    found = generate(request)
    assert [row.report["steering"]["parts"][0].get("passes", 0) for row in found.pictures] == [1, 0, 0]
    assert found.pictures[2].report["pixels"] == pixels(request.one(2)), "and each can be made alone"


def test_accelerators_act_inside(place: Path, asked: Request) -> None:
    steered = asked.replace(controls=(f"edges={place}/pic.png",), loras=(f"{place}/style.safetensors:0.5",))
    exact = pixels(steered)
    neutral = generate(steered.replace(accelerators=("delta-cache:interval=1",)))
    assert neutral.report["pixels"] == exact
    fast = generate(
        steered.replace(accelerators=("delta-cache:interval=2,warmup=1,mode=rear,cached_fraction=0.5",))
    )
    assert fast.report["run"]["reused"] > 0
    assert fast.report["steering"]["parts"][0]["acted"] < 16, (
        "a block that is left out leaves out what it hears"
    )


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_diffusers_own_pipelines(name: str, folder_of: Folder, place: Path, tmp_path: Path) -> None:
    network = catalog.load(str(folder_of(name))).pipeline.transformer
    written(EasyControl(rank=2), tmp_path / "e.safetensors", network, {"condition": "canny"})
    written(LoRA(rank=2), tmp_path / "l.safetensors", network)
    plain = Request(prompt="a red cat", model=str(folder_of(name)), width=32, height=32, steps=2)
    text = f"{tmp_path}/e.safetensors={place}/pic.png"
    found = generate(plain.replace(controls=(text,), loras=(f"{tmp_path}/l.safetensors",)))
    assert found.report["pixels"] != pixels(plain)
    assert all(row["acted"] for row in found.report["steering"]["parts"])


# What is refused


def refused(request: Request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the words of a refusal that comes before any weights load."""
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "load_folder", lambda *_: pytest.fail("weights were loaded"))
        with pytest.raises(RequestError) as caught:
            generate(request)
    assert caught.value.field in ("controls", "loras", "mask")
    return str(caught.value)


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


def test_a_changed_file_is_read_again(place: Path, asked: Request, tmp_path: Path) -> None:
    path = tmp_path / "hot.safetensors"
    found = []
    for name in ("style", "other", "style"):
        shutil.copy(place / f"{name}.safetensors", path)
        found.append(pixels(asked.replace(loras=(str(path),))))
    assert found[0] == found[2] != found[1]


# Filling in


def test_the_known_part_stays_bit_for_bit(
    place: Path, asked: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked.replace(image=str(place / "start.png"), mask=str(place / "half.png"), strength=1.0)
    found = generate(request)
    made, known = (np.asarray(one) for one in (found.images[0], Image.open(place / "start.png")))
    assert np.array_equal(made[:, 16:], known[:, 16:])
    assert (made[:, :16] != known[:, :16]).mean() > 0.5
    assert found.report["mask"]["name"] == "half.png"
    whole = np.asarray(generate(request.replace(mask=None)).images[0])
    assert (made[:, :16] != whole[:, :16]).mean() > 0.1, "what is made hears the known part"
    for scheduler in ("heun", "unipc"):
        other = np.asarray(generate(request.replace(scheduler=scheduler)).images[0])
        assert np.array_equal(other[:, 16:], known[:, 16:])
    steered = generate(request.replace(controls=(f"edges={place}/pic.png",)))
    assert steered.report["pixels"] != found.report["pixels"]
    with pytest.raises(RequestError, match="given with"):
        asked.replace(mask="m.png")
    assert "black all over" in refused(request.replace(mask=str(place / "black.png")), monkeypatch)
    assert "of the shape" in refused(request.replace(mask=str(place / "pic.png")), monkeypatch)


def test_diffusers_own_filling(folder_of: Folder, place: Path) -> None:
    request = Request(
        prompt="a red cat", model=str(folder_of("flux")), width=32, height=32, steps=2, image=str(place / "start.png"),
        mask=str(place / "half.png"), strength=1.0,
    )  # fmt: skip
    found = generate(request)
    assert found.report["effective"]["pipeline"] == "FluxInpaintPipeline"
    assert np.array_equal(
        np.asarray(found.images[0])[:, 16:], np.asarray(Image.open(place / "start.png"))[:, 16:]
    )


# Files, repeats and the command


def test_reading_a_file_opens_nothing_and_repeating_it_needs_a_word(
    place: Path, asked: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pic = Path(shutil.copy(place / "pic.png", tmp_path / "pic.png"))
    lora = Path(shutil.copy(place / "style.safetensors", tmp_path / "style.safetensors"))
    named: dict[str, Any] = {"controls": (f"edges={pic}",), "loras": (f"{lora}:0.7",)}
    (path,) = generate(asked.replace(**named)).save(tmp_path / "made.png")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", lambda *_, **__: pytest.fail("a file was looked at"))
        Request.from_dict(json.loads(json.dumps(asked.replace(**named).to_dict())))
    with pytest.raises(RequestError, match="again with --control"):
        repro(path, model=asked.model)
    with pytest.raises(RequestError, match="again with --lora"):
        repro(path, model=asked.model, controls=named["controls"])
    assert repro(path, model=asked.model, **named).verdict == "identical"
    Image.open(pic).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(pic)
    shutil.copy(place / "other.safetensors", lora)
    verdict = repro(path, model=asked.model, **named)
    assert verdict.verdict == "different"
    assert {"adapter 2", "picture 1"} <= set(verdict.differs)


def test_the_command_and_inspect(
    place: Path,
    asked: Request,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "strangers", list)
    line = [
        "generate",
        "a red cat",
        "--model",
        asked.model,
        "--steps",
        "4",
        "--size",
        "32",
        "--seed",
        "2",
        "--output",
        "x.png",
    ]
    text = f"edges={place}/pic.png:0.8"
    assert cli.main([*line, "--control", text, "--lora", f"{place}/style.safetensors:0.7"]) == 0
    assert "edges 0.8 (28/28 keys)" in capsys.readouterr().err
    named = {"controls": ("edges=pic.png:0.8",), "loras": ("style.safetensors:0.7",)}
    assert Request.from_file("x.png") == asked.replace(**named)
    assert (
        cli.main(
            [
                "repro",
                "x.png",
                "--model",
                asked.model,
                "--control",
                text,
                "--lora",
                f"{place}/style.safetensors:0.7",
            ]
        )
        == 0
    )
    assert cli.main([*line, "--control", "edges"]) == 1
    start = [
        "--image",
        str(place / "start.png"),
        "--strength",
        "1",
        "--mask",
        str(place / "half.png"),
        "--overwrite",
    ]
    assert cli.main([*line, *start]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(place / "model/adapters/edges.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["adapter"]
    assert (found["family"], found["rank"], found["coverage"], found["fits"]) == (
        "easycontrol",
        4,
        "28/28 keys",
        "model",
    )
    assert found["condition"] == "canny"
    assert len(found["base"]) == 16


def test_a_models_own_adapters_are_listed_and_are_no_part_of_its_digest(
    place: Path, folder_of: Folder
) -> None:
    listed = controls.adapters(str(place / "model"))
    assert [one.name for one in listed] == ["edges", "rela", "small", "unic"]
    assert [one.condition for one in listed] == ["canny", "canny", "mask:threshold=0.0765,least=0", "grey"]
    assert listed[3].instruction == "a red cat"
    assert catalog.digest_of(place / "model") == catalog.digest_of(folder_of("ours"))
    with pytest.raises(RequestError, match="condition"):
        controls.preview("cany", place / "pic.png")
    with pytest.raises(RequestError, match="readable"):
        controls.preview("canny", place / "none.png")
