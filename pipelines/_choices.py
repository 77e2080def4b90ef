"""Controls and LoRAs of a request as text, as dictionaries and as frozen objects; `pipelines.controls` tells the forms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from dit.spec import Knob, Spec, knob, knobs, parse, spec
from pipelines.request import RequestError, bare, shorten

MOST = 8
"""Most controls, and most LoRAs, of one request."""
LENGTH = 4096
"""Longest name of a file, in characters."""

_NAME = r"[A-Za-z][\w.+-]*"
_CONDITION = re.compile(
    rf"(?P<condition>{_NAME}(?::[a-z_]+=[^=,]*(?:,[a-z_]+=[^=,]*)*)?)=(?P<rest>.*)", re.DOTALL
)
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


class Steering(Spec):
    """The family of what a request names to steer with: an adapter file, its strength and when it acts."""

    __slots__ = ()
    field: ClassVar[str] = ""  # of the request
    allowed: ClassVar[str] = ""

    def check(self) -> None:
        """Raises: ValueError for texts that are none, and a window that is empty."""
        for one in knobs(type(self)):
            value = getattr(self, one.name)
            if one.type is str and value is not None:
                printable = all(letter.isprintable() for letter in value)
                if not value.strip() or len(value) > LENGTH or not printable:
                    raise ValueError(
                        f"{one.name} must be printable text of 1 to {LENGTH} characters, got {shorten(value)}"
                    )
        mine: Any = self
        if not mine.start < mine.end:
            raise ValueError(f"start must be below end, got start={mine.start:g}, end={mine.end:g}")
        curve = mine.curve
        if curve is not None:
            numbers = all(
                isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one <= 10 for one in curve
            )
            if not 2 <= len(curve) <= 1000 or not numbers:
                raise ValueError(f"curve must be 2 to 1000 strengths from 0 to 10, got {shorten(curve)}")
            object.__setattr__(self, "curve", tuple(float(one) for one in curve))

    @property
    def text(self) -> str:
        """The text form."""
        raise NotImplementedError(f"{type(self).__name__}.text")

    @property
    def strengths(self) -> float | tuple[float, ...]:
        """The strength, or strengths spread over the steps."""
        mine: Any = self
        return mine.strength if mine.curve is None else mine.curve

    @property
    def off(self) -> bool:
        """Whether it is off in every step, so that nothing of it is opened."""
        found = self.strengths
        return not any(found) if isinstance(found, tuple) else not found

    def bare(self) -> Self:
        """Return it with names in the place of paths."""
        named = {name: getattr(self, name, None) for name in ("adapter", "file", "region")}
        return self.replace(**{name: bare(path) for name, path in named.items() if path})

    def _tail(self) -> str:
        """What stands behind the file's name in the text form."""
        mine: Any = self
        told = [f":{_plain(mine.strength)}"]
        for one in knobs(type(self)):
            value = getattr(self, one.name)
            if one.name not in ("adapter", "condition", "file", "strength") and value != one.default:
                told.append(f",{one.name}={_plain(value)}")
        return "".join(told)


