"""Every results file says what it was measured on; times are taken in turns; files are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import machine


def test_record_names_machine_commit_and_versions() -> None:
    found = machine.record()
    assert found["machine"]["processor"]
    assert found["machine"]["versions"]["torch"]
    assert found["machine"]["cores"] >= 1
    assert found["commit"]
    assert found["made"].endswith("+00:00")
    json.dumps(found)


def test_commit_is_unknown_outside_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() == "unknown"


def test_candidates_take_turns_and_the_order_turns_round() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = machine.interleaved(candidates, rounds=3, warmups=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert found["a"]["ratio"] == 1
    assert len(found["b"]["all"]) == 3
    assert found["b"]["best"] <= found["b"]["median"]


def test_interleaved_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="at least one"):
        machine.interleaved({})


def test_json_is_whole_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "a.json"
    machine.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        machine.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [one.name for one in file.parent.iterdir()] == ["a.json"]
