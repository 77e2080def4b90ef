"""Make the shipped model's profiles from what was measured: `python -m benchmarks.profiles` (after `python -m benchmarks.peers`).

For each level the fastest of our settings in benchmarks/results/peers.json whose mean PSNR reaches it, at the model's own number of
steps. The fit behind a setting saw other pictures than those it was measured on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks._peers_methods import OURS
from benchmarks._peers_settings import TRAINED_ON
from benchmarks.machine import RESULTS
from pipelines import catalog, profile
from pipelines.calls import arguments
from pipelines.request import Request

LEVELS = {"balanced": 35.0, "fast": 30.0}
"""Least mean PSNR in dB."""


def fastest(rows: Sequence[Mapping[str, Any]], steps: int, level: float) -> Mapping[str, Any] | None:
    """Return the fastest timed row of ours at a step count whose mean PSNR reaches `level` dB, if there is one."""
    fits = [
        one
        for one in rows
        if one["method"].startswith(OURS) and one["steps"] == steps and one.get("speedup") and one["psnr_db"] >= level
    ]
    return max(fits, key=lambda one: float(one["speedup"]["end_to_end"]), default=None)


def profile_of(row: Mapping[str, Any], level: float, found: Mapping[str, Any]) -> profile.Profile:
    """Return the profile of a row of the results `found`; the model is loaded to know where it holds."""
    request = Request(prompt="-", model=found["model"], accelerators=(row["settings"]["set"],))
    loaded = catalog.load(request.model)
    where = profile.range_of(request, loaded, arguments(loaded.pipeline, request, loaded.card, None))
    return profile.Profile(
        model=request.model,
        budget=f"psnr>={level:g}",
        range=where,
        accelerators=tuple(one.to_dict() for one in request.accelerators),
        expected={
            "speedup_denoise": row["speedup"]["denoise"],
            "speedup_end_to_end": row["speedup"]["end_to_end"],
            "psnr_db": row["psnr_db"],
            "psnr_worst_db": row["worst_psnr_db"],
            "ssim": row["ssim"],
            "computed": row["fraction"],
            "pictures": row["pictures"],
        },
        searched={"pictures": TRAINED_ON, "by": "benchmarks.peers", "commit": found["commit"]},
        machine=found["machine"],
        made=found["made"],
    )


def main() -> None:
    """Write pipelines/checkpoints/<model>/profiles/<name>.json for every level that is reached."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = json.loads((RESULTS / "peers.json").read_text())
    card = catalog.shipped()[found["model"]]
    for name, level in LEVELS.items():
        row = fastest(found["rows"], card.steps or 28, level)
        if row is None:
            print(f"{name}: nothing timed reaches {level:g} dB")
            continue
        made = profile_of(row, level, found)
        path = catalog.CHECKPOINTS / found["model"] / "profiles" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        made.save(path)
        print(f"{path.name}: {made}")


if __name__ == "__main__":
    main()
