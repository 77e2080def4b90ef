"""Model names, folders and hub ids -> loaded pipelines: checked before anything is opened, loaded once, one lock each.

A shipped model is a folder `pipelines/checkpoints/<name>` in diffusers' layout with a `card.json`; `Card` lists its fields.
Differs: diffusers takes pickles where there are no safetensors, and code from a hub when told to; here neither is possible.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.request import nearest
from pipelines.safe import ModelError, check_folder, check_weights, components, read_index, weight_files

CHECKPOINTS = Path(__file__).parent / "checkpoints"
KEPT = 2
"""How many loaded models stay in memory; the one unused longest goes first."""

OWN = {
    "TextToImagePipeline": "pipelines.text_to_image",
    "ClassToImagePipeline": "pipelines.class_to_image",
    "StoryToVideoPipeline": "pipelines.story_to_video",
    "TextToVideoPipeline": "pipelines.text_to_video",
    "MMDiT": "dit.backbones.mmdit",
    "EMMDiT": "dit.backbones.emmdit",
    "DiT": "dit.backbones.dit",
    "PTDiT": "dit.backbones.ptdit",
    "Mask2DiT": "dit.backbones.mask2dit",
    "VDT": "dit.backbones.vdt",
    "ResampleCodec": "dit.codec",
}
"""Our classes and the modules they live in: the only names outside diffusers and transformers that a model may use."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}\Z")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_FULL_DIGEST = 1 << 30


class Unavailable(RuntimeError):
    """Something outside the request is missing: the hub, a device, a library."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is known of a model before its weights load. A card.json may set every field, and more that only people read."""

    name: str
    title: str = ""
    summary: str = ""
    license: str = ""
    task: str = "text-to-image"
    pipeline: str = ""
    dtype: str = "float32"
    width: int | None = None
    height: int | None = None
    multiple: int = 1
    low: int = 16
    high: int = 4096
    steps: int | None = None
    guidance: float | None = None
    classes: int | None = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def sides(self) -> str:
        """The widths and heights that it makes, in words."""
        if self.low == self.high:
            return f"{self.low} px, the only size"
        return f"a multiple of {self.multiple} from {self.low} to {self.high} px"

    @property
    def takes_class(self) -> bool:
        """Whether a class number is asked for, not a prompt."""
        return self.task.startswith("class-")


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where a model is: shipped, in a folder, or on a hub (then the folder is not known yet)."""

    model: str
    kind: str
    folder: Path | None


@dataclasses.dataclass(eq=False, slots=True)
class Loaded:
    """A pipeline in memory; hold its lock while it runs."""

    pipeline: Any
    card: Card
    digest: str
    dtype: str
    device: str
    seconds: float
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)


_loaded: OrderedDict[tuple[str, str, str], Loaded] = OrderedDict()
_loading: dict[tuple[str, str, str], threading.Lock] = {}
_guard = threading.Lock()


def shipped() -> dict[str, Card]:
    """Return the cards of the shipped models by name."""
    return {
        file.parent.name: card_of(file.parent, file.parent.name)
        for file in sorted(CHECKPOINTS.glob("*/card.json"))
    }


def find(model: str) -> Source:
    """Find a model without loading it or asking a network. Raises: ModelError."""
    names = [file.parent.name for file in sorted(CHECKPOINTS.glob("*/card.json"))]
    if model in names:
        return Source(model, "shipped", CHECKPOINTS / model)
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return Source(model, "folder", path.resolve())
        if path.is_file():
            header = check_weights(path)
            words = f"holds {len(header.tensors)} tensors and no pipeline; give the folder of the whole model"
            raise ModelError(model, words)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, ModelError) else ModelError(model, "is no usable path") from None
    if _HUB_ID.match(model) and ".." not in model:
        return Source(model, "hub", None)
    shown = ", ".join(names) or "none"
    raise ModelError(
        model, f"is no shipped model (there are: {shown}), no folder and no hub id{nearest(model, names)}"
    )


def prepare(source: Source) -> tuple[Path, Card]:
    """Fetch what is on a hub, check every file that will be opened, and return the folder and the card.

    Raises:
        ModelError: refused or incomplete. Unavailable: the hub cannot be reached.
    """
    folder = source.folder or fetch(source.model)
    check_folder(folder, OWN)
    return folder, card_of(folder, source.model)


def load(model: str, dtype: str = "auto", device: str = "auto") -> Loaded:
    """Return the pipeline of a model; the second call with the same model, dtype and device returns the same object.

    Raises:
        ModelError: unknown, refused or broken. Unavailable: no hub or no such device.
    """
    return load_folder(*prepare(find(model)), dtype, device)


def load_folder(folder: Path, card: Card, dtype: str = "auto", device: str = "auto") -> Loaded:
    """Load what `prepare` returned. Raises: see `load`."""
    device = device_for(device)
    dtype = dtype_for(dtype, card, device)
    key = (str(folder), dtype, device)
    with _guard:
        waiting = _loading.setdefault(key, threading.Lock())
    with waiting:
        with _guard:
            if key in _loaded:
                _loaded.move_to_end(key)
                return _loaded[key]
        loaded = _load(folder, card, dtype, device)
        with _guard:
            _loaded[key] = loaded
            while len(_loaded) > KEPT:
                _loaded.popitem(last=False)
    return loaded


def unload() -> None:
    """Forget every loaded model."""
    with _guard:
        _loaded.clear()


def forget_others(pipeline: Any) -> int:
    """Forget every loaded model but one; return how many."""
    with _guard:
        others = [key for key, loaded in _loaded.items() if loaded.pipeline is not pipeline]
        for key in others:
            del _loaded[key]
    return len(others)


def device_for(device: str) -> str:
    """Return the device that a request's `device` stands for on this machine. Raises: Unavailable."""
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "auto":
        return best
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise Unavailable(
            f"the device {device} is not available on this machine; use --device auto ({best})"
        ) from None
    return device


