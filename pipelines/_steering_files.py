"""The files that a request names to steer with, read and checked before any weights of a model load."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from control._files import load
from control.base import ControlAdapter, Refused
from control.conditions import (
    Array,
    Condition,
    colour_of,
    condition_of,
    fitted,
    flat,
    grey_of,
    read_picture,
    resized,
)
from dit.spec import parse
from pipelines._adapter_files import digest_of_file, find_adapter, read_adapter
from pipelines._steering import NOTHING, Part, Steered, error_of
from pipelines.catalog import Card
from pipelines.controls import ControlChoice, LoRAChoice, Steering
from pipelines.request import Request, RequestError

_fitting: OrderedDict[Any, None] = OrderedDict()  # files that were seen to fit a model's folder


def prepare(request: Request, folder: Path, card: Card, size: tuple[int, int] | None = None) -> Steered:
    """Read and check all that a request names to steer with; no weights of a model are loaded.

    Args:
        size: of the starting picture, for models whose card tells no size.

    Raises:
        RequestError: a file that is missing, refused or broken, an adapter for another model, a picture that cannot be used.
    """
    choices: list[Any] = [*request.controls, *request.loras]
    if not choices:
        return NOTHING
    parts = [_with_pictures(part, request, card, size) for part in _adapters(request, folder, card)]
    _check_fit(parts, folder)
    return Steered(parts, [one for one in choices if one.off])


def check(request: Request, folder: Path, card: Card) -> None:
    """Check the adapters of a request, as for many requests at a time: no picture is opened. Raises: RequestError."""
    parts = list(_adapters(request, folder, card))
    for part in parts:
        if isinstance(part.choice, ControlChoice):
            _parsed(part, _made_by(part))
    _check_fit(parts, folder)


def _adapters(request: Request, folder: Path, card: Card) -> Iterator[Part]:
    """Yield what a request names to steer with, found and told by the headers of its files."""
    choices: list[Any] = [*request.controls, *request.loras]
    for choice in choices:
        _check_card(choice, card)
        if choice.off:
            continue
        name = choice.adapter if isinstance(choice, ControlChoice) else choice.file
        path = find_adapter(choice.field, name, folder)
        part = Part(choice, read_adapter(path, choice.field), digest_of_file(path))
        _check_kind(part)
        yield part


def _with_pictures(part: Part, request: Request, card: Card, size: tuple[int, int] | None) -> Part:
    choice = part.choice
    changes: dict[str, Any] = {"pictures": {}}
    if isinstance(choice, ControlChoice):
        made_by = _made_by(part)
        condition = _parsed(part, made_by)
        picture = _read(part, choice.file, "the picture", changes["pictures"], "picture")
        wide, high = _size(request, card, size or (picture.shape[1], picture.shape[0]))
        try:
            found = fitted(picture, wide, high)
            if condition is not None:
                found = condition_of(condition, found)
            elif flat(found):
                raise Refused(f"the picture is {colour_of(found)} all over and says nothing")
        except Refused as error:
            raise error_of(part, f"usable: {choice.file}: {error}") from None
        step = card.multiple
        high, wide = (max(step, round(side * part.file.part / step) * step) for side in found.shape[:2])
        changes |= {"condition": resized(found, wide, high), "made_by": made_by}
    region: str | None = getattr(choice, "region", None)
    if region is not None:
        mask = grey_of(_read(part, region, "the region", changes["pictures"], "region_picture"))
        if not mask.any():
            raise error_of(part, f"given a region with white in it: {region} is black all over")
        changes["region"] = mask.clip(0, 1)
    return dataclasses.replace(part, **changes)


def _read(part: Part, path: str, what: str, told: dict[str, Any], name: str) -> Array:
    try:
        found = read_picture(path, f"{what} {path}")
        told[name] = {"name": Path(path).name, "sha256": digest_of_file(Path(path).expanduser())}
    except Refused as error:
        raise error_of(part, f"given a picture that can be read: {error}") from None
    return found


def _made_by(part: Part) -> str | None:
    """Return how a picture becomes the condition, as text; None where it is one already."""
    choice: Any = part.choice
    made_by: str | None = None if choice.raw else choice.condition or part.file.condition
    if made_by is None and not choice.raw:
        raise error_of(
            part,
            f"given with @CONDITION or raw=true: {part.file.path.name} does not tell how its conditions are made",
        )
    return made_by


def _parsed(part: Part, text: str | None) -> Condition | None:
    if text is None:
        return None
    try:
        return parse(Condition, text)  # type: ignore[type-abstract,unused-ignore]
    except ValueError as error:
        raise error_of(
            part,
            f"given with @CONDITION or raw=true: {part.file.path.name} names {text!r}, which is not known here ({error})",
        ) from None


def _size(request: Request, card: Card, other: tuple[int, int]) -> tuple[int, int]:
    """Return width and height of the picture that is to be made, in px."""
    chosen = (request.width or card.width or other[0], request.height or card.height or other[1])
    wide, high = (max(card.multiple, side // card.multiple * card.multiple) for side in chosen)
    return wide, high


def _check_card(choice: Steering, card: Card) -> None:
    if card.task != "text-to-image" and isinstance(choice, ControlChoice):
        raise RequestError(
            choice.field,
            choice.text,
            f"left out: {card.name} is for {card.task}, and controls are for pictures",
        )


def _check_kind(part: Part) -> None:
    takes = part.file.takes_picture
    if isinstance(part.choice, LoRAChoice) and takes:
        raise error_of(
            part,
            f"a LoRA: {part.file.path.name} is {part.file.kind}, which steers by a picture; use --control",
        )
    keeps = part.file.kind in ("", "easycontrol", "unic-adapter")  # what other code bases wrote tells no kind
    if (
        isinstance(part.choice, ControlChoice)
        and not keeps
        and (part.choice.storage, part.choice.place) != ("exact", "device")
    ):
        raise error_of(part, f"given without storage and place: {part.file.kind} keeps no keys and values")
    if isinstance(part.choice, ControlChoice) and takes is False and part.file.kind != "lora":
        raise error_of(
            part, f"one that steers by a picture: {part.file.path.name} is {part.file.kind}; use --lora"
        )


def _check_fit(parts: list[Part], folder: Path) -> None:
    """Build every adapter beside a network without weights: what does not fit is refused before any weights load."""
    wanted = [part for part in parts if (str(folder), part.sha256) not in _fitting]
    network = sketch(folder) if wanted else None
    if network is None:
        return
    for part in wanted:
        try:
            fit(part.file.path, network)
        except Refused as error:
            raise error_of(part, f"one that fits this model: {error}") from None
        _fitting[str(folder), part.sha256] = None
        while len(_fitting) > 64:
            _fitting.popitem(last=False)


def sketch(folder: Path) -> nn.Module | None:
    """Return a model's transformer without its weights, or None where that cannot be done."""
    import importlib
    import json

    import diffusers

    from pipelines.catalog import OWN

    try:
        config = json.loads((folder / "transformer" / "config.json").read_bytes())
        name = config["_class_name"]
        kind: Any = (
            getattr(importlib.import_module(OWN[name]), name) if name in OWN else getattr(diffusers, name)
        )
        with torch.device("meta"):
            made: nn.Module = kind.from_config(config)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        RuntimeError,
        NotImplementedError,
    ):
        return None  # then it is looked at when the weights are there
    return made.eval()


def fit(path: Path, network: nn.Module) -> ControlAdapter:
    """Return a file's adapter beside a network of `sketch`, without weights too. Raises: Refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of every weight that it has no place to copy into
        return load(path, network)


def fit_among(path: Path, folders: list[Path]) -> dict[str, str]:
    """Return the first model of `folders` that an adapter fits, with its coverage; or why it fits none."""
    words = "there is no model to try it with"
    for folder in folders:
        network = sketch(folder)
        if network is None:
            continue
        try:
            return {"fits": folder.name, "coverage": str(fit(path, network).coverage)}
        except Refused as error:
            words = f"{folder.name}: {error}"
    return {"fits none here": words}
