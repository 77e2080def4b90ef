"""RelaCtrl's released layout: eleven control blocks beside a PixArt transformer.

Code: 360CVGroup/RelaCtrl, commit 88b81c2; the repository names no licence, and nothing of it is used here but names and shapes.
Differs: a recording holds the permutations that were drawn, and they are used in the place of ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from control._shuffle import Draws
from control._trunk import Shape
from control.base import Refused
from control.relactrl import GROUPS, ControlBlock, RelaCtrl, RelaCtrlAdapter
from dit.convert.base import Case, LayoutError, System, Tensors, observed, official_args, system

_KEY = re.compile(
    r"controlnet\.(\d+)\.(before_proj\.|after_proj\.|process\.scale_shift_table$|process\.experts_attn\.(\d+)\.attn\.(?:qkv|proj)\.)"
    r"(weight|bias)?"
)
_EXPERT = re.compile(r"process\.experts_attn\.(\d+)")
_INPUTS = {"x", "t"}


def groups_of(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the count of groups of each control block in a released file; empty for a file of another layout."""
    found: dict[int, int] = {}
    for key in weights:
        match = _KEY.fullmatch(key)
        if match is not None and match[3] is not None:
            block = int(match[1])
            found[block] = max(found.get(block, 0), int(match[3]) + 1)
    return tuple(found[block] for block in sorted(found))


def from_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the control blocks under our names; others (`base_model`) are left out."""
    found = {}
    for key, x in weights.items():
        if _KEY.fullmatch(key) is not None:
            ours = key.replace("controlnet.", "blocks.", 1).replace(
                "process.scale_shift_table", "mixer.table"
            )
            found[re.sub(r"process\.experts_attn\.(\d+)\.attn", r"mixer.groups.\1", ours)] = x
    return found


def to_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights under the released names: the inverse of `from_official`."""
    found = {}
    for key, x in weights.items():
        theirs = key.replace("blocks.", "controlnet.", 1).replace("mixer.table", "process.scale_shift_table")
        found[re.sub(r"mixer\.groups\.(\d+)", r"process.experts_attn.\1.attn", theirs)] = x
    return found


class ControlBlocks(RelaCtrlAdapter):
    """Control blocks of a recording, which ran without a transformer. `indices` are their places among the released ones."""

    def __init__(self, width: int, indices: Sequence[int]) -> None:
        groups = tuple(GROUPS[index] for index in indices)
        settings = RelaCtrl(places=tuple(range(len(indices))), groups=groups, hold_residual=True)
        super().__init__(settings, Shape(width, len(indices) + 1, 6 * width, vectors=True))
        for index, block in zip(indices, self.blocks, strict=True):
            assert isinstance(block, ControlBlock)
            block.first = index == 0


@system("RelaCtrl")
class RelaCtrlSystem(System):
    """The released control blocks, fed one after the other."""

    tolerance = 5e-5

    def build(self, args: Mapping[str, Any], settings: Mapping[str, Any]) -> ControlBlocks:
        """Return the blocks for `dim` and `blocks`, the indices of some of the eleven released ones."""
        given = official_args(self.name, args, {"dim": 1152, "blocks": list(range(len(GROUPS)))})
        indices = given["blocks"]
        if not indices or any(not isinstance(one, int) or not 0 <= one < len(GROUPS) for one in indices):
            raise LayoutError(f"{self.name}: blocks are places 0 to {len(GROUPS) - 1}, got {indices!r}")
        try:
            return ControlBlocks(given["dim"], indices)
        except Refused as error:
            raise LayoutError(f"{self.name}: {error}") from error

    def to_ours(self, state: Mapping[str, Tensor], model: nn.Module) -> Tensors:
        """Rename; the base model's weights of a released file are left out."""
        strange = [key for key in state if not _KEY.fullmatch(key) and not key.startswith("base_model.")]
        if strange:
            raise LayoutError(f"{self.name}: unknown weight {strange[0]!r}")
        return from_official(state)

    def to_official(self, model: nn.Module) -> Tensors:
        """Rename back."""
        return to_official(model.state_dict())

    def complete(self, cases: Sequence[Case]) -> list[Case]:
        """Say in each case which block it calls, and give one without a control stream what the case before gave."""
        number, before = -1, None
        for case in cases:
            if "c" in case.inputs:
                number = 0
            elif before is not None and "c" in before.outputs:
                case.inputs["c"] = before.outputs["c"]
                number += 1
            case.inputs["block"] = torch.tensor(max(number, 0))
            before = case
        return list(cases)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
        """Run one control block with the recorded permutations; without any, nothing changes places."""
        assert isinstance(model, RelaCtrlAdapter)
        known = _INPUTS | {"c", "block"}
        strange = [one for one in inputs if one not in known and not one.startswith("perm_")]
        if strange or not {*_INPUTS, "c"} <= set(inputs):
            raise LayoutError(
                f"{self.name}: a case has x, c, t and perm_..., got {', '.join(sorted(inputs))}"
            )
        number = chosen(model, inputs)
        block: Any = model.blocks[number]
        x = inputs["x"]
        draws = block.mixer.identity(x.shape[1], x.device)
        if "perm_channels" in inputs:
            values = tuple(inputs[f"perm_tokens.{j}"] for j in range(len(block.mixer.groups)))
            draws = Draws(inputs["perm_channels"].long(), values)
        c, skip = block(x, inputs["c"], model.vectors(inputs["t"]), draws)
        return {"c": c, "c_skip": skip}

    def run_observed(self, model: nn.Module, case: Case) -> tuple[Tensors, Tensors]:
        """Run a case; what a group returns is recorded as it is."""
        assert isinstance(model, RelaCtrlAdapter)
        number = chosen(model, case.inputs)
        places = {
            name: f"blocks.{number}.{place}" for name in case.mids if (place := inner_place(name)) is not None
        }
        with observed(model, places) as mids:
            outputs = self.run(model, case.inputs)
        return outputs, mids

    def place(self, path: str) -> str | None:
        inner = inner_place(path)
        return None if inner is None else f"blocks.0.{inner}"


def inner_place(path: str) -> str | None:
    """Return our path, inside a control block, of the module at an official one; None where we have none."""
    group = _EXPERT.fullmatch(path)
    if group is not None:
        return f"mixer.groups.{group[1]}"
    return {"process": "mixer", "before_proj": "before_proj", "after_proj": "after_proj"}.get(path)


def chosen(model: RelaCtrlAdapter, inputs: Mapping[str, Tensor]) -> int:
    """Return which block a case calls: the one it says, or where its permutations are of other sizes, the first they fit.

    Raises: LayoutError where they fit none.
    """
    said = int(inputs["block"]) if "block" in inputs else 0
    recorded = {
        int(name.removeprefix("perm_tokens.")): len(x)
        for name, x in inputs.items()
        if name.startswith("perm_tokens.")
    }
    sizes = tuple(size // inputs["x"].shape[1] for _, size in sorted(recorded.items()))
    order = [said, *range(len(model.blocks))] if said < len(model.blocks) else [*range(len(model.blocks))]
    for number in order:
        block: Any = model.blocks[number]
        if not sizes or sizes == block.mixer.parts:
            return number
    raise LayoutError(f"RelaCtrl: no block has groups of {', '.join(map(str, sizes))} channels")
