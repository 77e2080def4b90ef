"""Attacks on this install: the app is started in this process, on a folder of its own, and asked for what it must refuse.

`leapfrog doctor --security` runs them, and so do the tests. Requests are handed over as a server would: no client straightens
their paths or headers first.
"""

from __future__ import annotations

import functools
import json
import pickle
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipelines._attack_parts import ALICE, BOB, CANARY, Answer, Attack, Caller, chunk, picture
from pipelines.catalog import Card
from pipelines.guard import AddressError, Guard, Keys, address
from pipelines.jobs import Item, Ledger
from pipelines.request import Request, RequestError

NAMES = (
    "../secret.txt", "..", ".", "../../../../etc/passwd", "/etc/passwd", "//etc/passwd", "alice/../../secret.txt",
    "..\\secret.txt", "\\\\server\\share\\secret.txt", "\\\\?\\C:\\secret.txt", "C:\\Windows\\win.ini", "C:secret.txt",
    "c:/windows/win.ini", "file:///etc/passwd", "secret.txt\0.png", "\0", "\u2025/secret.txt", "\uff0e\uff0e/secret.txt",
    "\u2024\u2024\u2215secret.txt", "..%2fsecret.txt", "%2e%2e%2fsecret.txt", "..;/secret.txt", "a" * 300, "a/" * 150, "CON",
    "con.png", "NUL", "aux.txt", "COM1", "lpt9.png", "secret.txt.", "secret.txt ", " secret.txt", "secret.txt::$DATA",
    "~/secret.txt", "$HOME/secret.txt", "link.png", ".env", "jobs.sqlite", "-", "*", "?", "\ud800",
)  # fmt: skip
"""Names that lead out of a folder on some system, or that no file may have."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is attacked: an app of two owners, one of whom has a finished job, an upload, and a link to the secret."""

    folder: Path
    app: Guard
    job: str
    waiting: str
    linked: str
    upload: str


def run_attacks(names: Sequence[str] | None = None) -> list[Attack]:
    """Run every attack, or those of these names; nothing of this computer's own jobs is touched."""
    with tempfile.TemporaryDirectory(prefix="leapfrog-") as folder:
        target = _target(Path(folder))
        found = []
        for name in ATTACKS if names is None else names:
            one = Attack(name)
            ATTACKS[name](target, one)
            found.append(one)
        return found


def _target(folder: Path) -> Target:
    from pipelines.serve import http_app

    (folder / "secret.txt").write_text(CANARY)
    ledger = Ledger(folder / "jobs.sqlite")
    card = Card(name="tiny", width=64, height=64, multiple=8, low=32, high=128)
    app = http_app(
        ledger, folder=folder / "out", uploads=folder / "uploads", models={"tiny": card},
        keys=Keys({ALICE: "alice", BOB: "bob"}), adapters=folder / "adapters",
    )  # fmt: skip
    mine = folder / "out" / "alice"
    mine.mkdir(parents=True)
    (folder / "adapters").mkdir()
    (mine / "made.png").write_bytes(picture())
    _link(mine / "link.png", folder / "secret.txt")
    names = []
    for file in ("made.png", "link.png"):
        request = Request(prompt=file, model="tiny").to_dict()
        ledger.add([Item(request=request, owner="alice", folder=str(mine), id=file)])
        job = ledger.lease("attacks")
        assert job is not None
        ledger.done(job, [mine / file], {})
        names.append(job.name)
    (waiting,) = ledger.add(
        [Item(request=Request(prompt="waits", model="tiny").to_dict(), owner="alice", id="w")]
    )
    told = Caller(app)("POST", "/v1/files", picture(), [("content-type", "image/png")])
    return Target(folder, app, names[0], waiting.name, names[1], str(json.loads(told.body)["id"]))


def _link(place: Path, to: Path) -> None:
    try:
        place.symlink_to(to)
    except OSError:  # a system where links need a right of their own
        place.write_bytes(b"")


def _json(call: Caller, path: str, values: Any, **more: Any) -> Answer:
    return call("POST", path, json.dumps(values).encode(), [("content-type", "application/json")], **more)


def _upload(call: Caller, data: bytes, **more: Any) -> Answer:
    return call("POST", "/v1/files", data, [("content-type", "image/png")], **more)


