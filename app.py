"""The web page: `python app.py`. It is bound to this computer, and hands requests to the one path of `pipelines`."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app_jobs import Jobs
from app_serve import AddressError, Login, address, launch_options
from pipelines import catalog, machine
from pipelines.catalog import Card
from pipelines.library import Library
from pipelines.request import RequestError


def cards_for(model: str | None) -> dict[str, Card]:
    """Return the cards of the models to choose from, the one asked for first; maybe none. Raises: RequestError."""
    cards = catalog.shipped() | Library().cards()
    if model is not None and model not in cards:
        source = catalog.find(model)
        cards = {model: Card(name=model) if source.folder is None else catalog.prepare(source)[1]} | cards
    return {model: cards.pop(model)} | cards if model else cards


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until it is stopped; return an exit code."""
    parser = argparse.ArgumentParser(prog="app.py", description="The web page of Leapfrog.")
    parser.add_argument(
        "--model", default=os.environ.get("LEAPFROG_MODEL"), help="a shipped name, a folder or a hub id"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs"), help="where pictures are saved (default: outputs)"
    )
    parser.add_argument("--host", help="address to bind to (default: this computer only)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument(
        "--workers", type=int, choices=range(17), metavar="N",
        help="make pictures in so many processes of their own, 0 leaves it to others (default: in this one)",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    for sentence in machine.strangers():
        print(f"leapfrog: {sentence}", file=sys.stderr)
        return 3
    spaces, secret = bool(os.environ.get("SPACE_ID")), os.environ.get("LEAPFROG_AUTH")
    try:
        login = Login(secret) if secret else None
        host = address(given.host or os.environ.get("GRADIO_SERVER_NAME"), login is not None, spaces)
        cards = cards_for(given.model)
    except (AddressError, RequestError, catalog.Unavailable) as error:
        print(f"leapfrog: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="leapfrog-") as served:
        _private(served)
        return _serve(cards, given, launch_options(host, given.port, login, spaces))


def mount(api: Any, cards: Mapping[str, Card], output: Path, folder: str) -> Jobs:
    """Put the page beside HTTP into one app; returns its jobs, which the caller closes.

    Args:
        folder: an empty folder for the files that the page serves.
    """
    _private(folder)
    jobs = Jobs(output, workers=0)  # the processes of `serve` work on the same ledger
    from app_page import Page
    from app_serve import mounted
    from app_style import CSS, SCRIPT, theme

    _import_once()
    mounted(api, Page(jobs, cards).build(), theme=theme(), css=CSS, js=SCRIPT)
    jobs.start()
    return jobs


def _private(folder: str) -> None:
    """Set gradio's and the hub's switches before they are imported: a folder of our own, and no word to anybody."""
    os.environ |= {
        "GRADIO_TEMP_DIR": folder,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _import_once() -> None:
    """Import what jobs and events would otherwise import at the same time: where imports are circular, threads deadlock."""
    importlib.import_module("control.lora")  # with diffusers' hooks and peft


def _serve(cards: Mapping[str, Card], given: argparse.Namespace, options: dict[str, Any]) -> int:
    first = next(iter(cards), None)  # without a model the page helps to get one
    jobs = Jobs(
        given.output, warm=None if first is None else lambda: catalog.load(first), workers=given.workers
    )
    from app_page import Page
    from app_style import CSS, SCRIPT, theme

    _import_once()
    page = Page(jobs, cards).build()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        _, url, _ = page.launch(
            prevent_thread_lock=True, inbrowser=given.open, theme=theme(), css=CSS, js=SCRIPT, **options
        )
    except OSError as error:
        print(f"leapfrog: the page cannot be served ({error}); choose another --port", file=sys.stderr)
        return 3
    print(f"Leapfrog is at {url} (Ctrl+C stops it)", flush=True)
    jobs.start()
    stopped.wait()
    jobs.close()
    page.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
