"""Every caching method side by side on the shipped model, and simply fewer steps: `python -m benchmarks.peers`.

`--quality` makes the pictures (any machine, any load; goes on where it was stopped), `--times` takes the times (quiet machine);
neither does both. Settings that the first pictures show to lie outside the levels, or far under another one of their method, go no
further. Each call ends by writing benchmarks/results/peers.json and peers.svg from all that was measured so far on this machine
with this code, and prints the speed-ups at a mean PSNR of 25, 30, 35 and 40 dB; `--table` only does that. Where nothing was
measured so far, nothing is written, and the exit code is 1.

All methods meet the same checkpoint in the same process, one picture a call, guidance batched. PSNR is the mean over pictures
in float64 against the exact picture of the same step count; the rule for levels stands in `benchmarks._peers_front`.
cache-dit is optional: `pip install cache-dit==1.5.3`; without it its rows say so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import _peers_plot
from benchmarks._peers_front import Point, Reading, ahead, at_level, bound, delta_formula
from benchmarks._peers_methods import Setting, absent, own, version
from benchmarks._peers_runs import Bench, summary
from benchmarks._peers_settings import FITTED, LEVELS, PROMPTS, SEEDS, STEPS, settings, training_prompts
from benchmarks.machine import RESULTS, record, write_json
from pipelines import catalog

WINDOW = (20.0, 46.0)
"""dB between which a setting must lie on the pictures of the screening: outside it says nothing of the levels."""
DELTA = ((2, 8), (3, 8), (4, 8), (2, 5))
"""Interval and blocks left out, for the check of Delta-cache's formula."""


def main(words: Sequence[str] | None = None) -> int:
    """Measure what is asked for, then report."""
    given = _arguments(words)
    pictures = [(prompt, seed) for seed in range(given.seeds) for prompt in PROMPTS[: given.prompts]]
    bench = Bench(catalog.load(given.model, "float32", "cpu"))
    wanted = [
        one for steps in given.steps for one in settings(steps, (*(given.ours or ()), *_fitted(bench, steps)))
    ]
    if given.only:
        wanted = [one for one in wanted if any(word in f"{one.method} {one.words}" for word in given.only)]
    here = [one for one in wanted if absent(one.method) is None][given.share[0] - 1 :: given.share[1]]
    both = not (given.quality or given.times or given.table)
    failed: dict[str, str] = {}
    if given.quality or both:
        _quality(bench, here, pictures[: given.screen], failed)
        here = _kept(bench, here, pictures[: given.screen], given.margin)
        _quality(bench, here, pictures, failed)
    if given.times or both:
        _times(bench, [one for one in here if _seen(bench, one, pictures)], given)
    value = report(bench, wanted, pictures, failed)
    if not value["rows"]:
        print("nothing was measured so far with this code: run without --table", file=sys.stderr)
        return 1
    value["words"] = " ".join(["python -m benchmarks.peers", *(words if words is not None else sys.argv[1:])])
    file = RESULTS / f"{given.name}.json"
    write_json(file, value)
    file.with_suffix(".svg").write_text(plot(value), encoding="utf-8")
    print("\n".join(table(value)))
    return 0


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quality", action="store_true", help="make the pictures that are missing")
    parser.add_argument("--times", action="store_true", help="take the times; wants a quiet machine")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument(
        "--steps", type=int, action="append", choices=STEPS, help="repeatable; both by default"
    )
    parser.add_argument(
        "--prompts", type=int, default=len(PROMPTS), choices=range(1, len(PROMPTS) + 1), metavar="N"
    )
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, 10), metavar="N")
    parser.add_argument(
        "--only", action="append", metavar="WORD", help="settings with this word in them; repeatable"
    )
    parser.add_argument(
        "--ours", action="append", metavar="METHOD", help="one more setting of ours, as text; repeatable"
    )
    parser.add_argument(
        "--share",
        type=_share,
        default=(1, 1),
        metavar="K/N",
        help="only the k-th of n shares of the settings",
    )
    parser.add_argument(
        "--screen",
        type=int,
        default=4,
        metavar="N",
        help="settings far under their own method on N pictures go no further",
    )
    parser.add_argument("--margin", type=float, default=0.2, metavar="DB", help="how far under is far, in dB")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds for each setting")
    parser.add_argument("--again", action="store_true", help="take times anew that were taken before")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--name", default="peers", help="name of the files written")
    given = parser.parse_args(words)
    given.steps = tuple(dict.fromkeys(given.steps or STEPS))
    return given


def _share(text: str) -> tuple[int, int]:
    place, _, count = text.partition("/")
    if not (place.isdigit() and count.isdigit() and 1 <= int(place) <= int(count)):
        raise argparse.ArgumentTypeError(f"must be K/N with K from 1 to N, as in 1/2, got {text!r}")
    return int(place), int(count)


