"""Clips in files: every format with its request inside, read with limits, remade by repro; damage is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import video_files
from pipelines.inspection import inspect
from pipelines.metadata import read_metadata
from pipelines.repro import repro
from pipelines.request import Request, RequestError
from pipelines.result import Picture, Result, SaveError, pixel_hash
from pipelines.video_files import FORMATS, LOSSY, encode, lossy_copy, read_clip


def moving(count: int = 6, width: int = 48, height: int = 32) -> list[Image.Image]:
    """Return a red square that moves over blue."""
    frames = []
    for index in range(count):
        one = np.full((height, width, 3), (30, 60, 200), np.uint8)
        one[8:20, 4 * index : 4 * index + 12] = (220, 40, 30)
        frames.append(Image.fromarray(one))
    return frames


def result(frames: list[Image.Image], fps: float = 12.0) -> Result:
    request = Request(prompt="a red square", frames=len(frames), fps=fps)
    report: dict[str, Any] = {"pixels": pixel_hash(frames), "effective": {"fps": fps}}
    return Result((Picture(tuple(frames), request, report),), request, report)


def rms(a: list[Image.Image], b: list[Image.Image]) -> float:
    gap = [np.asarray(x, float) - np.asarray(y, float) for x, y in zip(a, b, strict=True)]
    return float(np.sqrt(np.mean(np.square(gap))))


def test_an_mp4_does_not_depend_on_what_lay_in_memory() -> None:
    code = """
