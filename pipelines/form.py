"""Settings as neutral form fields: the page draws its controls and the command line its options from the same list."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from dit.spec import Knob, Spec, knobs
from pipelines.request import Request, RequestError, nearest, settings

_KINDS = {int: "integer", float: "number", bool: "switch", str: "text", tuple: "list"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One control: kind is integer, number, switch, text, choice or list; limits are inclusive.

    `optional` fields may be None, which leaves the value to the model.
    """

    name: str
    kind: str
    label: str
    default: Any
    low: float | None = None
    high: float | None = None
    step: float | None = None
    unit: str = ""
    choices: tuple[Any, ...] | None = None
    optional: bool = False
    help: str = ""


def fields(settings_of: type[Spec] | type[Request]) -> tuple[Field, ...]:
    """Return the form fields of a spec class or of `Request`, in the order of their declaration."""
    found = settings() if settings_of is Request else knobs(settings_of)  # type: ignore[arg-type]
    return tuple(_field(one) for one in found)


def read(settings_of: type[Spec] | type[Request], name: str, text: str) -> Any:
    """Turn the text of a control or a flag into the value of a field.

    Raises:
        RequestError: with the field, what was given and what is allowed.
    """
    found = {one.name: one for one in (settings() if settings_of is Request else knobs(settings_of))}  # type: ignore[arg-type]
    if name not in found:
        raise RequestError(name, text, f"one of the settings {', '.join(found)}{nearest(name, found)}")
    try:
        return found[name].read("", text)
    except ValueError:
        raise RequestError(name, text, found[name].allowed()) from None


def add_options(parser: argparse.ArgumentParser, shown: Iterable[Field], flags: Mapping[str, str]) -> None:
    """Add an option for every field; `flags` renames some. Values stay text until `read` checks them."""
    for one in shown:
        flag = flags.get(one.name, one.name).replace("_", "-")
        parser.add_argument(
            f"--{flag}", dest=one.name, metavar=_metavar(one), help=one.help.replace("%", "%%")
        )


def _field(one: Knob) -> Field:
    kind = "choice" if one.choices is not None else _KINDS.get(one.type, "text")
    return Field(
        name=one.name,
        kind=kind,
        label=one.label or one.name.replace("_", " ").capitalize(),
        default=one.default,
        low=one.low,
        high=one.high,
        step=one.step if one.step is not None else (1 if kind == "integer" else None),
        unit=one.unit,
        choices=one.choices,
        optional=one.optional,
        help=_help(one),
    )


def _help(one: Knob) -> str:
    parts = [one.label or one.name]
    if one.choices is not None:
        parts.append("one of " + ", ".join(map(str, one.choices)))
    elif one.low is not None and one.high is not None:
        parts.append(f"{_plain(one.low)} to {_plain(one.high)}" + (f" {one.unit}" if one.unit else ""))
    default = "the model's own" if one.default is None and one.name not in ("image", "mask") else one.default
    return "; ".join(parts) + (f" (default: {default})" if default not in ("", (), None) else "")


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else f"{number:g}"


def _metavar(one: Field) -> str:
    return {"integer": "N", "number": "X", "switch": "YES|NO", "choice": "NAME"}.get(one.kind, "TEXT")
