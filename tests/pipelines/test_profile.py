"""Profiles: read and written whole, found by name, act in their range alone, and leave their settings in the file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import catalog, profile
from pipelines.generate import generate
from pipelines.measure import compare
from pipelines.profile import Profile, Range
from pipelines.repro import repro
from pipelines.request import Request, RequestError

METHOD = "delta-cache:mode=whole,warmup=1,final_full=0,gate=mask,mask=101101"
EXPECTED = {
    "speedup_denoise": 1.4, "speedup_end_to_end": 1.3, "psnr_db": 31.0, "psnr_worst_db": 28.0, "ssim": 0.9, "pictures": 2,
}  # fmt: skip


@pytest.fixture
def made(tiny: str) -> Profile:
    (method,) = Request.from_dict({"prompt": "-", "accelerators": [METHOD]}).accelerators
    where = Range(
        weights=catalog.load(tiny).digest, scheduler="FlowMatchEulerDiscreteScheduler", steps=6, width=32, height=32,
        guided=True,
    )  # fmt: skip
    return Profile(
        model=tiny, budget="psnr>=30", range=where, accelerators=(method.to_dict(),), expected=EXPECTED
    )


@pytest.fixture
def file(made: Profile, tmp_path: Path) -> Path:
    path = tmp_path / "fast.json"
    made.save(path)
    return path


def request_for(model: str, file: Path | str, **more: Any) -> Request:
    values: dict[str, Any] = {
        "prompt": "a red cat", "model": model, "steps": 6, "guidance": 2.0, "width": 32, "height": 32, "profile": str(file)
    }  # fmt: skip
    return Request(**(values | more))


def test_round_trip(made: Profile, file: Path) -> None:
    assert profile.load(file) == made
    assert "31.0 dB (worst 28.0 dB) on 2 pictures" in str(made)


def test_the_same_pixels_as_with_its_settings_and_the_file_needs_no_profile(
    tiny: str, file: Path, tmp_path: Path
) -> None:
    request = request_for(tiny, file, images=2)
    result = generate(request)
    plain = generate(request.replace(profile=None, accelerators=(METHOD,)))
    exact = generate(request.replace(profile=None))
    pixels = [[one.report["pixels"] for one in run.pictures] for run in (result, plain, exact)]
    assert pixels[0] == pixels[1]
    assert pixels[0] != pixels[2]
    assert result.request.profile is None
    (saved, _) = result.save(tmp_path / "cat.png")
    file.unlink()
    again = Request.from_file(saved)
    assert (again.profile, str(again.accelerators[0])) == (None, str(plain.request.accelerators[0]))
    told = json.loads(saved.with_suffix(".json").read_text())["report"]["profile"]
    assert told == {"name": "fast.json", "budget": "psnr>=30", "expected": EXPECTED}
    assert repro(saved, model=tiny).verdict == "identical"


def test_a_comparison_takes_a_profile(tiny: str, file: Path) -> None:
    measured = compare(request_for(tiny, file), (), 1)
    assert str(measured.request.accelerators[0]).endswith("mask=101101")
    assert measured.predicted_speedup == pytest.approx(6 / 4)
    assert measured.results["exact"].report["exact"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 7}, "tuned for 6 steps, and this run has 7 steps"),
        ({"width": 48}, "width of 32 px, and this run has a width of 48 px"),
        ({"height": 48}, "height of 32 px"),
        ({"guidance": 1.0}, "guidance on, and this run has guidance off"),
        ({"scheduler": "heun"}, "FlowMatchHeunDiscreteScheduler"),
    ],
)
def test_outside_its_range_it_is_refused(tiny: str, file: Path, changes: dict[str, Any], words: str) -> None:
    request = request_for(tiny, file, **changes)
    with pytest.raises(RequestError, match="leapfrog tune --model") as caught:
        generate(request)
    assert caught.value.field == "profile"
    assert words in str(caught.value)


def test_other_weights_are_refused(copy_of: Callable[..., Path], file: Path) -> None:
    other = copy_of()
    config = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"shift": 3.0}))
    with pytest.raises(RequestError, match="tuned for the weights sha256"):
        generate(request_for(str(other), file))


def test_a_size_that_the_pipeline_chose_holds_where_it_chooses_again() -> None:
    chosen = Range(steps=6, width=32, height=32, own_size=True)
    here = Range(steps=6, own_size=True)
    assert chosen.difference(here) is None
    assert chosen.difference(Range(steps=6, width=32, height=32)) is None
    assert "leaves the size to the pipeline" in str(
        dataclasses.replace(chosen, own_size=False).difference(here)
    )


def test_what_tells_early_is_told_before_weights_load(
    tiny: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(catalog, "load_folder")
    with pytest.raises(RequestError, match="7 steps"):
        generate(request_for(tiny, file, steps=7))


def test_names_are_looked_up_and_never_clash(
    tiny: str, made: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    profile.FOLDER.mkdir()
    made.save(profile.FOLDER / "quick.json")
    dataclasses.replace(made, model="another").save(profile.FOLDER / "other.json")
    (profile.FOLDER / "broken.json").write_text("{")
    assert profile.known(tiny) == {"quick": made}
    assert generate(request_for(tiny, "quick")).request.accelerators
    with pytest.raises(RequestError, match="did you mean 'quick'"):
        generate(request_for(tiny, "quik"))
    with pytest.raises(RequestError, match="known name"):
        generate(request_for(tiny, "../profiles/quick"))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b"\xff", b'{"leapfrog_profile": 2}', b'{"leapfrog_profile": 1}',
        b'{"leapfrog_profile": 1, "range": {"tokens": 1}}',
    ],
)  # fmt: skip
def test_what_is_no_profile_is_refused(tiny: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        generate(request_for(tiny, file))
    assert caught.value.field == "profile"


def test_settings_that_this_version_does_not_know_are_refused(tiny: str, made: Profile, file: Path) -> None:
    values = made.to_dict()
    values["accelerators"] = [{"name": "delta-cache", "magic": 1}]
    file.write_text(json.dumps(values))
    with pytest.raises(RequestError, match="magic"):
        generate(request_for(tiny, file))


def test_what_cannot_go_together(tiny: str, file: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="left out where accelerators are given"):
        Request(prompt="a", profile="x", accelerators=("delta-cache",))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="starting picture"):
        generate(request_for(tiny, file, image=str(tmp_path / "a.png")))
    with pytest.raises(RequestError, match="known name"):
        generate(request_for(tiny, tmp_path / "missing.json"))
    trap = tmp_path / "trap.json"
    trap.write_text(json.dumps({"version": 1, "request": request_for(tiny, file).to_dict(), "report": {}}))
    with pytest.raises(RequestError, match="a file cannot choose what is opened"):
        repro(trap, model=tiny)