def _paths(target: Target, attack: Attack) -> None:
    call = Caller(target.app)
    for name in NAMES:
        for path in ("/v1/files/", "/v1/jobs/", "/v1/models/", "/v1/files/alice/"):
            for text in {
                quote(name, safe="", errors="surrogatepass"),
                quote(name, safe="/\\.:", errors="surrogatepass"),
            }:
                answer = call("GET", path + text)
                listed = path == "/v1/jobs/" and text in ("", ".")  # no name at all is the list of one's own
                attack.note(f"GET {path}{text}", answer.refused or (listed and answer.status == 200))


def _fields(target: Target, attack: Attack) -> None:
    call = Caller(target.app)
    for name in NAMES:
        tries: list[dict[str, Any]] = [{"image": name}, {"model": name}, {"accelerators": [name]}, {name: 1}]
        tries += [{"profile": name}]
        tries += [
            {"loras": [f"{name}:0.5"]},
            {"controls": [f"edges={name}:0.5"]},
            {"last_image": name},
            {"mask": name},
        ]
        for one in tries:
            answer = _json(call, "/v1/jobs", {"prompt": "a dog"} | one)
            plain_name = (
                "profile" in one and answer.status == 202 and "/" not in name
            )  # a name; found, or not, by the worker
            attack.note(f"request {one}", answer.refused or plain_name)


def _links(target: Target, attack: Attack) -> None:
    attack.note("a link in the folder", Caller(target.app)("GET", f"/v1/files/{target.linked}.0.png").refused)


def _hosts(target: Target, attack: Attack) -> None:
    call = Caller(target.app)
    for host in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:80",
        "",
        "localhost@evil.example",
        "[::2]",
    ):
        attack.note(f"Host: {host}", call("GET", "/v1/models", host=host).refused)


def _origins(target: Target, attack: Attack) -> None:
    call = Caller(target.app)
    for origin in (
        "http://evil.example",
        "null",
        "http://localhost.evil.example",
        "https://localhost:444",
        "localhost",
    ):
        for method, path in (
            ("POST", "/v1/jobs"),
            ("DELETE", f"/v1/jobs/{target.waiting}"),
            ("POST", "/v1/files"),
        ):
            attack.note(
                f"Origin: {origin} {method}", call(method, path, headers=[("origin", origin)]).refused
            )
    attack.note("cross-site", call("POST", "/v1/jobs", headers=[("sec-fetch-site", "cross-site")]).refused)
    simple = call("POST", "/v1/jobs", b'{"prompt": "x"}', [("content-type", "text/plain")])
    attack.note("JSON in a plain form", simple.refused)


def _large(target: Target, attack: Attack) -> None:
    call = Caller(target.app)
    zeros = picture() + b"\0" * 22_000_000
    attack.note("22 MB upload", _upload(call, zeros).status == 413)
    attack.note("22 MB in pieces", _upload(call, zeros, pieces=300, length=-1).status == 413)
    attack.note("22 MB said to be 10", _upload(call, zeros, pieces=300, length=10).status == 413)
    attack.note("2 MB of JSON", _json(call, "/v1/jobs", {"prompt": "x" * 2_000_000}).status == 413)
    attack.note("a length of 10^30", _upload(call, b"x", length=10**30).status == 413)
    deep = b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    attack.note(
        "JSON 100 000 deep", call("POST", "/v1/jobs", deep, [("content-type", "application/json")]).refused
    )


def _bombs(target: Target, attack: Attack) -> None:
    call = Caller(target.app)
    bombs = {
        "20000x20000 px": picture(20_000, 20_000, pixels=b""),
        "2147483647 px": picture(2**31 - 1, 1, pixels=b""),
        "13000x13000 px": picture(13_000, 13_000, pixels=b""),
        "text of 100 MB": picture(more=chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 100_000_000))),
        "100 000 frames": picture(more=chunk(b"acTL", struct.pack(">II", 100_000, 0))),
        "no PNG": b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
        "cut off": picture()[:60],
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        "HTML": b"<!doctype html><script>alert(1)</script>",
        "a GIF called PNG": b"GIF89a" + b"\0" * 100,
        "nothing": b"",
    }
    for name, data in bombs.items():
        attack.note(name, _upload(call, data).refused)