def dtype_for(dtype: str, card: Card, device: str) -> str:
    """Return the dtype that "auto" stands for: the card's for shipped models, bfloat16 for others on an accelerator."""
    if dtype != "auto":
        return dtype
    by_device = card.more.get("dtypes")
    if isinstance(by_device, dict) and device.partition(":")[0] in by_device:
        return str(by_device[device.partition(":")[0]])
    return card.dtype


def fetch(model: str) -> Path:
    """Download a pipeline's folders from the hub, settings and safetensors only, or return the copy in the cache.

    Raises:
        ModelError: no such model, or one that is refused. Unavailable: no network and nothing in the cache.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        index = read_index(Path(hub.hf_hub_download(model, "model_index.json")).parent)
        parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
        allowed = ["model_index.json", *(f"{part}/{pattern}" for part in parts for pattern in _HUB_FILES)]
        ignored = ["*.fp16.*", "*.bf16.*", "*.non_ema.*", "*.py", "*.bin", "*.msgpack"]
        return Path(hub.snapshot_download(model, allow_patterns=allowed, ignore_patterns=ignored))
    except RepositoryNotFoundError:
        raise ModelError(
            model, "is not on the hub, or asks for a login; check the name, or run hf auth login"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _offline(model) from error
    except EntryNotFoundError:
        raise ModelError(
            model, "is no diffusers pipeline (no model_index.json on the hub); choose one that is"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise _offline(model) from error


def _offline(model: str) -> Unavailable:
    return Unavailable(
        f"{model} is not on this computer and the hub cannot be reached; connect, or give a folder with --model"
    )


def card_of(folder: Path, name: str) -> Card:
    """Return the card of a model folder; what no card.json says is read from the configs of its parts."""
    index = read_index(folder)
    known = _derived(folder, index)
    known |= read_config(folder / "card.json")
    fields = {one.name: one for one in dataclasses.fields(Card) if one.name not in ("more", "name")}
    values = {key: value for key, value in known.items() if key in fields and value is not None}
    return Card(name=name, more={k: v for k, v in known.items() if k not in fields}, **values)


def digest_of(folder: Path) -> str:
    """Return a digest of the weights and configs of a folder; beyond 1 GB each file is sampled, and the name says so."""
    own = [file for file in weight_files(folder) if file.parent.name != "adapters"]  # which come and go beside a model
    files = [*own, folder / "model_index.json", *sorted(folder.glob("*/*config.json"))]
    full = sum(file.stat().st_size for file in files) <= _FULL_DIGEST
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        total.update(_file_digest(file, full))
    return f"{'sha256' if full else 'sampled'}:{total.hexdigest()}"


def _file_digest(file: Path, full: bool) -> bytes:
    found = hashlib.sha256()
    size, piece = file.stat().st_size, 1 << 20
    with file.open("rb") as opened:
        for start in range(0, size, piece if full else max(piece, size // 64)):
            opened.seek(start)
            found.update(opened.read(piece))
    return found.digest()


def _load(folder: Path, card: Card, dtype: str, device: str) -> Loaded:
    import torch
    from diffusers import DiffusionPipeline

    from pipelines.ladder import place

    start = time.perf_counter()
    index = read_index(folder)
    name = index["_class_name"]
    kind = DiffusionPipeline
    if name in OWN:
        from pipelines.denoising import make_loadable

        kind = getattr(importlib.import_module(OWN[name]), name)
        make_loadable(
            *{library for library, _ in components(index).values() if library and library in OWN.values()}
        )
    try:
        with _without_bars():
            pipeline = kind.from_pretrained(
                str(folder), dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
            )
        place(pipeline, device)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(
            card.name, f"could not be loaded ({reason}); get the model again, or update diffusers"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return Loaded(pipeline, card, digest_of(folder), dtype, device, time.perf_counter() - start)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Leave out the libraries' own progress bars: progress goes out by `on_step` alone."""
    from diffusers.utils import logging as first
    from transformers.utils import logging as second

    shown = [(one, one.is_progress_bar_enabled()) for one in (first, second)]
    first.disable_progress_bar()
    second.disable_progress_bar()
    try:
        yield
    finally:
        for one, on in shown:
            if on:
                one.enable_progress_bar()


