"""How far two sets of pictures, latents or features lie apart: the measures that every figure of this project uses.

All of them compute in float64 on the processor, whatever type comes in.

Paper: Image Quality Assessment: From Error Visibility to Structural Similarity, Wang et al. 2004 (SSIM); GANs Trained by a Two
Time-Scale Update Rule, Heusel et al. 2017, arXiv:1706.08500 (Frechet distance).
Differs: the Frechet distance is taken in whatever features are given, here those of the judge and not of Inception, so it
compares only with figures of the same judge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipelines import compare


def mean_squared_error(a: Tensor, b: Tensor) -> float:
    """Return the mean squared difference. Raises: ValueError where the shapes differ or nothing is there."""
    x, y = _pair(a, b)
    return float((x - y).square().mean())


def psnr(a: Tensor, b: Tensor, *, span: float = 255.0) -> float:
    """Return the peak signal-to-noise ratio in dB of values that span `span`; infinite where they are equal."""
    return compare.psnr(mean_squared_error(a, b), span)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b| in the Euclidean norm: of latents, b the exact ones. Zero where both are zero."""
    x, y = _pair(a, b)
    difference, size = float((x - y).norm()), float(y.norm())
    return 0.0 if difference == 0 else (difference / size if size else math.inf)


def ssim(a: Tensor, b: Tensor, *, span: float = 255.0) -> float:
    """Return the mean structural similarity of pictures [B, C, H, W] or [C, H, W], over every colour by itself.

    Gaussian window of the paper, only where it lies wholly inside the picture.

    Raises:
        ValueError: shapes differ, or a side is smaller than the window.
    """
    x, y = _pair(a, b)
    return compare.ssim(x.numpy(), y.numpy(), span)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of two sets of features [n, D] and [m, D], each taken for a Gaussian.

    It is biased upwards for small sets, the more so the larger D: compare only sets of one size, and print beside it what two
    sets of real pictures of that size give. Never below zero.

    Raises:
        ValueError: widths differ, or a set has fewer than two members.
    """
    x, y = a.detach().cpu().double(), b.detach().cpu().double()
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"features must be [n, D] and [m, D] with n and m of 2 or more, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    shift = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    x, y = _centred(x), _centred(y)
    # trace sqrt(Cx Cy) is the sum of the singular values of x y^T, for Cx = x^T x and Cy = y^T y: no matrix root is needed.
    overlap = torch.linalg.svdvals(x @ y.T).sum()
    return max(0.0, float(shift + x.square().sum() + y.square().sum() - 2 * overlap))


def _centred(x: Tensor) -> Tensor:
    """[n, D] -> [min(n, D), D] whose Gram matrix is the covariance."""
    x = (x - x.mean(dim=0)) / (len(x) - 1) ** 0.5
    return torch.linalg.qr(x).R if len(x) > x.shape[1] else x


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.numel() == 0:
        raise ValueError(f"shapes must be equal and not empty, got {tuple(a.shape)} and {tuple(b.shape)}")
    return a.detach().cpu().double(), b.detach().cpu().double()