def _headers(target: Target, attack: Attack) -> None:
    call = Caller(target.app)
    tries = {
        "200 headers": [(f"x-{i}", "1") for i in range(200)],
        "a header of 40 kB": [("x-long", "a" * 40_000)],
        "two hosts": [("host", "evil.example")],
        "two lengths": [("content-length", "0"), ("content-length", "5")],
        "length and chunks": [("content-length", "5"), ("transfer-encoding", "chunked")],
        "a length that is none": [("content-length", "-5")],
        "a line break": [("x-a", "b\r\nset-cookie: c=d")],
        "NUL": [("x-a", "b\0")],
        "a key of control signs": [("idempotency-key", "\x01" * 10), ("content-type", "application/json")],
    }
    for name, headers in tries.items():
        attack.note(name, call("POST", "/v1/jobs", headers=headers).refused)
    attack.note("an address of 9 kB", call("GET", "/v1/jobs/" + "a" * 9_000).refused)


def _tokens(target: Target, attack: Attack) -> None:
    for path in (
        "/v1/jobs",
        "/v1/models",
        "/metrics",
        "/openapi.json",
        "/docs",
        "/v1/files/x",
        "/gradio_api/runs",
        "/",
    ):
        answer = Caller(target.app, "", "198.51.100.1")("GET", path)
        attack.note(f"GET {path} without a token", answer.refused and answer.status in (401, 404))
    call = Caller(target.app, "", "198.51.100.2")
    for cookie in ("alice", "alice.9999999999.x." + "0" * 64, "alice.9999999999.x.", "....", "\xff"):
        answer = call("GET", "/v1/jobs", headers=[("cookie", f"leapfrog_session={cookie}")])
        attack.note(f"a forged session {cookie[:20]!r}", answer.refused)
    for text in ("Basic YTpi", "Bearer", "Bearer ", "bearer \xff", f"Token {ALICE}"):
        attack.note(
            text[:12],
            Caller(target.app, "", "198.51.100.3")(
                "GET", "/v1/jobs", headers=[("authorization", text)]
            ).refused,
        )


def _guesses(target: Target, attack: Attack) -> None:
    guess = Caller(target.app, "wrong-" + "x" * 32, "198.51.100.4")
    statuses = [guess("GET", "/v1/jobs").status for _ in range(60)]
    attack.note("60 wrong tokens in a row", statuses == [401] * 5 + [429] * 55)
    attack.note("the right one after them", guess("GET", "/v1/jobs", token=ALICE).status == 429)
    form = Caller(target.app, "", "198.51.100.5")
    statuses = [form("POST", "/login", b"token=" + b"y" * 32).status for _ in range(10)]
    attack.note("wrong tokens in the form", statuses == [401] * 5 + [429] * 5)
    other = Caller(target.app, ALICE, "198.51.100.6")("GET", "/v1/jobs")
    attack.note("others are locked out too", other.status == 200)


def _foreign(target: Target, attack: Attack) -> None:
    bob = Caller(target.app, BOB)
    file, upload = f"/v1/files/{target.job}.0.png", f"/v1/files/{target.upload}"
    for path in (f"/v1/jobs/{target.job}", f"/v1/jobs/{target.waiting}/events", file, upload):
        attack.note(f"bob's GET {path}", bob("GET", path).status == 404)
    for path in (f"/v1/jobs/{target.waiting}", upload):
        attack.note(f"bob's DELETE {path}", bob("DELETE", path).status == 404)
    attack.note("bob's list", json.loads(bob("GET", "/v1/jobs").body)["data"] == [])
    attack.note(
        "bob's request with alice's upload",
        _json(bob, "/v1/jobs", {"prompt": "x", "image": target.upload}).refused,
    )
    alice = Caller(target.app)
    still = json.loads(alice("GET", f"/v1/jobs/{target.waiting}").body)["state"] == "waiting"
    attack.note(
        "alice's things are still hers",
        still and alice("GET", file).status == 200 == alice("GET", upload).status,
    )


