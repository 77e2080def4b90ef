"""What stands before everything that is served: each rule by itself, then the attacks of `doctor --security`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from pipelines import guard
from pipelines._attack_parts import Caller
from pipelines._attacks import ATTACKS, NAMES, run_attacks
from pipelines._serve_keys import TRIES, TRIES_IN, readable_by_others
from pipelines.guard import AddressError, Guard, Hosts, Keys, Limits, Sessions, Throttle
from pipelines.request import RequestError

TOKEN = "t" * 32


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the owner and the length of the body."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    text = json.dumps({"owner": scope["state"]["owner"], "bytes": len(body)}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": text})


def guarded(**more: Any) -> Guard:
    return Guard(echo, more.pop("hosts", Hosts()), keys=more.pop("keys", Keys({TOKEN: "ann"})), **more)


def owner(answer: Any) -> Any:
    return json.loads(answer.body)["owner"]


# Who it is


def test_a_token_tells_who_it_is_and_a_session_lasts() -> None:
    app = guarded()
    assert owner(Caller(app, TOKEN)("GET", "/x")) == "ann"
    form = Caller(app, "")
    assert form("GET", "/x").status == 401
    page = form("GET", "/x", headers=[("accept", "text/html")])
    assert (page.status, page.headers["location"]) == (303, "/login")
    assert b'name="token"' in form("GET", "/login").body
    welcome = form("POST", "/login", f"token={TOKEN}".encode())
    assert (welcome.status, welcome.headers["location"]) == (303, "/")
    cookie = welcome.headers["set-cookie"]
    assert all(word in cookie for word in ("HttpOnly", "SameSite=Strict", "Path=/"))
    assert TOKEN not in cookie
    kept = [("cookie", cookie.partition(";")[0])]
    assert owner(form("GET", "/x", headers=kept)) == "ann"
    gone = form("POST", "/logout", headers=kept)
    assert "Max-Age=0" in gone.headers["set-cookie"]


def test_cookies_are_for_https_alone_where_asked() -> None:
    cookie = Caller(guarded(secure=True), "")("POST", "/login", f"token={TOKEN}".encode()).headers[
        "set-cookie"
    ]
    assert cookie.endswith("; Secure")


def test_sessions_end_and_cannot_be_changed() -> None:
    now = [1000.0]
    sessions = Sessions(clock=lambda: now[0])
    cookie = sessions.issue("ann")
    assert sessions.owner(cookie) == "ann"
    for other in (
        cookie.replace("ann", "bob"),
        cookie[:-1] + ("0" if cookie[-1] != "0" else "1"),
        "",
        "a.b.c.d",
        "é" * 9,
    ):
        assert sessions.owner(other) is None
    assert Sessions(clock=lambda: now[0]).owner(cookie) is None, "another start has another secret"
    now[0] += 8 * 86_400
    assert sessions.owner(cookie) is None


def test_without_keys_each_browser_has_a_session_of_its_own() -> None:
    call = Caller(Guard(echo, Hosts(), sessions=Sessions()), "")
    assert owner(call("GET", "/")) is None, "a program is not a browser"
    first, second = (call("GET", "/", headers=[("accept", "text/html")]) for _ in range(2))
    assert owner(first) != owner(second)
    kept = [("cookie", first.headers["set-cookie"].partition(";")[0])]
    assert owner(call("GET", "/v1/x", headers=kept)) == owner(first)
    assert call("GET", "/openapi.json").status == 404


def test_wrong_tokens_are_counted_by_address() -> None:
    now = [0.0]
    app = guarded(throttle=Throttle(clock=lambda: now[0]))
    wrong, other = Caller(app, "w" * 32, "2001:db8::1"), Caller(app, TOKEN, "2001:db8:1::1")
    assert [wrong("GET", "/x").status for _ in range(TRIES + 2)] == [401] * TRIES + [429] * 2
    assert Caller(app, TOKEN, "2001:db8::ffff")("GET", "/x").status == 429, (
        "one network of IPv6 is one guesser"
    )
    assert other("GET", "/x").status == 200
    now[0] += TRIES_IN + 1
    assert Caller(app, TOKEN, "2001:db8::1")("GET", "/x").status == 200


def test_few_addresses_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines._serve_keys.ADDRESSES", 10)
    throttle = Throttle()
    for i in range(100):
        throttle.attempt(f"10.0.0.{i}", lambda: False)
    assert len(throttle._wrong) == 10


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no tokens"),
        ("ann short", "16 to 512"),
        ("ann", "line 1"),
        (f"ann {TOKEN}\nbob {TOKEN}", "line 2 .* repeats"),
        (f"a/../b {TOKEN}", "no name of an owner"),
        (f"ann {TOKEN} more", "line 1"),
    ],
)
def test_a_bad_token_file_is_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(AddressError, match=words):
        Keys.read(file)


def test_a_token_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# who may come\n\nann {TOKEN}\nbob {'u' * 16}\n")
    file.chmod(0o644)
    assert readable_by_others(file)
    file.chmod(0o600)
    assert not readable_by_others(file)
    keys = Keys.read(file)
    assert (keys.owner(TOKEN), keys.owner("u" * 16), keys.owner("v" * 16), keys.owner("")) == (
        "ann",
        "bob",
        None,
        None,
    )
    with pytest.raises(AddressError, match="cannot be read"):
        Keys.read(tmp_path / "none")


# From where


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_open_address_needs_credentials(host: str) -> None:
    with pytest.raises(AddressError, match="token"):
        guard.address(host, auth=False, how="give a token")
    assert guard.address(host, auth=True) == host


def test_hosts() -> None:
    here, there = Hosts.of("127.0.0.1", ["My.Name"]), Hosts.of("0.0.0.0")
    assert "my.name" in here
    assert "localhost" in here
    assert "192.168.1.5" not in here
    assert "192.168.1.5" in there
    assert "[2001:db8::1]" in there
    assert "evil.example" not in there


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("http://localhost:7861", "localhost:7861", 200),
        ("https://localhost", "localhost", 200),
        ("http://localhost:80", "localhost", 200),
        ("http://localhost:7862", "localhost:7861", 403),
        ("http://evil.example", "localhost", 403),
        ("null", "localhost", 403),
    ],
)
def test_a_page_from_elsewhere_may_not_change_anything(origin: str, host: str, status: int) -> None:
    call = Caller(guarded(), TOKEN)
    assert call("POST", "/x", headers=[("origin", origin)], host=host).status == status
    assert call("GET", "/x", headers=[("origin", origin)], host=host).status == 200


def test_websockets_from_elsewhere_are_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    headers = [(b"host", b"localhost"), (b"origin", b"http://evil.example")]
    scope = {"type": "websocket", "path": "/x", "headers": headers}
    asyncio.run(guarded(keys=None)(scope, receive, send))
    assert sent[0]["type"] == "websocket.close"


# How much


def test_bodies_have_limits_by_place() -> None:
    call = Caller(guarded(limits=Limits(body=100, bodies=(("/small", 10),))), TOKEN)
    assert [call("POST", "/small", b"x" * n).status for n in (10, 11)] == [200, 413]
    assert [call("POST", "/large", b"x" * n, pieces=7, length=-1).status for n in (100, 101)] == [200, 413]


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def never() -> Any:
        await asyncio.sleep(60)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/x", "headers": [(b"host", b"localhost")]}
    asyncio.run(guarded(keys=None, limits=Limits(seconds=0.05))(scope, never, send))
    assert sent[0]["status"] == 408


@pytest.mark.parametrize(
    ("last", "limits"),
    [
        ({"type": "http.disconnect"}, Limits()),
        ({"type": "http.request", "body": b"x" * 2_000, "more_body": True}, Limits(body=1_500)),
        (None, Limits(seconds=0.05)),
    ],
    ids=["left", "too much", "too slow"],
)
def test_an_upload_that_ends_in_its_middle_leaves_nothing_on_the_disk(
    last: Any, limits: Limits, tmp_path: Path
) -> None:
    """gradio's own parser writes into files of the upload folder as the bytes come in."""
    from gradio.route_utils import GradioMultiPartParser
    from starlette.formparsers import MultiPartException
    from starlette.requests import Request

    seen: list[int] = []

    async def upload(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        parser = GradioMultiPartParser(
            request.headers, request.stream(), upload_dir=tmp_path, max_file_size=10_000
        )
        try:
            await parser.parse()
        except MultiPartException:
            status = 400
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + b"x" * 1_000
    messages = [{"type": "http.request", "body": head, "more_body": True}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        seen.append(len(list(tmp_path.iterdir())))
        if last is None:
            await asyncio.sleep(60)
        return last

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http", "method": "POST", "path": "/gradio_api/upload",
        "headers": [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x")],
    }  # fmt: skip
    asyncio.run(Guard(upload, Hosts(), limits=limits)(scope, receive, send))
    assert seen == [1], "the first piece was written"
    assert not list(tmp_path.iterdir())


def test_who_leaves_in_the_middle_of_a_login_made_no_try() -> None:
    throttle, sent = Throttle(), list[Any]()

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/login",
        "headers": [(b"host", b"localhost")],
        "client": ("1.2.3.4", 5),
    }
    for _ in range(TRIES + 1):
        asyncio.run(guarded(throttle=throttle)(scope, receive, send))
    assert sent == []
    assert throttle.attempt("1.2.3.4", lambda: True) is True


def test_every_answer_has_the_headers_of_its_place() -> None:
    call = Caller(guarded(), TOKEN)
    page, data = call("GET", "/").headers, call("GET", "/v1/jobs").headers
    for headers in (page, data, call("GET", "/docs").headers):
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "script-src 'self'" in page["content-security-policy"]
    assert data["content-security-policy"].startswith("default-src 'none'")
    assert data["cache-control"] == "no-store"


# Names


@pytest.mark.parametrize("name", NAMES)
def test_a_name_never_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "secret.txt")
    (root / "a.png").write_text("mine")
    with pytest.raises(RequestError):
        guard.inside(root, name)
    assert guard.inside(root, "a.png").read_text() == "mine"


