"""Compare our networks with recordings of the released code: `python -m benchmarks.fidelity FOLDER... [--mid] [--json]`.

A folder holds config.json (system, constructor arguments), weights.safetensors (official layout) and io.safetensors
(recorded cases). The model is built from config.json alone, the weights go strictly through `dit.convert`, and every
recorded output is compared in fp32. Exit status: 0 all within tolerance; 1 a miss; 2 a folder that could not be tried.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.convert import LayoutError, UnknownSystemError, convert, find, read_safetensors
from dit.convert.base import Case, add_home

HIT, MISS, UNTRIED = 0, 1, 2
add_home("control.convert")  # released adapters; dit itself must not know of control


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One recorded tensor against ours; `difference` is the largest absolute one, None where there is none to speak of."""

    folder: str
    system: str
    case: str
    output: str
    difference: float | None
    tolerance: float
    passed: bool
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of one folder: rows, or in words why there are none."""

    folder: str
    system: str
    rows: tuple[Row, ...] = ()
    problem: str = ""
    status: int = HIT


def compare(folder: Path, *, mid: bool = False, tolerance: float | None = None) -> Report:
    """Run all cases of a folder. `tolerance` replaces the system's own."""
    system = "?"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        system = str(config["system"])
        found = find(system)
        cases = found.complete(read_cases(read_safetensors(folder / "io.safetensors")))
        state = read_safetensors(folder / "weights.safetensors")
    except UnknownSystemError as error:
        return Report(folder=str(folder), system=system, problem=str(error), status=UNTRIED)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"no fixture folder: {type(error).__name__}: {error}"
        return Report(folder=str(folder), system=system, problem=problem, status=UNTRIED)
    if not any(case.outputs for case in cases):
        return Report(folder=str(folder), system=system, problem="no recorded outputs", status=UNTRIED)
    allowed = found.tolerance if tolerance is None else tolerance
    try:
        # Whatever happens from here on, a known system was not reproduced.
        model = convert(state, system, config.get("args", {}), config.get("run", {})).float()
        rows = [
            Row(folder=str(folder), system=system, case=case.name, tolerance=allowed, **one)
            for case in cases
            for one in _compare_case(found, model, case, allowed, mid)
        ]
    except (LayoutError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        problem = str(error) if isinstance(error, LayoutError) else f"{type(error).__name__}: {error}"
        return Report(folder=str(folder), system=system, problem=problem, status=MISS)
    status = HIT if all(row.passed for row in rows) else MISS
    return Report(folder=str(folder), system=system, rows=tuple(rows), status=status)


def read_cases(tensors: dict[str, Tensor]) -> list[Case]:
    """Sort tensors called caseN.in.NAME, caseN.out.NAME and caseN.mid.NAME. Raises: ValueError for any other name."""
    cases: dict[str, Case] = {}
    for key, tensor in tensors.items():
        parts = key.split(".", 2)
        if len(parts) != 3 or parts[1] not in ("in", "out", "mid"):
            raise ValueError(
                f"io.safetensors: {key!r} is not called caseN.in.NAME, caseN.out.NAME or caseN.mid.NAME"
            )
        case = cases.setdefault(parts[0], Case(parts[0]))
        {"in": case.inputs, "out": case.outputs, "mid": case.mids}[parts[1]][parts[2]] = tensor
    return [cases[name] for name in sorted(cases, key=lambda name: (len(name), name))]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference of two tensors of one shape; a NaN on either side gives infinity."""
    if not ours.numel():
        return 0.0
    largest = float((ours.double() - theirs.double()).abs().max())
    return math.inf if math.isnan(largest) else largest


def _compare_case(found: Any, model: Any, case: Case, allowed: float, mid: bool) -> list[dict[str, Any]]:
    with torch.no_grad():
        outputs, mids = found.run_observed(model, case) if mid else (found.run(model, case.inputs), {})
    rows = [_row(name, outputs.get(name), theirs, allowed) for name, theirs in case.outputs.items()]
    if mid:
        rows += [_row(f"mid.{name}", mids.get(name), theirs, allowed) for name, theirs in case.mids.items()]
    return rows


def _row(name: str, ours: Tensor | None, theirs: Tensor, allowed: float) -> dict[str, Any]:
    if ours is None:
        return {"output": name, "difference": None, "passed": False, "note": "our run gives no such tensor"}
    if ours.shape != theirs.shape:
        note = f"shape {tuple(ours.shape)}, recorded {tuple(theirs.shape)}"
        return {"output": name, "difference": None, "passed": False, "note": note}
    error = difference(ours, theirs)
    return {"output": name, "difference": error, "passed": error <= allowed}


def _print(reports: Sequence[Report]) -> None:
    rows = [row for report in reports for row in report.rows]
    if rows:
        wide = max(len(row.output) for row in rows)
        print(f"{'system':<14} {'case':<7} {'output':<{wide}} {'difference':>11} {'tolerance':>9}")
    for row in rows:
        figure = "-" if row.difference is None else f"{row.difference:.3g}"
        verdict = ("ok" if row.passed else "MISS") + (f"  {row.note}" if row.note else "")
        print(
            f"{row.system:<14} {row.case:<7} {row.output:<{wide}} {figure:>11} {row.tolerance:>9.3g}  {verdict}"
        )
    for report in reports:
        if report.problem:
            print(f"{report.folder}: {report.problem}", file=sys.stderr)
    missed = sum(not row.passed for row in rows)
    untried = sum(bool(report.problem) for report in reports)
    print(
        f"{len(rows) - missed} of {len(rows)} recorded tensors reproduced; {untried} of {len(reports)} folders not compared"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the folders named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="fixture folders")
    parser.add_argument("--mid", action="store_true", help="compare intermediate values too")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    parser.add_argument(
        "--tolerance", type=float, help="largest absolute difference allowed, in place of the system's own"
    )
    given = parser.parse_args(argv)
    reports = [compare(folder, mid=given.mid, tolerance=given.tolerance) for folder in given.folders]
    if given.json:
        print(json.dumps([_plain(report) for report in reports], indent=1))
    else:
        _print(reports)
    statuses = {report.status for report in reports}
    return MISS if MISS in statuses else UNTRIED if UNTRIED in statuses else HIT


def _plain(report: Report) -> dict[str, Any]:
    plain = dataclasses.asdict(report)
    for row in plain["rows"]:
        if row["difference"] is not None and math.isinf(row["difference"]):
            row["difference"] = None  # JSON has no infinity
            row["note"] = "not a number"
    return plain


if __name__ == "__main__":
    sys.exit(main())
