"""What the command says when something cannot be done: before any work, about the option that was given, and what to do."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import cli, machine
from pipelines.request import Request, RequestError
from pipelines.result import SaveError, check_target

_place = importlib.util.spec_from_file_location("tiny_clips", Path(__file__).with_name("tiny_clips.py"))
assert _place is not None
assert _place.loader is not None
tiny_clips = importlib.util.module_from_spec(_place)
_place.loader.exec_module(tiny_clips)
clips = tiny_clips.clips
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "strangers", list)

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(list(arguments))
        except SystemExit as left:
            code = int(left.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be computed."""
    import pipelines.generate

    monkeypatch.setattr(pipelines.generate, "generate", lambda *_, **__: pytest.fail("computed"))


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    ("there", "output", "more"),
    [
        ("pair-2.png", "pair.png", ("--images", "2")),
        ("pair-1.json", "pair.png", ("--images", "2")),
        ("cat.png", "cat", ()),
        ("cat.v2.png", "cat.v2", ()),
        ("set-4.png", "set.png", ("--panels", "2", "--images", "2")),
    ],
)
def test_nothing_is_computed_where_one_of_the_files_is_there(
    there: str, output: str, more: tuple[str, ...], run: Run, tiny: str
) -> None:
    Path(there).write_text("mine")
    code, _, err = run("generate", "a | b", "--model", tiny, "--output", output, *more)
    assert code == 3
    assert f"{there} was not saved: the file is there already" in err
    assert Path(there).read_text() == "mine"


def test_a_file_that_is_not_written_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "pair.png").write_text("mine")
    check_target(tmp_path / "pair.png", pictures=2)
    check_target(tmp_path / "pair.png", overwrite=True)
    with pytest.raises(SaveError, match="there already"):
        check_target(tmp_path / "pair.png")


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", ["cat.jpg", "cat.WEBP", "clip.mov"])
def test_a_format_that_is_not_written_is_refused_before_the_work(name: str, run: Run, tiny: str) -> None:
    code, _, err = run("generate", "a cat", "--model", tiny, "--output", name)
    assert code == 1
    assert err == (
        "leapfrog: output must be a file that ends in .png, for clips also .mp4, .gif or .frames; "
        f"got '{name}'\n"
    )


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", ["still.mp4", "still.GIF", "still.frames"])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_still_picture_is_not_saved_as_a_clip(
    name: str, more: tuple[str, ...], run: Run, tiny: str
) -> None:
    code, _, err = run("generate", "a cat", "--model", tiny, "--output", name, *more)
    assert code == 1
    assert "output must be a file that ends in .png: " in err
    assert "makes still pictures, and this is for clips" in err


@pytest.mark.usefixtures("idle")
def test_a_folder_where_the_file_would_go_is_told_before_the_work(run: Run, tiny: str) -> None:
    Path("cat.png").mkdir()
    Path("dog.json").mkdir()
    Path("full.frames").mkdir()
    (Path("full.frames") / "mine.txt").write_text("mine")
    for name in ("cat.png", "dog.png", "full.frames"):
        code, _, err = run("generate", "a cat", "--model", tiny, "--output", name, "--overwrite")
        assert code == 3
        assert "a folder is in its place, which is not replaced" in err
    code, _, err = run("generate", "a cat", "--model", tiny, "--output", "new/")
    assert code == 1
    assert "output must be a folder that is there, or a file" in err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--output", "-"), "output must be a file or a folder"),
        (("--output", ""), "output must be a file or a folder"),
        (("--image", ""), "image must be given, or the option left out; got ''"),
        (("--mask", ""), "mask must be given, or the option left out; got ''"),
        (("--profile", " "), "profile must be given, or the option left out; got ' '"),
        (("--steps", ""), "steps must be given, or the option left out; got ''"),
        (("--profile", "torn.json"), "profile must be a file written by leapfrog tune (it holds no JSON)"),
        (("--seed", "-1"), "seed must be a whole number from 0 to 9007199254740991; got '-1'"),
        (("--guidance", "-1"), "guidance must be a number from 0 to 50 or none; got '-1'"),
    ],
)
def test_what_is_given_is_told_as_it_was_written(
    more: tuple[str, ...], words: str, run: Run, tiny: str
) -> None:
    Path("torn.json").write_text("no JSON")
    code, _, err = run("generate", "a cat", "--model", tiny, *more)
    assert code == 1
    assert words in err


def test_a_model_of_one_size_says_so(run: Run) -> None:
    code, _, err = run("generate", "a dog", "--size", "72", "--dry-run")
    assert code == 1
    assert err == "leapfrog: width must be 64 px, the only size for emoji; got 72\n"


@pytest.mark.usefixtures("idle")
def test_a_dry_run_looks_at_the_place_of_the_result(run: Run, tiny: str) -> None:
    Path("cat.png").write_text("mine")
    code, _, err = run("generate", "a cat", "--model", tiny, "--output", "cat.png", "--dry-run")
    assert code == 3
    assert "there already" in err
    assert run("generate", "a cat", "--model", tiny, "--output", "dog.png", "--dry-run")[0] == 0


