"""Frozen named settings: one declaration gives the Python name, the command-line flag, the page control and the saved metadata.

A *family* is a subclass of `Spec` that is not itself decorated (`Accelerator`, `Mixer`, ...). Every class decorated with
`@spec("name")` below it is a member of that family and can be written as text (`"delta-cache:interval=3"`), as a
dictionary (`{"name": "delta-cache", "interval": 3}`) or as a Python object. The three forms are equal.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

_FAMILIES: dict[type[Spec], dict[str, type[Spec]]] = {}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One setting of a spec, with everything a page, a command line or a reader needs to know of it."""

    name: str
    type: type
    default: Any
    label: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    unit: str = ""
    choices: tuple[Any, ...] | None = None
    optional: bool = False

    def check(self, owner: str, value: Any) -> Any:
        """Return `value` in its declared type. Raises: ValueError with the field, what was given and what is allowed."""
        where = f"{owner}: {self.name}"
        if value is None and self.optional:
            return None
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if self.type is tuple and isinstance(value, list):
            value = tuple(value)
        if isinstance(value, bool) is not (self.type is bool) or not isinstance(value, self.type):
            raise ValueError(f"{where} must be {self.allowed()}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where} must be a finite number, got {value!r}")
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{where} must be {self.allowed()}, got {value!r}{_nearest(str(value), map(str, self.choices))}")
        size: Any = value
        if (self.low is not None and size < self.low) or (self.high is not None and size > self.high):
            raise ValueError(f"{where} must be {self.allowed()}, got {value!r}")
        return value

    def read(self, owner: str, text: str) -> Any:
        """Turn the text of a command line into this knob's type. Raises: ValueError."""
        if self.optional and text.lower() in ("none", ""):
            return None
        if self.type is bool:
            if text.lower() in ("true", "yes", "on", "1"):
                return True
            if text.lower() in ("false", "no", "off", "0"):
                return False
        elif self.type in (int, float):
            try:
                return self.check(owner, self.type(text))
            except (ValueError, OverflowError) as error:
                if str(error).startswith(owner):
                    raise
        else:
            return self.check(owner, text)
        raise ValueError(f"{owner}: {self.name} must be {self.allowed()}, got {text!r}")

    def allowed(self) -> str:
        """Return the values this knob takes, in words."""
        if self.choices is not None:
            return "one of " + ", ".join(map(str, self.choices))
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(self.type, self.type.__name__)
        unit = f" {self.unit}" if self.unit else ""
        low, high = (str(one) if isinstance(one, int) else f"{one:g}" if one is not None else "" for one in (self.low, self.high))
        if low and high:
            kind += f" from {low} to {high}{unit}"
        elif low:
            kind += f" of at least {low}{unit}"
        elif high:
            kind += f" of at most {high}{unit}"
        return kind + (" or none" if self.optional else "")


