"""Tuning: the Pareto set, the wish kept on measured data, the time, a kill in between, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acceleration.delta_cache import DeltaCache
from pipelines import cli, machine, profile, search
from pipelines import generate as generating
from pipelines import tune as tuning
from pipelines.generate import Cancelled, generate
from pipelines.pareto import Point, front, layers
from pipelines.request import Request, RequestError
from pipelines.trials import Bench, Clock, Log, Scene, TimeUp, Trial, mean, scenes_for
from pipelines.tune import Budget, Tuned, known_prompts, tune

STEPS = 4
"""So few that all rows of steps together are seven."""


def point(speedup: float, psnr: float) -> Point:
    return Point(methods=(), speedup=speedup, psnr=psnr, ssim=1.0, fraction=1.0, pictures=1)


def test_beaten_points_are_left_out() -> None:
    best = [point(1.5, 40.0), point(2.0, 35.0), point(3.0, 25.0)]
    beaten = [point(1.4, 39.0), point(2.0, 34.0), point(1.9, 35.0), point(2.9, 24.0)]
    assert front([*beaten, *best]) == best
    assert front([]) == []
    assert layers([*beaten, *best], 3) == best
    assert layers([*beaten, *best], 4)[:3] == best
    assert len(layers([*beaten, *best], 99)) == 7


@pytest.mark.parametrize("text", ["", "psnr", "psnr<=35", "psnr>=200", "speedup>=1", "ssim>=1", "psnr>=nan"])
def test_wishes_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="budget must be"):
        Budget.read(text)


def test_wishes() -> None:
    assert Budget.read("psnr>=35") == Budget(psnr=35.0)
    assert str(Budget.read(" speedup >= 2.5 ")) == "speedup>=2.5"
    assert Budget(psnr=30).fits(30.0, 1.0)
    assert not Budget(speedup=2).fits(99.0, 1.9)


def test_pictures_to_search_on_and_to_check_on_differ() -> None:
    assert scenes_for(["a", "b"], None, 3, 5) == [
        Scene("a", None, 5),
        Scene("b", None, 6),
        Scene("a", None, 7),
    ]
    assert [one.class_label for one in scenes_for([], 1000, 4, 0)] == [0, 250, 500, 750]


def test_a_card_says_what_can_be_drawn() -> None:
    from pipelines.catalog import Card

    card = Card(
        name="x", more={"examples": ["one"], "concepts": ["a", "b", "c"], "styles": ["drawn", "built"]}
    )
    assert known_prompts(card) == ["one", "a, drawn", "b, built", "c, drawn"]
    assert known_prompts(Card(name="x")) == []


def test_methods_for_long_sequences_wait_for_long_sequences() -> None:
    from pipelines.request import accelerator_kinds

    kinds: Any = accelerator_kinds().values()
    names = {one[0].name for one in search.candidates(28, 64, kinds)}
    assert names == {"delta-cache", "step-forecast", "taylor-cache"}
    assert {"adaspa", "xattention"} <= {one[0].name for one in search.candidates(28, 100_000, kinds)}
    assert all(not one[0].neutral for one in search.candidates(2, 64, kinds))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search on few pictures; few settings are screened."""
    inner = search.candidates
    monkeypatch.setattr(tuning, "SEARCHED", 2)
    monkeypatch.setattr(tuning, "HELD_OUT", 2)
    monkeypatch.setattr(tuning, "COMPARED", 1)
    monkeypatch.setattr(tuning, "RECORDED", 1)
    monkeypatch.setattr(tuning, "TIMED", 2)
    monkeypatch.setattr(tuning, "FEWEST_RUNS", 1)
    monkeypatch.setattr(search, "candidates", lambda *given: inner(*given)[::9])
    monkeypatch.setattr(search, "BASES", search.BASES[:1])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Note every run."""
    seen: list[Request] = []
    inner = generating.generate

    def run(request: Request, **more: Any) -> Any:
        seen.append(request)
        return inner(request, **more)

    monkeypatch.setattr(generating, "generate", run)
    return seen


def settings(tiny: str, **more: Any) -> Request:
    return Request(**({"prompt": "-", "model": tiny, "steps": STEPS, "width": 32, "height": 32} | more))


@pytest.fixture
def tuned(small: None, tiny: str, tmp_path: Path) -> Callable[..., Tuned]:
    def run(budget: str = "psnr>=15", minutes: float = 1.0, **more: Any) -> Tuned:
        given: dict[str, Any] = {
            "settings": settings(tiny), "prompts": ["a red cat", "the blue fish"], "output": tmp_path / "p.json"
        }  # fmt: skip
        return tune(tiny, budget, minutes, **(given | more))

    return run


def test_a_search_finds_a_curve_and_a_profile_that_acts(
    tuned: Callable[..., Tuned], tiny: str, counted: list[Request], tmp_path: Path
) -> None:
    said: list[str] = []
    found = tuned(tell=said.append)
    assert any("single steps" in one for one in said)
    assert list(found.curve) == front(found.curve)
    assert found.profile is not None, found.reason
    assert found.profile == profile.load(tmp_path / "p.json")
    expected, where = found.profile.expected, found.profile.range
    assert expected["psnr_db"] >= 15
    assert expected["psnr_worst_db"] <= expected["psnr_db"]
    assert expected["pictures"] == 2
    assert (where.steps, where.width, where.height, where.scheduler) == (
        STEPS, 32, 32, "FlowMatchEulerDiscreteScheduler",
    )  # fmt: skip
    seeds = {request.seed for request in counted}
    assert {1, 2, 10_001, 10_002} <= seeds, "what is searched on is not what is checked on"
    request = settings(tiny, prompt="a red cat", profile=str(tmp_path / "p.json"))
    assert generate(request).report["run"]["reused"] + generate(request).report["run"]["forecast"] > 0
    json.dumps(found.to_dict(), allow_nan=False)
    assert "use it with: --profile" in str(found)

    rows = [json.loads(line) for line in found.log.read_text().splitlines()]
    assert len(rows) == len({row["key"] for row in rows}), "nothing is tried twice"
    best = max(one.speedup for one in found.curve if one.psnr >= 15)
    assert expected["computed"] <= 1 / best + 0.5


def test_a_wish_for_speed(tuned: Callable[..., Tuned]) -> None:
    found = tuned("speedup>=1.05")
    assert found.curve
    if found.profile is not None:  # a tiny network's times are noise
        assert found.profile.expected["speedup_denoise"] >= 1.05
    else:
        assert "no profile" in found.reason


def test_a_wish_that_nothing_reaches_writes_no_profile(tuned: Callable[..., Tuned], tmp_path: Path) -> None:
    found = tuned("psnr>=90")
    assert found.profile is None
    assert found.reason.startswith("no profile")
    assert not (tmp_path / "p.json").exists()
    assert found.reason in str(found)


def test_a_killed_search_goes_on_where_it_was(
    tuned: Callable[..., Tuned], counted: list[Request], tmp_path: Path
) -> None:
    calls = 0

    def dying(_: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls > 200:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        tuned(on_step=dying)
    (log,) = tmp_path.glob("*.jsonl")
    before = log.read_bytes()
    assert before.count(b"\n") > 3
    log.write_bytes(before + b'{"key": "torn')
    counted.clear()
    found = tuned()
    assert found.reused == before.count(b"\n")
    assert log.read_bytes().startswith(before)
    known = {json.loads(line)["key"] for line in before.splitlines()}
    again = [
        one for one in counted
        if one.accelerators and one.seed < 10_000
        and json.dumps([[str(x) for x in one.accelerators], [one.prompt, None, one.seed]]) in known
    ]  # fmt: skip
    assert len(known) > 6 * tuning.TIMED, "the bound below says something"
    told = "known trials are not made again, save to be timed; a point that is beaten then has left the curve"
    assert len(again) <= 6 * tuning.TIMED, told
    assert Log(log).found > found.reused, "the torn line has harmed none of those after it"
    assert found.profile is not None


def test_other_settings_have_another_log(tiny: str) -> None:
    base, where = settings(tiny), profile.Range(steps=STEPS)
    digests = {
        tuning._digest(base, where), tuning._digest(base, profile.Range(steps=5)),
        tuning._digest(base.replace(guidance=2.0), where), tuning._digest(base.replace(dtype="bfloat16"), where),
    }  # fmt: skip
    assert len(digests) == 4
    assert tuning._digest(base.replace(seed=7, prompt="other"), where) in digests


def test_the_time_is_kept(tuned: Callable[..., Tuned], tiny: str, counted: list[Request]) -> None:
    found = tuned("psnr>=90", 0.1, settings=settings(tiny, steps=40))
    assert found.profile is None
    assert found.seconds < 60, "a busy machine may hold up a step, the whole search would take minutes"
    assert len(counted) < 40 * 6


def test_too_little_time_is_refused_with_how_much_would_do(
    tuned: Callable[..., Tuned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "FEWEST_RUNS", 16)
    with pytest.raises(RequestError, match="enough for 16 exact pictures"):
        tuned(minutes=1e-5)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"minutes": 0}, "minutes"),
        ({"minutes": True}, "minutes"),
        ({"prompts": []}, "prompts"),
        ({"accelerators": ("delta-cache",)}, "accelerators"),
        ({"profile": "x"}, "profile"),
        ({"width": 20}, "width"),
    ],
)
def test_bad_input_is_named(tuned: Callable[..., Tuned], tiny: str, more: dict[str, Any], field: str) -> None:
    own = {name: more.pop(name) for name in ("minutes", "prompts") if name in more}
    with pytest.raises(RequestError) as caught:
        tuned(**own, settings=settings(tiny, **more))
    assert caught.value.field == field


def test_stopping_is_no_end_of_time(tuned: Callable[..., Tuned]) -> None:
    with pytest.raises(Cancelled):
        tuned(on_step=lambda _: False)


def test_a_class_model(small: None, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = str(folder_of("dit"))
    given: Any = {"settings": Request(class_label=1, model=model, steps=3), "output": tmp_path / "p.json"}
    found = tune(model, "psnr>=10", 1, **given)
    assert found.curve
    with pytest.raises(RequestError, match="takes class numbers"):
        tune(model, "psnr>=10", 1, prompts=["a cat"], **given)


def test_a_method_that_cannot_work_is_a_failure_in_the_log(tiny: str, tmp_path: Path) -> None:
    bench = Bench(settings(tiny), Clock(1), Log(tmp_path / "log.jsonl"))
    trial = bench.trial((DeltaCache(first_block=99),), Scene("a cat", None, 1))
    assert "there is no block 99" in trial.failure
    assert Log(tmp_path / "log.jsonl").trials == dict.fromkeys(Log(tmp_path / "log.jsonl").trials, trial)
    assert mean([Trial(psnr=30.0), trial]).failure == trial.failure
    runs = bench.runs
    assert bench.trial((DeltaCache(first_block=99),), Scene("a cat", None, 1)) == trial
    assert bench.runs == runs


def test_a_clock_that_has_run_out(tiny: str) -> None:
    bench = Bench(settings(tiny), Clock(0.0))
    with pytest.raises(TimeUp):
        bench.exact(Scene("a cat", None, 1))


def test_the_speed_of_what_leaves_no_block_out_is_its_time() -> None:
    bench = Bench(Request(prompt="-"), Clock(1))
    bench.exact_seconds = [2.0]
    made = search.Search(bench, [], 10.0, psnr=30.0, speedup=None, tell=lambda _: None)
    assert made.estimate(Trial(psnr=30, fraction=1.0, seconds=1.0)) == 2.0
    assert made.estimate(Trial(psnr=30, fraction=0.5, seconds=9.0)) == pytest.approx(1 / 0.525)


def test_the_command(
    tiny: str,
    small: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "strangers", list)
    shared = ["--model", tiny, "--steps", "4", "--size", "32"]
    code = cli.main(["tune", "a red cat", *shared, "--psnr", "12", "--minutes", "1", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found = json.loads(out)
    assert found["file"] == "profiles/model-4-steps-psnr-12.json"
    assert found["curve"][0]["speedup_is"] in ("measured", "estimated")
    assert (
        cli.main(["generate", "a cat", *shared, "--profile", "model-4-steps-psnr-12", "--output", "a.png"])
        == 0
    )
    assert Request.from_file("a.png").accelerators
    assert cli.main(["compare", "a cat", *shared, "--profile", found["file"], "--rounds", "1"]) == 0
    assert cli.main(["generate", "a cat", *shared, "--profile", found["file"], "--steps", "7"]) == 1
    assert "7 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "x"], "minutes must be"),
        (["--psnr", "x"], "budget must be"),
        (["--psnr", "30", "--speedup", "2"], "not allowed with"),
        (["--output", "x.txt"], "ending .json"),
        (["--accelerate", "delta-cache"], "unrecognized"),
    ],
)
def test_the_command_refuses(
    arguments: list[str],
    words: str,
    tiny: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(machine, "strangers", list)
    try:
        code = cli.main(["tune", "a cat", "--model", tiny, *arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    assert code == 1
    assert words in capsys.readouterr().err
