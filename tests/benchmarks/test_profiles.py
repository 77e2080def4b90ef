"""The shipped profiles: chosen by what was measured, and holding where they are used."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.profiles import LEVELS, fastest
from pipelines import catalog, profile
from pipelines.request import Request, RequestError


def row(psnr: float, speed: float, **more: Any) -> dict[str, Any]:
    return {"method": "leapfrog step-forecast", "steps": 28, "psnr_db": psnr, "speedup": {"end_to_end": speed}} | more


def test_the_fastest_that_is_near_enough_is_chosen() -> None:
    rows = [row(36.0, 2.0), row(35.0, 3.0), row(34.9, 9.0), row(50.0, 8.0, steps=50), row(50.0, 8.0, method="MagCache")]
    assert fastest([*rows, {**row(60.0, 7.0), "speedup": None}], 28, 35.0) == rows[1]
    assert fastest(rows, 28, 36.5) is None


@pytest.mark.parametrize("name", list(LEVELS))
def test_a_shipped_profile_holds_for_the_model_as_it_is_shipped(name: str) -> None:
    found = profile.known("emoji")[name]
    card = catalog.shipped()["emoji"]
    assert found.expected["psnr_db"] >= LEVELS[name]
    assert found.expected["speedup_denoise"] > 1
    assert found.range.weights == catalog.load("emoji").digest
    profile.check(found, Request(prompt="a dog", profile=name), card)
    with pytest.raises(RequestError, match="28 steps"):
        profile.check(found, Request(prompt="a dog", profile=name, steps=20), card)
