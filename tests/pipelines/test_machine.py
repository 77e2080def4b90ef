"""Two owners of one of our package names are noticed, and both are named."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import machine

ROOT = Path(__file__).resolve().parents[2]


def test_our_own_tree_is_no_stranger() -> None:
    assert machine.strangers() == []


def test_another_distribution_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {"dit": ["leapfrog-dit", "dit"], "control": ["leapfrog_dit"], "torch": ["torch"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    (sentence,) = machine.strangers()
    assert "the package dit: leapfrog-dit" in sentence
    assert "and dit;" in sentence
    assert "pip uninstall dit" in sentence


def test_a_package_that_python_finds_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
    code += "from pipelines.cli import main; sys.exit(main(['models']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "two owners of the package control" in done.stderr
    assert str(tmp_path / "control") in done.stderr


def test_versions_and_memory_are_known_without_torch() -> None:
    code = "import sys; from pipelines import machine; machine.versions(); machine.peak_memory('cpu')\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
    assert machine.peak_memory("cpu")["process"] > 1
