"""Fit the convolutions of a linear student to its teacher's softmax, in closed form, before any training.

A block's student hears what its teacher's block hears; what the sums over all tokens lack of the teacher's answer is
explained, channel by channel, by the values around each token. That is a least-squares problem of kernel^2 + 1 unknowns.

Paper: none. LiT (Wang et al. 2025, arXiv:2501.12976) learns the convolution from a random start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dit.attention import Attention
from dit.mixers.linear import LinearMixer
from dit.model import Context
from dit.seams import patched

RIDGE = 1e-3
"""Added to the diagonal of the equations, as a share of its mean: few pictures must not make wild kernels."""


@torch.no_grad()
def fit_convolutions(
    student: nn.Module, teacher: nn.Module, passes: Iterable[Callable[[], object]]
) -> dict[str, float]:
    """Set the convolutions of the student's linear mixers; return what share of the missing answer each explains, by path.

    Args:
        student: a network made by `inherit` that took queries, keys, values and output maps over from its teacher.
        teacher: the same network with softmax attention, in evaluation.
        passes: each runs the teacher once, on some noisy pictures.

    Raises:
        ValueError: a student without linear mixers that have a convolution, or a teacher of another form.
    """
    pairs = {
        path: (one, _counterpart(teacher, path))
        for path, one in student.named_modules()
        if isinstance(one, LinearMixer) and one.conv is not None
    }
    if not pairs:
        raise ValueError("fit: the student has no linear mixer with a convolution")
    sums = {path: _Sums(one) for path, (one, _) in pairs.items()}
    with ExitStack() as stack:
        for path, (ours, theirs) in pairs.items():
            stack.enter_context(_watched(theirs, ours, sums[path]))
        for one in passes:
            one()
    return {path: one.solve() for path, one in sums.items()}


class _Sums:
    """The normal equations of one mixer's convolution: for every channel, its values around a token and a constant."""

    def __init__(self, mixer: LinearMixer) -> None:
        assert mixer.conv is not None
        self.mixer, self.conv = mixer, mixer.conv
        size = mixer.kernel**2 + 1
        self.products = torch.zeros(mixer.inner_dim, size, size, dtype=torch.float64)
        self.wanted = torch.zeros(mixer.inner_dim, size, dtype=torch.float64)
        self.whole = 0.0

    def add(self, missing: Tensor, values: Tensor, context: Context) -> None:
        """Take in what is missing [B, N, D] where the values [B, N, D] lie on the context's grid."""
        grid = context.grid
        assert grid is not None
        side, (batch, _, width) = self.mixer.kernel, values.shape
        pictures = values.float().transpose(1, 2).reshape(batch * width, grid.frames, grid.height, grid.width)
        around = nn.functional.unfold(
            pictures.flatten(0, 1).unsqueeze(1), side, padding=side // 2
        )  # [B * D * F, k * k, H * W]
        around = around.unflatten(0, (batch, width, grid.frames)).permute(1, 3, 0, 2, 4).flatten(2)
        rows = torch.cat([around, torch.ones_like(around[:, :1])], dim=1)  # [D, k * k + 1, B * N]
        answers = missing.float().permute(2, 0, 1).flatten(1)  # [D, B * N]
        self.products += (rows @ rows.mT).double().cpu()
        self.wanted += (rows @ answers.unsqueeze(2)).squeeze(2).double().cpu()
        self.whole += float(answers.square().sum())

    def solve(self) -> float:
        """Set the convolution, and return the share of the squares that it explains."""
        size = self.products.shape[-1]
        ridge = RIDGE * self.products.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(size)
        found = torch.linalg.solve(self.products + ridge, self.wanted)
        self.conv.weight.copy_(found[:, :-1].reshape(self.conv.weight.shape))
        assert self.conv.bias is not None
        self.conv.bias.copy_(found[:, -1])
        left = self.whole - 2 * float((found * self.wanted).sum())
        left += float(torch.einsum("di,dij,dj->", found, self.products, found))
        return 1 - left / max(self.whole, 1e-30)


@contextmanager
def _watched(theirs: Attention, ours: LinearMixer, sums: _Sums) -> Iterator[None]:
    """Inside, every call of the teacher's mixer is made by the student's too, and what it lacks is taken in."""
    inside: list[Tensor] = []
    out = theirs.project_out

    def seen(x: Tensor, keep: Tensor | None = None, *, added: bool = False) -> Tensor:
        if not added:
            inside.append(x)
        return out(x, keep, added=added)

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        context = kwargs.get("context")
        if not isinstance(context, Context) or context.grid is None or len(inside) != 1:
            raise ValueError("fit: the teacher's attention does not say where its tokens lie")
        count = context.grid.tokens
        wanted, hidden = inside.pop()[:, -count:], kwargs["hidden_states"]
        values = ours.project(hidden)[2].flatten(2)[:, -count:]
        plain: list[Tensor] = []

        def kept(x: Tensor, *_: Any, **__: Any) -> Tensor:
            plain.append(x)
            return x

        with patched(ours, "project_out", kept), patched(ours, "local", lambda *_: None):
            ours(*args, **kwargs)
        sums.add(wanted - plain[0][:, -count:], values, context)

    handle = theirs.register_forward_hook(after, with_kwargs=True)
    try:
        with patched(theirs, "project_out", seen):
            yield
    finally:
        handle.remove()


def _counterpart(teacher: nn.Module, path: str) -> Attention:
    try:
        found = teacher.get_submodule(path)
    except AttributeError:
        found = None
    if not isinstance(found, Attention) or isinstance(found, LinearMixer):
        raise ValueError(f"fit: the teacher has no softmax attention at {path}")
    return found
