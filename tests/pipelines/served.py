"""An app of HTTP with its folders and a quick stand-in for the model."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from pipelines._attack_parts import ALICE, BOB
from pipelines.catalog import Card
from pipelines.guard import Guard, Keys
from pipelines.jobs import Job, Ledger
from pipelines.serve import http_app

CARDS = {
    "tiny": Card(name="tiny", title="Tiny", width=64, height=64, multiple=8, low=32, high=128, steps=4),
    "numbers": Card(name="numbers", task="class-to-image", classes=10),
}


STEPS = 3


class Working:
    """A worker in a thread that paints instead of denoising; a prompt with `bad` fails, with `slow` it waits at its first step."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.made, self.go = ledger, 0, threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def alive(self) -> int:
        return int(self._thread.is_alive())

    def stop(self) -> None:
        self._stop.set()
        self.go.set()
        self._thread.join(10)

    def _work(self) -> None:
        while not self._stop.is_set():
            job = self.ledger.lease("test")
            if job is None:
                self._stop.wait(0.01)
            elif "bad" in job.item.request["prompt"]:
                self.ledger.failed(job, f"image must be good; got {job.item.folder}/x.png", again=False)
            else:
                self._make(job)

    def _make(self, job: Job) -> None:
        for step in range(STEPS):
            if not self.ledger.beat(job, {"phase": "denoise", "step": step + 1, "steps": STEPS}):
                return
            if "slow" in job.item.request["prompt"]:
                self.go.wait(20)
        self.made += 1
        file = Path(job.item.folder) / f"{job.name}.png"
        Image.new("RGB", (64, 64), (job.item.request["seed"] % 256, 9, 9)).save(file)
        self.ledger.done(
            job,
            [file],
            {"pixels": f"of {job.item.request['seed']}", "effective": {"width": 64, "height": 64}},
        )


class Place:
    """An app with its folders and worker, and clients of two owners."""

    def __init__(self, folder: Path, keys: bool = True, working: bool = True) -> None:
        self.ledger = Ledger(folder / "jobs.sqlite")
        self.working = Working(self.ledger) if working else None
        self.app: Guard = http_app(
            self.ledger, self.working, folder=folder / "out", uploads=folder / "uploads", models=CARDS,
            keys=Keys({ALICE: "alice", BOB: "bob"}) if keys else None,
        )  # fmt: skip

    @asynccontextmanager
    async def client(self, token: str = ALICE) -> AsyncIterator[httpx.AsyncClient]:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost", headers=headers
        ) as made:
            yield made

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable[Any]], token: str = ALICE) -> Any:
        async def whole() -> Any:
            async with self.client(token) as client:
                return await work(client)

        return asyncio.run(whole())

    def close(self) -> None:
        if self.working is not None:
            self.working.stop()
        self.ledger.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Place]:
    """The same without a worker: jobs wait."""
    made = Place(tmp_path, working=False)
    yield made
    made.close()


async def over(client: httpx.AsyncClient, name: str) -> dict[str, Any]:
    for _ in range(2000):
        job = (await client.get(f"/v1/jobs/{name}")).json()
        if job["state"] not in ("waiting", "running"):
            return job
        await asyncio.sleep(0.01)
    raise AssertionError("it never ended")


def png(width: int = 32, height: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "blue").save(buffer, "PNG")
    return buffer.getvalue()
