"""The page without a browser: form, jobs, what is shown, how it is served."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import app
import app_copies as copies
import app_form as form
import app_given as given_inputs
import app_serve as serve
import app_speed as speed
import app_views as views
from app_jobs import WAITING, Job, Jobs, Now, QueueFull
from pipelines.catalog import Card
from pipelines.cli import build_parser, request_of
from pipelines.generate import Cancelled, Progress
from pipelines.jobs import Item
from pipelines.request import Request, RequestError

ROOT = Path(__file__).resolve().parents[1]
WAIT = 120.0
"""Longest wait for anything, in s: busy machines are slow."""
STYLES = ["3d render", "cartoon", "blob cartoon"]
CARD = Card(
    name="toy",
    title="Toy",
    summary="Things on white.",
    width=64,
    height=64,
    multiple=8,
    low=32,
    high=128,
    steps=20,
    guidance=3.0,
    more={"styles": {"a": STYLES[0], "b": STYLES[1], "c": STYLES[2]}, "examples": ["a dog, cartoon"], "concepts": ["cat", "dog"]},
)  # fmt: skip
RUN = {
    "requested": [],
    "effective": ["delta-cache: 1 of 3 calls reused blocks 1-2"],
    "notes": [],
    "computed": 10,
    "reused": 2,
    "forecast": 0,
    "cells": [
        {"run": 0, "branch": "cond", "step": 0, "evaluation": 0, "states": "CCCC"},
        {"run": 0, "branch": "cond", "step": 1, "evaluation": 0, "states": "CRRC"},
        {"run": 0, "branch": "cond", "step": 2, "evaluation": 0, "states": "CCCC"},
    ],
}


class FakeResult:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.report: dict[str, Any] = {
            "run": RUN,
            "timings": {"load": 0.1, "denoise": 1.0},
            "effective": {"width": 64, "height": 64, "steps": 3, "model": "toy"},
            "requested": {"model": "toy"},
            "warnings": [],
            "failures": [],
            "peak_memory_mb": {"process": 800.0},
            "versions": {"torch": "2"},
        }

    def save(self, folder: Path, **_: Any) -> list[Path]:
        names = [folder / f"{self.request.seed + i}.png" for i in range(self.request.images)]
        paths = [folder] if folder.suffix else names
        for path in paths:
            path.write_bytes(b"\x89PNG of " + path.name.encode())
        return paths


class Fake:
    """Stand in for `generate`: each step waits for leave, and decoding is counted."""

    def __init__(self, steps: int = 3) -> None:
        self.steps, self.decoded, self.order = steps, 0, list[str]()
        self.go, self.stepped = threading.Semaphore(0), threading.Event()

    def __call__(self, request: Request, *, on_step: Callable[[Progress], object]) -> FakeResult:
        self.order.append(request.prompt)
        if request.prompt == "break":
            raise RequestError("prompt", request.prompt, "<b>something</b> else")
        if request.prompt == "explode":
            raise KeyError("strange")
        for step in range(1, self.steps + 1):
            assert self.go.acquire(timeout=WAIT)
            self.stepped.set()
            if on_step(Progress(step, self.steps, "denoise", 0.1 * step)) is False:
                raise Cancelled("stopped")
        self.decoded += 1
        return FakeResult(request)


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def jobs(tmp_path: Path, fake: Fake) -> Iterator[Jobs]:
    made = Jobs(tmp_path / "out", fake, ledger=tmp_path / "state" / "jobs.sqlite")
    yield made
    fake.go.release(1000)
    made.close()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def run(jobs: Jobs, fake: Fake, job: Job) -> Job:
    fake.go.release(fake.steps * job.request.images)
    until(lambda: jobs.refresh(job).over)
    return job


# Importing


def test_importing_the_page_is_light() -> None:
    code = "import sys, app; print([m for m in ('torch', 'gradio', 'diffusers', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Jobs


def test_a_job_reports_progress_and_ends_with_files(jobs: Jobs, fake: Fake) -> None:
    job = jobs.submit(Request(prompt="dog", seed=7, images=2))
    fake.go.release(1)
    until(lambda: jobs.refresh(job).progress is not None and job.progress.step == 1)  # type: ignore[union-attr]
    assert job.state == "running"
    run(jobs, fake, job)
    assert (job.state, job.error) == ("done", "")
    assert [path.name for path in job.paths] == ["7.png", "8.png"]
    assert job.report["run"] == RUN
    assert job.report["timings"]["denoise"] == 2.0, "of both pictures"


def test_cancelling_a_running_job_ends_it_within_a_step_and_never_decodes(jobs: Jobs, fake: Fake) -> None:
    job = jobs.submit(Request(prompt="dog"))
    fake.go.release(1)
    until(lambda: jobs.refresh(job).progress is not None)
    assert jobs.cancel(job.name) == 1
    fake.go.release(1)
    after = jobs.submit(Request(prompt="next"))
    run(jobs, fake, after)
    assert (jobs.refresh(job).state, fake.decoded, job.paths) == ("cancelled", 1, [])
    until(
        lambda: [one.name for one in jobs.folder.glob("*")] == ["0.png"]
    )  # a draft goes after its job is done


def test_cancelling_a_waiting_job_takes_it_out_of_the_queue(jobs: Jobs, fake: Fake) -> None:
    first, second, third = (jobs.submit(Request(prompt=name)) for name in ("one", "two", "three"))
    until(lambda: jobs.refresh(first).state == "running")
    assert (jobs.ahead(second), jobs.ahead(third)) == (1, 2)
    jobs.cancel(second.name)
    assert jobs.refresh(second).state == "cancelled"
    assert jobs.ahead(third) == 1
    run(jobs, fake, first)
    run(jobs, fake, third)
    assert fake.order == ["one", "three"]


@pytest.mark.parametrize(("prompt", "words"), [("break", "<b>something</b> else"), ("explode", "KeyError")])
def test_a_failing_job_does_not_stop_the_next(jobs: Jobs, fake: Fake, prompt: str, words: str) -> None:
    bad = run(jobs, fake, jobs.submit(Request(prompt=prompt)))
    assert bad.state == "failed"
    assert words in bad.error
    good = run(jobs, fake, jobs.submit(Request(prompt="dog")))
    assert good.state == "done"


def test_a_full_queue_says_so_to_whom_it_concerns(jobs: Jobs) -> None:
    running = jobs.submit(Request(prompt="first"), owner="me")
    until(lambda: jobs.refresh(running).state == "running")
    for _ in range(WAITING // 16):
        jobs.submit(Request(prompt="more", images=16), owner="me")
    with pytest.raises(QueueFull, match="waiting already"):
        jobs.submit(Request(prompt="too many"), owner="me")
    assert jobs.submit(Request(prompt="mine"), owner="you").state == "waiting"


def test_closing_the_page_loses_nothing_and_the_next_one_goes_on(tmp_path: Path, fake: Fake) -> None:
    ledger = tmp_path / "jobs.sqlite"
    jobs = Jobs(tmp_path / "out", fake, ledger=ledger)
    first, second = (jobs.submit(Request(prompt=name), owner="me") for name in ("one", "two"))
    until(lambda: jobs.refresh(first).state == "running")
    threading.Timer(0.2, fake.go.release).start()
    jobs.close()
    with pytest.raises(QueueFull):
        jobs.submit(Request(prompt="three"))
    assert fake.decoded == 0
    later = Jobs(tmp_path / "out", fake, ledger=ledger)
    again = later.get(first.name, "me")
    assert again is not None
    assert again.state == "waiting", "it was given back"
    later.start()
    fake.go.release(100)
    for job in (first, second):
        assert run(later, fake, job).state == "done"
    later.close()


def test_nobody_sees_or_stops_a_job_of_another(jobs: Jobs, fake: Fake) -> None:
    mine = jobs.submit(Request(prompt="dog", images=2), owner="me")
    assert jobs.get(mine.name, "you") is None
    assert jobs.cancel(mine.name, "you") == 0
    assert (jobs.busy("you"), jobs.busy("me")) == (False, True)
    both = f"{mine.name}.{jobs.submit(Request(prompt='cat'), owner='you').name}"
    assert jobs.get(both, "me") is None, "names of two owners are no job of either"
    assert run(jobs, fake, mine).state == "done"


def test_who_has_a_job_is_busy_also_while_it_goes_from_waiting_to_running(jobs: Jobs, fake: Fake) -> None:
    reading, asked = jobs.ledger._store.reading, list[int]()

    @contextmanager
    def taken() -> Iterator[Any]:
        asked.append(1)
        with reading() as db:
            yield db
        if len(asked) == 1:  # the worker takes it right after the first look
            jobs.ledger.lease("worker")

    jobs.ledger.add([Item(batch="me", id="0", request=Request(prompt="dog").to_dict(), owner="me")])
    jobs.ledger._store.reading = taken  # type: ignore[method-assign]
    assert jobs.busy("me")
    jobs.ledger._store.reading = reading  # type: ignore[method-assign]
    assert jobs.ledger.counts(owner="me")["running"] == 1
    assert jobs.busy("me")
    (name,) = (one.name for one in jobs.ledger.jobs(owner="me"))
    jobs.ledger.cancel(name=name, owner="me")


def test_names_of_jobs_cannot_be_guessed(jobs: Jobs) -> None:
    names = {jobs.submit(Request(prompt="dog")).name for _ in range(5)}
    assert len(names) == 5
    assert min(map(len, names)) >= 20
    assert jobs.get("") is None
    assert jobs.cancel("nothing") == 0


def test_warming_up_comes_first_and_may_fail(tmp_path: Path, fake: Fake) -> None:
    seen = []

    def warm() -> None:
        seen.append("warm")
        raise RuntimeError("no model")

    warmed = Jobs(tmp_path, fake, warm=warm, ledger=tmp_path / "jobs.sqlite")
    assert run(warmed, fake, warmed.submit(Request(prompt="dog"))).state == "done"
    assert seen == ["warm"]
    warmed.close()


# Form


@pytest.mark.parametrize(
    ("low", "high", "multiple"), [(64, 64, 8), (32, 128, 8), (16, 4096, 16), (60, 72, 4)]
)
def test_only_legal_sizes_are_offered(low: int, high: int, multiple: int) -> None:
    card = Card(name="toy", width=64, height=64, low=low, high=high, multiple=multiple)
    offered = form.sizes(card)
    assert offered[0][1] == "64x64"
    for _, value in offered:
        assert all(int(side) % multiple == 0 and low <= int(side) <= high for side in value.split("x"))
    assert len({value for _, value in offered}) == len(offered)


def test_a_model_without_a_size_keeps_its_own() -> None:
    assert form.sizes(Card(name="far/away")) == [("the model's own", "")]


@pytest.mark.parametrize(
    ("prompt", "style", "wanted"),
    [
        ("a dog", "cartoon", "a dog, cartoon"),
        ("a dog, cartoon", "3d render", "a dog, 3d render"),
        ("a dog, blob cartoon", "cartoon", "a dog, cartoon"),
        ("a dog, CARTOON, red", "3d render", "a dog, red, 3d render"),
        ("a cartoon dog", "3d render", "a cartoon dog, 3d render"),
        ("a dog, cartoon", form.ANY_STYLE, "a dog"),
        ("cartoon", "3d render", "3d render"),
        ("", "cartoon", "cartoon"),
        ("a dog, ", "cartoon", "a dog, cartoon"),
    ],
)
def test_a_style_replaces_the_one_before(prompt: str, style: str, wanted: str) -> None:
    assert form.restyled(prompt, style, STYLES) == wanted


def test_the_style_of_a_prompt_is_found() -> None:
    assert form.style_in("a dog, blob cartoon", STYLES) == "blob cartoon"
    assert form.style_in("a cartoon dog", STYLES) == form.ANY_STYLE


@pytest.fixture(scope="module")
def methods() -> Any:
    return form.methods()


def controls(methods: Any, **changes: Any) -> dict[str, Any]:
    start = form.values_of(Request(model="toy", prompt="a dog, cartoon", seed=5), CARD, methods)
    return start | changes


def painted(folder: Path, picture: Any, strokes: Any) -> dict[str, Any]:
    """Save what the mask editor sends: a picture, and one layer that is opaque where something was painted."""
    from PIL import Image

    layer = Image.new("RGBA", strokes.size, (255, 59, 127, 0))
    layer.putalpha(strokes)
    folder.mkdir(exist_ok=True)
    for name, one in (("background", picture), ("layer", layer)):
        one.save(folder / f"{name}.png")
    return {
        "background": str(folder / "background.png"),
        "layers": [str(folder / "layer.png")],
        "composite": None,
    }


def test_a_painted_part_becomes_a_mask_of_the_pictures_own_pixels(methods: Any, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    card = dataclasses.replace(CARD, pipeline="TextToImagePipeline")
    keep = given_inputs.Uploads(tmp_path / "kept").of("ann")

    def fields(editor: Any) -> dict[str, Any]:
        return given_inputs.fields_of(controls(methods, task="inpaint", editor=editor), card, keep)

    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    strokes = np.zeros((48, 64), np.uint8)
    strokes[10:20, 30:40], strokes[20:22, 30:40], strokes[40, 3] = 255, 128, 127
    found = fields(painted(tmp_path, start, Image.fromarray(strokes)))
    assert np.array_equal(np.asarray(Image.open(found["image"])), np.asarray(start))
    assert np.array_equal(np.asarray(Image.open(found["mask"])), np.where(strokes > 127, 255, 0))
    assert all(Path(found[name]).is_relative_to(tmp_path / "kept") for name in ("image", "mask"))

    full, none = Image.new("L", (800, 800), 255), Image.new("L", (64, 48), 0)
    for editor, words in (
        (painted(tmp_path / "blank", Image.new("RGB", (800, 800), "white"), full), "drop it once more.*got 'a blank canvas'"),
        (painted(tmp_path / "nothing", Image.new("RGBA", (800, 800), (9, 9, 9, 0)), full), "drop it once more"),
        (painted(tmp_path / "sizes", start, full), "the picture's size, 64 x 48 px.*got '800 x 800 px'"),
        (painted(tmp_path / "unpainted", start, none), "a part painted over"),
        (None, "a part painted over"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=words):
            fields(editor)


@pytest.mark.parametrize(("colour", "side"), [("white", 64), ("red", 64), ("red", 800)])
def test_a_picture_of_one_colour_is_a_picture(methods: Any, tmp_path: Path, colour: str, side: int) -> None:
    from PIL import Image

    card = dataclasses.replace(CARD, pipeline="TextToImagePipeline")
    keep = given_inputs.Uploads(tmp_path / "kept").of("ann")
    editor = painted(tmp_path, Image.new("RGB", (side, side), colour), Image.new("L", (side, side), 255))
    found = given_inputs.fields_of(controls(methods, task="inpaint", editor=editor), card, keep)
    assert Image.open(found["image"]).size == (side, side)


def test_a_canvas_of_another_shape_is_told_before_a_job_is_made(
    jobs: Jobs, fake: Fake, page_of: Any, tmp_path: Path
) -> None:
    from PIL import Image

    create = page_of(jobs)[0]
    create.house.cards["toy"] = dataclasses.replace(CARD, pipeline="TextToImagePipeline")
    editor = painted(tmp_path, Image.radial_gradient("L").resize((64, 64)), Image.new("L", (64, 64), 0))

    def press(**pixels: int) -> Any:
        sides = {f"outpaint.{side}": value for side, value in pixels.items()}
        given = controls(create.methods, task="inpaint", editor=editor, size="64x64", **sides)
        return create._submit(ME, "", *(given[name] for name in create.inputs))

    told = press(left=16)
    assert told[create.parts["job"]] == ""
    assert "64x64 px: the starting picture and what is added to it have 80x64 px" in told[create.parts["status"]]
    assert not jobs.ledger.counts()["waiting"]
    assert press(left=16, top=8, bottom=8)[create.parts["job"]]


def test_a_double_click_asks_for_one_picture(jobs: Jobs, fake: Fake, page_of: Any) -> None:
    create = page_of(jobs)[0]
    given = controls(create.methods, seed="")
    values = [given[name] for name in create.inputs]
    first, second = (create._submit(ME, "", *values) for _ in range(2))
    assert first[create.parts["job"]] == second[create.parts["job"]]
    assert first[create.inputs["seed"]] == second[create.inputs["seed"]]
    other = create._submit(YOU, "", *values)[create.parts["job"]]
    assert other != first[create.parts["job"]], "another browser's press is its own"
    measured = create._measure(ME, "", *values)[create.parts["job"]]
    assert measured != first[create.parts["job"]]
    jobs.cancel(measured)
    jobs.cancel(other)
    jobs.cancel(first[create.parts["job"]])
    fake.go.release(20)
    deadline = time.monotonic() + WAIT
    while not jobs.get(measured).over and time.monotonic() < deadline:  # type: ignore[union-attr]
        time.sleep(0.01)
    assert create._measure(ME, "", *values)[create.parts["job"]] != measured, "a run that is over can be asked for again"


def test_a_file_is_asked_for_where_no_adapter_of_the_models_own_is_chosen(jobs: Jobs, page_of: Any) -> None:
    create, blocks = page_of(jobs)
    for key in ("control1", "control3", "lora1", "lora4"):
        chosen, file = create.inputs[f"{key}.adapter"], create.inputs[f"{key}.file"]
        (shown,) = [one.fn for one in blocks.fns.values() if [chosen] == one.inputs and [file] == one.outputs]
        assert (shown("edges").visible, shown("").visible) == (False, True)


def test_pixels_at_the_sides_become_a_written_mask_and_come_back(methods: Any, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    card = dataclasses.replace(CARD, pipeline="TextToImagePipeline")
    keep = given_inputs.Uploads(tmp_path / "kept").of("ann")

    def fields(editor: Any, **pixels: Any) -> dict[str, Any]:
        sides = {f"outpaint.{side}": value for side, value in pixels.items()}
        return given_inputs.fields_of(controls(methods, task="inpaint", editor=editor, **sides), card, keep)

    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 40, 3), dtype=np.uint8))
    none, stroke = Image.new("L", (40, 64), 0), Image.new("L", (40, 64), 255)
    untouched = painted(tmp_path, start, none)
    found = fields(untouched, left=16.0, right=8, top=None)
    assert found["mask"] == "outpaint:left=16,right=8"
    assert np.array_equal(np.asarray(Image.open(found["image"])), np.asarray(start))
    assert Path(found["image"]).is_relative_to(tmp_path / "kept")

    request = form.request_of(controls(methods, task="inpaint"), methods, more=found)
    again = form.values_of(request, card, methods)
    assert {name: again[f"outpaint.{name}"] for name in ("left", "top", "right", "bottom")} == {
        "left": 16, "top": 0, "right": 8, "bottom": 0,
    }  # fmt: skip
    assert given_inputs.left_out(request, card) == ["its starting picture"]
    drawn = request.replace(mask="mask.png")
    assert form.values_of(drawn, card, methods)["outpaint.left"] == 0
    assert given_inputs.left_out(drawn, card) == ["its starting picture", "its mask"]

    for editor, pixels, words in (
        (painted(tmp_path / "both", start, stroke), {"left": 16}, "a painted part, or pixels added at the sides"),
        (untouched, {"left": 12.5}, "left must be a whole number"),
        (untouched, {"top": -4}, "top must be"),
        (untouched, {"bottom": 9000}, "bottom must be"),
        (untouched, {}, "a part painted over"),
        (None, {"left": 16}, "pixels added at its sides"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=words):
            fields(editor, **pixels)


def test_the_defaults_of_the_form_are_an_exact_legal_request(methods: Any) -> None:
    request = form.request_of(controls(methods), methods)
    assert request == Request(
        model="toy", prompt="a dog, cartoon", width=64, height=64, steps=20, guidance=3.0, seed=5
    )


def test_every_method_can_be_chosen_with_its_defaults_and_comes_back(methods: Any) -> None:
    for name in methods:
        switches = {other: other == name for other in methods}
        untouched = [one for one in methods[name] if one.optional and one.default is None]
        blank = {f"{name}.{one.name}": "" for one in untouched}
        request = form.request_of(controls(methods, speed=form.CUSTOM) | switches | blank, methods)
        assert str(request.accelerators[0]) == name
        assert [one.name for one in request.accelerators] == [name]
        again = form.request_of(form.values_of(request, CARD, methods), methods)
        assert again == request


def test_settings_of_a_method_reach_the_request(methods: Any) -> None:
    changed = {
        "speed": form.CUSTOM,
        "delta-cache.interval": 3.0,
        "delta-cache.first_block": " 1 ",
        "delta-cache.last_block": "",
    }
    (cache,) = form.request_of(controls(methods, **changed), methods).accelerators
    assert str(cache) == "delta-cache:interval=3,first_block=1"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 10_000}, "prompt"),
        ({"seed": "-1"}, "seed"),
        ({"seed": "seven"}, "seed"),
        ({"guidance": float("nan")}, "guidance"),
        ({"steps": 0}, "steps"),
        ({"speed": form.CUSTOM, "delta-cache": False}, "speed"),
        ({"speed": form.CUSTOM, "delta-cache.first_block": "two"}, "first_block"),
        ({"speed": form.CUSTOM, "delta-cache.interval": 99}, "accelerators"),
    ],
)
def test_bad_input_is_named(methods: Any, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        form.request_of(
            controls(methods) | {name: False for name in methods if name != "delta-cache"} | changes, methods
        )
    assert caught.value.field == field


def test_a_blank_seed_is_random_and_new_every_time_too(methods: Any) -> None:
    seeds = {form.request_of(controls(methods, seed=" "), methods).seed for _ in range(3)}
    seeds |= {
        form.request_of(controls(methods, seed="5", new_seed=True), methods, written="5").seed
        for _ in range(3)
    }
    assert len(seeds) == 6
    assert max(seeds) < form.LARGEST_RANDOM_SEED


def test_a_typed_seed_counts_even_where_the_page_was_to_choose_one(methods: Any) -> None:
    assert form.request_of(controls(methods, seed="5", new_seed=True), methods, written="4").seed == 5


def test_methods_that_decide_about_the_same_thing_exclude_each_other(jobs: Jobs, page_of: Any) -> None:
    page, _ = page_of(jobs)
    assert not page.rivals("delta-cache", "delta-cache")
    for name in page.methods:
        assert page.rivals("delta-cache", name) == (
            name != "delta-cache" and form.seam_of(name) == "which blocks are computed"
        )


def test_a_class_model_is_asked_by_number(methods: Any) -> None:
    request = form.request_of(controls(methods, class_label=207.0), methods, takes_class=True)
    assert (request.class_label, request.prompt) == (207, "")


# What is shown


def job_of(request: Request, tmp_path: Path) -> Job:
    job = Job(request, tmp_path, name="x")
    job.report, job.paths = FakeResult(request).report, [tmp_path / "1.png"]
    job.started, job.ended, job.state = 1.0, 3.0, "done"
    return job


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    nasty = "<img src=x onerror=alert(1)> ${alert(2)} {{this}} @children"
    job = Job(Request(prompt="dog"), tmp_path, name="x", state="failed", error=nasty)
    chips = views.chips([(nasty, nasty, nasty)], nasty)
    table = views.differences(nasty, [(nasty, nasty, nasty)], [nasty])
    for shown in (
        views.trouble(nasty),
        views.ended(job),
        chips,
        table,
        views.note(nasty),
        views.player(nasty, nasty),
    ):
        assert not any(sign in shown for sign in ("<img", "${", "{{", "@children"))
    assert "&lt;img src=x" in views.trouble(nasty)
    assert "<" not in form.about(Card(name="x", summary="<script>[a](b)")).replace("\\<", "")


def test_the_timeline_counts_every_block_call() -> None:
    drawn = views.timeline(RUN)
    assert 'data-computed="10"' in drawn
    assert 'data-reused="2"' in drawn
    assert drawn.count('<rect class="C" x=') == 10
    assert drawn.count('<rect class="R" x=') == 2
    assert "step 2, blocks 1 to 2: reused" in drawn
    assert 'aria-label="Block calls by step: 10 computed, 2 reused"' in drawn


def test_the_timeline_shows_a_band_for_each_branch_and_copes_with_large_models() -> None:
    cells = [
        {"branch": branch, "step": step, "states": "C" * 30 + "F" * 30}
        for step in range(50)
        for branch in ("cond", "uncond")
    ]
    drawn = views.timeline({"cells": cells})
    assert "uncond</text>" in drawn
    assert 'data-forecast="3000"' in drawn
    assert drawn.count("<rect") < 1000
    assert "No blocks" in views.timeline({"calls": 3})


def test_the_report_says_what_was_asked_and_what_took_effect(tmp_path: Path) -> None:
    job = job_of(Request(prompt="dog", accelerators=("delta-cache",)), tmp_path)
    shown = views.report(job)
    assert "1.1 s · 3 steps · accelerated: 10 of 12 block calls computed, 2 reused" in shown
    assert "delta-cache: 1 of 3 calls reused blocks 1-2" in shown
    assert "saved in" in shown


def test_warnings_and_failures_are_told_apart(tmp_path: Path) -> None:
    job = job_of(Request(prompt="dog"), tmp_path)
    assert views.ended(job) == ""
    job.report |= {"warnings": ["the prompt was cut", "not a number"], "failures": ["not a number"]}
    shown = views.ended(job)
    assert "Something is wrong with the result: not a number." in shown
    assert shown.count("not a number") == 1
    assert "Note: the prompt was cut." in shown


def test_progress_says_phase_step_and_what_memory_asked_for(tmp_path: Path) -> None:
    job = Job(Request(prompt="dog", images=2), tmp_path)
    assert "2 before yours" in views.progress(job, 2)
    job.state, job.started = "running", time.time()
    job.told(Now(3, 10, "denoise", 1.0, 1))
    shown = views.progress(job)
    assert "Denoising" in shown
    assert "picture 2 of 2, step 3 of 10" in shown
    assert 'aria-valuenow="65"' in shown
    job.told(Now(3, 10, "denoise", 1.0, 0, "run 4 of 6"))
    assert "run 4 of 6, " in views.progress(job)
    job.told(Now(3, 10, "memory", 1.0, 0, "tiling: decoded in <tiles>"))
    assert "tiling: decoded in &lt;tiles&gt;" in views.progress(job)


REQUESTS = [
    Request(prompt="a red apple, cartoon", seed=7),
    Request(
        prompt='it\'s "quoted" $HOME; rm',
        negative_prompt="-x",
        seed=1,
        steps=9,
        guidance=2.5,
        width=64,
        height=72,
    ),
    Request(prompt="-dash", seed=2, images=3, scheduler="heun", accelerators=("delta-cache:interval=3",)),
    Request(model="some folder/model", class_label=3, seed=3),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda one: one.prompt or "class")
def test_copied_command_and_python_give_the_same_request(request_: Request) -> None:
    import shlex

    words = shlex.split(copies.command_of(request_))
    assert words[:2] == ["leapfrog", "generate"]
    assert request_of(build_parser().parse_args(words[1:])) == request_
    seen: list[Request] = []
    code = copies.python_of(request_).replace("from pipelines.generate import generate\n", "")
    exec(code, {"generate": lambda one: seen.append(one) or SimpleNamespace(save=lambda: None)})
    assert seen == [request_]


# Serving


@pytest.mark.parametrize("host", [None, "127.0.0.1", "::1", "localhost", "127.8.0.1"])
def test_this_computer_alone_needs_no_password(host: str | None) -> None:
    assert serve.loopback(serve.address(host, auth=False, spaces=False))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_other_addresses_are_refused_without_a_password(host: str) -> None:
    with pytest.raises(serve.AddressError, match="no password"):
        serve.address(host, auth=False, spaces=False)
    assert serve.address(host, auth=True, spaces=False) == host


def test_a_space_is_bound_to_every_address() -> None:
    assert serve.address(None, auth=False, spaces=True) == "0.0.0.0"


def test_main_refuses_in_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    monkeypatch.delenv("LEAPFROG_AUTH", raising=False)
    assert app.main(["--host", "0.0.0.0"]) == 1
    assert "no password is set" in capsys.readouterr().err
    assert app.main(["--model", "no such model"]) == 1
    assert "no such model" in capsys.readouterr().err
    monkeypatch.setenv("LEAPFROG_AUTH", "me:short")
    assert app.main([]) == 1
    assert "at least 8 characters" in capsys.readouterr().err


def test_guessing_passwords_is_slowed_down() -> None:
    now = [0.0]
    login = serve.Login("me:long enough", clock=lambda: now[0])
    assert login("me", "long enough")
    for _ in range(serve.TRIES):
        assert not login("me", "wrong")
    assert not login("me", "long enough")
    now[0] += serve.TRIES_IN + 1
    assert login("me", "long enough")


def answer(
    path: str, host: str, hosts: frozenset[str] | None = frozenset({"localhost"}), framed: bool = False
) -> dict[str, Any]:
    sent: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [(b"host", host.encode())]}
    asyncio.run(serve.Guard(inner, hosts, framed)(scope, lambda: None, send))  # type: ignore[arg-type,return-value]
    return {"status": sent[0]["status"]} | {key.decode(): value.decode() for key, value in sent[0]["headers"]}


def test_the_guard_checks_host_and_paths_and_sets_headers() -> None:
    page = answer("/", "localhost:7860")
    assert page["status"] == 200
    assert page["x-frame-options"] == "DENY"
    assert "default-src 'self'" in page["content-security-policy"]
    assert page["x-content-type-options"] == "nosniff"
    assert answer("/", "evil.example:7860")["status"] == 421
    assert answer("/", "evil.example", hosts=None)["status"] == 200
    for path in ("/openapi.json", "/gradio_api/runs", "/gradio_api/file=http://example.org/x"):
        assert answer(path, "localhost")["status"] == 404
    assert "x-frame-options" not in answer("/", "x", None, framed=True)


def test_every_limit_of_gradio_is_set() -> None:
    options = serve.launch_options("127.0.0.1", None, None, spaces=False)
    off = ("share", "show_error", "enable_monitoring", "run_history", "ssr_mode", "mcp_server", "pwa")
    assert all(options[name] is False for name in off)
    assert options["max_file_size"] == 20_000_000
    assert options["strict_cors"]
    assert options["app_kwargs"]["openapi_url"] is None


# The page's own functions, with a fake underneath


ME, YOU = (SimpleNamespace(session_hash=name) for name in ("mine", "yours"))
"""Two browsers, as gradio tells them apart."""


@pytest.fixture(scope="module")
def page_of() -> Any:
    from app_page import Page

    def make(jobs: Jobs) -> Any:
        cards = {"toy": CARD, "other": Card(name="other", task="class-to-image", classes=10)}
        page = Page(jobs, cards, tabs=[("app_create", "Create")])
        blocks = page.build()
        for browser in (ME, YOU):
            page.house.enter(browser, None)  # type: ignore[arg-type]
        return page.tabs["Create"], blocks

    return make


def test_the_page_keeps_its_limits_and_its_events_to_itself(jobs: Jobs, page_of: Any) -> None:
    _, blocks = page_of(jobs)
    assert blocks.analytics_enabled is False
    assert blocks.delete_cache == (86_400, 7 * 86_400)
    assert blocks._queue.max_size == serve.EVENTS
    assert blocks.api_open is False
    assert {one.api_visibility for one in blocks.fns.values()} == {"private"}


def test_a_browser_keeps_its_name_and_cannot_take_an_empty_one(jobs: Jobs, page_of: Any) -> None:
    house = page_of(jobs)[0].house
    name = house.enter(ME, None)
    assert (len(name) >= 20, house.session(ME), house.enter(ME, name)) == (True, name, name)
    assert house.session(YOU) != name
    for forged in ("", "short", "../" * 10, "x" * 65, 7):
        assert house.enter(YOU, forged) not in ("", forged)


def test_who_has_not_come_in_yet_holds_nobody_up_and_keeps_what_was_asked_for(
    jobs: Jobs, page_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gradio as gr

    import app_page
    from app_header import Header

    create = page_of(jobs)[0]
    house, early = create.house, SimpleNamespace(session_hash="early")
    head = Header(house)
    with gr.Blocks():
        head.draw()
    assert not create.parts["generate"].interactive, "until it is known whose picture it would be"
    assert head._look(early)[1].visible is False  # type: ignore[arg-type]
    assert house.known(early) == "", "a look alone makes nobody a stranger"  # type: ignore[arg-type]
    monkeypatch.setattr(app_page, "ENTRY", 0.0)
    given = controls(create.methods)
    job = create._submit(early, "", *(given[name] for name in create.inputs))[create.parts["job"]]
    owner = house.enter(early, None)  # type: ignore[arg-type]
    assert jobs.get(job, owner) is not None
    assert head._look(early)[1].visible is True  # type: ignore[arg-type]
    for name in (job, ""):
        assert create.parts["generate"] in create._again(early, name)
    assert create._again(early, "")[create.parts["generate"]].interactive


def test_the_count_of_tokens_follows_the_task_as_well_as_the_prompt(
    jobs: Jobs, page_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import app_tokens

    create, blocks = page_of(jobs)
    counted = [one for one in blocks.fns.values() if create.parts["tokens"] in one.outputs]
    changed = {(target, event) for one in counted for target, event in one.targets}
    for name in ("prompt", "task"):
        assert (create.inputs[name]._id, "change") in changed
    told: list[bool] = []

    def line(prompt: str, card: Card, *, story: bool) -> str:
        told.append(story)
        return ""

    monkeypatch.setattr(app_tokens, "line", line)
    for task in ("story", "clip"):
        create._prompted("a | b", "toy", "", task)
    assert told == [True, False]


def test_a_tab_that_is_missing_is_left_out(jobs: Jobs) -> None:
    from app_page import Page

    page = Page(jobs, {"toy": CARD}, tabs=[("app_create", "Create"), ("app_not_there", "Nothing")])
    assert list(page.tabs) == ["Create"]


def test_every_control_has_a_label(jobs: Jobs, page_of: Any) -> None:
    page, _ = page_of(jobs)
    for component in [*page.inputs.values(), page.parts["concepts"], page.parts["file"]]:
        assert component.label
    shown = [one.label for name, one in page.inputs.items() if name not in page.methods and "." not in name]
    assert len(set(shown)) == len(shown), "two controls of one name"


def value_of(component: Any) -> Any:
    """Return the value of a component that an event gave back."""
    return component["value"] if isinstance(component, dict) else component.value


def test_submitting_writes_the_seed_back_and_watching_ends_with_the_original_bytes(
    jobs: Jobs, fake: Fake, page_of: Any
) -> None:
    page, _ = page_of(jobs)
    given = controls(page.methods, seed="")
    updates = page._submit(ME, "", *(given[name] for name in page.inputs))
    job = jobs.get(updates[page.parts["job"]])
    assert job is not None
    assert updates[page.inputs["seed"]] == str(job.request.seed)
    fake.go.release(10)

    async def watch() -> list[Any]:
        return [one async for one in page._watch(ME, job.name)]

    last = asyncio.run(watch())[-1]
    jobs.refresh(job)
    served = Path(value_of(last[page.parts["picture"]])["path"])
    assert served.read_bytes() == job.paths[0].read_bytes()
    assert served != job.paths[0]
    assert page._again(ME, job.name)[page.parts["job"]] == job.name
    assert page._again(YOU, job.name)[page.parts["job"]] == "", "a name alone opens nothing"


def test_what_is_added_to_the_queue_has_the_file_type_that_was_chosen(
    jobs: Jobs, fake: Fake, page_of: Any
) -> None:
    page, _ = page_of(jobs)
    card = Card(name="toy", task="text-to-video", pipeline="TextToVideoPipeline", width=64, height=64)
    page.cards["toy"] = page.house.cards["toy"] = card
    given = form.values_of(Request(model="toy", prompt="a dog", seed=5), card, page.methods)
    for ending, wanted in ((".mp4", ".mp4"), (".gif", ".gif"), (".png", "")):
        values = given | {"file_type": ending}
        page._add(ME, "", *(values[name] for name in page.inputs))
        row = jobs.ledger.jobs(limit=1)[0]
        assert Path(row.item.output).suffix == wanted
    assert page._ending(Request(model="other", class_label=1), [given[name] for name in page.inputs]) == ""


def test_the_first_screen_is_for_who_has_the_built_in_model_alone(jobs: Jobs, page_of: Any) -> None:
    from app_page import Page
    from pipelines import catalog

    assert not page_of(jobs)[0].parts["first_box"].visible, "a model was chosen"
    page = Page(jobs, catalog.shipped(), tabs=[("app_create", "Create")])
    page.build()
    create = page.tabs["Create"]
    assert create.parts["first_box"].visible
    updates = create._builtin()
    assert updates[create.inputs["model"]] in catalog.shipped()
    assert not updates[create.parts["first_box"]].visible


def test_what_nobody_has_used_for_a_month_goes_when_the_page_starts(jobs: Jobs, page_of: Any) -> None:
    folder = page_of(jobs)[0].uploads.folder / "somebody" / "digest"
    folder.mkdir(parents=True)
    for name, age in (("old.png", given_inputs.KEPT + 60), ("new.png", 60)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    page_of(jobs)
    assert [one.name for one in folder.iterdir()] == ["new.png"]


def test_a_bad_request_is_told_and_nothing_is_queued(jobs: Jobs, fake: Fake, page_of: Any) -> None:
    page, _ = page_of(jobs)
    given = controls(page.methods, prompt="")
    updates = page._submit(ME, "", *(given[name] for name in page.inputs))
    assert updates[page.parts["job"]] == ""
    assert "Prompt must be text of 1 to 2000 characters" in updates[page.parts["status"]]
    assert fake.order == []


def test_settings_come_back_from_a_file(jobs: Jobs, page_of: Any, tmp_path: Path) -> None:
    page, _ = page_of(jobs)
    request = Request(
        model="toy",
        prompt="a cat, 3d render",
        seed=9,
        width=40,
        height=96,
        accelerators=("delta-cache:interval=4",),
    )
    file = tmp_path / "made.json"
    file.write_text(json.dumps({"version": 1, "request": request.to_dict(), "report": {}}))
    given = controls(page.methods, prompt="a dog", seed="9")
    values = tuple(given[name] for name in page.inputs)
    shown = page.reuse.dropped(str(file), *values)
    table, pending = shown[page.parts["diff"]], shown[page.parts["pending"]]
    for setting in ("Prompt", "a dog", "a cat, 3d render", "Size", "40x96", "Speed", "Custom"):
        assert setting in table
    assert "<th scope='row'>Seed" not in table, "it would not change"
    assert page.inputs["prompt"] not in shown, "nothing is filled in before it was asked for"
    updates = page.reuse.apply(pending)
    assert updates[page.inputs["prompt"]] == "a cat, 3d render"
    assert updates[page.inputs["seed"]] == "9"
    assert updates[page.inputs["delta-cache.interval"]] == 4
    assert updates[page.inputs["speed"]] == form.CUSTOM
    untold = {page.inputs["folder"], page.inputs["preview"]}  # what no picture tells stays as it is
    assert set(updates) & set(page.inputs.values()) == set(page.inputs.values()) - untold
    again = page.reuse.differences(
        request, tuple(form.values_of(request, CARD, page.methods)[name] for name in page.inputs)
    )
    assert again == []


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n", b"{}", b'{"version": 1, "request": {"model": "gone", "prompt": "x"}}']
)
def test_a_file_that_does_not_fit_is_refused_in_words(
    jobs: Jobs, page_of: Any, tmp_path: Path, content: bytes
) -> None:
    page, _ = page_of(jobs)
    file = tmp_path / ("deep" * 25) / "some<i>.png"  # so long that a message would cut it
    file.parent.mkdir()
    file.write_bytes(content)
    updates = page.reuse.dropped(str(file))
    assert "trouble" in updates[page.parts["status"]]
    assert str(tmp_path) not in updates[page.parts["status"]]
    assert "<i>" not in updates[page.parts["status"]]
    assert page.inputs["prompt"] not in updates


def test_another_model_brings_its_own_fields(jobs: Jobs, page_of: Any) -> None:
    page, _ = page_of(jobs)
    updates = page._model("other")
    assert set(updates) >= {
        page.inputs[name] for name in ("prompt", "class_label", "style", "size", "steps", "guidance")
    }
    given = controls(page.methods, model="other", class_label=3)
    job = jobs.get(page._submit(ME, "", *(given[name] for name in page.inputs))[page.parts["job"]])
    assert job is not None
    assert job.request.class_label == 3


# Comparing, and profiles


@dataclasses.dataclass
class FakeMeasured:
    results: dict[str, Any]
    rounds: int = 2
    ssim: float = 0.987
    verdict: str = "2.00 times faster; a small <difference>"

    def to_dict(self) -> dict[str, Any]:
        times = {"exact": {"end_to_end": 1.5}, "accelerated": {"end_to_end": 0.75}}
        speedup = {"denoise": 2.1, "end_to_end": 2.0}
        told = {"rounds": self.rounds, "ssim": self.ssim, "verdict": self.verdict, "failures": []}
        return {"median": times, "psnr_db": 36.64, "speedup": speedup} | told


def test_a_comparison_shows_both_pictures_and_what_was_measured(
    tmp_path: Path, fake: Fake, page_of: Any
) -> None:
    asked: list[Any] = []

    def compare(request: Request, methods: Any, rounds: int, *, on_step: Any) -> FakeMeasured:
        asked.append((request.images, request.accelerators, methods, rounds))
        on_step(Progress(0, 0, "load", 0.0))
        results = {
            kind: FakeResult(request.replace(seed=seed)) for kind, seed in (("exact", 1), ("accelerated", 2))
        }
        return FakeMeasured(results)

    jobs = Jobs(tmp_path / "out", fake, compare=compare, ledger=tmp_path / "jobs.sqlite")
    page, _ = page_of(jobs)
    given = controls(page.methods, speed=speed.BALANCED, images=3)
    values = [given[name] for name in page.inputs]
    noted = [
        given[name]
        for name in (
            "model",
            "size",
            "steps",
            "images",
            "speed",
            "frames",
            "profile",
            "scheduler",
            "guidance",
        )
    ]
    before = page._notes(*noted)
    assert (
        "Not measured on this model yet at 20 steps: delta-cache, as documented"
        in before[page.parts["speed_note"]]
    )
    assert "First run of this kind" in before[page.parts["estimate"]]
    job = jobs.get(page._measure(ME, "", *values)[page.parts["job"]])
    assert job is not None
    until(lambda: jobs.refresh(job).over)
    assert job.state == "done", job.error
    assert asked == [(1, job.request.accelerators, job.request.accelerators, 2)]
    assert [path.name for path in job.paths] == ["2-exact.png", "2.png"]
    shown = views.report(job)
    assert "2.00 times faster; a small &lt;difference&gt;." in shown
    assert "36.6 dB" in shown
    assert "2.10x" in shown
    from app_shown import updates as updates_of

    gallery = value_of(updates_of(job, page.parts, CARD)[page.parts["gallery"]])
    assert [one["caption"].rpartition(": ")[2] for one in gallery] == ["exact", "accelerated"]
    assert "Against the exact picture" not in views.report(Job(job.request, tmp_path, report=job.report))
    after = page._notes(*noted)[page.parts["speed_note"]]
    assert (
        "measured 2.00x end to end, PSNR 36.6 dB (worst 36.6 dB), on one picture only made on this computer"
        in after
    )
    jobs.close()


def test_a_profile_is_chosen_among_the_known(
    methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.profile import FOLDER, Profile, Range

    monkeypatch.chdir(tmp_path)
    assert form.profile_choices("toy") == {
        "choices": [("none: choose below", "")],
        "value": "",
        "visible": False,
    }
    expected = {
        "speedup_denoise": 2.0, "speedup_end_to_end": 1.9, "psnr_db": 36.0, "psnr_worst_db": 31.0, "pictures": 12
    }  # fmt: skip
    FOLDER.mkdir()
    Profile(
        model="toy", budget="psnr>=35", range=Range(steps=20), expected=expected,
        accelerators=({"name": "delta-cache", "mode": "whole"},),
    ).save(FOLDER / "quick.json")  # fmt: skip
    found = form.profile_choices("toy")
    assert (found["choices"][1], found["visible"]) == (("quick (psnr>=35)", "quick"), True)
    assert "36.0 dB (worst 31.0 dB)" in form.profile_note("toy", "quick")
    chosen = form.request_of(controls(methods, speed=form.CUSTOM, profile="quick"), methods)
    assert (chosen.profile, chosen.accelerators) == ("quick", ())
    assert form.request_of(controls(methods, profile="quick"), methods).profile is None, "exact stays exact"
    for name in ("profiles/quick.json", str(tmp_path / "profiles" / "quick.json"), "other"):
        with pytest.raises(RequestError, match="profile must be one of quick"):
            form.request_of(controls(methods, speed=form.CUSTOM, profile=name), methods)


def test_a_page_without_any_model_offers_ways_to_one_and_takes_it_up(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app_page import NOBODY, Page
    from pipelines import catalog

    monkeypatch.setattr(catalog, "CHECKPOINTS", tmp_path)
    monkeypatch.setenv("LEAPFROG_STATE", str(tmp_path / "state"))
    assert app.cards_for(None) == {}

    page = Page(jobs, {})
    page.build()
    house, create, models = page.house, page.tabs["Create"], page.tabs["Models"]
    assert (house.models, list(house.cards)) == ([], [NOBODY.name])
    assert create.parts["first_box"].visible
    assert "First, a model" in create.parts["empty"].value
    house.enter(ME, None)  # type: ignore[arg-type]
    given = form.values_of(Request(model=NOBODY.name, prompt="a dog"), NOBODY, create.methods)
    told = create._submit(ME, "", *(given[name] for name in create.inputs))
    assert "opened or downloaded first" in told[create.parts["status"]]
    assert jobs.ledger.counts()["waiting"] == 0
    models._known("toy", CARD)
    assert (house.models, list(create.cards)) == (["toy"], ["toy"])
    updates = create.renewed(NOBODY.name)
    assert value_of(updates[create.inputs["model"]]) == "toy"
    assert updates[create.parts["first_box"]].visible is False
    assert create.renewed("toy").keys() == {create.inputs["model"]}, "who has chosen keeps the form"


@pytest.mark.parametrize(
    "name", ["../x", "/etc", "a/../../b", "~", "c:x", "con", "a\\b", "a\0b", "link", "file", "x" * 300]
)
def test_a_folder_that_a_browser_names_lies_inside_the_output_folder(tmp_path: Path, name: str) -> None:
    from app_settings import folder_of

    root = tmp_path / "out"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    (root / "file").touch()
    for text, wanted in (("", root), (" birds/today/ ", root / "birds" / "today")):
        assert folder_of(root, text) == wanted
    if name == "/etc":  # a slash in front is taken off: it is a name like any other
        assert folder_of(root, name) == root / "etc"
        return
    with pytest.raises(RequestError, match="folder"):
        folder_of(root, name)


def test_the_folder_the_metadata_and_the_preview_reach_the_ledger(jobs: Jobs, page_of: Any) -> None:
    page, _ = page_of(jobs)
    given = controls(page.methods, folder="birds", metadata="prompt-free", preview=False)
    page._add(ME, "", *(given[name] for name in page.inputs))
    row = jobs.ledger.jobs(limit=1)[0]
    assert (Path(row.item.folder), row.item.request["metadata"]) == (jobs.folder / "birds", "prompt-free")
    assert row.item.tags["preview"] is False
