"""What a request's controls and LoRAs do: their adapters attached beside the transformer, outside of the accelerators.

Everything is beside the transformer and gone when the picture is made: the next request knows nothing of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from control._files import load
from control._memory import Memory
from control.base import ControlAdapter, ControlRun, Refused, Use, controlled
from control.conditions import Array, Condition
from control.lora import LoRAAdapter
from dit.spec import parse
from pipelines._adapter_files import AdapterFile
from pipelines.calls import default_of
from pipelines.controls import ControlChoice, LoRAChoice, Steering
from pipelines.networks import networks_of
from pipelines.request import RequestError

KEPT = 8
"""How many adapters stay in memory beside each transformer."""

_adapters: WeakKeyDictionary[nn.Module, OrderedDict[Any, ControlAdapter]] = WeakKeyDictionary()
_guard = threading.Lock()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One control or LoRA, read: its file's header and digest, its condition [h, w, 3] and region [H, W], and digests of both."""

    choice: Steering
    file: AdapterFile
    sha256: str
    condition: Array | None = None
    made_by: str | None = None
    region: Array | None = None
    pictures: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its text form, for messages."""
        return self.choice.text

    def to_dict(self) -> dict[str, Any]:
        """Return what was asked for, and which files that were."""
        told: dict[str, Any] = {
            "field": self.choice.field, "given": self.choice.bare().text, "adapter": self.file.name, "sha256": self.sha256,
            "base": self.file.base, "made_by": self.made_by, **self.pictures,
        }  # fmt: skip
        if self.condition is not None:
            told["condition_size"] = [self.condition.shape[1], self.condition.shape[0]]
        return {key: value for key, value in told.items() if value not in (None, "")}


class Steered:
    """The controls of one request: `attached` holds them on a pipeline's transformer for the length of a with-block."""

    def __init__(self, parts: list[Part], off: list[Steering]) -> None:
        self.parts, self.off = parts, off
        named = [
            part.choice for part in parts if isinstance(part.choice, ControlChoice)
        ]  # of one storage and place
        self._memory = Memory(storage=named[0].storage, place=named[0].place) if named else Memory()
        self._uses: tuple[int, list[Use]] | None = None
        self.run: ControlRun | None = None

    @contextlib.contextmanager
    def attached(self, pipeline: Any, given: dict[str, Any]) -> Iterator[None]:
        """Steer what a pipeline makes inside. Raises: RequestError for what does not fit, before anything is attached."""
        self.run = None
        if not self.parts:
            yield
            return
        network = _network_of(pipeline, self.parts[0])
        steps = given.get("num_inference_steps", default_of(pipeline, "num_inference_steps"))
        uses = self._made(pipeline, network)
        with contextlib.ExitStack() as stack:
            try:
                self.run = stack.enter_context(controlled(network, *uses, steps=steps, memory=self._memory))
            except Refused as error:
                raise self._refused(error) from error
            try:
                yield
            except RequestError as error:
                if isinstance(error.__cause__, Refused):  # an adapter's own words, in place of the pipeline's
                    raise self._refused(error.__cause__) from error.__cause__
                raise

    def report(self) -> dict[str, Any]:
        """Return what was asked for and what took effect, a row for each control and LoRA; empty where there is none."""
        if not self.parts and not self.off:
            return {}
        found = None if self.run is None else self.run.report()
        rows = [part.to_dict() for part in self.parts]
        if found is not None:
            rows = [one | row for one, row in zip(rows, found.uses, strict=True)]
        rows += [
            {"field": one.field, "given": one.bare().text, "strength": 0.0, "calls": 0} for one in self.off
        ]
        whole = {} if found is None else {"calls": found.calls, "bytes": found.bytes, "notes": found.notes}
        covered = [self._coverage(part) for part in self.parts]
        for row, words in zip(rows, covered, strict=False):
            row["coverage"] = words
        return {"parts": rows, **whole}

    def digests(self) -> dict[str, dict[str, str]]:
        """Return the files that were read, by what they are for: adapters, pictures and regions."""
        found = {}
        for number, part in enumerate(self.parts, start=1):
            found[f"adapter {number}"] = {"name": part.file.path.name, "sha256": part.sha256}
            found |= {f"{name} {number}": told for name, told in part.pictures.items()}
        return found

    def summary(self) -> str:
        """Return one line about all of it, with the keys that found a place."""
        told = [f"{part.file.name} {_shown(part.choice)} ({self._coverage(part)})" for part in self.parts]
        return "; ".join(told)

    def _coverage(self, part: Part) -> str:
        if self._uses is None:
            return ""
        return str(self._uses[1][self.parts.index(part)].adapter.coverage or "")

    def _made(self, pipeline: Any, network: nn.Module) -> list[Use]:
        if self._uses is not None and self._uses[0] == id(network):
            return self._uses[1]
        uses, wide = [], []
        for part in self.parts:
            adapter = _adapter(network, part)
            extra = adapter.extra_channels(network) if isinstance(adapter, LoRAAdapter) else 0
            if extra:
                wide.append(part)
            if extra and part.condition is None:
                raise error_of(part, "a control LoRA, which reads a picture: give it with --control")
            if part.condition is not None and not (adapter.needs_condition or extra):
                raise error_of(part, f"{adapter.control.name}, which takes no picture: give it with --lora")
            if len(wide) > 1:
                raise error_of(
                    part, f"alone: {wide[0].file.name} reads a picture at the same place, the first layer"
                )
            uses.append(_use(pipeline, part, adapter))
        self._uses = (id(network), uses)
        return uses

    def _refused(self, error: Refused) -> RequestError:
        return error_of(
            self.parts[0], f"one that can work here: {error}", whole=[one.label for one in self.parts]
        )


