"""How much memory a clip takes, estimated from configs before any weights load; too long a clip is refused with numbers.

Paper: none; sums of what a run holds at once. Every figure is an estimate, and says so.
Differs: frameworks allocate until they fail, minutes into a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.catalog import Card, Unavailable, codec_factor, device_for, dtype_for, read_config
from pipelines.clip_calls import frames_of, made_at_once
from pipelines.families import OWN, Face, ratio_in
from pipelines.inputs import NOTHING, Inputs
from pipelines.request import Request, RequestError

LAYER_COPIES = 24
"""Rows as wide as the network that one block holds at once for each token: input, norms, queries, keys, values, hidden layer."""
PICTURE_COPIES = 3
"""Copies of the decoded frames in float32 that stand side by side: out of the decoder, as an array, as pictures."""
DECODER_COPIES = 2
"""Copies of a decoder's last layer that stand side by side: what goes into a convolution and what comes out."""
_AT_ONCE = {"AutoencoderKLWan": 4, "AutoencoderKLCogVideoX": 8, "AutoencoderKLHunyuanVideo": 16}
"""Frames that diffusers' decoders of clips make at once, by themselves; of others all."""


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a run takes: weights on disk, one block of the network and the decoder at their widest, and the decoded frames."""

    weights: int
    network: int
    decoder: int
    frames: int

    @property
    def total(self) -> int:
        """All of it; the network is done when the decoder begins."""
        return self.weights + self.worked + self.frames

    @property
    def worked(self) -> int:
        """What the network or the decoder takes, whichever is more."""
        return max(self.network, self.decoder)

    def __str__(self) -> str:
        parts = dataclasses.asdict(self)
        return f"{_gb(self.total)} (" + ", ".join(f"{name} {_gb(size)}" for name, size in parts.items()) + ")"


def estimate(request: Request, card: Card, folder: Path, inputs: Inputs = NOTHING) -> Estimate | None:
    """Return what a request's clip takes, None where its size is not known before the model is loaded."""
    config, vae = (read_config(folder / part / "config.json") for part in ("transformer", "vae"))
    frames, wide, high = _sizes(request, card, folder, inputs)
    if frames is None or wide is None or high is None:
        return None
    width = config.get("width") or config.get("hidden_size")
    if width is None:
        width = (config.get("num_attention_heads") or 1) * (config.get("attention_head_dim") or 64)
    # `multiple` is the side of a patch in picture pixels: every patch is one token
    latents = -(-made_at_once(request, card, frames) // ratio_in(vae))
    tokens = latents * -(-high // card.multiple) * -(-wide // card.multiple)
    bytes_of = 4 if request.dtype == "float32" or (request.dtype == "auto" and card.dtype == "float32") else 2
    branches = 2 if card.pipeline in OWN and request.guidance != 1.0 else 1  # diffusers' families may take them one by one
    weights = sum(one.stat().st_size for one in folder.glob("*/*.safetensors"))
    decoded = 0 if request.tiling or not vae else min(frames, _AT_ONCE.get(str(vae.get("_class_name")), frames))
    pixels = decoded * wide * high // _patch(vae) ** 2
    return Estimate(
        weights,
        max(1, tokens) * int(width) * bytes_of * LAYER_COPIES * branches,
        pixels * _channels(vae) * bytes_of * DECODER_COPIES,
        frames * wide * high * 12 * PICTURE_COPIES,
    )


def check_memory(request: Request, card: Card, folder: Path, inputs: Inputs = NOTHING) -> None:
    """Refuse a clip that cannot fit, as `estimate` counts, in all the memory that there is.

    Weights that a GPU has no room for can wait beside it (`pipelines.ladder`): there what is worked on alone has to fit.

    Raises: RequestError with the estimate and what there is.
    """
    if card.task != "text-to-video":
        return
    found = estimate(request, card, folder, inputs)
    if found is None:
        return
    try:
        device = device_for(request.device)
    except Unavailable:
        return  # loading says that better
    room, where = memory_of(device)
    needed, fixed = (found.total, found.weights) if device == "cpu" else (found.worked, 0)
    if needed <= room:
        return
    frames = _sizes(request, card, folder, inputs)[0] or 1
    fits = int((room - fixed) / ((needed - fixed) / frames)) if room > fixed else 0
    what = f"at most {fits} frames of this size" if fits else "fewer frames of a smaller size"
    if found.decoder > found.network:
        what += ", or tiling"
    raise RequestError(
        "frames", frames, f"{what}: an estimated {found} are needed in {dtype_for(request.dtype, card, device)}, {where} has"
        f" {_gb(room)}",
    )  # fmt: skip


def _sizes(request: Request, card: Card, folder: Path, inputs: Inputs) -> tuple[int | None, int | None, int | None]:
    """Return frames, width and height in px of a clip: asked for, given, or a family's own defaults; None where not known."""
    face = None if card.pipeline in OWN else Face.in_folder(folder)
    if face is None:
        return frames_of(request, card, len(inputs.clip)), request.width or card.width, request.height or card.height
    config, factor = read_config(folder / "transformer" / "config.json"), codec_factor(folder)
    own = {
        "num_frames": config.get("sample_frames"),  # CogVideoX keeps its defaults there
        **{name: side * factor for name in ("width", "height") if isinstance(side := config.get(f"sample_{name}"), int)},
    } | {name: value for name, value in face.defaults.items() if value is not None}
    goes_on = face.name.startswith("LTX")  # others make the given clip over
    frames = request.frames or (None if goes_on else len(inputs.clip)) or own.get("num_frames")
    shown = inputs.image if request.width is None and request.height is None else None
    if shown is not None:
        wide, high = (max(card.multiple, side // card.multiple * card.multiple) for side in shown.size)
        return frames, wide, high
    return frames, request.width or own.get("width"), request.height or own.get("height")


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


def _patch(vae: Mapping[str, Any]) -> int:
    """Return the side of the squares of pixels that a decoder's last layer makes."""
    patch = vae.get("patch_size")
    return patch if isinstance(patch, int) and patch > 0 else 1


def _channels(vae: Mapping[str, Any]) -> int:
    """Return the channels of a decoder's last layer but one."""
    for key in ("decoder_block_out_channels", "block_out_channels"):
        if isinstance(vae.get(key), list) and vae[key]:
            return int(vae[key][0])
    return int(vae.get("decoder_base_dim") or vae.get("base_dim") or 0)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
