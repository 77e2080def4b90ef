"""One request through every door gives one picture: the page, the command line, Python and HTTP."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import _serving, cli
from pipelines._attack_parts import Caller
from pipelines.generate import generate
from pipelines.guard import Keys
from pipelines.jobs import Ledger
from pipelines.request import Request
from pipelines.serve import http_app
from pipelines.workers import Worker

TOKEN = "k" * 32


def chance(seed: int) -> dict[str, Any]:
    """Return a random legal request for the tiny model."""
    draw = random.Random(seed)
    methods = [[], ["delta-cache:interval=2"], ["taylor-cache"]]
    return {
        "prompt": " ".join(draw.choices(["a", "red", "green", "cat", "dog", "house"], k=draw.randint(1, 6))),
        "seed": draw.randrange(2**53),
        "steps": draw.randint(2, 4),
        "width": draw.choice([32, 64]),
        "height": draw.choice([32, 64]),
        "guidance": draw.choice([1.0, 2.5, 4.0]),
        "scheduler": draw.choice(["default", "euler", "heun"]),
        "accelerators": draw.choice(methods),
    }


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_page_command_line_python_and_http_give_the_same_pixels(
    tiny: str,
    tmp_path: Path,
    seed: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = chance(seed) | {"model": tiny}
    wanted = generate(Request.from_dict(values)).pictures[0].report["pixels"]
    flags = [
        f"--{name}={values[name]}"
        for name in ("seed", "steps", "width", "height", "guidance", "scheduler", "model")
    ]
    flags += [f"--accelerate={one}" for one in values["accelerators"]]
    assert (
        cli.main(["generate", values["prompt"], *flags, "--output", str(tmp_path / "cli.png"), "--json"])
        == cli.DONE
    )
    told = json.loads(capsys.readouterr().out)
    assert told["report"]["pixels"] in (wanted, [wanted])

    cards, places = _serving.served_models([tiny])
    (name,) = cards
    assert places == {name: tiny}
    ledger = Ledger(tmp_path / "jobs.sqlite")
    app = http_app(
        ledger, folder=tmp_path / "out", uploads=tmp_path / "up", models=cards, places=places, keys=Keys({TOKEN: "me"})
    )  # fmt: skip
    call = Caller(app, TOKEN)
    kind = [("content-type", "application/json")]
    made = call("POST", "/v1/jobs", json.dumps(values | {"model": name}).encode(), kind)
    assert made.status == 202, made.body
    form = {key: values[key] for key in ("prompt",)} | {
        "model": name,
        "size": f"{values['width']}x{values['height']}",
    }
    form["leapfrog"] = {
        key: one for key, one in values.items() if key not in ("prompt", "model", "width", "height")
    }
    worker = threading.Thread(target=Worker(ledger, pause=0.02).run, kwargs={"until_empty": True})
    answers: list[Any] = []
    asking = threading.Thread(
        target=lambda: answers.append(call("POST", "/v1/images/generations", json.dumps(form).encode(), kind))
    )
    asking.start()
    while len(ledger.jobs()) < 2:
        time.sleep(0.01)
    worker.start()
    worker.join()
    asking.join()
    job = json.loads(call("GET", f"/v1/jobs/{json.loads(made.body)['id']}").body)
    assert (job["state"], job["pixels"], job["request"]["model"]) == ("done", wanted, name), job["error"]
    assert str(tmp_path) not in json.dumps(job)
    assert tiny not in json.dumps(job)
    assert json.loads(answers[0].body)["leapfrog"]["jobs"][0]["pixels"] == wanted
    file = call("GET", job["files"][0]["url"]).body
    (tmp_path / "http.png").write_bytes(file)
    assert Request.from_file(tmp_path / "http.png") == Request.from_file(tmp_path / "cli.png")
    ledger.close()

    monkeypatch.setenv("LEAPFROG_STATE", str(tmp_path / "state"))
    row = by_page(values, tmp_path)
    assert (row.state, row.report["pixels"]) == ("done", wanted), row.error
    (file,) = row.files
    found = Request.from_file(Path(file)).to_dict()
    assert {name: found[name] for name in values if name not in ("accelerators", "model")} == {
        name: one for name, one in values.items() if name not in ("accelerators", "model")
    }
    assert [one["name"] for one in found["accelerators"]] == [
        one.partition(":")[0] for one in values["accelerators"]
    ]


def by_page(values: dict[str, Any], folder: Path) -> Any:
    """Fill the form of the tab Create as a person would, press the button, and return the ledger's row of what came."""
    import app_speed as speed
    from app import cards_for
    from app_jobs import Jobs
    from app_page import Page

    jobs = Jobs(folder / "page", ledger=folder / "page.sqlite")
    try:
        page = Page(jobs, cards_for(values["model"]), tabs=[("app_create", "Create")])
        page.build()
        create, browser = page.tabs["Create"], SimpleNamespace(session_hash="a browser")
        page.house.enter(browser, None)  # type: ignore[arg-type]
        form = {name: component.value for name, component in create.inputs.items()}
        asked = {name: values[name] for name in ("model", "prompt", "steps", "guidance", "scheduler")}
        form |= asked | {"seed": str(values["seed"]), "size": f"{values['width']}x{values['height']}"}
        assert set(asked) <= set(create.inputs)
        if values["accelerators"]:
            form |= dict.fromkeys(create.methods, False) | {"speed": speed.CUSTOM}
            for one in values["accelerators"]:
                name, _, settings = one.partition(":")
                form[name] = True
                for setting, _, value in (part.partition("=") for part in settings.split(",") if part):
                    assert f"{name}.{setting}" in form
                    form[f"{name}.{setting}"] = int(value)
        create._submit(browser, None, *form.values())
        for _ in range(6000):
            (row,) = jobs.ledger.jobs()
            if row.state in ("done", "failed", "cancelled"):
                break
            time.sleep(0.01)
        return row
    finally:
        jobs.close()
