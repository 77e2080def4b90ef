"""What a request says about control: adapters with their conditions, and LoRAs, each as text, as a dictionary and as an object.

    edges=pic.png:0.8                       a picture, made into the condition that the adapter was trained with
    edges@canny:low=0.1,high=0.2=pic.png    by these settings in place of the adapter's own
    edges=lines.png:1,raw=true,end=0.5      a picture that is a condition already, in the first half of the steps
    style.safetensors:0.7,start=0.2         a LoRA

Nothing that is named here is opened before `generate` does it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines._adapter_files import FOLDER, AdapterFile, adapters_in, read_adapter
from pipelines._choices import KINDS, ControlChoice, LoRAChoice, Steering, read_all
from pipelines.request import RequestError

__all__ = [
    "KINDS", "AdapterFile", "ControlChoice", "LoRAChoice", "Steering", "adapters", "add_files", "add_options", "confirmed",
    "described", "files", "fits", "given", "noted", "preview", "read_all", "steered", "steering",
]  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --control and --lora to a command."""
    for flag, kind, words in (
        ("--control", ControlChoice, "steer by a picture, e.g. edges=pic.png:0.8"),
        ("--lora", LoRAChoice, "add a LoRA, e.g. style.safetensors:0.7"),
    ):
        parser.add_argument(
            flag,
            dest=kind.field,
            action="append",
            metavar=kind.allowed.removeprefix("written "),
            help=f"{words}; repeatable",
        )


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a request that --control and --lora gave."""
    named = {kind.field: getattr(options, kind.field, None) for kind in KINDS}
    return {field: values for field, values in named.items() if values}


def add_files(parser: argparse.ArgumentParser) -> None:
    """Add what a picture's file names to steer with, for a person to name it again."""
    parser.add_argument("--mask", metavar="FILE", help="the mask, where there was one")
    add_options(parser)


def files(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `add_files` was given."""
    return given(options) | ({} if options.mask is None else {"mask": options.mask})


def confirmed(request: Any, was: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mask, controls and LoRAs of a picture's request as a person has named them again.

    A file cannot choose what is opened; a shipped model's own LoRAs alone need no word.

    Raises: RequestError telling what the file was made with.
    """
    from pipelines import catalog

    strange = [name for name in named if name not in ("mask", *(kind.field for kind in KINDS))]
    if strange:
        raise TypeError(f"repro() got an unexpected argument {strange[0]!r}")
    own = adapters_in(catalog.CHECKPOINTS / request.model) if request.model in catalog.shipped() else {}
    changes: dict[str, Any] = {name: value for name, value in named.items() if value}
    told = was.get("steering")
    rows = told.get("parts") if isinstance(told, Mapping) else None
    for kind, flag in ((ControlChoice, "--control"), (LoRAChoice, "--lora")):
        asked = getattr(request, kind.field)
        free = kind is LoRAChoice and all(one.file in own and one.region is None for one in asked)
        if asked and kind.field not in changes and not free:
            made = [
                f"{one.get('given')} (sha256 {str(one.get('sha256'))[:16]})"
                for one in rows or ()
                if isinstance(one, Mapping) and one.get("field") == kind.field
            ]
            shown = "; ".join(made)[:600] or [one.text for one in asked]
            raise RequestError(
                kind.field, shown, f"given again with {flag}: a file cannot choose what is opened"
            )
    mask = was.get("mask")
    from pipelines._inpainting import written

    if request.mask is not None and "mask" not in changes and not written(request.mask):
        name = mask.get("name") if isinstance(mask, Mapping) else None
        raise RequestError("mask", name, "given again with --mask: a file cannot choose what is opened")
    return changes


def steered(request: Any, card: Any, folder: Path, inputs: Any) -> Any:
    """Read and check what a request steers with and what it fills in, before weights load; return the inputs with it.

    Raises: RequestError, also for an adapter of another model.
    """
    if not (request.controls or request.loras or request.mask):
        return inputs
    from pipelines import _inpainting, _steering_files

    part = _inpainting.prepare(request, card, inputs.image)
    image = inputs.image if part is None else part.image  # on a larger canvas, where more is made around it
    size = None if image is None else image.size
    found = _steering_files.prepare(request, folder, card, size)
    mask = {} if part is None else {"mask": part.digest}
    return dataclasses.replace(
        inputs, image=image, steering=found, inpainting=part, digests=inputs.digests | mask | found.digests()
    )


def fits(request: Any, card: Any, folder: Path) -> None:
    """Check the adapters that a request names, without its pictures, for a table of requests; no weights of a model load.

    Raises: RequestError, also for an adapter of another model.
    """
    if request.controls or request.loras:
        from pipelines import _steering_files

        _steering_files.check(request, folder, card)


@contextlib.contextmanager
def steering(pipeline: Any, given: dict[str, Any], request: Any, inputs: Any) -> Iterator[None]:
    """Let a request's controls, LoRAs and mask act on what a pipeline makes inside; they go outside of accelerators."""
    with contextlib.ExitStack() as stack:
        if inputs.inpainting is not None:
            stack.enter_context(inputs.inpainting.attached(pipeline, given, request))
        if inputs.steering is not None:
            stack.enter_context(inputs.steering.attached(pipeline, given))
        yield


def noted(inputs: Any, summary: str) -> dict[str, Any]:
    """Return the part of a picture's report about control, and its summary with the adapters in it."""
    told = {} if inputs.steering is None else inputs.steering.report()
    if not told:
        return {}
    words = inputs.steering.summary()
    return {"steering": told, "summary": f"{summary}; {words}" if words else summary}


def adapters(model: str) -> list[AdapterFile]:
    """Return a model's own adapters, as a page lists them. Raises: RequestError for a model that cannot be found."""
    from pipelines import catalog

    source = catalog.find(model)
    folder = source.folder
    return [] if folder is None else [read_adapter(path) for path in adapters_in(folder).values()]


def preview(condition: str, source: Any, size: tuple[int, int] | None = None) -> Any:
    """Return the picture that an adapter would be given of `source`, a path, bytes or a Pillow picture.

    Args:
        condition: the text form, as `AdapterFile.condition` tells it. size: width and height of what is to be made, px.

    Raises: RequestError for an unknown condition, or a picture that cannot be read or holds nothing of it.
    """
    from control.conditions import preview as shown

    try:
        return shown(condition, source, size)
    except ValueError as error:
        raise RequestError("condition", condition, f"one that works here: {error}") from None


def described(path: Path) -> dict[str, Any]:
    """Return what an adapter's file is, and of the shipped model it fits how many of its keys find a place there.

    Empty for weights that are no adapter. Raises: RequestError for a file that is refused.
    """
    file = read_adapter(path)
    if not file.steers:
        return {}
    from pipelines import catalog
    from pipelines._steering_files import fit_among

    places = [catalog.CHECKPOINTS / name for name in catalog.shipped()]
    if path.parent.name == FOLDER and path.parent.parent not in places:
        places.insert(0, path.parent.parent)
    fits = fit_among(path, places)
    return file.to_dict() | fits