@spec("control")
class ControlChoice(Steering):
    """An adapter that steers by a condition picture."""

    field = "controls"
    allowed = (
        "written ADAPTER[@CONDITION]=FILE[:STRENGTH][,start=..,end=..,curve=..,region=FILE,raw=true,instruction=..,storage=fp8,"
        "place=cpu]"
    )

    adapter: str = knob(default="", label="Adapter: one of the model's own, or a .safetensors file")
    condition: str | None = knob(
        default=None, label="How the picture becomes a condition (none: as the adapter was trained)"
    )
    file: str = knob(default="", label="Picture")
    strength: float = knob(
        default=1.0, label="Strength; 0 is exactly off, 1 as trained", low=0.0, high=10.0, step=0.05
    )
    curve: tuple | None = knob(default=None, label="Strengths spread over the steps, in place of one")  # type: ignore[type-arg]
    start: float = knob(
        default=0.0, label="Acts from this fraction of the steps", low=0.0, high=1.0, step=0.05
    )
    end: float = knob(
        default=1.0, label="Acts until this fraction of the steps", low=0.0, high=1.0, step=0.05
    )
    region: str | None = knob(default=None, label="Picture of where it acts: white all, black not at all")
    raw: bool = knob(default=False, label="The picture is a condition already and is taken as it is")
    instruction: str | None = knob(
        default=None, label="What the picture is, for adapters that read an instruction"
    )
    storage: str = knob(
        default="exact",
        label="Keys and values kept of the picture: exact, or in 8 bits",
        choices=("exact", "fp8"),
    )
    place: str = knob(default="device", label="Where they are kept", choices=("device", "cpu"))
    any_base: bool = knob(default=False, label="Take it though it was trained beside other weights")

    def check(self) -> None:
        """Raises: ValueError in words."""
        Steering.check(self)
        if self.raw and self.condition is not None:
            raise ValueError(f"condition must be left out where raw=true, got {self.condition}")
        if self.condition is not None:
            from control.conditions import Condition

            object.__setattr__(self, "condition", str(parse(Condition, self.condition)))  # type: ignore[type-abstract,unused-ignore]

    @property
    def text(self) -> str:
        """The text form; a file whose name holds signs of that form is kept whole by the dictionary alone."""
        made = f"@{self.condition}" if self.condition else ""
        return f"{self.adapter}{made}={self.file}{self._tail()}"


@spec("lora")
class LoRAChoice(Steering):
    """An adapter that changes what layers say and needs no picture: a LoRA, a TD-LoRA, a task of a DiffScaler."""

    field = "loras"
    allowed = "written FILE[:WEIGHT][,start=..,end=..,curve=..,region=FILE,task=..]"

    file: str = knob(default="", label="LoRA: one of the model's own, or a .safetensors file")
    strength: float = knob(
        default=1.0, label="Weight; 0 is exactly off, 1 as trained", low=0.0, high=10.0, step=0.05
    )
    curve: tuple | None = knob(default=None, label="Weights spread over the steps, in place of one")  # type: ignore[type-arg]
    start: float = knob(
        default=0.0, label="Acts from this fraction of the steps", low=0.0, high=1.0, step=0.05
    )
    end: float = knob(
        default=1.0, label="Acts until this fraction of the steps", low=0.0, high=1.0, step=0.05
    )
    region: str | None = knob(default=None, label="Picture of where it acts: white all, black not at all")
    task: str | None = knob(default=None, label="Task, where the file holds several")
    any_base: bool = knob(default=False, label="Take it though it was trained beside other weights")

    @property
    def text(self) -> str:
        """The text form."""
        return f"{self.file}{self._tail()}"


KINDS: tuple[type[Steering], ...] = (ControlChoice, LoRAChoice)


def read_all(kind: type[Steering], values: Any) -> tuple[Steering, ...]:
    """Read a request's controls or LoRAs. Raises: RequestError with the field, what was given and what is allowed."""
    if isinstance(values, str | Mapping | Spec):
        values = (values,)
    if not isinstance(values, tuple | list):
        raise RequestError(kind.field, values, f"a list; each is {kind.allowed}")
    if len(values) > MOST:
        raise RequestError(kind.field, len(values), f"at most {MOST}")
    found = tuple(_read(kind, one) for one in values)
    twice = [one.text for place, one in enumerate(found) if one in found[:place]]
    names = [getattr(one, "file", "") for one in found]
    if kind is LoRAChoice and len(set(names)) < len(names):
        twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise RequestError(kind.field, twice[0], "named at most once each: give one strength")
    if len({(one.storage, one.place) for one in found if isinstance(one, ControlChoice)}) > 1:
        allowed = (
            "of one storage and place for all controls: what is computed of their pictures is kept together"
        )
        raise RequestError(kind.field, [one.text for one in found], allowed)
    return found


