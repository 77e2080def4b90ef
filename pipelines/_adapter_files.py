"""Adapter files: found by a model's own names or by path, told by their headers; nothing of their weights is read here.

A model's own adapters lie in its folder, `adapters/<name>.safetensors`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.request import RequestError, nearest
from pipelines.safe import Header, ModelError, check_weights

FOLDER = "adapters"

MADE_BY = {
    "edges": "canny",
    "masks": "mask:threshold=0.0765,least=0",
    "subject": "subject",
    "depth": "depth",
}
"""What training calls a condition -> how a picture is made into it; other names are those of `control.conditions`."""

_STEERS = re.compile(r"lora|_control\.|^controlnet\.|\.(?:hada|lokr|oft|alpha)_?")
_RANK = re.compile(r"(?:lora_A|\.lora_down|_loras\.\d+\.down|lora\d?\.down)\.weight$|\.down\.weight$")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """What the header of an adapter's file tells.

    `kind` is empty for files of other code bases, which tell nothing of themselves; `base` is the digest of the weights it was
    trained beside, `about` what training wrote into it. `steers` tells whether its keys look like an adapter's at all.
    """

    name: str
    path: Path
    kind: str
    settings: Mapping[str, Any]
    backbone: Mapping[str, Any]
    base: str
    about: Mapping[str, Any]
    ranks: tuple[int, ...]
    tensors: int
    parameters: int
    bytes: int
    steers: bool = True

    @property
    def condition(self) -> str | None:
        """How a picture becomes its condition, in the text form of `control.conditions`; None where it does not tell."""
        found = self.about.get("preprocessor") or self.about.get("condition")
        return MADE_BY.get(found, found) if isinstance(found, str) and found != "none" else None

    @property
    def part(self) -> float:
        """Side of the condition it was trained with, of the picture's side."""
        found = self._told("condition", "size", self.about.get("size"))
        return float(found) if isinstance(found, int | float) and 0 < found <= 1 else 1.0

    @property
    def instruction(self) -> str | None:
        """The instruction it was trained with."""
        found = self._told("condition", "instruction", self.about.get("instruction"))
        return found if isinstance(found, str) and found else None

    @property
    def words(self) -> int | None:
        """How many tokens its instruction is padded to."""
        found = self._told("data", "text_tokens", None)
        return found if isinstance(found, int) and 1 <= found <= 4096 else None

    @property
    def takes_picture(self) -> bool | None:
        """Whether it steers by a picture; None where only the model can tell."""
        return None if not self.kind else self.kind not in ("lora", "td-lora", "diffscaler", "in-context-lora")

    def _told(self, section: str, key: str, first: Any) -> Any:
        if first is not None:
            return first
        recipe = self.about.get("recipe")
        part = recipe.get(section) if isinstance(recipe, Mapping) else None
        return part.get(key) if isinstance(part, Mapping) else None

    def to_dict(self) -> dict[str, Any]:
        """Return what a person wants to know, in JSON."""
        told = {
            "name": self.name, "family": self.kind or "of another code base", "settings": dict(self.settings),
            "made for": dict(self.backbone), "base": self.base, "condition": self.condition, "instruction": self.instruction,
            "rank": self.ranks[0] if len(self.ranks) == 1 else list(self.ranks), "tensors": self.tensors,
            "parameters": self.parameters, "bytes": self.bytes,
        }  # fmt: skip
        return {key: value for key, value in told.items() if value not in (None, "", [], {})}


def adapters_in(folder: Path) -> dict[str, Path]:
    """Return a model's own adapters by name."""
    return {file.stem: file for file in sorted((folder / FOLDER).glob("*.safetensors")) if file.is_file()}


def find_adapter(field: str, name: str, folder: Path | None) -> Path:
    """Find an adapter: one of the model's own, or a file. Raises: RequestError."""
    own = {} if folder is None else adapters_in(folder)
    if name in own:
        return own[name]
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):
        pass
    there = (
        f"the model's own adapters are {', '.join(own)}" if own else "the model has no adapters of its own"
    )
    raise RequestError(
        field, name, f"an adapter that is there: a .safetensors file, or a name ({there}{nearest(name, own)})"
    )


def read_adapter(path: Path, field: str = "file") -> AdapterFile:
    """Read the header of an adapter's file. Raises: RequestError for a pickle (never opened) or a broken file."""
    try:
        header = check_weights(path)
    except ModelError as error:
        raise RequestError(field, path.name, f"a whole safetensors file: it {error.allowed}") from None
    settings = _json(header, "control")
    return AdapterFile(
        name=path.stem, path=path, kind=str(settings.get("name", "")), settings=settings, backbone=_json(header, "backbone"),
        base=header.metadata.get("base", ""), about=_json(header, "about"), ranks=_ranks(header), tensors=len(header.tensors),
        parameters=header.parameters, bytes=header.size,
        steers=bool(settings) or any(_STEERS.search(key) for key in header.tensors),
    )  # fmt: skip


def digest_of_file(path: Path) -> str:
    """Return the sha256 of a file, computed again only after it has changed."""
    found = path.stat()
    return _digest(path.resolve(), found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ranks(header: Header) -> tuple[int, ...]:
    shapes = [shape for key, (_, shape, _, _) in header.tensors.items() if _RANK.search(key)]
    return tuple(sorted({shape[0] for shape in shapes if len(shape) == 2}))


def _json(header: Header, key: str) -> dict[str, Any]:
    try:
        found = json.loads(header.metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
