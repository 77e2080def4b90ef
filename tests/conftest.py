"""What every test may lean on: where the shared material lies, a GPU mark that skips, and no state left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

# The same made-up inputs in every run; `make fuzz` draws new ones.
settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Fixtures and data that lie beside the checkout; the test is skipped where they do not."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the shared fixtures and data are not beside this checkout")
    return folder


@pytest.fixture(autouse=True)
def attention_backend_restored() -> Iterator[None]:
    """`set_attention_backend` on one model changes diffusers' process-wide default; put it back after each test."""
    import sys

    module = sys.modules.get("diffusers.models.attention_dispatch")
    before = module._AttentionBackendRegistry._active_backend if module else None
    yield
    module = sys.modules.get("diffusers.models.attention_dispatch")
    if module is not None:
        module._AttentionBackendRegistry._active_backend = before or module.AttentionBackendName.NATIVE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
