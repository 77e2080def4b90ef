"""Students are judged beside the plain network by the same questions, row by row, and the README's table tells of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import backbones, students
from benchmarks.exam import Exam
from training.data import Pictures

ROWS = [{"caption": f"thing {i}, cartoon", "concept": f"thing {i}", "style": "noto"} for i in range(10)]


class Pipeline:
    """Draws the number of a prompt, or of every `spoils`-th one a wrong one; it notes what it was asked for."""

    def __init__(self, spoils: int, width: int) -> None:
        self.spoils, self.transformer = spoils, nn.Linear(width, 1)
        self.asked: list[tuple[tuple[str, ...], tuple[int, ...], int]] = []

    def __call__(self, prompts: list[str], *, seeds: list[int], num_inference_steps: int, **_: Any) -> Any:
        self.asked.append((tuple(prompts), tuple(seeds), num_inference_steps))
        for _ in range(num_inference_steps):
            self.transformer(torch.zeros(len(prompts), self.transformer.in_features))
        numbers = [int(one.split()[1].rstrip(",")) if "thing" in one else 0 for one in prompts]
        told = [9 - n if self.spoils and n % self.spoils == 0 else n for n in numbers]
        return SimpleNamespace(
            images=torch.tensor(told).float().reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 255
        )


class Reader:
    digest = "sha256:1"

    def accuracy(self, pixels: Tensor, rows: list[dict[str, Any]]) -> dict[str, float]:
        right = [
            int(p[0, 0, 0]) == int(row["concept"].split()[1]) for p, row in zip(pixels, rows, strict=True)
        ]
        share = sum(right) / len(right)
        return {"pictures": len(rows), "style_top1": 1.0, "concept_top1": share, "concept_top5": share}


def judged(
    monkeypatch: pytest.MonkeyPatch, out: Path, made: dict[str, Pipeline], *more: str
) -> dict[str, Any]:
    blank = torch.zeros(10, 3, 2, 2, dtype=torch.uint8)
    both = [Pictures(blank[:6], ROWS[:6]), Pictures(blank[6:], ROWS[6:])]
    monkeypatch.setattr(students, "set_exam", lambda *_, learnt: Exam(both[0], both[1], both[0], []))
    monkeypatch.setattr(students, "asked_of", lambda *_: (both[0], ["noto"]))
    monkeypatch.setattr(students, "load_judge", lambda _: Reader())
    known = {"steps": 3, "guidance": 2.0, "digest": "sha256:2"}
    monkeypatch.setattr(students, "load_pipeline", lambda name, _: (made[name], {"model": name} | known))
    names = [f"{name}={name}" for name in made if name not in ("emoji", *more)]
    monkeypatch.setattr(
        "sys.argv", ["students", *names, "--out", str(out), "--seeds", "2", "--rounds", "1", *more]
    )
    threads = torch.get_num_threads()
    try:
        students.main()
    finally:
        torch.set_num_threads(threads)
    return dict(json.loads((out / "students.json").read_text())["rows"])


def test_students_and_plain_network_are_asked_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = {"emoji": Pipeline(0, 4), "lit": Pipeline(0, 6), "moe": Pipeline(3, 9)}
    rows = judged(monkeypatch, tmp_path, made)
    assert made["emoji"].asked == made["lit"].asked == made["moe"].asked
    assert {steps for *_, steps in made["lit"].asked} == {3}
    assert set(rows) == {"lit", "moe"}
    assert rows["lit"]["within_a_tenth"] is True
    assert rows["lit"]["share_of_plain"] == {"concept_top5": 1.0, "concept_top1": 1.0, "style_top1": 1.0}
    # Things 0, 3, 6 and 9 are wrong: two of six held out, twice, and two of the four that were learnt.
    assert rows["moe"]["held_out"]["concept_top5"] == pytest.approx(4 / 6)
    assert rows["moe"]["share_of_plain"]["concept_top5"] == pytest.approx((8 + 2) / 16)
    assert rows["moe"]["within_a_tenth"] is False
    assert (rows["moe"]["parameters"], rows["moe"]["plain_parameters"]) == (10, 5)
    assert (rows["moe"]["macs_a_picture"], rows["moe"]["plain_macs_a_picture"]) == (3 * 9, 3 * 4), "three steps"
    assert rows["moe"]["times_as_fast"] > 0
    assert rows["moe"]["plain"] == "emoji"


def test_rows_of_earlier_runs_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    judged(monkeypatch, tmp_path, {"emoji": Pipeline(0, 4), "lit": Pipeline(2, 6)})
    rows = judged(monkeypatch, tmp_path, {"emoji": Pipeline(0, 4), "moe": Pipeline(0, 6)})
    assert (rows["lit"]["within_a_tenth"], rows["moe"]["within_a_tenth"]) == (False, True)
    rows = judged(monkeypatch, tmp_path, {"emoji": Pipeline(0, 4), "lit": Pipeline(0, 6)})
    assert (rows["lit"]["within_a_tenth"], rows["moe"]["within_a_tenth"]) == (True, True)


def test_a_folder_to_compare_with_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = str(tmp_path / "control")
    rows = judged(monkeypatch, tmp_path, {"lit": Pipeline(0, 6), plain: Pipeline(0, 4)}, "--plain", plain)
    assert rows["lit"]["plain"] == "control"


@pytest.mark.parametrize("name", ["lit", "plain=folder", "lit="])
def test_names_that_are_none_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["students", name])
    with pytest.raises(SystemExit):
        students.main()


def test_the_table_tells_what_was_trained(tmp_path: Path) -> None:
    readme, row = tmp_path / "README.md", {"system": "", "setting": "s", "paper": "p"}
    row |= {"parameters": 2_000_000, "parameters_activated": 1_000_000}
    row |= {
        key: value for side in (32, 64) for key, value in ((f"macs_{side}", 3e9), (f"time_ratio_{side}", 0.5))
    }
    share = {"concept_top5": 0.973, "concept_top1": 0.9, "style_top1": 1.01}
    (tmp_path / "students.json").write_text(
        json.dumps({"rows": {"lit": {"share_of_plain": share, "times_as_fast": 1.25}}})
    )
    losses = {"switch": {"held_out_loss": {"all": 0.206}}, "dense": {"held_out_loss": {"all": 0.2}}}
    (tmp_path / "routing.json").write_text(json.dumps({"runs": losses}))
    readme.write_text(f"before\n{backbones.MARKS[0]}\nold\n{backbones.MARKS[1]}\nafter\n")
    table = [row | {"system": name} for name in ("LiT", "Dense2MoE", "Switch-DiT")]
    backbones.write_readme(table, readme, tmp_path)
    lines = [one for one in readme.read_text().splitlines() if one.startswith("| ")]
    counts = "| `s` | 2.0 M (1.0 M active) | 3.00 / 3.00 | 0.50 / 0.50 |"
    assert lines[-3:] == [
        f"| LiT {counts} concept 97%, style 101% of the plain one's, 1.25x as fast | p |",
        f"| Dense2MoE {counts}  | p |",
        f"| Switch-DiT {counts} loss +3.0% at equal steps | p |",
    ]
    assert len({one.count("|") for one in lines}) == 1
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


def test_every_trained_system_is_in_the_table() -> None:
    assert set(backbones.TRAINED) <= {one.system for one in backbones.rows()}
