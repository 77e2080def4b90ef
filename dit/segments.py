"""Which text tokens belong to which picture tokens: captions and scenes as lengths, never as a mask of all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor

from dit.grid import Grid


@dataclass(frozen=True, slots=True)
class Segments:
    """A joint sequence of captions and scenes: all captions one after another, then all scenes, in the same order.

    Attributes:
        text: tokens of each caption, 0 for a scene without one.
        video: tokens of each scene.
    """

    text: tuple[int, ...]
    video: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.text) != len(self.video) or not self.video:
            raise ValueError(
                f"every scene has one caption: got {len(self.text)} captions and {len(self.video)} scenes"
            )
        if min(self.text) < 0 or min(self.video) < 1:
            raise ValueError(
                f"captions have at least 0 tokens and scenes at least 1, got {self.text} and {self.video}"
            )

    @classmethod
    def of(
        cls,
        grid: Grid,
        text: int,
        caption: int = 0,
        *,
        texts: Sequence[int] | None = None,
        frames: Sequence[int] | None = None,
    ) -> Self:
        """Return the segments of a clip of `grid` with `text` text tokens.

        Args:
            caption: tokens of every caption where `texts` does not tell; a text no longer than that, or 0, is one caption.
            texts: tokens of each caption. frames: frames of each scene, in tokens; without them scenes are equally long.

        Raises: ValueError for captions or scenes that do not add up, with the numbers.
        """
        if texts is None:
            count = max(1, text // caption) if caption else 1 if frames is None else len(frames)
            texts = (min(text, caption) if caption else text // count,) * count
        if sum(texts) != text:
            raise ValueError(
                f"{text} text tokens are not captions of {', '.join(map(str, texts))} tokens; "
                "pad every caption to the same length or give scene_texts, the tokens of each"
            )
        if frames is None:
            if grid.frames % len(texts):
                raise ValueError(
                    f"{grid.frames} frames do not divide into {len(texts)} scenes, one a caption; "
                    "give scene_frames, the frames of each"
                )
            frames = (grid.frames // len(texts),) * len(texts)
        if sum(frames) != grid.frames or len(frames) != len(texts):
            raise ValueError(
                f"scenes of {', '.join(map(str, frames))} frames do not fit {len(texts)} captions and {grid.frames} frames"
            )
        plane = grid.height * grid.width
        return cls(tuple(texts), tuple(count * plane for count in frames))

    @property
    def scenes(self) -> int:
        """Number of scenes."""
        return len(self.video)

    @property
    def length(self) -> int:
        """Number of text tokens `L`."""
        return sum(self.text)

    @property
    def tokens(self) -> int:
        """Number of picture tokens `N`."""
        return sum(self.video)

    @property
    def bounds(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Return, for every scene, first and last + 1 of its caption and of its tokens, counted in the whole sequence."""
        texts = pairwise(accumulate(self.text, initial=0))
        videos = pairwise(accumulate(self.video, initial=self.length))
        return list(zip(texts, videos, strict=True))

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs that hear each other."""
        asked = zip(self.text, self.video, strict=True)
        return sum(text * (text + video) + video * (text + self.tokens) for text, video in asked)

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """Return who may hear whom, [L + N, L + N]: for references and small examples, it has the square of the length."""
        text, video = (
            torch.tensor(one, device=device).repeat_interleave(torch.tensor(lengths, device=device))
            for one, lengths in ((range(self.scenes), self.text), (range(self.scenes), self.video))
        )
        owner = torch.cat([text, video])
        moving = torch.arange(len(owner), device=device) >= self.length
        return (owner[:, None] == owner[None]) | (moving[:, None] & moving[None])


def spread(vectors: Tensor, counts: Sequence[int]) -> Tensor:
    """Give every token the vector of its scene: [B, S, D] -> [B, N, D]; [B, 1, D], one for all scenes, stays as it is."""
    if vectors.shape[1] == 1:
        return vectors
    parts = [
        one.expand(-1, count, -1) for one, count in zip(vectors.split(1, dim=1), counts, strict=True) if count
    ]
    return torch.cat(parts, dim=1)


def joined_captions(tokens: Tensor, mask: Tensor, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Join the captions of scenes for a network that hears text by cross-attention.

    Args:
        tokens: captions [B, S, L, D]. mask: their real tokens [B, S, L]. frames: frames of each scene, F in all.

    Returns:
        one text [B, S L, D], and what each frame hears of it, its own caption: [B, F, S L].
    """
    batch, scenes, length = mask.shape
    own = torch.eye(scenes, dtype=torch.bool, device=mask.device)
    heard = (own[None, :, :, None] & mask.bool()[:, None]).reshape(batch, scenes, scenes * length)
    counts = torch.tensor(list(frames), device=mask.device)
    return tokens.flatten(1, 2), heard.repeat_interleave(counts, dim=1)
