"""What the benchmark of time per token says of its figures."""

from __future__ import annotations

import pytest

from benchmarks.tokens import MIXERS, crossover, flatness, measure, summary


def test_crossover_is_the_length_from_which_on_softmax_costs_more() -> None:
    costs = {64: (10.0, 20.0), 256: (15.0, 14.0), 1024: (16.0, 17.0), 4096: (60.0, 16.0), 9216: (90.0, 16.0)}
    rows = {tokens: {"softmax": a, "linear": b} for tokens, (a, b) in costs.items()}
    assert crossover(rows, "linear") == 4096  # at 256 it was cheaper, at 1024 it was not
    assert crossover(rows, "softmax") is None
    del rows[4096], rows[9216]
    assert crossover(rows, "linear") is None


def test_flatness_is_the_furthest_from_the_median() -> None:
    assert flatness([10.0, 10.0, 12.0]) == pytest.approx(0.2)
    assert flatness([8.0, 10.0, 11.0]) == pytest.approx(0.2)


def test_every_mixer_is_measured_at_a_tiny_size() -> None:
    rows = {side**2: measure(12, 2, side, 1, "cpu") for side in (2, 4)}
    assert all(cost > 0 for row in rows.values() for cost in row.values())
    found = summary(rows, 4)
    assert list(found) == list(MIXERS)
    assert found["softmax"]["softmax_times_at_most_tokens"] == 1.0
    assert found["softmax"]["cheaper_than_softmax_from_tokens"] is None
