"""What stands before everything that is served: who may come in, by which name, with how much, and what a browser may do with it.

One ASGI middleware for the page and for HTTP. With `keys`, everybody needs a token (as `Authorization: Bearer`) or a signed
cookie (from the form at /login); without, only this computer is served, and each browser gets a random session of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect

from pipelines._serve_keys import SESSION_SECONDS, TRIES_IN, AddressError, Keys, Login, Sessions, Throttle
from pipelines._serve_names import Hosts, address, inside, loopback, within

__all__ = [
    "AddressError", "Guard", "Hosts", "Keys", "Limits", "Login", "Sessions", "Throttle", "address", "failure", "inside",
    "loopback", "within",
]  # fmt: skip

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

COOKIE = "leapfrog_session"
UPLOAD_MB = 20

_CLOSED = (
    "/docs",
    "/redoc",
    "/gradio_api/openapi.json",
    "/gradio_api/runs",
    "/gradio_api/proxy=",
)
_DESCRIPTION = "/openapi.json"
_UPLOAD = "/gradio_api/upload"
_DATA = ("/v1/", "/healthz", "/metrics", _DESCRIPTION)
"""Paths that no page is at: a browser may do nothing with what they answer."""
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""gradio's page needs scripts and styles of its own text; nothing may come from, or go to, another place."""
_DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
_FORM_POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"
_FORM = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Leapfrog</title><style>body{{font:1rem/1.5 system-ui;max-width:22rem;margin:15vh auto;padding:0 1rem}}
input,button{{font:inherit;width:100%;padding:.5rem;margin:.3rem 0;box-sizing:border-box}}</style>
<h1>Leapfrog</h1><form method="post" action="/login"><label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Come in</button></form><p role="alert">{words}</p></html>"""
_SAFE = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request may bring, in bytes, entries and seconds; `bodies` gives other limits to paths that start so."""

    body: int = (UPLOAD_MB + 1) * 1_000_000
    bodies: tuple[tuple[str, int], ...] = (
        ("/v1/files", (UPLOAD_MB + 1) * 1_000_000),
        ("/v1/images/edits", 4 * (UPLOAD_MB + 1) * 1_000_000),
        ("/v1/", 1_000_000),
        ("/login", 10_000),
    )
    headers: int = 100
    header_bytes: int = 32_000
    path: int = 2_000
    seconds: float = 30.0

    def of(self, path: str) -> int:
        """Return the most bytes of a body at a path."""
        return next((most for start, most in self.bodies if path.startswith(start)), self.body)


@dataclass(slots=True)
class _Visit:
    """One request on its way through: its headers by name, and what the answer gets."""

    scope: Message
    headers: dict[str, str]
    framed: bool
    owner: str | None = None
    cookie: str | None = None
    more: list[tuple[bytes, bytes]] = field(default_factory=list)

    @property
    def path(self) -> str:
        return str(self.scope.get("path", ""))

    @property
    def method(self) -> str:
        return str(self.scope.get("method", "GET"))

    @property
    def address(self) -> str:
        return str((self.scope.get("client") or ("",))[0])

    @property
    def wants_page(self) -> bool:
        return self.method == "GET" and "text/html" in self.headers.get("accept", "")


class _Refused(Exception):
    """A request that goes no further: status, code, words, and headers of the answer."""

    def __init__(self, status: int, code: str, words: str, **headers: str) -> None:
        super().__init__(words)
        self.status, self.code, self.words, self.headers = status, code, words, headers