def test_a_path_through_a_linked_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.png").write_text("secret")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "way").symlink_to(tmp_path / "other")
    with pytest.raises(RequestError):
        guard.within(tmp_path / "root", tmp_path / "root" / "way" / "a.png")


# Attacks


@pytest.fixture(scope="module")
def attacked() -> dict[str, Any]:
    return {one.name: one for one in run_attacks()}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_is_refused(attacked: dict[str, Any], name: str) -> None:
    assert attacked[name].open == []
    assert attacked[name].tried > 0


def test_the_attacks_see_an_open_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines._serve_files.within", lambda _, path: path)
    monkeypatch.setattr(Guard, "_check_place", lambda *_: None)
    monkeypatch.setattr("pipelines._serve_keys.TRIES", 0)
    monkeypatch.setattr(Throttle, "attempt", lambda _, __, right: right())
    monkeypatch.setattr("pipelines.jobs.Ledger.get", lambda self, name, owner=None: _anybodys(self, name))
    names = ("links", "Host", "Origin", "guessed tokens", "jobs and files of others")
    for one in run_attacks(names):
        assert one.open, one.name


def _anybodys(ledger: Any, name: str) -> Any:
    return next((job for job in ledger.jobs() if job.name == name), None)


def test_doctor_shows_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import _attacks, cli

    monkeypatch.setattr(_attacks, "run_attacks", lambda: run_attacks(["Host", "open addresses"]))
    assert cli.main(["doctor", "--security"]) == cli.DONE
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "13 attacks, all refused"
    monkeypatch.setattr(Guard, "_check_place", lambda *_: None)
    assert cli.main(["doctor", "--security", "--json"]) == cli.ENVIRONMENT
    assert json.loads(capsys.readouterr().out)["attacks"]["Host"]["not_refused"]
