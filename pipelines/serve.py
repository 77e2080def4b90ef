"""HTTP: jobs, files, events, and pictures in OpenAI's form, over the ledger that the page and the command line use too.

The app never runs a model: it puts items in the ledger and watches them. Every error is JSON with a code, the field and a sentence.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pipelines import _serve_files as files
from pipelines import _serve_images as images
from pipelines._serve_desk import LOCAL, Desk, Refusal, plain
from pipelines._serve_events import Watcher, ended, event_stream
from pipelines._serve_metrics import Counted
from pipelines.catalog import Card, Unavailable
from pipelines.guard import Guard, Hosts, Keys, Limits, Sessions, failure
from pipelines.jobs import STATES, Job, Ledger, LedgerError
from pipelines.request import Request as Wish
from pipelines.request import RequestError, settings
from pipelines.result import SaveError

PATIENCE = 900.0
"""Longest time that a call of the Images form waits for its pictures, in s."""
LISTED = 200

_ONCE = re.compile(r"[\x21-\x7e]{1,200}\Z")
_JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}
_log = logging.getLogger("leapfrog.serve")


def http_app(
    ledger: Ledger,
    pool: Any = None,
    *,
    folder: Path,
    uploads: Path,
    models: Mapping[str, Card],
    keys: Keys | None = None,
    hosts: Hosts | None = None,
    adapters: Path | None = None,
    places: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    secure: bool = False,
    page: Callable[[FastAPI], object] | None = None,
) -> Guard:
    """Return the whole ASGI app, its guard outside.

    Args:
        pool: what works on the ledger; `alive()` tells how many do.
        folder: where results are saved, in one folder for each owner; `uploads`: where starting pictures are kept.
        models: what is served, the default first; no other model can be named.
        keys: tokens and their owners; None serves this computer alone, without a token.
        hosts: the names it is served under.
        adapters: the folder whose LoRA files may be named.
        places: name -> folder, for models that are served under a name of their own.
        secure: cookies are for https alone.
        page: mounts a page into the app, beside HTTP and behind the same guard.

    Raises:
        RequestError: no model.
    """
    if not models:
        raise RequestError("models", models, "at least one")
    desk = Desk(ledger, folder, uploads, models, pool, adapters, places or {})
    api = FastAPI(title="Leapfrog", version="1", docs_url=None, redoc_url=None)
    counted = Counted(api)
    _errors(api)
    watcher = Watcher(ledger)
    _jobs(api, desk, watcher)
    _files(api, desk)
    _pictures(api, desk, watcher)
    _state(api, desk, watcher, counted)
    if page is not None:
        page(api)
    return Guard(
        counted, hosts or Hosts(), keys=keys, sessions=Sessions(), limits=limits, secure=secure,
    )  # fmt: skip


def owner_of(request: Request) -> str:
    """Return who asks: the holder of a token, a browser's session, or any program of this computer."""
    return request.scope.get("state", {}).get("owner") or LOCAL


def _jobs(api: FastAPI, desk: Desk, watcher: Watcher) -> None:
    @api.post("/v1/jobs", status_code=202, openapi_extra=_body("A request", _schema()))
    async def submit(request: Request) -> Response:
        """Put a request in the queue. With an Idempotency-Key, the same call again returns the same jobs."""
        owner, once = owner_of(request), request.headers.get("idempotency-key", "")
        if once and not _ONCE.match(once):
            raise RequestError("idempotency-key", once, "1 to 200 visible characters")
        values = await _object(request)
        wish = await run_in_threadpool(desk.request_of, values, owner)
        made = await run_in_threadpool(desk.submit, wish, owner, once)
        shown = [desk.shown(job) for job in made]
        answer = _answer(shown[0] if wish.images == 1 else {"object": "list", "data": shown}, 202)
        answer.headers["location"] = f"/v1/jobs/{made[0].name}"
        return answer

    @api.get("/v1/jobs")
    async def listed(request: Request) -> Response:
        """List one's own jobs, the newest first."""
        state, limit, offset = (request.query_params.get(name, "") for name in ("state", "limit", "offset"))
        if state and state not in STATES:
            raise RequestError("state", state, f"one of {', '.join(STATES)}")
        most, first = _number("limit", limit, 50, LISTED), _number("offset", offset, 0, 1_000_000)
        found = await run_in_threadpool(
            lambda: desk.ledger.jobs(
                owner=owner_of(request), states=(state,) if state else (), limit=most, offset=first
            )
        )
        return _answer({"object": "list", "data": [desk.shown(job) for job in found]})

    @api.get("/v1/jobs/{name}")
    async def one(name: str, request: Request) -> Response:
        """Return a job as it stands."""
        return _answer(desk.shown(await run_in_threadpool(desk.job, name, owner_of(request))))

    @api.delete("/v1/jobs/{name}")
    async def cancel(name: str, request: Request) -> Response:
        """Cancel a job: at once if it waits, at its next step if it runs. Cancelling twice is cancelling once."""
        owner = owner_of(request)
        await run_in_threadpool(desk.job, name, owner)
        await run_in_threadpool(lambda: desk.ledger.cancel(name=name, owner=owner))
        return _answer(desk.shown(await run_in_threadpool(desk.job, name, owner)))

    @api.get("/v1/jobs/{name}/events")
    async def events(name: str, request: Request) -> Response:
        """Tell of a job as server-sent events, from its present state to its last."""
        job = await run_in_threadpool(desk.job, name, owner_of(request))
        return StreamingResponse(
            event_stream(watcher, job, desk.shown),
            media_type="text/event-stream",
            headers={"x-accel-buffering": "no"},
        )


