"""Relevance of layers: measured by leaving out, kept as JSON, drawn, and used to place adapters."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from control.base import Refused, Use, controlled
from control.easycontrol import EasyControl
from control.relactrl import RelaCtrl
from control.relevance import (
    Relevance,
    block_left_out,
    place_left_out,
    places_of,
    relative_difference,
    relevance_of_blocks,
    relevance_of_control,
)
from dit.seams import blocks_of

MADE = Relevance(
    transformer="MMDiT",
    depth=6,
    left_out="block",
    places=(0, 1, 2, 3, 4, 5),
    figures={"a": (9.0, 1.0, 5.0, 1.0, 3.0, 2.0), "b": (0.2, 0.1, 0.5, 0.4, 0.1, 0.3)},
)


def shaken(adapter: Any, size: float = 0.3) -> Any:
    draw = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * size
    return adapter.eval()


def planted(tiny: Any, adapter: Any, number: int) -> None:
    """Let all control blocks but one add next to nothing."""
    for place, block in enumerate(adapter.blocks):
        if place != number:
            block.after_proj.weight.data *= 1e-3
            block.after_proj.bias.data *= 1e-3


def test_the_score_is_the_mean_of_scaled_figures() -> None:
    expected = [(1.0 + 0.25) / 2, 0.0, (0.5 + 1.0) / 2, (0 + 0.75) / 2, 0.25 / 2, (0.125 + 0.5) / 2]
    assert MADE.scores == pytest.approx(expected)
    assert MADE.chosen(1) == (2,)
    assert MADE.chosen(3) == (0, 2, 3)
    assert MADE.chosen(6) == MADE.places


@pytest.mark.parametrize("count", [0, 7, True, 1.5])
def test_more_places_than_measured_are_refused(count: Any) -> None:
    with pytest.raises(ValueError, match="count must be 1 to 6"):
        MADE.chosen(count)


def test_it_is_kept_as_json(tmp_path: Path) -> None:
    file = MADE.save(tmp_path / "relevance.json")
    assert Relevance.read(file) == MADE
    assert json.loads(file.read_text())["scores"] == pytest.approx(list(MADE.scores))
    file.write_text('{"places": [1]}')
    with pytest.raises(ValueError, match=r"relevance\.json holds no relevance of layers"):
        Relevance.read(file)
    broken = MADE.to_dict() | {"figures": {"a": [1.0, float("nan")]}}
    file.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="a needs 6 finite numbers"):
        Relevance.read(file)


def test_the_chart_has_a_bar_for_each_place() -> None:
    root = ET.fromstring(MADE.chart(chosen=MADE.chosen(2)))
    bars = [one for one in root.iter() if one.tag.endswith("rect")]
    assert len(bars) == 6
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert heights == pytest.approx([160 * score for score in MADE.scores], rel=1e-4)
    dark = [bar.attrib["fill"] for bar in bars].count("#1f4e79")
    assert dark == 2
    assert all(
        abs(float(bar.attrib["y"]) + height - 194) < 1e-3 for bar, height in zip(bars, heights, strict=True)
    )


def test_it_places_relactrl_and_prunes_easycontrol() -> None:
    control = MADE.relactrl(3, heads=1, seed=4)
    assert (control.places, control.seed) == ((0, 2, 3), 4)
    assert control.groups == (4, 2, 6)  # the most relevant place has the fewest and widest groups
    assert MADE.relactrl(3, most_groups=3).groups == (3, 2, 3)
    assert MADE.pruned(EasyControl(rank=4), 2) == EasyControl(rank=4, blocks=(0, 2))


@pytest.mark.parametrize("kind", ["flux", "sd3", "mmdit", "mmdit-dual"])
def test_a_block_that_does_nothing_has_no_relevance(kind: str, make: Any) -> None:
    """Left out by us, a block hands on its streams; one that adds nothing is found at 0, and the others are not."""
    tiny = make(kind)
    given, block = tiny.given(), blocks_of(tiny.model).blocks[1].module
    kept = {name: x.clone() for name, x in block.state_dict().items()}
    with torch.no_grad():
        for name, x in block.named_parameters():  # gates 0: the block is the identity
            if "norm1" in name or "modulation" in name or name.startswith("norm."):
                x.zero_()
    try:
        found = relevance_of_blocks(tiny.model, lambda: tiny.call(given))
    finally:
        block.load_state_dict(kept)
    figures = found.figures["relative difference"]
    assert found.places == tuple(range(len(blocks_of(tiny.model))))
    assert figures[1] == 0
    assert min(value for place, value in enumerate(figures) if place != 1) > 1e-3
    assert found.scores[1] == 0
    assert found.chosen(len(figures) - 1) == tuple(place for place in found.places if place != 1)


def test_a_block_left_out_is_put_back(make: Any) -> None:
    tiny = make("mmdit")
    given = tiny.given()
    with torch.no_grad():
        plain = tiny.call(given)
        with block_left_out(tiny.model, 2):
            without = tiny.call(given)
            assert torch.equal(tiny.call(given), without)
        assert torch.equal(tiny.call(given), plain)
    assert relative_difference(plain, without) > 1e-3
    assert not any("forward" in vars(one.module) for one in blocks_of(tiny.model))


def test_a_planted_control_block_ranks_first(make: Any) -> None:
    tiny = make("mmdit")
    given, adapter = tiny.given(), shaken(RelaCtrl(heads=1, places=(0, 1, 2, 3)).build(tiny.model))
    planted(tiny, adapter, 2)
    use = Use(adapter, tiny.condition())

    def run() -> Tensor:
        with controlled(tiny.model, use):
            return tiny.call(given)

    found = relevance_of_control(tiny.model, adapter, run)
    assert (found.left_out, found.places, found.chosen(1)) == ("relactrl", (0, 1, 2, 3), (2,))
    figures = found.figures["relative difference"]
    assert figures[2] > 10 * max(figures[0], figures[1], figures[3])
    with torch.no_grad():
        plain = tiny.call(given)
        with place_left_out(adapter, tiny.model, 2):
            assert relative_difference(plain, run()) < 0.1 * figures[2]  # nearly nothing is left
    again = relevance_of_control(tiny.model, adapter, run)
    assert again.figures == found.figures


def test_easycontrol_is_measured_and_pruned(make: Any, easy: Any) -> None:
    tiny = make("flux")
    given, use = tiny.given(), easy(tiny)
    adapter = use.adapter

    def run(use: Use = use) -> Tensor:
        with controlled(tiny.model, use):
            return tiny.call(given)

    found = relevance_of_control(tiny.model, adapter, run)
    assert found.places == places_of(adapter, tiny.model) == (0, 1, 2, 3)
    assert min(found.figures["relative difference"]) > 0
    figures = found.figures["relative difference"]
    best, kept = found.pruned(adapter.control, 3), adapter.control
    assert set(found.places) - set(best.blocks) == {figures.index(min(figures))}
    with torch.no_grad():
        full = run()
        adapter.control = best
        pruned = relative_difference(full, run())
        adapter.control = kept
        assert torch.equal(run(), full)
    assert pruned == pytest.approx(min(figures), rel=1e-5)


def test_own_figures_are_taken(make: Any) -> None:
    tiny = make("sd3")
    given = tiny.given()
    calls: list[int] = []

    def worst(plain: Tensor, without: Tensor) -> float:
        calls.append(1)
        return float((plain - without).abs().max())

    found = relevance_of_blocks(
        tiny.model,
        lambda: tiny.call(given),
        {"worst": worst, "mean": lambda a, b: float((a - b).abs().mean())},
    )
    assert list(found.figures) == ["worst", "mean"]
    assert len(calls) == len(found.places) == 3
    assert all(a > b > 0 for a, b in zip(found.figures["worst"], found.figures["mean"], strict=True))


def test_what_cannot_be_measured_is_refused(make: Any) -> None:
    tiny = make("mmdit")
    adapter = RelaCtrl(heads=1, places=(1,)).build(tiny.model)
    with (
        pytest.raises(Refused, match=r"place 1 cannot be left out of \[1\]"),
        place_left_out(adapter, tiny.model, 1),
    ):
        pass
    with pytest.raises(Refused, match="has no stack of repeated blocks"):
        relevance_of_blocks(torch.nn.Linear(2, 2), lambda: None)