def bare_all(choices: Iterable[Steering]) -> tuple[Steering, ...]:
    """Return controls or LoRAs with names in the place of paths; where names meet, the later one gets its number in front."""
    found: list[Any] = []
    for number, one in enumerate(choices, start=1):
        named: Any = one.bare()
        if named in found or (named.field == "loras" and named.file in [other.file for other in found]):
            named = named.replace(file=f"{number}-{named.file}")
        found.append(named)
    return tuple(found)


def _read(kind: type[Steering], value: Any) -> Steering:
    if isinstance(value, kind):
        return value
    try:
        if isinstance(value, str):
            return kind(**_parts(kind, value))
        if isinstance(value, Mapping):
            known = {one.name for one in knobs(kind)} | {"name"}
            strange = [key for key in value if key not in known]
            if strange or value.get("name", kind.name) != kind.name:
                raise ValueError(
                    f"no setting {shorten((strange or [value['name']])[0])}; there are {', '.join(sorted(known))}"
                )
            return kind(**{key: one for key, one in value.items() if key != "name"})
    except ValueError as error:
        if isinstance(error, RequestError):
            raise
        form = (
            "made of settings that work" if isinstance(value, str) else kind.allowed
        )  # a text of another form is told above
        raise RequestError(kind.field, value, f"{form} ({error})") from None
    raise RequestError(kind.field, value, kind.allowed)


def _parts(kind: type[Steering], text: str) -> dict[str, Any]:
    """Take the text form apart."""
    given: dict[str, Any] = {}
    rest = text.strip()
    if len(rest) > 4 * LENGTH:
        raise RequestError(kind.field, text, f"text of at most {4 * LENGTH} characters")
    if kind is ControlChoice:
        adapter, mark, rest = _split(rest)
        if not adapter or not mark:
            raise RequestError(kind.field, text, f"{kind.allowed} (there is no adapter in front of =)")
        given["adapter"] = adapter
        if mark == "@":
            found = _CONDITION.fullmatch(rest)
            if found is None:
                raise RequestError(kind.field, text, f"{kind.allowed} (no condition and = behind @)")
            given["condition"], rest = found["condition"], found["rest"]
    settings: dict[str, Knob] = {
        one.name: one for one in knobs(kind) if one.name not in ("adapter", "condition", "file")
    }
    names = "|".join(re.escape(name) for name in settings)
    options = rf"(?P<options>(?:,(?:{names})=[^,=]*)*)"
    found = re.fullmatch(
        rf"(?P<file>.+?)(?::(?P<strength>-?{_NUMBER}|-?nan|-?inf))?{options}", rest, re.DOTALL
    )
    strange = re.fullmatch(
        rf"(?P<file>.+?):{_NUMBER}(?:,[a-z_]+=[^,=]*)*?,(?P<name>[a-z_]+)=[^,=]*.*", rest, re.DOTALL
    )
    if found is None:
        raise RequestError(kind.field, text, f"{kind.allowed} (there is no file)")
    if strange is not None and strange["name"] not in settings:
        raise RequestError(kind.field, text, f"{kind.allowed} (there is no setting {strange['name']})")
    given["file"] = found["file"]
    if found["strength"] is not None:
        given["strength"] = settings["strength"].read(kind.name, found["strength"])
    for piece in filter(None, found["options"].split(",")):
        key, _, value = piece.partition("=")
        given[key] = _curve(value) if key == "curve" else settings[key].read(kind.name, value)
    return given


def _split(text: str) -> tuple[str, str, str]:
    """Return what stands before the first @ or =, that sign, and what stands behind it."""
    found = re.match(r"([^@=]*)([@=])(.*)", text, re.DOTALL)
    return ("", "", text) if found is None else (found[1].strip(), found[2], found[3])


def _curve(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(one) for one in text.split("/"))
    except ValueError:
        raise ValueError(f"curve must be strengths with / between them, got {shorten(text)}") from None


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(_plain(one) for one in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