def _derived(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    name = index["_class_name"]
    transformer = read_config(folder / "transformer" / "config.json") or read_config(folder / "unet" / "config.json")
    factor = codec_factor(folder)
    patch = transformer.get("patch_size") or 1
    multiple = factor * int(patch[-1] if isinstance(patch, list) else patch)
    if name.startswith(("Flux", "QwenImage", "Chroma", "Kontext")):
        multiple = factor * 2
    found: dict[str, Any] = {"pipeline": name, "multiple": multiple, "dtype": _stored_dtype(folder)}
    if name in ("DiTPipeline", "ClassToImagePipeline"):
        found |= {
            "task": "class-to-image",
            "classes": transformer.get("num_embeds_ada_norm") or transformer.get("num_classes"),
        }
    elif any(part in name for part in ("Video", "Wan", "Mochi", "LTX", "CogVideo", "Latte", "Allegro")):
        found["task"] = "text-to-video"
    if isinstance(transformer.get("frames"), int) and name in OWN:
        found["frames"] = transformer["frames"] * transformer.get("scenes", 1)
    if name == "TextToVideoPipeline":  # as the pipeline's own property says
        hears = transformer.get("context_dim") and not transformer.get("pooled_dim")
        found["tells_scenes"] = bool(hears) and transformer.get("conditioning", "replace") == "replace"
    if name == "StoryToVideoPipeline" and "frames" in found:  # as the pipeline counts them
        ratio = read_config(folder / "vae" / "config.json").get("temporal_compression_ratio") or 1
        found["scenes"] = transformer.get("scenes", 1)
        found["scene_frames"] = (transformer["frames"] - 1) * ratio + 1
    for field in ("width", "height") if name in OWN else ():
        side = transformer.get(f"sample_{field}", transformer.get("sample_size"))
        if isinstance(side, int):
            found[field] = side * factor
    return found


def codec_factor(folder: Path) -> int:
    """Return how many pixels a side of a latent pixel stands for."""
    for part in ("vae", "codec", "vqvae"):
        config = read_config(folder / part / "config.json")
        for key in ("scale_factor_spatial", "spatial_compression_ratio", "scale_factor"):
            if isinstance(config.get(key), int):
                return int(config[key])
        if isinstance(config.get("spatio_temporal_scaling"), list):  # LTX-Video
            return int(config.get("patch_size") or 1) * 2 ** sum(map(bool, config["spatio_temporal_scaling"]))
        for key in ("encoder_block_out_channels", "block_out_channels", "dim_mult"):
            if isinstance(config.get(key), list):
                return 2 ** (len(config[key]) - 1)
    return 1


def _stored_dtype(folder: Path) -> str:
    """Return float32 on a processor; the exact path for a model of unknown habits."""
    import sys

    torch = sys.modules.get("torch")
    return "bfloat16" if torch is not None and torch.cuda.is_available() else "float32"


def read_config(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing where there is none, or no object in it."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
