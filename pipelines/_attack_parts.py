"""What attacks are made with: requests that no client has straightened, pictures that lie, and a count of what was let through."""

from __future__ import annotations

import asyncio
import json
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

ALICE, BOB = "alice-" + "a" * 32, "bob-" + "b" * 32
CANARY = "nobody may read this sentence"


@dataclass(slots=True)
class Attack:
    """One kind of attack: how often it was tried, and what was let through."""

    name: str
    tried: int = 0
    open: list[str] = field(default_factory=list)

    def note(self, what: str, refused: bool) -> None:
        """Count one try."""
        self.tried += 1
        if not refused:
            self.open.append(what[:100])

    def __str__(self) -> str:
        verdict = "refused" if not self.open else "NOT REFUSED: " + "; ".join(self.open[:3])
        return f"{self.name:<28} {self.tried:>4} tried  {verdict}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def refused(self) -> bool:
        """Whether it is a refusal in words: 4xx, JSON with an error, and nothing of the secret in it."""
        try:
            told = bool(json.loads(self.body)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            told = False
        return 400 <= self.status < 500 and told and CANARY.encode() not in self.body


class Caller:
    """Hand requests to an ASGI app as they are, from an address."""

    def __init__(self, app: Any, token: str = ALICE, address: str = "203.0.113.7") -> None:
        self.app, self.token, self.address = app, token, address

    def __call__(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Iterable[tuple[str, str]] = (),
        *,
        host: str = "localhost",
        token: str | None = None,
        pieces: int = 1,
        length: int | None = None,
    ) -> Answer:
        """Return the answer. `pieces`: in how many the body comes; `length`: what content-length says, -1 for no such header."""
        token = self.token if token is None else token
        given = [("host", host), *headers]
        given += [("authorization", f"Bearer {token}")] if token else []
        given += (
            [("content-length", str(len(body) if length is None else length))]
            if body and length != -1
            else []
        )
        raw, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": unquote_to_bytes(raw).decode("utf-8", "replace"), "raw_path": raw.encode("utf-8", "replace"),
            "query_string": query.encode(), "root_path": "", "client": (self.address, 50000), "server": ("localhost", 80),
            "headers": [(key.encode("latin-1"), value.encode("latin-1")) for key, value in given],
        }  # fmt: skip
        return asyncio.run(self._run(scope, body, pieces))

    async def _run(self, scope: dict[str, Any], body: bytes, pieces: int) -> Answer:
        size = max(1, -(-len(body) // pieces))
        parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            if not parts:
                await asyncio.sleep(3600)
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], headers, b"".join(one.get("body", b"") for one in sent[1:]))


def picture(width: int = 32, height: int = 32, more: bytes = b"", pixels: bytes | None = None) -> bytes:
    """Return the bytes of a PNG that says it has some size, with chunks of ours, whatever its pixels are."""
    pixels = b"\0" * ((3 * width + 1) * height) if pixels is None else pixels
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + more
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