def _files(api: FastAPI, desk: Desk) -> None:
    @api.post("/v1/files", openapi_extra=_upload_body())
    async def upload(request: Request) -> Response:
        """Take a starting picture: the field `file` of a form, or the bytes alone."""
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            async with request.form(max_files=1, max_fields=5) as form:
                data = await _uploaded(form, "file")
        else:
            data = await request.body()
        return _answer(await run_in_threadpool(files.keep, desk, owner_of(request), data))

    @api.get("/v1/files/{name:path}")
    async def serve(name: str, request: Request) -> Response:
        """Return a file of one's own, byte for byte as it was saved."""
        path, kind = await run_in_threadpool(files.served, desk, owner_of(request), name)
        disposition = "inline" if kind else "attachment"
        return FileResponse(
            path,
            media_type=kind or "application/octet-stream",
            filename=path.name,
            content_disposition_type=disposition,
        )

    @api.delete("/v1/files/{name:path}")
    async def forget(name: str, request: Request) -> Response:
        """Delete an upload."""
        await run_in_threadpool(files.forget, desk, owner_of(request), name)
        return _answer({"id": name, "object": "file", "deleted": True})


def _pictures(api: FastAPI, desk: Desk, watcher: Watcher) -> None:
    @api.post(
        "/v1/images/generations",
        openapi_extra=_body("OpenAI's form", {"type": "object", "required": ["prompt"]}),
    )
    async def generations(request: Request) -> Response:
        """Make pictures from a prompt and wait for them."""
        values = await _object(request)
        form, owner = images.wanted_form(values), owner_of(request)
        if values.get("image") is not None or values.get("mask") is not None:
            raise RequestError("image", "a picture", "sent to /v1/images/edits")
        wish = await run_in_threadpool(images.request_of, desk, values, owner)
        return await _made(request, wish, form)

    @api.post("/v1/images/edits", openapi_extra=_upload_body())
    async def edits(request: Request) -> Response:
        """Make pictures from a picture and a prompt and wait for them."""
        owner = owner_of(request)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise Refusal(415, "type", "send a form with files: multipart/form-data", "content-type")
        async with request.form(max_files=4, max_fields=30) as form:
            values = {key: value for key, value in form.items() if isinstance(value, str)}
            given = [value for key in ("image", "image[]") for value in form.getlist(key)]
            if len(given) != 1 or not isinstance(given[0], UploadFile):
                raise RequestError("image", len(given), "one picture, as a file")
            shape = images.wanted_form(values)
            pictures = {"image": await given[0].read()}
            if form.get("mask") is not None:
                pictures["mask"] = await _uploaded(form, "mask")
        images.request_of(desk, values, owner)  # before anything is kept
        kept = {
            name: (await run_in_threadpool(files.keep, desk, owner, data))["id"]
            for name, data in pictures.items()
        }
        wish = await run_in_threadpool(images.request_of, desk, values, owner, kept)
        return await _made(request, wish, shape)

    async def _made(request: Request, wish: Wish, form: str) -> Response:
        owner = owner_of(request)
        jobs = await run_in_threadpool(desk.submit, wish, owner)
        waiting = asyncio.gather(*(ended(watcher, job) for job in jobs))
        try:
            over = await asyncio.wait_for(_unless_left(request, waiting), PATIENCE)
        except TimeoutError:
            names = ", ".join(job.name for job in jobs)
            raise Refusal(
                504, "slow", f"still at work after {PATIENCE:.0f} s; ask GET /v1/jobs/ for {names}"
            ) from None
        if over is None:
            for job in jobs:
                await run_in_threadpool(functools.partial(desk.ledger.cancel, name=job.name, owner=owner))
            raise Refusal(499, "left", "the caller left; the pictures were cancelled")
        return _answer(await run_in_threadpool(images.answer, desk, over, form, str(request.base_url)))

    @api.get("/v1/models")
    async def models() -> Response:
        """List what is served."""
        return _answer({"object": "list", "data": images.listed(desk)})

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """Describe one of the models."""
        found = [one for one in images.listed(desk) if one["id"] == name]
        if not found:
            raise Refusal(404, "model_not_found", f"there are: {', '.join(desk.models)}", "model")
        return _answer(found[0])


