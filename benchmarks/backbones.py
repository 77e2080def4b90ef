"""What each system costs beside the plain network of its size: `python -m benchmarks.backbones [--readme]`.

One call of one picture on one thread, processor time, medians of turns with the plain network; parameters and multiply-accumulates
by `dit.ledger`. Weights are random; what small trained ones are worth is read from the results of `benchmarks.students` and
`benchmarks.routing`. `--readme` writes the table into README.md between its markers, with `--kept` from what was measured before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dit.experts
import dit.mixers
from benchmarks.machine import RESULTS, ROOT, record, write_json
from dit.experts.dense import Experts
from dit.ledger import analytic
from dit.mixers.full import Mixer
from dit.presets import build
from dit.spec import kinds

assert dit.experts
assert dit.mixers

MARKS = ("<!-- backbones: made by python -m benchmarks.backbones --readme -->", "<!-- end of backbones -->")
SIDES = (32, 64)  # latent pixels: 256 and 1024 tokens in patches of 2


@dataclass(frozen=True)
class Row:
    """One system: how it is built, beside what, and the prompt it takes."""

    system: str
    setting: str
    make: Callable[[], Any]
    plain: str
    paper: str
    text: int = 0


def rows() -> list[Row]:
    """Return a row a mixer and a kind of experts in DiT-S/2, and the networks that are graphs of their own."""
    found = [Row("DiT", "dit-s/2", lambda: build("dit-s/2"), "", "arXiv:2212.09748")]
    for family, slot in ((Mixer, "mixer"), (Experts, "experts")):
        for name, kind in kinds(family).items():
            if name in ("full", "dense"):
                continue
            text = {"dynamic": "dynamic:start_width=0,start_tokens=0"}.get(name, name)
            found.append(
                Row(
                    SYSTEMS.get(name, name),
                    f'{slot}="{text}"',
                    _with(slot, text),
                    "DiT",
                    kind.paper.rpartition(", ")[2],
                )
            )
    found.append(Row("MMDiT", "emoji", lambda: build("emoji"), "", "arXiv:2403.03206", 12))
    found.append(
        Row("E-MMDiT", "emmdit-emoji", lambda: build("emmdit-emoji"), "MMDiT", "Nitro-E, AMD 2025", 16)
    )
    return found


SYSTEMS = {
    "linear": "LiT", "gated": "DiG", "proxy": "PT-DiT", "subregion": "subregion attention (E-MMDiT)", "switch": "Switch-DiT",
    "dtr": "DTR", "mixture": "Dense2MoE", "dynamic": "DyDiT, gates at random", "mix-ffn": "Mix-FFN (SANA)", "swiglu": "SwiGLU",
    "spacetime": "VDT", "scenes": "Mask2DiT",
}  # fmt: skip


def _with(slot: str, text: str) -> Callable[[], Any]:
    return lambda: build("dit-s/2", **{slot: text})


def inputs(model: nn.Module, side: int, text: int) -> dict[str, Any]:
    """Return what one call takes."""
    config: Any = model.config
    draw = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {"hidden_states": torch.randn(1, config.in_channels, side, side, generator=draw)}
    given["timestep"] = torch.tensor([500.0])
    if not text:
        return given | {"class_labels": torch.tensor([1])}
    given["encoder_hidden_states"] = torch.randn(1, text, config.context_dim, generator=draw)
    if config.get("pooled_dim"):
        given["pooled_projections"] = torch.randn(1, config.pooled_dim, generator=draw)
    return given


def measure(found: list[Row], repeats: int) -> list[dict[str, Any]]:
    """Return parameters, MACs and times, each network in turns with the plain one it is compared with."""
    table, networks = [], {}
    for row in found:
        torch.manual_seed(0)
        networks[row.system] = row.make().eval()
    for row in found:
        model, plain = networks[row.system], networks.get(row.plain)
        one: dict[str, Any] = {
            "system": row.system,
            "setting": row.setting,
            "paper": row.paper,
            "plain": row.plain or None,
        }
        for side in SIDES:
            cost = analytic(model, side, side, text=row.text)
            one |= {
                "parameters": cost.parameters,
                "parameters_activated": cost.activated,
                f"macs_{side}": cost.macs,
            }
            times = turns([model] + ([plain] if plain is not None else []), side, row.text, repeats)
            one[f"seconds_{side}"] = times[0]
            one[f"time_ratio_{side}"] = round(times[0] / times[1], 3) if len(times) > 1 else None
        print(line(one), flush=True)
        table.append(one)
    return table


def turns(models: list[nn.Module], side: int, text: int, repeats: int) -> list[float]:
    """Return the median processor time of a call of each network, in turns."""
    times: list[list[float]] = [[] for _ in models]
    given = [inputs(model, side, text) for model in models]
    with torch.no_grad():
        for turn in range(repeats + 1):
            for model, arguments, seen in zip(models, given, times, strict=True):
                began = time.process_time()
                model(**arguments)
                if turn:
                    seen.append(time.process_time() - began)
    return [statistics.median(seen) for seen in times]


def line(one: dict[str, Any], worth: str = "") -> str:
    """Return a row of the README's table; `worth` is what `quality` says."""
    small, large = SIDES
    active = one["parameters_activated"] / 1e6
    total = one["parameters"] / 1e6
    counts = f"{total:.1f} M" if abs(total - active) < 0.05 else f"{total:.1f} M ({active:.1f} M active)"
    ratios = [one[f"time_ratio_{side}"] for side in SIDES]
    shown = ["1" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
    macs = f"{one[f'macs_{small}'] / 1e9:.2f} / {one[f'macs_{large}'] / 1e9:.2f}"
    return f"| {one['system']} | `{one['setting']}` | {counts} | {macs} | {shown[0]} / {shown[1]} | {worth} | {one['paper']} |"


TRAINED = {
    "LiT": "lit", "Dense2MoE": "moe", "DyDiT, gates at random": "dydit", "E-MMDiT": "emmdit", "PT-DiT": "ptdit",
}  # fmt: skip
"""System -> the recipe that a small one was trained with."""


def quality(system: str, results: Path) -> str:
    """Return what a small trained network of a system is worth beside the plain one, in words; "" where none was judged.

    Students: the judge's concepts among five and styles, as shares of the plain network's. Switch-DiT: its loss.
    """
    students, routing = results / "students.json", results / "routing.json"
    if system == "Switch-DiT" and routing.is_file():
        runs = json.loads(routing.read_text(encoding="utf-8"))["runs"]
        ours, plain = (runs[name]["held_out_loss"]["all"] for name in ("switch", "dense"))
        return f"loss {ours / plain - 1:+.1%} at equal steps"
    rows = json.loads(students.read_text(encoding="utf-8"))["rows"] if students.is_file() else {}
    if TRAINED.get(system) not in rows:
        return ""
    row = rows[TRAINED[system]]
    share = row["share_of_plain"]
    return (
        f"concept {share['concept_top5']:.0%}, style {share['style_top1']:.0%} of the plain one's, "
        f"{row['times_as_fast']:.2f}x as fast"
    )


def write_readme(
    table: list[dict[str, Any]], file: Path = ROOT / "README.md", results: Path = RESULTS
) -> None:
    """Put the table between the markers of README.md. Raises: ValueError if they are not there."""
    text = file.read_text(encoding="utf-8")
    if any(text.count(mark) != 1 for mark in MARKS):
        raise ValueError(f"README.md must hold each of the markers {MARKS} once")
    names = (
        "system",
        "setting",
        "parameters",
        "GMACs, 256 / 1024 tokens",
        "time beside the plain network",
        "small one, trained",
        "paper",
    )
    head = f"| {' | '.join(names)} |\n|{' --- |' * len(names)}"
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    lines = [line(one, quality(one["system"], results)) for one in table]
    body = "\n".join([MARKS[0], "", head, *lines, "", MARKS[1]])
    file.write_text(before + body + after, encoding="utf-8")


def main() -> None:
    """Measure, write backbones.json and, if asked, the README's table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--kept", action="store_true", help="measure nothing: take the rows of --out")
    parser.add_argument("--out", type=Path, default=RESULTS / "backbones.json")
    given = parser.parse_args()
    if given.kept:
        write_readme(json.loads(given.out.read_text(encoding="utf-8"))["rows"])
        return
    torch.set_num_threads(1)
    table = measure(rows(), given.repeats)
    write_json(given.out, {**record(), "threads": 1, "clock": "process time", "rows": table})
    if given.readme:
        write_readme(table)


if __name__ == "__main__":
    main()