class Guard:
    """Stand before an ASGI app; what comes through carries its owner in `scope["state"]["owner"]`.

    Args:
        hosts: names that it is served under; None checks no name (a Space, where a proxy does).
        framed: whether other pages may frame this one.
        keys: tokens and their owners; None asks for none.
        sessions: signs the cookies; None hands out none.
        public: paths that need no token.
        secure: the cookie is for https alone.
    """

    def __init__(
        self,
        app: Any,
        hosts: Hosts | frozenset[str] | None = None,
        framed: bool = False,
        *,
        keys: Keys | None = None,
        sessions: Sessions | None = None,
        limits: Limits | None = None,
        throttle: Throttle | None = None,
        public: tuple[str, ...] = ("/healthz",),
        secure: bool = False,
    ) -> None:
        self.app, self.hosts, self.framed, self.keys = app, hosts, framed, keys
        self.sessions = sessions or (Sessions() if keys else None)
        self.limits, self.throttle = limits or Limits(), throttle or Throttle()
        self.public, self.secure = public, secure

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        visit = _Visit(scope, {}, self.framed)
        sent = [False]
        headed = self._headed(visit, send, sent)
        try:
            self._check(visit)
            limited = self._limited(visit, receive)
            if visit.path in ("/login", "/logout") and self.keys is not None:
                await self._door(visit, limited, headed)
                return
            self._admit(visit)
            inner = {**scope, "state": {**scope.get("state", {}), "owner": visit.owner}}
            await self.app(inner, limited if scope["type"] == "http" else receive, headed)
        except _Refused as error:
            await _refuse(visit, error, headed)
        except ClientDisconnect:  # in the middle of what it sent: nobody is there to be answered
            return
        except HTTPException as error:  # of `_limited`, where the app let it through
            if sent[0]:
                raise
            await _refuse(visit, _Refused(error.status_code, "too_much", str(error.detail)), headed)

    def _check(self, visit: _Visit) -> None:
        """Check all that needs no token. Raises: _Refused."""
        pairs = visit.scope.get("headers", [])
        if (
            len(pairs) > self.limits.headers
            or sum(len(k) + len(v) for k, v in pairs) > self.limits.header_bytes
        ):
            raise _Refused(
                431,
                "headers",
                f"at most {self.limits.headers} headers of {self.limits.header_bytes} bytes together",
            )
        for key, value in pairs:
            name = key.decode("latin-1").lower()
            if name in visit.headers and name in (
                "host",
                "content-length",
                "authorization",
                "origin",
                "transfer-encoding",
            ):
                raise _Refused(400, "headers", f"the header {name} may be given once")
            if any(sign in value for sign in (b"\0", b"\r", b"\n")):
                raise _Refused(400, "headers", f"the header {name[:40]} holds a line break or NUL")
            visit.headers[name] = value.decode("latin-1")
        if "transfer-encoding" in visit.headers and "content-length" in visit.headers:
            raise _Refused(400, "headers", "content-length and transfer-encoding exclude each other")
        self._check_place(visit)
        length = visit.headers.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()):
            raise _Refused(400, "headers", "content-length must be a number")
        if len(length) > 15 or int(length) > self.limits.of(visit.path):
            raise _Refused(413, "too_much", f"at most {self.limits.of(visit.path)} bytes may be sent here")

    def _check_place(self, visit: _Visit) -> None:
        """Check the name it was called by, the path, and the page that a browser's request came from."""
        host = visit.headers.get("host", "").lower()
        if self.hosts is not None and _without_port(host) not in self.hosts:
            raise _Refused(421, "host", "this is served under another name")
        path = visit.path
        if len(path) > self.limits.path or len(visit.scope.get("query_string", b"")) > 10 * self.limits.path:
            raise _Refused(414, "path", f"an address of at most {self.limits.path} characters")
        if "\0" in path:
            raise _Refused(400, "path", "an address without NUL")
        if path.startswith(_CLOSED) or "file=http" in path or (path == _DESCRIPTION and self.keys is None):
            raise _Refused(404, "not_found", "not found")
        if visit.method in _SAFE and visit.scope["type"] == "http":
            return
        origin, site = visit.headers.get("origin"), visit.headers.get("sec-fetch-site", "none")
        strange = site in ("cross-site", "same-site") if origin is None else not _same(origin, host)
        if strange and self.hosts is not None:
            raise _Refused(403, "origin", "a page from elsewhere may not ask for this")

    def _admit(self, visit: _Visit) -> None:
        """Find out who it is. Raises: _Refused."""
        visit.owner = self._known(visit)
        if visit.owner is not None:
            return
        if self.keys is None:
            if self.sessions is not None and visit.wants_page and visit.path == "/":
                visit.owner, visit.cookie = self.sessions.issue_new()
            return
        if visit.path in self.public:
            return
        scheme, _, token = visit.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and token.strip():
            visit.owner = self._try(visit, token.strip())
        elif visit.wants_page:
            raise _Refused(303, "login", "log in first", location="/login")
        if visit.owner is None:
            raise _Refused(
                401,
                "token",
                "a known token is needed: Authorization: Bearer TOKEN",
                **{"www-authenticate": "Bearer"},
            )

    def _known(self, visit: _Visit) -> str | None:
        """Return whose signed cookie came along."""
        try:
            cookie = SimpleCookie(visit.headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return None
        return self.sessions.owner(cookie.value) if cookie is not None and self.sessions is not None else None

    def _try(self, visit: _Visit, token: str) -> str | None:
        """Return whose token it is. Raises: _Refused after too many wrong tries."""
        assert self.keys is not None
        owner = None

        def right() -> bool:
            nonlocal owner
            owner = self.keys.owner(token) if self.keys else None
            return owner is not None

        if self.throttle.attempt(visit.address, right) is None:
            raise _Refused(
                429, "throttle", "too many wrong tries; wait a minute", **{"retry-after": str(int(TRIES_IN))}
            )
        return owner

    async def _door(self, visit: _Visit, receive: Receive, send: Send) -> None:
        """Serve /login and /logout."""
        if visit.path == "/logout" and visit.method == "POST":
            visit.cookie = ""
            raise _Refused(303, "login", "you are logged out", location="/login")
        if visit.path == "/logout" or visit.method != "POST":
            await _answer(send, 200, _FORM.format(words=""), "text/html; charset=utf-8")
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        token = parse_qs(body.decode("latin-1"), max_num_fields=10).get("token", [""])[0]
        owner = self._try(visit, token)
        if owner is None:
            await _answer(
                send, 401, _FORM.format(words="This token is not known."), "text/html; charset=utf-8"
            )
            return
        assert self.sessions is not None
        visit.cookie = self.sessions.issue(owner)
        raise _Refused(303, "login", "welcome", location="/")

    def _limited(self, visit: _Visit, receive: Receive) -> Receive:
        """Return a `receive` that counts what comes in, and does not wait for ever."""
        most, got, over = self.limits.of(visit.path), 0, False

        def ended(status: int, words: str) -> Exception:
            # gradio's parser leaves what it has written on the disk, whatever happens, but for its own kind of error
            return (
                MultiPartException(words) if visit.path.startswith(_UPLOAD) else HTTPException(status, words)
            )

        async def limited() -> Message:
            nonlocal got, over
            if over:  # the whole body is here: now the only news is that the other side left
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.limits.seconds)
            except TimeoutError:
                raise ended(408, "the rest of the request did not come") from None
            if message["type"] == "http.disconnect" and visit.path.startswith(_UPLOAD):
                raise ended(400, "the rest of the upload did not come")
            got += len(message.get("body", b""))
            over = not message.get("more_body", False)
            if got > most:
                raise ended(413, f"at most {most} bytes may be sent here, the maximum allowed size")
            return message

        return limited

    def _headed(self, visit: _Visit, send: Send, sent: list[bool]) -> Send:
        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent[0] = True
                message["headers"] = [*message.get("headers", []), *self._headers(visit)]
            await send(message)

        return headed

    def _headers(self, visit: _Visit) -> list[tuple[bytes, bytes]]:
        data = visit.path.startswith(_DATA)
        policy = _DATA_POLICY if data else _FORM_POLICY if visit.path == "/login" else _POLICY
        found = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
        if not self.framed:
            found += [
                (b"x-frame-options", b"DENY"),
                (b"content-security-policy", policy.encode()),
                (b"cross-origin-resource-policy", b"same-origin"),
            ]
        if data or visit.path in ("/login", "/logout"):
            found.append((b"cache-control", b"no-store"))
        if visit.cookie is not None:
            secure = "; Secure" if self.secure or visit.scope.get("scheme") == "https" else ""
            age = int(SESSION_SECONDS) if visit.cookie else 0
            value = f"{COOKIE}={visit.cookie}; Path=/; Max-Age={age}; HttpOnly; SameSite=Strict{secure}"
            found.append((b"set-cookie", value.encode()))
        return found


def failure(code: str, message: str, field: str | None = None) -> dict[str, Any]:
    """Return the JSON of an error; `type` and `param` are what clients of the OpenAI form look for."""
    return {
        "error": {
            "code": code,
            "field": field,
            "message": message,
            "type": "invalid_request_error",
            "param": field,
        }
    }


def _same(origin: str, host: str) -> bool:
    """Whether a page's origin is the place that it asks."""
    scheme, _, rest = origin.lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme, " ")
    return rest.removesuffix(port) == host.removesuffix(port) != ""


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return name if port.isdigit() else host


async def _refuse(visit: _Visit, error: _Refused, send: Send) -> None:
    if visit.scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": error.words})
        return
    text = json.dumps(failure(error.code, error.words))
    more = [(key.encode(), value.encode()) for key, value in error.headers.items()]
    await _answer(send, error.status, text, "application/json", more)


async def _answer(
    send: Send, status: int, words: str, kind: str, more: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    body = words.encode()
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
