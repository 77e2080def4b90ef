"""Which sites of a clip are given and which are generated: one mask [F, H, W] for every task, 1 where something is generated.

Paper: VDT: General-purpose Video Diffusion Transformers via Mask Modeling, Lu et al. 2023, arXiv:2305.13311; BEiT, Bao et al.
2021, arXiv:2106.08254 (random rectangles).
Differs: every mask leaves something to generate (in the released code one span in four is empty, so that its loss is 0); the error
of a clip is a mean over its generated sites, whatever their count (the release divides by all sites).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TASKS = (
    "unconditional", "predict", "backward", "interpolate", "image", "first-last", "keyframes", "region",
)  # fmt: skip
"""Names of tasks: nothing given; the first or the last frames; every n-th; one frame; the ends; any frames; all but a box."""

_SMALLEST, _LARGEST_ASPECT = 4, 1 / 0.3  # of a random rectangle, in patches


def task_mask(
    task: str,
    frames: int,
    height: int,
    width: int,
    *,
    given: int | None = None,
    every: int = 4,
    keyframes: Sequence[int] = (),
    box: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """Return the mask of a task, [F, H, W] of ones (to generate) and zeros (given).

    Args:
        task: one of `TASKS`.
        frames, height, width: size of the clip in latent pixels.
        given: frames that "predict" and "backward" are given; None for half of them.
        every: "interpolate" is given frames 0, n, 2 n, ...
        keyframes: the frames that "keyframes" is given; for "image" the one frame, the first by default; negative ones count
            from the end.
        box: (top, left, bottom, right) in latent pixels, all that "region" generates, in every frame.

    Raises:
        ValueError: an unknown task, or settings that leave nothing given or nothing to generate.
    """
    if task not in TASKS:
        raise ValueError(f"task is one of {', '.join(TASKS)}, got {task!r}")
    if min(frames, height, width) < 1:
        raise ValueError(
            f"a clip has at least 1 frame, row and column, got {frames} frames of {height} x {width}"
        )
    if task == "unconditional":
        return torch.ones(frames, height, width)
    if task == "region":
        return _region(frames, height, width, box)
    mask = torch.ones(frames, height, width)
    for frame in _given_frames(task, frames, given, every, keyframes):
        if not -frames <= frame < frames:
            raise ValueError(f"{task}: frame {frame} is not in a clip of {frames} frames (0 to {frames - 1})")
        mask[frame] = 0
    if not mask.any() or mask.all():
        what = "generate" if not mask.any() else "be given"
        raise ValueError(f"{task}: nothing is left to {what} in a clip of {frames} frames")
    return mask


def _given_frames(
    task: str, frames: int, given: int | None, every: int, keyframes: Sequence[int]
) -> Sequence[int]:
    if task in ("predict", "backward"):
        count = frames // 2 if given is None else given
        if not 1 <= count < frames:
            raise ValueError(
                f"{task}: given is from 1 to {frames - 1} frames of a clip of {frames}, got {count}"
            )
        return range(count) if task == "predict" else range(frames - count, frames)
    if task == "interpolate":
        if every < 2:
            raise ValueError(f"interpolate: every is at least 2 frames, got {every}")
        return range(0, frames, every)
    if task == "first-last":
        return (0, frames - 1)
    if task == "image" and len(keyframes) > 1:
        raise ValueError(f"image: one frame is given, got keyframes {list(keyframes)}")
    return tuple(keyframes) or ((0,) if task == "image" else ())


def _region(frames: int, height: int, width: int, box: tuple[int, int, int, int] | None) -> Tensor:
    top, left, bottom, right = box or (0, 0, 0, 0)
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(
            f"region: box is (top, left, bottom, right) inside {height} x {width} latent pixels, got {box}"
        )
    mask = torch.zeros(frames, height, width)
    mask[:, top:bottom, left:right] = 1
    if mask.all():
        raise ValueError("region: nothing is left to be given; the task of a whole clip is unconditional")
    return mask


def draw_mask(
    frames: int,
    height: int,
    width: int,
    generator: torch.Generator,
    *,
    patch: int = 2,
    spatial: float = 0.2,
    given: int | None = None,
    every: int = 4,
    share: float = 0.8,
) -> Tensor:
    """Draw the mask of one training clip, [F, H, W]: with probability `spatial` rectangles on a run of frames, else whole frames.

    Whole frames are, with equal probability: the last, the first, or all but every n-th, all, all but one, or each with
    probability `share`. Something is always generated.

    Args:
        frames, height, width: size of the clip in latent pixels. patch: side of what rectangles are made of.
        generator: on the processor. given, every: as in `task_mask`.
    """
    tasks = ["predict", "backward", "interpolate", "unconditional", "image", "random"]
    if frames == 1:  # a picture has nothing to be predicted from
        tasks = ["unconditional"]
    if torch.rand((), generator=generator) < spatial and min(height, width) >= 2 * patch:
        first = _integer(0, frames, generator)
        last = _integer(first + 1, frames + 1, generator)
        mask = torch.zeros(frames, height, width)
        mask[first:last] = (
            _rectangles(height // patch, width // patch, generator)
            .repeat_interleave(patch, 0)
            .repeat_interleave(patch, 1)[:height, :width]
        )
        return mask
    task = tasks[_integer(0, len(tasks), generator)]
    if task == "random":
        chosen = torch.rand(frames, generator=generator) < share
        chosen[_integer(0, frames, generator)] = True
        return chosen.float()[:, None, None].expand(-1, height, width).clone()
    place = _integer(0, frames, generator)
    count = None if given is None else min(given, frames - 1)
    return task_mask(
        task, frames, height, width, given=count, every=every, keyframes=(place,) if task == "image" else ()
    )


def _rectangles(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Cover half of [rows, columns] with rectangles of at least 4 patches whose sides differ by no more than 10 : 3."""
    mask = torch.zeros(rows, columns)
    goal = rows * columns // 2
    for _ in range(100):
        left = goal - int(mask.sum())
        if left < 1:
            break
        low, high = min(_SMALLEST, left), max(_SMALLEST, left)
        area = low + (high - low) * float(torch.rand((), generator=generator))
        aspect = math.exp((2 * float(torch.rand((), generator=generator)) - 1) * math.log(_LARGEST_ASPECT))
        tall, wide = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if tall > rows or wide > columns:
            continue
        top, start = _integer(0, rows - tall + 1, generator), _integer(0, columns - wide + 1, generator)
        mask[top : top + tall, start : start + wide] = 1
    if not mask.any() or mask.all():
        mask = torch.zeros(rows, columns)
        mask[: (rows + 1) // 2] = 1
    return mask


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator))