import hashlib, numpy as np
from PIL import Image
from pipelines.video_files import encode
y, x = np.mgrid[0:40, 0:72]
rng = np.random.default_rng(0)
frames = [128 + 40 * np.sin(x / 5 + k)[..., None] * [1, 0.5, -1] + rng.normal(0, 25, (40, 72, 3)) for k in range(20)]
frames = [Image.fromarray(one.clip(0, 255).astype("uint8")) for one in frames]
print(hashlib.sha256(encode(frames, ".mp4", 16.0, "{}")).hexdigest())
"""
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"MALLOC_PERTURB_": byte},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for byte in ("0", "1", "16", "85")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_request_report_and_frames_back(ending: str, tmp_path: Path) -> None:
    frames = moving()
    made = result(frames)
    (path,) = made.save(tmp_path / f"clip{ending}")
    assert path.name == f"clip{ending}"
    assert Request.from_file(path) == made.request == Request.from_file(tmp_path / "clip.json")
    assert read_metadata(path)["report"]["pixels"] == pixel_hash(frames)
    assert inspect(path)["kind"] == "picture"
    found, fps = read_clip(path)
    assert len(found) == 6
    assert found[0].size == (48, 32)
    assert rms(found, frames) < (8 if ending == ".mp4" else 2 if ending == ".gif" else 1e-9)
    assert fps is None if ending == ".frames" else fps == pytest.approx(12, rel=0.05)
    with pytest.raises(SaveError, match="there already"):
        made.save(path)
    made.save(path, overwrite=True)
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([path.name, "clip.json"]), (
        "nothing else is left"
    )


@pytest.mark.parametrize("ending", LOSSY)
def test_an_altered_lossy_file_is_told_from_an_untouched_one(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = moving()
    made = result(frames)
    (path,) = made.save(tmp_path / f"clip{ending}")
    remade = {"pixels": pixel_hash(frames), "effective": {"fps": 12.0}, "timings": {}}
    same = Result((Picture(tuple(frames), made.request, remade),), made.request, remade)
    monkeypatch.setattr("pipelines.repro.generate", lambda *_, **__: same)
    assert repro(path).verdict == "identical", "what the format loses is no alteration"
    other = [np.asarray(one).copy() for one in frames]
    other[3][:10, :10] = 255
    text = path.with_suffix(".json").read_text()
    path.write_bytes(encode([Image.fromarray(one) for one in other], ending, 12, text))
    verdict = repro(path)
    assert verdict.verdict == "different"
    assert list(verdict.differs) == ["the file's own pixels"]


def test_a_damaged_file_is_not_called_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = moving()
    made = result(frames)
    (path,) = made.save(tmp_path / "clip.mp4")
    for pixels in (pixel_hash(frames), "sha256:another"):
        remade = {"pixels": pixels, "effective": {"fps": 12.0}, "timings": {}}
        same = Result((Picture(tuple(frames), made.request, remade),), made.request, remade)
        monkeypatch.setattr("pipelines.repro.generate", lambda *_, same=same, **__: same)
        data = bytearray(path.read_bytes())
        start = data.index(b"mdat") + 4
        end = start - 8 + int.from_bytes(data[start - 8 : start - 4], "big")
        data[start:end] = bytes(end - start)
        broken = tmp_path / "broken.mp4"
        broken.write_bytes(bytes(data))
        broken.with_suffix(".json").write_text(path.with_suffix(".json").read_text())
        verdict = repro(broken)
        assert verdict.verdict == "different"
        assert "not readable: a clip whose frames can be decoded" in verdict.differs["the file's own pixels"]["is"]


def test_the_preview_is_the_middle_frame() -> None:
    frames = moving()
    assert result(frames).pictures[0].preview is frames[3]


@pytest.mark.parametrize("ending", LOSSY)
def test_lossy_files_are_the_same_every_time_and_of_odd_sizes_too(ending: str) -> None:
    for size in ((48, 32), (33, 47)):
        frames = moving(4, *size)
        assert encode(frames, ending, 10, "{}") == encode(frames, ending, 10, "{}")
        lost = lossy_copy(frames, ending)
        assert [one.size for one in lost] == [size] * 4
        assert rms(lost, frames) < 8


def test_colours_stay_in_an_mp4(tmp_path: Path) -> None:
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (90, 160, 70)):
        (one, *_) = lossy_copy([Image.new("RGB", (32, 32), colour)] * 3, ".mp4")
        assert np.abs(np.asarray(one, int) - colour).max() <= 4


@pytest.mark.parametrize("cut", [20, 60, 500, -400, -30])
@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_a_cut_file_is_refused_and_named(ending: str, cut: int, tmp_path: Path) -> None:
    path = tmp_path / f"x{ending}"
    data = encode(moving(), ending, 10, "{}")
    path.write_bytes(data[:cut])
    if ending == ".gif" and cut == -30:
        pytest.skip("the last bytes of a GIF end its last picture, which decodes without them")
    with pytest.raises(RequestError, match="x" + ending) as caught:
        read_clip(path)
    assert caught.value.field == "clip"


def test_files_without_a_request_say_so(tmp_path: Path) -> None:
    for ending, words in {".mp4": "holds no request|not valid JSON", ".gif": "holds no request"}.items():
        path = tmp_path / f"x{ending}"
        if ending == ".gif":
            moving()[0].save(path)
        else:
            path.write_bytes(encode(moving(), ending, 10, "a film"))
        with pytest.raises(RequestError, match=words):
            Request.from_file(path)
    (tmp_path / "bad.mp4").write_bytes(b"\0\0\0\x10ftypisom\0\0\0\0\xff\xff\xff\xffmoov")
    with pytest.raises(RequestError, match="cut off or damaged"):
        Request.from_file(tmp_path / "bad.mp4")


def test_limits_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ending in (".mp4", ".gif"):
        (tmp_path / f"x{ending}").write_bytes(encode(moving(), ending, 10, "{}"))
    for name, value, words in (
        ("FRAME_LIMIT", 5, "at most 5 frames"),
        ("PIXEL_LIMIT", 5000, "million pixels"),
        ("BYTE_LIMIT", 50, "MB"),
    ):
        monkeypatch.setattr(video_files, name, value)
        for ending in (".mp4", ".gif"):
            with pytest.raises(RequestError, match=words):
                read_clip(tmp_path / f"x{ending}")
        monkeypatch.undo()


def test_folders_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for index, one in enumerate(moving(12)):
        one.save(tmp_path / f"frame{index}.png")
    assert rms(read_clip(tmp_path)[0], moving(12)) == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "z.png")
    with pytest.raises(RequestError, match="8x8 px"):
        read_clip(tmp_path)
    (tmp_path / "z.png").write_bytes(b"no picture")
    with pytest.raises(RequestError, match=r"z\.png"):
        read_clip(tmp_path)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "none.mp4"):
        with pytest.raises(RequestError):
            read_clip(path)


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "mine.frames"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    with pytest.raises(SaveError, match="there already"):
        result(moving()).save(folder, overwrite=True)
    assert (folder / "letter.txt").read_text() == "dear"
    assert not list(tmp_path.glob(".*"))
