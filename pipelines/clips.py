"""Clips as people have them (pictures, arrays, tensors) and as networks want them; and what of a clip is given.

Paper: VDT: General-purpose Video Diffusion Transformers via Mask Modeling, Lu et al. 2023, arXiv:2305.13311.
Differs: what is given is put back as it came, pixel by pixel, so it leaves exactly as it entered, whatever the codec loses.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit.clip_masks import TASKS, task_mask
from pipelines.request import RequestError

ROUNDED = 1e-3
"""How far a pixel may lie outside of 0..1: what filters and half precision leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What of a clip is given: a name of `dit.clip_masks.TASKS` with its settings, or a mask."""

    name: str | None = None
    mask: Any = None
    given: int | None = None
    every: int = 4
    keyframes: Sequence[int] = ()
    box: tuple[int, int, int, int] | None = None
    scale: int = 1
    """Pixels of a latent pixel, to tell a box as it was given."""

    def of(self, frames: int, height: int, width: int, shown: int | None) -> Tensor:
        """Return the mask [F, H, W] at latent size, 1 where something is generated, when `shown` frames came (None: none).

        Raises: RequestError for a task or mask that does not fit.
        """
        if self.mask is not None:
            return self._own(frames, height, width, shown)
        name, given, keyframes = self.name, self.given, self.keyframes
        if name is None:
            if shown == frames:
                raise RequestError(
                    "task",
                    None,
                    f"one of {', '.join(TASKS)}, or a mask or more frames asked for: all frames came, so nothing is left to make",
                )
            name = "unconditional" if shown is None else "predict"
        if (shown is None) != (name == "unconditional"):
            what = "left out" if name == "unconditional" else "a clip or frames"
            raise RequestError("video", shown, f"{what} for the task {name}")
        if name in ("predict", "backward") and given is None and shown is not None and shown < frames:
            given = shown
        try:
            return task_mask(
                name, frames, height, width, given=given, every=self.every, keyframes=keyframes, box=self.box
            )
        except ValueError as error:
            raise self._unfit(name, given, height, width, str(error).removeprefix(f"{name}: ")) from None

    def _unfit(self, name: str, given: int | None, height: int, width: int, words: str) -> RequestError:
        """Return the error that names the setting by which a task does not fit."""
        if name == "region":
            top, left, bottom, right = (one * self.scale for one in self.box or (0, 0, 0, 0))
            inside = f"{width * self.scale} x {height * self.scale} px"
            allowed = f"left,top,right,bottom inside {inside}, left before right, top before bottom, and not all of it"
            return RequestError("region", f"{left},{top},{right},{bottom}", allowed)
        if name in ("predict", "backward"):
            return RequestError(
                "given", given, f"one that leaves something given and something to make ({words})"
            )
        if name == "interpolate":
            return RequestError("every", self.every, f"one that leaves something to make ({words})")
        if name in ("keyframes", "image"):
            return RequestError(
                "keyframes", ",".join(map(str, self.keyframes)), f"frames of the clip ({words})"
            )
        return RequestError("task", name, words.removeprefix("task is ").partition(", got ")[0])

    def _own(self, frames: int, height: int, width: int, shown: int | None) -> Tensor:
        mask = numbers_of("mask", self.mask, f"numbers, of shape {(frames,)} or {(frames, height, width)}")
        if self.name is not None:
            raise RequestError("mask", tuple(mask.shape), f"left out where a task is named ({self.name})")
        if mask.shape == (frames,):
            mask = mask[:, None, None].expand(frames, height, width)
        if mask.shape != (frames, height, width):
            allowed = f"of shape {(frames,)} or, at latent size, {(frames, height, width)}"
            raise RequestError("mask", tuple(mask.shape), allowed)
        mask = (mask > 0).float()
        if not mask.any():
            raise RequestError("mask", "zeros everywhere", "1 at the sites to generate")
        if shown is None and not mask.all():
            raise RequestError("video", None, "a clip or frames where a mask says that some are given")
        return mask


def tensor_of(video: Any, height: int, width: int, channels: int) -> Tensor:
    """Return clips as [1 or B, F, C, H, W] in 0..1, float32.

    Args:
        video: a list of pictures (or of such lists), an array [F, H, W, C] or [B, F, H, W, C], a tensor [F, C, H, W] or
            [B, F, C, H, W]; arrays and tensors in 0..1 and of the right size, bytes in 0..255; pictures are resized.
        height, width: px. channels: 1 or 3, of the pictures.

    Raises:
        RequestError: no frames, or another shape, naming both.
    """
    if isinstance(video, Image.Image):
        video = [video]
    if isinstance(video, list | tuple):
        if not video or (isinstance(video[0], list | tuple) and not video[0]):
            raise RequestError("video", "no frames", "a list of at least one picture")
        clips = video if isinstance(video[0], list | tuple) else [video]
        if len({len(clip) for clip in clips}) > 1:
            raise RequestError("video", [len(clip) for clip in clips], "clips of equal counts of frames")
        video = np.stack([np.stack([_array(one, height, width, channels) for one in clip]) for clip in clips])
    found = numbers_of("video", video, "a list of pictures, an array or a tensor")
    if isinstance(video, np.ndarray) and found.dim() > 2:
        found = found.movedim(-1, -3)
    if found.dtype == torch.uint8:
        found = found.float() / 255
    elif not bool(((found > -ROUNDED) & (found < 1 + ROUNDED)).all()):  # nor is a NaN
        least, most = (float(one) for one in found.float().aminmax()) if found.numel() else (0.0, 0.0)
        raise RequestError("video", f"numbers from {least:g} to {most:g}", "of numbers in 0..1, or of bytes")
    found = found.float()
    found = found.unsqueeze(0) if found.dim() == 4 else found
    if found.dim() != 5 or found.shape[2:] != (channels, height, width) or not found.shape[1]:
        allowed = f"frames of {channels} channels, {height} x {width} px"
        raise RequestError("video", tuple(np.shape(video)), allowed)
    return found


def numbers_of(name: str, value: Any, allowed: str) -> Tensor:
    """Return an array or tensor of numbers as a tensor of its own type. Raises: RequestError for anything else."""
    if isinstance(value, Tensor):
        return value
    try:
        found = np.asarray(value)
        return torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        raise RequestError(name, type(value).__name__, allowed) from None


def whole(name: str, value: Any, unit: str) -> int:
    """Return a count of at least 1. Raises: RequestError for one that is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise RequestError(name, value, f"at least 1, a whole number of {unit}")
    return int(value)


