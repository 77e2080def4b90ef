"""Batch, Queue & History, Models and System: what stands behind the tabs, attacks on it, and one look in a browser."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import app_batch
import app_first
import app_history
import app_models
import app_page
import app_records as records
import app_system
from app_jobs import Jobs
from pipelines import catalog
from pipelines.background import Batches, Standing
from pipelines.catalog import Unavailable
from pipelines.jobs import Item, Ledger, digests_of
from pipelines.library import Download, Library, Offer
from pipelines.manifest import ManifestError
from pipelines.request import Request, RequestError
from pipelines.safe import ModelError

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 180_000
"""Longest wait for anything in the browser, in ms: busy machines are slow."""

# Stands in for `leapfrog`: the same batch, with a picture of one colour in the place of a network.
_FAKE = """
import os, signal, sys, threading, time
from PIL import Image
from pipelines import batch
from pipelines.request import Request
from pipelines.result import Picture, Result
from pipelines.workers import Worker

def make(request, on_step=None):
    from pipelines.generate import Cancelled, Progress
    while request.seed > 0 and os.path.exists(os.environ["HOLD"]):  # the first is made, the next stands until it is stopped
        time.sleep(0.05)
        if on_step(Progress(1, 2, "denoise", 0.1)) is False:
            raise Cancelled("stopped")
    if on_step(Progress(1, 2, "denoise", 0.1)) is False:
        raise Cancelled("stopped")
    if request.prompt == "break":
        raise ValueError("never works")
    return Result((Picture((Image.new("RGB", (8, 8), "red"),), request, {"timings": {}}),), request, {"timings": {}})

class Engine:
    def share(self, folder, missing, entries): return missing
    def start(self, ledger):
        self.worker = Worker(ledger, make=make, name="fake-worker", pause=0.02)
        self.thread = threading.Thread(target=self.worker.run, daemon=True)
        self.thread.start()
    def turn(self): return ""
    def stop(self, seconds):
        self.worker.stop()
        self.thread.join(seconds)

stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
what = batch.plan(sys.argv[3], sys.argv[5]) if sys.argv[2] == "run" else sys.argv[3]
batch.run(what, engine=Engine(), stopped=stopped)
"""


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")


def manifest(folder: Path, *rows: dict[str, Any], name: str = "birds.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Batches]:
    monkeypatch.setenv("HOLD", str(tmp_path / "hold"))
    script = tmp_path / "fake.py"
    script.write_text(_FAKE)
    made = Batches(tmp_path / "out" / "batches", command=[sys.executable, str(script)])
    yield made
    for child in made._children.values():
        child.kill()
        child.wait()
    made.close()


def plan(batches: Batches, file: Path, *more: Path, owner: str = "ann", into: str = "") -> Any:
    name, received = batches.receive(owner, [file, *more], into)
    return name, received, batches.plan(name, owner, received, ["emoji"])


def test_a_plan_tells_items_duplicates_and_room(batches: Batches, tmp_path: Path) -> None:
    file = manifest(
        tmp_path / "up", {"id": "a", "prompt": "dog", "n": 2}, {"prompt": "cat"}, {"prompt": "cat"}
    )
    _, _, found = plan(batches, file)
    assert (len(found.manifest.entries), found.manifest.repeated, len(found.missing), found.done) == (
        3,
        1,
        3,
        0,
    )
    shown = app_batch.plan_view(found, 12.0)
    assert "of them 1 asked for twice" in shown
    assert "about 12 s for one worker (estimate)" in shown
    assert "not known yet" in app_batch.plan_view(found, None)


@pytest.mark.parametrize(
    "row",
    [
        {"model": "/etc"}, {"model": "some/model"}, {"model": "."}, {"image": "/etc/passwd"}, {"image": "../secret.png"},
        {"profile": "/etc/passwd"}, {"loras": ["secret"]}, {"loras": ["/etc/passwd:0.5"]}, {"mask": "\\\\host\\share"},
        {"controls": ["edges=/etc/passwd"]}, {"controls": ["secret=here.png"]}, {"clip": "/proc/self"}, {"last_image": "~/x.png"},
    ],
)  # fmt: skip
def test_an_uploaded_manifest_opens_nothing_but_what_came_with_it(
    batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]
) -> None:
    (tmp_path / "secret").write_bytes(b"{}")
    monkeypatch.chdir(tmp_path)  # a bare name must not find a file where the page was started
    file = manifest(tmp_path / "up", {"prompt": "dog"}, {"prompt": "dog", "seed": 3} | row)
    (tmp_path / "up" / "here.png").write_bytes(b"\x89PNG")
    with pytest.raises(ManifestError) as told:
        plan(batches, file, tmp_path / "up" / "here.png")
    assert {one.line for one in told.value.problems} == {2}


def test_all_mistakes_are_told_with_their_lines_and_shown_escaped(batches: Batches, tmp_path: Path) -> None:
    file = manifest(
        tmp_path / "up",
        {"prompt": "dog", "steps": 0},
        {"promt": "cat"},
        {"prompt": "<img src=x>", "seed": "<b>"},
    )
    with pytest.raises(ManifestError) as told:
        plan(batches, file)
    assert {one.line for one in told.value.problems} == {1, 2, 3}
    shown = app_batch.problems_view(told.value)
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown.replace("<b role", "")


@pytest.mark.parametrize(
    "names",
    [(), ("a.jsonl", "b.csv"), ("a.jsonl", ".x.png"), ("a.jsonl", "con.png"), ("a.jsonl", "x.png", "X.png")],
)
def test_uploads_that_cannot_be_used_are_refused(
    batches: Batches, tmp_path: Path, names: tuple[str, ...]
) -> None:
    files = []
    for place, name in enumerate(names):
        (tmp_path / str(place)).mkdir()
        (tmp_path / str(place) / name).write_text('{"prompt": "dog"}')
        files.append(tmp_path / str(place) / name)
    with pytest.raises(RequestError):
        batches.receive("ann", files)
    assert not list(batches.root.glob("*"))


def test_a_batch_is_begun_paused_taken_up_again_and_exported(batches: Batches, tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    rows = [{"id": f"item{place}", "prompt": "dog", "seed": place} for place in range(4)]
    file = manifest(tmp_path / "up", *rows, {"id": "bad", "prompt": "break"})
    name, received, _ = plan(batches, file)
    assert batches.mine("ann") == []
    batches.start(name, "ann", received, 1)
    assert batches.mine("ann") == [(name, "birds.jsonl")]
    until(lambda: batches.look(name, "ann").counts.get("done", 0) == 1)
    until(lambda: bool(batches.look(name, "ann").workers))
    assert batches.pause(name, "ann")
    until(lambda: batches.look(name, "ann").state == "paused")
    stood = batches.look(name, "ann")
    assert (stood.counts["running"], stood.counts["done"]) == (0, 1)
    (tmp_path / "hold").unlink()
    later = Batches(batches.root, command=batches._command)  # another process, as after a restart of the page
    later.resume(name, "ann", 1)
    until(lambda: later.look(name, "ann").state == "finished")
    counts = later.look(name, "ann").counts
    assert (counts["done"], counts["poisoned"]) == (4, 1)
    assert "never works" in later.look(name, "ann").failures[0][1]
    assert "never works" in app_batch.standing_view(later.look(name, "ann"))
    results, failures = later.export(name, "ann")
    assert len(results.read_text().splitlines()) == 4
    assert len(failures.read_text().splitlines()) == 1
    assert len(list((batches.root / name).glob("*.png"))) == 4
    again, received, found = plan(batches, file, into=name)
    assert (again, found.done, len(found.missing)) == (name, 4, 1)
    child = later._children.get(name)
    if child is not None:  # a look has not seen its end yet
        child.wait(120)
    later.close()


def test_a_batch_is_its_owners_alone(batches: Batches, tmp_path: Path) -> None:
    name, received, _ = plan(batches, manifest(tmp_path / "up", {"prompt": "dog"}))
    batches._note(batches.root / name, batches._told(batches.root / name) | {"begun": True})
    for does in (batches.look, batches.cancel, batches.export, batches.ledger, batches.pause):
        with pytest.raises(RequestError):
            does(name, "bob")
        with pytest.raises(RequestError):
            does("../" + name, "ann")
    with pytest.raises(RequestError):
        batches.receive("bob", [received], name)
    with pytest.raises(RequestError):
        batches.start(name, "ann", tmp_path / "up" / "birds.jsonl", 1)  # not the copy that was checked
    with pytest.raises(RequestError):
        batches.look(name, "")
    assert batches.mine("bob") == []
    assert "ann" not in (batches.root / name / ".leapfrog" / "page.json").read_text()


def test_uploads_that_were_never_begun_do_not_stay(batches: Batches, tmp_path: Path) -> None:
    file = manifest(tmp_path / "up", {"prompt": "dog"})
    first, second = plan(batches, file)[0], plan(batches, file)[0]
    other = plan(batches, file, owner="bob")[0]
    assert sorted(one.name for one in batches.root.iterdir()) == sorted([second, other])
    assert first != second


def test_a_batch_that_cannot_be_begun_says_why(batches: Batches, tmp_path: Path) -> None:
    batches._command = [sys.executable, "-c", "import sys; sys.exit('leapfrog: no room in ' + sys.argv[5])"]
    name, received, _ = plan(batches, manifest(tmp_path / "up", {"prompt": "dog"}))
    batches.start(name, "ann", received, 1)
    until(lambda: batches.look(name, "ann").state == "broken")
    assert batches.look(name, "ann").error == "no room in "  # and not where the folder lies
    with pytest.raises(RequestError):
        batches.start(name, "ann", received, 99)


def test_how_a_batch_stands_is_shown_escaped() -> None:
    bad = "<script>alert(1)</script>"
    now = Standing(
        name="x", title=bad, state="running", counts={"done": 1, "waiting": 3}, pace=0.1, left=30.0,
        workers=((bad, bad, bad, 2.0),), failures=((bad, bad),), folder=bad,
    )  # fmt: skip
    shown = app_batch.standing_view(now, bad)
    assert "<script>" not in shown
    assert "6.0 a minute · about 30 s left" in shown
    assert 'aria-valuenow="25"' in shown


@pytest.mark.parametrize("alone", [True, False])
def test_priorities_make_the_order_that_was_asked_for(alone: bool) -> None:
    import itertools

    for count in range(6):
        for numbers in itertools.permutations(range(1, count + 1)):
            made = records.order(numbers, alone=alone)
            placed = sorted(zip(numbers, made, strict=True), key=lambda one: (-one[1], one[0]))
            assert [number for number, _ in placed] == list(numbers)
            assert alone or max(made, default=0) <= 0


class House(app_page.House):
    """What the tabs need of the page, without a page."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            Jobs(folder, ledger=folder / "jobs.sqlite", workers=0), {"emoji": catalog.shipped()["emoji"]}
        )


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "house")
    yield made
    made.jobs.close()


