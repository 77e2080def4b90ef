"""The memory ladder: what is done, rung by rung, when a run is out of memory; no rung changes the picture.

Free caches, decode in pieces, text encoder off the device, model offload, group offload; then fail, with numbers. A rung that a
model or a device has no use for is passed over in words. What was climbed stays climbed for as long as the model is loaded.

Differs: diffusers' tiled decode blends tiles that were normalised apart, which changes pixels; here a decoder is cut only where the
result is the same to the last bit, and the others are left whole. Size, steps, dtype and seed are never touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from pipelines import machine

if TYPE_CHECKING:
    from pipelines.catalog import Loaded
    from pipelines.result import Picture

STRIP = 16
"""Rows of latents that a decoder makes at once, where it is cut into strips."""

_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
_WORDS = ("out of memory", "can't allocate memory", "alloc_failed")


class OutOfMemory(RuntimeError):
    """No rung was enough: what was tried, and how much memory there is, in words."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rung:
    """One step of the ladder: where memory ran out, what was done about it, or why that was passed over."""

    name: str
    phase: str
    words: str
    taken: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, for a report."""
        return dataclasses.asdict(self)


class Ladder:
    """The ladder of one loaded pipeline; `rungs` tells what was done so far."""

    def __init__(self, pipeline: Any, device: str) -> None:
        self.pipeline, self.device = pipeline, device
        self.rungs: list[Rung] = []
        self._left = iter(_RUNGS)

    def climb(self, phase: str) -> Iterator[Rung]:
        """Yield the rungs that are passed over and then the one that was taken; the last is not taken where none is left."""
        for name, take in self._left:
            taken, words = take(self.pipeline, self.device)
            rung = Rung(name, phase, words, taken)
            self.rungs.append(rung)
            yield rung
            if taken:
                return


_ladders: WeakKeyDictionary[Any, Ladder] = WeakKeyDictionary()


def climbing(
    loaded: Loaded, phase: Callable[[], str], tell: Callable[[Rung], object], attempt: Callable[[], Picture]
) -> Picture:
    """Make a picture, and climb the ladder of its model as often as memory runs out.

    Args:
        phase: tells where the run stands; tell: hears of every rung; attempt: makes the picture, from what was kept where it can.

    Raises:
        OutOfMemory: it ran out on the last rung too.
    """
    ladder = _ladders.setdefault(loaded.pipeline, Ladder(loaded.pipeline, loaded.device))
    before, climbed = list(ladder.rungs), []
    while True:
        try:
            picture = attempt()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).split("\n")[0][:200]
        else:
            break
        # only here, after the error and its frames have let go of their tensors
        _frees(loaded.device)
        where, taken = phase(), False
        for rung in ladder.climb(where):
            climbed.append(rung)
            tell(rung)
            taken = taken or rung.taken
        if not taken:
            raise OutOfMemory(_numbers(loaded, where, said, ladder.rungs))
    if before or climbed:
        picture.report["ladder"] = {
            "before": [one.to_dict() for one in before],
            "now": [one.to_dict() for one in climbed],
        }
    if climbed:
        did = ", ".join(one.name for one in climbed if one.taken)
        picture.report["warnings"].append(
            f"memory ran out in the phase {climbed[0].phase}: {did}; the picture is the same"
        )
    return picture


def place(pipeline: Any, device: str) -> None:
    """Move a pipeline to its device; where it does not fit there whole, part by part as it is needed.

    Raises:
        RuntimeError: it does not fit in any way.
    """
    try:
        pipeline.to(device)
        return
    except Exception as error:
        if not is_out_of_memory(error) or device == "cpu":
            raise
    pipeline.to("cpu")
    _frees(device)
    ladder = _ladders.setdefault(pipeline, Ladder(pipeline, device))
    for name, take in _RUNGS:
        if name == "model offload":
            ladder.rungs.append(Rung(name, "load", take(pipeline, device)[1], True))
    names = [name for name, _ in _RUNGS]
    ladder._left = iter(_RUNGS[names.index("model offload") + 1 :])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or on the computer."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)


def _frees(device: str) -> None:
    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    elif device.startswith("mps"):
        torch.mps.empty_cache()


def _free_caches(pipeline: Any, device: str) -> tuple[bool, str]:
    from pipelines import catalog

    others = catalog.forget_others(pipeline)
    _frees(device)
    return True, f"caches were emptied and {others} other models let go"


def _cut_decode(pipeline: Any, device: str) -> tuple[bool, str]:
    """Decode a piece at a time, where the pieces are the same to the last bit."""
    from dit.codec import ResampleCodec

    codec, vae = getattr(pipeline, "codec", None), getattr(pipeline, "vae", None)
    if isinstance(codec, ResampleCodec):
        inner, reach = codec.decode, reach_of(codec)
        codec.__dict__["decode"] = lambda latents: in_strips(inner, latents, reach, codec.scale_factor)
        return True, f"the decoder works on {STRIP} rows at a time"
    if vae is not None and hasattr(vae, "enable_slicing"):
        vae.enable_slicing()
        return True, "the decoder works on one picture at a time; tiles would change the picture"
    return False, "there is no decoder that can be cut without changing the picture"


def reach_of(codec: Any) -> int:
    """Return how many rows of latents away a decoded row still hears of: one for each convolution, and one to enlarge."""
    return 2 * len(codec.blocks) + 3


def in_strips(decode: Callable[[Any], Any], latents: Any, reach: int, scale: int) -> Any:
    """Decode [B, C, H, W] in strips of rows that overlap by all that a row hears of: the same as in one piece, exactly."""
    import torch

    rows = latents.shape[-2]
    made = []
    for start in range(0, rows, STRIP):
        end = min(rows, start + STRIP)
        low, high = max(0, start - reach), min(rows, end + reach)
        piece = decode(latents[..., low:high, :])
        made.append(piece[..., (start - low) * scale : (end - low) * scale, :].clone())
    return torch.cat(made, dim=-2)


def _encoders_off(pipeline: Any, device: str) -> tuple[bool, str]:
    """Let text encoders lie in the computer's memory, and visit the device only while they read: what they say is the same."""
    found = [one for name in _ENCODERS if (one := getattr(pipeline, name, None)) is not None]
    if device == "cpu":
        return False, "the text encoder is in the computer's own memory already"
    if not found:
        return False, "there is no text encoder"
    network = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    if network is None:
        return False, "there is no network after which a text encoder is not needed"

    def arrive(module: Any, _inputs: Any) -> None:
        module.to(device)

    def leave(*_: Any) -> None:
        for one in found:
            if next(one.parameters()).device.type != "cpu":
                one.to("cpu")
                _frees(device)

    for one in found:
        one.to("cpu")
        one.register_forward_pre_hook(arrive)
    network.register_forward_pre_hook(leave)
    _fix_device(pipeline, device)
    return True, "text encoders are on the device only while they read"


