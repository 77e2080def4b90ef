"""Every kernel against the plain reference; the search against brute force."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from acceleration._attending import valid_keys
from acceleration._sparse import (
    Bits,
    block_mass,
    index_lists,
    sampled_recall,
    sparse_attention,
    sparse_attention_reference,
    tiles,
    tokenwise,
)
from acceleration._sparse_flex import flex_sparse_attention

SHAPES = [(70, 70, 8, 16, 8), (128, 128, 40, 32, 16), (65, 70, 72, 64, 32), (40, 40, 80, 128, 64)]


def case(N: int, M: int, D: int, rows: int, block: int, **about: Any) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(N + D)
    q, k, v = (torch.randn(2, 3, length, D, generator=draw) for length in (N, M, M))
    kept = torch.rand(2, 3, tiles(N, rows), tiles(M, block), generator=draw) < 0.5
    kept[..., 0] = True  # every query hears something
    kept[:, 0, 0] = True
    q, k, v = (x.to(**about) for x in (q, k, v))
    return q, k, v, kept.to(q.device)


def padding(M: int) -> Tensor:
    keys = torch.ones(2, M, dtype=torch.bool)
    keys[0, -M // 6 :] = False
    keys[1, 3:6] = False
    return keys


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_gathered_and_flex_equal_the_reference(shape: tuple[int, ...], padded: bool) -> None:
    _, M, _, rows, block = shape
    q, k, v, kept = case(*shape)
    keys = padding(M) if padded else None
    expected = sparse_attention_reference(q, k, v, kept, rows, block, keys=keys)
    gathered = sparse_attention(q, k, v, kept, rows, block, keys=keys, kernel="gathered")
    assert torch.allclose(gathered, expected, atol=1e-5)
    flex = flex_sparse_attention(q, k, v, kept, rows, block, keys=keys, compiled=False)
    assert torch.allclose(flex, expected, atol=1e-5)


@pytest.mark.slow
def test_compiled_flex_equals_the_reference() -> None:
    if not any(os.access(os.path.join(place, "g++"), os.X_OK) for place in os.get_exec_path()):
        pytest.skip("torch.compile needs a C++ compiler here")
    q, k, v, _ = case(500, 500, 32, 128, 64)
    for density in (0.3, 0.7):
        kept = torch.rand(2, 3, 4, 8, generator=torch.Generator().manual_seed(1)) < density
        kept[..., -1] = True
        for keys in (None, padding(500)):
            found = flex_sparse_attention(q, k, v, kept, 128, 64, keys=keys)
            assert torch.allclose(
                found, sparse_attention_reference(q, k, v, kept, 128, 64, keys=keys), atol=1e-5
            )


def test_all_tiles_are_plain_attention_and_scale_and_grouped_heads_count() -> None:
    q, k, v, kept = case(*SHAPES[0])
    everything = torch.ones_like(kept)
    for scale in (None, 0.3):
        found = sparse_attention(q, k, v, everything, 16, 8, scale=scale)
        assert torch.allclose(found, F.scaled_dot_product_attention(q, k, v, scale=scale), atol=1e-5)
    grouped = sparse_attention(q, k[:, :1], v[:, :1], everything, 16, 8)
    assert torch.allclose(
        grouped, F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True), atol=1e-5
    )


def test_strided_inputs_and_half_precision() -> None:
    q, k, v, kept = case(*SHAPES[1])
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(sparse_attention(*apart, kept, 32, 16), sparse_attention(q, k, v, kept, 32, 16))  # type: ignore[arg-type]
    half = [x.bfloat16() for x in (q, k, v)]
    expected = sparse_attention_reference(*half, kept, 32, 16)  # type: ignore[arg-type]
    assert torch.allclose(sparse_attention(*half, kept, 32, 16), expected, atol=2e-2)  # type: ignore[arg-type]


def test_wrong_masks_and_kernels_are_refused_in_words() -> None:
    q, k, v, kept = case(*SHAPES[0])
    with pytest.raises(ValueError, match=r"kept must be \(2, 3, 5, 9\) for tiles of 16 x 8"):
        sparse_attention(q, k, v, kept[..., 1:], 16, 8)
    with pytest.raises(ValueError, match="kernel must be auto or one of reference, gathered, flex, triton"):
        sparse_attention(q, k, v, kept, 16, 8, kernel="fast")


def brute_force(q: Tensor, k: Tensor, keys: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if keys is not None:
        scores = scores.masked_fill(~keys[:, None, None], -torch.inf)
    return torch.softmax(scores, -1)


@pytest.mark.parametrize("padded", [False, True])
def test_mass_and_recall_equal_brute_force(padded: bool) -> None:
    N, M, _, rows, block = SHAPES[0]
    q, k, _, kept = case(*SHAPES[0])
    keys = padding(M) if padded else None
    weights = brute_force(q, k, keys)
    mass, lse = block_mass(q, k, rows, block, keys=keys)
    full = F.pad(weights, (0, -M % block, 0, -N % rows))
    expected = full.unflatten(2, (-1, rows)).unflatten(4, (-1, block)).sum((3, 5))
    assert torch.allclose(mass, expected, atol=1e-5)
    again, same = block_mass(q, k, rows, block, keys=keys, lse=lse)
    assert same is lse
    assert torch.allclose(again, mass)
    heard = tokenwise(kept, rows, block, N, M)
    truth = (weights * heard).sum((-1, -2)) / weights.sum((-1, -2))
    assert torch.allclose(sampled_recall(q, k, kept, rows, block, keys=keys, samples=N), truth, atol=1e-5)


def test_bits_and_lists_hold_the_mask() -> None:
    for width in (1, 8, 13):
        kept = torch.rand(2, 3, 4, width, generator=torch.Generator().manual_seed(width)) < 0.5
        bits = Bits.of(kept)
        assert torch.equal(bits.tiles(), kept)
        assert bits.bytes == 24 * -(-width // 8)
        counts, lists = index_lists(kept)
        assert lists.shape == kept.shape
        for row, count, places in zip(
            kept.view(-1, width), counts.flatten(), lists.view(-1, width), strict=True
        ):
            assert places[:count].tolist() == row.nonzero().flatten().tolist()


def test_masks_become_valid_keys_or_a_reason() -> None:
    keys = torch.tensor([[True, True, False], [True, False, False]])
    for mask in (
        keys[:, None, None],
        keys[:, None, None].expand(2, 4, 5, 3),
        keys[:, None, None].repeat(1, 1, 5, 1),
    ):
        found = valid_keys(mask, 2, 3)
        assert isinstance(found, Tensor)
        assert torch.equal(found, keys)
    assert valid_keys(torch.ones(2, 1, 1, 3, dtype=torch.bool), 2, 3) is None
    assert "additive" in str(valid_keys(torch.zeros(2, 1, 1, 3), 2, 3))
    assert "query to query" in str(valid_keys(torch.ones(5, 3, dtype=torch.bool).tril(), 2, 3))
    assert "without keys" in str(valid_keys(torch.zeros(2, 1, 1, 3, dtype=torch.bool), 2, 3))


_INTERPRETED = """
import torch
from acceleration._sparse import _block_mass, sparse_attention_reference, tiles
from acceleration._sparse_triton import triton_attention, triton_block_mass
torch.manual_seed(0)
full, half = torch.float32, torch.float16
cases = [(70, 70, 40, 16, 16, full), (100, 130, 72, 64, 32, full), (64, 64, 80, 32, 16, half)]
for N, M, D, rows, block, dtype in cases:
    q = torch.randn(2, N, 3, D, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(2, 3, M, D, dtype=dtype) for _ in range(2))
    kept = torch.rand(2, 3, tiles(N, rows), tiles(M, block)) < 0.5
    kept[0, 0, 0] = False
    keys = torch.ones(2, M, dtype=torch.bool)
    keys[0, -37:], keys[1, 3:6] = False, False
    for valid in (None, keys):
        expected = sparse_attention_reference(q, k, v, kept, rows, block, keys=valid)
        out, _ = triton_attention(q, k, v, kept, rows, block, keys=valid)
        assert torch.allclose(out, expected, atol=1e-5 if dtype == full else 5e-3), (N, D)
        mass, lse = triton_block_mass(q, k, rows, block, keys=valid)
        plain, sums = _block_mass(q, k, rows, block, valid, D**-0.5, None)
        assert torch.allclose(mass, plain, atol=1e-4) and torch.allclose(lse, sums, atol=1e-4)
