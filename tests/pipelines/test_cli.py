"""The command: results on standard output, progress on standard error, exit codes that tell what happened."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from acceleration.delta_cache import DeltaCache
from pipelines import catalog, cli, machine
from pipelines.catalog import Unavailable
from pipelines.request import Request
from pipelines.result import SaveError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "strangers", list)

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main([one.replace("TINY", tiny) for one in arguments])
        except SystemExit as left:
            code = int(left.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_generate_writes_a_file_and_prints_its_name(run: Run) -> None:
    code, out, err = run(
        "generate", "a red cat", "--model", "TINY", "--steps", "3", "--seed", "7", "--output", "cat.png"
    )
    assert (code, out) == (0, "cat.png\n")
    assert "exact" in err
    request = Request.from_file("cat.png")
    assert (request.prompt, request.steps, request.seed) == ("a red cat", 3, 7)
    assert Path("cat.json").exists()


def test_every_option_reaches_the_request(run: Run, tiny: str) -> None:
    code, _, _ = run(
        "generate", "a red cat", "--negative", "dog", "--model", "TINY", "--size", "32x16", "--steps", "6", "--guidance", "2.5",
        "--seed", "9", "--images", "2", "--scheduler", "unipc", "--guidance-mode", "sequential", "--dtype", "float32", "--device",
        "cpu", "--accelerate", "delta-cache:interval=3,warmup=1", "--output", "x.png", "--quiet",
    )  # fmt: skip
    assert code == 0
    assert Request.from_file("x-2.png") == Request(
        prompt="a red cat", negative_prompt="dog", model=Path(tiny).name, width=32, height=16, steps=6, guidance=2.5, seed=10,
        scheduler="unipc", guidance_mode="sequential", dtype="float32", device="cpu",
        accelerators=(DeltaCache(interval=3, warmup=1),),
    )  # fmt: skip


def test_a_starting_picture(run: Run) -> None:
    Image.effect_noise((32, 32), 90).convert("RGB").save("start.png")
    code, _, _ = run(
        "generate", "a cat", "--model", "TINY", "--steps", "4", "--image", "start.png", "--strength", "0.5"
    )
    assert code == 0
    assert Request.from_file("a-cat-0.png").strength == 0.5


def test_json_is_one_object(run: Run) -> None:
    code, out, _ = run("generate", "a cat", "--model", "TINY", "--steps", "2", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["files"] == ["a-cat-0.png"]
    assert found["report"]["effective"]["steps"] == 2


def test_a_whole_request_from_standard_input(run: Run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(prompt="a dog", model=tiny, steps=2, seed=4)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request.to_dict())))
    assert run("generate", "-", "--seed", "5", "--output", "dog.png")[0] == 0
    assert Request.from_file("dog.png") == request.replace(seed=5, model=Path(tiny).name), (
        "a flag wins over the request"
    )
    for text in ("not json", "[1]", "", '{"prompt": "x", "sed": 1}'):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert run("generate", "-")[0] == 1


BAD = [
    ([], "prompt must be"),
    ([""], "prompt must be"),
    (["x" * 10_000], "at most 2000"),
    (["a", "--guidance", "nan"], "guidance must be"),
    (["a", "--seed", "-1"], "seed must be"),
    (["a", "--seed", "one"], "seed must be"),
    (["a", "--steps", "0"], "steps must be"),
    (["a", "--width", "33"], "width must be a multiple of 8"),
    (["a", "--size", "9999"], "width must be"),
    (["a", "--size", "32x"], "size must be"),
    (["a", "--size", "axb"], "width must be"),
    (["a", "--model", "emojy"], "no shipped model"),
    (["a", "--model", "."], "is no model"),
    (["a", "--accelerate", "no-such"], "accelerators must be"),
    (["a", "--accelerate", "delta-cache:interval=0"], "interval"),
    (["a", "--scheduler", "fast"], "scheduler must be one of"),
    (["a", "--scheduler", "ddim"], "flow-matching"),
    (["a", "--image", "missing.png"], "image must be"),
    (["a", "--class", "3"], "prompt must be empty"),
    (["a", "--nonsense"], "unrecognized"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input_is_exit_code_1_and_writes_nothing(arguments: list[str], words: str, run: Run) -> None:
    given = arguments if "--model" in arguments else [*arguments, "--model", "TINY"]
    code, out, err = run("generate", *given)
    assert code == 1
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert not list(Path().glob("*.png"))


def test_errors_as_json(run: Run) -> None:
    code, out, _ = run("generate", "a", "--seed", "-1", "--json")
    assert code == 1
    assert json.loads(out)["error"]["field"] == "seed"


def test_a_dry_run_checks_everything_and_makes_nothing(run: Run) -> None:
    code, out, _ = run("generate", "a cat", "--model", "TINY", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["model"]["width"] == 32
    assert run("generate", "a cat", "--model", "TINY", "--width", "33", "--dry-run")[0] == 1
    assert run("generate", "a cat", "--model", "someone/model", "--dry-run")[0] == 0, "a dry run asks no hub"
    assert not list(Path().iterdir())


def test_nothing_is_computed_for_a_file_that_cannot_be_saved(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipelines.generate

    Path("cat.png").write_text("mine")
    monkeypatch.setattr(pipelines.generate, "generate", lambda *_, **__: pytest.fail("computed"))
    code, _, err = run("generate", "a cat", "--model", "TINY", "--output", "cat.png")
    assert code == 3
    assert "there already" in err
    assert run("generate", "a cat", "--model", "TINY", "--output", "no/folder/cat.png")[0] == 3
    assert Path("cat.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SaveError(Path("x.png"), OSError(28, "no space")), 4),
        (SaveError(Path("x.png"), OSError(30, "read-only")), 3),
        (Unavailable("no hub"), 3),
        (ImportError("no module"), 3),
        (RuntimeError("out of memory"), 2),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda v: type(v).__name__ + str(v)[:20],
)
def test_exit_codes(error: BaseException, code: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.generate

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipelines.generate, "generate", fail)
    found, _, err = run("generate", "a cat", "--model", "TINY")
    assert found == code
    assert err.startswith("leapfrog: ")
    assert "Traceback" not in err


def test_a_failed_picture_is_exit_code_2(run: Run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import catalog

    monkeypatch.setattr(
        catalog.load(tiny).pipeline.codec, "decode", lambda latents: latents.new_zeros(1, 3, 32, 32)
    )
    code, _, err = run("generate", "a cat", "--model", "TINY", "--steps", "2")
    assert code == 2
    assert "one colour" in err


def test_inspect(run: Run, tiny: str) -> None:
    run("generate", "a cat", "--model", "TINY", "--steps", "2", "--output", "cat.png")
    code, out, _ = run("inspect", "cat.png", "--json")
    assert (code, json.loads(out)["request"]["prompt"]) == (0, "a cat")
    assert "prompt: a cat" in run("inspect", "cat.json")[1]
    code, out, _ = run("inspect", tiny, "--json")
    assert json.loads(out)["parts"]["transformer"] == "dit.backbones.mmdit.MMDiT"
    weights = f"{tiny}/codec/diffusion_pytorch_model.safetensors"
    assert json.loads(run("inspect", weights, "--json")[1])["tensors"] > 2
    Path("bad.safetensors").write_bytes(b"\x80\x04\x95 pickle")
    for path in ("missing.png", "bad.safetensors", "."):
        code, out, err = run("inspect", path)
        assert (code, out) == (1, "")
        assert err.startswith("leapfrog: ")


def test_models_and_doctor(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("models", "--json")
    assert code == 0
    assert isinstance(json.loads(out)["models"], dict)
    assert "safetensors only" in run("models")[1]
    cards = {
        "pictures": catalog.Card(name="pictures", title="pictures", summary="Things on white.", width=64, height=32),
        "films": catalog.Card(name="films", title="Films", task="text-to-video", width=64, height=64, more={"frames": 16}),
    }  # fmt: skip
    monkeypatch.setattr(catalog, "shipped", lambda: cards)
    assert run("models")[1].splitlines()[:2] == [
        "pictures\t64x32 px\ttext-to-image\tThings on white.", "films\t64x64 px, 16 frames\ttext-to-video\tFilms",
    ]  # fmt: skip
    monkeypatch.undo()
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == (3 if found["problems"] else 0)
    assert found["versions"]["torch"]


def test_repro_says_identical_or_what_differs(run: Run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run("generate", "a red cat", "--model", "TINY", "--steps", "3", "--output", "cat.png")
    assert run("repro", "cat.png")[0] == 1, "a file cannot choose a folder to be opened"
    code, out, _ = run("repro", "cat.png", "--model", "TINY")
    assert (code, out) == (0, "identical\n")
    from pipelines import catalog

    bias = catalog.load(tiny).pipeline.codec.conv_out.bias.data
    bias += 0.3
    code, out, _ = run("repro", "cat.png", "--model", "TINY", "--json")
    bias -= 0.3
    assert code == 5
    assert json.loads(out)["verdict"] == "different"


def test_help_and_version(run: Run) -> None:
    code, out, _ = run("generate", "--help")
    assert code == 0
    for flag in (
        "--negative",
        "--class",
        "--guidance-mode",
        "--accelerate",
        "--dry-run",
        "--size",
        "--strength",
    ):
        assert flag in out
    assert run("--version")[1].startswith("leapfrog ")
    assert run()[0] == 1
    assert run("dance")[0] == 1


def test_another_owner_of_our_packages_is_named_at_the_door(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "strangers", lambda: ["two owners of the package dit: leapfrog-dit and dit"])
    code, _, err = run("models")
    assert code == 3
    assert "leapfrog-dit and dit" in err


SLOW = """
import sys, time
import pipelines.generate as module
def slow(request, *, on_step=None, **_):
    for step in range(3000):
        print("step", flush=True)
        time.sleep(0.01)
        if sys.argv[1] == "polite" and on_step(module.Progress(step, 3000, "denoise", 0.0)) is False:
            raise module.Cancelled("stopped")
