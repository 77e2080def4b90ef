"""Norms, patches in and patches out: the small layers every backbone shares."""

from __future__ import annotations

import torch
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


def sliceable(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether rows and columns of a linear map may be used by themselves: its weights are at hand and nothing hangs on it.

    Adapters, quantisation, offloading and casting by layers all act when the map is called as a whole.
    """
    free = not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
    return type(layer) is nn.Linear and free and layer.weight.dtype == dtype


def cut(layer: nn.Linear, places: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a linear map for some of its outputs (`dim` 0) or inputs (1), at sorted `places`.

    Without a copy where they lie side by side. On the processor a copy is kept beside the layer for the next call, which in
    sampling mostly asks for the same; it is made anew when places or weights change.
    """
    weight, bias = layer.weight, layer.bias
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 == len(places):
        return weight.narrow(dim, first, len(places)), bias if dim or bias is None else bias.narrow(
            0, first, len(places)
        )
    kept = weight.device.type == "cpu" and not (torch.is_grad_enabled() and weight.requires_grad)
    key = _mark(weight, places, dim) if kept else None
    known = layer.__dict__.get("_cut")
    if kept and known is not None and known[0] == key:
        found: tuple[Tensor, Tensor | None] = known[1]
        return found
    parts = (weight.index_select(dim, places), bias if dim or bias is None else bias.index_select(0, places))
    if kept:
        layer.__dict__["_cut"] = (key, parts)
    return parts


def _mark(weight: Tensor, places: Tensor, dim: int) -> tuple[object, ...]:
    """What tells one cut from another. Merged adapters write past the version counter, so some of the values are in it."""
    version = 0 if weight.is_inference() else weight._version
    some = weight.detach().flatten()[:: max(1, weight.numel() // 257)]
    return places.numpy().tobytes(), dim, weight.data_ptr(), version, some.float().numpy().tobytes()


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