def test_a_batch_names_files_that_it_will_not_write(run: Run, tiny: str, clips: str) -> None:
    rows = [
        {"prompt": "a cat", "model": tiny, "output": "a.png"},
        {"prompt": "a cat", "model": tiny, "seed": 1, "output": "b.mp4"},
        {"prompt": "a cat", "model": tiny, "seed": 2, "output": "c.jpg"},
        {"prompt": "a cat", "model": clips, "output": "d.mp4"},
    ]
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2] + rows[3:]))
    code, _, err = run("batch", "plan", "m.jsonl", "--output", "o")
    assert code == 1
    assert "1 problem" in err
    assert "line 2" in err
    assert "makes still pictures" in err
    Path("m.jsonl").write_text(json.dumps(rows[2]) + "\n")
    code, _, err = run("batch", "plan", "m.jsonl", "--output", "o")
    assert code == 1
    assert "c.jpg" in err


def test_a_batch_names_folders_and_empty_files_in_the_place_of_pictures(run: Run, tiny: str) -> None:
    Path("pictures").mkdir()
    Path("empty.png").write_bytes(b"")
    rows: list[dict[str, str]] = [
        {"image": "pictures"}, {"image": "empty.png"}, {"control": "edges=."}, {"control": "edges=empty.png"},
        {"lora": "./pictures"},
    ]  # fmt: skip
    Path("m.jsonl").write_text(
        "".join(json.dumps({"prompt": "a cat", "model": tiny} | row) + "\n" for row in rows)
    )
    code, _, err = run("batch", "plan", "m.jsonl", "--output", "o")
    assert code == 1
    assert "5 problems" in err
    assert (err.count("it is a folder"), err.count("it is empty")) == (3, 2)


def test_the_path_to_a_local_model_is_asked_for(run: Run, tiny: str) -> None:
    assert run("generate", "a cat", "--model", tiny, "--steps", "1", "--output", "cat.png")[0] == 0
    code, _, err = run("repro", "cat.png")
    assert code == 1
    assert "--model FOLDER, with the path to it" in err


def test_inspect_calls_a_clip_a_clip_and_other_files_by_what_they_are_not(run: Run, clips: str) -> None:
    more = ("--model", clips, "--steps", "1", "--output")
    for name, frames, kind in (
        ("clip.mp4", "4", "clip"),
        ("clip.frames", "4", "clip"),
        ("still.png", "1", "picture"),
    ):
        assert run("generate", "a cat", "--frames", frames, *more, name, "--overwrite")[0] == 0
        assert json.loads(run("inspect", name, "--json")[1])["kind"] == kind
    for name in ("notes.txt", "photo.jpg", "film.mov"):
        Path(name).write_text("hello")
        code, _, err = run("inspect", name)
        assert (code, "a .safetensors file, or a model folder" in err) == (1, True)
        assert "header" not in err


def test_a_file_where_a_batch_would_go_is_told(run: Run, tiny: str) -> None:
    Path("m.jsonl").write_text('{"prompt": "a cat"}\n')
    Path("taken").write_text("mine")
    for line in (
        ("plan", "m.jsonl", "--output", "taken", "--model", tiny),
        ("run", "m.jsonl", "--output", "taken/inner", "--model", tiny),
        ("status", "taken"),
    ):
        code, _, err = run("batch", *line)
        assert code == 1
        assert "folder must be a folder: a file is in its place" in err
        assert "Errno" not in err
        assert ".leapfrog" not in err
    assert Path("taken").read_text() == "mine"


def test_a_damaged_note_of_a_batch_is_told(run: Run) -> None:
    Path("o/.leapfrog").mkdir(parents=True)
    Path("o/.leapfrog/batch.json").write_text("{")
    code, _, err = run("batch", "status", "o")
    assert (code, "the whole note of a batch: it is damaged" in err) == (1, True)


def test_a_wrong_option_is_one_line(run: Run) -> None:
    for line in (("generate", "a cat", "--stepz", "3"), ("grid", "a cat", "--x")):
        code, _, err = run(*line)
        assert code == 1
        assert err.count("\n") == 1
        assert f"leapfrog {line[0]} --help shows what there is" in err or "leapfrog --help shows" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("edges=pic.png:1,storage=fp4", "storage must be one of exact, fp8"),
        ("edges=pic.png:-1", "strength must be a number from 0 to 10"),
        ("edges@blurr=pic.png", "did you mean 'blur'"),
    ],
)
def test_a_wrong_value_of_a_control_is_told_without_the_whole_form(text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        Request(prompt="a cat", controls=(text,))  # type: ignore[arg-type]
    assert "ADAPTER" not in str(caught.value)
    with pytest.raises(RequestError, match="written ADAPTER"):
        Request(prompt="a cat", controls=("=pic.png",))  # type: ignore[arg-type]
