"""Clips longer than a network was made for: windows that overlap, each going on from the one before; prompts by frame.

Paper: VDT: General-purpose Video Diffusion Transformers via Mask Modeling, Lu et al. 2023, arXiv:2305.13311 (prediction).
Differs: what is given is given of the whole clip, and every window is told its part; every window is as long as the first, the last
one overlapping more; what is handed on are latents, so no codec wears them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from pipelines.clips import Task
from pipelines.denoising import check_choice
from pipelines.request import RequestError
from pipelines.text_to_video import ClipOutput, Shown

Prompts = str | Mapping[int, str] | Sequence[tuple[int, int, str]] | None
"""One prompt; "a | b | c" for parts of equal length; first frame -> prompt; or (first frame, frame after the last, prompt)."""


def prompt_schedule(prompts: Prompts, frames: int) -> dict[int, str] | None:
    """Return first frame -> prompt, from 0 and in order; None for no prompt.

    Raises:
        RequestError: no prompt for frame 0, segments with gaps or overlaps, or frames that the clip does not have.
    """
    if prompts is None:
        return None
    if isinstance(prompts, str):
        parts = [one.strip() for one in prompts.split("|")]
        if len(parts) > frames:
            raise RequestError("prompt", len(parts), f"at most one for each of the {frames} frames")
        return {round(i * frames / len(parts)): one for i, one in enumerate(parts)}
    if not isinstance(prompts, Mapping):
        segments = sorted(prompts)
        broken = [f"{a[:2]} and {b[:2]}" for a, b in pairwise(segments) if a[1] != b[0]]
        if not segments or broken or segments[-1][1] != frames:
            raise RequestError(
                "prompt", broken or segments, f"segments one after the other from frame 0 to {frames}"
            )
        prompts = {start: text for start, _, text in segments}
    if min(prompts, default=1) != 0 or max(prompts) >= frames:
        raise RequestError(
            "prompt", sorted(prompts), f"prompts by first frame, from 0 to at most {frames - 1}"
        )
    return dict(sorted(prompts.items()))


def windows(frames: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """Return (first frame, count of given frames) of every window; all are `window` long, none reaches past the clip.

    Raises: RequestError for an overlap that leaves nothing to make, or gives nothing to go on from.
    """
    if window < 2:
        raise RequestError("window", window, "2 frames or more: one that is given, and one that is made")
    if not 1 <= overlap < window:
        raise RequestError("overlap", overlap, f"from 1 to {window - 1} frames of a window of {window}")
    found, done = [(0, 0)], window
    while done < frames:
        start = min(done - overlap, frames - window)
        found.append((start, done - start))
        done = start + window
    return found


@dataclass(frozen=True, slots=True)
class Window:
    """Frames of a clip that are made in one run: all of them from `start` to before `end`, and those of them that are new."""

    start: int
    end: int
    new: slice


def planned(mask: Tensor | None, frames: int, window: int, overlap: int) -> list[Window]:
    """Return the windows that leave something to make, in the order in which they are made.

    Args:
        mask: 1 at what is made of the whole clip [F, h, w]; None for all of it. Where the end is given and nothing of the first
            frame, windows go from the end to the beginning.

    Raises: RequestError, see `windows`.
    """
    plan = [(0, 0)] if window >= frames else windows(frames, window, overlap)
    window = min(window, frames)
    found = [Window(start, start + window, slice(start + known, start + window)) for start, known in plan]
    if mask is None:
        return found
    if mask[0].all() and not mask[-1].all():
        found = [
            Window(frames - one.end, frames - one.start, slice(frames - one.end, frames - one.new.start))
            for one in found
        ]
    return [one for one in found if mask[one.new].any()]


def layout(
    pipeline: Any, *, num_frames: int, window: int, overlap: int, video: Any = None, image: Any = None, last_image: Any = None,
    given_latents: Tensor | None = None, task: str | Task | None = None, mask: Any = None, height: int | None = None,
    width: int | None = None, **_: Any,
) -> list[Window]:  # fmt: skip
    """Return the windows for arguments of `long_clip`, before anything is made or encoded. Raises: RequestError."""
    came = _Came(video, image, last_image, given_latents, task, mask)
    return planned(came.mask(pipeline, num_frames, height, width), num_frames, window, overlap)


@dataclass(frozen=True, slots=True)
class _Came:
    """What is given of a clip, as it came."""

    video: Any
    image: Any
    last_image: Any
    latents: Tensor | None
    task: str | Task | None
    own: Any

    def mask(self, pipeline: Any, frames: int, height: int | None, width: int | None) -> Tensor | None:
        """Return 1 at what is made [F, h, w], None where nothing is given."""
        about, count = pipeline.about(
            self.video, self.image, self.last_image, self.latents, self.task, self.own
        )
        high, wide = pipeline._size(height, width)
        scale = pipeline.scale_factor
        found: Tensor = about.of(frames, high // scale, wide // scale, count)
        return None if found.all() else found

    def shown(self, pipeline: Any, frames: int, height: int | None, width: int | None) -> Shown | None:
        """Return what is given of the whole clip."""
        size = (frames, *pipeline._size(height, width))
        found: Shown | None = pipeline.shown(
            self.video, self.image, self.last_image, self.latents, self.task, self.own, 1, size
        )
        return found


def long_clip(
    pipeline: Any,
    prompt: Prompts = None,
    *,
    num_frames: int,
    window: int | None = None,
    overlap: int | None = None,
    seeds: Sequence[int] = (0,),
    output_type: str = "pil",
    on_window: Callable[[int, int, Tensor], None] | None = None,
    **more: Any,
) -> ClipOutput:
    """Make one clip of `num_frames` frames by windows.

    Args:
        pipeline: a `TextToVideoPipeline`.
        prompt: see `Prompts`; every frame hears its own, or, of a network that cannot do that, all frames of a window hear the
            prompt of its first new one.
        window: frames of a window; by default as many as the network was made for. overlap: how many of them are given; half.
        seeds: one, from which all windows draw in turn, or one for each window.
        on_window: called as on_window(index, count of windows, latents so far [1, C, F, h, w]) after every window, so that they
            can be kept; `pipeline.decode_latents` makes frames of them.
        more: what else the pipeline takes; `video`, `image`, `last_image`, `given_latents`, `task` and `mask` are of all the clip.

    Raises:
        RequestError: counts of frames, prompts or seeds that do not fit each other.
    """
    window = int(pipeline.transformer.config.frames) if window is None else window
    window = min(window, num_frames)
    check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
    if window < 1:
        raise RequestError("num_frames", num_frames, "at least 1")
    came = _Came(
        *(more.pop(name, None) for name in ("video", "image", "last_image", "given_latents", "task", "mask"))
    )
    size = (num_frames, more.get("height"), more.get("width"))
    mask = came.mask(pipeline, *size)
    plan = planned(mask, num_frames, window, window // 2 if overlap is None else overlap)
    prompts = prompt_schedule(prompt, num_frames)
    if len(seeds) not in (1, len(plan)):
        raise RequestError("seeds", len(seeds), f"one, or one for each of the {len(plan)} windows")
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
    shown = None if mask is None else came.shown(pipeline, *size)
    latents: Tensor | None = None if shown is None else shown.latents.clone()
    open_sites = torch.ones(num_frames, 1, 1) if mask is None else mask.clone()
    for index, one in enumerate(plan):
        part = slice(one.start, one.end)
        given: dict[str, Any] = dict(more)
        if latents is not None and not open_sites[part].all():
            given |= {
                "given_latents": latents[:, :, part],
                "task": Task(mask=_sites(open_sites[part], latents)),
            }
        given |= _heard(pipeline, prompts, one)
        generator = generators[index if len(generators) > 1 else 0]
        made = pipeline(num_frames=window, generator=[generator], output_type="latent", **given)
        if made.latents is None:  # interrupted
            return ClipOutput(frames=[], latents=_so_far(latents, plan[:index]))
        if latents is None:
            latents = made.latents.new_zeros(*made.latents.shape[:2], num_frames, *made.latents.shape[3:])
        new = slice(one.new.start - one.start, one.new.stop - one.start)
        latents[:, :, one.new] = made.latents[:, :, new]
        open_sites[one.new] = 0
        if on_window is not None:
            on_window(index, len(plan), _so_far(latents, plan[: index + 1]))
    assert latents is not None
    return ClipOutput(pipeline.decode_latents(latents, output_type, shown), latents, shown)


def _sites(mask: Tensor, latents: Tensor) -> Tensor:
    """Return a mask [F, 1 or h, 1 or w] at the size of latents [1, C, F, h, w]."""
    return mask.expand(-1, *latents.shape[-2:])


def _so_far(latents: Tensor | None, done: Sequence[Window]) -> Any:
    """Return the latents from the first to the last frame that was made, with what is given between; None before the first."""
    if latents is None or not done:
        return None
    return latents[:, :, min(one.start for one in done) : max(one.end for one in done)]


def _heard(pipeline: Any, prompts: Mapping[int, str] | None, window: Window) -> dict[str, Any]:
    """Return the prompt of a window; where every frame can hear its own, the captions of all its frames."""
    if prompts is None:
        return {}

    def at(frame: int) -> int:
        return max(first for first in prompts if first <= frame)

    if len(prompts) == 1 or not pipeline.tells_scenes:
        return {"prompt": prompts[at(window.new.start)]}
    captions = [(first, len(list(same))) for first, same in groupby(range(window.start, window.end), at)]
    if len(captions) == 1:
        return {"prompt": prompts[captions[0][0]]}
    return {
        "prompt": [prompts[first] for first, _ in captions],
        "caption_frames": [count for _, count in captions],
    }
