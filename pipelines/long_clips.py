"""Clips longer than a network was made for: windows that overlap, each going on from the end of the one before; prompts by frame.

Paper: VDT: General-purpose Video Diffusion Transformers via Mask Modeling, Lu et al. 2023, arXiv:2305.13311 (prediction).
Differs: every window is as long as the first, the last one overlapping more; what is handed on are latents, so no codec wears
them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pipelines.clips import Task
from pipelines.denoising import check_choice
from pipelines.request import RequestError
from pipelines.text_to_video import ClipOutput

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
    if not 1 <= overlap < window:
        raise RequestError("overlap", overlap, f"from 1 to {window - 1} frames of a window of {window}")
    found, done = [(0, 0)], window
    while done < frames:
        start = min(done - overlap, frames - window)
        found.append((start, done - start))
        done = start + window
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
        prompt: see `Prompts`; a window is made by the prompt at its first new frame.
        window: frames of a window; by default as many as the network was made for. overlap: how many of them are given; half.
        seeds: one, from which all windows draw in turn, or one for each window.
        on_window: called as on_window(index, count of windows, latents so far [1, C, F, h, w]) after every window, so that they
            can be kept; `pipeline.decode_latents` makes frames of them.
        more: what else the pipeline takes; `video`, `image`, `last_image`, `task` and `mask` are of the first window.

    Raises:
        RequestError: counts of frames, prompts or seeds that do not fit each other.
    """
    window = int(pipeline.transformer.config.frames) if window is None else window
    window = min(window, num_frames)
    check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
    if window < 1:
        raise RequestError("num_frames", num_frames, "at least 1")
    plan = (
        [(0, 0)]
        if window == num_frames
        else windows(num_frames, window, window // 2 if overlap is None else overlap)
    )
    prompts = prompt_schedule(prompt, num_frames)
    if len(seeds) not in (1, len(plan)):
        raise RequestError("seeds", len(seeds), f"one, or one for each of the {len(plan)} windows")
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
    shown: Any = None
    latents: Tensor | None = None
    given: dict[str, Any] = dict(more)
    for index, (start, known) in enumerate(plan):
        if latents is not None:
            for name in ("video", "image", "last_image", "mask"):
                given.pop(name, None)
            given |= {"given_latents": latents[:, :, start:], "task": Task(name="predict", given=known)}
        if prompts is not None:
            given["prompt"] = prompts[max(first for first in prompts if first <= start + known)]
        generator = generators[index if len(generators) > 1 else 0]
        made = pipeline(num_frames=window, generator=[generator], output_type="latent", **given)
        if made.latents is None:  # interrupted
            return ClipOutput(frames=[], latents=latents)
        shown = made.shown if latents is None else shown
        new = made.latents[:, :, known:]
        latents = new if latents is None else torch.cat([latents, new], dim=2)
        if on_window is not None:
            on_window(index, len(plan), latents)
    assert latents is not None
    whole = None if shown is None else shown.padded(num_frames)
    return ClipOutput(pipeline.decode_latents(latents, output_type, whole), latents, whole)
