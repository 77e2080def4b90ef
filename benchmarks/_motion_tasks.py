"""What the clip model is asked, and how the generator's truth answers: captions, prediction, interpolation, a wall, stories.

Every task returns figures of the model beside those of trivial ways to do it and of the real clips through the codec (`ceiling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._motion_eyes import Frames, centre_errors, change, flicker, judge, straight_on, track
from training.clips import BACKGROUNDS, Clip, Script, film, film_story, write_caption, write_script

MISSING = 16.0
"""Centre error in px of a thing that is not seen, and the most that any error counts."""
FRAMES, GIVEN, EVERY, SCENE = 16, 8, 4, 8
"""Frames of a clip; how many prediction is given; of which interpolation is given each n-th; frames of a scene of a story."""


@dataclass(slots=True)
class Maker:
    """Asks a `TextToVideoPipeline`: clips come and go as uint8 [B, F, 3, H, W]."""

    pipeline: Any
    steps: int = 24
    guidance: float = 3.0
    batch: int = 8

    def make(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        *,
        real: Frames | None = None,
        mask: Sequence[int] | None = None,
        frames: int = FRAMES,
    ) -> Frames:
        """Return a clip for every caption; with `real` and a mask by frame, the rest of these clips, without guidance."""
        found = []
        for start in range(0, len(captions), self.batch):
            rows = slice(start, start + self.batch)
            given: dict[str, Any] = {"guidance_scale": self.guidance}
            if real is not None:
                video = torch.from_numpy(real[rows]).float() / 255
                given = {"guidance_scale": 1.0, "video": video, "mask": list(mask or ())}
            made = self.pipeline(
                prompt=list(captions[rows]), seeds=list(seeds[rows]), num_frames=frames, num_inference_steps=self.steps,
                output_type="pt", **given,
            )  # fmt: skip
            found.append(_bytes(made.frames))
        return np.concatenate(found)

    def story(self, captions: Sequence[str], seed: int) -> Frames:
        """Return the story of captions, [F, 3, H, W]."""
        made = self.pipeline(
            prompt=list(captions), caption_frames=[SCENE] * len(captions), seeds=[seed], output_type="pt",
            num_inference_steps=self.steps, guidance_scale=self.guidance,
        )  # fmt: skip
        return _bytes(made.frames)[0]

    def coded(self, real: Frames) -> Frames:
        """Return clips as the codec leaves them: no model of these latents can do better."""
        latents = self.pipeline._clip_latents(torch.from_numpy(real).float() / 255)
        return _bytes(self.pipeline.decode_latents(latents, "pt"))


def _bytes(clips: torch.Tensor) -> Frames:
    return (clips.float().clamp(0, 1) * 255).round().byte().cpu().numpy()


def drawn(
    count: int, seed: int, *, kind: str = "any", held_out: bool = False, world: str = "full"
) -> tuple[list[Clip], list[str]]:
    """Draw clips and their captions; `kind`: "any", "single" (one thing), "wall" (which hides it), or "turn" (it comes back)."""
    clips: list[Clip] = []
    captions: list[str] = []
    place = seed
    while len(clips) < count:
        dice = np.random.default_rng(place)
        place += 1
        script = write_script(dice, held_out=held_out, single=kind != "any", world=world)
        caption = write_caption(script, dice)
        clip = film(script, dice, frames=FRAMES)
        fits = {"any": True, "single": True, "wall": script.wall, "turn": bool(turns(clip).any())}[kind]
        if fits:
            clips.append(clip)
            captions.append(caption)
    return clips, captions


def turns(clip: Clip, given: int = GIVEN) -> NDArray[np.bool_]:
    """Return which things turn back after the given frames, [K]: their speed changes its sign."""
    speeds = np.diff(clip.centres, axis=0)[given - 1 :]
    signs = np.sign(np.where(np.abs(speeds) < 1e-3, 0, speeds))
    found: NDArray[np.bool_] = ((signs.max(0) > 0) & (signs.min(0) < 0)).any(-1)
    return found


def captions_right(
    maker: Maker, clips: Sequence[Clip], captions: Sequence[str], seed: int
) -> tuple[dict[str, Any], Frames]:
    """Make clips of captions; return what of them is right, beside real clips, how they flicker against these, and the clips."""
    made = maker.make(captions, range(seed, seed + len(clips)))
    real = np.stack([clip.frames for clip in clips])
    scripts = [clip.script for clip in clips]
    coded = maker.coded(real)
    motion = {
        name: float(np.mean([way(one) for one in made]) / np.mean([way(one) for one in coded]))
        for name, way in (("change", change), ("flicker", flicker))
    }
    figures = {
        "model": _right(made, scripts),
        "ceiling": _right(coded, scripts),
        "of_real": motion,
        "count": len(clips),
    }
    return figures, made


def _right(clips: Frames, scripts: Sequence[Script]) -> dict[str, float]:
    verdicts = [judge(one, script) for one, script in zip(clips, scripts, strict=True)]
    return {name: float(np.mean([one[name] for one in verdicts])) for name in verdicts[0]}


def predicted(
    maker: Maker, clips: Sequence[Clip], captions: Sequence[str], seed: int
) -> tuple[dict[str, Any], Frames]:
    """Continue clips from their first half; return centre errors in px and PSNR in dB of the other half, and the clips."""
    real = np.stack([clip.frames for clip in clips])
    mask = [0] * GIVEN + [1] * (FRAMES - GIVEN)
    made = maker.make(captions, range(seed, seed + len(clips)), real=real, mask=mask)
    held = real.copy()
    held[:, GIVEN:] = real[:, GIVEN - 1 : GIVEN]
    after = np.arange(FRAMES) >= GIVEN
    ways = {"model": made, "copy-last": held, "ceiling": maker.coded(real)}
    errors = {name: _errors(found, clips, after) for name, found in ways.items()}
    errors["linear"] = [
        np.minimum(np.linalg.norm(straight_on(clip.centres, GIVEN) - clip.centres, axis=-1), MISSING)[after]
        for clip in clips
    ]
    turned = [np.broadcast_to(turns(clip), (FRAMES - GIVEN, len(clip.script.movers))) for clip in clips]
    seen = [clip.visible[after] > 0.5 for clip in clips]
    figures: dict[str, Any] = {"count": len(clips)}
    for name, found in errors.items():
        figures[name] = {
            "centre_px": _mean(found, seen),
            "centre_px_turning": _mean(found, [a & b for a, b in zip(seen, turned, strict=True)]),
            "centre_px_straight": _mean(found, [a & ~b for a, b in zip(seen, turned, strict=True)]),
        }
        if name in ways:
            figures[name]["psnr_db"] = _psnr(ways[name], real, after)
    return figures, made


def interpolated(
    maker: Maker, clips: Sequence[Clip], captions: Sequence[str], seed: int
) -> tuple[dict[str, Any], Frames]:
    """Fill in between every n-th frame; return PSNR in dB and centre errors in px between them, and the clips.

    Where nothing moves blending is exact, whatever its PSNR is then said to be: `psnr_db_moving` leaves such clips out.
    """
    real = np.stack([clip.frames for clip in clips])
    mask = [int(frame % EVERY != 0) for frame in range(FRAMES)]
    made = maker.make(captions, range(seed, seed + len(clips)), real=real, mask=mask)
    between = np.asarray(mask, bool) & (np.arange(FRAMES) < (FRAMES - 1) // EVERY * EVERY)
    ways = {"model": made, "blending": blended(real, EVERY), "ceiling": maker.coded(real)}
    seen = [clip.visible[between] > 0.5 for clip in clips]
    moving = (real != real[:, :1]).any(axis=(1, 2, 3, 4))
    figures: dict[str, Any] = {
        name: {
            "psnr_db": _psnr(found, real, between),
            "psnr_db_moving": _psnr(found[moving], real[moving], between) if moving.any() else None,
            "centre_px": _mean(_errors(found, clips, between), seen),
        }
        for name, found in ways.items()
    }
    return figures | {"count": len(clips), "moving": int(moving.sum())}, made


def blended(real: Frames, every: int) -> Frames:
    """Return clips [B, F, ...] whose frames between every n-th are blended from the two beside; the rest as the last one."""
    found = real.copy()
    for frame in range(real.shape[1]):
        before, after = frame // every * every, frame // every * every + every
        share = (frame - before) / every if after < real.shape[1] else 0.0
        mixed = real[:, before] * (1 - share) + real[:, min(after, real.shape[1] - 1)] * share
        found[:, frame] = np.rint(mixed).astype(np.uint8)
    return found


def hidden(
    maker: Maker, clips: Sequence[Clip], captions: Sequence[str], seed: int
) -> tuple[dict[str, Any], Frames]:
    """Continue clips from the frame in which a thing has gone behind a wall: does it come out again, as it was and where?"""
    made = []
    for place, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        given = gone(clip)
        mask = [0] * given + [1] * (FRAMES - given)
        made.append(maker.make([caption], [seed + place], real=clip.frames[None], mask=mask)[0])
    real = np.stack([clip.frames for clip in clips])
    last = np.stack([clip.frames[np.minimum(np.arange(FRAMES), gone(clip) - 1)] for clip in clips])
    ways = {"model": np.stack(made), "copy-last": last, "ceiling": maker.coded(real)}
    figures: dict[str, Any] = {"count": len(clips)}
    for name, found in ways.items():
        verdicts = [came_out(one, clip) for one, clip in zip(found, clips, strict=True)]
        figures[name] = {key: float(np.mean([one[key] for one in verdicts])) for key in verdicts[0]}
    return figures, np.stack(made)


def gone(clip: Clip) -> int:
    """Return how many frames there are up to the first in which the thing is hidden, that one too."""
    return int(np.flatnonzero(clip.visible[:, 0] < 0.15)[0]) + 1


def came_out(frames: Frames, clip: Clip) -> dict[str, float]:
    """Say whether a hidden thing is seen again in the last frames, in its colour on the far side, and how far from its place."""
    late = np.flatnonzero(clip.visible[:, 0] > 0.9)
    late = late[late > gone(clip)]
    found = track(frames[late], clip.script.movers[0].colour)
    errors = np.linalg.norm(found.centres - clip.centres[late, 0], axis=-1)
    errors = np.where(np.isnan(errors), MISSING, np.minimum(errors, MISSING))
    return {
        "seen": float(found.seen[-2:].all()),
        "in_place": float(errors[-2:].mean() < 5.0),
        "centre_px": float(errors.mean()),
    }


def stories(
    maker: Maker, count: int, seed: int, *, scenes: int = 3, world: str = "full"
) -> tuple[dict[str, Any], Frames, list[list[str]]]:
    """Tell stories of unrelated scenes; return what of scene i shows caption i, with and without captions of their own."""
    told, plain, real, scripts, texts = [], [], [], [], []
    place = seed
    for _ in range(count):
        row: list[Script] = []
        while len(row) < scenes:
            script = write_script(np.random.default_rng(place), single=True, world=world)
            place += 1
            if not script.wall:
                row.append(script)
        dice = np.random.default_rng(place)
        captions = [write_caption(one, dice) for one in row]
        real.append(np.concatenate([one.frames for one in film_story(row, dice, frames=SCENE)]))
        told.append(maker.story(captions, place))
        plain.append(maker.make([". ".join(captions)], [place], frames=scenes * SCENE)[0])
        scripts += row
        texts.append(captions)
    figures: dict[str, Any] = {"count": count, "scenes": scenes}
    for name, clips in (
        ("model", told),
        ("one text for all", plain),
        ("ceiling", list(maker.coded(np.stack(real)))),
    ):
        parts = np.stack(clips).reshape(count * scenes, SCENE, *clips[0].shape[1:])
        grounds = np.asarray([_ground(one) for one in parts]).reshape(count, scenes)
        figures[name] = _right(parts, scripts) | {
            "same_ground": float((grounds == grounds[:, :1]).all(1).mean())
        }
    return figures, np.stack(told), texts


def _ground(frames: Frames) -> int:
    middle = np.median(frames.transpose(0, 2, 3, 1).reshape(-1, 3), axis=0)
    return int(np.argmin([np.linalg.norm(middle - one) for one in np.asarray(BACKGROUNDS)]))


def _errors(made: Frames, clips: Sequence[Clip], frames: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    return [
        centre_errors(one, clip.script, clip.centres, MISSING)[frames]
        for one, clip in zip(made, clips, strict=True)
    ]


def _mean(errors: Sequence[NDArray[np.float64]], where: Sequence[NDArray[np.bool_]]) -> float | None:
    """Return the mean of errors where they count, or None where none does."""
    found = np.concatenate([one[place] for one, place in zip(errors, where, strict=True)])
    return float(found.mean()) if found.size else None


def _psnr(made: Frames, real: Frames, frames: NDArray[np.bool_]) -> float:
    """Return the mean over clips of the PSNR in dB over some of their frames."""
    error = ((made[:, frames].astype(np.float64) - real[:, frames]) ** 2).mean((1, 2, 3, 4))
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-3))).mean())
