"""A whole server in its own process, and requests made by chance. That every door gives one picture stands in `test_doors`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipelines import _serving, cli
from pipelines._attack_parts import Caller, chunk, picture
from pipelines._serve_images import FIELDS
from pipelines.catalog import Card
from pipelines.guard import Keys
from pipelines.jobs import Ledger
from pipelines.request import Request, RequestError, settings
from pipelines.serve import http_app

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "k" * 32
BOUNDED = hypothesis_settings(
    max_examples=50,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


# A whole server

BLOCK = """
import os, socket
log = open(os.environ["BLOCK_LOG"], "a", buffering=1)
log.write("blocked\\n")
def guarded(real):
    def connect(self, place, *rest):
        if self.family != socket.AF_UNIX and not str(place[0]).startswith(("127.", "::1", "localhost")):
            log.write(f"OUT {place}\\n")
            raise OSError("no way out")
        return real(self, place, *rest)
    return connect
socket.socket.connect, socket.socket.connect_ex = guarded(socket.socket.connect), guarded(socket.socket.connect_ex)
real = socket.getaddrinfo
def looked(host, *rest, **more):
    if host not in (None, "127.0.0.1", "localhost", "::1"):
        log.write(f"OUT {host}\\n")
        raise OSError("no names")
    return real(host, *rest, **more)
socket.getaddrinfo = looked
"""


@pytest.fixture
def served(tiny: str, tmp_path: Path) -> Iterator[tuple[str, Path, subprocess.Popen[str]]]:
    """Yield a running server with a page, one worker, and no way out of this computer."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    (tmp_path / "tokens").write_text(f"me {TOKEN}\n")
    (tmp_path / "tokens").chmod(0o600)
    log = tmp_path / "log"
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "TRANSFORMERS_", "GRADIO_"))
    }
    environment |= {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "BLOCK_LOG": str(log),
        "LEAPFROG_STATE": str(tmp_path / "state"),
    }
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "serve",
        "--with-page",
        "--model",
        tiny,
        "--port",
        "0",
        "--json",
    ]
    command += ["--token-file", str(tmp_path / "tokens"), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"], log, process
    finally:
        process.kill()
        process.communicate()


def test_a_server_with_page_and_worker_goes_nowhere_and_ends_when_asked(
    served: tuple[str, Path, subprocess.Popen[str]],
) -> None:
    url, log, process = served
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=300) as client:
        _until(lambda: _reached(client))
        page = client.get("/", headers={"accept": "text/html"})
        assert all(word in page.text for word in ("Leapfrog", "gradio"))
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        assert httpx.get(f"{url}/config").status_code == 401, (
            "the page's own interface is behind the guard too"
        )
        (model,) = client.get("/v1/models").json()["data"]
        told = client.post(
            "/v1/images/generations", json={"prompt": "a red cat", "leapfrog": {"steps": 2}}
        ).json()
        assert told["leapfrog"]["jobs"][0]["state"] == "done", told
        assert (model["id"], client.get("/healthz").json()) == ("model", {"status": "ok", "workers": 1})
        assert client.get("/openapi.json").json()["info"]["title"] == "Leapfrog"
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    lines = log.read_text().splitlines()
    assert lines.count("blocked") >= 2, "server and worker both ran with their ways out blocked"
    assert [line for line in lines if line.startswith("OUT")] == []


def _reached(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def _until(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("it never came")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "no password is set; give --token-file"),
        (["--host", "203.0.113.9"], "no password is set; give --token-file"),
        (["--workers", "99"], "workers must be a whole number from 0 to 16"),
        (["--port", "http"], "port must be"),
        (["--model", "nothing such"], "nothing such"),
        (["--token-file", "not there"], "cannot be read"),
    ],
)
def test_serve_refuses_in_words(
    flags: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LEAPFROG_STATE", str(tmp_path))
    monkeypatch.delenv("LEAPFROG_TOKENS", raising=False)
    assert cli.main(["serve", *flags]) == cli.BAD_INPUT
    assert words in capsys.readouterr().err


def test_two_models_of_one_name_are_refused(tmp_path: Path, copy_of: Callable[..., Path], tiny: str) -> None:
    other = tmp_path / "model"
    copy_of().rename(other)
    with pytest.raises(RequestError, match="served already"):
        _serving.served_models([tiny, str(other)])


# By chance

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
KNOWN = [one.name for one in settings()]
REQUESTS = st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=12), JSON, max_size=5)
LIKELY = st.fixed_dictionaries(
    {"prompt": st.just("a dog")}, optional={name: JSON for name in KNOWN if name != "prompt"}
)


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    folder = tmp_path_factory.mktemp("fuzz")
    card = Card(name="tiny", width=64, height=64, multiple=8, low=32, high=128)
    ledger = Ledger(folder / "jobs.sqlite")
    yield Caller(
        http_app(ledger, folder=folder / "out", uploads=folder / "up", models={"tiny": card}, keys=Keys({TOKEN: "me"})), TOKEN
    )  # fmt: skip
    ledger.close()


