"""What may be loaded: weights are safetensors, decided by content and never by name; no pickles, no code from a model folder.

Differs: the safetensors library checks a header when it opens a file; here the whole folder is checked before any library
touches it, with our own limits on the header, so that a lying file costs neither memory nor time.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.request import RequestError

HEADER_LIMIT = 25_000_000
TENSOR_LIMIT = 100_000
CONFIG_LIMIT = 10_000_000

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5", ".npy", ".npz")
_ADVICE = "convert it to safetensors where you trust its source, or get the safetensors version"


class ModelError(RequestError):
    """A model that is refused or cannot be found; the message says in one sentence what to do instead."""

    def __init__(self, given: object, sentence: str) -> None:
        super().__init__("model", given, sentence)

    def __str__(self) -> str:
        return f"{self.given}: {self.allowed}"

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelError, (self.given, self.allowed)


@dataclass(frozen=True, slots=True)
class Header:
    """What the front of a safetensors file says: tensors as (dtype, shape, begin, end), free text, bytes of header and file."""

    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]
    metadata: Mapping[str, str]
    length: int
    size: int

    @property
    def parameters(self) -> int:
        """Count of numbers in the file."""
        return sum(_count(shape) for _, shape, _, _ in self.tensors.values())


def check_weights(path: Path) -> Header:
    """Check one weight file by its content alone.

    Raises:
        ModelError: a pickle, an archive, or a safetensors file whose header is cut off, too long, or does not describe its bytes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            _refuse_others(path, start, file.read(56))
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if length < 2 or length > HEADER_LIMIT or length > size - 8:
                raise _broken(
                    path,
                    f"its header claims {length} bytes, allowed are 2 to {min(HEADER_LIMIT, max(size - 8, 2))}",
                )
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise ModelError(
            path, f"this weight file cannot be read ({error.strerror}); check its permissions"
        ) from None
    return _parsed(path, raw, size)


def check_folder(folder: Path, own: Mapping[str, str]) -> dict[str, Any]:
    """Check a diffusers folder before anything in it is loaded and return its model_index.json.

    Args:
        own: our classes by name -> the module they live in.

    Raises:
        ModelError: no diffusers folder, custom code, pickled weights, or weight files that are not what they say.
    """
    index = read_index(folder)
    for name, (library, class_name) in components(index).items():
        if library is not None:
            _check_component(folder, name, library, class_name, own)
            _check_component_files(folder / name)
    for file in sorted(folder.rglob("*.json")):
        if not file.name.startswith(("tokenizer", "vocab", "added_tokens")):
            _check_config(file)
    return index


def read_index(folder: Path) -> dict[str, Any]:
    """Return the model_index.json of a diffusers folder. Raises: ModelError."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise ModelError(folder, _not_a_pipeline(folder))
    index = _json(file)
    name = index.get("_class_name")
    if isinstance(name, list):
        raise ModelError(
            folder,
            f"needs custom pipeline code ({name[0]}.py), which is never run; use a model of a diffusers class",
        )
    if not isinstance(name, str) or not name.isidentifier():
        raise ModelError(
            folder, "its model_index.json names no pipeline class; save it again with save_pretrained"
        )
    return index


def components(index: Mapping[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """Return the parts that a model_index.json names: name -> (library, class)."""
    parts = {}
    for name, value in index.items():
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and _texts(value):
            parts[name] = (value[0], value[1])
    return parts


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files below a folder, sorted, those at its root included."""
    return sorted(file for file in folder.rglob("*.safetensors") if file.is_file())


def _texts(values: list[Any]) -> bool:
    return all(value is None or isinstance(value, str) for value in values)


def _check_component(
    folder: Path, name: str, library: str, class_name: str | None, own: Mapping[str, str]
) -> None:
    if not re.fullmatch(r"[A-Za-z_]\w{0,63}", name):
        raise ModelError(
            folder, f"its model_index.json has a part called {name!r}; part names are plain words"
        )
    known = (
        own.get(str(class_name)) == library
        or library in ("diffusers", "transformers")
        or _is_diffusers_family(library)
    )
    if not known or (folder / name / f"{library}.py").exists():
        sentence = f"its part {name} needs the code {library}.{class_name}, which is never run; use a model of diffusers classes"
        raise ModelError(folder, sentence)
    if not (folder / name).is_dir():
        raise ModelError(folder, f"its part {name} is missing; get the complete model folder")


