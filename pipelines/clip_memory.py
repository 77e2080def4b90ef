"""How much memory a clip takes, estimated from configs before any weights load; too long a clip is refused with numbers.

Paper: none; sums of what a run holds at once. Every figure is an estimate, and says so.
Differs: frameworks allocate until they fail, minutes into a run.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pipelines.catalog import Card, Unavailable, device_for, dtype_for
from pipelines.clip_calls import frames_of, made_at_once
from pipelines.request import Request, RequestError

LAYER_COPIES = 24
"""Rows as wide as the network that one block holds at once for each token: input, norms, queries, keys, values, hidden layer."""
PICTURE_COPIES = 3
"""Copies of the decoded frames in float32 that stand side by side: out of the decoder, as an array, as pictures."""


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a run takes: weights on disk, one block of the network at its widest, and the decoded frames."""

    weights: int
    network: int
    frames: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.network + self.frames

    def __str__(self) -> str:
        parts = dataclasses.asdict(self)
        return f"{_gb(self.total)} (" + ", ".join(f"{name} {_gb(size)}" for name, size in parts.items()) + ")"


def estimate(request: Request, card: Card, folder: Path, came: int | None = None) -> Estimate | None:
    """Return what a request's clip takes, None where its size is not known before the model is loaded.

    `came` counts the frames of the clip that is given.
    """
    config = _config(folder / "transformer" / "config.json")
    frames = frames_of(request, card, came)
    wide, high = request.width or card.width, request.height or card.height
    if not isinstance(frames, int) or wide is None or high is None:
        return None
    width = config.get("width") or config.get("hidden_size")
    if width is None:
        width = (config.get("num_attention_heads") or 1) * (config.get("attention_head_dim") or 64)
    # `multiple` is the side of a patch in picture pixels: every patch is one token
    tokens = made_at_once(request, card, frames) * -(-high // card.multiple) * -(-wide // card.multiple) // _ratio(folder)
    bytes_of = 4 if request.dtype == "float32" or (request.dtype == "auto" and card.dtype == "float32") else 2
    branches = 1 if request.guidance == 1.0 else 2
    weights = sum(one.stat().st_size for one in folder.glob("*/*.safetensors"))
    return Estimate(
        weights,
        max(1, tokens) * int(width) * bytes_of * LAYER_COPIES * branches,
        frames * wide * high * 12 * PICTURE_COPIES,
    )


def check_memory(request: Request, card: Card, folder: Path, came: int | None = None) -> None:
    """Refuse a clip that cannot fit, as `estimate` counts. Raises: RequestError with the estimate and what there is."""
    if card.task != "text-to-video":
        return
    found = estimate(request, card, folder, came)
    if found is None:
        return
    try:
        device = device_for(request.device)
    except Unavailable:
        return  # loading says that better
    room, where = memory_of(device)
    # frames are kept by the processor, the network and its weights by the device
    needed = found.total if device == "cpu" else found.weights + found.network
    if needed <= room:
        return
    frames = frames_of(request, card, came) or 1
    per_frame = (found.frames + found.network) / frames
    fits = int((room - found.weights) / per_frame) if room > found.weights else 0
    what = f"at most {fits} frames of this size" if fits else "fewer frames of a smaller size"
    raise RequestError(
        "frames", frames, f"{what}: an estimated {found} are needed in {dtype_for(request.dtype, card, device)}, {where} has"
        f" {_gb(room)}",
    )  # fmt: skip


def memory_of(device: str) -> tuple[int, str]:
    """Return the bytes of memory that a device has in all, and its name."""
    import torch

    if device.startswith("cuda"):
        index = torch.device(device).index or 0
        return int(torch.cuda.get_device_properties(index).total_memory), str(
            torch.cuda.get_device_name(index)
        )
    import psutil

    return int(psutil.virtual_memory().total), "this computer"


def _ratio(folder: Path) -> int:
    config = _config(folder / "vae" / "config.json")
    for key in ("scale_factor_temporal", "temporal_compression_ratio"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return 1


def _config(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
