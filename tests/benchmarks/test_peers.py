"""The peers' benchmark reads speed-ups off fronts without extrapolating, and every method really attaches, saves and goes again."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from acceleration.base import Accelerator
from benchmarks import _peers_methods, peers
from benchmarks._peers_front import Point, ahead, at_level, bound, delta_formula
from benchmarks._peers_methods import CALIBRATION, EXACT, FEWER, OURS, Setting, attached
from benchmarks._peers_runs import MOST, Bench, Store, Timed, counted, summary
from benchmarks._peers_settings import PROMPTS, SEEDS, STEPS, settings
from dit.backbones.mmdit import MMDiT
from dit.codec import ResampleCodec
from dit.seams import blocks_of
from dit.spec import parse
from dit.text import Prompt
from pipelines.catalog import Card, Loaded
from pipelines.pareto import front
from pipelines.text_to_image import TextToImagePipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),  # of the peers' own code
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
]
RUN = 8


class Silent(TextToImagePipeline):
    """A pipeline that takes the letters of a prompt for its meaning."""

    def encode_prompt(self, texts: Any) -> Prompt:
        draws = [torch.Generator().manual_seed(sum(map(ord, text)) + 1) for text in texts]
        tokens = torch.stack([torch.randn(3, 8, generator=draw) for draw in draws])
        mask = torch.ones(len(draws), 3, dtype=torch.bool)
        return Prompt(tokens=tokens, mask=mask, pooled=tokens.mean(1), counts=(3,) * len(draws))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    torch.manual_seed(0)
    size = {"width": 32, "heads": 2, "dual_depth": 2, "single_depth": 2, "context_dim": 8, "pooled_dim": 8}
    transformer = MMDiT(patch_size=4, sample_size=16, **size)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made = Silent(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        codec=ResampleCodec(width=8, depth=1).eval(),
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def bench(pipeline: Any, tmp_path: Path) -> Bench:
    card = Card(name="tiny", steps=RUN, guidance=3.0)
    loaded = Loaded(
        pipeline=pipeline, card=card, digest="sha256:0", dtype="float32", device="cpu", seconds=0.0
    )
    return Bench(loaded, tmp_path)


METHODS = {
    FEWER: Setting.of(FEWER, RUN, steps=4),
    "delta": Setting.of(f"{OURS} delta-cache", RUN, set="delta-cache:interval=3,warmup=1"),
    "taylor": Setting.of(f"{OURS} taylor-cache", RUN, set="taylor-cache:interval=3,warmup=1"),
    "first block": Setting.of("FirstBlockCache", RUN, threshold=100.0),
    "taylorseer": Setting.of("TaylorSeer", RUN, cache_interval=3, max_order=1, disable_cache_before_step=2),
    "lite": Setting.of("TaylorSeer", RUN, cache_interval=3, disable_cache_before_step=2, use_lite_mode=True),
    "magcache": Setting.of("MagCache", RUN, threshold=100.0, max_skip_steps=2, retention_ratio=0.1),
    "broadcast": Setting.of("PyramidAttentionBroadcast", RUN, spatial_attention_block_skip_range=2),
    "fastercache": Setting.of("FasterCache", RUN, spatial_attention_block_skip_range=2),
    "dbcache": Setting.of(
        "cache-dit DBCache", RUN, residual_diff_threshold=100.0, Fn_compute_blocks=1, max_warmup_steps=2
    ),
    "dbcache lists": Setting.of(
        "cache-dit DBCache",
        RUN,
        residual_diff_threshold=100.0,
        Fn_compute_blocks=1,
        max_warmup_steps=2,
        lists=2,
    ),
    "dbcache taylor": Setting.of(
        "cache-dit DBCache + TaylorSeer",
        RUN,
        residual_diff_threshold=100.0,
        Fn_compute_blocks=1,
        max_warmup_steps=2,
        order=1,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_saves_work_repeats_itself_and_leaves_no_trace(
    bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = METHODS[name]
    if name.startswith("dbcache") and importlib.util.find_spec("cache_dit") is None:
        pytest.skip("cache-dit is not installed")
    monkeypatch.setattr(_peers_methods, "CALIBRATION", CALIBRATION[:1])
    exact = bench.exact(RUN, "dog", 1)
    with attached(bench.pipeline, setting, 3.0), counted(bench.pipeline.transformer) as work:
        first = bench.call(setting.run_steps, "dog", 1)
        done = work[0]
        second = bench.call(setting.run_steps, "dog", 1)
    assert torch.equal(first, second)
    assert not torch.equal(first, exact.latent)
    assert 0 < done < exact.work
    assert work[0] == 2 * done
    assert torch.equal(bench.call(RUN, "dog", 1), exact.latent)


def test_the_work_counted_is_that_of_the_linear_maps(bench: Bench) -> None:
    transformer = bench.pipeline.transformer
    blocks = len(blocks_of(transformer))
    with counted(transformer) as whole:
        bench.call(2, "dog", 1)
    with counted(transformer) as once:
        bench.call(1, "dog", 1)
    assert whole[0] == 2 * once[0]
    tokens, width = 16 + 3, 32
    maps = blocks * tokens * 12 * width**2  # q, k, v, out: 4; perceptron: 8
    assert once[0] - 2 * maps == 2 * width**2 * (2 * 12 + 2 * 3)  # modulation, once a sample


def test_quality_is_kept_and_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = METHODS["taylor"]
    one = bench.quality(setting, [("dog", 0)])
    again = Bench(bench.loaded, bench.store.file.parent)
    calls: list[str] = []
    inner = Bench.call
    monkeypatch.setattr(
        Bench,
        "call",
        lambda self, steps, prompt, seed, **more: calls.append(prompt) or inner(self, steps, prompt, seed),
    )
    both = again.quality(setting, [("dog", 0), ("cat", 0)])
    assert both[0] == one[0]
    assert set(calls) == {"cat"}
    found = summary(both)
    assert found["pictures"] == 2
    assert found["psnr_db"] == pytest.approx((both[0].psnr + both[1].psnr) / 2)
    assert found["worst_psnr_db"] == min(one.psnr for one in both)


def test_an_exact_repeat_counts_as_the_most(bench: Bench) -> None:
    found = bench.quality(Setting.of(FEWER, RUN, steps=RUN), [("dog", 0)])[0]
    assert (found.psnr, found.ssim, found.latent_error, found.fraction) == (
        MOST,
        pytest.approx(1.0),
        0.0,
        1.0,
    )


def test_a_line_that_was_cut_off_is_no_obstacle(tmp_path: Path) -> None:
    store = Store(tmp_path / "measured.jsonl")
    store.put(1.5, "a", 1)
    with store.file.open("a", encoding="utf-8") as lines:
        lines.write('{"key": "[\\"b')
    assert Store(store.file).rows == store.rows == {'["a", 1]': 1.5}


def test_times_are_ratios_within_a_round(bench: Bench) -> None:
    full, fast = Timed(bench, Setting.of(EXACT, RUN), PROMPTS), Timed(bench, METHODS["taylor"], PROMPTS)
    full.taken = [
        {"denoise": 9.0, "end_to_end": 9.0},
        {"denoise": 4.0, "end_to_end": 5.0},
        {"denoise": 8.0, "end_to_end": 9.0},
    ]
    fast.taken = [
        {"denoise": 1.0, "end_to_end": 1.0},
        {"denoise": 2.0, "end_to_end": 4.0},
        {"denoise": 4.0, "end_to_end": 6.0},
    ]
    found = fast.against(full)
    assert found == {
        "denoise": 2.0,
        "end_to_end": pytest.approx((1.25 + 1.5) / 2),
        "seconds": 3.0,
        "rounds": 2,
    }


def test_timing_end_to_end(bench: Bench) -> None:
    bench.times([METHODS["taylor"]], PROMPTS[:1], rounds=1)
    found = bench.timed(METHODS["taylor"])
    assert found is not None
    assert found["rounds"] == 1
    assert all(found[name] > 0 for name in ("denoise", "end_to_end", "seconds"))
    assert bench.empty_cost(RUN, PROMPTS[:1], 1) > 0
    assert bench.delta(RUN, 2, 2, PROMPTS[:1], 1) > 0
    assert "_denoise" not in vars(bench.pipeline)


def test_front_keeps_what_nothing_beats() -> None:
    points = [Point(1.5, 40), Point(2.0, 30), Point(1.8, 29), Point(2.0, 33), Point(3.0, 20)]
    assert front(points) == [Point(1.5, 40), Point(2.0, 33), Point(3.0, 20)]


def test_levels_are_read_between_points_and_never_beyond() -> None:
    points = [Point(1.5, 40, "a"), Point(2.0, 30, "b"), Point(4.0, 20, "c")]
    assert at_level(points, 35).speed == pytest.approx(1.75)
    assert at_level(points, 35).between == ("a", "b")
    assert at_level(points, 30).speed == pytest.approx(2.0)
    assert at_level(points, 25).speed == pytest.approx(3.0)
    assert at_level(points, 41).speed is None
    assert "40.0 dB at most" in at_level(points, 41).beyond
    assert "still 20.0 dB at 4.00x" in at_level(points, 19).beyond
    assert at_level([Point(2.0, 30)], 30).speed == 2.0
    assert at_level([], 30).beyond == "not measured"


def test_bounds_and_formula() -> None:
    assert bound(0.5, 0.0) == 2.0
    assert bound(1 / 3, 0.05) == pytest.approx(1 / (1 / 3 + 2 / 3 * 0.05))
    assert bound(1.0, 0.3) == 1.0
    assert delta_formula(2, 21, 28) == pytest.approx(1.6)
    assert delta_formula(1, 8, 10) == 1.0


def test_ahead_is_against_the_best_peer() -> None:
    ours = at_level([Point(3.0, 30)], 30)
    peers_ = [at_level([Point(2.0, 30)], 30), at_level([Point(2.4, 30)], 30), at_level([Point(2.0, 20)], 30)]
    assert ahead(ours, peers_) == pytest.approx(1.25)
    assert ahead(ours, peers_[2:]) is None


@pytest.mark.parametrize("steps", STEPS)
def test_every_setting_can_be_made(pipeline: Any, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_peers_methods, "_ratios", lambda *_: [1.0] * steps)
    found = settings(steps, ("delta-cache:interval=7",))
    assert len({one.key for one in found}) == len(found)
    for one in found:
        if one.method.startswith(OURS):
            parse(Accelerator, one.values["set"])
        elif one.method in _peers_methods.DIFFUSERS:
            kind = type(_peers_methods._config(pipeline, one, 3.0)).__name__
            assert kind.removesuffix("Config").removesuffix("Cache") == one.method.removesuffix("Cache")
        else:
            assert one.method in (FEWER, *_peers_methods.CACHE_DIT)
    assert found[-1].values == {"set": "delta-cache:interval=7"}


def test_prompts_are_enough_and_not_those_of_the_calibration() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) >= 24
    assert len(SEEDS) >= 2
    assert not set(PROMPTS) & set(CALIBRATION)


def _rows() -> list[dict[str, Any]]:
    rows = []
    for method, speeds in ((f"{OURS} a", (2.0, 4.0)), (FEWER, (1.5, 3.0)), ("MagCache", (1.2, 1.3))):
        for speed, psnr in zip(speeds, (40.0, 20.0), strict=True):
            rows.append({
                "steps": 28, "method": method, "settings": {"x": speed}, "psnr_db": psnr, "fraction": 1 / speed,
                "speedup": {"denoise": speed, "end_to_end": speed * 0.9},
            })  # fmt: skip
    return rows


def test_the_table_names_the_lead_and_what_was_not_reached() -> None:
    read = peers.levels(_rows(), 28, "denoise")
    assert read["30"]["ours"] == f"{OURS} a"
    assert read["30"]["peer"] == FEWER
    assert read["30"]["ahead"] == pytest.approx(3.0 / 2.25)
    value = {
        "levels_denoise": {"28": read},
        "delta_cache": [],
        "absent": {"x": "not installed"},
        "rows": _rows(),
    }
    lines = peers.table(value)
    assert f"| {OURS} a | 3.50x | 3.00x | 2.50x | 2.00x |" in lines
    assert lines[-1] == "x: not installed"
    untimed = [{name: part for name, part in row.items() if name != "speedup"} for row in _rows()]
    value = {
        "levels_denoise": {"28": peers.levels(untimed, 28, "denoise")},
        "delta_cache": [],
        "absent": {},
        "rows": untimed,
    }
    lines = peers.table(value)
    assert "estimate" in lines[1]
    assert f"| {OURS} a | 3.50x | 3.00x | 2.50x | 2.00x |" in lines


def test_the_plot_holds_every_method_and_no_empty_number() -> None:
    drawn = peers.plot({"rows": _rows()})
    assert drawn.count("<polyline") == 2 * 3  # in the field and in the legend
    assert f"{OURS} a" in drawn
    assert "nan" not in drawn
    assert "denoising loop" in drawn
    untimed = [{name: part for name, part in row.items() if name != "speedup"} for row in _rows()]
    assert "estimated" in peers.plot({"rows": untimed})


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b"])
def test_a_share_must_be_one_of_its_count(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers._arguments(["--share", text])
    assert "K/N" in capsys.readouterr().err


def test_a_whole_run_measures_reports_and_goes_on(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Setting.of("TaylorSeer", RUN, cache_interval=0, disable_cache_before_step=1)
    chosen = [METHODS["taylor"], METHODS[FEWER], broken]
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "Bench", lambda loaded: bench)
    monkeypatch.setattr(peers.catalog, "load", lambda *_: bench.loaded)
    monkeypatch.setattr(peers, "settings", lambda steps, extra: chosen if steps == 28 else [])
    given = ["--prompts", "1", "--seeds", "1", "--rounds", "1", "--steps", "28"]
    assert peers.main([*given, "--quality"]) == 0
    value = json.loads((tmp_path / "peers.json").read_text())
    assert [("failed" in row) for row in value["rows"]] == [False, False, True]
    assert "estimated" in (tmp_path / "peers.svg").read_text()
    bench.times(chosen[:2], PROMPTS[:1], 1)
    assert peers.main([*given, "--table"]) == 0
    value = json.loads((tmp_path / "peers.json").read_text())
    assert len(value["rows"]) == 2
    assert all(row["speedup"]["denoise"] > 0 and row["pictures"] == 1 for row in value["rows"])
    assert str(RUN) in value["levels_denoise"]
    assert "steps" in capsys.readouterr().out


def test_shares_are_read() -> None:
    assert peers._arguments(["--share", "2/3"]).share == (2, 3)
    assert peers._arguments([]).steps == STEPS
    assert math.isclose(MOST, 90.0)