def ask(ledger: Ledger, prompt: str, owner: str = "ann", **more: Any) -> str:
    request = Request(prompt=prompt, **more).to_dict()
    return ledger.add([Item(request=request, id=prompt, owner=owner, tags={"source": "page"})])[0].name


def test_the_list_holds_ones_own_jobs_and_can_be_searched(house: House) -> None:
    ledger, list_ = house.jobs.ledger, records.Records(house)  # type: ignore[arg-type]
    ask(ledger, "a dog")
    ask(ledger, "a fast cat", accelerators=("delta-cache",))
    ask(ledger, "bob's", owner="bob")

    def words(**search: Any) -> list[str]:
        return [one.words for one in list_.find("ann", records.Search(**search))]

    assert sorted(words()) == ["a dog", "a fast cat"]
    assert words(text="DOG") == ["a dog"]
    assert words(speed="exact") == ["a dog"]
    assert words(speed="delta-cache") == ["a fast cat"]
    assert words(states=("done",)) == words(model="other") == []
    assert len(words(model="emoji", date="the last hour")) == 2
    ledger.clock = lambda: time.time() + 7200
    assert words(date="the last hour") == []
    (row,) = [app_history.row_of(one, "emoji") for one in list_.find("ann", records.Search(text="dog"))]
    assert row[1:6] == ["waiting", "a dog", "emoji", "exact", "page"]


def test_a_job_is_moved_cancelled_and_retried_by_its_owner_alone(house: House) -> None:
    ledger, list_ = house.jobs.ledger, records.Records(house)  # type: ignore[arg-type]
    names = [ask(ledger, text) for text in ("one", "two", "three")]
    assert list_.do("first", "ann", names[2]) == "It is number 1 of yours now."
    assert list_.do("later", "ann", names[0]) == "It is number 3 of yours now."
    leased = [ledger.lease("w") for _ in range(3)]
    assert [job.item.id for job in leased if job] == ["three", "two", "one"]
    assert "Only what waits" in list_.do("first", "ann", names[0])
    for what in ("first", "cancel", "retry"):
        with pytest.raises(RequestError):
            list_.do(what, "bob", names[0])
    assert list_.get("bob", names[0]) is None
    assert list_.get("ann", "no-batch/" + names[0]) is None
    assert "not over" in list_.do("retry", "ann", names[0])
    assert list_.do("cancel", "ann", names[0]) == "It is stopped."
    assert list_.do("retry", "ann", names[0]) == "It is made again."
    assert ledger.counts(owner="ann")["waiting"] == 1


