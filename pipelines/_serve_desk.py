"""What is asked for over HTTP becomes jobs, and jobs become answers; nobody is told of another's, or of a path of this computer.

Names in a request stay names: a model is one of those served, a picture an upload of one's own, an adapter a file of one folder.
A field of text that this page does not know is refused, so a new field cannot open a way to the disk by being forgotten here.
"""

from __future__ import annotations

import dataclasses
import math
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pipelines._inpainting import written
from pipelines._serve_names import inside, word
from pipelines.catalog import Card
from pipelines.controls import KINDS, Steering, read_all
from pipelines.jobs import Item, Job, Ledger
from pipelines.request import INPUTS, Request, RequestError, nearest, settings

LOCAL = "local"
"""Owner of what comes without a token and without a session: programs of this computer."""
WAITING = 64
"""Most jobs of one owner that wait."""
UPLOAD = re.compile(r"up_[0-9a-f]{32}\Z")

_WORDS = ("prompt", "negative_prompt", "prompts", "device")
_STEERING = ("controls", "loras")
_NUMBERS = re.compile(r"[0-9, -]{1,4000}\Z")
_SHOWN = re.compile(r"(up_[0-9a-f]{32})\.(?:png|jpg|webp|mp4)\b")


class Refusal(Exception):
    """An answer that is no success: status, code, sentence, and the field that it is about."""

    def __init__(self, status: int, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.field = status, code, message, field


@dataclass(frozen=True, slots=True)
class Desk:
    """What all doors of HTTP share.

    Args:
        pool: what works, with `alive()`; None where something else runs the workers.
        folder: where results go, in a folder for each owner; `uploads`: the same for pictures that come in.
        models: name -> card of what is served, the default first.
        places: name -> what it is called on this computer, for models that are served under another name than their folder's.
        adapters: the folder that LoRA files are named in; None for none.
    """

    ledger: Ledger
    folder: Path
    uploads: Path
    models: Mapping[str, Card]
    pool: Any = None
    adapters: Path | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def submit(self, request: Request, owner: str, once: str = "") -> list[Job]:
        """Put the pictures of a request in the queue; with the same `once` (an idempotency key), what was put there before.

        Raises:
            Refusal: the queue of this owner is full, or the key stands for another request.
        """
        batch = f"once {once}" if once else ""
        name = secrets.token_hex(16)
        items = [
            Item(
                request=request.one(i).to_dict(), id=f"{i}" if once else f"{name} {i}", batch=batch, owner=owner,
                folder=str(self.folder / owner),
            )
            for i in range(request.images)
        ]  # fmt: skip
        with self.lock:
            known = self.ledger.jobs(batch=batch, owner=owner, limit=1000, newest_first=False) if once else []
            if known and [job.item.request for job in known] != [item.request for item in items]:
                raise Refusal(
                    409, "idempotency", "this idempotency key was used for another request", "idempotency-key"
                )
            if known:
                return known
            waiting = self.ledger.counts(owner=owner)["waiting"]
            if waiting + len(items) > WAITING:
                words = (
                    f"{waiting} of your pictures wait; at most {WAITING} may. Try again when some are done"
                )
                raise Refusal(429, "queue_full", words)
            (self.folder / owner).mkdir(parents=True, exist_ok=True, mode=0o700)
            return self.ledger.add(items)

    def request_of(self, values: Mapping[str, Any], owner: str) -> Request:
        """Return the request of a JSON object, checked against its model, with uploads in the place of their names.

        Raises:
            RequestError: with the field, what was given and what is allowed.
        """
        given = dict(values)
        given.setdefault("model", self.default)
        model = given["model"]
        if not isinstance(model, str) or model not in self.models:
            raise RequestError(
                "model", model, f"one of {', '.join(self.models)}{nearest(str(model), self.models)}"
            )
        for name in INPUTS:
            if given.get(name) is not None and not (name == "mask" and written(given[name])):
                given[name] = str(self.upload(given[name], owner, name))
        _check_texts(given)
        given["model"] = self.places.get(model, model)
        for kind in KINDS if any(given.get(name) for name in _STEERING) else ():
            given[kind.field] = tuple(
                self._opened(one, owner) for one in read_all(kind, given.get(kind.field) or ())
            )
        request = Request.from_dict(given)
        from pipelines.generate import check

        check(request, self.models[model])
        return request

    @property
    def default(self) -> str:
        """The model of a request that names none: the usual one, or the first that is served."""
        usual = next(one.default for one in settings() if one.name == "model")
        return usual if usual in self.models else next(iter(self.models))

    def upload(self, name: Any, owner: str, field: str = "file") -> Path:
        """Return the file of an upload. Raises: RequestError, for another's too."""
        if not isinstance(name, str) or not UPLOAD.match(name):
            raise RequestError(field, name, "the id of a picture that you uploaded to /v1/files")
        for suffix in (".png", ".jpg", ".webp", ".mp4"):
            if (self.uploads / owner / f"{name}{suffix}").exists():
                return inside(self.uploads / owner, f"{name}{suffix}")
        raise RequestError(field, name, "the id of a picture that you uploaded and that is still there")

    def _opened(self, one: Steering, owner: str) -> Steering:
        """Return a control or LoRA with one's own uploads for its pictures, and adapters of the served folder."""
        changes: dict[str, Any] = {}
        for name in ("file", "region"):
            if getattr(one, name) is not None and (name == "region" or one.field == "controls"):
                changes[name] = str(self.upload(getattr(one, name), owner, one.field))
        name = "adapter" if one.field == "controls" else "file"
        changes[name] = self._adapter(getattr(one, name), one.field)
        return dataclasses.replace(cast(Any, one), **changes)

    def _adapter(self, name: str, field: str) -> str:
        """Return the file of an adapter in the served folder, or the word of one of the model's own."""
        if word(name):
            return name
        try:
            if self.adapters is not None:
                return str(inside(self.adapters, name))
        except RequestError:
            pass
        raise RequestError(
            field, name, "the word of one of the model's own, or a file of the folder that is served"
        )

    def job(self, name: str, owner: str) -> Job:
        """Return one's own job. Raises: Refusal."""
        found = self.ledger.get(name, owner)
        if found is None:
            raise Refusal(404, "not_found", "there is no job of yours with this id", "id")
        return found

    def shown(self, job: Job) -> dict[str, Any]:
        """Return the JSON of a job: ids in the place of paths."""
        files = [
            {"id": file_id(job, i), "url": f"/v1/files/{file_id(job, i)}", "sha256": digest}
            for i, digest in enumerate(job.sha256)
        ]
        return plain(
            {
                "id": job.name, "object": "job", "state": job.state, "phase": job.phase, "progress": job.progress,
                "tries": job.tries, "error": self.nameless(job.error) or None, "request": self._named(job.item.request),
                "files": files, "pixels": job.report.get("pixels"), "report": self._named(job.report),
                "created": job.created, "started": job.started or None, "ended": job.ended or None,
            }
        )  # fmt: skip

    def nameless(self, text: str) -> str:
        """Return a text without the places of this computer that HTTP works in."""
        for name, model in self.places.items():
            text = text.replace(model, name)
        places = {
            str(one)
            for place in (self.uploads, self.folder, self.adapters)
            if place
            for one in (place, place.resolve())
        }
        for place in sorted(places, key=len, reverse=True):
            text = re.sub(re.escape(place) + r"[/\\](?:[A-Za-z0-9_-]{1,64}[/\\])?", "", text)
        return text

    def _named(self, value: Any) -> Any:
        """Return a value with names for paths: an upload is called as its owner knows it."""
        if isinstance(value, str):
            return _SHOWN.sub(r"\1", self.nameless(value))
        if isinstance(value, Mapping):
            return {key: self._named(one) for key, one in value.items()}
        return [self._named(one) for one in value] if isinstance(value, list | tuple) else value


def file_id(job: Job, index: int) -> str:
    """Return the public name of a job's file."""
    suffix = Path(job.files[index]).suffix if index < len(job.files) else ""
    return f"{job.name}.{index}{suffix}"


def plain(value: Any) -> Any:
    """Return a value as JSON has it: NaN and the infinities become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _check_texts(given: Mapping[str, Any]) -> None:
    """Refuse texts in fields that may name files and that were not opened above."""
    profile = given.get("profile")
    if profile is not None and not (isinstance(profile, str) and word(profile)):
        raise RequestError("profile", profile, "the plain name of a profile: letters, digits, - and _")
    for one in settings():
        known = one.choices is not None or one.name in (
            *_WORDS,
            *INPUTS,
            *_STEERING,
            "model",
            "profile",
            "accelerators",
        )
        value = given.get(one.name)
        numbers = isinstance(value, str) and _NUMBERS.match(value)
        if not known and _holds_text(value) and not numbers:
            raise RequestError(one.name, value, "left out: this setting is not open over HTTP")


def _holds_text(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_text, value.values()))
    return isinstance(value, str) or (isinstance(value, list) and any(map(_holds_text, value)))
