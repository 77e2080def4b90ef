"""Latents kept until their decode is safe: what goes into a decoder is set aside, and decoded again without denoising.

A pipeline is taken hold of where it decodes, so every one that decodes its latents in one call is served: ours by `_decoded` or
`decode_latents`, diffusers' by their autoencoder. To decode what was kept, the same pipeline runs once more with a scheduler that
has no steps, and the kept latents take the place of its noise: sizes, cropping and all behind the decoder stay its own.

Differs: a pipeline that decodes in several calls is left alone, and then a failed decode costs its denoising.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.request import Request

if TYPE_CHECKING:
    from pipelines.catalog import Loaded

_METHODS = ("decode_latents", "_decoded")
_DECODERS = ("codec", "vae", "vqvae")


class _Unfit(Exception):
    """What was kept does not fit what the pipeline decodes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """What went into a decoder, with its strides and what was known of its run."""

    latents: Any
    strides: tuple[int, ...]
    noted: dict[str, Any]


class Latents:
    """Latents of the pictures that are not safe yet: in memory, and in a folder where one is given.

    Args:
        folder: where they outlive the process; made when first needed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._held: dict[str, Kept] = {}

    def forget(self) -> None:
        """Delete them all: the pictures are safe."""
        self._held.clear()
        if self.folder is not None and self.folder.is_dir():
            import shutil

            shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def keeping(self, pipeline: Any, slot: str, note: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """Set aside what the pipeline decodes, before it is decoded; `note` tells what is known of the run by then."""
        calls = 0

        def see(latents: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                copy = latents.detach().clone()
                self._put(slot, Kept(copy, tuple(copy.stride()), note()))
            else:  # decoded piece by piece: one piece alone is of no use
                self._drop(slot)
            return latents

        with _decoding(pipeline, see):
            yield
        self._held.pop(
            slot, None
        )  # decoded: memory is not needed any more, the file stays until the picture is saved

    def decoded(self, pipeline: Any, slot: str, run: Callable[[], Any]) -> tuple[Any, dict[str, Any]] | None:
        """Decode what was kept of a picture; None if nothing was, or if it does not fit.

        Args:
            run: runs the pipeline, for the first time and once; it is given a scheduler without steps.
        """
        kept = self._get(slot)
        if kept is None:
            return None
        calls = 0

        def put(latents: Any) -> Any:
            nonlocal calls
            calls += 1
            fits = (latents.shape, latents.dtype) == (kept.latents.shape, kept.latents.dtype)
            if calls > 1 or not fits:
                raise _Unfit
            return _like(kept, latents)

        try:
            with _without_steps(pipeline.scheduler), _decoding(pipeline, put):
                output = run()
        except (_Unfit, ValueError, TypeError, IndexError, AttributeError, ZeroDivisionError):
            self._drop(slot)
            return None
        if not calls:
            self._drop(slot)
            return None
        return output, kept.noted

    def _get(self, slot: str) -> Kept | None:
        if slot in self._held or self.folder is None:
            return self._held.get(slot)
        file = self.folder / f"{slot}.safetensors"
        if not file.is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                about = json.loads((opened.metadata() or {})["about"])
                return Kept(opened.get_tensor("latents"), tuple(about["strides"]), about["noted"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None  # damaged: the picture is made from the start

    def _put(self, slot: str, kept: Kept) -> None:
        self._held[slot] = kept
        if self.folder is None:
            return
        from safetensors.torch import save

        from pipelines.result import write_file

        about = json.dumps({"strides": kept.strides, "noted": kept.noted}, default=str)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        data = save({"latents": kept.latents.contiguous().cpu()}, {"about": about})
        # a name that a loss of power undoes costs one denoising, and no more
        write_file(self.folder / f"{slot}.safetensors", data, overwrite=True, draft=True)

    def _drop(self, slot: str) -> None:
        self._held.pop(slot, None)
        if self.folder is not None:
            with contextlib.suppress(OSError):
                (self.folder / f"{slot}.safetensors").unlink(missing_ok=True)


def slot_of(request: Request, loaded: Loaded, inputs: dict[str, Any] | None = None) -> str:
    """Return under which name the latents of one picture are kept: of its request and all that decides its latents beside."""
    from pipelines import machine

    about = [request.to_dict(), loaded.digest, loaded.dtype, loaded.device, inputs, machine.versions()]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _decoding(pipeline: Any, see: Callable[[Any], Any]) -> Iterator[None]:
    """Pass what goes into the outermost decode of a pipeline through `see`."""
    from dit.seams import patched

    owners = [(pipeline, name) for name in _METHODS if callable(getattr(pipeline, name, None))]
    parts = [getattr(pipeline, name, None) for name in _DECODERS]
    owners += [(part, "decode") for part in parts if part is not None and hasattr(part, "decode")]
    inside = False

    def around(inner: Any) -> Any:
        @functools.wraps(inner)
        def decode(latents: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside or not hasattr(latents, "stride"):
                return inner(latents, *args, **kwargs)
            inside = True
            try:
                return inner(see(latents), *args, **kwargs)
            finally:
                inside = False

        return decode

    with contextlib.ExitStack() as stack:
        for owner, name in owners:
            stack.enter_context(patched(owner, name, around(getattr(owner, name))))
        yield


@contextlib.contextmanager
def _without_steps(scheduler: Any) -> Iterator[None]:
    from dit.seams import patched

    inner = scheduler.set_timesteps

    @functools.wraps(inner)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        scheduler.timesteps = scheduler.timesteps[:0]

    with patched(scheduler, "set_timesteps", set_timesteps):
        yield


def _like(kept: Kept, latents: Any) -> Any:
    """Return the kept latents where and as the pipeline's own lie in memory: another layout may round otherwise."""
    import torch

    found = torch.empty_strided(
        tuple(latents.shape), kept.strides, dtype=latents.dtype, device=latents.device
    )
    found.copy_(kept.latents)
    return found
