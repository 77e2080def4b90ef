"""What is in a file or a folder, and whether this computer is ready; everything is read as data."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from pipelines import catalog, machine
from pipelines.metadata import FRAMES_JSON, read_metadata
from pipelines.request import RequestError
from pipelines.result import SaveError, check_target
from pipelines.safe import Header, ModelError, check_folder, check_weights, components, weight_files
from pipelines.video_files import FORMATS, OTHERS

STRANGE = (".txt", ".md", ".csv", ".jsonl", ".toml", ".yaml", ".yml", ".py", ".svg", ".pdf", *OTHERS)
"""Endings of files that are neither ours nor weights."""


def inspect(path: Path) -> dict[str, Any]:
    """Describe a saved picture or its sidecar, a safetensors file, or a model folder.

    Raises:
        RequestError: nothing there, or nothing known; ModelError: weights that would be refused.
    """
    if path.is_dir():
        return _made(path) if (path / FRAMES_JSON).exists() else _folder(path)
    if not path.exists():
        raise RequestError("file", str(path), "a file or a folder that exists")
    if path.suffix.lower() in (".json", *FORMATS):
        return _made(path)
    if path.suffix.lower() in STRANGE:
        allowed = "a picture, clip or JSON file made by leapfrog, a .safetensors file, or a model folder"
        raise RequestError("file", str(path), allowed)
    from pipelines.controls import described

    found = {"kind": "weights", "file": str(path)} | _weights(check_weights(path))
    adapter = described(path)
    return found | ({"kind": "adapter", "adapter": adapter} if adapter else {})


def examine(folder: Path) -> dict[str, Any]:
    """Check packages, models, the text encoder and the disk; "problems" lists what is wrong, with what to do."""
    problems = list(machine.strangers())
    models = {}
    for name in catalog.shipped():
        try:
            place, _ = catalog.prepare(catalog.find(name))
            models[name] = catalog.digest_of(place)
        except ModelError as error:
            problems.append(str(error))
    if not models:
        problems.append("no shipped model is here; get the whole project, with pipelines/checkpoints")
    try:
        from dit.text import find_minilm

        encoder = str(find_minilm())
    except (ImportError, FileNotFoundError, ValueError) as error:
        encoder = "missing"
        problems.append(str(error))
    try:
        check_target(folder)
    except SaveError as error:
        problems.append(str(error))
    free = round(shutil.disk_usage(folder).free / 1e9, 1)
    known = machine.environment() | {"text_encoder": encoder, "models": models, "disk_free_gb": free}
    return known | {"problems": problems or []}


def _made(path: Path) -> dict[str, Any]:
    found = read_metadata(path)
    frames = (
        found["report"].get("effective", {}).get("frames") if isinstance(found.get("report"), dict) else None
    )
    return {"kind": "clip" if isinstance(frames, int) and frames > 1 else "picture"} | found


def _folder(path: Path) -> dict[str, Any]:
    index = check_folder(path, catalog.OWN)
    parts = {name: f"{library}.{kind}" for name, (library, kind) in components(index).items() if library}
    weights = {
        file.relative_to(path).as_posix(): _weights(check_weights(file)) for file in weight_files(path)
    }
    card = dataclasses.asdict(catalog.card_of(path, path.name))
    return {
        "kind": "model",
        "pipeline": index["_class_name"],
        "parts": parts,
        "weights": weights,
        "digest": catalog.digest_of(path),
        "card": {key: value for key, value in card.items() if value not in (None, "", {})},
    }


def _weights(header: Header) -> dict[str, Any]:
    kinds = Counter(dtype for dtype, _, _, _ in header.tensors.values())
    return {
        "tensors": len(header.tensors),
        "parameters": header.parameters,
        "dtypes": dict(kinds),
        "bytes": header.size,
        "metadata": {key: value[:200] for key, value in header.metadata.items()},
    }
