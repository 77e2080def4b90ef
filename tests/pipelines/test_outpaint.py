"""More around a picture, `outpaint:left=..`: command line, manifest and HTTP make what Python makes, bit for bit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import _planning, _serving, cli
from pipelines._attack_parts import Caller
from pipelines.generate import generate
from pipelines.guard import Keys
from pipelines.jobs import Ledger
from pipelines.manifest import ManifestError, read_manifest
from pipelines.request import Request
from pipelines.serve import http_app
from pipelines.workers import Worker

_place = importlib.util.spec_from_file_location("steered", Path(__file__).with_name("steered.py"))
assert _place is not None
assert _place.loader is not None
steered = importlib.util.module_from_spec(_place)
_place.loader.exec_module(steered)
place, asked = steered.place, steered.asked

TOKEN = "k" * 32
MASK = "outpaint:left=8,top=3,bottom=5"


@pytest.fixture
def small(place: Path, tmp_path: Path) -> Path:
    """A picture of 24x24 px alone in a folder; with what MASK adds it has the shape of what is made."""
    path = tmp_path / "small.png"
    Image.open(place / "start.png").crop((0, 0, 24, 24)).save(path)
    return path


@pytest.fixture
def wanted(asked: Request, small: Path) -> Request:
    return asked.replace(image=str(small), mask=MASK, strength=1.0)


def test_the_command_line_makes_it(
    wanted: Request, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        f"--{name}={getattr(wanted, name)}"
        for name in ("model", "steps", "width", "height", "seed", "image", "mask")
    ]
    given += ["--strength=1", f"--output={tmp_path / 'made.png'}", "--json"]
    assert cli.main(["generate", wanted.prompt, *given]) == cli.DONE
    told = json.loads(capsys.readouterr().out)["report"]["pixels"]
    assert generate(wanted).report["pixels"] in (told, told[0])
    made = np.asarray(Image.open(tmp_path / "made.png"))
    assert np.array_equal(made[3:27, 8:], np.asarray(Image.open(wanted.image or "")))


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_manifest_takes_it_as_words_and_not_as_a_file(wanted: Request, tmp_path: Path, ending: str) -> None:
    row = {
        name: getattr(wanted, name)
        for name in ("prompt", "model", "steps", "width", "height", "strength", "mask")
    }
    row |= {"seed": wanted.seed, "image": "small.png"}
    path = tmp_path / f"m.{ending}"
    cells = [json.dumps(value) if isinstance(value, str) else str(value) for value in row.values()]
    path.write_text(json.dumps(row) if ending == "jsonl" else f"{','.join(row)}\n{','.join(cells)}\n")
    plan = _planning.plan(path, tmp_path / "out")
    (entry,) = plan.manifest.entries
    assert Request.from_dict(entry.request) == wanted.replace(image=str(tmp_path.resolve() / "small.png"))
    assert generate(Request.from_dict(entry.request)).report["pixels"] == generate(wanted).report["pixels"]


def test_a_manifest_tells_what_is_wrong_with_it_and_opens_nothing_by_it(small: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows: list[dict[str, Any]] = [
        {"mask": "outpaint:lft=3"}, {"mask": "outpaint:"}, {"mask": "outpaint:../small.png"},
        {"image": "outpaint:left=8", "mask": MASK},  # words are for masks alone
        {"mask": "../small.png"},
    ]  # fmt: skip
    small.rename(tmp_path / "in" / "small.png")
    path = tmp_path / "in" / "m.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "a cat", "image": "small.png"} | row) + "\n" for row in rows)
    )
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    found = [(one.line, one.field) for one in caught.value.problems]
    assert found == [(1, "mask"), (2, "mask"), (3, "mask"), (4, "image"), (5, "mask")]


def test_http_takes_it_with_an_upload(wanted: Request, small: Path, tmp_path: Path) -> None:
    cards, places = _serving.served_models([wanted.model])
    (name,) = cards
    ledger = Ledger(tmp_path / "jobs.sqlite")
    app = http_app(
        ledger, folder=tmp_path / "out", uploads=tmp_path / "up", models=cards, places=places, keys=Keys({TOKEN: "me"})
    )  # fmt: skip
    call, kind = Caller(app, TOKEN), [("content-type", "application/json")]
    upload = json.loads(call("POST", "/v1/files", small.read_bytes(), [("content-type", "image/png")]).body)[
        "id"
    ]
    body: dict[str, Any] = {
        one: getattr(wanted, one)
        for one in ("prompt", "steps", "width", "height", "seed", "strength", "mask")
    }
    body |= {"model": name, "image": upload}
    for changes in (
        {"mask": "outpaint:lft=3"},
        {"mask": "../../m.png"},
        {"image": MASK},
        {"mask": upload[:-1]},
    ):
        refused = call("POST", "/v1/jobs", json.dumps(body | changes).encode(), kind)
        assert (refused.status, json.loads(refused.body)["error"]["field"]) == (400, next(iter(changes)))
    assert ledger.jobs() == []
    made = call("POST", "/v1/jobs", json.dumps(body).encode(), kind)
    assert made.status == 202, made.body
    Worker(ledger, pause=0.02).run(until_empty=True)
    job = json.loads(call("GET", f"/v1/jobs/{json.loads(made.body)['id']}").body)
    assert (job["state"], job["pixels"], job["request"]["mask"]) == (
        "done", generate(wanted).report["pixels"], MASK,
    ), job["error"]  # fmt: skip
    ledger.close()
