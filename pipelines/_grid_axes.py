"""The axes of a grid: what changes along them, read from text such as `steps=10,20,28`, and put into a request.

steps=10,20,28                              any field of a request; texts and controls are divided by |
accelerators=none,delta-cache:interval=3    whole accelerators; + puts two into one value
delta-cache:interval=2,3,off                one setting of an accelerator; off leaves the accelerator out
lora:style.safetensors=0,0.5,1              the weight of a LoRA
size=64,96x64                               width and height at once
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.form import read
from pipelines.request import Request, RequestError, accelerator_kinds, nearest, settings

VALUES = 64
"""Most values of an axis."""
TEXT = 8000
"""Most characters of an axis."""
NONE, OFF = "none", "off"
LORA = "lora:"
_ALIASES = {"accelerate": "accelerators", "negative": "negative_prompt", "class": "class_label"}
_REFUSED = {"images": "seeds, which repeat every cell", "panels": "a setting of the whole grid"}
_DIVIDED = (
    "prompt",
    "negative_prompt",
    "controls",
    "loras",
    "keyframes",
    "region",
    "scene_frames",
    "window_seeds",
)
"""Fields whose values may hold a comma: they are divided by | alone."""


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """One place on an axis: its label, and what goes into a request."""

    label: str
    given: Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What changes, and its values in order; `text` is how it was written."""

    field: str
    values: tuple[Value, ...]
    text: str

    @property
    def method(self) -> str:
        """The accelerator whose setting it changes, or nothing."""
        return "" if self.field.startswith(LORA) or ":" not in self.field else self.field.partition(":")[0]

    @property
    def accelerates(self) -> bool:
        """Whether accelerators change along it."""
        return self.field in ("accelerators", "profile") or bool(self.method)

    @property
    def title(self) -> str:
        """What changes, for a heading."""
        if self.field.startswith(LORA):
            return f"weight of {self.field.removeprefix(LORA)}"
        return self.field.replace("_", " ").replace(":", ": ")

    def put(self, values: dict[str, Any], value: Value, *, alone: bool = True) -> None:
        """Put a value into the fields of a request (the form of `Request.to_dict`).

        Args:
            alone: whether no other axis chooses the accelerators; otherwise a setting acts only where its method is on.
        """
        if self.field == "size":
            values["width"], values["height"] = value.given
        elif self.field.startswith(LORA):
            _put_lora(values, self.field.removeprefix(LORA), value.given)
        elif self.method:
            _put_setting(values, self.method, self.field.partition(":")[2], value, alone)
        else:
            values[self.field] = value.given
            if self.field == "accelerators":
                values["profile"] = None
            elif self.field == "profile":
                values["accelerators"] = []


def read_axis(text: str) -> Axis:
    """Read an axis. Raises: RequestError with what is allowed; nothing is opened or loaded."""
    field, found, rest = text.partition("=")
    field = _ALIASES.get(field.strip(), field.strip())
    if not found or not rest.strip() or len(text) > TEXT:
        raise RequestError(
            "axis", text, f"FIELD=VALUE,VALUE,... of at most {TEXT} characters, such as steps=10,20,28"
        )
    _check_field(field)
    texts = _divided(field, rest)
    if len(set(texts)) < len(texts) or len(texts) > VALUES:
        raise RequestError(f"axis {field}", rest, f"at most {VALUES} values, each given once")
    return Axis(field=field, values=tuple(_value(field, one) for one in texts), text=text.strip())


def fields_allowed() -> list[str]:
    """Return what may change along an axis, besides the settings of accelerators and the weights of LoRAs."""
    return [*(one.name for one in settings() if one.name not in _REFUSED), "size"]


def _check_field(field: str) -> None:
    if field in _REFUSED:
        raise RequestError("axis", field, f"left out here: it is {_REFUSED[field]}")
    if field.startswith(LORA) and field != LORA:
        return
    method, _, setting = field.partition(":")
    if setting:
        kinds = accelerator_kinds()
        if method not in kinds:
            raise RequestError(
                "axis", field, f"a setting of one of {', '.join(kinds)}{nearest(method, kinds)}"
            )
        from dit.spec import knobs

        names = [one.name for one in knobs(kinds[method])]
        if setting not in names:
            raise RequestError(
                "axis", field, f"one of the settings {', '.join(names)} of {method}{nearest(setting, names)}"
            )
    elif field not in fields_allowed():
        names = fields_allowed()
        raise RequestError(
            "axis",
            field,
            f"one of {', '.join(names)}, a setting such as delta-cache:interval{nearest(field, names)}",
        )


def _divided(field: str, text: str) -> list[str]:
    """Return the texts of the values; in accelerators a piece that is only a setting belongs to the piece before."""
    if field == "prompts":
        parts = text.split("||")
    elif "|" in text or field in _DIVIDED:
        parts = text.split("|")
    else:
        parts = text.split(",")
        if field == "accelerators":
            joined: list[str] = []
            for one in parts:
                if joined and "=" in one.partition(":")[0]:
                    joined[-1] += "," + one
                else:
                    joined.append(one)
            parts = joined
    found = [one.strip() for one in parts]
    if not all(found):
        raise RequestError(f"axis {field}", text, "values without an empty one among them")
    return found


def _value(field: str, text: str) -> Value:
    """Read one value. Raises: RequestError, under the name of the axis."""
    try:
        return Value(text, _given(field, text))
    except RequestError as error:
        raise RequestError(f"axis {field}", text, error.allowed) from None


def _given(field: str, text: str) -> Any:
    if field == "size":
        wide, _, high = text.lower().replace("×", "x").partition("x")
        return read(Request, "width", wide.strip()), read(Request, "height", (high or wide).strip())
    if field.startswith(LORA):
        from pipelines._choices import LoRAChoice

        return read(LoRAChoice, "strength", text)
    method, _, setting = field.partition(":")
    if setting:
        return OFF if text == OFF else read(accelerator_kinds()[method], setting, text)
    if field in ("accelerators", "controls", "loras"):
        parts = (
            []
            if text == NONE
            else [one.strip() for one in text.split("+")]
            if field == "accelerators"
            else [text]
        )
        request = Request.from_dict({"prompt": "-", field: parts})
        return [one.to_dict() for one in getattr(request, field)]
    if text == NONE and field in ("profile", "image", "mask", "clip", "last_image", "task"):
        return None
    return read(Request, field, text)


def _put_setting(values: dict[str, Any], method: str, setting: str, value: Value, alone: bool) -> None:
    known: list[Mapping[str, Any]] = list(values.get("accelerators") or [])
    place = next((place for place, one in enumerate(known) if one["name"] == method), None)
    if value.given == OFF:
        values["accelerators"] = [one for one in known if one["name"] != method]
    elif place is not None:
        known[place] = dict(known[place]) | {setting: value.given}
        values["accelerators"] = known
    elif alone:
        values["accelerators"] = [*known, {"name": method, setting: value.given}]


def _put_lora(values: dict[str, Any], file: str, strength: float) -> None:
    known = [dict(one) for one in values.get("loras") or []]
    mine = next((one for one in known if one["file"] == file), None)
    if mine is None:
        mine = {"name": "lora", "file": file}
        known.append(mine)
    mine["strength"] = strength
    values["loras"] = [one for one in known if one is not mine or strength]
