"""A condition of a picture with an instruction, and guidance towards it and towards the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from control.base import Refused


@dataclass(frozen=True, slots=True, eq=False)
class Instructed:
    """The condition of a use: a picture and what is to be made of it.

    Attributes:
        image: [B, C, H, W] as the transformer's own encoder makes it. text: tokens of the instruction [B, L, J].
        pooled: pooled instruction [B, P]; None: zeros.
    """

    image: Tensor
    text: Tensor
    pooled: Tensor | None = None

    @property
    def samples(self) -> int:
        """How many conditions it holds."""
        return max(len(one) for one in (self.image, self.text, self.pooled) if one is not None)

    def places(self, grid: tuple[int, int], patch: int, device: torch.device) -> Tensor:
        """Return where its tokens stand on a picture of `grid` tokens, first on first: [N, 3] (frame, row, column)."""
        rows, columns = (
            torch.arange(count // patch, dtype=torch.float32, device=device) * (over / (count // patch))
            for count, over in zip(self.image.shape[2:], grid, strict=True)
        )
        return torch.cartesian_prod(torch.zeros(1, device=device), rows, columns)

    def misfit(self, channels: int, words: int, pooled: int, *, patch: int) -> str | None:
        """Return in words why it does not fit channels of latents, text tokens and pooled text, or None."""
        parts = {"image": (self.image, (channels, None, None)), "text": (self.text, (None, words))}
        if self.pooled is not None:
            parts["pooled"] = (self.pooled, (pooled,))
        reason = next((told for name, part in parts.items() if (told := misfit(name, *part))), None)
        if reason is not None:
            return reason
        if self.image.shape[2] % patch or self.image.shape[3] % patch:
            return f"image must have sides that divide by {patch}, got {tuple(self.image.shape[2:])}"
        counts = {name: len(x) for name, (x, _) in parts.items()}
        several = len(set(counts.values()) - {1}) > 1
        return (
            f"image, text and pooled must be of one batch, or of one sample: got {counts}"
            if several
            else None
        )


@dataclass(frozen=True, slots=True)
class ThreeWay:
    """Guidance in two directions: towards picture and instruction, and from there towards the prompt.

    v = u + image_instruction (n - u) + prompt (f - n), of the calls u without either, n with picture and instruction but the
    negative prompt, f with everything. Calls that have no weight in it are not made.
    """

    image_instruction: float = 1.3
    prompt: float = 3.0

    @property
    def weights(self) -> dict[str, float]:
        """What each call counts: unconditional, instructed, full."""
        return {
            "unconditional": 1 - self.image_instruction,
            "instructed": self.image_instruction - self.prompt,
            "full": self.prompt,
        }

    @property
    def calls(self) -> tuple[str, ...]:
        """The calls that must be made, in the order of a batch."""
        return tuple(name for name, weight in self.weights.items() if weight)

    def stack(self, unconditional: Tensor, instructed: Tensor, full: Tensor) -> Tensor:
        """Put the inputs of the calls, each [B, ...], into one batch."""
        given = {"unconditional": unconditional, "instructed": instructed, "full": full}
        return torch.cat([given[name] for name in self.calls])

    def prompts(self, negative: Tensor, prompt: Tensor) -> Tensor:
        """Return the batch of prompts, or of what belongs to them, from those of B samples."""
        return self.stack(negative, negative, prompt)

    def conditions(self, nothing: Tensor, instructed: Tensor) -> Tensor:
        """Return the batch of condition pictures, or of what belongs to them, from those of B samples."""
        return self.stack(nothing, instructed, instructed)

    def combined(self, found: Tensor) -> Tensor:
        """[n B, ...], what a batch of the calls gave -> [B, ...]."""
        by_name = dict(zip(self.calls, found.chunk(len(self.calls)), strict=True))
        if len(by_name) < 3:
            terms = [weight * by_name[name] for name, weight in self.weights.items() if weight]
            return torch.stack(terms).sum(dim=0) if len(terms) > 1 else terms[0]
        return self.mixed(*(by_name[name] for name in self.weights))

    def mixed(self, unconditional: Tensor, instructed: Tensor, full: Tensor) -> Tensor:
        """Return what comes of all three calls."""
        towards = unconditional + self.image_instruction * (instructed - unconditional)
        return towards + self.prompt * (full - instructed)


def misfit(name: str, x: Any, shape: tuple[int | None, ...]) -> str | None:
    """Say in words why x is not a finite tensor of B samples of `shape`, or None."""
    told = ", ".join(["B", *("any" if size is None else str(size) for size in shape)])
    if not isinstance(x, Tensor):
        return f"{name} must be a tensor [{told}], got {type(x).__name__}"
    fits = x.dim() == 1 + len(shape) and all(
        size in (None, had) for size, had in zip(shape, x.shape[1:], strict=False)
    )
    if not fits or not x.numel():
        return f"{name} must be a tensor [{told}], got shape {tuple(x.shape)}"
    return None if bool(torch.isfinite(x).all()) else f"{name} holds values that are no finite numbers"


def repeated(x: Tensor, batch: int, name: str) -> Tensor:
    """One condition for all samples, or as many as samples of each guidance branch."""
    if batch % len(x):
        raise Refused(
            f"{name}: {len(x)} conditions for a batch of {batch}; give one for all, or as many as pictures"
        )
    return x.repeat(batch // len(x), *(1,) * (x.dim() - 1))
