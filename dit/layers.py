"""Norms, patches in and patches out: the small layers every backbone shares."""

from __future__ import annotations

from torch import Tensor, nn

from dit.grid import Grid, patchify, unpatchify


class PlainNorm(nn.LayerNorm):
    """Layer norm without weights, eps 1e-6: its scale and shift come from the conditioning."""

    def __init__(self, width: int) -> None:
        super().__init__(width, elementwise_affine=False, eps=1e-6)


class HeadNorm(nn.RMSNorm):
    """RMS norm of queries or keys, eps 1e-6, computed in its weights' dtype: casting by layers leaves norms in theirs."""

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[..., head size] -> the same, in the dtype that came in."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class PatchEmbed(nn.Module):
    """Picture -> tokens by one linear map of each patch (the released models' strided convolution, reshaped)."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * patch[0] * patch[1] * patch[2], width)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] or [B, C, F, H, W] -> [B, N, D]."""
        tokens: Tensor = self.proj(patchify(x, self.patch))
        return tokens


class PatchOut(nn.Module):
    """Tokens -> picture by one linear map, zero at the start."""

    def __init__(self, width: int, channels: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(width, channels * patch[0] * patch[1] * patch[2])
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, tokens: Tensor, grid: Grid, *, frames: bool = False) -> Tensor:
        """[B, N, D] -> [B, C, H, W], or [B, C, F, H, W] when `frames`."""
        # under layerwise casting diffusers keeps a layer called proj_out in its own dtype
        return unpatchify(self.proj(tokens.to(self.proj.weight.dtype)), grid, self.patch, frames=frames)
