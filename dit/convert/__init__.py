"""Official checkpoints in, our models out: `load_official("DiT-XL-2-256x256.safetensors", "DiT")`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.convert.base import LayoutError, System, UnknownSystemError, find, load, systems

__all__ = [
    "LayoutError", "System", "UnknownSystemError", "convert", "find", "load_official", "read_safetensors", "systems",
]  # fmt: skip

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def load_official(
    path: str | Path, system: str, *, settings: Mapping[str, Any] | None = None, **args: Any
) -> Any:
    """Return our model, in evaluation mode, with the weights of an official .safetensors file.

    Args:
        path: the file. system: the official name of its code base ("DiT", "SiT", ...).
        settings: further settings that the system needs beside its constructor (`run` of a fixture).
        args: the official constructor's arguments where they differ from its defaults.

    Raises:
        FileNotFoundError, ValueError: no such file, a pickle, no safetensors, an unknown system, or weights that do not fit.
    """
    return convert(read_safetensors(path), system, args, settings)


def convert(
    state: Mapping[str, Tensor],
    system: str,
    args: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """Return our model with official weights that were read already; meta tensors give a model on the meta device.

    Raises: UnknownSystemError, LayoutError.
    """
    found = find(system)
    with torch.device("meta"):
        model = found.build(args, settings or {})
    load(model, found.to_ours(state, model), system)
    return model.eval()


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, told by its content and not by its name.

    Raises: FileNotFoundError; ValueError for a pickle (never opened) or a file that is no whole safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path)
    with open(file, "rb") as stream:
        start = stream.read(4)
    if start.startswith(_PICKLES):
        raise ValueError(
            f"{file.name} is a pickle, which can run code when it is read: where you trust its source, load it with "
            "torch.load(path, weights_only=True), take the state dict out of it (its 'ema' or 'model' part, if it has one) "
            "and write that with safetensors.torch.save_file, then come back with the .safetensors file"
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file.name} is no whole safetensors file: {error}") from error
