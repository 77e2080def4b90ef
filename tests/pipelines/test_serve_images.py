"""HTTP: pictures in OpenAI's form."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from pipelines import serve
from pipelines._attack_parts import ALICE, Caller
from pipelines._serve_images import FIELDS

_place = importlib.util.spec_from_file_location("served", Path(__file__).with_name("served.py"))
assert _place is not None
assert _place.loader is not None
served = importlib.util.module_from_spec(_place)
_place.loader.exec_module(served)
Place, place, idle, png = served.Place, served.place, served.idle, served.png

# OpenAI's form


def test_generations_in_openais_form(place: Place) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        body = {
            "prompt": "a dog",
            "model": "tiny",
            "n": 2,
            "size": "64x64",
            "user": "u1",
            "quality": "auto",
            "leapfrog": {"seed": 4},
        }
        told = (await client.post("/v1/images/generations", json=body)).json()
        assert set(told) == {"created", "data", "output_format", "size", "leapfrog"}
        assert (type(told["created"]), told["output_format"], told["size"]) == (int, "png", "64x64")
        assert [set(one) for one in told["data"]] == [{"b64_json"}] * 2
        colours = [
            Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))).getpixel((0, 0)) for one in told["data"]
        ]
        assert colours == [(4, 9, 9), (5, 9, 9)]
        assert [job["request"]["seed"] for job in told["leapfrog"]["jobs"]] == [4, 5]
        drawn = [(await client.post("/v1/images/generations", json={"prompt": "x"})).json() for _ in range(2)]
        assert len({one["leapfrog"]["jobs"][0]["request"]["seed"] for one in drawn}) == 2, (
            "no seed: a new one"
        )

    place.run(work)


def test_edits_in_openais_form(place: Place) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        data = {
            "prompt": "a dog",
            "response_format": "url",
            "leapfrog": '{"strength": 0.4, "seed": 3}',
            "n": "1",
        }
        told = (await client.post("/v1/images/edits", data=data, files={"image": ("a.png", png())})).json()
        (one,) = told["data"]
        assert set(one) == {"url"}
        assert (await client.get(one["url"])).content.startswith(b"\x89PNG")
        request = told["leapfrog"]["jobs"][0]["request"]
        assert (request["strength"], request["seed"]) == (0.4, 3)
        assert (await client.get(f"/v1/files/{request['image']}")).content == png()
        for files in ({}, {"image": ("a.png", b"GIF89a")}):
            answer = await client.post(
                "/v1/images/edits", data={"prompt": "x"}, files=files or {"other": ("b", b"c")}
            )
            assert answer.status_code == 400

    place.run(work)


def test_models_in_openais_form(idle: Place) -> None:
    told = json.loads(Caller(idle.app)("GET", "/v1/models").body)
    assert told["object"] == "list"
    assert [set(one) for one in told["data"]] == [{"id", "object", "created", "owned_by", "leapfrog"}] * 2
    assert [(one["id"], one["object"]) for one in told["data"]] == [("tiny", "model"), ("numbers", "model")]
    assert json.loads(Caller(idle.app)("GET", "/v1/models/tiny").body)["leapfrog"]["steps"] == 4
    assert Caller(idle.app)("GET", "/v1/models/none").status == 404


def test_the_fields_of_the_form_are_the_documented_ones() -> None:
    create = {
        "prompt", "background", "model", "moderation", "n", "output_compression", "output_format", "partial_images", "quality",
        "response_format", "size", "stream", "style", "user",
    }  # fmt: skip
    edit = create - {"style", "moderation"} | {"image", "mask", "input_fidelity"}
    assert set(FIELDS) == create | edit | {"leapfrog"}


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 400, "prompt"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": "x", "n": 0}, 400, "n"),
        ({"prompt": "x", "n": True}, 400, "n"),
        ({"prompt": "x", "size": "big"}, 400, "size"),
        ({"prompt": "x", "size": "33x64"}, 400, "width"),
        ({"prompt": "x", "model": "gpt-image-1"}, 404, "model"),
        ({"prompt": "x", "quality": "hd"}, 400, "quality"),
        ({"prompt": "x", "style": "vivid"}, 400, "style"),
        ({"prompt": "x", "stream": True}, 400, "stream"),
        ({"prompt": "x", "output_compression": True}, 400, "output_compression"),
        ({"prompt": "x", "response_format": "gif"}, 400, "response_format"),
        ({"prompt": "x", "image": "up_1"}, 400, "image"),
        ({"prompt": "x", "leapfrog": {"prompt": "y"}}, 400, "leapfrog"),
        ({"prompt": "x", "leapfrog": {"stepps": 3}}, 400, "request"),
        ({"prompt": "x", "leapfrog": []}, 400, "leapfrog"),
        ({"prompt": "x", "promt": "x"}, 400, "promt"),
    ],
)
def test_what_the_form_cannot_mean_is_refused_by_name(
    idle: Place, body: Any, status: int, field: str
) -> None:
    answer = Caller(idle.app)(
        "POST", "/v1/images/generations", json.dumps(body).encode(), [("content-type", "application/json")]
    )
    error = json.loads(answer.body)["error"]
    assert (answer.status, error["field"], error["param"], error["type"]) == (
        status,
        field,
        field,
        "invalid_request_error",
    )


def test_a_failed_picture_is_no_success(place: Place) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/images/generations", json={"prompt": "bad", "n": 2})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "job_failed")

    place.run(work)


def test_slow_pictures_are_not_waited_for_for_ever(idle: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PATIENCE", 0.1)
    body = json.dumps({"prompt": "x"}).encode()
    answer = Caller(idle.app)("POST", "/v1/images/generations", body, [("content-type", "application/json")])
    (job,) = idle.ledger.jobs()
    assert answer.status == 504
    assert job.name in json.loads(answer.body)["error"]["message"]
    assert job.state == "waiting"


def test_who_leaves_cancels_the_pictures(idle: Place) -> None:
    async def work() -> None:
        body, sent = json.dumps({"prompt": "x"}).encode(), list[Any]()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = {
            "host": "localhost",
            "content-type": "application/json",
            "authorization": f"Bearer {ALICE}",
        }
        scope = {
            "type": "http", "method": "POST", "path": "/v1/images/generations", "query_string": b"", "scheme": "http",
            "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
        }  # fmt: skip
        await idle.app(scope, receive, send)

    asyncio.run(work())
    assert [job.state for job in idle.ledger.jobs()] == ["cancelled"]