def told(answer: Any) -> int:
    """Check that an answer is JSON and no failure of ours; return its status."""
    found = json.loads(answer.body)
    assert 200 <= answer.status < 500, found
    if answer.status >= 400:
        assert found["error"]["message"]
        assert found["error"]["code"]
    return int(answer.status)


@BOUNDED
@given(body=REQUESTS | LIKELY)
def test_any_request_is_answered(call: Caller, body: Any) -> None:
    told(call("POST", "/v1/jobs", json.dumps(body).encode(), [("content-type", "application/json")]))


@BOUNDED
@given(
    body=st.fixed_dictionaries(
        {"prompt": JSON}, optional={name: JSON for name in FIELDS if name != "prompt"}
    ),
)
def test_any_call_of_openais_form_is_answered(call: Caller, body: Any) -> None:
    from pipelines import serve

    before, serve.PATIENCE = serve.PATIENCE, 0.01  # a legal one waits for nobody: there is no worker
    try:
        answer = call(
            "POST",
            "/v1/images/generations",
            json.dumps(body).encode(),
            [("content-type", "application/json")],
        )
    finally:
        serve.PATIENCE = before
    assert answer.status == 504 or told(answer)


@BOUNDED
@given(
    method=st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD", "WHAT"]),
    place=st.sampled_from(
        ["/v1/jobs", "/v1/jobs/", "/v1/files/", "/v1/files", "/v1/images/edits", "/v1/models/", "/"]
    ),
    rest=st.text(max_size=30),
    body=st.binary(max_size=200),
    kind=st.sampled_from(
        [
            "application/json",
            "multipart/form-data; boundary=x",
            "multipart/form-data",
            "image/png",
            "text/plain",
        ]
    ),
)
def test_any_address_and_body_is_answered(
    call: Caller, method: str, place: str, rest: str, body: bytes, kind: str
) -> None:
    answer = call(method, place + rest.replace("?", ""), body, [("content-type", kind)])
    assert answer.status < 500
    if method != "HEAD" and answer.body:
        told(answer)


CHUNKS = st.lists(
    st.tuples(st.sampled_from([b"tEXt", b"zTXt", b"iTXt"]), st.sampled_from([b"leapfrog\0", b"other\0"]), st.binary(max_size=200)),
    max_size=3,
)  # fmt: skip
IMPORTED = JSON.map(lambda value: json.dumps({"version": 1, "request": value}).encode()) | REQUESTS.map(
    lambda value: json.dumps({"version": 1, "request": value, "report": value}).encode()
)


@BOUNDED
@given(data=st.binary(max_size=300) | IMPORTED, chunks=CHUNKS, cut=st.integers(0, 400), png=st.booleans())
def test_any_file_is_read_as_data(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, chunks: list[Any], cut: int, png: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.png"
    if png:
        more = b"".join(chunk(kind, key + text) for kind, key, text in chunks) + chunk(
            b"tEXt", b"leapfrog\0" + data
        )
        data = picture(8, 8, more=more)
    file.write_bytes(data[: max(0, len(data) - cut)] if cut % 2 else data)
    with contextlib.suppress(RequestError):
        assert isinstance(Request.from_file(file), Request)


def test_a_loop_that_has_ended_does_not_stop_the_others(tmp_path: Path) -> None:
    """Listeners of one event loop that is gone leave those of another alone."""
    from pipelines._serve_events import Watcher, ended
    from pipelines.jobs import Item

    ledger = Ledger(tmp_path / "jobs.sqlite")
    (job,) = ledger.add([Item(request=Request(prompt="x", model="tiny").to_dict())])
    watcher = Watcher(ledger, pause=0.01)
    loop = asyncio.new_event_loop()
    leaving = loop.create_task(ended(watcher, job))
    loop.run_until_complete(asyncio.sleep(0.05))
    leaving.cancel()
    loop.run_until_complete(asyncio.gather(leaving, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    threading.Timer(0.05, lambda: ledger.cancel(name=job.name)).start()
    assert asyncio.run(ended(watcher, job)).state == "cancelled"
    for _ in range(500):
        if watcher._thread is None:
            break
        time.sleep(0.01)
    assert (watcher.listeners, watcher._thread) == (0, None)
    ledger.close()
