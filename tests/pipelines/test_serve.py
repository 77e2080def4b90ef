"""HTTP: jobs, files, events and pictures in OpenAI's form, with a quick stand-in for the model."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from pipelines._attack_parts import ALICE, BOB, Caller, chunk, picture
from pipelines._serve_desk import WAITING
from pipelines.jobs import Ledger
from pipelines.request import Request, settings

_place = importlib.util.spec_from_file_location("served", Path(__file__).with_name("served.py"))
assert _place is not None
assert _place.loader is not None
served = importlib.util.module_from_spec(_place)
_place.loader.exec_module(served)
STEPS, Place, place = served.STEPS, served.Place, served.place
idle, over, png = served.idle, served.over, served.png

# Jobs


def test_a_job_from_its_request_to_its_bytes(place: Place) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/jobs", json={"prompt": "a dog", "seed": 7, "width": 64})
        assert answer.status_code == 202
        assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
        job = await over(client, answer.json()["id"])
        assert (job["state"], job["pixels"], job["request"]["seed"], job["request"]["model"]) == (
            "done",
            "of 7",
            7,
            "tiny",
        )
        (file,) = job["files"]
        got = await client.get(file["url"])
        assert (got.status_code, got.headers["content-type"]) == (200, "image/png")
        stored = place.ledger.get(job["id"])
        assert stored is not None
        assert got.content == Path(stored.files[0]).read_bytes()
        assert str(place.ledger.path.parent) not in json.dumps(job)

    place.run(work)


def test_each_picture_is_a_job_of_its_own(place: Place) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        jobs = (await client.post("/v1/jobs", json={"prompt": "dogs", "seed": 5, "images": 3})).json()["data"]
        assert [job["request"]["seed"] for job in jobs] == [5, 6, 7]
        assert [(await over(client, job["id"]))["pixels"] for job in jobs] == ["of 5", "of 6", "of 7"]
        listed = (await client.get("/v1/jobs", params={"state": "done", "limit": "2"})).json()["data"]
        assert [job["id"] for job in listed] == [jobs[2]["id"], jobs[1]["id"]]

    place.run(work)


def test_an_idempotency_key_makes_one_job(place: Place) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        body, key = {"prompt": "a dog", "images": 2}, {"idempotency-key": "once-1"}
        answers = await asyncio.gather(*(client.post("/v1/jobs", json=body, headers=key) for _ in range(10)))
        assert len({json.dumps([job["id"] for job in answer.json()["data"]]) for answer in answers}) == 1
        other = await client.post("/v1/jobs", json=body | {"seed": 9}, headers=key)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency")
        async with place.client(BOB) as bob:  # another owner's key is another key
            assert (await bob.post("/v1/jobs", json=body | {"seed": 9}, headers=key)).status_code == 202
        assert len(place.ledger.jobs(owner="alice")) == 2
        twice = [(await client.post("/v1/jobs", json=body)).json()["data"][0]["id"] for _ in range(2)]
        assert len(set(twice)) == 2, "without a key every call is a new job"

    place.run(work)


def test_cancelling_stops_a_running_job_at_its_next_step(place: Place) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        name = (await client.post("/v1/jobs", json={"prompt": "slow dog"})).json()["id"]
        while (await client.get(f"/v1/jobs/{name}")).json()["state"] != "running":
            await asyncio.sleep(0.01)
        assert (await client.delete(f"/v1/jobs/{name}")).json()["state"] == "cancelled"
        place.working.go.set()  # type: ignore[union-attr]
        assert (await client.delete(f"/v1/jobs/{name}")).json()["state"] == "cancelled"
        assert (await over(client, (await client.post("/v1/jobs", json={"prompt": "cat"})).json()["id"]))[
            "state"
        ] == "done"
        assert place.working.made == 1  # type: ignore[union-attr]

    place.run(work)


def test_a_failed_job_says_why_and_names_no_path(place: Place) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        name = (await client.post("/v1/jobs", json={"prompt": "bad dog"})).json()["id"]
        job = await over(client, name)
        assert (job["state"], job["error"]) == ("failed", "image must be good; got x.png")

    place.run(work)


def test_the_queue_of_one_owner_is_bounded(idle: Place) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/jobs", json={"prompt": "x", "images": WAITING})).status_code == 202
        full = await client.post("/v1/jobs", json={"prompt": "x"})
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        async with idle.client(BOB) as bob:
            assert (await bob.post("/v1/jobs", json={"prompt": "x"})).status_code == 202

    idle.run(work)


# Events


def events_of(lines: list[str]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in "\n".join(lines).split("\n\n"):
        parts = dict(line.partition(": ")[::2] for line in block.splitlines())
        if "event" in parts:
            found.append((parts["event"], json.loads(parts["data"])))
    return found


async def listen(client: httpx.AsyncClient, name: str) -> list[tuple[str, dict[str, Any]]]:
    async with client.stream("GET", f"/v1/jobs/{name}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        return events_of([line async for line in stream.aiter_lines()])


def test_events_go_from_now_to_the_end(place: Place) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        name = (await client.post("/v1/jobs", json={"prompt": "slow dog"})).json()["id"]
        while (await client.get(f"/v1/jobs/{name}")).json()["phase"] != "denoise":
            await asyncio.sleep(0.01)
        listeners = [asyncio.create_task(listen(client, name)) for _ in range(3)]
        await asyncio.sleep(0.3)
        place.working.go.set()  # type: ignore[union-attr]
        for told in await asyncio.gather(*listeners):
            assert told[0][0] == "progress"
            assert told[0][1]["progress"] == {"phase": "denoise", "step": 1, "steps": STEPS}
            assert (told[-1][0], told[-1][1]["state"], len(told[-1][1]["files"])) == ("done", "done", 1)
            assert [name for name, _ in told].count("done") == 1
        assert [event for event, _ in await listen(client, name)] == ["done"], "an ended job is told once"

    place.run(work)


def test_a_cancelled_job_ends_its_events(idle: Place) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        name = (await client.post("/v1/jobs", json={"prompt": "dog"})).json()["id"]
        listening = asyncio.create_task(listen(client, name))
        await asyncio.sleep(0.1)
        await client.delete(f"/v1/jobs/{name}")
        assert [event for event, _ in await listening] == ["waiting", "cancelled"]

    idle.run(work)


# Files


@pytest.mark.parametrize("form", [True, False])
def test_an_upload_is_kept_for_its_owner(place: Place, form: bool) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        more = (
            {"files": {"file": ("../../a.png", png())}}
            if form
            else {"content": png(), "headers": {"content-type": "image/png"}}
        )
        told = (await client.post("/v1/files", **more)).json()  # type: ignore[arg-type]
        assert (told["bytes"], told["leapfrog"]) == (len(png()), {"width": 32, "height": 32})
        assert (await client.get(f"/v1/files/{told['id']}")).content == png()
        job = await over(
            client, (await client.post("/v1/jobs", json={"prompt": "x", "image": told["id"]})).json()["id"]
        )
        assert job["request"]["image"] == told["id"]
        async with place.client(BOB) as bob:
            assert (await bob.get(f"/v1/files/{told['id']}")).status_code == 404
            stolen = await bob.post("/v1/jobs", json={"prompt": "x", "image": told["id"]})
            assert (stolen.status_code, stolen.json()["error"]["field"]) == (400, "image")
        assert (await client.delete(f"/v1/files/{told['id']}")).json()["deleted"]
        assert (await client.get(f"/v1/files/{told['id']}")).status_code == 404

    place.run(work)


def test_a_bomb_is_told_apart_by_its_header(idle: Place) -> None:
    call = Caller(idle.app)
    for data, words in (
        (picture(20_000, 20_000, pixels=b""), "64 million pixels"),
        (b"GIF89a" + b"\0" * 20, "by its content"),
    ):
        error = json.loads(call("POST", "/v1/files", data, [("content-type", "image/png")]).body)["error"]
        assert words in error["message"]
        assert error["field"] == "file"


def test_uploads_are_bounded(idle: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines._serve_files.UPLOADS", 2)
    call = Caller(idle.app)
    statuses = [call("POST", "/v1/files", png(), [("content-type", "image/png")]).status for _ in range(3)]
    assert statuses == [200, 200, 413]


# Owners


def test_two_owners_never_see_each_other(place: Place) -> None:
    async def work(alice: httpx.AsyncClient) -> None:
        name = (await alice.post("/v1/jobs", json={"prompt": "mine"})).json()["id"]
        job = await over(alice, name)
        async with place.client(BOB) as bob:
            for path in (f"/v1/jobs/{name}", f"/v1/jobs/{name}/events", job["files"][0]["url"]):
                assert (await bob.get(path)).status_code == 404
            assert (await bob.delete(f"/v1/jobs/{name}")).status_code == 404
            assert (await bob.get("/v1/jobs")).json()["data"] == []
        assert (await alice.get(f"/v1/jobs/{name}")).json()["state"] == "done"

    place.run(work)


def test_browsers_without_keys_are_told_apart_by_their_sessions(tmp_path: Path) -> None:
    place = Place(tmp_path, keys=False)

    async def work(_: httpx.AsyncClient) -> None:
        async with place.client("") as first, place.client("") as second, place.client("") as program:
            for one in (first, second):
                await one.get("/", headers={"accept": "text/html"})
                assert one.cookies.get("leapfrog_session")
            name = (await first.post("/v1/jobs", json={"prompt": "mine"})).json()["id"]
            assert (await first.get(f"/v1/jobs/{name}")).status_code == 200
            for other in (second, program):
                assert (await other.get(f"/v1/jobs/{name}")).status_code == 404

    place.run(work, "")
    place.close()


def test_fifty_clients_at_once(place: Place) -> None:
    async def work(_: httpx.AsyncClient) -> None:
        async def one(number: int) -> tuple[str, int, bytes]:
            async with place.client((ALICE, BOB)[number % 2]) as client:
                answer = await client.post("/v1/jobs", json={"prompt": f"dog {number}", "seed": number})
                name = answer.json()["id"]
                told = await listen(client, name)
                assert told[-1][0] == "done"
                assert told[-1][1]["pixels"] == f"of {number}"
                return name, number, (await client.get(told[-1][1]["files"][0]["url"])).content

        found = await asyncio.gather(*(one(number) for number in range(50)))
        assert len({name for name, _, _ in found}) == 50
        for _, number, data in found:
            with Image.open(io.BytesIO(data)) as opened:
                assert opened.getpixel((0, 0)) == (number, 9, 9)
        assert place.working.made == 50  # type: ignore[union-attr]

    place.run(work)


# Requests


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "x", "model": "/etc"}, "model"),
        ({"prompt": "x", "model": ["tiny"]}, "model"),
        ({"prompt": "x", "image": "/etc/passwd"}, "image"),
        ({"prompt": "x", "profile": "../a"}, "profile"),
        ({"prompt": "x", "loras": ["../a.safetensors:1"]}, "loras"),
        ({"prompt": "x", "controls": ["edges=/etc/passwd:1"]}, "controls"),
        ({"prompt": "x", "width": 33}, "width"),
        ({"prompt": "x", "width": 256}, "width"),
        ({"prompt": "x", "frames": 9}, "frames"),
        ({"model": "numbers", "prompt": "x"}, "class_label"),
        ({"promt": "x"}, "request"),
        ({}, "prompt"),
    ],
)
def test_a_bad_request_is_refused_before_it_is_queued(idle: Place, body: Any, field: str) -> None:
    answer = Caller(idle.app)(
        "POST", "/v1/jobs", json.dumps(body).encode(), [("content-type", "application/json")]
    )
    error = json.loads(answer.body)["error"]
    assert (answer.status, error["code"], error["field"]) == (400, "bad_request", field)
    assert idle.ledger.jobs() == []


def test_every_field_of_a_request_that_may_name_a_file_is_known(idle: Place) -> None:
    """A new field of text is closed over HTTP until somebody decides how it is opened."""
    call = Caller(idle.app)
    for one in settings():
        open_words = ("prompt", "negative_prompt", "prompts", "device", "model", "accelerators")
        if one.type in (str, tuple) and one.choices is None and one.name not in open_words:
            body = {
                "prompt": "x",
                one.name: "../../secret.txt" if one.type is str else ["../../secret.txt=../../secret.txt:1"],
            }
            answer = call(
                "POST", "/v1/jobs", json.dumps(body).encode(), [("content-type", "application/json")]
            )
            assert answer.status == 400, one.name
    assert idle.ledger.jobs() == []


# State


def test_health_and_metrics(place: Place) -> None:
    health = Caller(place.app, "")("GET", "/healthz")
    assert (health.status, json.loads(health.body)) == (200, {"status": "ok", "workers": 1})
    assert Caller(place.app, "")("GET", "/metrics").status == 401
    call = Caller(place.app)
    call("GET", "/v1/jobs/none")
    lines = call("GET", "/metrics").body.decode().splitlines()
    assert 'leapfrog_http_requests_total{method="GET",route="/v1/jobs/{name}",status="404"} 1' in lines
    assert "leapfrog_workers 1" in lines
    assert 'leapfrog_jobs{state="done"} 0' in lines
    for line in lines:
        assert line.startswith("# ") or len(line.rpartition(" ")[2]) > 0
    place.working.stop()  # type: ignore[union-attr]
    assert Caller(place.app, "")("GET", "/healthz").status == 503


def test_openapi_is_for_who_is_logged_in(idle: Place) -> None:
    assert Caller(idle.app, "")("GET", "/openapi.json").status == 401
    told = json.loads(Caller(idle.app)("GET", "/openapi.json").body)
    schema = told["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == {one.name for one in settings()}
    assert (
        schema["properties"]["steps"] | {"type": "integer", "minimum": 1, "maximum": 1000}
        == schema["properties"]["steps"]
    )


def test_an_error_of_ours_is_told_without_its_details(idle: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("/secret/place")

    monkeypatch.setattr(Ledger, "jobs", broken)

    async def work(client: httpx.AsyncClient) -> None:
        answer = await client.get("/v1/jobs")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
        assert "secret" not in answer.text

    idle.run(work)


def test_metadata_chunks_of_an_upload_stay(idle: Place) -> None:
    data = picture(
        more=chunk(
            b"tEXt",
            b"leapfrog\0" + json.dumps({"version": 1, "request": Request(prompt="x").to_dict()}).encode(),
        )
    )
    told = json.loads(Caller(idle.app)("POST", "/v1/files", data, [("content-type", "image/png")]).body)
    assert Caller(idle.app)("GET", f"/v1/files/{told['id']}").body == data
