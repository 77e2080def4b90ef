"""The measures agree with what they are defined to be, on values that can be worked out by hand or the long way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.measures import frechet_distance, mean_squared_error, psnr, relative_error, ssim


@pytest.fixture
def pictures() -> Tensor:
    return torch.randint(0, 256, (2, 3, 24, 20), generator=torch.Generator().manual_seed(0)).byte()


def test_psnr_of_a_known_error(pictures: Tensor) -> None:
    other = pictures.int() + 5
    assert mean_squared_error(pictures, other) == 25
    assert psnr(pictures, other) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(pictures.float() / 255, other.float() / 255, span=1.0) == pytest.approx(
        20 * math.log10(255 / 5)
    )


def test_equal_pictures(pictures: Tensor) -> None:
    assert psnr(pictures, pictures) == math.inf
    assert ssim(pictures, pictures) == pytest.approx(1.0)
    assert relative_error(pictures, pictures) == 0


def test_bytes_do_not_wrap_around() -> None:
    assert mean_squared_error(torch.tensor([250]).byte(), torch.tensor([5]).byte()) == 245**2


def test_relative_error_counts_against_the_second() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(exact * 1.1, exact) == pytest.approx(0.1)
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_ssim_the_long_way() -> None:
    dice = torch.Generator().manual_seed(1)
    a, b = torch.rand(13, 12, generator=dice).double(), torch.rand(13, 12, generator=dice).double()
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / 4.5)
    window = torch.outer(line, line) / line.sum() ** 2
    found = []
    for top in range(3):
        for left in range(2):
            x, y = (one[top : top + 11, left : left + 11] for one in (a, b))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            both = (window * (x - mx) * (y - my)).sum()
            found.append(
                (2 * mx * my + 1e-4) * (2 * both + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
            )
    assert ssim(a[None], b[None], span=1.0) == pytest.approx(float(torch.stack(found).mean()))


def test_ssim_falls_with_noise(pictures: Tensor) -> None:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(2))
    some, much = (ssim(pictures, pictures.float() + size * noise) for size in (5, 50))
    assert much < some < 1


def test_frechet_distance_of_one_dimension_is_known() -> None:
    x = torch.tensor([[-1.0], [1.0]]) / math.sqrt(2)  # variance 1
    assert frechet_distance(x, 3 * x + 4) == pytest.approx(4**2 + (3 - 1) ** 2)


@pytest.mark.parametrize(("n", "m"), [(40, 60), (5, 60), (5, 4)])
def test_frechet_distance_the_long_way(n: int, m: int) -> None:
    dice = torch.Generator().manual_seed(3)
    x = torch.randn(n, 6, generator=dice).double()
    y = torch.randn(m, 6, generator=dice).double() * 2 + 0.5
    cx, cy = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(cx)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    middle = torch.linalg.eigvalsh(root @ cy @ root).clamp_min(0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + cx.trace() + cy.trace() - 2 * middle
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-5)


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(4))
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("measure", [mean_squared_error, psnr, relative_error, ssim])
def test_shapes_must_be_equal(measure: object) -> None:
    assert callable(measure)
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\) and \(2, 3, 16, 15\)"):
        measure(torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 15))


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="not empty"):
        psnr(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="sides of 11 px"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="2 or more"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(4, 3\)"):
        frechet_distance(torch.zeros(4, 2), torch.zeros(4, 3))
