"""What a saved file tells: all, all but the prompts, or nothing; the pixels are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines import cli
from pipelines._jobs_keys import content_key
from pipelines.generate import generate
from pipelines.jobs import Item, Ledger
from pipelines.request import METADATA, WITHHELD, Request, RequestError
from pipelines.result import Picture, Result
from pipelines.workers import Worker

WORDS = {"prompt": "a secret heron", "negative_prompt": "hidden newt"}
SECRET = (b"heron", b"newt")


def result(level: str, frames: int = 1, **more: Any) -> Result:
    request = Request(model="emoji", seed=7, metadata=level, **(WORDS | more))
    report = {
        "effective": {"width": 16, "height": 16},
        "warnings": ["the prompt a secret heron was cut"],
        "pixels": "same",
    }
    pictures = tuple(Image.new("RGB", (16, 16), (9, place, 3)) for place in range(frames))
    return Result((Picture(pictures, request, report),), request, report)


@pytest.mark.parametrize("ending", ["", ".png", ".gif", ".mp4", ".frames"])
@pytest.mark.parametrize("level", METADATA)
def test_a_file_tells_what_it_may_and_no_more(tmp_path: Path, level: str, ending: str) -> None:
    if ending == ".mp4":
        pytest.importorskip("av")
    (file,) = result(level, 3 if ending in (".gif", ".mp4", ".frames") else 1).save(
        tmp_path / f"it{ending}" if ending else tmp_path
    )
    files = [one for one in tmp_path.rglob("*") if one.is_file()]
    told = b"".join(one.read_bytes() for one in files) + " ".join(map(str, files)).encode().replace(
        str(tmp_path).encode(), b""
    )
    assert any(word in told for word in SECRET) == (level == "full")
    assert file.with_suffix(".json").exists() == (level != "none")
    if level == "none":
        with pytest.raises(RequestError):
            Request.from_file(file)
        assert b"leapfrog" not in told
        return
    found = Request.from_file(file)
    assert (found.seed, found.metadata) == (7, level)
    assert (found.prompt, found.negative_prompt) == (
        tuple(WORDS.values()) if level == "full" else (WITHHELD, WITHHELD)
    )


def test_captions_of_several_scenes_are_withheld_too(tmp_path: Path) -> None:
    request = Request(model="emoji", prompts="a heron | a newt", metadata="prompt-free")
    report = {"panels": {"captions": ["a heron", "a newt"]}, "other": 3}
    picture = Picture((Image.new("RGB", (8, 8)),), request, report)
    (file,) = Result((picture,), request, report).save(tmp_path)
    told = file.with_suffix(".json").read_text()
    assert "heron" not in told and "newt" not in told  # noqa: PT018
    assert json.loads(told)["report"] == {"panels": {"captions": [WITHHELD, WITHHELD]}, "other": 3}


def test_the_level_changes_no_pixel_and_a_key_only_where_the_file_is_another(tiny: str) -> None:
    requests = [Request(prompt="a dog", model=tiny, steps=2, seed=1, metadata=level) for level in METADATA]
    assert len({generate(one).report["pixels"] for one in requests}) == 1
    keys = [content_key(one.to_dict(), {}) for one in requests]
    assert len(set(keys)) == 3
    whole = requests[0].to_dict()
    del whole["metadata"]
    assert content_key(whole, {}) == keys[0], "what was made before there was a choice is found again"
    with pytest.raises(RequestError, match="metadata must be"):
        Request(prompt="a", metadata="some")


def test_the_command_line_and_the_worker_keep_to_it(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", "a heron", "--model", tiny, "--steps", "2", "--metadata", "none", "--json"]
    assert cli.main([*asked, "--output", str(tmp_path / "cli.png")]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["report"]["seed"] == 0
    assert sorted(one.name for one in tmp_path.iterdir()) == ["cli.png"]
    ledger = Ledger(tmp_path / "jobs.sqlite")
    request = Request(prompt="a heron", model=tiny, steps=2, metadata="none")
    (row,) = ledger.add([Item(request=request.to_dict(), folder=str(tmp_path / "out"))])
    assert Worker(ledger).run(until_empty=True) == 1
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["picture-0.png"]
    done = ledger.get(row.name)
    assert done is not None
    assert Request.from_dict(done.item.request) == request, "the ledger still knows"
    for file in (tmp_path / "cli.png", tmp_path / "out" / "picture-0.png"):
        assert Image.open(file).info == {}
    ledger.close()
