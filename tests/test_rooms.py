"""Compare, Grid and Tune: what they measure, ask and show."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import app_compare
import app_compare_views
import app_grid
import app_grid_views
import app_pairs
import app_tune
from app_page import House
from app_settings import Choice
from pipelines._tuning import item, tuned
from pipelines.catalog import Card
from pipelines.compare import difference_of_clips
from pipelines.jobs import Item, Ledger
from pipelines.likeness import _check_size, changed, likeness, psnr_of
from pipelines.request import Request, RequestError
from pipelines.result import Picture
from pipelines.workers import Worker

ROOT = Path(__file__).resolve().parents[1]
OWNER, OTHER = "o" * 32, "x" * 32


def noise(seed: int, frames: int = 1, size: tuple[int, int] = (40, 24)) -> list[Image.Image]:
    numbers = np.random.default_rng(seed)
    return [
        Image.fromarray(numbers.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        for _ in range(frames)
    ]


def saved(path: Path, frames: list[Image.Image], request: Request | None = None) -> Path:
    request = request or Request(prompt="a dog")
    path.write_bytes(Picture(tuple(frames), request, {"effective": {"fps": 8}}).png())
    return path


def test_two_files_are_as_far_apart_as_their_pixels(tmp_path: Path) -> None:
    a, b = (
        saved(tmp_path / "a.png", noise(1, size=(64, 600))),
        saved(tmp_path / "b.png", noise(2, size=(64, 600))),
    )
    found = likeness(a, b)
    with Image.open(a) as x, Image.open(b) as y:
        plain = difference_of_clips([x], [y])
    assert found.difference.psnr == pytest.approx(plain.psnr, abs=1e-9)
    assert found.difference.ssim == pytest.approx(plain.ssim, abs=1e-12), "bands of rows change nothing"
    assert found.difference.largest == plain.largest
    assert psnr_of(a, b) == pytest.approx(plain.psnr, abs=1e-9)
    assert (found.is_clip, found.flicker, found.size) == (False, None, (64, 600))
    same = likeness(a, a)
    assert (same.verdict(), same.difference.psnr) == ("identical", math.inf)
    json.dumps(found.to_dict() | same.to_dict(), allow_nan=False)


def test_a_clip_tells_its_worst_frame_its_flicker_and_its_motion(tmp_path: Path) -> None:
    still = [Image.new("RGB", (32, 32), (level, level, level)) for level in (100, 110, 120, 130)]
    other = [Image.new("RGB", (32, 32), (level, level, level)) for level in (100, 105, 140, 115)]
    found = likeness(saved(tmp_path / "a.png", still), saved(tmp_path / "b.png", other))
    assert found.is_clip
    assert found.worst == 2
    assert found.frames[2] == pytest.approx(10 * math.log10(255**2 / 20**2))
    assert found.motions == pytest.approx((10.0, (5 + 35 + 25) / 3))
    assert found.flicker == pytest.approx((5 + 25 + 35) / 3)
    assert found.scale == 32
    text = app_compare_views.numbers(found, [{"request": {}}, {"request": {}}], None)
    assert "frame 3 of 4" in text
    assert "flicker" in text
    assert "217% of it" in text


def test_words_follow_the_noise_floor(tmp_path: Path) -> None:
    (frame,) = noise(3)
    near = np.asarray(frame).astype(int)
    near[::2] = np.clip(near[::2] + 2, 0, 255)
    a, b = (
        saved(tmp_path / "a.png", [frame]),
        saved(tmp_path / "b.png", [Image.fromarray(near.astype(np.uint8))]),
    )
    found = likeness(a, b)
    assert found.verdict() == "small"
    assert found.verdict(floor=30.0) == "within noise"
    assert found.verdict(floor=math.inf) == "small", "an exact run that repeats bit for bit leaves no room"
    assert app_compare.floor_of(None) is None
    assert app_compare.floor_of({"floor": [{"psnr_db": None}]}) == math.inf
    assert app_compare.floor_of({"floor": [{"psnr_db": 41.0}, {"psnr_db": 39.5}]}) == 39.5


def test_what_cannot_be_compared_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = saved(tmp_path / "a.png", noise(1))
    (tmp_path / "text.png").write_text("no picture")
    for other, words in (
        (saved(tmp_path / "wide.png", noise(1, size=(48, 24))), "48 x 24"),
        (saved(tmp_path / "clip.png", noise(1, frames=2)), "2 frames"),
        (tmp_path / "text.png", "readable"),
    ):
        with pytest.raises(RequestError, match=words):
            likeness(a, other)
    huge = tmp_path / "huge.png"
    Image.new("1", (800, 800)).save(huge)
    monkeypatch.setattr("pipelines.likeness.PIXELS", 600_000)
    with pytest.raises(RequestError, match="million"):
        likeness(huge, huge)
    assert psnr_of(a, tmp_path / "gone.png") is None


@pytest.mark.parametrize(("frames", "wide", "high"), [(161, 704, 512), (129, 1280, 720), (81, 1280, 720), (49, 720, 480)])
def test_what_families_of_clips_make_by_themselves_can_be_compared(frames: int, wide: int, high: int) -> None:
    _check_size("A", frames * wide * high)
    with pytest.raises(RequestError, match="million"):
        _check_size("A", 1000 * wide * high)


def test_settings_that_differ_are_named_first_and_escaped(tmp_path: Path) -> None:
    a, b = (
        Request(prompt="a <b>dog</b>", steps=4),
        Request(prompt="a cat", steps=4, accelerators=("delta-cache:interval=3",)),
    )
    rows = changed(a.to_dict(), b.to_dict())
    assert [name for name, _, _ in rows] == ["prompt", "accelerators"]
    assert rows[1][1:] == ("none (exact)", "delta-cache:interval=3")
    path = saved(tmp_path / "a.png", noise(1), a)
    told = [{"request": one.to_dict()} for one in (a, b)]
    text = app_compare_views.numbers(likeness(path, path), told, math.inf)
    assert "<b>dog" not in text
    assert text.index("Settings that differ") < text.index("Identical, bit for bit")
    assert "repeats bit for bit" in text


class Jobs:
    """As much of `app_jobs.Jobs` as the rooms use."""

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        self.ledger, self.folder, self.started = ledger, folder, 0

    def start(self) -> None:
        self.started += 1


@pytest.fixture
def house(tmp_path: Path) -> Any:
    jobs = Jobs(Ledger(tmp_path / "jobs.sqlite"), tmp_path)
    card = Card(name="emoji", steps=28, guidance=3.0)
    made = House(jobs, {"emoji": card})  # type: ignore[arg-type]
    made.session = lambda request: request  # type: ignore[method-assign,assignment,return-value]
    return made


def asked(**more: Any) -> list[Any]:
    given = {"model": "emoji", "prompt": "a dog", "class_label": 0, "steps": 4.0, "guidance": 3.0, "seed": 1.0, "seeds": 1,
             "exact": True, "x field": "steps", "x values": "4, 6", "y field": "", "y values": "",
             "z field": "", "z values": ""} | more  # fmt: skip
    return list(given.values())


@pytest.mark.parametrize(
    "more",
    [{"x field": "image", "x values": "/etc/passwd"}, {"x field": "lora:/etc/passwd", "x values": "0,1"},
     {"x field": "profile", "x values": "/etc/passwd"}, {"model": "/somewhere/else"}, {"x field": "model", "x values": "a/b"},
     {"x values": ""}, {"x field": ""}, {"x field": "seed", "x values": ",".join(map(str, range(64))), "seeds": 8,
      "y field": "steps", "y values": "1,2,3,4,5"}],
)  # fmt: skip
def test_a_browser_chooses_only_what_is_offered_and_opens_no_file(house: Any, more: dict[str, Any]) -> None:
    room = app_grid.Grid(house)
    _, told, _ = room._start(OWNER, *asked(**more))  # type: ignore[arg-type]
    assert 'role="alert"' in told
    assert house.jobs.ledger.jobs() == []
    assert 'role="alert"' in room._dry(*asked(**more))


def test_a_remembered_grid_is_held_to_the_same_rules(house: Any) -> None:
    room = app_grid.Grid(house)
    made = json.loads(room._start(OWNER, *asked())[0])  # type: ignore[arg-type]
    assert room._grid(json.dumps(made)) is not None
    for wrong in (
        made | {"axes": ["image=/etc/passwd"]},
        made | {"request": made["request"] | {"image": "/etc/passwd"}},
        made | {"request": made["request"] | {"model": "/somewhere/else"}},
        made | {"seeds": 10**6},
    ):
        assert room._grid(json.dumps(wrong)) is None
    for wrong in ("", "{", "[" * 100_000, "null"):
        assert room._grid(wrong) is None


def test_a_grid_of_the_page_stops_resumes_and_is_seen_by_nobody_else(house: Any) -> None:
    room, ledger = app_grid.Grid(house), house.jobs.ledger
    made, told, _ = room._start(OWNER, *asked())  # type: ignore[arg-type]
    assert (told, house.jobs.started) == ("", 1)
    rows = ledger.jobs(owner=OWNER)
    assert len(rows) == 2
    assert {row.item.batch for row in rows} == {app_grid.batch_of(OWNER)}
    assert {Path(row.item.folder).parent for row in rows} == {house.folder / "grids"}
    assert OWNER not in rows[0].item.folder + rows[0].item.batch, "an owner's name is a secret"
    room._stop(OTHER, made)  # type: ignore[arg-type]
    assert ledger.counts()["waiting"] == 2
    assert 'role="alert"' in room._retry(OTHER, made)  # type: ignore[arg-type]
    room._stop(OWNER, made)  # type: ignore[arg-type]
    assert ledger.counts()["cancelled"] == 2
    room._start(OWNER, *asked())  # type: ignore[arg-type]
    assert ledger.counts() | {"waiting": 0} == dict.fromkeys(ledger.counts(), 0)
    assert ledger.counts()["waiting"] == 2
    job = ledger.lease("w")
    ledger.failed(job, "no", again=False)
    assert room._retry(OWNER, made, "another") != ""  # type: ignore[arg-type]
    assert room._retry(OWNER, made, job.name) == ""  # type: ignore[arg-type]
    assert ledger.counts()["waiting"] == 2
    assert "0 of 2 made, 2 waiting" in app_grid_views.counted(ledger.jobs(owner=OWNER))


def test_every_field_that_is_offered_has_values_to_begin_with_that_can_be_read(house: Any) -> None:
    from pipelines.grid import read_axis

    offered = app_grid_views.fields_for(house.cards)
    assert not {"image", "mask", "clip", "last_image", "profile", "controls", "loras", "device"} & {
        name for _, name in offered
    }
    shown = {name: app_grid_views.example(name) for _, name in offered}
    for name, values in shown.items():
        if values:
            read_axis(f"{name}={values}")
    assert sum(bool(values) for values in shown.values()) > len(shown) // 2


def test_only_a_session_s_own_results_and_uploads_can_be_compared(house: Any, tmp_path: Path) -> None:
    room, ledger = app_compare.Compare(house), house.jobs.ledger
    (row,) = ledger.add(
        [Item(request=Request(prompt="a dog", seed=3).to_dict(), id="a", owner=OWNER, folder=str(tmp_path))]
    )
    job = ledger.lease("w")
    path = saved(tmp_path / "a-dog.png", noise(1))
    ledger.done(job, [path], {"effective": {"steps": 28}})
    ((label, name, file, _),) = room.results(OWNER)
    assert (file, name) == (path, f"{row.name}/0")
    assert "28 steps · seed 3 · exact" in label
    assert room._file(OWNER, name, {})[0] == path
    assert room._file(OTHER, "yours-1", {"yours-1": str(path)})[0] == path
    for owner, wrong in (
        (OTHER, name),
        (OWNER, f"{row.name}/1"),
        (OWNER, str(path)),
        (OWNER, "yours-2"),
        (OWNER, ""),
    ):
        with pytest.raises(RequestError):
            room._file(owner, wrong, {"yours-1": "elsewhere"})
    assert "exact already" in room._exact(OWNER, name, None, {})[1]  # type: ignore[arg-type]


def made(house: Any, folder: Path, count: int) -> list[str]:
    """Put results of OWNER into the ledger; return what a list calls them."""
    ledger, names = house.jobs.ledger, []
    for number in range(count):
        request = Request(prompt=f"dog {number}").to_dict()
        (row,) = ledger.add([Item(request=request, id=f"dog-{number}", owner=OWNER, folder=str(folder))])
        ledger.done(ledger.lease("w"), [saved(folder / f"dog-{number}.png", noise(number))], {})
        names.append(f"{row.name}/0")
    return names


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let served copies lie in a folder of the test."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "served"))
    return tmp_path / "served"


def test_the_same_comparison_gives_the_same_words_and_is_measured_once(
    house: Any, tmp_path: Path, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list tells a choice twice and once more when it is left; a viewer with other words in it would begin anew."""
    measured: list[tuple[Path, Path]] = []

    def counted(a: Path, b: Path) -> Any:
        measured.append((a, b))
        return likeness(a, b)

    monkeypatch.setattr(app_pairs, "likeness", counted)
    room, (a, b, c) = app_compare.Compare(house), made(house, tmp_path, 3)
    first = room._compare(OWNER, a, b, {}, 1)  # type: ignore[arg-type]
    assert 'data-mode="slider"' in first[1]
    together: list[Any] = []
    threads = [
        threading.Thread(target=lambda: together.append(room._compare(OWNER, c, b, {}, 2)))  # type: ignore[arg-type]
        for _ in range(4)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(set(together)) == 1
    assert len(measured) == 2
    assert room._compare(OWNER, a, b, {}, 3) == first  # type: ignore[arg-type]
    assert len(measured) == 2
    (tmp_path / "dog-0.png").write_bytes((tmp_path / "dog-2.png").read_bytes())
    assert room._compare(OWNER, a, b, {}, 4)[1] not in (first[1], together[0][1]), "another file, other words"  # type: ignore[arg-type]
    assert len(measured) == 3
    for one in uploads.rglob("difference.png"):
        one.unlink()
    assert room._compare(OWNER, c, b, {}, 5)[1] != together[0][1], (
        "a picture that was cleaned away is made again"
    )  # type: ignore[arg-type]
    assert len(measured) == 4


def test_a_slow_comparison_never_wins_over_a_newer_one(
    house: Any, tmp_path: Path, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(a: Path, b: Path) -> Any:
        if "dog-1" in b.name:
            begun.set()
            assert go.wait(120)
        return likeness(a, b)

    monkeypatch.setattr(app_pairs, "likeness", slow)
    room, (a, b, c) = app_compare.Compare(house), made(house, tmp_path, 3)
    answers: list[Any] = []
    page, other = SimpleNamespace(session_hash="one"), SimpleNamespace(session_hash="two")
    house.session = lambda _: OWNER
    older = threading.Thread(target=lambda: answers.append(room._compare(page, a, b, {}, 1)))  # type: ignore[arg-type]
    older.start()
    assert begun.wait(120)
    assert "dog-2.png" in room._compare(page, a, c, {}, 2)[1]  # type: ignore[arg-type]
    room._compare(other, a, c, {}, 9)  # type: ignore[arg-type]
    go.set()
    older.join()
    assert all("viewer" not in str(one) for one in answers[0]), "the newer pair stays"
    assert "dog-1.png" in room._compare(page, a, b, {}, 3)[1], (
        "a page is not held up by another one's numbers"
    )  # type: ignore[arg-type]
    assert all("room" not in str(one) for one in room._compare(page, None, None, {}, 2)), "one that came late"  # type: ignore[arg-type]


def test_a_look_at_what_there_is_leaves_what_was_chosen_alone(house: Any, tmp_path: Path) -> None:
    room, (a, b) = app_compare.Compare(house), made(house, tmp_path, 2)
    told = [one._constructor_args[0] for one in room._choices(OWNER, a, None, {})]  # type: ignore[arg-type]
    assert all("value" not in one for one in told), "it may answer later than the next choice is made"
    (tmp_path / "dog-0.png").unlink()
    left, right = (one._constructor_args[0] for one in room._choices(OWNER, a, b, {}))  # type: ignore[arg-type]
    assert left["value"] is None, "what is gone cannot stay chosen"
    assert "value" not in right
    left, right = (one._constructor_args[0] for one in room._choices(OWNER, None, b, {}, {"a": b}))  # type: ignore[arg-type]
    assert left["value"] == b
    assert "value" not in right


def test_a_list_whose_entries_have_just_changed_takes_what_was_chosen_before() -> None:
    """A browser that is being told of another model's sizes still asks with the old one; the event must not break."""
    sizes = Choice(["512x512"], filterable=False)
    assert sizes.get_block_name() == "dropdown"
    assert (sizes.preprocess(""), sizes.preprocess("64x64"), sizes.preprocess(None)) == ("", "64x64", None)
    assert sizes.preprocess(["512x512"]) is None
    assert not (ROOT / "app_settings.pyi").exists(), "gradio writes one for a class statement"


def test_an_upload_cannot_make_the_page_open_files_or_strange_models(house: Any, tmp_path: Path) -> None:
    room = app_compare.Compare(house)
    for number, request in enumerate((
        Request(prompt="x", model="/somewhere/else", accelerators=("delta-cache",)),
        Request(prompt="x", image="/etc/passwd", accelerators=("delta-cache",)),
        Request(prompt="x", loras=("/etc/passwd:1",), accelerators=("delta-cache",)),
    )):  # fmt: skip
        path = saved(tmp_path / f"{number}.png", noise(1), request)
        told = room._exact(OWNER, "yours-1", None, {"yours-1": str(path)})[1]  # type: ignore[arg-type]
        assert "made here by a model of this page" in told
    assert house.jobs.ledger.jobs() == []


def test_a_search_is_a_job_with_its_wish_its_curve_and_its_profile(house: Any, monkeypatch: Any) -> None:
    import pipelines.tune
    from pipelines.generate import Progress
    from pipelines.pareto import Point
    from pipelines.tune import Tuned

    points = [Point(methods=("a",), speedup=1.5, psnr=40.0, ssim=0.9, fraction=0.6, pictures=2)]
    heard_of: dict[str, Any] = {}

    def search(model: str, budget: str, minutes: float, **more: Any) -> Tuned:
        heard_of.update(
            model=model, budget=budget, minutes=minutes, prompts=more["prompts"], steps=more["settings"].steps
        )
        more["tell"]("screening")
        more["heard"](SimpleNamespace(points=lambda: points))
        more["on_step"](Progress(1, 4, "denoise", 3.0))
        heard_of["row"] = house.jobs.ledger.jobs(owner=OWNER)[0]
        return Tuned(
            curve=tuple(points),
            profile=None,
            path=None,
            reason="nothing reaches it",
            log=Path("log"),
            runs=9,
            reused=0,
            seconds=60,
        )

    monkeypatch.setattr(pipelines.tune, "tune", search)
    room = app_tune.Tune(house)
    values = {"model": "emoji", "size": "64x64", "steps": 4.0, "guidance": 3.0, "wish": "own", "own": "speedup >= 2.5",
              "minutes": 2, "prompts": "a dog\n\na cat"}  # fmt: skip
    name, *_ = room._start(OWNER, *values.values())  # type: ignore[arg-type]
    assert house.jobs.ledger.get(name, OTHER) is None
    assert Worker(house.jobs.ledger, pause=0.01).run(until_empty=True) == 1
    told = {key: value for key, value in heard_of.items() if key != "row"}
    assert told == {
        "model": "emoji",
        "budget": "speedup>=2.5",
        "minutes": 2.0,
        "prompts": ["a dog", "a cat"],
        "steps": 4,
    }
    assert "Screening" in app_tune.progress(heard_of["row"])
    assert [dot.speedup for dot in app_tune.dots_of(heard_of["row"])] == [1.5]
    row = house.jobs.ledger.get(name, OWNER)
    assert (row.state, row.files) == ("done", [])
    assert "Nothing reaches it" in app_tune.ended(row)
    assert 'data-dots="1"' in app_tune.drawn(app_tune.dots_of(row), row)
    assert "log" not in row.report, "where files lie is nobody's business"


def test_a_search_is_stopped_by_its_heartbeat_and_refused_in_words(house: Any, monkeypatch: Any) -> None:
    import pipelines.tune
    from pipelines.generate import Cancelled, Progress

    def search(*_: Any, **more: Any) -> None:
        if more["on_step"](Progress(1, 4, "denoise", 3.0)) is False:
            raise Cancelled

    monkeypatch.setattr(pipelines.tune, "tune", search)
    with pytest.raises(Cancelled):
        tuned(Request(prompt="-"), {"budget": "psnr>=35", "minutes": 2.0}, lambda _: False)
    room = app_tune.Tune(house)
    good = {
        "model": "emoji",
        "size": "",
        "steps": 4,
        "guidance": 3.0,
        "wish": "psnr>=35",
        "own": "",
        "minutes": 2,
        "prompts": "",
    }
    for wrong in (
        {"model": "/x"},
        {"wish": "own", "own": "fast"},
        {"minutes": 10**6},
        {"steps": 0},
        {"size": "ax3"},
        {"wish": "psnr>=1"},
    ):
        told = room._start(OWNER, *(good | wrong).values())[1]  # type: ignore[arg-type]
        assert 'role="alert"' in told, wrong
    assert house.jobs.ledger.jobs() == []
    for _ in range(app_tune.SEARCHES + 1):
        last = room._start(OWNER, *good.values())  # type: ignore[arg-type]
    assert "stop one, or wait" in last[1]
    assert len(house.jobs.ledger.jobs()) == app_tune.SEARCHES
    with pytest.raises(RequestError, match="minutes"):
        item(Request(prompt="-"), "psnr>=35", 0)


def test_a_profile_that_was_found_fills_the_form_of_create_and_one_that_is_gone_does_not(
    house: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    from app_speed import CUSTOM
    from pipelines import profile as profiles

    monkeypatch.setattr(profiles, "FOLDER", tmp_path / "profiles")
    (tmp_path / "profiles").mkdir()
    expected = {
        "speedup_denoise": 1.5,
        "speedup_end_to_end": 1.4,
        "psnr_db": 36.0,
        "psnr_worst_db": 33.0,
        "ssim": 0.9,
        "pictures": 8,
    }
    place = profiles.Range(steps=4, width=64, height=64)
    one = profiles.Profile(
        model="emoji",
        budget="psnr>=35",
        range=place,
        accelerators=({"name": "delta-cache"},),
        expected=expected,
    )
    one.save(tmp_path / "profiles" / "mine.json")
    room = app_tune.Tune(house)
    found = {"name": "mine", "profile": json.loads(json.dumps(one.to_dict())), "guidance": 2.0}
    model, _, steps, guidance, speed, dropdown, form_of, said = room._use(found)
    assert (model, steps, guidance, speed, dropdown.value, form_of) == (
        "emoji",
        4,
        2.0,
        CUSTOM,
        "mine",
        "emoji",
    )
    assert "mine" in said
    for gone in (
        {},
        found | {"name": "other"},
        found | {"name": "../mine"},
        found | {"profile": found["profile"] | {"model": "/x"}},
    ):
        assert 'role="alert"' in room._use(gone)[-1]
