"""An exact picture in the place of an accelerated one that holds nothing, and what its report says about that."""

from __future__ import annotations

import dataclasses

from pipelines.result import Picture


def instead(failed: Picture, exact: Picture) -> Picture:
    """Return the exact picture with the request of the failed one; its time is that of both."""
    first, report = failed.report, exact.report
    methods = ", ".join(map(str, failed.request.accelerators))
    words = f"with {methods} {'; '.join(first['failures'])}: it was made again exactly"
    more = {
        "requested": first["requested"],
        "summary": f"{report['summary']}, after {methods} had failed",
        "timings": {phase: seconds + report["timings"][phase] for phase, seconds in first["timings"].items()},
        "warnings": [words, *report["warnings"]],
        "retried": {"failures": first["failures"], "run": first["run"]},
    }
    return dataclasses.replace(failed, frames=exact.frames, report=report | more)
