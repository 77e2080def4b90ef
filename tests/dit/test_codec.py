"""The half-size codec: an exact average in, a plain enlargement out until it is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dit.codec import ResampleCodec


def test_encode_is_the_area_average() -> None:
    pictures = torch.rand(2, 3, 6, 8) * 2 - 1
    latents = ResampleCodec(width=8, depth=1).encode(pictures)
    assert latents.shape == (2, 3, 3, 4)
    torch.testing.assert_close(latents[0, 1, 2, 3], pictures[0, 1, 4:6, 6:8].mean())


def test_untrained_decode_is_bilinear_enlargement() -> None:
    latents = torch.rand(1, 3, 4, 6) * 2 - 1
    codec = ResampleCodec(width=8, depth=2)
    expected = F.interpolate(latents, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(codec.decode(latents), expected, atol=0, rtol=0)
    torch.nn.init.ones_(codec.conv_out.bias)
    assert not torch.allclose(codec.decode(latents), expected)


def test_decode_learns_what_the_average_lost() -> None:
    torch.manual_seed(0)
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(4, 3, 8, 8) * torch.tensor(
        [1.0, 0.5, -0.5, -1.0]
    ).reshape(4, 1, 1, 1)
    shifted = stripes.roll(1, -1) * 0.5 + stripes.roll(1, -2) * 0.5 + torch.linspace(-1, 1, 8)
    codec = ResampleCodec(width=8, depth=1)
    optimizer = torch.optim.Adam(codec.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(codec(shifted), shifted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_round_trip_through_a_folder(tmp_path: Path) -> None:
    codec = ResampleCodec(width=8, depth=1)
    torch.nn.init.normal_(codec.conv_out.weight)
    codec.save_pretrained(tmp_path)
    again = ResampleCodec.from_pretrained(tmp_path)
    latents = torch.randn(1, 3, 4, 4)
    assert torch.equal(again.decode(latents), codec.decode(latents))
    assert (again.scale_factor, again.latent_channels) == (2, 3)


def test_other_factors(tmp_path: Path) -> None:
    codec = ResampleCodec(width=8, depth=1, scale_factor=4)
    assert codec(torch.zeros(1, 3, 8, 12)).shape == (1, 3, 8, 12)
    with pytest.raises(ValueError, match="do not divide by 4"):
        codec.encode(torch.zeros(1, 3, 8, 10))
