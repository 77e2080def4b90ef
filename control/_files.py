"""Adapters on disk: one safetensors file with the settings in its metadata, checked whole before anything is attached.

Keys are `transformer.<path of the module>.<part>`, so that plain diffusers reads those of the kinds it knows. Files of
other code bases are recognised by their content: a module of this package registers a `reader` for each layout it knows.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from control.base import Control, ControlAdapter, Refused
from dit.spec import parse

FORMAT = "1"
PREFIX = "transformer."
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_SAMPLED = 16  # values of each weight of the base that its digest looks at


@dataclass(frozen=True, slots=True)
class ControlFile:
    """What a file holds: weights by key as they stand there, metadata, and the file's name for messages."""

    weights: dict[str, Tensor]
    metadata: dict[str, str]
    name: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a file found its place: keys used of keys given, and those that found none."""

    used: int
    given: int
    left_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = f"{self.used}/{self.given} keys"
        return words + (f" (no place for {', '.join(self.left_over[:3])})" if self.left_over else "")


Reader = Callable[[ControlFile, nn.Module], tuple[Control, Mapping[str, Tensor]] | None]
_READERS: dict[str, Reader] = {}


def reader(name: str) -> Callable[[Reader], Reader]:
    """Register a function that returns settings and weights (keys of the adapter's `state_dict`) of a foreign layout.

    It returns None for a file of another layout, and raises Refused for one of its own that cannot be used.
    """

    def declare(function: Reader) -> Reader:
        _READERS[name] = function
        return function

    return declare


def read(path: str | Path) -> ControlFile:
    """Read a safetensors file, told by its content and not by its name.

    Raises: FileNotFoundError; Refused for a pickle (never opened), a broken file, no weights, or weights that are no numbers.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    with open(file, "rb") as stream:
        start = stream.read(9)
    # A safetensors file begins with the length of its header, which may look like a pickle's first bytes; the header follows.
    if start.startswith(_PICKLES) and not start.endswith(b"{"):
        raise Refused(
            f"{file.name} is a pickle, which can run code when it is read: where you trust its source, load it with "
            "torch.load(path, weights_only=True), take the state dict out of it and write that with "
            "safetensors.torch.save_file, then give the .safetensors file"
        )
    try:
        with safe_open(file, "pt") as opened:
            metadata = dict(opened.metadata() or {})
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # no mapping
    except SafetensorError as error:
        raise Refused(f"{file.name} is no whole safetensors file: {error}") from error
    if not weights:
        raise Refused(f"{file.name} holds no weights")
    for key, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise Refused(f"{file.name}: {key} holds values that are no finite numbers")
    return ControlFile(weights, metadata, file.name)


def load(path: str | Path, transformer: nn.Module, *, any_base: bool = False) -> ControlAdapter:
    """Return the adapter of a file, of ours or of a known foreign layout, for a transformer. Nothing is attached.

    Args:
        any_base: take it even where it was trained beside other weights of the transformer.

    Raises: FileNotFoundError; Refused for a file that cannot be read or does not fit, in words.
    """
    file = read(path)
    control, weights = _understood(file, transformer)
    _check_base(file, transformer, any_base)
    try:
        adapter = control.load(transformer, weights)
    except Refused as error:
        raise Refused(f"{file.name}: {error}") from error
    if adapter.coverage is None:
        adapter.coverage = Coverage(len(weights), len(file.weights))
    return adapter


def save(
    adapter: ControlAdapter,
    path: str | Path,
    transformer: nn.Module,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter with its settings, the transformer it fits and `about` (training facts, JSON) in the metadata.

    The file appears whole or not at all. Raises: Refused for a name that does not end in .safetensors.
    """
    from safetensors.torch import save_file

    file = Path(path)
    if file.suffix != ".safetensors":
        raise Refused(f"adapters are written as .safetensors, got {file.name}")
    metadata = {
        "control_format": FORMAT,
        "control": json.dumps(adapter.control.to_dict()),
        "backbone": json.dumps(backbone_of(transformer)),
        "base": base_digest(transformer) or "",
        "about": json.dumps(dict(about or {})),
    }
    weights = {PREFIX + key: x.detach().cpu().contiguous() for key, x in adapter.state_dict().items()}
    part = file.with_name(f".{file.name}.part")
    save_file(weights, part, metadata=metadata)
    part.replace(file)
    return file


def fitted(owner: str, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `given` if its keys and shapes are exactly those `wanted`. Raises: Refused naming what does not fit."""
    wrong = [f"missing {key}" for key in wanted if key not in given]
    wrong += [f"no place for {key}" for key in given if key not in wanted]
    wrong += [
        f"{key} is {tuple(given[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    if wrong:
        matched = sum(key in wanted for key in given)
        raise Refused(
            f"{owner}: weights do not fit ({matched} of {len(given)} keys have a place, {len(wrong)} problems): "
            + "; ".join(wrong[:4])
        )
    return dict(given)


def backbone_of(transformer: nn.Module) -> dict[str, Any]:
    """Return what an adapter's shapes depend on: class, counts of blocks in each stack, width of the first weight."""
    from dit.seams import blocks_of

    blocks = blocks_of(transformer)
    stacks: dict[str, int] = {}
    for block in blocks:
        stack = block.path.rsplit(".", 1)[0]
        stacks[stack] = stacks.get(stack, 0) + 1
    first: Any = (
        next((one for one in blocks.blocks[0].module.parameters() if one.dim() == 2), None)
        if len(blocks)
        else None
    )
    return {
        "class": type(transformer).__name__,
        "blocks": stacks,
        "width": None if first is None else int(first.shape[1]),
    }


@torch.no_grad()
def base_digest(transformer: nn.Module) -> str | None:
    """Return 16 hex digits of names, shapes and some values of all weights, rounded to bf16 so that a cast changes nothing.

    None where the weights are not at hand (meta device).
    """
    digest = hashlib.sha256()
    for name, weight in transformer.named_parameters():
        if weight.is_meta:
            return None
        if "lora_" in name:
            continue  # an adapter of peft is no part of the base
        some = weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLED)][:_SAMPLED]
        digest.update(f"{name.replace('.base_layer', '')}{tuple(weight.shape)}".encode())
        digest.update(some.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def grow(root: nn.Module, path: str, module: nn.Module) -> None:
    """Hang `module` below `root` at a dotted path, so that the keys of the state dict read like the transformer's."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]  # never None: it was added here
    root.add_module(last, module)


def _understood(file: ControlFile, transformer: nn.Module) -> tuple[Control, Mapping[str, Tensor]]:
    """Find settings and weights: by the metadata of our files, or by a reader that knows the layout."""
    import_all()
    given = file.metadata.get("control_format")
    if given is not None:
        if given != FORMAT:
            raise Refused(f"{file.name}: control_format is {given}, this version reads {FORMAT}")
        try:
            control = parse(Control, json.loads(file.metadata["control"]))
            made_for = json.loads(file.metadata["backbone"])
        except (KeyError, ValueError) as error:
            raise Refused(f"{file.name}: its settings cannot be read: {error}") from error
        if made_for != backbone_of(transformer):
            raise Refused(f"{file.name} is for {_told(made_for)}, this is {_told(backbone_of(transformer))}")
        return control, {key.removeprefix(PREFIX): x for key, x in file.weights.items()}
    for known in _READERS.values():
        found = known(file, transformer)
        if found is not None:
            return found
    keys = ", ".join(list(file.weights)[:2])
    raise Refused(
        f"{file.name} is no adapter of a known layout (known: ours, {', '.join(sorted(_READERS))}); its keys begin with {keys}"
    )


def _told(backbone: Mapping[str, Any]) -> str:
    blocks = " + ".join(f"{count} {name}" for name, count in dict(backbone.get("blocks", {})).items())
    return f"{backbone.get('class')} of width {backbone.get('width')} with {blocks or 'no blocks'}"


def _check_base(file: ControlFile, transformer: nn.Module, any_base: bool) -> None:
    trained_on = file.metadata.get("base")
    here = base_digest(transformer) if trained_on and not any_base else None
    if here is not None and trained_on != here:
        raise Refused(
            f"{file.name} was trained beside other weights (digest {trained_on}, these have {here}); "
            "any_base=True takes it all the same"
        )


def import_all() -> None:
    """Import the modules of this package, so that every kind and every reader is registered."""
    package = importlib.import_module("control")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_") and not module.ispkg:
            importlib.import_module(f"control.{module.name}")