def _fix_device(pipeline: Any, device: str) -> None:
    """Let a pipeline go on saying that it works on `device`, which it else reads from whichever part comes first."""
    import torch

    kind = type(pipeline)
    own = {"_execution_device": property(lambda _: torch.device(device)), "__module__": kind.__module__}
    pipeline.__class__ = type(kind.__name__, (kind,), own)


def _model_offload(pipeline: Any, device: str) -> tuple[bool, str]:
    if device == "cpu":
        return False, "there is no other memory to move parts to"
    _unhooked(pipeline)
    pipeline.enable_model_cpu_offload(device=device)
    return True, "each part is on the device only while it works"


def _group_offload(pipeline: Any, device: str) -> tuple[bool, str]:
    import torch

    if device == "cpu":
        return False, "there is no other memory to move layers to"
    if not hasattr(pipeline, "enable_group_offload"):
        return False, "this diffusers has no group offload"
    _unhooked(pipeline)
    pipeline.enable_group_offload(
        onload_device=torch.device(device), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    return True, "each layer is on the device only while it works"


def _unhooked(pipeline: Any) -> None:
    """Take off what the rungs below have put on."""
    with contextlib.suppress(AttributeError):
        pipeline.remove_all_hooks()
    pipeline.to("cpu")


_RUNGS: tuple[tuple[str, Callable[[Any, str], tuple[bool, str]]], ...] = (
    ("free caches", _free_caches),
    ("decode in pieces", _cut_decode),
    ("text encoder off", _encoders_off),
    ("model offload", _model_offload),
    ("group offload", _group_offload),
)
NAMES = tuple(name for name, _ in _RUNGS)
"""The rungs, in their order."""


def _numbers(loaded: Loaded, phase: str, said: str, rungs: list[Rung]) -> str:
    """Say in words what was not enough."""
    import torch

    parts = [one for one in loaded.pipeline.components.values() if isinstance(one, torch.nn.Module)]
    weights = sum(value.numel() * value.element_size() for one in parts for value in one.parameters()) / 1e9
    if loaded.device.startswith("cuda"):
        free, total = (value / 1e9 for value in torch.cuda.mem_get_info(loaded.device))
        there = f"{free:.1f} of {total:.1f} GB of the device are free"
    else:
        whole = machine.environment()["memory_gb"]
        there = f"the process took up to {machine.peak_memory('cpu').get('process', 0) / 1e3:.1f} of {whole or '?'} GB"
    tried = "; ".join(f"{one.name}: {one.words}" for one in rungs)
    return (
        f"There was not enough memory in the phase {phase}: the weights take {weights:.2f} GB and {there} ({said})."
        f" Tried: {tried}. Choose a smaller size or fewer frames, or close other programs."
    )
