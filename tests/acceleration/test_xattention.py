from __future__ import annotations

from typing import Any

import pytest
import torch

from acceleration import XAttention, accelerated
from acceleration._sparse import block_mass
from acceleration.xattention import antidiagonal_mass, heaviest
from dit.backbones.mmdit import MMDiT


def test_scores_are_sums_of_antidiagonals() -> None:
    torch.manual_seed(0)
    q, k, stride = torch.randn(1, 1, 32, 8), torch.randn(1, 1, 32, 8), 4
    scores = (q[0, 0] @ k[0, 0].t()) * 8**-0.5
    folded = torch.empty(8, 8)
    for row in range(8):
        for column in range(8):
            square = scores[row * stride : (row + 1) * stride, column * stride : (column + 1) * stride]
            folded[row, column] = square.flip(0).diagonal().sum() / stride
    expected = torch.softmax(folded, -1).view(2, 4, 2, 4).sum((1, 3))
    assert torch.allclose(antidiagonal_mass(q, k, 16, 16, stride)[0, 0], expected, atol=1e-5)


def test_keys_that_may_not_be_heard_and_filling_weigh_nothing() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 8)
    keys = torch.ones(2, 40, dtype=torch.bool)
    keys[1, 16:] = False
    mass = antidiagonal_mass(q, k, 16, 16, 4, keys=keys)
    assert mass.shape == (2, 3, 3, 3)
    assert (mass[1, :, :, 1:] == 0).all()
    assert torch.allclose(mass.sum((-1, -2)), torch.full((2, 3), 10.0))  # folded queries


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_the_fewest_tiles_that_reach_the_threshold(threshold: float) -> None:
    torch.manual_seed(0)
    mass = torch.rand(1, 2, 6, 10)
    queries, columns = torch.zeros(6, dtype=torch.bool), torch.zeros(10, dtype=torch.bool)
    queries[5], columns[9] = True, True
    kept = heaviest(mass, threshold, queries, columns)
    assert kept[:, :, 5].all()
    assert kept[..., 9].all()
    share = mass / mass.sum(-1, keepdim=True)
    held = (share * kept).sum(-1)
    assert (held >= threshold - 1e-6).all()
    smallest = share.masked_fill(~kept | columns, torch.inf).amin(-1)
    loose = smallest.isfinite() & ~queries
    assert ((held - smallest)[loose] < threshold).all()


@pytest.mark.parametrize("stride", [8, 16])
def test_it_finds_heavy_tiles(stride: int) -> None:
    """Neighbours of one tile that belong together: the estimate picks the tiles that really hold the weight."""
    torch.manual_seed(0)
    theme = torch.randn(8, 32) * 2
    own = theme.repeat_interleave(64, 0)
    q, k = (
        (own + torch.randn(512, 32) * 0.3).view(1, 1, 512, 32),
        (own + torch.randn(512, 32) * 0.3).view(1, 1, 512, 32),
    )
    none = torch.zeros(8, dtype=torch.bool)
    kept = heaviest(antidiagonal_mass(q, k, 64, 64, stride), 0.9, none, none)
    truth, _ = block_mass(q, k, 64, 64)
    assert float((truth * kept).sum() / truth.sum()) > 0.9
    assert float(kept.float().mean()) < 0.3


def sample(net: Any, given: Any, steps: int = 10) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            net(**given, timestep=torch.full((1,), 1000.0 * (1 - step / steps)), return_dict=False)[0]
            for step in range(steps)
        ]


def test_a_run_and_the_neutral_run() -> None:
    torch.manual_seed(0)
    net = MMDiT(
        sample_size=16,
        in_channels=4,
        patch_size=1,
        width=16,
        heads=2,
        dual_depth=2,
        single_depth=1,
        context_dim=12,
        pooled_dim=0,
    ).eval()
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.2)
    given = {"hidden_states": torch.randn(1, 4, 16, 16), "encoder_hidden_states": torch.randn(1, 7, 12)}
    plain = sample(net, given)
    small: dict[str, Any] = {"rows": 16, "block": 16, "min_tokens": 64, "measure": False}
    with accelerated(net, XAttention(threshold=1.0, **small), steps=10):
        assert all(torch.equal(a, b) for a, b in zip(plain, sample(net, given), strict=True))
    with accelerated(net, XAttention(threshold=0.5, **small), steps=10) as run:
        sample(net, given)
    report = run.report()
    assert [cell["states"] for cell in report.cells] == ["CCC"] * 2 + ["CSS"] * 8
    assert all(0 < row["recall"] < 1 for row in report.attention[1:])
    with accelerated(net, XAttention(threshold=0.99, **small), steps=10) as run:
        sample(net, given)
    assert run.report().sparse == 0 or all(
        row["density"] < 0.95 for row in run.report().attention if row["sparse"]
    )
