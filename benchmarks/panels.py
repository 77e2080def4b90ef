"""Whether the panels of a set belong together: `python -m benchmarks.panels --adapter FILE` (about 25 minutes on one core).

Asked for are sets of concepts that no set of the adapter's training held, by captions that name no style: the concepts, and
"one style". The judge names style and concept of every panel. Beside the set made with the adapter stand the same without it, its
panels judged by another set's and by another panel's caption (what chance gives), every panel made alone, and real sets. Then a
real panel is given, and the question is how many of the others take on its style, by each way to hold it.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, ROOT, record, write_json
from control import Use, controlled, load
from pipelines import catalog
from pipelines.panels import panels_of
from pipelines.request import KNOWN
from training.data import Pictures, choose, load_pictures
from training.judge import Court, load_judge
from training.panels import PictureSet, draw_sets, split_concepts

Row = dict[str, Any]
NOTE = (
    "`agree` is the share of pairs of panels of one set that the judge finds of one style, `given` the share of panels of the style"
    " of the panel that was given. Sets are few: two standard errors of a share p of n panels are 2 sqrt(p (1 - p) / n), and"
    " panels of one set are not independent."
)


def judged(court: Court, sets: Sequence[Tensor], rows: Sequence[Sequence[Row]]) -> dict[str, float]:
    """Return what the judge says of sets uint8 [n, 3, 64, 64]: agreement of style, right styles, right concepts."""
    styles, concepts = court.verdicts(torch.cat(list(sets)))
    wanted = [row for one in rows for row in one]
    pairs, same, start = 0, 0, 0
    for one in sets:
        for a, b in itertools.combinations(styles[start : start + len(one)], 2):
            pairs, same = pairs + 1, same + (a == b)
        start += len(one)
    count = max(1, len(wanted))
    return {
        "sets": len(sets),
        "panels": len(wanted),
        "agree": same / max(1, pairs),
        "concept_top1": sum(a[0] == row["concept"] for a, row in zip(concepts, wanted, strict=True)) / count,
        "concept_top5": sum(row["concept"] in a for a, row in zip(concepts, wanted, strict=True)) / count,
        "style_top1": sum(a == row["style"] for a, row in zip(styles, wanted, strict=True)) / count,
    }


def taken_on(court: Court, sets: Sequence[Tensor], rows: Sequence[Sequence[Row]]) -> dict[str, float]:
    """Return how many panels beside the first, which was given, have its style, and the right concept."""
    rest = [one[1:] for one in sets]
    found = judged(court, rest, [one[1:] for one in rows])
    return {
        "panels": found["panels"], "given": found["style_top1"], "concept_top1": found["concept_top1"],
        "concept_top5": found["concept_top5"],
    }  # fmt: skip


def questions(recipe: dict[str, Any], data: Path | None, count: int) -> tuple[Pictures, list[PictureSet]]:
    """Return the pictures and sets that are asked for: those of concepts held out of the recipe's training."""
    about = recipe["data"]
    pictures = choose(
        load_pictures(data or ROOT / about["folder"], size=about["size"]),
        **{k: about[k] for k in ("styles", "subgroups", "concepts")},
    )
    _, held = split_concepts(pictures, about["held_concepts"])
    panels = recipe["adapter"]["panels"]
    return held, draw_sets(held.rows, count, panels, ("style",), random.Random(1))