def batch_mask(mask: Tensor, clip: Tensor) -> Tensor:
    """Return a mask as [B, 1, F, H, W] in the dtype of a clip [B, C, F, H, W] (or picture [B, C, H, W]: [B, 1, H, W]).

    `mask` is [F, H, W] for all clips, [B, F, H, W], or [B, 1, F, H, W].

    Raises:
        ValueError: a mask of another shape, naming both.
    """
    sides, shape = clip.shape[2:], tuple(mask.shape)
    if mask.dim() == clip.dim() and mask.shape[1] == 1:
        mask = mask.squeeze(1)
    if mask.dim() == len(sides):
        mask = mask.unsqueeze(0)
    if mask.shape[1:] != sides or mask.shape[0] not in (1, clip.shape[0]):
        raise ValueError(
            f"mask: a clip of shape {tuple(clip.shape)} takes {tuple(sides)} or {(clip.shape[0], *sides)}, "
            f"got {shape}"
        )
    return mask.to(clip.device, clip.dtype).expand(clip.shape[0], *sides).unsqueeze(1)


def blend(clean: Tensor, noisy: Tensor, mask: Tensor) -> Tensor:
    """Return `noisy` where the mask is 1 and, bit for bit, `clean` elsewhere; both [B, C, F, H, W], mask as in `batch_mask`.

    Raises: ValueError where the shapes differ, naming both.
    """
    if clean.shape != noisy.shape:
        raise ValueError(
            f"clean clip: as large as the noisy one, {tuple(noisy.shape)}, got {tuple(clean.shape)}"
        )
    return torch.where(batch_mask(mask, noisy) > 0, noisy, clean.to(noisy.device, noisy.dtype))


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of an error [B, C, F, H, W] over the generated sites of each clip, [B]; 0 where there are none."""
    weight = batch_mask(mask, error).expand_as(error)
    return (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1)


def given_tokens(mask: Tensor, patch: int) -> Tensor:
    """Return which patches of `patch` x `patch` hold nothing to generate: [B, 1, F, H, W] or [B, 1, H, W] -> [B, N] bool."""
    sites = mask.squeeze(1)
    sites = sites.unsqueeze(1) if sites.dim() == 3 else sites  # [B, F, H, W]
    patches = sites.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [B, F, H / p, p, W / p, p]
    return ~(patches > 0).any(dim=5).any(dim=3).flatten(1)
