"""What a picture was made on: versions, device, memory; and whose packages are on the path."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

DISTRIBUTION = "leapfrog-dit"
PACKAGES = ("dit", "control", "pipelines", "acceleration")
_NAMED = ("torch", "diffusers", "transformers", "safetensors", "peft", "numpy", "pillow")


@cache
def versions() -> dict[str, str]:
    """Return the versions of what decides a picture, without importing any of it."""
    found = {"leapfrog": version(), "python": platform.python_version()}
    for name in _NAMED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def version() -> str:
    """Return our own version, or "source" where it is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "source"


@cache
def processor() -> str:
    """Return the name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Return the name of the device that a model runs on. Imports torch."""
    import torch

    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return f"{processor()}, {torch.get_num_threads()} threads" if device == "cpu" else device


def peak_memory(device: str) -> dict[str, float]:
    """Return the most memory this process has used so far, and the device's where it has its own, in MB."""
    found: dict[str, float] = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["process"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
    if device.startswith("cuda"):
        import torch

        found["device"] = round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    return found


def strangers() -> list[str]:
    """Return a sentence for each of our package names that another distribution provides, or that comes from elsewhere."""
    here = Path(__file__).resolve().parent.parent
    owners = importlib.metadata.packages_distributions()
    found = []
    for name in PACKAGES:
        others = sorted({one for one in owners.get(name, []) if _plain(one) != DISTRIBUTION})
        place = _place(name)
        if others:
            found.append(
                f"two owners of the package {name}: {DISTRIBUTION} ({here}) and {', '.join(others)}; use a virtual environment"
                f" of its own, or: pip uninstall {' '.join(others)}"
            )
        elif place is not None and place.parent != here:
            found.append(
                f"two owners of the package {name}: {DISTRIBUTION} ({here}) and {place}, which python finds first"
            )
    return found


def environment() -> dict[str, Any]:
    """Return what `doctor` shows: versions, processor, memory, devices. Imports torch."""
    import torch

    flags = _flags()
    return {
        "versions": versions(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "bfloat16_in_hardware": any(flag in flags for flag in ("avx512_bf16", "amx_bf16")),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
        if hasattr(os, "sysconf")
        else None,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "attention": "torch scaled_dot_product_attention",
    }


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _place(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]).resolve() if places else None


def _flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()
