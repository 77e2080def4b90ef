"""Controls, LoRAs and masks through the one door: text forms, adapters found and refused, reports, repeats, nothing left behind."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from control.easycontrol import EasyControl
from control.lora import LoRA
from pipelines import catalog, cli, controls, machine
from pipelines._jobs_keys import content_key
from pipelines.generate import generate
from pipelines.repro import repro
from pipelines.request import Request, RequestError

_place = importlib.util.spec_from_file_location("steered", Path(__file__).with_name("steered.py"))
assert _place is not None
assert _place.loader is not None
steered = importlib.util.module_from_spec(_place)
_place.loader.exec_module(steered)
Folder, written, place = steered.Folder, steered.written, steered.place
asked, pixels, refused = steered.asked, steered.pixels, steered.refused

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
    assert Request.from_file(path) == asked.replace(
        controls=("edges=pic.png:0.8",), loras=("style.safetensors:0.7",), model=Path(asked.model).name
    )
    assert str(place).encode() not in path.read_bytes(), "names, not places"
    assert str(place) not in path.with_suffix(".json").read_text()
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


def test_more_is_made_around_a_picture_that_stays_bit_for_bit(
    place: Path, asked: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Image.open(place / "start.png").crop((0, 0, 24, 24))
    known.save(tmp_path / "small.png")
    named = {"image": str(tmp_path / "small.png"), "mask": "outpaint:left=8,top=3,bottom=5"}
    found = generate(asked.replace(**named, strength=1.0))
    made = np.asarray(found.images[0])
    assert made.shape == (32, 32, 3)
    assert np.array_equal(made[3:27, 8:], np.asarray(known))
    assert made[:, :8].std() > 1, "what was added is made, not only carried on from the border"
    (path,) = found.save(tmp_path / "made.png")
    assert repro(path, model=asked.model, image=named["image"]).verdict == "identical", "no mask to be named"
    strange = asked.replace(image=named["image"], mask="outpaint:left=8", strength=1.0)
    assert "have 32x24 px" in refused(strange, monkeypatch)
    for mask, words in (
        ("outpaint:", "above 0"), ("outpaint:left=0,top=0", "above 0"), ("outpaint:lft=3", "did you mean 'left'"),
        ("outpaint:top=-1", "top must be"), ("outpaint:left=1e9", "left must be"), ("outpaint:../mask.png", "left=.."),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=re.escape(words)) as caught:
            asked.replace(image=named["image"], mask=mask)
        assert caught.value.field == "mask"
    with pytest.raises(RequestError, match="a picture or a clip"):
        asked.replace(clip="clip.mp4", mask="outpaint:left=8")


def test_more_is_made_around_a_picture_by_pipelines_of_diffusers(folder_of: Folder, place: Path) -> None:
    request = Request(
        prompt="a red cat", model=str(folder_of("flux")), steps=2, image=str(place / "start.png"), mask="outpaint:right=16",
        strength=1.0,
    )  # fmt: skip
    made = np.asarray(generate(request).images[0])
    assert made.shape == (32, 48, 3)
    assert np.array_equal(made[:, :32], np.asarray(Image.open(place / "start.png")))


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
    named = {
        "controls": ("edges=pic.png:0.8",),
        "loras": ("style.safetensors:0.7",),
        "model": Path(asked.model).name,
    }
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


def test_what_is_kept_of_a_picture_may_take_less_room(
    place: Path, asked: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EasyControl's keys and values in 8 bits, or in main memory: said in the request, done, told, and repeated by it."""
    control = f"edges={place}/pic.png:1"
    exact, small, moved = (
        generate(asked.replace(controls=(f"{control}{more}",))) for more in ("", ",storage=fp8", ",place=cpu")
    )
    told = [one.report["steering"]["bytes"] for one in (exact, small, moved)]
    assert told[0] == told[2] > 0
    assert told[0] / 4 <= told[1] < told[0] / 2, "of float32, with a scale of each head"
    assert moved.report["pixels"] == exact.report["pixels"] != small.report["pixels"]
    made, near = (np.asarray(one.images[0]).astype(float) for one in (exact, small))
    plain = np.asarray(generate(asked).images[0]).astype(float)
    assert np.abs(near - made).mean() < 0.5 * np.abs(plain - made).mean()
    again = Request.from_dict(json.loads(json.dumps(small.request.to_dict())))
    assert generate(again).report["pixels"] == small.report["pixels"]
    assert refused(asked.replace(controls=(f"rela={place}/pic.png:1,storage=fp8",)), monkeypatch).count(
        "keeps no keys"
    )
    with pytest.raises(RequestError, match="of one storage and place"):
        asked.replace(controls=(f"{control},storage=fp8", f"small={place}/pic.png"))
    with pytest.raises(RequestError, match="exact, fp8"):
        asked.replace(controls=(f"{control},storage=int4",))


def test_keys_of_requests_from_before_there_was_a_storage_stay_theirs(place: Path, asked: Request) -> None:
    values = asked.replace(controls=(f"edges={place}/pic.png:1",)).to_dict()
    older = {key: one for key, one in values["controls"][0].items() if key not in ("storage", "place")}
    whole = content_key(values, {})
    assert content_key(values | {"controls": [older]}, {}) == whole
    text = {name: one for name, one in values.items() if name != "metadata"} | {"controls": [older]}
    shown = json.dumps(text, sort_keys=True, separators=(",", ":"))
    assert whole == f"sha256:{hashlib.sha256(shown.encode()).hexdigest()}", "as it was made then"
    assert content_key(values | {"controls": [older | {"storage": "fp8"}]}, {}) != whole