"""


@pytest.mark.slow
def test_triton_kernels_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [40, 64, 72, 80, 128])
@pytest.mark.parametrize(("rows", "block"), [(64, 64), (128, 64), (128, 128)])
@pytest.mark.parametrize("kernel", ["triton", "flex"])
def test_gpu_kernels_equal_the_reference(
    kernel: str, rows: int, block: int, size: int, dtype: torch.dtype
) -> None:
    q, k, v, kept = case(1000, 1000, size, rows, block, device="cuda", dtype=dtype)
    for keys in (None, padding(1000).cuda()):
        expected = sparse_attention_reference(q, k, v, kept, rows, block, keys=keys)
        found = sparse_attention(q, k, v, kept, rows, block, keys=keys, kernel=kernel)
        assert torch.allclose(found.float(), expected.float(), atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [40, 64, 128])
def test_gpu_search_equals_the_plain_one(size: int) -> None:
    q, k, _, _ = case(1000, 1000, size, 128, 64, device="cuda", dtype=torch.bfloat16)
    for keys in (None, padding(1000).cuda()):
        mass, lse = block_mass(q, k, 128, 64, keys=keys)
        plain, sums = block_mass(
            q.float().cpu(), k.float().cpu(), 128, 64, keys=None if keys is None else keys.cpu()
        )
        assert torch.allclose(mass.cpu(), plain, atol=2e-2, rtol=2e-2)
        assert torch.allclose(lse.cpu(), sums, atol=1e-2)
