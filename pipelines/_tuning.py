"""A search for a profile as a job of the ledger: its wish and its time stand in the tags, its curve in the progress.

What a worker runs of kind "tune"; the profile goes where `leapfrog tune` writes it, so that every door knows it by its name.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.request import Request, RequestError

if TYPE_CHECKING:
    from pipelines.generate import Progress
    from pipelines.jobs import Item
    from pipelines.pareto import Point
    from pipelines.search import Search

EVERY = 1.0
"""Seconds between two curves: with many points they take a while."""
SHOWN = 60
"""Most points of a curve in a progress: the front, and the nearest behind it."""


def item(
    settings: Request, budget: str, minutes: float, *, owner: str = "", prompts: Sequence[str] = ()
) -> Item:
    """Return a search as an item of the ledger.

    Args:
        settings, budget, minutes, prompts: as `pipelines.tune.tune` takes them.

    Raises:
        RequestError: a wish or a time that cannot be.
    """
    from pipelines.jobs import Item
    from pipelines.tune import LONGEST, Budget

    wish = str(Budget.read(budget))
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes <= LONGEST:
        raise RequestError("minutes", minutes, f"above 0 and at most {LONGEST}")
    tags = {"source": "tune", "budget": wish, "minutes": float(minutes), "prompts": list(prompts)}
    plain = settings.replace(images=1, accelerators=(), profile=None)
    return Item(
        request=plain.to_dict(), id=f"tune-{secrets.token_urlsafe(12)}", owner=owner, kind="tune", tags=tags
    )


def tuned(
    request: Request, tags: Mapping[str, Any], tell: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Search, and return the report of the job: curve, profile and its name, or in words why there is none.

    Args:
        tags: as `item` made them. tell: a heartbeat with a progress; False stops the search.

    Raises:
        RequestError: as `tune`. Cancelled: stopped by `tell`.
    """
    from pipelines.tune import tune

    said: dict[str, Any] = {"note": "loading the model", "curve": []}
    last = 0.0

    def step(progress: Progress) -> bool:
        now = dataclasses.asdict(progress)
        return tell(now | said | {"inner": progress.phase, "phase": "tune"})

    def note(words: str) -> None:
        said["note"] = words

    def heard(search: Search) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            said["curve"], last = curve(search.points()), time.monotonic()

    tell({"phase": "tune"} | said)
    found = tune(
        request.model, str(tags["budget"]), float(tags["minutes"]), settings=request, prompts=list(tags.get("prompts") or ()),
        on_step=step, tell=note, heard=heard,
    )  # fmt: skip
    report = found.to_dict() | {"name": found.path.stem if found.path is not None else ""}
    report.pop("log"), report.pop("file")
    report["summary"] = str(found.profile) if found.profile is not None else found.reason
    return report


def curve(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return points as they stand in a progress, those that no other beats first."""
    from pipelines.pareto import layers

    return [one.to_dict() for one in layers(points, min(SHOWN, len(points)))[:SHOWN]]
