"""Tokens to experts and back: rows sorted by expert, one grouped matrix product for each layer, rows summed up again.

What is not chosen is not computed. `dispatch` is the fast path, `dispatch_reference` computes every expert for every token and
multiplies by the gates; a test compares the two. The grouped product is one operator, so blocks compile without a break and
the FLOP counter sees what was really multiplied.

Differs: MegaBlocks (Gale et al. 2022, arXiv:2211.15841) has kernels of its own; here a GPU gets torch's grouped product where
its rules allow it (bfloat16, rows of 16 bytes), and everything else a loop over the segments.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

GATED = ("geglu", "swiglu")
"""Activations that take two numbers a hidden channel, a value and its gate."""
ACTIVATIONS = ("gelu-approximate", "gelu", "geglu", "swiglu", "linear-silu")


def activate(inner: Tensor, kind: str) -> Tensor:
    """Apply an activation of diffusers' feed-forward layers, by its name there: [..., h or 2 h] -> [..., h]."""
    if kind in GATED:
        value, gate = inner.chunk(2, dim=-1)
        return value * (F.gelu(gate) if kind == "geglu" else F.silu(gate))
    if kind == "linear-silu":
        return F.silu(inner)
    return F.gelu(inner, approximate="tanh" if kind == "gelu-approximate" else "none")


def dispatch(
    x: Tensor, indices: Tensor, gates: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, kind: str
) -> Tensor:
    """Return the sum over each token's experts of gate times perceptron.

    Args:
        x: tokens [T, D].
        indices, gates: the k experts of each token and their weights [T, k].
        up, bias: first maps [E, H, D] and [E, H] (H = 2 h where the activation is gated).
        down: second maps [E, D, h].
        kind: the activation.
    """
    rows, active = indices.shape
    experts = indices.flatten()
    order = experts.argsort(stable=True)  # [T k], rows of one expert beside each other
    counts = experts.new_zeros(len(up)).scatter_add_(0, experts, torch.ones_like(experts))
    inner = grouped_linear(x[order // active], counts, up)
    if bias is not None:
        inner = inner + bias[experts[order]]
    out = grouped_linear(activate(inner, kind), counts, down)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    # The one kernel that gathers, weighs and adds in a single pass over the rows.
    return F.embedding_bag(places.view(rows, active), out, per_sample_weights=gates.to(out.dtype), mode="sum")


def dispatch_reference(
    x: Tensor, indices: Tensor, gates: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, kind: str
) -> Tensor:
    """Return the same as `dispatch`, every expert computed for every token and multiplied by its gate or zero."""
    weights = gates.new_zeros(len(x), len(up)).scatter(1, indices, gates)  # [T, E]
    inner = torch.einsum("td,ehd->teh", x, up)
    if bias is not None:
        inner = inner + bias
    return torch.einsum("teh,edh,te->td", activate(inner, kind), down, weights.to(x.dtype))


def grouped_linear(x: Tensor, counts: Tensor, weight: Tensor) -> Tensor:
    """Multiply the first `counts[0]` rows of x [R, I] by weight[0], the next by weight[1]: weight [E, O, I] -> [R, O]."""
    if _grouped_kernel_fits(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))
    out: Tensor = _segments(x, counts, weight)
    return out


def _grouped_kernel_fits(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own grouped product runs here: a GPU, bfloat16, and strides that are multiples of 16 bytes."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return False
    strides = [one for one in (*weight.stride(), *x.stride()) if one != 1]
    return torch.cuda.get_device_capability(x.device) >= (8, 0) and all(one * 2 % 16 == 0 for one in strides)


def _sizes(rows: int, counts: Tensor) -> list[int]:
    """The counts as numbers; where there are none (the meta device) the rows are dealt out evenly."""
    if counts.device.type != "meta":
        return counts.tolist()
    some, more = divmod(rows, len(counts))
    return [some + (i < more) for i in range(len(counts))]


@torch.library.custom_op("leapfrog::segments", mutates_args=())
def _segments(x: Tensor, counts: Tensor, weight: Tensor) -> Tensor:
    out = x.new_empty(len(x), weight.shape[1])
    start = 0
    for one, size in zip(weight, _sizes(len(x), counts), strict=True):
        if size:
            torch.mm(x[start : start + size], one.T, out=out[start : start + size])
        start += size
    return out


@torch.library.custom_op("leapfrog::segments_weight", mutates_args=())
def _segments_weight(x: Tensor, counts: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the weights: [E, O, I] from rows in [R, I] and gradients of rows out [R, O]."""
    out = x.new_zeros(len(counts), grad.shape[1], x.shape[1])
    start = 0
    for one, size in zip(out, _sizes(len(x), counts), strict=True):
        if size:
            torch.mm(grad[start : start + size].T, x[start : start + size], out=one)
        start += size
    return out


@_segments.register_fake
def _(x: Tensor, counts: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_segments_weight.register_fake
def _(x: Tensor, counts: Tensor, grad: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    x, counts, weight = ctx.saved_tensors
    needs_x, _, needs_weight = ctx.needs_input_grad
    return (
        _segments(grad, counts, weight.transpose(1, 2)) if needs_x else None,
        None,
        _segments_weight(x, counts, grad) if needs_weight else None,
    )


_segments.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.leapfrog.segments)
def _(x: tuple[int, int], counts: Any, weight: tuple[int, int, int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[1]
