"""Attention whose backward is quick on a processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.compiler.config as compiled
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def quick_backward(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Let torch write scores [B, K, N, M] out where that trains faster: in bfloat16 on a processor; elsewhere change nothing.

    Training through the fused kernel takes five times as long for 16 keys, and as long for 1024 (`python -m benchmarks.attention`).
    The choice is torch's own, so all that listens to its attention still does.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # of every device, despite its name
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        # What torch has compiled with the fused kernel, and keeps on disk, looks the same to it: the tag tells them apart.
        with sdpa_kernel(SDPBackend.MATH), compiled.patch(cache_key_tag="attention written out"):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
