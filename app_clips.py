"""What the page shows of a clip beside its player: a strip of its frames, and a line of the scenes that its captions are of."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path

from pipelines.request import Request, RequestError
from pipelines.schedule import read_numbers, read_prompts, spread
from pipelines.timeline import safe
from pipelines.video_files import read_clip

SHOWN, HEIGHT = 8, 72
"""Frames of a strip, evenly spaced with the first and the last; their height in px."""


def beside(request: Request, path: Path, frames: int) -> str:
    """Return strip and scenes of a saved clip of `frames` frames, as HTML; nothing for a still picture."""
    return "" if frames < 2 else f"{strip(path)}{scenes(request, frames)}"


def strip(path: Path) -> str:
    """Return some frames of a clip's file, each with its number; nothing where the file cannot be read any more."""
    try:
        return _strip(str(path), path.stat().st_mtime_ns)
    except (RequestError, OSError):
        return ""


@functools.lru_cache(maxsize=32)
def _strip(path: str, _changed: int) -> str:
    from PIL import Image

    frames, _ = read_clip(path)
    count = min(SHOWN, len(frames))
    numbers = [round(place * (len(frames) - 1) / max(count - 1, 1)) for place in range(count)]
    cells = []
    for number in numbers:
        frame = frames[number].convert("RGB")
        width = max(1, round(frame.width * HEIGHT / frame.height))
        way = Image.Resampling.NEAREST if frame.height <= HEIGHT else Image.Resampling.LANCZOS
        file = io.BytesIO()
        frame.resize((width, HEIGHT), way).save(file, "PNG")
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        cells.append(
            f'<figure style="margin:0"><img src="{source}" width="{width}" height="{HEIGHT}" alt="Frame {number}">'
            f'<figcaption style="font-size:12px;text-align:center">{number}</figcaption></figure>'
        )
    return (
        f'<h3>Frames</h3><div class="scroll strip" tabindex="0" role="group" aria-label="{count} of {len(frames)} frames" '
        f'style="display:flex;gap:4px">{"".join(cells)}</div>'
    )


def scenes(request: Request, frames: int) -> str:
    """Return a line of a clip's scenes, each as wide as it is long, with its caption; nothing where there is one caption."""
    found = parts(request, frames)
    if len(found) < 2:
        return ""
    bars = "".join(
        f'<div style="flex:{end - start} 1 0;min-width:0;padding:3px 8px;border-left:3px solid #b45309;'
        f'overflow-wrap:anywhere" title="{safe(text)}"><b>{start}–{end - 1}</b> {safe(text)}</div>'
        for start, end, text in found
    )
    return (
        f'<h3>Scenes</h3><div class="scenes" role="group" aria-label="{len(found)} scenes of {frames} frames" '
        f'style="display:flex;gap:2px;font-size:12.5px">{bars}</div>'
    )


def parts(request: Request, frames: int) -> list[tuple[int, int, str]]:
    """Return first frame, frame after the last, and caption of each scene; those of a withheld or unreadable schedule are none."""
    if not request.prompts:
        return []
    try:
        told = read_prompts(request.prompts)
        if request.scene_frames is None:
            return spread(told, frames)
        lengths = read_numbers("scene_frames", request.scene_frames, low=1, high=1000)
    except RequestError:
        return []
    lengths = lengths * len(told) if len(lengths) == 1 else lengths
    ends = [sum(lengths[: place + 1]) for place in range(len(lengths))]
    return [(end - length, end, one.text) for one, length, end in zip(told, lengths, ends, strict=False)]
