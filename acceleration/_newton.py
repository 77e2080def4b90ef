"""A tensor that changes along a variable, forecast by the polynomial through its last known values (Newton's form).

Paper: From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers; Liu, Zou, Lyu, Chen, Zhang; 2025;
    arXiv:2503.06923.
Differs: divided differences instead of finite ones, so known values need not be equally far apart and order k is exact
    on polynomials of degree k; the order grows with the number of known values.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Ladder:
    """The divided differences of a tensor at its last `order + 1` anchors, newest first.

    Differences are taken in float32 (float64 for float64) and stored in the tensor's own dtype, in units of the first
    gap, so that small and large variables fit half precision. `offload` stores them in main memory.
    """

    __slots__ = ("_device", "_unit", "anchors", "factors", "offload", "order")

    def __init__(self, order: int, offload: bool = False) -> None:
        self.order, self.offload = order, offload
        self.anchors: list[float] = []
        self.factors: list[Tensor] = []
        self._unit = 1.0
        self._device = torch.device("cpu")

    @property
    def bytes(self) -> int:
        """Size of what is stored."""
        return sum(one.numel() * one.element_size() for one in self.factors)

    def fits(self, value: Tensor) -> bool:
        """Whether a value continues what is known: its shape, dtype and device."""
        return not self.factors or (
            self.factors[0].shape == value.shape
            and self.factors[0].dtype == value.dtype
            and self._device == value.device
        )

    def push(self, value: Tensor, at: float) -> None:
        """Take `value` as known at `at`; a value at a known anchor, or of another shape, begins anew."""
        if at in self.anchors or not self.fits(value):
            self.anchors, self.factors = [], []
        if len(self.anchors) == 1:
            self._unit = abs(at - self.anchors[0])
        self._device = value.device
        made, difference = [value], precise(value)
        for anchor, factor in zip(self.anchors, self.factors[: self.order], strict=False):
            difference = (difference - self._here(factor)) / ((at - anchor) / self._unit)
            made.append(difference)
        self.factors = [one.to("cpu" if self.offload else one.device, value.dtype) for one in made]
        self.anchors = [at, *self.anchors][: self.order + 1]

    def at(self, where: float) -> Tensor:
        """Forecast the tensor at `where`."""
        if len(self.factors) == 1:
            return self.factors[0].to(self._device)
        found = self._here(self.factors[-1])
        for anchor, factor in zip(reversed(self.anchors[:-1]), reversed(self.factors[:-1]), strict=True):
            found = found * ((where - anchor) / self._unit) + self._here(factor)
        return found.to(self.factors[0].dtype)

    def _here(self, factor: Tensor) -> Tensor:
        return precise(factor.to(self._device))


def precise(x: Tensor) -> Tensor:
    """Return a tensor in float32 at least."""
    return x.float() if x.dtype.itemsize < 4 else x
