"""Rows of steps: the sketch keeps what it should, and the chosen row is the best there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipelines import masks


def test_a_sketch_keeps_sizes_exactly_and_angles_nearly() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 40, 40, 3))
    for one in (a, a + b, 3 * b):
        assert np.sum(masks.sketch(one) ** 2) == pytest.approx(np.mean(one**2))
    assert masks.sketch(a) @ masks.sketch(a + b) == pytest.approx(np.mean(a * (a + b)), rel=0.1)
    assert np.all(masks.sketch(np.zeros((4, 4))) == 0)


def test_rows() -> None:
    assert masks.every(3, 7) == "1001001"
    assert masks.even(3, 7) == "1010100"
    assert set(masks.exchanges("1010")) == {"1100", "1001"}
    assert set(masks.shifts("10010")) == {"10100", "10001"}
    assert masks.exchanges("1111") == []
    assert masks.even(4, 7, fixed=3) == "1110100"
    assert masks.exchanges("1110100", fixed=3) == ["1111000", "1110010", "1110001"]
    assert masks.shifts("1110100", fixed=3) == ["1111000", "1110010"]


def effects(order: int = 0, steps: int = 9) -> masks.Effects:
    random = np.random.default_rng(4)
    sizes = np.linspace(3, 1, steps)[:, None]
    return masks.Effects([random.normal(size=(steps, 20)) * sizes for _ in range(2)], order)


def test_the_error_grows_with_the_distance_from_the_full_steps() -> None:
    one = np.zeros((5, 4))
    one[2, 0] = one[3, 0] = 1.0
    reused, forecast = masks.Effects([one]), masks.Effects([one], order=1)
    single, double, apart = reused.predicted(["11011", "11001", "11101"])
    assert single == pytest.approx(masks.PEAK)
    assert apart == pytest.approx(masks.PEAK)
    assert double == pytest.approx(masks.PEAK - 20 * np.log10(1 + 2)), "errors add up as vectors"
    (forecast_double,) = forecast.predicted(["11001"])
    assert forecast_double == pytest.approx(masks.PEAK - 20 * np.log10(1 + 3))


def test_the_first_steps_can_be_held_full() -> None:
    random = np.random.default_rng(1)
    ladder = masks.Effects([random.normal(size=(9, 20))], fixed=3).ladder()
    assert sorted(ladder) == [3, 4, 5, 6, 7, 8]
    assert all(row.startswith("111") and row.count("1") == full for full, row in ladder.items())


@pytest.mark.parametrize("order", [0, 1])
def test_the_ladder_finds_good_rows_and_keeps_the_counts(order: int) -> None:
    found = effects(order)
    ladder = found.ladder()
    assert {full: row.count("1") for full, row in ladder.items()} == {full: full for full in range(1, 9)}
    assert all(row[0] == "1" for row in ladder.values())
    rows = ["1" + "".join(rest) for rest in itertools.product("01", repeat=8)]
    best = {full: max(found.predicted([row for row in rows if row.count("1") == full])) for full in ladder}
    for full, row in ladder.items():
        assert found.predicted([row])[0] >= found.predicted([masks.even(full, 9)])[0]
        assert found.predicted([row])[0] >= best[full] - 1.5, "exchanges end near the best of all rows"
    assert ladder[8] == max((r for r in rows if r.count("1") == 8), key=lambda r: found.predicted([r])[0])
