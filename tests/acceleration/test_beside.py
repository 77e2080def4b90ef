"""What stands beside the stream: face adapters, long skips and K/V caches are computed, or the reuse is refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acceleration import DeltaCache, accelerated
from acceleration.base import Untouched
from dit.seams import announce, writes_cache


class Change(nn.Module):
    """Returns a change that the model adds, where a block would return the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(self.linear(hidden_states))


class Block(Change):
    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:  # type: ignore[override]
        hidden_states = hidden_states if skip is None else hidden_states + 0.5 * skip
        return hidden_states + super().forward(hidden_states)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(6)])
        self.adapters = nn.ModuleList([Change() for _ in range(2)])
        self.scale, self.skipping = 0.0, False

    def forward(
        self, hidden_states: Tensor, timestep: float, kv_cache: Any = None, kv_cache_mode: str = "cached"
    ) -> Tensor:
        skips: list[Tensor] = []
        for place, block in enumerate(self.blocks):
            late = self.skipping and place > 2
            hidden_states = block(hidden_states, skip=skips.pop()) if late else block(hidden_states)
            skips.append(hidden_states)
            if self.scale and place % 3 == 0:
                hidden_states = hidden_states + self.scale * self.adapters[place // 3](hidden_states)
        return hidden_states


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def largest_error(model: Model, method: DeltaCache, mode: Any = torch.no_grad) -> tuple[float, Any]:
    with mode():
        x = torch.randn(1, 4, 8)
        exact, errors = model(x, 1.0), []
        with accelerated(model, method, steps=5) as run:
            for step in range(5):
                announce(model, step=step)
                errors.append(float((model(x, 1.0) - exact).norm() / exact.norm()))
    return max(errors), run.report()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_an_adapter_between_blocks_is_computed(model: Model, scale: float, mode: Any) -> None:
    model.scale = scale
    error, report = largest_error(model, DeltaCache(mode="whole", warmup=1), mode)
    assert error < 1e-6
    assert any(
        "Change returns is added to hidden_states by the model itself" in note for note in report.notes
    )
    assert [cell["states"] for cell in report.cells if "R" in cell["states"]][-1].count("R") == 6


def test_blocks_that_feed_later_ones_are_not_reused(model: Model) -> None:
    model.skipping = True
    error, report = largest_error(model, DeltaCache(mode="rear", cached_fraction=0.5, warmup=1))
    assert error < 1e-6
    assert report.reused
    with pytest.raises(Untouched, match="long skips"):
        largest_error(model, DeltaCache(mode="front", cached_fraction=0.5, warmup=1))


def test_a_call_that_writes_a_cache_is_full(model: Model) -> None:
    x = torch.randn(1, 4, 8)
    with torch.no_grad(), accelerated(model, DeltaCache(mode="whole", warmup=1), steps=6) as run:
        for step in range(5):
            announce(model, step=step)
            model(x, 1.0, kv_cache=object(), kv_cache_mode="extract" if step == 2 else "cached")
    assert [set(cell["states"]) for cell in run.report().cells] == [{"C"}, {"C"}, {"C"}, {"C"}, {"R"}]
    assert any("K/V cache" in note for note in run.report().notes)


def test_which_calls_write_a_cache() -> None:
    class Layer:
        mode = "write"

    assert not writes_cache({"hidden_states": 1, "kv_cache": None})
    assert writes_cache({"kv_cache": object(), "kv_cache_mode": "capture_pre_rope"})
    assert not writes_cache({"kv_cache": object(), "kv_cache_mode": "inject"})
    assert writes_cache({"kv_caches": [Layer()]})
    Layer.mode = "read"
    assert not writes_cache({"kv_caches": [Layer()]})
    assert not writes_cache({"kv_cache": [{}], "kv_cache_flag": {"is_cache_step": False}})
