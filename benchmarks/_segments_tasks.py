"""What a trained network of stories is asked, and how the generator's truth answers: captions, effects, extension, cuts elsewhere.

Whatever is made starts from noise that a seed decides, so the same request with one caption changed differs by that caption alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks._segments_data import FRAMES, SCENES, SIZE, Stories, drawn, look, scored
from dit.backbones.mask2dit import Mask2DiT
from dit.clip_masks import blend
from training.objectives import euler

TEST = 7_000_000
"""Seed of all test stories and their noise; training draws from other streams."""
UNEQUAL = (2, 4, 6)
"""Frames of scenes that are not equally long; as many in all as in training."""
LONG, SAMPLING = 2 * SCENES, 24
"""Scenes of a story that is told on; steps from noise to a clip."""


def generated(given: Tensor, frames: Sequence[int]) -> Tensor:
    """Return the mask [B, F, 8, 8] of what is made where the first `given` [B] scenes are there already."""
    scene = torch.arange(len(frames)).repeat_interleave(torch.tensor(frames))
    made = (scene >= given[:, None]).float()
    return made[..., None, None].expand(-1, -1, SIZE, SIZE)


def times_of(times: Tensor, given: Tensor, scenes: int) -> Tensor:
    """Return the network's times [B, S]: those of the samples [B] in 0..1, and 0 in the given scenes."""
    made = torch.arange(scenes) >= given[:, None]
    return times[:, None] * 1000 * made