def frames_of(video: Any) -> int:
    """Return how many frames a clip of a form of `tensor_of` has."""
    if isinstance(video, Image.Image):
        return 1
    if isinstance(video, list | tuple):
        return len(video[0]) if video and isinstance(video[0], list | tuple) else len(video)
    shape = np.shape(video)
    return int(shape[-4]) if len(shape) >= 4 else 0


def _array(picture: Any, height: int, width: int, channels: int) -> np.ndarray:
    if not isinstance(picture, Image.Image):
        raise RequestError("video", type(picture).__name__, "a list of pictures, an array or a tensor")
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture).reshape(height, width, channels)


def placed(clip: Tensor, mask: Tensor) -> Tensor:
    """Put frames [B, M, C, H, W] where the mask [F, h, w] gives frames: [B, F, C, H, W], 0 elsewhere.

    A clip that has all F frames stays as it is.

    Raises:
        RequestError: another count of frames than the clip's or than are given.
    """
    frames = mask.shape[0]
    if clip.shape[1] == frames:
        return clip
    wanted = (mask == 0).flatten(1).any(1).nonzero().flatten()
    if clip.shape[1] != len(wanted):
        raise RequestError(
            "video", f"{clip.shape[1]} frames", f"{frames} frames, or the {len(wanted)} that are given"
        )
    whole = clip.new_zeros(clip.shape[0], frames, *clip.shape[2:])
    whole[:, wanted] = clip
    return whole
