"""How the page is served: bound to this computer unless guarded by a password, offline, and with every limit of gradio set.

Differs: gradio's own defaults have no limit on uploads or the queue, and analytics, monitoring and run history on.
"""

from __future__ import annotations

import hmac
import ipaddress
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

UPLOAD_MB = 20
EVENTS = 500
"""Most events that wait in gradio's queue."""
SESSIONS = 500
THREADS = 16
TRIES, TRIES_IN = 5, 60.0
"""Wrong passwords within so many seconds, after which nobody is let in for a while."""
DAY = 86_400

_CLOSED = (
    "/openapi.json",
    "/docs",
    "/redoc",
    "/gradio_api/openapi.json",
    "/gradio_api/runs",
    "/gradio_api/proxy=",
)
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'"
)


class AddressError(ValueError):
    """An address that the page will not be bound to, in words."""


def address(host: str | None, auth: bool, spaces: bool) -> str:
    """Return the address to bind to: this computer alone, unless there is a password or a Space around it.

    Raises:
        AddressError: other computers could reach the page, and no password is set.
    """
    if spaces:
        return host or "0.0.0.0"
    host = host or "127.0.0.1"
    if not (auth or loopback(host)):
        raise AddressError(
            f"{host} can be reached by other computers, and no password is set; set LEAPFROG_AUTH=name:password, "
            "or leave --host out"
        )
    return host


def loopback(host: str) -> bool:
    """Whether only this computer can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Login:
    """Check a name and password in constant time; after five wrong ones within a minute, refuse until the minute is over."""

    def __init__(self, pair: str, clock: Callable[[], float] = time.monotonic) -> None:
        name, colon, password = pair.partition(":")
        if not (name and colon and len(password) >= 8):
            raise AddressError(
                "LEAPFROG_AUTH must be name:password, with a password of at least 8 characters"
            )
        self._pair = (name.encode(), password.encode())
        self._clock = clock
        self._wrong: deque[float] = deque(maxlen=TRIES)
        self._lock = threading.Lock()

    def __call__(self, name: str, password: str) -> bool:
        with self._lock:
            now = self._clock()
            if len(self._wrong) == TRIES and now - self._wrong[0] < TRIES_IN:
                return False
            same = [
                hmac.compare_digest(a, b.encode()) for a, b in zip(self._pair, (name, password), strict=True)
            ]
            if not all(same):
                self._wrong.append(now)
            return all(same)


class Guard:
    """Stand before gradio: strict Host, no description of the interface, and headers that keep the browser on this page."""

    def __init__(self, app: Any, hosts: frozenset[str] | None, framed: bool) -> None:
        self.app, self.hosts, self.framed = app, hosts, framed

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts is not None and name not in self.hosts:
            await _answer(send, 421, "this page is served under another name")
        elif scope["path"].startswith(_CLOSED) or "file=http" in scope["path"]:
            await _answer(send, 404, "not found")
        else:
            await self.app(scope, receive, self._headed(send))

    def _headed(self, send: Send) -> Send:
        headers = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
        if not self.framed:
            headers += [(b"x-frame-options", b"DENY"), (b"content-security-policy", _POLICY.encode())]

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *headers]
            await send(message)

        return headed


async def _answer(send: Send, status: int, words: str) -> None:
    await send(
        {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]}
    )
    await send({"type": "http.response.body", "body": words.encode()})


def launch_options(host: str, port: int | None, login: Login | None, spaces: bool) -> dict[str, Any]:
    """Return every option of gradio's launch that decides who may do what, and how much of it."""
    from starlette.middleware import Middleware

    names = {"127.0.0.1", "localhost", "[::1]", host.lower()}
    known = frozenset(names) if loopback(host) and not spaces else None
    return {
        "server_name": host,
        "server_port": port,
        "share": False,
        "auth": login,
        "max_file_size": UPLOAD_MB * 1_000_000,
        "max_threads": THREADS,
        "state_session_capacity": SESSIONS,
        "show_error": False,
        "enable_monitoring": False,
        "run_history": False,
        "footer_links": [],
        "ssr_mode": False,
        "mcp_server": False,
        "pwa": False,
        "strict_cors": True,
        "allowed_paths": [],
        "quiet": True,
        "app_kwargs": {
            "openapi_url": None,
            "docs_url": None,
            "redoc_url": None,
            "middleware": [Middleware(Guard, hosts=known, framed=spaces)],
        },
    }
