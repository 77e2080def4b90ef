"""Counters of what was served, as Prometheus' text format has them. Paths are those of the routes, so that ids stay out."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.guard import Message, Receive, Send

_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH")


class Counted:
    """Count requests and their seconds by method, route and status."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._requests: dict[tuple[str, str, int], int] = defaultdict(int)
        self._seconds: dict[str, float] = defaultdict(float)
        self._begun, self._lock = time.time(), threading.Lock()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = str(getattr(scope.get("route"), "path", "other"))
            with self._lock:
                self._requests[method, route, status] += 1
                self._seconds[route] += time.perf_counter() - start

    def text(self, gauges: Mapping[str, float], jobs: Mapping[str, int]) -> str:
        """Return all counters, with values of now beside them: name -> number, and jobs by state."""
        with self._lock:
            requests, seconds = dict(self._requests), dict(self._seconds)
        counted: dict[str, int] = defaultdict(int)
        for (_, route, _), count in requests.items():
            counted[route] += count
        labelled = [
            (f'method="{method}",route="{route}",status="{status}"', count)
            for (method, route, status), count in sorted(requests.items())
        ]
        lines = _family("leapfrog_http_requests_total", "counter", "Requests that were answered.", labelled)
        lines += [
            "# HELP leapfrog_http_request_seconds Time to the end of the answer.",
            "# TYPE leapfrog_http_request_seconds summary",
        ]
        for route in sorted(seconds):
            lines += [
                f'leapfrog_http_request_seconds_sum{{route="{route}"}} {seconds[route]:.6f}',
                f'leapfrog_http_request_seconds_count{{route="{route}"}} {counted[route]}',
            ]
        lines += _family(
            "leapfrog_jobs", "gauge", "Jobs by state.", ((f'state="{k}"', v) for k, v in jobs.items())
        )
        for name, value in ({**gauges, "start_time_seconds": self._begun}).items():
            lines += _family(
                f"leapfrog_{name}", "gauge", name.replace("_", " ").capitalize() + ".", (("", value),)
            )
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, about: str, values: Iterable[tuple[str, float]]) -> list[str]:
    rows = [f"{name}{{{labels}}} {value}" if labels else f"{name} {value}" for labels, value in values]
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *rows]
