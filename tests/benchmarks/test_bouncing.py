"""The bouncing ball: it is where it is said to be, real clips are judged right, others wrong, and a run can be stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bouncing
from benchmarks._bouncing_data import (
    FRAMES,
    RADIUS,
    SIDE,
    errors,
    first_hidden,
    found,
    passes,
    straight_on,
    throw,
    turns,
)  # fmt: skip
from dit.clip_masks import task_mask


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_balls_are_found_where_they_are() -> None:
    drawn = throw(200, dice())
    bare = drawn.only(~drawn.barred)
    assert 60 < len(bare) < 140
    assert drawn.clips.shape == (200, 1, FRAMES, SIDE, SIDE)
    assert errors(bare.clips, bare).max() < 0.5
    assert found(bare.clips)[1].all()
    assert ((bare.centres >= RADIUS) & (bare.centres <= SIDE - RADIUS)).all()
    assert (errors(torch.full_like(bare.clips, -1.0), bare) == SIDE / 2).all(), "no ball, the largest error"


def test_a_ball_behind_the_bar_is_not_seen_and_comes_out_again() -> None:
    for one in bouncing.behind_bars(5, dice()):
        _, seen = found(one.clips)
        assert not seen[0, first_hidden(one)]
        assert seen[0, -1]
        assert seen[0, 0]
        assert passes(one).all()


def test_as_many_clips_without_a_bar_as_asked_for() -> None:
    for seed in range(40):  # one of four clips has no bar in most draws, not in all
        one = bouncing.without_bars(1, dice(seed))
        assert len(one) == 1
        assert not one.barred.any()
    first = throw(12, dice(7))
    assert torch.equal(bouncing.without_bars(3, dice(7)).clips, first.clips[~first.barred][:3])


def test_lines_are_right_until_a_wall_and_those_that_turn_after_it() -> None:
    drawn = throw(400, dice())
    steps = drawn.centres.diff(dim=1)  # [B, F - 1, 2]
    never = (steps - steps[:, :1]).abs().amax((1, 2)) < 1e-4
    full = (steps.abs().amax(1) - steps[:, 6].abs()).abs().amax(1) < 1e-4  # no wall where the speed is read
    straight, folded = straight_on(drawn, 8), straight_on(drawn, 8, walls=True)
    assert never.sum() > 5
    assert (straight - drawn.centres)[never].abs().max() < 1e-3
    assert (straight - drawn.centres)[turns(drawn, 8)].norm(dim=-1)[:, -1].mean() > 2
    assert (turns(drawn, 8) & full).sum() > 20
    assert (folded - drawn.centres)[full].abs().max() < 1e-3
    assert (turns(drawn, 1) & ~turns(drawn, 8)).sum() > 20, (
        "a wall before the given frames end is none to foresee"
    )


def test_trivial_ways_and_real_clips() -> None:
    rows = bouncing.trivial(16)
    real, near, blend, line = (
        rows[name] for name in ("real clips", "nearest given frame", "blending", "straight line")
    )
    assert real["predict_px"] < 0.3
    assert real["comes_out_in_place"] == 1.0
    assert real["free_inside"] == 1.0
    assert near["predict_px"] > 2
    assert near["comes_out_px"] > 4
    assert 0 < blend["interpolate_mse"] < near["interpolate_mse"]
    assert real["predict_px"] < line["predict_px"] < near["predict_px"]
    assert line["predict_straight_px"] < line["predict_turning_px"]
    lost = bouncing.judged(
        lambda truth, _: torch.where(turns(truth, 8)[:, None, None, None, None], -1.0, truth.clips), 8
    )
    assert lost["predict_straight_px"] < 0.3
    assert lost["predict_turning_px"] == SIDE / 2


def test_what_is_given_comes_out_bit_for_bit() -> None:
    network = bouncing.VDT(**bouncing.SIZE, **bouncing.VARIANTS["time, then frame"]).eval()
    truth = throw(2, dice(3))
    mask = task_mask("predict", FRAMES, SIDE, SIDE, given=5)
    heard: list[Any] = []
    network.register_forward_pre_hook(
        lambda _, inputs, given: heard.append((inputs[0], given)), with_kwargs=True
    )
    made = bouncing.made_by(network, truth, mask, 0, steps=2)
    assert len(heard) == 2
    for noisy, given in heard:
        assert torch.equal(noisy[:, :, :5], truth.clips[:, :, :5])
        assert torch.equal(given["mask"], mask)
        assert torch.equal(given["clean"], truth.clips)
    assert torch.equal(made[:, :, :5], truth.clips[:, :, :5])
    assert not torch.equal(made, truth.clips)


def test_variants_have_as_many_parameters_and_one_cannot_hear_other_frames() -> None:
    counts, reached = {}, {}
    clip = throw(1, dice()).clips
    for name, variant in bouncing.VARIANTS.items():
        network: Any = bouncing.VDT(**bouncing.SIZE, **variant).eval()
        torch.manual_seed(0)
        for one in network.parameters():
            torch.nn.init.normal_(one, std=0.05)
        counts[name] = sum(one.numel() for one in network.parameters())
        other = clip.clone()
        other[:, :, 0] += 1
        with torch.no_grad():
            difference = network(other, torch.tensor([500.0]))[0] - network(clip, torch.tensor([500.0]))[0]
        reached[name] = bool(difference[:, :, 8].abs().max() > 0)
    assert max(counts.values()) < 1.01 * min(counts.values())
    assert reached == {"time, then frame": True, "no attention over time": False, "full attention": True}


def test_training_makes_the_loss_fall() -> None:
    few, many = (bouncing.trained("full attention", 0, samples, batch=8)[1]["loss"] for samples in (16, 400))
    assert many < 0.8 * few


def test_a_stopped_run_goes_on_and_other_settings_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, trained = tmp_path / "bouncing.json", []

    def learn(variant: str, seed: int, samples: int) -> Any:
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append((variant, seed))
        return None, {"samples": samples}

    monkeypatch.setattr(bouncing, "trained", learn)
    monkeypatch.setattr(bouncing, "judged", lambda make, count: {"predict_px": float(len(trained))})
    monkeypatch.setattr(bouncing, "drawn_sheet", lambda networks: pytest.fail("not all are at hand"))
    monkeypatch.setattr(bouncing, "sizes", dict)

    def run(*options: str) -> dict[str, Any]:
        monkeypatch.setattr(
            "sys.argv", ["bouncing", "--seeds", "2", "--out", str(out), "--count", "4", *options]
        )
        bouncing.main()
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    with pytest.raises(KeyboardInterrupt):
        run()
    kept = json.loads(out.read_text())
    assert len(kept["runs"]) == 4
    trained.pop()
    trained.pop()  # two more may run
    ended = run()
    assert len(ended["runs"]) == 6
    assert ended["runs"][:4] == kept["runs"]
    assert ended["summary"]["time, then frame"]["predict_px"] == [2.5, 1.0, 4.0]
    trained.clear()
    with pytest.raises(KeyboardInterrupt):
        run("--samples", "64")
    assert len(json.loads(out.read_text())["runs"]) == 4
