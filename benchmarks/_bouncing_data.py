"""A grey ball between elastic walls, drawn exactly: where it is in every frame, and behind what.

Paper: VDT, Lu et al. 2023, arXiv:2305.13311 (tasks on simple moving scenes).
Differs: half of the clips have an upright bar in front of the ball, so that what is seen again must have been remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE, FRAMES, RADIUS = 16, 16, 2.0
"""Pixels of a side, frames of a clip, and the ball's radius in px."""
SLOW, FAST = 0.5, 1.5
"""Pixels a frame."""
BAR = 2.75
"""Half the bar's width in px: more than the radius, so that the ball is hidden whole."""
GROUND, GREY, WHITE = -1.0, 0.0, 1.0
BRIGHT, SMALLEST = 0.4, 3.0
"""From which value a pixel counts as the ball (the bar is darker), and of how much brightness, in pixels, a ball is made."""


@dataclass(frozen=True, slots=True)
class Balls:
    """Clips [B, 1, F, 16, 16] in -1..1; centres in px (x, y), [B, F, 2]; shares of the ball in view, [B, F]; who has a bar, [B]."""

    clips: Tensor
    centres: Tensor
    visible: Tensor
    barred: Tensor

    def only(self, which: Tensor) -> Balls:
        """Return the clips at places or where a mask [B] is true."""
        return Balls(self.clips[which], self.centres[which], self.visible[which], self.barred[which])

    @classmethod
    def joined(cls, parts: Sequence[Balls]) -> Balls:
        """Return the clips of all parts, in their order."""
        return cls(*(torch.cat([getattr(one, name) for one in parts]) for name in cls.__slots__))

    def __len__(self) -> int:
        return len(self.clips)


def throw(count: int, dice: torch.Generator) -> Balls:
    """Draw `count` clips: start, direction and speed by chance, and a bar in every second one by chance."""
    low, high = RADIUS, SIDE - RADIUS
    start = low + (high - low) * torch.rand(count, 2, generator=dice)
    angle = 2 * torch.pi * torch.rand(count, generator=dice)
    speed = SLOW + (FAST - SLOW) * torch.rand(count, generator=dice)
    velocity = torch.stack([angle.cos(), angle.sin()], -1) * speed[:, None]
    time = torch.arange(FRAMES)[:, None]
    centres = folded(start[:, None] + velocity[:, None] * time, low, high)  # [B, F, 2]
    barred = torch.rand(count, generator=dice) < 0.5
    middle = SIDE / 2 + 2 * (torch.rand(count, generator=dice) - 0.5)
    at = torch.arange(SIDE) + 0.5
    x, y = at - centres[..., 0, None], at - centres[..., 1, None]  # [B, F, 16]
    ball = (0.5 + RADIUS - (x[..., None, :] ** 2 + y[..., :, None] ** 2).sqrt()).clamp(0, 1)  # [B, F, 16, 16]
    bar = (0.5 + BAR - (at - middle[:, None]).abs()).clamp(0, 1) * barred[:, None]  # [B, 16]
    bar = bar[:, None, None]
    clips = GROUND + ball * (WHITE - GROUND)
    clips = clips + bar * (GREY - clips)
    visible = (ball * (1 - bar)).sum((2, 3)) / ball.sum((2, 3))
    return Balls(clips[:, None], centres, visible, barred)


def folded(x: Tensor, low: float, high: float) -> Tensor:
    """Reflect a straight way at two walls."""
    width = high - low
    turned = (x - low).remainder(2 * width)
    return low + torch.minimum(turned, 2 * width - turned)


def found(clips: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the ball is seen in clips [B, 1, F, 16, 16]: centres [B, F, 2] in px, and in which frames it is, [B, F]."""
    light = (clips[:, 0] - BRIGHT).clamp(0, 1 - BRIGHT) / (1 - BRIGHT)  # [B, F, 16, 16]
    weight = light.sum((2, 3))
    at = torch.arange(SIDE) + 0.5
    x = (light.sum(2) * at).sum(-1) / weight.clamp_min(1e-6)
    y = (light.sum(3) * at).sum(-1) / weight.clamp_min(1e-6)
    return torch.stack([x, y], -1), weight >= SMALLEST


def errors(clips: Tensor, truth: Balls, missing: float = SIDE / 2) -> Tensor:
    """Return the distance in px of the ball from its true place, [B, F]; `missing`, the most, where it is not seen."""
    centres, seen = found(clips)
    distance = (centres - truth.centres).norm(dim=-1).clamp_max(missing)
    return torch.where(seen, distance, missing)


def straight_on(truth: Balls, given: int, *, walls: bool = False) -> Tensor:
    """Return centres [B, F, 2] that go on from the last two of `given` frames at the same speed, and with `walls` turn at them."""
    centres = truth.centres
    velocity = centres[:, given - 1] - centres[:, given - 2]
    ahead = (torch.arange(FRAMES) - (given - 1)).clamp_min(0)[:, None]
    line = centres[:, given - 1, None] + velocity[:, None] * ahead
    line = folded(line, RADIUS, SIDE - RADIUS) if walls else line
    return torch.where(torch.arange(FRAMES)[:, None] < given, centres, line)


def turns(truth: Balls, given: int) -> Tensor:
    """Return which balls turn back at a wall after the given frames, [B]."""
    speeds = truth.centres.diff(dim=1)[:, given - 1 :].sign()
    return (speeds.amax(1) > speeds.amin(1)).any(-1)


def passes(truth: Balls, given: int = 4) -> Tensor:
    """Return in which clips the ball is seen in the first `given` frames, hidden after that, and seen again at the end, [B]."""
    early = truth.visible[:, :given].amin(1) > 0.8
    hidden = (truth.visible[:, given:] < 0.1).any(1)
    return truth.barred & early & hidden & (truth.visible[:, -2:].amin(1) > 0.9)


def first_hidden(one: Balls) -> int:
    """Return the first frame in which the ball of the only clip is behind the bar."""
    return int((one.visible[0] < 0.1).int().argmax())