def knob(
    default: Any = dataclasses.MISSING,
    label: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
    unit: str = "",
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """Declare one setting of a spec: its default, its label and its limits (inclusive)."""
    about = {"label": label, "low": low, "high": high, "step": step, "unit": unit, "choices": choices}
    return dataclasses.field(default=default, metadata={"knob": about})


class Spec:
    """Base of all settings objects. A direct or indirect subclass without `@spec` starts a family."""

    __slots__ = ()
    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for one in knobs(type(self)):
            object.__setattr__(self, one.name, one.check(self.name, getattr(self, one.name)))
        self.check()

    def check(self) -> None:
        """Check settings against each other. Raises: ValueError in words."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: the name and every setting."""
        values = {one.name: getattr(self, one.name) for one in knobs(type(self))}
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some settings changed, checked again."""
        return dataclasses.replace(typing.cast(Any, self), **changes)

    def __str__(self) -> str:
        changed = [
            f"{one.name}={_text(getattr(self, one.name))}"
            for one in knobs(type(self))
            if getattr(self, one.name) != one.default
        ]
        return self.name + (":" + ",".join(changed) if changed else "")


S = TypeVar("S", bound=Spec)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(knob,))
def spec(name: str, *, paper: str = "") -> Callable[[type[S]], type[S]]:
    """Make a class frozen, slotted and keyword-only, and register it under `name` in its family."""

    def declare(cls: type[S]) -> type[S]:
        cls.name, cls.paper = name, paper
        made = dataclasses.dataclass(frozen=True, kw_only=True, slots=True, repr=True)(cls)
        made.__str__ = Spec.__str__  # type: ignore[method-assign]
        members = _FAMILIES.setdefault(_family_of(made), {})
        known = members.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (made.__module__, made.__qualname__):
            raise ValueError(f"two specs are called {name!r}: {known.__module__} and {made.__module__}")
        members[name] = made
        return made

    return declare


def kinds(family: type[S]) -> dict[str, type[S]]:
    """Return the registered members of a family by name, sorted."""
    return typing.cast(dict[str, type[S]], dict(sorted(_FAMILIES.get(family, {}).items())))


def knobs(cls: type[Spec]) -> tuple[Knob, ...]:
    """Return the settings of a spec class in the order of their declaration."""
    cached = cls.__dict__.get("_knobs")
    if cached is None:
        hints = typing.get_type_hints(cls)
        cached = tuple(_knob_of(one, hints[one.name]) for one in dataclasses.fields(typing.cast(Any, cls)))
        cls._knobs = cached  # type: ignore[attr-defined]
    return typing.cast(tuple[Knob, ...], cached)


def parse(family: type[S], value: str | Mapping[str, Any] | S) -> S:
    """Read a member of `family` from text (`name:key=value,...`) or from a dictionary.

    Raises:
        ValueError: unknown name or setting (the nearest valid one is named), or a value out of its limits.
    """
    if isinstance(value, family):
        return value
    if isinstance(value, str):
        name, _, rest = value.strip().partition(":")
        cls = _member(family, name.strip())
        by_name = {one.name: one for one in knobs(cls)}
        given: dict[str, Any] = {}
        for part in filter(None, (piece.strip() for piece in rest.split(","))):
            key, equals, text = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise ValueError(f"{name}: settings are written key=value, got {part!r}")
            given[key] = _known(cls, by_name, key).read(name, text)
        return cls(**given)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f"{family.__name__}: expected text or a dictionary with a name, got {value!r}")
    cls = _member(family, value["name"])
    by_name = {one.name: one for one in knobs(cls)}
    return cls(**{_known(cls, by_name, str(k)).name: v for k, v in value.items() if k != "name"})


def _family_of(cls: type[Spec]) -> type[Spec]:
    for base in cls.__mro__[1:]:
        if issubclass(base, Spec) and base is not Spec and not base.__dict__.get("name"):
            return base
    raise TypeError(f"{cls.__name__} belongs to no family: derive it from a subclass of Spec such as Accelerator")


def _member(family: type[S], name: str) -> type[S]:
    members = kinds(family)
    if name not in members:
        raise ValueError(f"unknown {family.__name__.lower()} {name!r}{_nearest(name, members)}; there are: {', '.join(members)}")
    return members[name]


def _known(cls: type[Spec], by_name: Mapping[str, Knob], key: str) -> Knob:
    if key not in by_name:
        raise ValueError(f"{cls.name}: no setting {key!r}{_nearest(key, by_name)}; there are: {', '.join(by_name) or 'none'}")
    return by_name[key]


def _nearest(word: str, words: Any) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _knob_of(field: dataclasses.Field[Any], hint: Any) -> Knob:
    arms = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    plain = [arm for arm in arms if arm is not type(None)]
    kind = typing.get_origin(plain[0]) or plain[0]
    about = field.metadata.get("knob", {"label": field.name})
    default = None if field.default is dataclasses.MISSING else field.default
    return Knob(name=field.name, type=kind, default=default, optional=len(plain) < len(arms), **about)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