def test_moving_ones_own_never_overtakes_others(house: House) -> None:
    ledger, list_ = house.jobs.ledger, records.Records(house)  # type: ignore[arg-type]
    ask(ledger, "bob's", owner="bob")
    names = [ask(ledger, text) for text in ("one", "two")]
    list_.do("first", "ann", names[1])
    leased = [ledger.lease("w") for _ in range(3)]
    assert [job.item.id for job in leased if job] == ["bob's", "two", "one"]


def test_a_missing_model_is_found_by_its_weights_or_told(house: House) -> None:
    digest = digests_of({"model": "emoji"})["emoji"]
    asked = Request(prompt="dog", model="emoji", image="/home/ann/private/start.png").to_dict()
    found, told = records.matched(
        asked, {"weights": digest, "image": {"name": "start.png", "sha256": "sha256:12"}}, house.cards
    )
    assert found is not None
    assert found.model == "emoji"
    assert told == ["Its image start.png (sha256:12) is to be given again."]
    found, told = records.matched(
        asked | {"model": "/home/bob/emoji", "image": None}, {"weights": digest}, house.cards
    )
    assert found is not None
    assert found.model == "emoji"
    assert "weights are the same" in told[0]
    found, told = records.matched(asked | {"model": "/home/bob/other"}, {"weights": "sha256:77"}, house.cards)
    assert found is None
    assert told == ["The model other with the weights sha256:77... is missing; open its folder in Models."]
    assert "download it" in records.matched(asked | {"model": "org/name"}, {}, house.cards)[1][0]
    _, told = records.matched(asked | {"image": None}, {"weights": "sha256:77"}, house.cards)
    assert "other weights" in told[0]
    steering = {"parts": [{"given": "/home/ann/style.safetensors", "sha256": "ab" * 32}, "odd"]}
    _, told = records.matched(asked | {"image": None}, {"weights": digest, "steering": steering}, house.cards)
    assert told == [f"The adapter style.safetensors ({'ab' * 11}a) is missing here."]


def weights(tensors: dict[str, int], start: bytes = b"") -> bytes:
    """Return a safetensors file of zeros, or one that begins otherwise."""
    header, place = {}, 0
    for name, count in tensors.items():
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [place, place + 4 * count]}
        place += 4 * count
    text = json.dumps(header).encode()
    return start + struct.pack("<Q", len(text)) + text + b"\0" * place


class FakeHub:
    """A hub with one model; every question is noted."""

    def __init__(self, transformer: bytes = weights({"x": 4})) -> None:
        index = {
            "_class_name": "FluxPipeline",
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": [None, None],
        }
        self.files = {
            "model_index.json": json.dumps(index).encode(), "transformer/config.json": b'{"_class_name": "FluxTransformer2DModel"}',
            "transformer/diffusion_pytorch_model.safetensors": transformer, "evil.py": b"import os", "transformer/evil.py": b"",
            "transformer/diffusion_pytorch_model.bin": b"pickle", "../out.json": b"{}", "README.md": b"words",
        }  # fmt: skip
        self.asked: list[str] = []
        self.go = threading.Event()
        self.go.set()

    def about(self, model: str) -> tuple[str, str, dict[str, int]]:
        self.asked.append(model)
        if model == "no/net":
            raise Unavailable("the hub cannot be reached")
        return "c0ffee", "apache-2.0", {name: len(data) for name, data in self.files.items()}

    def get(self, model: str, commit: str, file: str, folder: Path) -> None:
        assert commit == "c0ffee"
        self.asked.append(file)
        assert self.go.wait(120)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(self.files[file])


