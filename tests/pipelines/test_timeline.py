"""The drawing of a run: well-formed, complete, and readable without colour."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

import pytest

from pipelines.timeline import FILLS, STATES, drawing, timeline

SVG = "{http://www.w3.org/2000/svg}"


def run(*states: str, branches: tuple[str, ...] = ("cond",)) -> dict[str, Any]:
    return {
        "cells": [
            {"branch": branch, "step": step, "states": one}
            for step, one in enumerate(states)
            for branch in branches
        ]
    }


def test_every_block_call_is_drawn_once() -> None:
    tree = ET.fromstring(drawing(run("CCCC", "CRRC", "FFSS", "MMMM"), title="a <b> & c"))
    bars = [
        one.get("class")
        for group in tree.iter(f"{SVG}g")
        if group.find(f"{SVG}title") is not None
        for one in group.iter(f"{SVG}rect")
    ]
    assert {state: bars.count(state) for state in STATES} == {"C": 6, "S": 2, "M": 4, "R": 2, "F": 2}
    assert (tree.get("data-computed"), tree.get("data-sparse")) == ("6", "2")
    assert "a <b> & c" in [text.text for text in tree.iter(f"{SVG}text")]
    assert "step 3, blocks 2 to 3: sparse" in [title.text for title in tree.iter(f"{SVG}title")]


def test_states_differ_without_colour() -> None:
    """One is solid, the others have a pattern each, and no two patterns are built alike."""
    tree = ET.fromstring(drawing(run("CSMRF")))
    patterns = {one.get("id"): one for one in tree.iter(f"{SVG}pattern")}
    assert {fill for fill in FILLS.values() if fill.startswith("url")} == {
        f"url(#{name})" for name in patterns
    }
    shapes = [
        [child.tag for child in pattern][1:] + [pattern.get("patternTransform")]
        for pattern in patterns.values()
    ]
    assert len({str(one) for one in shapes}) == len(shapes) == len(STATES) - 1
    grey = [_light(FILLS["C"])]
    for pattern in patterns.values():
        paper, mark = (child.get("fill") or child.get("stroke") or "" for child in list(pattern)[:2])
        assert _light(paper) - _light(mark) > 0.3, "the pattern shows in grey"
        grey.append(_light(paper))
    assert min(grey[1:]) - grey[0] > 0.3, "what was computed is the darkest"


def _light(colour: str) -> float:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_bands_and_large_models() -> None:
    shown = timeline(run(*["C" * 120, "R" * 120] * 25, branches=("cond", "<uncond>")))
    assert "&lt;uncond&gt;" in shown
    assert "<uncond>" not in shown
    assert shown.count("<rect") < 300
    assert "block 119" in shown
    assert "step 50" in shown


def test_a_run_without_blocks() -> None:
    assert "No blocks" in timeline({"calls": 3})
    with pytest.raises(ValueError, match="no blocks"):
        drawing({})
