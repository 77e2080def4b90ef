"""What an adapter that adds to the picture's stream must know of a transformer: its width, its embedding, its conditioning.

Far less than `control._backbones` tells: nothing here looks into a block, so any mixer, experts and router will do.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from control._backbones import KNOWN as FACTS
from control._backbones import Facts
from control.base import Refused
from dit.embeddings import sincos_2d
from dit.grid import Grid
from dit.seams import blocks_of

Sides = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Shape:
    """What the weights of such an adapter depend on.

    Attributes:
        width: channels D of the picture's stream. depth: count of blocks.
        conditioning: channels of what modulates the blocks.
        vectors: whether that is six vectors of D, made once for all blocks (adaLN-single), or an embedding.
    """

    width: int
    depth: int
    conditioning: int
    vectors: bool


class Trunk(ABC):
    """The facts of one family. `argument` is what its blocks call their conditioning, [B, S] or [B, N, S]."""

    argument = "temb"

    def shape(self, transformer: Any) -> Shape:
        """Return the sizes that matter."""
        width = self.width(transformer)
        conditioning = self.conditioning(transformer)
        return Shape(width, len(blocks_of(transformer)), conditioning, conditioning == 6 * width)

    def sides(self, transformer: Any, given: Mapping[str, Any]) -> Sides:
        """Return rows and columns of the latents in a call, in latent pixels."""
        picture = given["hidden_states"]
        if picture.dim() != 4:
            raise Refused(f"it steers pictures [B, C, H, W], and this call has {tuple(picture.shape)}")
        return int(picture.shape[2]), int(picture.shape[3])

    @abstractmethod
    def width(self, transformer: Any) -> int:
        """Return the channels of the picture's stream."""

    def conditioning(self, transformer: Any) -> int:
        """Return the channels of what modulates the blocks."""
        return self.width(transformer)

    @abstractmethod
    def channels(self, transformer: Any) -> int:
        """Return the channels of a latent (or picture)."""

    @abstractmethod
    def patch(self, transformer: Any) -> int:
        """Return the side of a token in latent pixels."""

    @abstractmethod
    def tokens(self, transformer: Any, latent: Tensor) -> Tensor:
        """[B, C, H, W] of the picture's size -> tokens [B, N, D], as the transformer embeds its picture."""


class FactsTrunk(Trunk):
    """A family that `control._backbones` knows already."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    def sides(self, transformer: Any, given: Mapping[str, Any]) -> Sides:
        if "img_ids" not in given:
            return super().sides(transformer, given)
        rows, columns = self.facts.grid(transformer, given)
        patch = self.patch(transformer)
        return rows * patch, columns * patch

    def width(self, transformer: Any) -> int:
        config = transformer.config
        own = config.get("width")
        return int(own or config.num_attention_heads * config.attention_head_dim)

    def conditioning(self, transformer: Any) -> int:
        return _shared(transformer, self.width(transformer))

    def channels(self, transformer: Any) -> int:
        return self.facts.channels(transformer)

    def patch(self, transformer: Any) -> int:
        return self.facts.patch(transformer)

    def tokens(self, transformer: Any, latent: Tensor) -> Tensor:
        patch = self.patch(transformer)
        grid = Grid(1, latent.shape[2] // patch, latent.shape[3] // patch)
        where = grid.positions(latent.device).float()
        return self.facts.embed(transformer, latent, where, (grid.height, grid.width))


class DiTTrunk(Trunk):
    """Our DiT: pictures of a class."""

    def width(self, transformer: Any) -> int:
        return int(transformer.config.width)

    def conditioning(self, transformer: Any) -> int:
        return _shared(transformer, self.width(transformer))

    def channels(self, transformer: Any) -> int:
        return int(transformer.config.in_channels)

    def patch(self, transformer: Any) -> int:
        return int(transformer.config.patch_size)

    def tokens(self, transformer: Any, latent: Tensor) -> Tensor:
        grid = Grid.of(latent, transformer.x_embedder.patch)
        tokens: Tensor = transformer.x_embedder(latent)
        return tokens + sincos_2d(self.width(transformer), grid, latent.device).to(tokens.dtype)


class PixArtTrunk(Trunk):
    """diffusers' PixArt: six vectors for all blocks, which these call timestep."""

    argument = "timestep"

    def width(self, transformer: Any) -> int:
        return int(transformer.config.num_attention_heads * transformer.config.attention_head_dim)

    def conditioning(self, transformer: Any) -> int:
        return 6 * self.width(transformer)

    def channels(self, transformer: Any) -> int:
        return int(transformer.config.in_channels)

    def patch(self, transformer: Any) -> int:
        return int(transformer.config.patch_size)

    def tokens(self, transformer: Any, latent: Tensor) -> Tensor:
        found: Tensor = transformer.pos_embed(latent)
        return found


KNOWN: dict[str, Trunk] = {name: FactsTrunk(facts) for name, facts in FACTS.items()} | {
    "DiT": DiTTrunk(),
    "PixArtTransformer2DModel": PixArtTrunk(),
}
_REFUSED = {
    "DiG": "its blocks hand on the tokens in other orders than the picture's, where a residual would fall on other places"
}


def trunk_of(transformer: nn.Module) -> Trunk | str:
    """Return the facts of a transformer's family, or in words why there are none."""
    if hasattr(transformer, "_orig_mod"):
        return "it is compiled as a whole, and a compiled graph cannot be steered: compile_repeated_blocks() after"
    for cls in type(transformer).__mro__:
        if cls.__name__ in _REFUSED:
            return _REFUSED[cls.__name__]
        found = KNOWN.get(cls.__name__)
        if found is not None:
            return blocks_of(transformer).reason or found
    return f"{type(transformer).__name__} is not known here; known are {', '.join(KNOWN)}"


def refuses_condition(trunk: Trunk, transformer: nn.Module, condition: Any) -> str | None:
    """Return in words why this is no condition in the transformer's latents, or None."""
    channels = trunk.channels(transformer)
    if not isinstance(condition, Tensor) or condition.dim() != 4 or condition.shape[1] != channels:
        got = f"shape {tuple(condition.shape)}" if isinstance(condition, Tensor) else type(condition).__name__
        return f"condition must be a tensor [B, {channels}, H, W], got {got}"
    if not condition.numel():
        return f"condition is empty: {tuple(condition.shape)}"
    if not bool(torch.isfinite(condition).all()):
        return "condition holds values that are no finite numbers"
    return None


def fitted_to(latent: Tensor, sides: Sides) -> Tensor:
    """Return a condition [B, C, H, W] at the size of the picture's latents; stretched where it has another."""
    if tuple(latent.shape[2:]) == sides:
        return latent
    smaller = math.prod(sides) < latent.shape[2] * latent.shape[3]
    found = F.interpolate(latent.float(), size=sides, mode="bilinear", antialias=smaller)
    return found.to(latent.dtype)


def repeated(x: Tensor, batch: int, owner: str) -> Tensor:
    """Repeat samples [b, ...] to a batch: one for all, or as many as pictures in each guidance branch. Raises: Refused."""
    if batch % len(x):
        raise Refused(
            f"{owner}: {len(x)} conditions for a batch of {batch}; give one for all, or as many as pictures"
        )
    return x if len(x) == batch else x.repeat(batch // len(x), *(1,) * (x.dim() - 1))


def _shared(transformer: Any, width: int) -> int:
    """Six vectors of D where the network makes them once for all blocks, or else an embedding of D."""
    return width if getattr(transformer, "modulation_shared", None) is None else 6 * width
