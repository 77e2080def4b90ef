"""Form fields come from the declarations alone, so no control can offer what a request refuses."""

from __future__ import annotations

from typing import Any

import pytest

from acceleration.delta_cache import DeltaCache
from dit.spec import knobs
from pipelines.form import Field, fields, read
from pipelines.request import Request, RequestError, accelerator_kinds, settings


def test_every_field_of_a_request_has_a_control() -> None:
    found = {one.name: one for one in fields(Request)}
    assert list(found) == [one.name for one in settings()]
    assert found["width"] == Field(
        name="width", kind="integer", label="Width", default=None, low=16, high=4096, step=8, unit="px", optional=True,
        help="Width; 16 to 4096 px (default: the model's own)",
    )  # fmt: skip
    kinds = {name: found[name].kind for name in ("prompt", "guidance", "scheduler", "accelerators")}
    assert kinds == {"prompt": "text", "guidance": "number", "scheduler": "choice", "accelerators": "list"}


def test_every_accelerator_has_fields_with_labels_and_legal_defaults() -> None:
    kinds = accelerator_kinds()
    assert kinds["delta-cache"] is DeltaCache
    for cls in kinds.values():
        for field, knob in zip(fields(cls), knobs(cls), strict=True):
            assert field.label
            assert field.help
            knob.check(cls.name, field.default)


@pytest.mark.parametrize(
    "field", [one for one in fields(Request) if one.low is not None], ids=lambda one: one.name
)
def test_limits_of_a_control_are_the_limits_of_the_request(field: Field) -> None:
    needs = {"given": {"clip": "c.mp4", "task": "predict"}, "every": {"clip": "c.mp4", "task": "interpolate"}}
    base: dict[str, Any] = {} if field.name == "class_label" else {"prompt": "a"} | needs.get(field.name, {})
    for good in (field.low, field.high):
        value = float(good) if field.kind == "number" else int(good)  # type: ignore[arg-type]
        assert getattr(Request(**(base | {field.name: value})), field.name) == value
    for bad in (field.low - 1, field.high + 1):  # type: ignore[operator]
        with pytest.raises(RequestError):
            Request(**(base | {field.name: type(field.low)(bad)}))


def test_texts_are_read_by_kind() -> None:
    assert read(Request, "width", "64") == 64
    assert read(Request, "guidance", "2") == 2.0
    assert read(Request, "steps", "none") is None
    assert read(DeltaCache, "mode", "rear") == "rear"
    for name, text, words in (("width", "6.5", "whole number from 16"), ("guidance", "nan", "0 to 50"), ("scheduler", "x", "euler"),
                              ("wdth", "1", "did you mean 'width'")):  # fmt: skip
        with pytest.raises(RequestError, match=words):
            read(Request, name, text)
