"""Train one network of clips for every task, on scenes drawn while it learns: `python -m training.motion RECIPE --out runs/motion`.

Every sample has a task of its own, said by a mask: nothing given, first or last frames, every n-th, one, both ends, any, or all but
a region. Some batches are stories: scenes of unrelated captions one after another, each heard by its own frames alone.

Paper: VDT, Lu et al. 2023, arXiv:2305.13311; Mask^2DiT, Qi et al. 2025, arXiv:2503.19881.
Differs: the error is a mean over generated sites, whatever their count; captions are dropped by sample, for guidance.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit.clip_masks import blend, draw_mask, task_mask
from dit.segments import joined_captions
from dit.text import encode, load_minilm
from training.clips import Script, film, film_story, write_caption, write_script
from training.objectives import Denoiser, euler, stable_target
from training.train import Trainer, asked, latents_of

Again = Callable[[], np.ndarray]
TASKS = ("unconditional", "predict", "backward", "interpolate", "first-last", "image", "keyframes", "region")


@dataclass(slots=True)
class Batch:
    """Clips as latents [B, 3, F, h, w], what the network hears, and the mask of what it has to make [B, F, h, w].

    Attributes:
        index: places in time [B, F], where they are not 0..F-1.
        again: draws frames uint8 [F, 3, H, W] that could stand in a row's place as well, for all that the network is told; None
            where it is told too much or too little.
    """

    latents: Tensor
    prompts: dict[str, Tensor]
    mask: Tensor
    index: Tensor | None = None
    again: list[Again | None] = field(default_factory=list)


@dataclass(slots=True)
class Scripts:
    """Scripts with their captions encoded, [n, L, D] and [n, L]; row 0 is the empty caption and has the first script."""

    scripts: list[Script]
    captions: list[str]
    tokens: Tensor
    mask: Tensor

    @classmethod
    def drawn(
        cls,
        count: int,
        seed: int,
        length: int,
        *,
        held_out: bool = False,
        world: str = "full",
        others: float = 0.0,
        unnamed: float = 0.0,
    ) -> Scripts:
        """Draw scripts and their captions from a seed, see `write_script`, and encode the captions."""
        dice, told = np.random.default_rng(seed), {"held_out": held_out, "world": world}
        scripts = [write_script(dice, **told, others=others, unnamed=unnamed) for _ in range(count)]
        captions = ["", *(write_caption(one, dice) for one in scripts[1:])]
        tokenizer, encoder = load_minilm()
        order = sorted(
            range(count), key=lambda place: len(captions[place])
        )  # alike in length: little padding
        tokens = torch.zeros(count, length, encoder.config.hidden_size, dtype=torch.bfloat16)
        mask = torch.zeros(count, length, dtype=torch.bool)
        for start in range(0, count, 64):
            rows = order[start : start + 64]
            found = encode(tokenizer, encoder, [captions[row] for row in rows], limit=length)
            size = found.tokens.shape[1]
            tokens[rows, :size], mask[rows, :size] = found.tokens.bfloat16(), found.mask
        return cls(scripts, captions, tokens, mask)

    def single(self) -> list[int]:
        """Return the places of scripts that a scene of few frames can show: one thing and no wall."""
        return [
            place for place, one in enumerate(self.scripts) if place and len(one.movers) == 1 and not one.wall
        ]


class Clips:
    """Draws batches: scripts by chance, scenes of them never seen before, and a task for every sample."""

    def __init__(self, scripts: Scripts, data: dict[str, Any], scale: int, patch: int) -> None:
        self.scripts, self.data, self.scale, self.patch = scripts, data, scale, patch
        self.singles = scripts.single()

    def draw(
        self, count: int, dice: torch.Generator, *, story: bool = False, tasks: dict[str, float] | None = None
    ) -> Batch:
        """Draw `count` clips, or stories of as many tokens in all."""
        drawn = np.random.default_rng(int(torch.randint(2**62, (), generator=dice)))
        return (
            self._stories(count, drawn, dice)
            if story
            else self._clips(count, drawn, dice, tasks or self.data["tasks"])
        )

    def _clips(
        self, count: int, drawn: np.random.Generator, dice: torch.Generator, tasks: dict[str, float]
    ) -> Batch:
        frames = self.data["frames"]
        which = torch.randint(1, len(self.scripts.scripts), (count,), generator=dice)
        clips = np.stack(
            [film(self.scripts.scripts[place], drawn, frames=frames).frames for place in which.tolist()]
        )
        latents = self.latents(clips)
        side = latents.shape[-1]
        mask = torch.stack([self._mask(tasks, frames, side, dice) for _ in range(count)])
        heard = self._dropped(which, dice)
        again = [
            self._again([int(place)], drawn, frames) if place and bool(sites.all()) else None
            for place, sites in zip(heard, mask, strict=True)
        ]
        return Batch(latents, self._heard(heard), mask, again=again)

    def stills(self, count: int, dice: torch.Generator) -> Batch:
        """Draw `count` single frames, each at its place in time: what a thing looks like costs a frame, not a clip."""
        frames = self.data["frames"]
        drawn = np.random.default_rng(int(torch.randint(2**62, (), generator=dice)))
        which = torch.randint(1, len(self.scripts.scripts), (count,), generator=dice)
        index = torch.randint(frames, (count, 1), generator=dice)
        pictures = [
            film(self.scripts.scripts[place], drawn, frames=frames, still=at).frames
            for place, at in zip(which.tolist(), index[:, 0].tolist(), strict=True)
        ]
        latents = self.latents(np.stack(pictures))
        heard = self._dropped(which, dice)
        again = [
            self._again([int(place)], drawn, frames, still=int(at)) if place else None
            for place, at in zip(heard, index[:, 0], strict=True)
        ]
        return Batch(latents, self._heard(heard), torch.ones_like(latents[:, 0]), index, again)

    def _dropped(self, which: Tensor, dice: torch.Generator) -> Tensor:
        """Return the places of the captions that are heard: those of scripts [B] or stories [B, S], 0 where dropped."""
        chance = torch.rand(len(which), *[1] * (which.dim() - 1), generator=dice)
        return torch.where(chance < self.data["drop"], 0, which)

    def _again(
        self, places: list[int], drawn: np.random.Generator, frames: int, still: int | None = None
    ) -> Again:
        """Return what draws the scenes of scripts anew, one after another on one ground."""
        scripts = [self.scripts.scripts[place] for place in places]

        def draw() -> np.ndarray:
            if len(scripts) == 1:
                return film(scripts[0], drawn, frames=frames, still=still).frames
            return np.concatenate([scene.frames for scene in film_story(scripts, drawn, frames=frames)])

        return draw

    def _heard(self, which: Tensor) -> dict[str, Tensor]:
        """Return the network's inputs for the captions of scripts [B]."""
        return {
            "encoder_hidden_states": self.scripts.tokens[which].float(),
            "encoder_attention_mask": self.scripts.mask[which],
        }

    def _stories(self, count: int, drawn: np.random.Generator, dice: torch.Generator) -> Batch:
        scenes, frames = self.data["scenes"], self.data["scene_frames"]
        count = max(1, count * self.data["frames"] // (scenes * frames))
        places = torch.randint(len(self.singles), (count, scenes), generator=dice)
        which = torch.tensor(self.singles)[places]  # [B, S]
        clips = [
            film_story([self.scripts.scripts[place] for place in row], drawn, frames=frames)
            for row in which.tolist()
        ]
        latents = self.latents(np.stack([np.concatenate([scene.frames for scene in one]) for one in clips]))
        mask = torch.ones(count, scenes * frames, *latents.shape[-2:])
        given = torch.randint(scenes, (count,), generator=dice) * (torch.rand(count, generator=dice) < 0.5)
        for row, known in enumerate(given.tolist()):  # a story may be told on
            mask[row, : known * frames] = 0
        which = self._dropped(which, dice)
        again = [
            self._again(row.tolist(), drawn, frames) if bool(row.all()) and not known else None
            for row, known in zip(which, given.tolist(), strict=True)
        ]
        heard = story_prompts(self.scripts.tokens[which], self.scripts.mask[which], [frames] * scenes)
        return Batch(latents, heard, mask, again=again)

    def latents(self, clips: np.ndarray) -> Tensor:
        """Return frames uint8 [B, F, 3, H, W] as latents [B, 3, F, h, w]."""
        found = latents_of(torch.from_numpy(clips).flatten(0, 1), self.scale)
        return found.unflatten(0, clips.shape[:2]).transpose(1, 2).contiguous()

    def _mask(self, tasks: dict[str, float], frames: int, side: int, dice: torch.Generator) -> Tensor:
        """Draw a task and what of it is given, [F, h, w]."""
        names = list(tasks)
        task = names[int(torch.multinomial(torch.tensor(list(tasks.values())), 1, generator=dice))]
        whole = {"frames": frames, "height": side, "width": side}
        if task == "region":
            return draw_mask(**whole, generator=dice, patch=self.patch, spatial=1.0)
        if task in ("predict", "backward"):
            return task_mask(
                task, **whole, given=int(torch.randint(1, frames * 3 // 4 + 1, (), generator=dice))
            )
        if task == "interpolate":
            return task_mask(task, **whole, every=int(torch.randint(2, 6, (), generator=dice)))
        if task == "image":
            return task_mask(task, **whole, keyframes=(int(torch.randint(frames, (), generator=dice)),))
        if task == "keyframes":
            count = int(torch.randint(2, frames // 2 + 1, (), generator=dice))
            return task_mask(task, **whole, keyframes=torch.randperm(frames, generator=dice)[:count].tolist())
        return task_mask(task, **whole)


def story_prompts(tokens: Tensor, mask: Tensor, scene_frames: list[int]) -> dict[str, Tensor]:
    """Return the network's inputs for captions [B, S, L, D] with masks [B, S, L]: each frame hears its own scene's."""
    joined, heard = joined_captions(tokens, mask, scene_frames)
    return {"encoder_hidden_states": joined.float(), "encoder_attention_mask": heard}


class MotionTrainer(Trainer):
    """A run on clips: what differs from pictures is the data, the mask, and the loss on generated sites."""

    def load_data(self) -> None:
        """Draw scripts and encode their captions; scenes are drawn on the way."""
        data, patch = self.recipe["data"], self.recipe["model"]["patch_size"]
        seed, scale = self.recipe["run"]["seed"], self.recipe["codec"]["scale"]
        told: dict[str, Any] = {"length": data["text_tokens"], "world": data.get("world", "full")}
        more = {name: data.get(name, 0.0) for name in ("others", "unnamed")}
        learnt = Scripts.drawn(data["scripts"], seed, **told, **more)
        held = Scripts.drawn(64, seed + 1, held_out=True, **told)
        self.clips, self.held_clips = (Clips(one, data, scale, patch) for one in (learnt, held))
        print(f"{len(learnt.scripts)} captions to learn", file=sys.stderr)

    def step(self) -> float:
        """One batch, one move of the weights; return the loss."""
        batch = self.draw()
        noise = torch.randn(batch.latents.shape, generator=self.dice)
        times = self.objective.times(len(batch.latents), self.dice)
        loss = self._error(batch, noise, times, self._target(batch, noise, times)).mean()
        self.accelerator.backward(loss + sum(self.model.auxiliary_losses().values()))
        self.master.step(self.factor(), self.recipe["optimizer"]["clip"])
        clips = (
            len(batch.latents)
            if batch.index is None
            else -(-len(batch.latents) // self.recipe["data"]["frames"])
        )
        self.seen += clips * self.accelerator.num_processes
        return float(loss.detach())

    def draw(self) -> Batch:
        """Draw clips, a story, or `stills_batch` single frames: at first these alone, if the recipe says so."""
        data, count = self.recipe["data"], self.recipe["run"]["batch"]
        chance = float(torch.rand((), generator=self.dice))
        if self.progress() < data.get("stills_first", 0.0) or chance < data.get("stills", 0.0):
            return self.clips.stills(data["stills_batch"], self.dice)
        story = chance < data.get("stills", 0.0) + data["stories"]
        return self.clips.draw(count, self.dice, story=story)

    def _target(self, batch: Batch, noise: Tensor, times: Tensor) -> Tensor | None:
        """Return what is to be learnt: under much noise the mean over several scenes of the same captions, else the clips."""
        settings = self.recipe.get("stable_target")
        if settings is None:
            return None
        target = batch.latents.clone()
        for row, (time, draw) in enumerate(zip(times.tolist(), batch.again, strict=True)):
            if draw is None or time < settings["above"]:
                continue
            others = self.clips.latents(np.stack([draw() for _ in range(settings["scenes"] - 1)]))
            noisy = (1 - time) * batch.latents[row] + time * noise[row]
            target[row] = stable_target(noisy, time, torch.cat([batch.latents[row : row + 1], others]))
        return target

    def _error(self, batch: Batch, noise: Tensor, times: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the weighted squared velocity error of each clip over its generated sites, [B]."""
        target = target if target is None else target.to(self.device)
        clean, noise, mask, times = (one.to(self.device) for one in (batch.latents, noise, batch.mask, times))
        prompts = {name: value.to(self.device) for name, value in batch.prompts.items()}

        def denoise(noisy: Tensor, times: Tensor) -> Tensor:
            told = {"mask": mask, "clean": clean, "frame_index": batch.index}
            return self.model(noisy, times * 1000, **told, **prompts, return_dict=False)[0]

        return self.objective.losses(denoise, clean, noise, times, mask, target)

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Loss of the averaged weights on held-out pairs and on learnt ones, with nothing given and with the first half given."""
        result = {}
        with self._averaged():
            for name, clips in (("held_out", self.held_clips), ("learnt", self.clips)):
                for task in ("unconditional", "predict"):
                    dice = torch.Generator().manual_seed(1)
                    batch = clips.draw(32, dice, tasks={task: 1.0})
                    noise = torch.randn(batch.latents.shape, generator=dice)
                    times = torch.linspace(0.05, 0.98, len(noise))
                    result[f"{name}_{task}"] = float(self._error(batch, noise, times).mean())
        return result

    @torch.no_grad()
    def _sheet(self, scale: float | None = None, steps: int = 20) -> Image.Image:
        """Return held-out captions made, and held-out clips going on from their first frames: every second frame.

        `scale`: of guidance, the recipe's unless given.
        """
        scale = self.recipe["sampling"].get("guidance", 3.0) if scale is None else scale
        dice = torch.Generator().manual_seed(2)
        rows = []
        for task in ("unconditional", "predict"):
            batch = self.held_clips.draw(5, dice, tasks={task: 1.0})
            noise = torch.randn(batch.latents.shape, generator=dice).to(self.device)
            clean, mask = batch.latents.to(self.device), batch.mask.to(self.device)
            shift = self.recipe["sampling"]["shift"]
            made = euler(self._guided(batch.prompts, clean, mask, scale), noise, steps, shift=shift)
            rows.append(blend(clean, made, mask))
        return contact_sheet(torch.cat(rows)[:, :, ::2])

    def _guided(self, prompts: dict[str, Tensor], clean: Tensor, mask: Tensor, scale: float) -> Denoiser:
        """Return what leads from the empty caption to the given ones."""
        scripts, count = self.held_clips.scripts, len(clean)
        asked_for = {name: value.to(self.device) for name, value in prompts.items()}
        empty = {
            "encoder_hidden_states": scripts.tokens[:1].float().expand(count, -1, -1).to(self.device),
            "encoder_attention_mask": scripts.mask[:1].expand(count, -1).to(self.device),
        }

        def denoise(noisy: Tensor, times: Tensor) -> Tensor:
            both = [
                self.model(noisy, times * 1000, mask=mask, clean=clean, **heard, return_dict=False)[0]
                for heard in (empty, asked_for)
            ]
            return both[0] + scale * (both[1] - both[0])

        return denoise


def contact_sheet(clips: Tensor, enlarge: int = 2) -> Image.Image:
    """Clips [B, 3, F, H, W] in -1..1 as one picture, a row a clip."""
    pixels = ((clips.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    board = pixels.permute(0, 3, 2, 4, 1).flatten(2, 3).flatten(0, 1)  # [B H, F W, 3]
    picture = Image.fromarray(board.contiguous().numpy())
    return picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)


def main() -> None:
    """Read the command line and train."""
    recipe, given = asked(__doc__)
    MotionTrainer(recipe, given.out, given.minutes, given.start).run()


if __name__ == "__main__":
    main()
