"""Attention with a quick backward: the same answers and gradients, heard by all who listen, and only where it was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.compiler.config as compiled
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from dit.attention import attend
from training.attention import quick_backward

CPU = torch.device("cpu")


def answers(parts: Tensor, mask: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of q, k and v, in float32."""
    q, k, v = (one.to(dtype).requires_grad_() for one in parts)
    out = attend(q, k, v, mask)
    out.float().square().sum().backward()
    return [out.float(), *(one.grad.float() for one in (q, k, v) if one.grad is not None)]


def kernels(dtype: torch.dtype) -> set[str]:
    """Names of what torch computes in a training step of attention."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        answers(torch.randn(3, 2, 7, 2, 8), None, dtype)
    return {one.key for one in seen.key_averages() if "attention" in one.key}


@pytest.mark.parametrize("masked", [False, True])
def test_answers_and_gradients_are_those_of_float32(masked: bool) -> None:
    parts = torch.randn(3, 2, 7, 2, 8).bfloat16().float()
    mask = (torch.rand(2, 1, 7, 7) < 0.6) | (torch.arange(7) == 0) if masked else None
    if mask is not None:
        mask[0, :, 3] = False  # a query that may hear nobody is answered with zeros
    exact = answers(parts, mask, torch.float32)
    with quick_backward(CPU, torch.bfloat16):
        quick = answers(parts, mask, torch.bfloat16)
    assert len(quick) == 4
    for one, other in zip(quick, exact, strict=True):
        assert (one - other).abs().max() < 0.03 * other.abs().max()


def test_it_holds_in_bfloat16_on_a_processor_until_it_is_left() -> None:
    fused, written = (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_attention_math",
    )
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)  # as it is by default, whatever ran before
    with quick_backward(CPU, torch.bfloat16):
        assert written in kernels(torch.bfloat16)
        assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        assert compiled.cache_key_tag, "what was compiled with the fused kernel is not taken from torch's cache"
    for device, dtype in ((CPU, torch.float32), (torch.device("cuda"), torch.bfloat16)):
        with quick_backward(device, dtype):
            assert fused in kernels(torch.bfloat16), "nothing was asked for"
    with pytest.raises(KeyError), quick_backward(CPU, torch.bfloat16):
        raise KeyError
    assert fused in kernels(torch.bfloat16)
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    assert not compiled.cache_key_tag


@pytest.mark.parametrize("quick", [True, False])
def test_in_training_every_call_is_heard(quick: bool) -> None:
    class Listener(TorchFunctionMode):
        heard = 0

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.heard += function is F.scaled_dot_product_attention
            return function(*args, **(kwargs or {}))

    with quick_backward(CPU, torch.bfloat16 if quick else torch.float32), Listener() as listener:
        answers(torch.randn(3, 2, 7, 2, 8), None, torch.bfloat16)
    assert listener.heard == 1