@dataclass(slots=True)
class Maker:
    """Makes clips of stories by one network; `ids` says whether captions name their scene by a number."""

    network: Mask2DiT
    ids: bool = False
    steps: int = SAMPLING
    batch: int = 32

    @torch.no_grad()
    def make(
        self, stories: Stories, seed: int, *, clean: Tensor | None = None, given: int = 0, frames: Any = None
    ) -> Tensor:
        """Return the clips [B, 3, F, 8, 8] of captions; `given` scenes of `clean` stay as they are."""
        frames = tuple(frames or (FRAMES,) * stories.colours.shape[1])
        shape = (len(stories), 3, sum(frames), SIZE, SIZE)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        known = torch.full((len(stories),), given)
        mask = generated(known, frames)
        start = noise if clean is None else blend(clean, noise, mask)
        found = []
        for rows in torch.arange(len(stories)).split(self.batch):
            words = stories.rows(rows).words(ids=self.ids)
            found.append(
                euler(self._denoiser(words, known[rows], mask[rows], frames), start[rows], self.steps)
            )
        return torch.cat(found)

    def _denoiser(
        self, words: Tensor, given: Tensor, mask: Tensor, frames: Sequence[int]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        def denoise(noisy: Tensor, times: Tensor) -> Tensor:
            when = times_of(times, given, len(frames))
            made = self.network(noisy, when, words, scene_frames=frames, return_dict=False)[0]
            return made * mask.unsqueeze(1)  # what is given does not move

        return denoise


def exam(count: int) -> tuple[Stories, Stories, Stories]:
    """Return `count` test stories of triples of colours that are never trained, of trained ones, and of six scenes."""
    dice = torch.Generator().manual_seed(TEST)
    longer = drawn(count, dice, held_out=True, scenes=LONG)
    return drawn(count, dice, held_out=True), drawn(count, dice), longer


def figures_of(maker: Maker, count: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return every figure of a network from `count` stories a task, and the first clips of some tasks."""
    held, learnt, long = exam(count)
    made = maker.make(held, TEST)
    longer, long_clips = told_on(maker, long)
    figures = {
        "held_out": scored(look(made), held),
        "learnt": scored(look(maker.make(learnt, TEST + 1)), learnt),
        "effect": effects(maker, held.rows(torch.arange(max(1, count // 2)))),
        "extension": extended(maker, held),
        "told_on": longer,
        "unequal": unequal(maker, held),
        "gradient": gradients(maker, held.rows(torch.arange(min(4, count)))),
    }
    return figures, {"held_out": made, "told_on": long_clips}


def held_out(maker: Maker, count: int) -> dict[str, float]:
    """Return the figures of `count` stories whose triples of colours no training had."""
    stories, *_ = exam(count)
    return scored(look(maker.make(stories, TEST)), stories)


def effects(maker: Maker, stories: Stories) -> dict[str, Any]:
    """Change one caption at a time; return the mean squared change of scene j by caption i, [i][j], and the diagonal's share."""
    before = maker.make(stories, TEST + 2)
    table = torch.stack(
        [_by_scene(maker.make(stories.recaptioned(i), TEST + 2) - before) for i in range(SCENES)]
    )
    real = torch.stack([_by_scene(stories.recaptioned(i).film() - stories.film()) for i in range(SCENES)])
    own = float(table.diagonal().sum() / table.sum().clamp_min(1e-12))
    return {"mse": table.tolist(), "real_mse": real.tolist(), "own_share": own}


def _by_scene(change: Tensor) -> Tensor:
    """Mean square [S] over each scene's pixels of [B, 3, F, 8, 8]."""
    return torch.stack([one.square().mean() for one in change.split(FRAMES, dim=2)])


def extended(maker: Maker, stories: Stories) -> dict[str, Any]:
    """Give all scenes but the last; return the figures of the last, and whether what was given came out bit for bit."""
    real = stories.film()
    kept = SCENES - 1
    made = maker.make(stories, TEST + 3, clean=real, given=kept)
    rights = scored(look(made), stories, first=kept)
    del rights["story"]  # there is one scene
    return rights | {"given_unchanged": torch.equal(made[:, :, : kept * FRAMES], real[:, :, : kept * FRAMES])}


def told_on(maker: Maker, stories: Stories) -> tuple[dict[str, Any], Tensor]:
    """Make the first scenes, then one after the other with the two before it given; return figures by scene, and the clips.

    `identity` is the share of stories that still have the first scene's size, `drift_px` how far the side has moved from it.
    """
    clips = maker.make(stories.scenes(0, SCENES), TEST + 4)
    for last in range(SCENES, stories.colours.shape[1]):
        window = stories.scenes(last - SCENES + 1, last + 1)
        known = torch.cat(
            [clips[:, :, (1 - SCENES) * FRAMES :], torch.zeros_like(clips[:, :, :FRAMES])], dim=2
        )
        made = maker.make(window, TEST + 4 + last, clean=known, given=SCENES - 1)
        clips = torch.cat([clips, made[:, :, -FRAMES:]], dim=2)
    seen = look(clips)
    same = (seen.sides == seen.sides[:, :1]) & (seen.sides >= 0)
    by_scene = {
        "colour": seen.colours == stories.colours,
        "place": seen.places == stories.places,
        "identity": same,
        "drift_px": (seen.px - seen.px[:, :1]).abs(),
        "square": seen.squares,
    }
    return {name: one.float().mean(0).tolist() for name, one in by_scene.items()}, clips


def unequal(maker: Maker, stories: Stories) -> dict[str, float]:
    """Return the figures of scenes of 2, 4 and 6 frames, which no training had."""
    return scored(look(maker.make(stories, TEST + 5, frames=UNEQUAL), UNEQUAL), stories)


def gradients(maker: Maker, stories: Stories) -> dict[str, Any]:
    """Return the largest gradient of scene k to caption i, [i][k]: behind the first block, and of what the network says.

    `own_only` is whether every scene hears its own caption in the first block, and of the others exactly nothing.
    """
    dice = torch.Generator().manual_seed(TEST)
    noisy = torch.randn(stories.film().shape, generator=dice)
    words = stories.words(ids=maker.ids).requires_grad_()
    caught: list[Tensor] = []
    block = maker.network.transformer_blocks[0]
    hook = block.register_forward_hook(lambda _, __, output: caught.append(output[1]))
    try:
        said = maker.network(noisy, torch.full((len(stories),), 500.0), words, return_dict=False)[0]
    finally:
        hook.remove()
    parts = {"first_block": caught[0].chunk(SCENES, dim=1), "network": said.chunk(SCENES, dim=2)}
    found: dict[str, Any] = {}
    for name, scenes in parts.items():
        columns = []
        for one in scenes:
            weight = torch.randn(one.shape, generator=dice)
            (grad,) = torch.autograd.grad((one * weight).sum(), words, retain_graph=True)
            columns.append(grad.abs().unflatten(1, (SCENES, -1)).amax(dim=(0, 2, 3)))
        found[name] = torch.stack(columns, dim=1).tolist()
    own = torch.eye(SCENES, dtype=torch.bool)
    return found | {"own_only": bool(((torch.tensor(found["first_block"]) > 0) == own).all())}
