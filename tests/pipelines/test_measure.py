"""The comparison of exact and accelerated: what it measures, what it says, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acceleration.delta_cache import DeltaCache
from pipelines.compare import Difference
from pipelines.generate import Cancelled, generate
from pipelines.measure import Measured, compare, files
from pipelines.request import Request, RequestError

Folder = Callable[[str], Path]
SAME, NEAR, FAR = Difference(math.inf, 1.0, 0), Difference(41.0, 0.99, 9), Difference(24.0, 0.8, 90)


@pytest.fixture
def request_of(folder_of: Folder) -> Callable[..., Request]:
    def make(**more: Any) -> Request:
        return Request(
            **({"model": str(folder_of("ours")), "prompt": "a red cat", "steps": 6, "seed": 3} | more)
        )

    return make


def test_what_is_measured(request_of: Callable[..., Request]) -> None:
    request = request_of(images=2)
    measured = compare(request, [DeltaCache(interval=3, warmup=1)], rounds=2)
    assert measured.pictures[0].largest > 0
    assert [one.largest for one in measured.floor] == [0, 0], "the exact run repeats itself"
    assert all(one is not None and 0 < one < 1 for one in measured.latent_errors)
    assert all(
        len(seconds) == 2 and min(seconds) > 0
        for kind in measured.times.values()
        for seconds in kind.values()
    )
    assert measured.predicted_speedup == DeltaCache(interval=3, warmup=1).predicted_speedup(6, 4)
    assert measured.report["run"]["reused"] > 0
    assert not measured.failures
    found = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert found["psnr_db"] == round(measured.psnr, 2)
    assert found["floor"][0]["psnr_db"] is None
    assert found["speedup"]["denoise"] == measured.speedup("denoise")
    assert "exact against itself: identical" in str(measured)
    exact = generate(request)
    assert exact.report["exact"], "the comparison leaves the model as it was"


def test_a_neutral_setting_is_the_same_picture(request_of: Callable[..., Request]) -> None:
    measured = compare(request_of(), [DeltaCache(interval=1)], rounds=1)
    assert measured.latent_errors == (0.0,)
    assert measured.verdict.endswith("the same picture, bit for bit")


def test_a_pipeline_with_another_decoder(folder_of: Folder) -> None:
    request = Request(model=str(folder_of("dit")), class_label=3, steps=4)
    measured = compare(request, [DeltaCache(warmup=1, final_full=0)], rounds=1)
    assert len(measured.latent_errors) == 1


def made(pictures: Difference, exact: list[float], fast: list[float], floor: Difference = SAME) -> Measured:
    times = {
        kind: {"denoise": seconds, "end_to_end": seconds}
        for kind, seconds in (("exact", exact), ("accelerated", fast))
    }
    return Measured(
        request=Request(prompt="x"), rounds=len(exact), pictures=(pictures,), floor=(floor,), latent_errors=(None,),
        times=times, predicted_speedup=None, report={}, failures=(),
    )  # fmt: skip


def test_the_verdict_in_words() -> None:
    assert made(NEAR, [2.0, 2.2], [1.0, 1.1]).verdict == "2.00 times faster; a small difference"
    assert made(FAR, [2.0, 2.2], [1.0, 2.1]).verdict == (
        "no difference in time that 2 rounds could show; a visible difference"
    )
    assert made(SAME, [1.0], [2.0]).verdict == "slower (0.50 times the speed); the same picture, bit for bit"
    assert made(NEAR, [2.0], [1.0], floor=FAR).verdict.endswith(
        "no further from the exact picture than a second exact run"
    )
    failed = dataclasses.replace(
        made(NEAR, [2.0], [1.0]), failures=("accelerated: the picture contains NaN",)
    )
    assert failed.verdict == "failed: accelerated: the picture contains NaN"


def test_what_cannot_be_compared_is_refused(request_of: Callable[..., Request], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="at least one"):
        compare(request_of(), [])
    with pytest.raises(RequestError, match="rounds must be"):
        compare(request_of(), [DeltaCache()], rounds=0)
    with pytest.raises(RequestError, match="there is no block 99"):
        compare(request_of(), [DeltaCache(first_block=99)])
    with pytest.raises(Cancelled):
        compare(request_of(), [DeltaCache()], on_step=lambda _: False)
    small = generate(request_of()).save(tmp_path / "a.png")[0]
    large = generate(request_of(width=48, height=48)).save(tmp_path / "b.png")[0]
    assert files(small, small).largest == 0
    with pytest.raises(RequestError, match="cannot be compared"):
        files(small, large)
    with pytest.raises(RequestError, match="readable"):
        files(small, tmp_path / "missing.png")