NOTHING = Steered([], [])


def _network_of(pipeline: Any, part: Part) -> nn.Module:
    networks = networks_of(pipeline)
    if len(networks) != 1:
        count = len(networks) or "no"
        raise error_of(
            part, f"left out: {type(pipeline).__name__} has {count} transformers, and control is for one"
        )
    found: nn.Module = next(iter(networks.values()))
    return found


def _adapter(network: nn.Module, part: Part) -> ControlAdapter:
    """Return a file's adapter beside a transformer, loaded when it is first asked for."""
    choice: Any = part.choice
    key = (part.sha256, part.file.path.name, choice.any_base, next(network.parameters()).dtype)
    with _guard:
        kept = _adapters.setdefault(network, OrderedDict())
        if key in kept:
            kept.move_to_end(key)
            return kept[key]
    try:
        adapter = load(part.file.path, network, any_base=choice.any_base).requires_grad_(False)
    except Refused as error:
        words = str(error).replace("any_base=True", "any_base=true behind it")
        raise error_of(part, f"one that fits this model: {words}") from None
    with _guard:
        kept[key] = adapter
        while len(kept) > KEPT:
            kept.popitem(last=False)
    return adapter


def _use(pipeline: Any, part: Part, adapter: ControlAdapter) -> Use:
    choice: Any = part.choice
    region = None if part.region is None else torch.from_numpy(part.region.copy())
    try:
        return Use(
            adapter,
            _condition(pipeline, part, adapter),
            choice.strengths,
            choice.start,
            choice.end,
            region=region,
        )
    except Refused as error:
        raise error_of(part, f"one that can work here: {error}") from None


def _condition(pipeline: Any, part: Part, adapter: ControlAdapter) -> Any:
    choice: Any = part.choice
    if isinstance(choice, LoRAChoice):
        if choice.task is not None and adapter.control.name != "diffscaler":
            raise error_of(
                part, f"given without a task: {part.file.path.name} is {adapter.control.name} and has none"
            )
        tasks = getattr(adapter.control, "tasks", ())
        if choice.task is None and len(tasks) > 1:
            raise error_of(part, f"given with task=.., one of {', '.join(tasks)}")
        return choice.task
    assert part.condition is not None
    latents = encoded(pipeline, part.condition)
    if adapter.control.name != "unic-adapter":
        if choice.instruction is not None:
            raise error_of(part, f"given without an instruction: {adapter.control.name} reads none")
        return latents
    from control.unic_adapter import Instructed

    text = choice.instruction or part.file.instruction
    if text is None and part.made_by is not None:
        text = type(parse(Condition, part.made_by)).instruction  # type: ignore[type-abstract,unused-ignore]
    if not text:
        raise error_of(part, "given with instruction=.., which says what the picture is")
    tokens, pooled = _told(pipeline, part, text)
    return Instructed(latents, tokens, pooled)


@torch.no_grad()
def encoded(pipeline: Any, picture: Array) -> Tensor:
    """Encode a picture [H, W, 3] as the pipeline's transformer sees pictures: [1, C, h, w] in float32."""
    from pipelines import autoencoder

    levels = np.rint(picture * 255).astype(np.float32)
    pixels = torch.from_numpy(levels).permute(2, 0, 1)[None].to(pipeline._execution_device) / 127.5 - 1
    codec, vae = getattr(pipeline, "codec", None), getattr(pipeline, "vae", None)
    if codec is not None:
        latents: Tensor = codec.encode(pixels.to(codec.dtype)).float()
        return latents
    return pixels if vae is None else autoencoder.encode(vae, pixels).float()


@torch.no_grad()
def _told(pipeline: Any, part: Part, text: str) -> tuple[Tensor, Tensor | None]:
    """Encode an instruction: tokens [1, L, J] and pooled [1, P]."""
    name = type(pipeline.transformer).__name__
    if name == "SD3Transformer2DModel":
        tokens, _, pooled, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False)
        return tokens, pooled
    if name == "FluxTransformer2DModel":
        tokens, pooled, _ = pipeline.encode_prompt(text, None)
        return tokens, pooled
    config = getattr(pipeline, "config", {})
    if getattr(pipeline, "text_encoder", None) is None or "text_padding" not in config:
        raise error_of(part, f"left out: {type(pipeline).__name__} cannot encode an instruction")
    from dit.text import encode, encode_padded

    if config["text_padding"] == "heard":
        length = part.file.words or config["text_length"]
        found = encode_padded(pipeline.tokenizer, pipeline.text_encoder, [text], length=length)
    else:  # as it was padded in training: the second stream masks nothing
        found = encode(
            pipeline.tokenizer,
            pipeline.text_encoder,
            [text],
            limit=config["text_length"],
            length=part.file.words,
        )
    device = pipeline._execution_device
    pooled = found.pooled.to(device) if pipeline.transformer.config.get("pooled_dim") else None
    return found.tokens.to(device), pooled


def _shown(choice: Any) -> str:
    found = choice.strengths
    return "/".join(f"{one:g}" for one in found) if isinstance(found, tuple) else f"{found:g}"


def error_of(part: Part, allowed: str, whole: Any = None) -> RequestError:
    """Return the error of a request about one of its controls or LoRAs."""
    return RequestError(part.choice.field, part.label if whole is None else whole, allowed)
