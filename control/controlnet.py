"""ControlNet of a transformer: a trainable copy of its first blocks, whose output is added behind the blocks it was copied from.

The copied branch begins as the picture's tokens with the condition's tokens beside them, mapped by zeros at first; it runs its own
way from copy to copy, and what each copy gives is mapped, by zeros at first, onto the output of the block it is a copy of.

Paper: PixArt-delta: Fast and Controllable Image Generation with Latent Consistency Models; Chen, Wu, Luo, Xie, Paul, Luo,
    Zhao, Li; 2024; arXiv:2401.05252 (ControlNet-Transformer). Adding Conditional Control to Text-to-Image Diffusion Models;
    Zhang, Rao, Agrawala; 2023; arXiv:2302.05543.
Differs: half of the blocks unless told otherwise; transformers with two streams too, where the branch carries a text stream of its
    own and only what it makes of the picture is added; nothing is computed at strength 0 or outside of start and end.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from control._residual import IMAGE, ControlStream, Made, residual_after
from control._trunk import Shape, Trunk, refuses_condition, trunk_of
from control.base import Control, ControlAdapter, ControlRun, Refused, Use
from dit.seams import Tensors, around_calls, blocks_of, match
from dit.spec import knob, spec

_HELD = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook")
"""What others leave in a module's `__dict__` to take hold of its calls; no part of what it computes."""
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_CONTEXT = ("emb", "time", "text")  # tensors of a context in the network's own type