def _state(api: FastAPI, desk: Desk, watcher: Watcher, counted: Counted) -> None:
    @api.get("/healthz")
    async def health() -> Response:
        """Tell whether the ledger answers and somebody works; needs no token and tells nothing of anybody."""
        try:
            await run_in_threadpool(desk.ledger.counts)
        except LedgerError:
            return _answer({"status": "the ledger does not answer"}, 503)
        working = None if desk.pool is None else int(desk.pool.alive())
        return _answer(
            {"status": "no workers" if working == 0 else "ok", "workers": working},
            503 if working == 0 else 200,
        )

    @api.get("/metrics")
    async def metrics() -> Response:
        """Return counters in Prometheus' text format."""
        gauges: dict[str, float] = {"listeners": watcher.listeners}
        gauges |= {} if desk.pool is None else {"workers": int(desk.pool.alive())}
        jobs = await run_in_threadpool(desk.ledger.counts)
        return Response(counted.text(gauges, jobs), media_type="text/plain; version=0.0.4")


def _errors(api: FastAPI) -> None:
    """Have every error told in JSON, in the same form."""

    def told(kind: type[Exception], of: Callable[[Any], tuple[int, str, str, str | None]]) -> None:
        async def handler(_: Request, error: Exception) -> Response:
            status, code, words, field = of(error)
            return _answer(failure(code, words, field), status)

        api.add_exception_handler(kind, handler)

    told(Refusal, lambda error: (error.status, error.code, error.message, error.field))
    told(RequestError, lambda error: (400, "bad_request", str(error), error.field))
    told(
        HTTPException,
        lambda error: (error.status_code, _CODES.get(error.status_code, "refused"), str(error.detail), None),
    )
    told(
        SaveError,
        lambda error: (
            507 if error.full else 503,
            "disk",
            "the disk is full" if error.full else "the disk cannot be written",
            None,
        ),
    )
    told(
        LedgerError,
        lambda error: (507 if error.full else 503, "ledger", "the job ledger cannot be used now", None),
    )
    told(Unavailable, lambda error: (503, "unavailable", str(error), None))
    told(ClientDisconnect, lambda _: (499, "left", "the caller left in the middle of what it sent", None))

    async def strange(request: Request, error: Exception) -> Response:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _answer(failure("internal", f"something unexpected went wrong ({type(error).__name__})"), 500)

    api.add_exception_handler(Exception, strange)


_CODES = {400: "bad_request", 404: "not_found", 405: "method", 408: "slow", 413: "too_much"}


async def _object(request: Request) -> dict[str, Any]:
    """Return the JSON object of a body. Raises: Refusal."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "type", "send JSON: content-type: application/json", "content-type")
    body = await request.body()
    try:
        found = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Refusal(400, "json", "the body must be valid JSON", "body") from None
    if not isinstance(found, dict):
        raise Refusal(400, "json", "the body must be a JSON object", "body")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


async def _uploaded(form: FormData, name: str) -> bytes:
    found = form.get(name)
    if not isinstance(found, UploadFile):
        raise RequestError(name, found, "a picture, as a file")
    return await found.read()


async def _unless_left(request: Request, waiting: Awaitable[list[Job]]) -> list[Job] | None:
    """Return what is waited for, or None as soon as the caller has left."""
    task = asyncio.ensure_future(waiting)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=1.0)
            if not task.done() and await request.is_disconnected():
                return None
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _answer(data: Any, status: int = 200) -> Response:
    text = json.dumps(plain(data), ensure_ascii=True, allow_nan=False)
    return Response(text, status, media_type="application/json")


def _number(field: str, text: str, default: int, most: int) -> int:
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > most:
        raise RequestError(field, text, f"a whole number up to {most}")
    return int(text)


def _schema() -> dict[str, Any]:
    """Return the JSON schema of a request, made from its fields."""
    properties = {}
    for one in settings():
        kind: dict[str, Any] = {"type": _JSON_TYPES[one.type]} if one.type in _JSON_TYPES else {}
        limits = {"minimum": one.low, "maximum": one.high, "enum": one.choices and list(one.choices)}
        kind |= {key: value for key, value in limits.items() if value is not None}
        kind |= {"description": one.label, "nullable": one.optional}
        properties[one.name] = kind
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _body(about: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "requestBody": {
            "description": about,
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    }


def _upload_body() -> dict[str, Any]:
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {"type": "object"}}}}
    }