def _weights(target: Target, attack: Attack) -> None:
    from pipelines.safe import check_weights

    pickled = pickle.dumps({"weight": 1})
    zipped = b"PK\x03\x04" + b"\0" * 60 + b"archive/data.pkl"
    claims = struct.pack("<Q", 2**40) + b"{}"
    overlap = json.dumps(
        {one: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for one in "ab"}
    ).encode()
    many = json.dumps(
        {str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}
    ).encode()
    tries = {
        "a pickle called .safetensors": pickled, "a zip checkpoint": zipped, "a header of 1 TB": claims,
        "tensors over each other": struct.pack("<Q", len(overlap)) + overlap + b"\0" * 8,
        "100 001 tensors": struct.pack("<Q", len(many)) + many, "GGUF": b"GGUF" + b"\0" * 60, "nothing": b"",
    }  # fmt: skip
    for name, data in tries.items():
        file = target.folder / "weights.SafeTensors"
        file.write_bytes(data)
        attack.note(name, _raises(functools.partial(check_weights, file)))
    for name, index in {
        "pickled weights in a folder": {"_class_name": "DiTPipeline", "unet": ["diffusers", "UNet2DModel"]},
        "code in a folder": {"_class_name": ["custom", "Pipeline"]},
        "a part from elsewhere": {"_class_name": "DiTPipeline", "part": ["os", "system"]},
    }.items():
        folder = target.folder / name
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickled)
        (folder / "model_index.json").write_text(json.dumps(index))
        attack.note(name, _raises(functools.partial(_prepared, folder)))


def _prepared(folder: Path) -> object:
    from pipelines import catalog

    return catalog.prepare(catalog.find(str(folder)))


def _metadata(target: Target, attack: Attack) -> None:
    from pipelines.metadata import read_metadata

    gone = str(target.folder / "not there.png")
    named = {"version": 1, "request": {"prompt": "x", "model": gone, "image": gone}, "report": {}}
    file = target.folder / "import.png"
    file.write_bytes(picture(more=chunk(b"tEXt", b"leapfrog\0" + json.dumps(named).encode())))
    attack.note("a path inside is only text", not _raises(lambda: Request.from_file(file)))
    attack.note("and no request of HTTP", _json(Caller(target.app), "/v1/jobs", named["request"]).refused)
    texts = {
        "2 MB of text": chunk(b"tEXt", b"leapfrog\0" + b" " * 2_000_000),
        "packed 100 MB": chunk(b"zTXt", b"leapfrog\0\0" + zlib.compress(b" " * 100_000_000)),
        "deep": chunk(b"tEXt", b"leapfrog\0" + b"[" * 200_000),
        "no object": chunk(b"tEXt", b"leapfrog\0[]"),
        "another version": chunk(b"tEXt", b'leapfrog\0{"version": 99, "request": {}}'),
        "a chunk of 4 GB": struct.pack(">I", 2**32 - 1) + b"tEXt",
        "a wrong checksum": chunk(b"tEXt", b"leapfrog\0{}")[:-1] + b"\0",
        "unknown fields": chunk(b"tEXt", b'leapfrog\0{"version": 1, "request": {"run": "rm"}}'),
    }
    for name, more in texts.items():
        file.write_bytes(picture(more=more))
        attack.note(name, _raises(lambda: Request.from_dict(read_metadata(file)["request"])))


def _binding(_: Target, attack: Attack) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.nip.io", "", " "):
        refused = (
            _raises(functools.partial(address, host, auth=False), AddressError)
            or address(host, False) == "127.0.0.1"
        )
        attack.note(f"--host {host}", refused)


def _raises(call: Callable[[], object], kind: type[Exception] = RequestError) -> bool:
    try:
        call()
    except kind:
        return True
    return False


ATTACKS: Mapping[str, Callable[[Target, Attack], None]] = {
    "paths in addresses": _paths,
    "paths in requests": _fields,
    "links": _links,
    "Host": _hosts,
    "Origin": _origins,
    "oversized bodies": _large,
    "decompression bombs": _bombs,
    "headers": _headers,
    "no or forged tokens": _tokens,
    "guessed tokens": _guesses,
    "jobs and files of others": _foreign,
    "pickles and lying weights": _weights,
    "metadata": _metadata,
    "open addresses": _binding,
}
