"""Small codecs between pictures and the latents a shipped model works on.

A codec is a diffusers model with `encode` and `decode`, a `scale_factor` (picture pixels for one latent pixel) and
`latent_channels`. Pictures are [B, 3, H, W] in -1..1.

Paper: Real-Time Single Image Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network, Shi et al. 2016,
arXiv:1609.05158 (the enlarger's last step).
"""

from __future__ import annotations

from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualConv(nn.Module):
    """x + conv(GELU(conv(x))), two 3 x 3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W] -> [B, D, H, W]."""
        out: Tensor = x + self.conv2(F.gelu(self.conv1(x), approximate="tanh"))
        return out


class ResampleCodec(ModelMixin, ConfigMixin):
    """Latent = the picture at half size, by area average; decoding = bilinear enlargement plus a learned sharpening.

    At the start of training `decode` is the plain bilinear enlargement.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(self, width: int = 64, depth: int = 4, scale_factor: int = 2, latent_channels: int = 3) -> None:
        super().__init__()
        self.scale_factor, self.latent_channels = scale_factor, latent_channels
        self.conv_in = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualConv(width) for _ in range(depth))
        self.conv_out = nn.Conv2d(width, latent_channels * scale_factor**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        if self.conv_out.bias is not None:
            nn.init.zeros_(self.conv_out.bias)

    @apply_forward_hook  # offloaded, it comes to the device when it is called by this name too
    def encode(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, H / 2, W / 2]. Raises: ValueError where a side does not divide."""
        if pictures.shape[-1] % self.scale_factor or pictures.shape[-2] % self.scale_factor:
            raise ValueError(f"sides {tuple(pictures.shape[-2:])} do not divide by {self.scale_factor}")
        return F.avg_pool2d(pictures, self.scale_factor)

    @apply_forward_hook
    def decode(self, latents: Tensor) -> Tensor:
        """[B, 3, H / 2, W / 2] -> [B, 3, H, W]."""
        latents = latents.to(self.dtype)
        x = self.conv_in(latents)
        for block in self.blocks:
            x = block(x)
        detail = F.pixel_shuffle(self.conv_out(F.gelu(x, approximate="tanh")), self.scale_factor)
        plain = F.interpolate(latents, scale_factor=self.scale_factor, mode="bilinear", align_corners=False)
        return plain + detail

    def forward(self, pictures: Tensor) -> Tensor:
        """Encode and decode: [B, 3, H, W] -> [B, 3, H, W]."""
        return self.decode(self.encode(pictures))