def _is_diffusers_family(library: str) -> bool:
    import importlib.util

    spec = importlib.util.find_spec("diffusers")
    places = list(spec.submodule_search_locations or []) if spec else []
    return library.isidentifier() and any(
        (Path(place) / "pipelines" / library / "__init__.py").is_file() for place in places
    )


def _check_config(file: Path) -> None:
    config = _json(file)
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in json.dumps(config.get(key, "")):
            raise ModelError(file, f"asks for code from a hub ({key}), which is never run; remove that line")
    weights = config.get("weight_map")
    for shard in weights.values() if isinstance(weights, dict) else ():
        if (
            not isinstance(shard, str)
            or Path(shard).name != shard
            or "\\" in shard
            or not shard.endswith(".safetensors")
        ):
            raise ModelError(
                file, f"lists the weight file {shard!r}; only .safetensors files beside the list are read"
            )
        if not (file.parent / shard).is_file():
            raise ModelError(
                file, f"lists the weight file {shard!r}, which is missing; get the complete model folder"
            )


def _check_component_files(folder: Path) -> None:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    weights = [file for file in files if file.suffix.lower() == ".safetensors"]
    for file in weights:
        check_weights(file)
    pickled = [file for file in files if file.suffix.lower() in _PICKLED]
    if pickled and not weights:
        raise ModelError(
            pickled[0], f"holds pickled weights, which can run code and are not opened; {_ADVICE}"
        )


def _json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > CONFIG_LIMIT:
            raise ModelError(
                file, f"is larger than {CONFIG_LIMIT} bytes; this is no settings file of a model"
            )
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise (
            error
            if isinstance(error, ModelError)
            else ModelError(file, "is not readable JSON; get the model again")
        ) from None
    return value if isinstance(value, dict) else {}


def _not_a_pipeline(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return "holds one part of a model only (a config.json, no model_index.json); give the folder of the whole pipeline"
    if any(file.suffix.lower() in _PICKLED for file in folder.iterdir() if file.is_file()):
        return f"holds pickled weights, which can run code and are not opened; {_ADVICE}"
    return "is no model: it has no model_index.json; give a folder saved by a diffusers pipeline"


def _refuse_others(path: Path, start: bytes, more: bytes) -> None:
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        raise ModelError(
            path, f"is a zip archive (a pickle checkpoint), which can run code and is not opened; {_ADVICE}"
        )
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and more[:1] != b"{":
        raise ModelError(path, f"is a pickle checkpoint, which can run code and is not opened; {_ADVICE}")
    if start[:4] == b"GGUF":
        raise ModelError(
            path, "is a GGUF file, which this version does not load; get the safetensors version"
        )


def _parsed(path: Path, raw: bytes, size: int) -> Header:
    if not raw.startswith(b"{"):
        raise _broken(path, "its header is not JSON")
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON ({_first_line(error)})") from None
    metadata = found.pop("__metadata__", {}) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(metadata, dict):
        raise _broken(path, "its header is not a dictionary of tensors")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its metadata holds something that is not text")
    if len(found) > TENSOR_LIMIT:
        raise _broken(path, f"it lists {len(found)} tensors, allowed are {TENSOR_LIMIT}")
    tensors = {name: _tensor(path, name, entry) for name, entry in found.items()}
    end = 0
    for name, (_, _, begin, stop) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise _broken(path, f"the bytes of {name} start at {begin} and those before end at {end}")
        end = stop
    if end != size - 8 - len(raw):
        raise _broken(
            path, f"its tensors need {end} bytes and the file holds {size - 8 - len(raw)}; download it again"
        )
    return Header(tensors=tensors, metadata=metadata, length=len(raw), size=size)


def _tensor(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"the entry of {name} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _broken(path, f"{name} has the unknown type {str(dtype)[:40]!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _broken(path, f"the shape or the byte range of {name} is not made of whole numbers")
    begin, stop = offsets
    bits = _count(tuple(shape)) * _BITS[dtype]
    if bits % 8 or begin > stop or bits // 8 != stop - begin:
        raise _broken(
            path, f"{name} is {dtype} {shape}, {bits / 8:g} bytes, and its range holds {stop - begin}"
        )
    return dtype, tuple(shape), begin, stop


def _counts(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 16
        and all(type(v) is int and 0 <= v < 2**63 for v in values)
    )


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _first_line(error: Exception) -> str:
    """Return the first line of an error, at most 100 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def _broken(path: Path, reason: str) -> ModelError:
    return ModelError(path, f"is no valid safetensors file: {reason}")
