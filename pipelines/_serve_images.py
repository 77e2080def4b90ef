"""Pictures in the form of OpenAI's Images interface, with everything of ours under the one field `leapfrog`.

Differs: what we would have to ignore (`quality`, `style`, `background`, streaming, ...) is refused unless it is left at its
default, and the seed that was drawn is told.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines._serve_desk import Desk, Refusal, file_id
from pipelines.guard import within
from pipelines.jobs import Job
from pipelines.request import Request, RequestError, nearest, settings

FIELDS = (
    "prompt", "model", "n", "size", "response_format", "user", "quality", "style", "background", "moderation",
    "output_format", "output_compression", "stream", "partial_images", "input_fidelity", "image", "mask", "leapfrog",
)  # fmt: skip
"""The fields of the form, for both of its calls."""
MOST = 10
"""Most pictures of one call."""
LARGEST_SEED = 2**31 - 1

_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "quality": ("auto", "standard"),
    "style": (),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "output_format": ("png",),
    "output_compression": (100, "100"),
    "stream": (False, "false"),
    "partial_images": (0, "0"),
    "input_fidelity": ("low",),
}
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})\Z")
_OWN = ("prompt", "model", "images", "image", "mask", "width", "height")
"""Fields of a request that the form itself has."""


def request_of(
    desk: Desk, values: Mapping[str, Any], owner: str, uploads: Mapping[str, str] | None = None
) -> Request:
    """Return the request that a call stands for.

    Args:
        uploads: ids of the pictures that came with the call: `image`, `mask`.

    Raises:
        RequestError: with the field of the form.
    """
    for key in values:
        if key not in FIELDS:
            raise RequestError(
                key[:80], values[key], f"left out: the fields are {', '.join(FIELDS)}{nearest(key, FIELDS)}"
            )
    for name, allowed in _DEFAULTS.items():
        value = values.get(name)
        if value is not None and not any(
            value is one or (value == one and type(value) is type(one)) for one in allowed
        ):
            raise RequestError(
                name, value, " or ".join(map(str, allowed)) + ", or left out" if allowed else "left out"
            )
    if not isinstance(values.get("user", ""), str | None):
        raise RequestError("user", values["user"], "a text")
    if not isinstance(values.get("prompt"), str):
        raise RequestError("prompt", values.get("prompt"), "a text")
    given = _extension(values.get("leapfrog"))
    given |= {"prompt": values["prompt"], "images": _count(values.get("n"))} | _sides(values.get("size"))
    given.setdefault("seed", secrets.randbelow(LARGEST_SEED))
    if values.get("model") is not None:
        given["model"] = values["model"]
        if values["model"] not in desk.models:
            shown = str(values["model"])[:80]
            raise Refusal(
                404,
                "model_not_found",
                f"the model {shown!r} is not served; there are: {', '.join(desk.models)}",
                "model",
            )
    for name, upload in (uploads or {}).items():
        if name not in {one.name for one in settings()}:
            raise RequestError(name, "a picture", "left out: this version changes whole pictures")
        given[name] = upload
    return desk.request_of(given, owner)


def answer(desk: Desk, jobs: Sequence[Job], form: str, base: str) -> dict[str, Any]:
    """Return what a call answers when its jobs have ended. Raises: Refusal, if one of them failed."""
    for job in jobs:
        if job.state != "done":
            status = {"cancelled": 409, "failed": 422}.get(job.state, 503)
            raise Refusal(
                status, f"job_{job.state}", desk.nameless(job.error) or f"the job {job.name} was {job.state}"
            )
    data = [_entry(desk, job, form, base) for job in jobs]
    effective = jobs[0].report.get("effective", {})
    size = (
        {"size": f"{effective['width']}x{effective['height']}"}
        if {"width", "height"} <= set(effective)
        else {}
    )
    return (
        {"created": int(time.time()), "data": data, "output_format": "png"}
        | size
        | {"leapfrog": {"jobs": [desk.shown(job) for job in jobs]}}
    )


def wanted_form(values: Mapping[str, Any]) -> str:
    """Return "b64_json" or "url". Raises: RequestError."""
    form = values.get("response_format")
    if form not in (None, "b64_json", "url"):
        raise RequestError("response_format", form, "b64_json or url")
    return form or "b64_json"


def listed(desk: Desk) -> list[dict[str, Any]]:
    """Return the models in the form's list."""
    return [
        {
            "id": name, "object": "model", "created": 0, "owned_by": "leapfrog",
            "leapfrog": {
                "title": card.title, "summary": card.summary, "license": card.license, "task": card.task,
                "width": card.width, "height": card.height, "multiple": card.multiple, "low": card.low, "high": card.high,
                "steps": card.steps, "guidance": card.guidance, "classes": card.classes, "default": name == desk.default,
            },
        }
        for name, card in desk.models.items()
    ]  # fmt: skip


def _entry(desk: Desk, job: Job, form: str, base: str) -> dict[str, Any]:
    if form == "url":
        return {"url": f"{base}v1/files/{file_id(job, 0)}"}
    data = within(desk.folder / job.item.owner, Path(job.files[0])).read_bytes()
    return {"b64_json": base64.b64encode(data).decode()}


def _extension(value: Any) -> dict[str, Any]:
    if isinstance(value, str):  # a field of a form with files
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RequestError("leapfrog", value, "a JSON object") from None
    if value is not None and not isinstance(value, Mapping):
        raise RequestError("leapfrog", value, "an object with fields of a request")
    for name in _OWN:
        if name in (value or {}):
            raise RequestError("leapfrog", name, "an object without what the form itself has a field for")
    return dict(value or {})


def _count(value: Any) -> int:
    value = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,3}", value) else value
    if value is None:
        return 1
    if type(value) is not int or not 1 <= value <= MOST:
        raise RequestError("n", value, f"a whole number from 1 to {MOST}")
    return value


def _sides(value: Any) -> dict[str, int]:
    if value in (None, "auto"):
        return {}
    found = _SIZE.match(value) if isinstance(value, str) else None
    if found is None:
        raise RequestError("size", value, "auto or WIDTHxHEIGHT, in px")
    return {"width": int(found[1]), "height": int(found[2])}
