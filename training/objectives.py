"""What a network is asked to learn: flow matching in diffusers' direction (time 1 is noise, velocity = noise - picture).

Paper: Flow Matching, Lipman et al. 2022, arXiv:2210.02747; Scaling Rectified Flow Transformers, Esser et al. 2024,
arXiv:2403.03206 (logit-normal times); Back to Basics, Li and He 2025, arXiv:2511.13720 (velocity loss on a predicted picture);
LiT, Wang et al. 2025, arXiv:2501.12976 (hybrid distillation); Stable Target Field, Xu, Tong and Jaakkola 2023,
arXiv:2302.00670 (a target of several pictures).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dit.clip_masks import blend, masked_mean

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(noisy [B, C, H, W], time [B] in 0..1) -> velocity [B, C, H, W]."""


@dataclass(frozen=True, slots=True)
class FlowMatching:
    """Times are logit-normal (`mean` above 0 leans to noise); the weight is held below noise level `floor`."""

    mean: float = 0.0
    std: float = 1.0
    floor: float = 0.05

    def times(self, count: int, dice: torch.Generator) -> Tensor:
        """Draw `count` times in 0..1."""
        return torch.sigmoid(torch.randn(count, generator=dice) * self.std + self.mean)

    def losses(
        self,
        denoiser: Denoiser,
        pictures: Tensor,
        noise: Tensor,
        times: Tensor,
        mask: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted squared velocity error of each sample of pictures [B, C, H, W] or clips [B, C, F, H, W], [B].

        With a mask as in `dit.clip_masks.batch_mask` the network sees the given sites as they are, and only the others count.
        `target` stands for the pictures in what is to be learnt, not in what the network sees (`stable_target`).
        """
        level = times.reshape(-1, *[1] * (pictures.dim() - 1)).to(pictures.dtype)
        noisy = (1 - level) * pictures + level * noise
        wanted = noise - pictures
        if target is not None:
            wanted = wanted + (pictures - target) / level
        if mask is not None:
            noisy = blend(pictures, noisy, mask)
        error = (denoiser(noisy, times).float() - wanted.float()).square()
        each = error.mean(dim=tuple(range(1, error.dim()))) if mask is None else masked_mean(error, mask)
        return each * self.weights(times)

    def weights(self, times: Tensor) -> Tensor:
        """Return the weight of each sample by its time [B]."""
        return (times / times.clamp_min(self.floor)) ** 2


def stable_target(noisy: Tensor, time: float, candidates: Tensor) -> Tensor:
    """Return the mean of what may have given a noisy sample, each weighted by how probable it makes that: a calmer target.

    Under much noise the sample itself says little of where it came from, so that learning from it alone is learning from chance.

    Args:
        noisy: the sample, [C, ...]. time: its noise level, above 0. candidates: the picture behind it and others that
            could stand there as well, drawn for the same prompt, [n, C, ...].
    """
    apart = (noisy - (1 - time) * candidates).double().square().flatten(1).sum(1)
    chances = torch.softmax(-apart / (2 * time * time), 0)
    return torch.einsum("n,n...->...", chances.to(candidates.dtype), candidates)


def hybrid(
    student: Tensor, teacher: Tensor, channels: int, *, noise: float = 0.5, variance: float = 0.05
) -> Tensor:
    """Return the hybrid distillation loss of LiT for each sample, [B], to be added to the loss on the data.

    Args:
        student, teacher: predictions [B, C, H, W], or [B, 2 C, H, W] where the second C are a learned variance.
        channels: C. noise, variance: weights of the two halves; without a learned variance (flow matching) there is one half.
    """
    errors = (student.float() - teacher.float()).square()
    loss = noise * errors[:, :channels].mean(dim=(1, 2, 3))
    if student.shape[1] > channels:
        loss = loss + variance * errors[:, channels:].mean(dim=(1, 2, 3))
    return loss


@torch.no_grad()
def euler(denoiser: Denoiser, noise: Tensor, steps: int, *, shift: float = 1.0) -> Tensor:
    """Walk from noise [B, C, H, W] to pictures in `steps` steps: for sample sheets while training.

    Steps are even with `shift` 1; above 1, more of them lie near noise, as in the flow schedulers of diffusers.
    """
    x = noise
    times = torch.linspace(1, 0, steps + 1)
    times = shift * times / (1 + (shift - 1) * times)
    for now, then in pairwise(times):
        x = x + (then - now) * denoiser(x, now.expand(len(x)).to(x.device))
    return x
