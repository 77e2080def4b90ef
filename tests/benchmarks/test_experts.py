"""The books of the experts benchmark: what it compares, and that it runs; never how fast."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks.experts import layers, measure
from dit.experts.mixture import Mixture


def test_a_row_says_what_was_saved_on_paper_and_in_time() -> None:
    row = measure(32, 16, argparse.Namespace(device="cpu", active=2, rounds=1, work=1e6))
    gate = 12 * 32
    assert row["macs_ratio"] == pytest.approx(0.375 + gate / (8 * 32 * 32), abs=1e-4)
    assert row["realised"] == pytest.approx((1 - row["time_ratio"]) / (1 - row["macs_ratio"]), rel=1e-2)
    assert row["activated"] < row["parameters"]["dense"] < row["parameters"]["mixture"]


def test_the_router_spreads_the_tokens() -> None:
    """A blind router would send all tokens the same way, and the benchmark would time one large product."""
    mixture = layers(64, Mixture(), torch.float32, "cpu")["mixture"]
    logits = mixture.get_submodule("gate")(torch.randn(512, 64))
    counts = torch.bincount(logits.topk(2, dim=-1).indices.flatten(), minlength=12)
    assert int((counts > 0).sum()) == 12
    assert float(counts.max() / counts.float().mean()) < 2