def made_sets(
    pipe: Any,
    rows: Sequence[Sequence[Row]],
    about: str,
    settings: dict[str, Any],
    known: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Make every set, its captions the concepts alone; `known` are first panels [3, 64, 64]. Each set has a seed of its own."""
    found = []
    for i, one in enumerate(rows):
        given = {} if known is None else {"known": {0: known[i]}}
        panels = pipe(
            [row["concept"] for row in one],
            about=about,
            seeds=[1000 + i],
            output_type="pt",
            **given,
            **settings,
        ).images
        found.append(as_bytes(panels))
    return found


def made_alone(
    pipeline: Any, rows: Sequence[Sequence[Row]], caption: Callable[[Row], str], settings: dict[str, Any]
) -> list[Tensor]:
    """Make every panel by itself, with a seed of its own."""
    found = []
    for i, one in enumerate(rows):
        seeds = [1000 + 100 * i + place for place in range(len(one))]
        images = pipeline([caption(row) for row in one], seeds=seeds, output_type="pt", **settings).images
        found.append(as_bytes(images))
    return found


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures in 0..1 -> uint8."""
    return (pictures.float().cpu().clamp(0, 1) * 255).round().byte()


def compare(
    pipeline: Any, adapter: Any, court: Court, pictures: Pictures, sets: Sequence[PictureSet], given: argparse.Namespace,
    settings: dict[str, Any], layout: str,
) -> dict[str, Any]:  # fmt: skip
    """Make and judge everything; print each as it comes."""
    rows = [[pictures.rows[i] for i in one.rows] for one in sets]
    real = [pictures.pixels[list(one.rows)] for one in sets]
    pipe = panels_of(pipeline)
    pipe.set_progress_bar_config(disable=True)
    figures: dict[str, Any] = {}

    def tell(name: str, value: dict[str, Any], began: float) -> None:
        figures[name] = value | {"seconds": round(time.perf_counter() - began, 1)}
        shares = ", ".join(f"{key} {one:.1%}" for key, one in value.items() if isinstance(one, float))
        print(f"{name:32} {shares}", flush=True)

    began = time.perf_counter()
    tell("real", judged(court, real, rows), began)
    for name, on in (("without", False), ("with", True)):
        began = time.perf_counter()
        with controlled(pipeline.transformer, Use(adapter)) if on else nullcontext():
            found = made_sets(pipe, rows, given.about, settings | {"layout": layout}, None)
        tell(name, judged(court, found, rows), began)
        if on:
            tell("with, other sets' captions", judged(court, found, rows[1:] + rows[:1]), began)
            tell(
                "with, other panels' captions",
                judged(court, found, [one[1:] + one[:1] for one in rows]),
                began,
            )
    began = time.perf_counter()
    tell(
        "alone, no style",
        judged(court, made_alone(pipeline, rows, lambda row: row["concept"], settings), rows),
        began,
    )
    began = time.perf_counter()
    tell(
        "alone, style named",
        judged(court, made_alone(pipeline, rows, lambda row: row["caption"], settings), rows),
        began,
    )
    first = [one[0].float() / 255 for one in real]
    for way in given.ways:
        for name, on in (("without", False), ("with", True)):
            began = time.perf_counter()
            held = settings | {"layout": layout, "way": way, "strength": given.strength}
            with controlled(pipeline.transformer, Use(adapter)) if on else nullcontext():
                found = made_sets(pipe, rows, given.about, held, first)
            tell(f"first given, {way}, {name}", taken_on(court, found, rows), began)
    return figures


def main() -> None:
    """Read the command line, make, judge, and write panels.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", type=Path, required=True, help="file of an In-Context LoRA")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--recipe", type=Path, default=ROOT / "training" / "recipes" / "in-context-lora.toml")
    parser.add_argument("--judge", type=Path, default=ROOT / "benchmarks" / "judge")
    parser.add_argument("--data", type=Path, help="folder of the pictures, instead of the recipe's")
    parser.add_argument("--sets", type=int, default=32)
    parser.add_argument(
        "--about", default="one style", help="what the joint caption says before the first panel"
    )
    parser.add_argument("--ways", nargs="*", choices=KNOWN, default=list(KNOWN))
    parser.add_argument("--strength", type=float, default=0.9, help="of sdedit")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--out", type=Path, default=RESULTS / "panels.json")
    given = parser.parse_args()
    loaded = catalog.load(given.model)
    pipeline, card = loaded.pipeline, loaded.card
    settings = {
        "num_inference_steps": given.steps or card.steps or 28,
        "guidance_scale": card.guidance if given.guidance is None else given.guidance,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    adapter: Any = load(given.adapter, pipeline.transformer).requires_grad_(False)
    recipe = tomllib.loads(given.recipe.read_text())
    pictures, sets = questions(recipe, given.data, given.sets)
    print(f"{len(sets)} sets of {recipe['adapter']['panels']} panels", file=sys.stderr)
    court = load_judge(given.judge)
    layout = getattr(adapter.control, "arrangement", recipe["adapter"].get("arrangement", "grid"))
    figures = compare(pipeline, adapter, court, pictures, sets, given, settings, layout)
    about = {
        "model": given.model, "digest": loaded.digest, "adapter": adapter.control.to_dict(), "about": given.about,
        "strength": given.strength,
    }  # fmt: skip
    write_json(
        given.out,
        record(str(pipeline.device))
        | {"model": about | settings, "judge": court.digest, "note": NOTE, "figures": figures},
    )


if __name__ == "__main__":
    main()
