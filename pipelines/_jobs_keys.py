"""Who a job is: digests of all that decides its picture, gathered into one content key.

Differs: a key names bytes, not places. The same weights under two folders, or the same starting picture under two names, give
the same key; a file that was changed gives another.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_TEXTS = ("prompt", "negative_prompt", "prompts")
"""Fields that are words: never looked at as if they named a file."""
_PIECE = 1 << 20

_known: dict[tuple[str, int, int, int], str] = {}
_models: dict[tuple[Any, ...], str] = {}
_guard = threading.Lock()


def content_key(request: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """Return the key of a request: a digest of its canonical form, with every file replaced by its digest.

    Args:
        request: the form of `Request.to_dict`, or part of it; what is left out counts as its default.
        digests: of the model and of every file that the request names, by the text that names it; see `digests_of`.

    Raises:
        RequestError: no valid request.
    """
    from pipelines.request import Request

    whole = Request.from_dict(request).to_dict()
    if whole["metadata"] == "full":  # keys of files that were made before there was a choice stay theirs
        del whole["metadata"]
    for one in whole["controls"]:  # and here
        for name, usual in (("storage", "exact"), ("place", "device")):
            if one[name] == usual:
                del one[name]
    found = {name: _replaced(name, value, digests) for name, value in whole.items()}
    text = json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def digests_of(request: Mapping[str, Any], known: dict[str, str] | None = None) -> dict[str, str]:
    """Return the digests of a request's model and files, by the text that names them; what cannot be read is left out.

    Args:
        known: digests of models by name, filled and used, for many requests at a time.
    """
    model = str(request.get("model") or default_model())
    known = {} if known is None else known
    if model not in known:
        known[model] = _model_digest(model)
    found = {model: known[model]}
    for name, value in request.items():
        if name in (*_TEXTS, "model"):
            continue
        for text in _strings(value):
            for path in _candidates(text):
                digest = _path_digest(path)
                if digest is not None:
                    found[path] = digest
    return {text: digest for text, digest in found.items() if digest}


def file_digest(path: Path) -> str:
    """Return "sha256:..." of a file's bytes; of a folder, of the names and digests of its files. Raises: OSError."""
    found = hashlib.sha256()
    if path.is_dir():
        for one in sorted(path.iterdir()):
            found.update(f"{one.name}\0{file_digest(one)}\0".encode())
        return f"sha256:{found.hexdigest()}"
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return f"sha256:{found.hexdigest()}"


def _replaced(name: str, value: Any, digests: Mapping[str, str]) -> Any:
    if name in _TEXTS:
        return value
    if isinstance(value, str):
        if value in digests or name == "model":
            return digests.get(value, value)
        for path in sorted(set(_candidates(value)) & set(digests), key=len, reverse=True):
            value = value.replace(path, digests[path])
        return value
    if isinstance(value, Mapping):
        return {key: _replaced("", one, digests) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced("", one, digests) for one in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)


def _candidates(text: str) -> Iterator[str]:
    """Yield the parts of a text that may name a file: all of it, and those of `name=file:strength, region=file`."""
    if len(text) > 4096 or "\0" in text:
        return
    yield text
    for part in text.split(",") if "," in text else [text]:
        value = part.partition("=")[2] or part
        for one in (value, value.rpartition(":")[0], value.partition(" [")[0]):
            if one.strip() and one.strip() != text:
                yield one.strip()


def _path_digest(text: str) -> str | None:
    """Return the digest of a file, from memory where size, time and inode are those of the last look."""
    try:
        path = Path(text).expanduser()
        if not path.is_file():
            return None
        state = path.stat()
        mark = (str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino)
        with _guard:
            if mark in _known:
                return _known[mark]
        digest = file_digest(path)
    except (OSError, ValueError, RuntimeError):
        return None
    with _guard:
        _known[mark] = digest
    return digest


def _model_digest(model: str) -> str:
    """Return the digest of a model's weights and settings; of one that is not on this computer, its name."""
    from pipelines import catalog

    try:
        folder = catalog.find(model).folder
        if folder is None:
            return f"hub:{model}"
        files = sorted(folder.glob("**/*.safetensors")) + sorted(folder.glob("**/*.json"))
        states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        with _guard:
            if tuple(states) in _models:
                return _models[tuple(states)]
        digest = catalog.digest_of(folder)
    except (OSError, ValueError, KeyError):
        return ""
    with _guard:
        _models[tuple(states)] = digest
    return digest


@functools.cache
def default_model() -> str:
    """Return the model of a request that names none."""
    from pipelines.request import settings

    return str(next(one.default for one in settings() if one.name == "model"))