def test_a_download_is_offered_first_and_can_be_put_away(tmp_path: Path) -> None:
    hub = FakeHub()
    library = Library(tmp_path / "state", hub)
    assert library.cards() == {}
    assert library.names() == list(catalog.shipped())
    assert hub.asked == [], "nothing may be asked before a person asks"
    offer = library.offer(" org/tiny ")
    assert (offer.license, offer.commit, [name for name, _ in offer.files]) == (
        "apache-2.0", "c0ffee",
        ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"],
    )  # fmt: skip
    assert not list((tmp_path / "state").rglob("*.safetensors"))
    shown = app_models.offer_view(offer)
    assert "apache-2.0" in shown
    assert "c0ffee" in shown
    download = Download(library, offer).start()
    download.join(120)
    assert (download.state, download.error) == ("done", "")
    found = library.describe(download.name)
    assert (found.source, found.refused, found.license, found.parameters) == (
        "downloaded",
        "",
        "apache-2.0",
        4,
    )
    assert [(part.name, part.state) for part in found.parts] == [
        ("transformer", "present"),
        ("vae", "elsewhere"),
    ]
    assert download.name in library.cards()
    assert not list(Path(download.name).rglob("*.py"))
    place = library.remove(download.name)
    assert (place / "model_index.json").exists()
    assert download.name not in library.names()
    for name in ("emoji", str(ROOT), "/etc", download.name):
        with pytest.raises(ModelError):
            library.remove(name)


def test_what_is_no_safetensors_is_not_kept_and_a_download_can_be_stopped(tmp_path: Path) -> None:
    hub = FakeHub(b"\x80\x04pickle" + b"\0" * 90)
    library = Library(tmp_path, hub)
    download = Download(library, library.offer("org/evil")).start()
    download.join(120)
    assert download.state == "failed"
    assert "Nothing of it was kept" in app_models.download_view(download)
    assert str(tmp_path) not in app_models.download_view(download)
    hub.files["transformer/diffusion_pytorch_model.safetensors"] = weights({"x": 4})
    offer = library.offer("org/slow")
    hub.go.clear()
    download = Download(library, offer).start()
    download.stop()
    hub.go.set()
    download.join(120)
    assert download.state == "stopped"
    assert not list(library.models.iterdir())
    with pytest.raises(RequestError):
        Download(library, dataclasses.replace(offer, free=10)).start()


@pytest.mark.parametrize(
    "model", ["", "emoji", "/etc/passwd", "a/b/c", "../x", "a/..", "http://x/y", "org/na me", "org/-x"]
)
def test_what_is_no_hub_id_is_not_even_asked_for(tmp_path: Path, model: str) -> None:
    hub = FakeHub()
    with pytest.raises(ModelError):
        Library(tmp_path, hub).offer(model)
    assert hub.asked == []


def test_a_hub_without_a_pipeline_or_with_code_is_refused(tmp_path: Path) -> None:
    hub = FakeHub()
    library = Library(tmp_path, hub)
    with pytest.raises(Unavailable):
        library.offer("no/net")
    hub.files["model_index.json"] = b'{"_class_name": ["mine", "Pipe"]}'
    with pytest.raises(ModelError, match="custom pipeline code"):
        library.offer("org/code")
    del hub.files["model_index.json"]
    with pytest.raises(ModelError, match="no diffusers pipeline"):
        library.offer("org/none")