def _quality(
    bench: Bench, wanted: Sequence[Setting], pictures: Sequence[tuple[str, int]], failed: dict[str, str]
) -> None:
    begun = time.perf_counter()
    for place, one in enumerate(wanted):
        try:
            found = summary(bench.quality(one, pictures))
        except Exception as error:
            if own(one.method):
                raise
            failed[one.key] = f"{type(error).__name__}: {error}"
            print(f"{one.method} ({one.words}) failed: {failed[one.key]}", flush=True)
            continue
        print(
            f"{place + 1}/{len(wanted)} {time.perf_counter() - begun:.0f} s, {one.steps} steps, {one.method} ({one.words}): "
            f"{found['psnr_db']:.2f} dB, computed {found['fraction']:.3f}",
            flush=True,
        )


def _fitted(bench: Bench, steps: int) -> list[str]:
    """Return our step forecasts fitted to exact runs of other prompts."""
    card = bench.loaded.card
    if not card.more.get("concepts") or not FITTED.get(steps):
        return []
    prompts = training_prompts(card.more["concepts"], card.more.get("styles") or [""])
    return bench.fitted(steps, prompts, FITTED[steps])


def _kept(
    bench: Bench, wanted: Sequence[Setting], pictures: Sequence[tuple[str, int]], margin: float
) -> list[Setting]:
    """Return the settings that the first pictures do not show to lie far under another of the same method."""
    found = {one.key: summary(bench.quality(one, pictures)) for one in wanted if _seen(bench, one, pictures)}

    def beaten(one: Setting) -> bool:
        mine = found[one.key]
        rivals = (
            found[other.key]
            for other in wanted
            if other.key in found and other.method == one.method and other.steps == one.steps
        )
        return any(
            r["fraction"] <= mine["fraction"] and r["psnr_db"] > mine["psnr_db"] + margin for r in rivals
        )

    kept = [
        one
        for one in wanted
        if one.key in found and WINDOW[0] <= found[one.key]["psnr_db"] <= WINDOW[1] and not beaten(one)
    ]
    print(f"{len(kept)} of {len(wanted)} settings are measured on all pictures", flush=True)
    return kept


def _seen(bench: Bench, one: Setting, pictures: Sequence[tuple[str, int]]) -> bool:
    """Whether all pictures of a setting were made: what failed is not timed."""
    return all(
        bench.store.get("quality", bench.origin(one), one.key, *picture) is not None for picture in pictures
    )


def _times(bench: Bench, wanted: Sequence[Setting], given: argparse.Namespace) -> None:
    prompts = PROMPTS[: max(1, given.rounds)]
    for steps in given.steps:
        missing = [one for one in wanted if one.steps == steps and (given.again or bench.timed(one) is None)]
        bench.times(missing, prompts, given.rounds)
        cost = bench.empty_cost(steps, prompts, given.rounds)
        print(f"{steps} steps: a call without its blocks costs {cost:.2%} of a full one", flush=True)
    for interval, cached in DELTA:
        found = bench.delta(max(given.steps), interval, cached, prompts, given.rounds)
        bench.store.put(found, "delta", bench.origin(Setting.of("leapfrog", 0)), interval, cached)


def report(
    bench: Bench, wanted: Sequence[Setting], pictures: Sequence[tuple[str, int]], failed: dict[str, str]
) -> dict[str, Any]:
    """Return everything that was measured, as the results file holds it."""
    rows = [row for one in wanted if (row := _row(bench, one, pictures, failed)) is not None]
    counts = sorted({one.steps for one in wanted})
    empty = {str(steps): bench.store.get("empty", bench.base, steps) for steps in counts}
    value = record() | {
        "model": bench.loaded.card.name, "guidance": bench.guidance, "pictures": len(pictures),
        "rule": " ".join((sys.modules[Point.__module__].__doc__ or "").split()), "empty_call_cost": empty, "rows": rows,
    }  # fmt: skip
    for kind in ("denoise", "end_to_end"):
        value[f"levels_{kind}"] = {str(steps): levels(rows, steps, kind) for steps in counts}
    value["delta_cache"] = _delta(bench)
    missing = dict.fromkeys(one.method for one in wanted if absent(one.method) is not None)
    value["absent"] = {method: absent(method) for method in missing}
    return value


def _row(
    bench: Bench, one: Setting, pictures: Sequence[tuple[str, int]], failed: dict[str, str]
) -> dict[str, Any] | None:
    row: dict[str, Any] = {"steps": one.steps, "method": one.method, "settings": one.values}
    if absent(one.method) is not None:
        return None
    row["from"] = version(one.method)
    if one.key in failed:
        return row | {"failed": failed[one.key]}
    if not _seen(bench, one, pictures):
        return None
    row |= summary(bench.quality(one, pictures))
    times = bench.timed(one)
    cost = bench.store.get("empty", bench.base, one.steps)
    if times is not None:
        row["speedup"] = {name: times[name] for name in ("denoise", "end_to_end")}
        row["seconds"] = times["seconds"]
    if cost is not None:
        row["bound"] = bound(row["fraction"], cost)
        row["measured_over_bound"] = times["denoise"] / row["bound"] if times is not None else None
    return row


