from __future__ import annotations

from typing import Any

import pytest
import torch

from acceleration import Refused, TaylorCache, accelerated
from acceleration._modules import parts_of
from acceleration._newton import Ladder
from dit.backbones.mmdit import MMDiT
from dit.seams import announce


def states(run: Any) -> list[str]:
    return [cell["states"] for cell in run.report().cells]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("anchors", [(0, 1, 2, 3), (1.0, 0.93, 0.7, 0.4), (1000.0, 990.0, 700.0, 655.0)])
def test_order_k_is_exact_on_polynomials_of_degree_k(order: int, anchors: Any) -> None:
    weights = torch.randn(order + 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(order))

    def value(u: float) -> Any:
        u = u / abs(anchors[0] or 1)
        return sum(weight * u**power for power, weight in enumerate(weights))

    ladder = Ladder(order)
    for anchor in anchors:
        ladder.push(value(anchor), anchor)
    for where in (anchors[-1] + (anchors[-1] - anchors[-2]), anchors[1]):
        assert torch.allclose(ladder.at(where), value(where), rtol=1e-9, atol=1e-10)


def test_the_order_grows_with_the_anchors_and_restarts_without_a_gap() -> None:
    ladder = Ladder(2)
    for count, at in enumerate((0.0, 1.0, 3.0, 4.0), start=1):
        ladder.push(torch.ones(2) * at, at)
        assert len(ladder.factors) == min(count, 3)
    ladder.push(torch.ones(2), 4.0)
    assert len(ladder.factors) == 1
    ladder.push(torch.ones(3), 5.0)
    assert ladder.at(9.0).shape == (3,)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_half_precision_bears_any_unit(scale: float) -> None:
    ladder = Ladder(3)
    for at in range(4):
        ladder.push(torch.full((2,), float(at**3), dtype=torch.float16), at * scale)
    assert ladder.at(4 * scale).tolist() == [64.0, 64.0]
    assert ladder.bytes == 4 * 2 * 2


def test_the_schedule_counts_from_the_last_warm_up_step(toy: Any) -> None:
    with accelerated(toy.model, TaylorCache(interval=3, order=1), steps=10) as run:
        toy.run()
    assert states(run) == ["CCCCCC"] * 3 + (["CFFFFF"] * 2 + ["CCCCCC"]) * 2 + ["CCCCCC"]
    report = run.report()
    assert report.forecast == 20
    assert report.effective == ["taylor-cache: 4 of 10 calls forecast blocks 1-5"]
    assert report.bytes == 2 * 5 * 8 * 4 == TaylorCache(order=1).predicted_bytes(toy.model, 5)
    assert TaylorCache(interval=3).predicted_speedup(10, 6) == 1 / report.fraction


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("variable", ["index", "sigma"])
def test_a_forecast_beats_reuse_where_the_change_is_smooth(toy: Any, order: int, variable: str) -> None:
    plain = toy.run(40)

    def error(**settings: Any) -> float:
        with accelerated(toy.model, TaylorCache(interval=3, **settings), steps=40):
            return sum(float((a - b).norm()) for a, b in zip(plain, toy.run(40), strict=True))

    assert error(order=order, variable=variable) < error(order=0) / 3


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("gate", ["interval", "confidence", "first-block"])
def test_injected_residuals_count_once(toy: Any, inplace: bool, gate: str) -> None:
    residuals = [torch.randn(1, 5, 8) for _ in range(6)]
    for block in toy.model.blocks[::2]:
        block.inplace = inplace
    with torch.inference_mode(), accelerated(toy.model, TaylorCache(gate=gate, order=2), steps=12) as run:
        exact = toy.model(toy.x, 1.0, residuals=residuals, inplace=inplace)
        for step in range(12):
            announce(toy.model, step=step)
            output = toy.model(toy.x, 1.0, residuals=residuals, inplace=inplace)
            assert torch.allclose(output, exact, atol=1e-5)
    assert run.report().forecast > 0


def test_offloading_changes_nothing_but_the_place(toy: Any) -> None:
    found = []
    for offload in (False, True):
        with accelerated(toy.model, TaylorCache(offload=offload), steps=10):
            found.append(toy.run())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_leaves_no_block_is_refused(toy: Any) -> None:
    with pytest.raises(Refused, match="6 of 6 blocks are always computed"):
        with accelerated(toy.model, TaylorCache(fresh=6)):
            pass
    with pytest.raises(Refused, match="no attention or feed-forward module was found"):
        with accelerated(toy.model, TaylorCache(level="modules")):
            pass


@pytest.fixture
def mmdit() -> Any:
    torch.manual_seed(0)
    net = MMDiT(width=16, heads=2, dual_depth=2, single_depth=2, context_dim=8, pooled_dim=8, sample_size=8)
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.2)
    return net.eval()


@torch.no_grad()
def sampled(net: Any, still: bool = False) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, text, pooled = (torch.randn(1, *shape, generator=draw) for shape in ((3, 8, 8), (5, 8), (8,)))
    outputs = []
    for step in range(8):
        announce(net, step=step)
        scale, time = (1.0, 500.0) if still else (1 - step / 16, 1000 - 100 * step)
        given = {"encoder_hidden_states": text, "pooled_projections": pooled, "return_dict": False}
        outputs.append(net(x * scale, torch.tensor([time]), **given)[0])
    return outputs


@pytest.mark.parametrize("gate", ["interval", "confidence"])
def test_modules_are_forecast_and_the_rest_is_computed(mmdit: Any, gate: str) -> None:
    found = parts_of(mmdit)
    assert [one.path.split(".", 2)[2] for one in found.modules] == ["attn", "ff", "ff_context"] * 2
    assert found.fused == {"single_transformer_blocks.0", "single_transformer_blocks.1"}
    plain, before = sampled(mmdit), {name: dict(one.__dict__) for name, one in mmdit.named_modules()}
    method = TaylorCache(level="modules", gate=gate, threshold=9.0, limit=2)
    with accelerated(mmdit, method, steps=8) as run:
        first = sampled(mmdit)
    with accelerated(mmdit, method, steps=8):
        assert all(torch.equal(a, b) for a, b in zip(first, sampled(mmdit), strict=True))
    assert torch.equal(first[2], plain[2])
    assert not torch.equal(first[3], plain[3])
    head = "C" if gate == "confidence" else "F"
    assert states(run)[3] == head + "FFF"
    assert run.report().cells[3]["modules"] == (3 if gate == "confidence" else 6)
    assert {name: dict(one.__dict__).keys() for name, one in mmdit.named_modules()} == {
        name: one.keys() for name, one in before.items()
    }
    with accelerated(mmdit, method, steps=8) as run:
        still = sampled(mmdit, still=True)
    assert run.report().forecast > 0
    assert all(torch.allclose(one, still[0], atol=1e-5) for one in still)
    assert run.report().bytes > 0