def test_a_folder_is_opened_remembered_and_refused_where_it_is_unsafe(tmp_path: Path) -> None:
    shutil.copytree(catalog.CHECKPOINTS / "emoji", tmp_path / "mine")
    library = Library(tmp_path / "state", FakeHub())
    name, card = library.open(str(tmp_path / "mine"))
    assert (name, card.title) == (str(tmp_path / "mine"), "emoji")
    assert list(Library(tmp_path / "state").cards()) == [name]
    assert not library.removable(name)
    (tmp_path / "mine" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(
        b"\x80\x04 pickle"
    )
    assert library.cards() == {}
    found = library.describe(name)
    assert found.refused
    assert "trouble" in app_models.about_view(found, [])
    library.forget(name)
    assert library.names() == list(catalog.shipped())
    for bad in ("org/name", str(tmp_path), "/etc/passwd", ""):
        with pytest.raises(ModelError):
            library.open(bad)


def test_the_list_of_models_may_be_damaged(tmp_path: Path) -> None:
    for text in ("", "[]", '{"opened": [1], "downloaded": {}}', "{" * 5000):
        (tmp_path / "models.json").write_text(text)
        assert Library(tmp_path).names() == list(catalog.shipped())


def visit(
    client: str = "127.0.0.1",
    host: str = "localhost:7860",
    owner: str = "",
    user: str | None = None,
    **headers: str,
) -> Any:
    given = {"host": host} | {name.replace("_", "-"): value for name, value in headers.items()}
    inner = SimpleNamespace(
        client=SimpleNamespace(host=client), headers=given, scope={"state": {"owner": owner}}
    )
    return SimpleNamespace(request=inner, username=user)


def test_only_who_sits_at_the_computer_opens_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LEAPFROG_AUTH", "LEAPFROG_TOKENS", "SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    assert app_models.at_home(visit())
    assert app_models.at_home(visit("::1", "[::1]:7860"))
    assert app_models.at_home(visit(host="127.0.0.1"))
    for strange in (
        visit("10.0.0.7"), visit(host="frog.example:80"), visit(host=""), visit(x_forwarded_for="1.2.3.4"), visit(owner="ann"),
        visit(user="ann"), visit(host="localhost.evil.example:1"), SimpleNamespace(),
    ):  # fmt: skip
        assert not app_models.at_home(strange)
    monkeypatch.setenv("LEAPFROG_AUTH", "a:b")
    assert not app_models.at_home(visit())


def test_a_model_is_told_with_its_parts_and_whether_it_is_safe(tmp_path: Path) -> None:
    found = Library(tmp_path).describe("emoji")
    assert (found.source, found.refused, found.dtypes) == ("shipped", "", "BF16")
    assert found.digest.startswith("sha256:")
    assert {part.name: part.state for part in found.parts}["transformer"] == "present"
    shown = app_models.about_view(
        dataclasses.replace(found, title="<b>x</b>"), [("style", "lora", "1 MB", "8/8 keys")]
    )
    assert "<b>x" not in shown
    assert "8/8 keys" in shown
    assert "of a package of its own" in shown
    offer = Offer(model="a/b", commit="c", license="", files=(("x", 9),), free=1)
    assert "not told" in app_models.offer_view(offer)
    assert "too little room" in app_models.offer_view(offer)


def test_the_first_screen_offers_three_ways_and_asks_nobody() -> None:
    import gradio as gr

    cards = app_first.FirstScreen(catalog.shipped())
    with gr.Blocks() as page:
        cards.draw()
        cards.connect()
    shown = json.dumps(page.get_config_file())
    for words in (
        "Try the built-in model",
        "Open a model on this computer",
        "Download a model",
        "Nothing leaves this computer.",
    ):
        assert words in shown
    assert list(cards.parts) == ["builtin", "open", "download"]
    assert cards.parts["builtin"].interactive
    other = app_first.FirstScreen({})
    with gr.Blocks():
        other.draw()
    assert not other.parts["builtin"].interactive


def test_facts_to_copy_tell_no_prompt_no_user_and_no_folder(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_system, "_user", lambda: "annabel")
    monkeypatch.setattr(app_system.socket, "gethostname", lambda: "anns-computer")
    monkeypatch.setenv("HOME", "/srv/annabel")
    ask(house.jobs.ledger, "my private prompt")
    house.cards["/srv/annabel/secret-model"] = house.cards["emoji"]
    house.jobs._problem = "disk /srv/annabel/x on anns-computer is full, see /home/bob/y"
    text = app_system.diagnostics(house)  # type: ignore[arg-type]
    known = json.loads(text)
    for word in ("private", "annabel", "anns-computer", "bob", "secret-model"):
        assert word not in text
    assert known["jobs"]["waiting"] == 1
    assert known["computer"]["version of torch"]
    assert known["models"] == ["emoji", "a model of this computer"]


def test_every_accelerator_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from acceleration.delta_cache import DeltaCache
    from pipelines.request import accelerator_kinds

    app_system.accelerators.cache_clear()
    monkeypatch.setattr(DeltaCache, "refuses", lambda self, network: "it has <no> blocks")
    found = {name: (verdict, reason) for name, verdict, reason in app_system.accelerators("emoji")}
    app_system.accelerators.cache_clear()
    assert set(found) == set(accelerator_kinds())
    assert found["delta-cache"] == ("no", "it has <no> blocks")
    assert found["adaspa"][0] == "yes"
    assert "Here: " in found["adaspa"][1]
    assert "&lt;no&gt;" in app_system.accelerators_view((("x", "no", "it has <no> blocks"),))
    assert {row[1] for row in app_system.accelerators("not/here")} == {"not known"}


def test_the_doctor_is_shown_with_problems_first(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = app_system.doctor_view(
        {"problems": ["no <b>text</b> encoder"], "disk_free_gb": 3.5, "models": {"emoji": "sha256:1"}}
    )
    assert shown.index("no &lt;b&gt;") < shown.index("disk free gb")
    assert "Nothing is wrong" not in shown
    assert "Nothing is wrong" in app_system.doctor_view({"problems": []})


playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "LEAPFROG_STATE": str(tmp_path / "state"),
    }  # fmt: skip
    for name in (
        "SPACE_ID",
        "LEAPFROG_AUTH",
        "LEAPFROG_TOKENS",
        "GRADIO_SERVER_NAME",
        "GRADIO_SERVER_PORT",
        "GRADIO_TEMP_DIR",
    ):
        environment.pop(name, None)
    command = [sys.executable, "app.py", "--output", str(tmp_path / "pictures"), "--workers", "0"]
    piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **piped) as process:
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(
            target=lambda: [lines.put(line) for line in process.stdout or ()] + [lines.put("")], daemon=True
        ).start()
        try:
            while not (found := re.search(r"http://\S+", line := lines.get(timeout=WAIT / 1000))):
                assert line
            yield found[0]
        finally:
            process.terminate()
            try:
                process.wait(120)
            finally:
                process.kill()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this computer")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_batch_and_the_other_tabs_in_a_browser(page: str, tmp_path: Path) -> None:
    expect = playwright.expect
    with playwright.sync_playwright() as found:
        browser = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(WAIT)
        expect.set_options(timeout=WAIT)
        broken: list[str] = []
        tab.on("pageerror", lambda error: broken.append(str(error)))
        tab.goto(page)
        tab.locator("#generate").wait_for()
        tab.locator("#tab-batch-button").click()
        bad = manifest(tmp_path / "up", {"prompt": "dog", "steps": 0}, {"promt": "cat"}, name="bad.jsonl")
        drop = tab.locator("#batch-files input[type=file]")
        drop.set_input_files([bad])
        expect(tab.locator("#batch-plan")).to_contain_text("mistakes in bad.jsonl")
        expect(tab.locator("#batch-start")).to_be_disabled()
        good = manifest(
            tmp_path / "up", {"id": "dog", "prompt": "dog, cartoon", "n": 2, "steps": 1}, name="good.jsonl"
        )
        tab.get_by_label("Clear").first.click()
        drop.set_input_files([good])
        expect(tab.locator("#batch-start")).to_have_text("Start: make 2")
        tab.locator("#batch-start").click()
        expect(tab.locator("#batch-standing")).to_contain_text("of 2")
        tab.reload()  # whoever comes back finds it again
        tab.locator("#generate").wait_for()
        tab.locator("#tab-batch-button").click()
        expect(tab.locator("#batch-standing")).to_contain_text("Finished")
        expect(tab.locator("#batch-standing")).to_contain_text("2 of 2")
        expect(tab.locator("#batch-gallery img")).to_have_count(2)
        tab.locator("#tab-history-button").click()
        tab.locator("#history-refresh").click()
        expect(tab.locator("#history-table")).to_contain_text("dog, cartoon")
        (file, _) = sorted((tmp_path / "pictures" / "batches").glob("*/*.png"))
        tab.locator("#history-drop input[type=file]").set_input_files(file)
        expect(tab.locator("#history-embedded")).to_contain_text("would change")
        tab.locator("#history-apply").click()
        expect(tab.locator("#prompt textarea")).to_have_value("dog, cartoon")
        tab.locator("#tab-models-button").click()
        expect(tab.locator("#models-about")).to_contain_text("safetensors only, headers checked")
        tab.locator("#tab-system-button").click()
        expect(tab.locator("#system-accelerators")).to_contain_text("delta-cache")
        tab.set_viewport_size({"width": 360, "height": 780})
        for name, place in (("Batch", "batch"), ("Queue & History", "history"), ("Models", "models"), ("System", "system")):
            tab.locator(".overflow-menu > button").first.click()
            tab.locator(".overflow-dropdown button", has_text=name).first.click()
            expect(tab.locator(f"#tab-{place}")).to_be_visible()
            tab.wait_for_function("document.documentElement.scrollWidth <= 360")
        browser.close()
        assert broken == []
