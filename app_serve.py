"""How the page is served: bound to this computer unless guarded by a password, offline, and with every limit of gradio set.

Differs: gradio's own defaults have no limit on uploads or the queue, and analytics, monitoring and run history on.
"""

from __future__ import annotations

import os
from typing import Any

from pipelines._serve_keys import TRIES, TRIES_IN
from pipelines.guard import UPLOAD_MB, AddressError, Guard, Hosts, Login, address, loopback

__all__ = [
    "DAY", "EVENTS", "TRIES", "TRIES_IN", "AddressError", "Guard", "Login", "address", "launch_options", "loopback", "mounted",
]  # fmt: skip

EVENTS = 500
"""Most events that wait in gradio's queue."""
SESSIONS = 500
THREADS = 16
DAY = 86_400


def launch_options(host: str, port: int | None, login: Login | None, spaces: bool) -> dict[str, Any]:
    """Return every option of gradio's launch that decides who may do what, and how much of it."""
    from starlette.middleware import Middleware

    more = [one.strip() for one in os.environ.get("LEAPFROG_HOSTS", "").split(",") if one.strip()]
    known = None if spaces else Hosts.of(host, more)
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


def mounted(api: Any, page: Any, **look: Any) -> None:
    """Mount the page into an app beside HTTP: same limits as `launch_options`; who may come in is asked by that app's guard."""
    import gradio as gr

    options = launch_options("127.0.0.1", None, None, spaces=False)
    page.max_threads, page.state_session_capacity = THREADS, SESSIONS
    page._queue.max_thread_count = THREADS
    taken = (
        "max_file_size", "show_error", "enable_monitoring", "run_history", "footer_links", "ssr_mode", "mcp_server", "pwa",
        "allowed_paths",
    )  # fmt: skip
    described = {"openapi_url": None, "docs_url": None, "redoc_url": None}
    gr.mount_gradio_app(
        api, page, path="/", app_kwargs=described, **{name: options[name] for name in taken}, **look
    )
