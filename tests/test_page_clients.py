"""The page's own addresses with many browsers at once: nothing is lost or doubled, and nobody is given what is another's."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("app_fixtures", ROOT / "tests" / "test_app.py")
assert _spec is not None
assert _spec.loader is not None
app_fixtures = sys.modules["app_fixtures"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(app_fixtures)
jobs, page_of = (getattr(app_fixtures, name) for name in ("jobs", "page_of"))
pytestmark = [
    # gradio leaves event loops and sockets to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings(
        "ignore:'future.no_silent_downcasting'"
    ),  # gradio's own, as it counts its events
]

CLIENTS = 50
WAIT = 120.0
"""Longest wait for anything, in s: busy machines are slow."""


class Client:
    """A browser, as the server knows it: a session that asks for events by their numbers."""

    def __init__(self, url: str, create: Any, blocks: Any, number: int) -> None:
        self.create, self.blocks, self.number = create, blocks, number
        self.session, self.prompt, self.seed = f"session{number}", f"a dog number {number}", 1000 + number
        self.http = httpx.Client(base_url=f"{url.rstrip('/')}/gradio_api", timeout=WAIT, trust_env=False)

    def event(self, function: str, given: dict[Any, Any]) -> dict[Any, Any]:
        """Ask for an event with the values of some components; return the last value of every component that it answers."""
        found = next(one for one in self.blocks.fns.values() if getattr(one.fn, "__name__", "") == function)
        body = {
            "data": [given.get(one) for one in found.inputs],
            "fn_index": found._id,
            "session_hash": self.session,
        }
        data = self._queued(body) if found.queue else self.http.post("/run/predict", json=body).json()["data"]
        return dict(zip(found.outputs, data, strict=True))

    def _queued(self, body: dict[str, Any]) -> list[Any]:
        asked = self.http.post("/queue/join", json=body)
        assert asked.status_code == 200, asked.text
        end = time.monotonic() + WAIT
        with self.http.stream("GET", "/queue/data", params={"session_hash": self.session}) as answer:
            for line in answer.iter_lines():  # the server lets hear of itself while there is nothing to tell
                assert time.monotonic() < end, "the answer never came"
                told = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if told.get("msg") == "process_completed":
                    assert told["success"], told
                    return list(told["output"]["data"])
        raise AssertionError("the server ended the line without an answer")

    def enter(self) -> str:
        house = self.create.house
        (name,) = self.event("enter", {}).values()
        assert house.session(app_fixtures.SimpleNamespace(session_hash=self.session)) == name
        return str(name)

    def ask(self) -> str:
        """Press Generate; return the name of the job."""
        values = app_fixtures.controls(self.create.methods, prompt=self.prompt, seed=str(self.seed))
        given = {component: values[name] for name, component in self.create.inputs.items()}
        return str(self.event("_submit", given)[self.create.parts["remembered"]])

    def seen(self) -> bytes | None:
        """Watch this session's job to its end; return the bytes of the picture that is shown then, if one is."""
        shown = self.event("_watch", {})[self.create.parts["picture"]]
        found = shown.get("value")
        return None if found is None else self.http.get(f"/file={found['path']}").content

    def take_up(self, job: str) -> None:
        """Come back after a reload, with the name of the job that the browser says was its last."""
        self.event("_again", {self.create.parts["remembered"]: job})


fake = app_fixtures.fake


@pytest.fixture
def clients(jobs: Any, page_of: Any) -> Iterator[list[Client]]:
    from app_serve import launch_options

    create, blocks = page_of(jobs)
    _, url, _ = blocks.launch(
        prevent_thread_lock=True, **launch_options("127.0.0.1", None, None, spaces=False)
    )
    found = [Client(url, create, blocks, number) for number in range(CLIENTS)]
    try:
        yield found
    finally:
        for one in found:
            one.http.close()
        blocks.close(verbose=False)
        blocks.server.thread.join(WAIT)
    assert not blocks.server.thread.is_alive(), "the server goes when the test does"


def test_fifty_browsers_at_once_each_get_their_own_picture_and_no_other(
    clients: list[Client], jobs: Any, fake: Any
) -> None:
    together = threading.Barrier(CLIENTS, timeout=WAIT)

    def one(client: Client) -> tuple[str, str]:
        try:
            return run(client)
        except BaseException:  # the others must not wait for what does not come any more
            together.abort()
            fake.go.release(1000 * CLIENTS * fake.steps)
            raise

    def run(client: Client) -> tuple[str, str]:
        together.wait()
        owner = client.enter()
        together.wait()
        name = client.ask()
        if together.wait() == 0:  # all of them wait now
            fake.go.release(CLIENTS * fake.steps)
        assert client.seen() == b"\x89PNG of " + f"{client.seed}.png".encode()
        return owner, name

    with ThreadPoolExecutor(CLIENTS) as pool:
        told = list(pool.map(one, clients))
    owners, names = ([one[place] for one in told] for place in (0, 1))
    assert len(set(owners)) == len(set(names)) == CLIENTS
    assert sorted(fake.order) == sorted(client.prompt for client in clients), (
        "each of them was made, and once"
    )
    assert jobs.ledger.counts()["done"] == CLIENTS
    for client, (owner, name), (_, strange) in zip(clients, told, told[1:] + told[:1], strict=True):
        assert jobs.get(name, owner).request.prompt == client.prompt
        assert jobs.get(strange, owner) is None
    first, strange = clients[0], told[1][1]
    first.take_up(strange)
    assert first.seen() is None, "a name alone opens nothing"
    first.take_up(names[0])
    assert first.seen() == b"\x89PNG of " + f"{first.seed}.png".encode()