@spec("controlnet", paper="ControlNet, arXiv:2302.05543; PixArt-delta, arXiv:2401.05252")
class ControlNet(Control):
    """Copies of the first blocks, trained beside the frozen ones."""

    about = "A picture of the same size (edges, depth, ...) through trained copies of the first blocks"

    copies: int | None = knob(
        default=None, label="Blocks copied, from the first on (none given: half of them)"
    )

    def check(self) -> None:
        """Raises: ValueError if the count of copies is no such number."""
        count = self.copies
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"{self.name}: copies must be a whole number of at least 1, got {count!r}")

    def refuses(self, transformer: nn.Module) -> str | None:
        trunk = trunk_of(transformer)
        if isinstance(trunk, str):
            return trunk
        blocks = blocks_of(transformer)
        if self.copies is not None and self.copies > len(blocks):
            return f"it has {len(blocks)} blocks, and {self.copies} are to be copied"
        for block in list(blocks)[: self._count(len(blocks))]:
            if getattr(block.module, "router", None) is not None:
                return f"{block.path} decides by a router which parts it computes, and a copy of it would decide otherwise"
        return None

    def resolved(self, shape: Shape) -> ControlNet:
        """Return the settings with the count of copies written out."""
        return self.replace(copies=self._count(shape.depth))

    def build(self, transformer: nn.Module) -> ControlNetAdapter:
        """As `Control.build`: copies of the blocks as they are, and maps of zeros. Raises: Refused."""
        reason, trunk = self.refuses(transformer), trunk_of(transformer)
        if reason is not None or isinstance(trunk, str):
            raise Refused(f"{self.name}: {reason}")
        shape = trunk.shape(transformer)
        settings = self.resolved(shape)
        blocks = [block.module for block in list(blocks_of(transformer))[: settings.copies]]
        adapter = ControlNetAdapter(settings, shape, [copied(block) for block in blocks])
        weight = next(transformer.parameters())
        kind = weight.dtype if weight.dtype.itemsize > 1 else torch.bfloat16  # layers may be kept in fp8
        return adapter.to(weight.device, kind).requires_grad_(True)

    def _count(self, depth: int) -> int:
        return max(1, depth // 2) if self.copies is None else self.copies


def copied(block: nn.Module) -> nn.Module:
    """Return a copy of a block with its weights and nothing that was hung on it.

    Raises: Refused for weights that cannot be trained.
    """
    for name, weight in block.named_parameters():
        if "lora_" in name or ".base_layer." in f".{name}":
            raise Refused(
                "controlnet: peft has put an adapter into the blocks that are to be copied: unload it first"
            )
        if not weight.is_floating_point():
            raise Refused(f"controlnet: {name} is quantised, and a copy of it cannot be trained")
    memo: dict[int, Any] = {}
    for module in block.modules():
        about = vars(module)
        memo |= {id(about[name]): None for name in _HELD if name in about}
        memo |= {id(about[name]): OrderedDict() for name in _HOOKS}
    found = copy.deepcopy(block, memo)
    for module in found.modules():
        for name in _HELD:
            vars(module).pop(name, None)
    return found


class ControlNetAdapter(ControlAdapter):
    """The copies, the map of the condition before the first of them, and a map behind each."""

    control: ControlNet

    def __init__(self, control: ControlNet, shape: Shape, blocks: Sequence[nn.Module]) -> None:
        super().__init__(control)
        self.shape, self.blocks = shape, nn.ModuleList(blocks)
        self.before_proj = nn.Linear(shape.width, shape.width)
        self.after_proj = nn.ModuleList(nn.Linear(shape.width, shape.width) for _ in blocks)
        for linear in (self.before_proj, *self.after_proj):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @property
    def places(self) -> tuple[int, ...]:
        """The blocks behind which it acts: those that it has copies of."""
        return tuple(range(len(self.blocks)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        return self.before_proj.weight.dtype

    def refuses(self, transformer: nn.Module, use: Use) -> str | None:
        """Look at transformer and condition."""
        reason, trunk = self.control.refuses(transformer), trunk_of(transformer)
        if reason is not None or isinstance(trunk, str):
            return reason
        shape = trunk.shape(transformer)
        if shape != self.shape:
            return f"these weights are for another transformer: made for {self.shape}, this is {shape}"
        for block, own in zip(blocks_of(transformer), self.blocks, strict=False):
            if type(block.module) is not type(own):
                return (
                    f"these weights are for another transformer: {block.path} is a {type(block.module).__name__}, "
                    f"and its copy a {type(own).__name__}"
                )
        return refuses_condition(trunk, transformer, use.condition)

    @classmethod
    @contextmanager
    def attached_together(
        cls, transformer: nn.Module, uses: Sequence[Use], run: ControlRun
    ) -> Iterator[None]:
        """Add what all uses make of one and the same inputs of a block, so that their order does not matter."""
        trunk = trunk_of(transformer)
        assert isinstance(trunk, Trunk)
        acting = [CopiedStream(use, trunk, run) for use in uses]

        def enter(given: dict[str, Any]) -> None:
            if torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False):
                raise Refused(
                    "controlnet: blocks that are computed again in the backward pass do not see the residual: "
                    "disable_gradient_checkpointing()"
                )
            for one in acting:
                one.enter(given)

        def leave(failed: bool) -> None:
            for one in acting:
                one.leave(failed)

        def residual(place: int, inputs: dict[str, Any], image: Tensor) -> Tensor | None:
            found = [one.residual(place, inputs, image) for one in acting if place in one.adapter.places]
            given = [part for part in found if part is not None]
            return sum(given[1:], given[0]) if given else None

        most = max(len(one.adapter.places) for one in acting)
        with (
            around_calls(transformer, enter, leave),
            residual_after(transformer, dict.fromkeys(range(most)), residual),
        ):
            yield


@dataclass(slots=True)
class MadeByCopy(Made):
    """What one copy gave: its picture stream, what is added, and its other streams (a text's)."""

    others: Tensors = field(default_factory=dict)


class CopiedStream(ControlStream):
    """The copied branch of one use; what a copy gave last serves where the block it belongs to is not computed."""

    __slots__ = ()

    def places(self, depth: int) -> Sequence[int]:
        """Return the blocks behind which something is added."""
        found: tuple[int, ...] = self.adapter.places
        return found

    def leave(self, failed: bool) -> None:
        """As `ControlStream.leave`; the other streams are kept too, and counted."""
        ControlStream.leave(self, failed)
        if self.before:
            kept = [
                tensor
                for made in self.before.values()
                for one in made.values()
                for tensor in (one.stream, one.residual, *getattr(one, "others", {}).values())
            ]
            self.run.account(self.use).told["kept_bytes"] = sum(x.numel() * x.element_size() for x in kept)

    def _computed(self, number: int, inputs: dict[str, Any], image: Tensor) -> Tensor:
        adapter = self.adapter
        block: Any = adapter.blocks[number]
        name = next(one for one in IMAGE if one in inputs)
        given = _in_dtype(inputs, image.dtype, adapter.dtype)
        earlier = self._latest(number, image)
        if isinstance(earlier, MadeByCopy) and all(
            x.shape == inputs[one].shape for one, x in earlier.others.items()
        ):
            given |= {name: earlier.stream, **earlier.others}
        else:  # the first copy; or a later one before which nothing has run in this run, since an accelerator left it out
            given[name] = given[name] + adapter.before_proj(self._tokens(image))
        # A copy is no part of the transformer: whoever listens to the transformer's attention is not asked about it.
        with torch._C.DisableTorchFunction():
            output = block(**given)
        form = match(block, {key: x for key, x in given.items() if isinstance(x, Tensor)}, output)
        if isinstance(form, str):
            raise Refused(f"{self.use.name}: {form}")
        streams = form.split(output)
        stream = streams.pop(name)
        added: Tensor = adapter.after_proj[number](stream)
        self.now[number] = MadeByCopy(stream, added, streams)
        return added


def _in_dtype(inputs: dict[str, Any], own: torch.dtype, wanted: torch.dtype) -> dict[str, Any]:
    """Return the arguments of a block with those of the network's type in the adapter's; positions stay as exact as they are."""
    if own == wanted:
        return dict(inputs)

    def cast(value: Any) -> Any:
        return value.to(wanted) if isinstance(value, Tensor) and value.dtype == own else value

    found = {name: cast(value) for name, value in inputs.items()}
    for name, value in inputs.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = {one: cast(getattr(value, one)) for one in _CONTEXT if hasattr(value, one)}
            found[name] = dataclasses.replace(value, **parts)
    return found
