"""Distances of pictures against values worked out by hand."""

import math

import numpy as np
import pytest
from PIL import Image

from pipelines.compare import difference


def picture(pixels):
    return Image.fromarray(np.asarray(pixels, dtype=np.uint8))


def test_equal_pictures_are_identical():
    one = picture(np.random.default_rng(0).integers(0, 256, (16, 16, 3)))
    found = difference(one, one)
    assert math.isinf(found.psnr)
    assert (found.ssim, found.largest, found.verdict) == (1.0, 0, "identical")
    assert found.to_dict()["psnr_db"] is None


def test_psnr_of_a_known_pair():
    """A constant distance of 24 grey levels is 20 log10(255 / 24) = 20.53 dB, also where 8 bits would wrap."""
    found = difference(picture(np.full((16, 16, 3), 10)), picture(np.full((16, 16, 3), 34)))
    assert found.psnr == pytest.approx(20 * math.log10(255 / 24))
    back = difference(picture(np.full((16, 16, 3), 34)), picture(np.full((16, 16, 3), 10)))
    assert back.psnr == found.psnr
    assert found.largest == 24


def test_ssim_of_constant_pictures_is_the_luminance_term():
    found = difference(picture(np.full((16, 16, 3), 100)), picture(np.full((16, 16, 3), 120)))
    c1 = (0.01 * 255) ** 2
    assert found.ssim == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1))


def test_independent_noise_is_a_different_picture():
    dice = np.random.default_rng(1)
    found = difference(
        picture(dice.integers(0, 256, (64, 64, 3))), picture(dice.integers(0, 256, (64, 64, 3)))
    )
    assert found.psnr == pytest.approx(7.7, abs=0.3)
    assert abs(found.ssim) < 0.05
    assert found.verdict == "a different picture"


def test_sizes_must_agree():
    with pytest.raises(ValueError, match="16"):
        difference(picture(np.zeros((16, 16, 3))), picture(np.zeros((16, 18, 3))))