def levels(rows: Sequence[dict[str, Any]], steps: int, kind: str) -> dict[str, Any]:
    """Return for each level the reading of each method, our best, the best peer, and by how much ours is ahead."""
    methods: dict[str, list[Point]] = {}
    for row in rows:
        if row["steps"] == steps and "speedup" in row:
            words = ", ".join(f"{name}={value}" for name, value in row["settings"].items())
            methods.setdefault(row["method"], []).append(Point(row["speedup"][kind], row["psnr_db"], words))
    found: dict[str, Any] = {}
    for level in LEVELS:
        read = {name: at_level(points, level) for name, points in methods.items()}
        mine = {name: one for name, one in read.items() if own(name)}
        peers = {name: one for name, one in read.items() if not own(name)}
        best = _best(mine)
        found[f"{level:g}"] = {
            "methods": {name: _reading(one) for name, one in read.items()},
            "ours": best, "peer": _best(peers),
            "ahead": None if best is None else ahead(mine[best], list(peers.values())),
        }  # fmt: skip
    return found


def _best(read: dict[str, Reading]) -> str | None:
    speed: Callable[[str], float] = lambda name: read[name].speed or 0.0  # noqa: E731
    return max((name for name in read if read[name].speed is not None), key=speed, default=None)


def _reading(one: Reading) -> dict[str, Any]:
    return (
        {"speedup": one.speed, "between": list(one.between)}
        if one.speed is not None
        else {"speedup": None, "why": one.beyond}
    )


def _delta(bench: Bench) -> list[dict[str, float]]:
    blocks = len(bench.pipeline.transformer.transformer_blocks) + len(
        bench.pipeline.transformer.single_transformer_blocks
    )
    rows = []
    for interval, cached in DELTA:
        measured = bench.store.get("delta", bench.origin(Setting.of("leapfrog", 0)), interval, cached)
        if measured is not None:
            formula = delta_formula(interval, cached, blocks)
            rows.append({
                "interval": interval, "cached": cached, "blocks": blocks, "formula": formula, "measured": measured,
                "measured_over_formula": measured / formula,
            })  # fmt: skip
    return rows


def plot(value: dict[str, Any]) -> str:
    """Return the plot; where no time was taken yet, by what the computed share alone would give, so marked."""
    timed = [row for row in value["rows"] if "speedup" in row]
    found: dict[int, dict[str, list[Point]]] = {}
    for row in timed or _by_share(value["rows"]):
        point = Point(row["speedup"]["denoise"], row["psnr_db"])
        found.setdefault(row["steps"], {}).setdefault(row["method"], []).append(point)
    words = "speed-up of the denoising loop" if timed else "speed-up estimated from the computed share"
    return _peers_plot.svg(found, LEVELS, words)


def table(value: dict[str, Any]) -> list[str]:
    """Return the lines of the README's table; where no time was taken, what the computed share alone would give, so marked."""
    lines: list[str] = []
    for steps, read in value["levels_denoise"].items():
        timed = any(one["methods"] for one in read.values())
        read = read if timed else levels(_by_share(value["rows"]), int(steps), "denoise")
        heading = (
            f"{steps} steps" if timed else f"{steps} steps (estimate from the computed share, no time taken)"
        )
        lines += [
            "",
            f"| {heading} | " + " | ".join(f"{level} dB" for level in read) + " |",
            "| --- |" + " --- |" * len(read),
        ]
        for method in dict.fromkeys(name for one in read.values() for name in one["methods"]):
            cells = [one["methods"][method] for one in read.values()]
            lines.append(f"| {method} | " + " | ".join(map(_cell, cells)) + " |")
        lead = [f"{one['ahead']:.2f}" if one["ahead"] else "-" for one in read.values()]
        lines.append("| best of ours over best peer | " + " | ".join(lead) + " |")
    for row in value["delta_cache"]:
        lines.append(
            f"Delta-cache, every {row['interval']}th step, {row['cached']} of {row['blocks']} blocks: "
            f"{row['measured']:.3f}x measured, {row['formula']:.3f}x by formula"
        )
    lines += [f"{method}: {why}" for method, why in value["absent"].items()]
    return lines


def _by_share(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        row | {"speedup": {"denoise": bound(row["fraction"], 0.0)}} for row in rows if "failed" not in row
    ]


def _cell(reading: dict[str, Any]) -> str:
    return (
        f"{reading['speedup']:.2f}x"
        if reading["speedup"]
        else ("> fastest" if "fastest" in reading["why"] else "not reached")
    )


if __name__ == "__main__":
    sys.exit(main())
