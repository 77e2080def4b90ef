"""What an accelerated run spoils is made again exactly, once, and said; guidance is spared in every way it is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from acceleration import DeltaCache, GuidanceSkip
from pipelines import catalog
from pipelines.generate import generate
from pipelines.measure import compare
from pipelines.request import Request

Folder = Callable[[str], Path]
METHOD = DeltaCache(interval=2, warmup=1, mode="rear", cached_fraction=0.5)


def spoil(monkeypatch: pytest.MonkeyPatch, model: str, value: float, times: int) -> list[int]:
    """Let the codec return nothing but `value`, the first `times` times."""
    codec, calls = catalog.load(model).pipeline.codec, []
    inner = codec.decode

    def decode(latents: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        found = inner(latents, *args, **kwargs)
        return torch.full_like(found, value) if len(calls) <= times else found

    monkeypatch.setattr(codec, "decode", decode)
    return calls


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "NaN"), (0.0, "one colour")])
def test_a_spoilt_picture_is_made_again_exactly(
    value: float, words: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(prompt="a cat", model=tiny, steps=4, accelerators=(METHOD,))
    exact = generate(request.replace(accelerators=()))
    calls = spoil(monkeypatch, tiny, value, times=1)
    result = generate(request)
    assert len(calls) == 2
    assert result.ok
    assert result.request == request == result.pictures[0].request
    assert result.report["pixels"] == exact.report["pixels"]
    assert result.report["exact"]
    assert words in result.report["retried"]["failures"][0]
    assert result.report["retried"]["run"]["reused"] > 0
    assert result.report["run"]["reused"] == 0
    assert "it was made again exactly" in result.report["warnings"][0]
    assert "after delta-cache" in result.report["summary"]


def test_only_once_and_only_where_it_can_help(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(prompt="a cat", model=tiny, steps=4, accelerators=(METHOD,))
    calls = spoil(monkeypatch, tiny, float("nan"), times=99)
    assert not generate(request).ok  # the exact one holds nothing either
    assert len(calls) == 2
    assert not generate(request, retry=False).ok
    assert not generate(request.replace(accelerators=())).ok
    assert len(calls) == 4


def test_a_comparison_shows_the_failure(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = catalog.load(tiny).pipeline.codec
    inner, runs = codec.decode, []

    def decode(latents: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        found = inner(latents, *args, **kwargs)
        return found * float("nan") if len(runs) == 2 else found  # exact, accelerated

    monkeypatch.setattr(codec, "decode", decode)
    measured = compare(Request(prompt="a cat", model=tiny, steps=4), (METHOD,), rounds=1)
    assert measured.verdict.startswith("failed: accelerated: the picture contains NaN")


@pytest.mark.parametrize("name", ["ours", "sd3", "wan", "lumina2", "dit"])
def test_guidance_is_spared_through_the_door(name: str, folder_of: Folder) -> None:
    """Batched with a name, batched without, by cache contexts, one after the other without a name, conditional half first."""
    task: dict[str, Any] = {"prompt": "a red cat", "width": 32, "height": 32}
    task |= {"frames": 5} if name == "wan" else {}
    task = {"class_label": 3} if name == "dit" else task
    request = Request(**({"model": str(folder_of(name)), "steps": 4, "seed": 3} | task))
    neutral = generate(request.replace(accelerators=(GuidanceSkip(interval=1),)))
    exact = generate(request)
    assert neutral.report["pixels"] == exact.report["pixels"]
    fast = generate(request.replace(accelerators=(GuidanceSkip(warmup=1),)))
    run = fast.report["run"]
    assert run["effective"] == ["guidance-skip: of the unconditional forwards 1 reused, 3 computed"]
    assert (run["calls"], run["reused"], run["computed"]) == (8, run["blocks"], 7 * run["blocks"])
    assert run["predicted_speedup"] == 8 / 7
    assert fast.ok
