"""A result is saved whole or not at all, and its file gives the request back."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from acceleration.delta_cache import DeltaCache
from pipelines import result as module
from pipelines.metadata import LIMIT, read_metadata
from pipelines.request import Request, RequestError
from pipelines.result import Picture, Result, SaveError, check_target, pixel_hash, write_file

REQUEST = Request(prompt="a red cat – 猫", seed=4, accelerators=(DeltaCache(interval=3),))


def made(images: int = 1, size: int = 32, frames: int = 1, report: dict[str, Any] | None = None) -> Result:
    request = REQUEST.replace(images=images)
    pictures = tuple(
        Picture(
            tuple(Image.effect_noise((size, size), 50 + k).convert("RGB") for k in range(frames)),
            request.one(i),
            {"seed": i},
        )
        for i in range(images)
    )
    return Result(pictures, request, {"timings": {}} | (report or {}))


def test_saved_file_gives_the_request_and_the_pixels_back(tmp_path: Path) -> None:
    result = made()
    (path,) = result.save(tmp_path / "cat.png")
    assert Request.from_file(path) == REQUEST
    assert Request.from_file(path.with_suffix(".json")) == REQUEST
    with Image.open(path) as opened:
        assert pixel_hash([opened]) == pixel_hash(result.images)
        assert "a red cat – 猫" in opened.text["parameters"]  # type: ignore[attr-defined]
        assert set(json.loads(opened.text["leapfrog"])) == {"version", "request", "report"}  # type: ignore[attr-defined]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["cat.json", "cat.png"], (
        "no temporary file stays"
    )


def test_several_pictures_and_folders(tmp_path: Path) -> None:
    paths = made(3).save(tmp_path / "cat.png")
    assert [path.name for path in paths] == ["cat-1.png", "cat-2.png", "cat-3.png"]
    assert Request.from_file(paths[2]) == REQUEST.replace(seed=6), "each file remakes its own picture"
    first, second = made().save(tmp_path), made().save(tmp_path)
    assert [first[0].name, second[0].name] == ["a-red-cat-4.png", "a-red-cat-4-2.png"]


def test_a_clip_is_one_lossless_file(tmp_path: Path) -> None:
    result = made(frames=3)
    (path,) = result.save(tmp_path / "clip.png")
    with Image.open(path) as opened:
        assert opened.n_frames == 3  # type: ignore[attr-defined]
        frames = []
        for i in range(3):
            opened.seek(i)
            frames.append(opened.convert("RGB"))
    assert pixel_hash(frames) == pixel_hash(result.clips[0])
    assert Request.from_file(path) == REQUEST


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    made().save(tmp_path / "cat.png")
    before = (tmp_path / "cat.png").read_bytes()
    other = made(size=16)
    with pytest.raises(SaveError, match="there already"):
        other.save(tmp_path / "cat.png")
    assert (tmp_path / "cat.png").read_bytes() == before
    with pytest.raises(SaveError, match="there already"):
        check_target(tmp_path / "cat.png")
    other.save(tmp_path / "cat.png", overwrite=True)
    assert (tmp_path / "cat.png").read_bytes() != before


def test_a_sidecar_in_the_way_stops_the_picture_too(tmp_path: Path) -> None:
    (tmp_path / "cat.json").write_text("mine")
    with pytest.raises(SaveError, match="there already"):
        made().save(tmp_path / "cat.png")
    assert not (tmp_path / "cat.png").exists()


def test_a_race_for_a_name_has_one_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, fsync = tmp_path / "cat.png", os.fsync

    def other_process_first(handle: int) -> None:
        target.write_bytes(b"theirs")
        fsync(handle)

    monkeypatch.setattr(module.os, "fsync", other_process_first)
    with pytest.raises(SaveError, match="there already"):
        write_file(target, b"ours")
    assert target.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(SaveError, match="the disk is full") as caught:
        made().save(tmp_path / "cat.png")
    assert caught.value.full
    assert list(tmp_path.iterdir()) == []


SAVE = """
import sys, resource, signal
from pathlib import Path
from PIL import Image
from pipelines.request import Request
from pipelines.result import Picture, Result, SaveError
limit, target = int(sys.argv[1]), Path(sys.argv[2])
request = Request(prompt="a cat")
result = Result((Picture((Image.effect_noise((128, 128), 80).convert("RGB"),), request, {}),), request, {})
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    result.save(target)
except SaveError as error:
    print(error.full, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a Unix thing")
@pytest.mark.parametrize("limit", [1, 4096, 30_000])
def test_a_real_size_limit_leaves_nothing(limit: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAVE, str(limit), str(tmp_path / "a.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("True")
    assert "the disk is full" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(module.os, "open", refuse)
    with pytest.raises(SaveError, match="read-only") as caught:
        made().save(tmp_path / "cat.png")
    assert not caught.value.full


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs Unix permissions")
def test_a_folder_without_permission_says_so() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        code = (
            "import os, errno; from pathlib import Path\n"
            "from pipelines.result import check_target, write_file, SaveError\n"
            "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
            f"for act in (lambda: write_file(Path({name!r}) / 'a.png', b'x'), lambda: check_target(Path({name!r}))):\n"
            "    try: act()\n"
            "    except SaveError as error: print(error)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.count("you may not write there") == 2
        assert not list(Path(name).iterdir())


def test_a_folder_that_is_not_there_and_a_file_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="does not exist"):
        check_target(tmp_path / "no" / "cat.png")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match="part of the path is a file"):
        made().save(tmp_path / "file" / "cat.png")


KILLED = """
import os, signal, sys
from pathlib import Path
from pipelines import result as module
calls, wanted = 0, sys.argv[2]
def dying(name, real):
    def call(*args, **kwargs):
        if wanted == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
for name in ("fsync", "link", "rename", "replace"):
    setattr(module.os, name, dying(name, getattr(os, name)))
module.write_file(Path(sys.argv[1]), os.urandom(200_000), overwrite=sys.argv[3] == "over")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize(
    ("moment", "over"), [("fsync", ""), ("link", ""), ("fsync", "over"), ("replace", "over")]
)
def test_a_process_killed_in_a_save_leaves_the_old_file_or_none(
    moment: str, over: str, tmp_path: Path
) -> None:
    target = tmp_path / "cat.png"
    if over:
        target.write_bytes(b"the old picture")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), moment, over], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"the old picture" if over else not target.exists()
    assert all(one.name.endswith(".part") for one in tmp_path.iterdir() if one != target)


RANDOM = """
import os, sys
from pathlib import Path
from pipelines.result import write_file
print("ready", flush=True)
for i in range(10_000):
    write_file(Path(sys.argv[1]) / f"{i}.png", bytes([i % 256]) * 300_000)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_at_any_time_every_file_under_a_final_name_is_whole(tmp_path: Path) -> None:
    import time

    for delay in (0.003, 0.011, 0.024, 0.05):
        folder = tmp_path / str(delay)
        folder.mkdir()
        with subprocess.Popen([sys.executable, "-c", RANDOM, str(folder)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
        for file in folder.glob("*.png"):
            assert file.read_bytes() == bytes([int(file.stem) % 256]) * 300_000


def bad_file(path: Path, *chunks: tuple[bytes, bytes]) -> Path:
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        data += struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(data)
    return path


END = (b"IEND", b"")
BOMB = b"leapfrog\0\0" + zlib.compress(b"{" + b" " * 50_000_000)
FILES: dict[str, tuple[tuple[tuple[bytes, bytes], ...], str]] = {
    "a picture without a request": ((END,), "holds no request"),
    "another program's text": (((b"tEXt", b"parameters\0Steps: 3"), END), "holds no request"),
    "not JSON": (((b"tEXt", b"leapfrog\0{nonsense"), END), "not valid JSON"),
    "no dictionary": (((b"tEXt", b"leapfrog\0[1]"), END), "holds no request"),
    "a newer version": (((b"tEXt", b'leapfrog\0{"version": 99, "request": {}}'), END), "version 1"),
    "too much text": (((b"tEXt", b"leapfrog\0" + b" " * (LIMIT + 2000)), END), "1 MB"),
    "a bomb": (((b"zTXt", BOMB), END), "1 MB"),
    "cut off": (((b"tEXt", b"other\0x"),), "cut off"),
    "a field we do not know": (
        ((b"tEXt", b'leapfrog\0{"version": 1, "request": {"promt": "x"}}'), END),
        "did you mean 'prompt'",
    ),
    "a bad value": (
        ((b"tEXt", b'leapfrog\0{"version": 1, "request": {"prompt": "x", "guidance": NaN}}'), END),
        "guidance",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_metadata_is_data_with_limits(case: str, tmp_path: Path) -> None:
    chunks, words = FILES[case]
    with pytest.raises(RequestError, match=words):
        Request.from_file(bad_file(tmp_path / "x.png", *chunks))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="readable file"):
        Request.from_file(tmp_path / "nothing.png")
    with pytest.raises(RequestError, match="readable file"):
        Request.from_file(tmp_path)
    (tmp_path / "big.json").write_text(" " * (LIMIT + 2))
    with pytest.raises(RequestError, match="1 MB"):
        Request.from_file(tmp_path / "big.json")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(RequestError, match="not valid JSON"):
        Request.from_file(tmp_path / "deep.json")


def test_damage_is_noticed(tmp_path: Path) -> None:
    (path,) = made().save(tmp_path / "cat.png")
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"seed": 4', b'"seed": 5', 1))
    with pytest.raises(RequestError, match="checksum"):
        Request.from_file(path)


@pytest.mark.parametrize("packed", [True, False])
def test_text_rewritten_by_another_program_is_read(packed: bool, tmp_path: Path) -> None:
    (path,) = made().save(tmp_path / "cat.png")
    with Image.open(path) as opened:
        info = PngInfo()
        info.add_itxt("leapfrog", opened.text["leapfrog"], zip=packed)  # type: ignore[attr-defined]
        opened.save(tmp_path / "other.png", pnginfo=info)
    assert Request.from_file(tmp_path / "other.png") == REQUEST


def test_a_timeline_too_long_for_a_file_is_left_out_and_says_so(tmp_path: Path) -> None:
    picture = made().pictures[0]
    picture.report["run"] = {"computed": 5, "cells": ["C" * 1000] * 2000}
    (path,) = Result((picture,), REQUEST, {}).save(tmp_path / "cat.png")
    run = read_metadata(path)["report"]["run"]
    assert run["computed"] == 5
    assert "cells" not in run
    assert "1 MB" in run["cells_left_out"]
