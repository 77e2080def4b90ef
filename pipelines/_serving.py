"""The commands `serve` and `ui`, and `doctor --security`: HTTP and the page in one process, workers in others."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.request import RequestError

if TYPE_CHECKING:
    from pipelines.catalog import Card
    from pipelines.guard import Keys

PORT = 7861
WORKERS = 16
"""Most worker processes."""
STOPPING = 5.0
"""How long a running step has to end, in s."""
_HOW = "give --token-file FILE with a line `NAME TOKEN` for each person"


def add_commands(commands: Any) -> None:
    """Add `serve` and `ui`, and the option --security to the command `doctor`, which is there already."""
    from pipelines import cli

    one = cli._command(commands, "serve", serve, "serve jobs and pictures over HTTP")
    _places(one)
    one.add_argument(
        "--token-file",
        metavar="FILE",
        default=os.environ.get("LEAPFROG_TOKENS"),
        help="lines `NAME TOKEN`: everybody needs one of the tokens (default: LEAPFROG_TOKENS)",
    )
    one.add_argument(
        "--workers", default="1", metavar="N", help=f"worker processes, 0 to {WORKERS} (default: 1)"
    )
    one.add_argument("--with-page", action="store_true", help="serve the web page beside HTTP")
    one.add_argument(
        "--adapters", metavar="FOLDER", help="a folder whose LoRA and control files may be named"
    )
    one.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="HOST",
        help="another name it is reached by; repeatable",
    )
    one.add_argument(
        "--https", action="store_true", help="it is reached by https alone (a proxy in front): cookies say so"
    )
    _places(cli._command(commands, "ui", ui, "open the web page"))
    doctor = commands.choices["doctor"]
    doctor.add_argument(
        "--security", action="store_true", help="attack this install and show what was refused"
    )
    doctor.set_defaults(run=_examined(doctor.get_default("run")))


def _places(one: argparse.ArgumentParser) -> None:
    one.add_argument("--host", metavar="ADDRESS", help="address to bind to (default: this computer only)")
    one.add_argument("--port", metavar="N", help="port (default: the first free one)")
    one.add_argument(
        "--output", default="outputs", metavar="FOLDER", help="where results are saved (default: outputs)"
    )
    one.add_argument(
        "--model", action="append", metavar="MODEL", help="a model to serve, the default first; repeatable"
    )


def ui(options: argparse.Namespace) -> int:
    """Serve the page until it is stopped; return the exit code."""
    import app

    given = ["--output", options.output]
    for flag, value in (("--host", options.host), ("--port", options.port)):
        given += [flag, value] if value else []
    given += ["--model", options.model[0]] if options.model else []
    return int(app.main(given))


def serve(options: argparse.Namespace) -> int:
    """Serve HTTP until it is stopped; return the exit code."""
    import uvicorn

    from pipelines import cli
    from pipelines._serve_keys import AddressError
    from pipelines.guard import Hosts, address
    from pipelines.jobs import Ledger, default_ledger
    from pipelines.serve import http_app
    from pipelines.workers import Pool

    try:
        keys = _keys(options.token_file)
        host = address(options.host, keys is not None, how=_HOW)
    except AddressError as error:
        raise RequestError("host", options.host, f"one that is safe: {error}") from None
    workers = _number("workers", options.workers, 0, WORKERS)
    cards, places = served_models(options.model)
    output = Path(options.output).expanduser().absolute()
    place = default_ledger()
    ledger = Ledger(place)
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(_bound(host, options.port))
        page = (
            stack.enter_context(_page({places.get(name, name): card for name, card in cards.items()}, output))
            if options.with_page
            else None
        )
        pool = Pool(place) if workers else None
        app = http_app(
            ledger, pool, folder=output, uploads=place.parent / "uploads", models=cards, keys=keys,
            hosts=Hosts.of(host, options.name), secure=options.https, page=page, places=places,
            adapters=Path(options.adapters).expanduser().absolute() if options.adapters else None,
        )  # fmt: skip
        if pool is not None:
            pool.start(workers)
            stack.callback(pool.stop, STOPPING)
        shown = f"[{host}]" if ":" in host else host
        cli.say(
            options,
            url := f"http://{shown}:{found.getsockname()[1]}",
            {"url": url, "models": list(cards), "workers": workers},
        )
        sys.stdout.flush()
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, proxy_headers=False, server_header=False, ws="none",
            timeout_keep_alive=15, timeout_graceful_shutdown=2, limit_concurrency=500,
            h11_max_incomplete_event_size=64_000, lifespan="on" if page is not None else "off",
        )  # fmt: skip
        uvicorn.Server(settings).run(sockets=[found])
    return cli.DONE


def served_models(models: list[str] | None) -> tuple[dict[str, Card], dict[str, str]]:
    """Return the cards of what is served by name, and the folders of those that are called by their folder's name.

    Args:
        models: the models that were named; None or none for all that are shipped.

    Raises:
        RequestError: unknown or refused models, two of one name, or none at all.
    """
    from pipelines import catalog

    shipped, cards, places = catalog.shipped(), dict[str, "Card"](), dict[str, str]()
    for model in models or shipped:
        source = catalog.find(model)
        name = source.folder.name if source.kind == "folder" and source.folder is not None else model
        if name in cards:
            raise RequestError("model", model, f"of another name than the others; {name} is served already")
        cards[name] = shipped[model] if model in shipped else catalog.prepare(source)[1]
        if name != model:
            places[name] = str(source.folder)
    if not cards:
        raise RequestError("model", None, "given: none is shipped here")
    return cards, places


def security(options: argparse.Namespace) -> int:
    """Run the attacks and show a table; return the exit code."""
    from pipelines import cli
    from pipelines._attacks import run_attacks

    found = run_attacks()
    tried, let_in = sum(one.tried for one in found), sum(len(one.open) for one in found)
    verdict = f"{tried} attacks, " + ("all refused" if not let_in else f"{let_in} NOT refused")
    table = {one.name: {"tried": one.tried, "not_refused": one.open} for one in found}
    cli.say(options, "\n".join([*map(str, found), verdict]), {"attacks": table, "refused": not let_in})
    return cli.ENVIRONMENT if let_in else cli.DONE


def _examined(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    return lambda options: security(options) if options.security else run(options)


def _keys(file: str | None) -> Keys | None:
    from pipelines import cli
    from pipelines._serve_keys import Keys, readable_by_others

    if not file:
        return None
    path = Path(file).expanduser()
    keys = Keys.read(path)
    if readable_by_others(path):
        cli.tell(f"warning: other users of this computer can read {path}; chmod 600 {path}")
    return keys


@contextlib.contextmanager
def _page(cards: dict[str, Card], output: Path) -> Iterator[Callable[[Any], object]]:
    """Yield what mounts the page; its jobs end with the block."""
    import app

    mounted: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="leapfrog-") as folder:
        yield lambda api: mounted.append(app.mount(api, cards, output, folder))
        for jobs in mounted:
            jobs.close(1.0)


@contextlib.contextmanager
def _bound(host: str, port: str | None) -> Iterator[socket.socket]:
    """Yield a socket that is bound before anything is started. Raises: RequestError, Unavailable."""
    from pipelines.catalog import Unavailable

    wanted = [_number("port", port, 0, 65_535)] if port else [*range(PORT, PORT + 20), 0]
    error: OSError | None = None
    for one in wanted:
        try:
            kind, *_, place = socket.getaddrinfo(host.strip("[]"), one, type=socket.SOCK_STREAM)[0]
            found = socket.socket(kind, socket.SOCK_STREAM)
            if os.name == "posix":
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(place)
        except OSError as wrong:
            error = wrong
            continue
        with found:
            yield found
        return
    raise Unavailable(
        f"{host} cannot be served on port {port or 'any'} ({error}); choose another --host or --port"
    )


def _number(field: str, text: str, low: int, high: int) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
        raise RequestError(field, text, f"a whole number from {low} to {high}")
    return int(text)