module.generate = slow
from pipelines.cli import main
sys.exit(main(["generate", "a cat"]))
"""


@pytest.mark.skipif(os.name != "posix", reason="Unix signals")
@pytest.mark.parametrize("manner", ["polite", "deaf"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_and_a_second_one_at_once(
    number: int, code: int, manner: str, tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, manner],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        if manner == "deaf":
            process.stdout.readline()
            process.stdout.readline()
            process.send_signal(number)
        left, words = process.communicate(timeout=300)
    assert process.returncode == code
    assert left.count("step") < 1500, "it did not run to its end"
    assert "Traceback" not in words
    assert not list(tmp_path.iterdir())


def test_output_cut_off_by_its_reader_is_no_error(tiny: str) -> None:
    root = Path(__file__).resolve().parents[2]
    command = f"{sys.executable} -m pipelines.cli inspect {tiny} | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("kind")
    assert "Traceback" not in done.stderr


def test_compare_measures_an_accelerator(run: Run) -> None:
    code, out, err = run(
        "compare", "a cat", "--model", "TINY", "--steps", "5", "--rounds", "1", "--accelerate", "delta-cache:warmup=1", "--json"
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["rounds"] == 1
    assert found["run"]["reused"] > 0
    assert found["verdict"]
    assert not list(Path().glob("*.png"))


def test_compare_of_two_files(run: Run) -> None:
    Image.new("RGB", (16, 16), (10, 10, 10)).save("a.png")
    Image.new("RGB", (16, 16), (34, 34, 34)).save("b.png")
    code, out, _ = run("compare", "a.png", "b.png", "--json")
    assert code == 0
    assert json.loads(out)["psnr_db"] == 20.53
    for name, shades in {"c": (10, 40, 90), "d": (10, 52, 90)}.items():
        first, *rest = [Image.new("RGB", (16, 16), (one, one, one)) for one in shades]
        first.save(f"{name}.gif", save_all=True, append_images=rest, duration=100)
        Path(f"{name}.frames").mkdir()
        for place, one in enumerate((first, *rest)):
            one.save(f"{name}.frames/{place}.png")
    for ending in ("gif", "frames"):
        code, out, _ = run("compare", f"c.{ending}", f"d.{ending}", "--json")
        found = json.loads(out)
        assert (code, found["worst_frame"], found["largest"]) == (0, 1, 12), "every frame counts, not the first"
        assert found["motion"]["b"] > found["motion"]["a"] - 1
    assert "worst frame 1: 26.5 dB; flicker 12.00" in run("compare", "c.frames", "d.frames")[1]
    assert run("compare", "c.gif", "c.frames")[1] == "identical\n"
    code, _, err = run("compare", "a.png", "c.gif")
    assert code == 1
    assert "16 x 16 px, 3 frames" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a cat", "--model", "TINY"], "at least one"),
        (["a cat", "--model", "TINY", "--accelerate", "delta-cache", "--rounds", "0"], "rounds must be"),
        (["a.png", "b.png"], "readable"),
    ],
)
def test_compare_refuses(arguments: list[str], words: str, run: Run) -> None:
    code, _, err = run("compare", *arguments)
    assert code == 1
    assert words in err


def test_inspect_draws_the_run(run: Run) -> None:
    assert (
        run("generate", "a cat", "--model", "TINY", "--steps", "5", "--accelerate", "delta-cache:warmup=1")[0]
        == 0
    )
    code, _, err = run("inspect", "a-cat-0.png", "--timeline", "run.svg", "--json")
    assert code == 0, err
    assert 'data-reused="' in Path("run.svg").read_text()
    for target in ("run.svg", "run.txt"):
        code, _, err = run("inspect", "a-cat-0.png", "--timeline", target)
        assert code == 1
        assert "a new file with the ending .svg" in err
