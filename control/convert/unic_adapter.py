"""UNIC-Adapter's released layout: the transformer of Stable Diffusion 3 with the adapter's weights among its own.

Code: AIDC-AI/UNIC-Adapter, commit 1c8462d, MIT.
Differs: the table of positions that it stores twice is kept once; the second copy is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from control._backbones import facts_of
from control._second_stream import angles
from control.base import Use, controlled
from control.unic_adapter import (
    SUFFIX,
    TABLE,
    Instructed,
    ThreeWay,
    UNICAdapterWeights,
    from_official,
    released,
)
from dit.convert.base import Case, LayoutError, System, Tensors, check_table, official_args, system
from dit.seams import around_blocks, blocks_of

_MAIN = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")
_CONTROL = tuple(
    f"{name}{SUFFIX}" for name in ("hidden_states", "encoder_hidden_states", "pooled_projections")
)
_ARGS: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 18, "attention_head_dim": 64,
    "num_attention_heads": 18, "joint_attention_dim": 4096, "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 96, "dual_attention_layers": (),
    "qk_norm": None, "control_scale": 1.0,
}  # fmt: skip


class ControlledSD3(nn.Module):
    """A Stable Diffusion 3 transformer with an adapter, and what its recording leaves to its settings."""

    def __init__(self, args: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        super().__init__()
        plain = {**args, "dual_attention_layers": tuple(args["dual_attention_layers"])}
        self.scale = float(plain.pop("control_scale"))
        self.transformer = SD3Transformer2DModel(**plain)
        self.adapter: UNICAdapterWeights = released().build(self.transformer)
        known = {"image_instruction": "image_instruction_guidance", "prompt": "prompt_guidance"}
        self.guidance = ThreeWay(
            **{name: float(settings[key]) for name, key in known.items() if key in settings}
        )

    def condition(self, inputs: Mapping[str, Tensor]) -> Instructed:
        """Return the condition of a recorded call."""
        return Instructed(*(inputs[name] for name in _CONTROL))

    def sample(self, inputs: Mapping[str, Tensor], strength: float) -> Tensor:
        """Return the velocity of a recorded call."""
        use = Use(self.adapter, self.condition(inputs), strength=strength)
        with controlled(self.transformer, use):
            found: Tensor = self.transformer(**{name: inputs[name] for name in _MAIN}, return_dict=False)[0]
        return found


@system("UNIC-Adapter")
class UNICAdapterSystem(System):
    """The released adapter on SD3 medium and SD3.5 medium; weights of both in one file."""

    tolerance = 2e-5

    def build(self, args: Mapping[str, Any], settings: Mapping[str, Any]) -> ControlledSD3:
        """Return transformer and adapter; `settings` hold the guidance of recorded cases that are combined."""
        return ControlledSD3(official_args(self.name, args, _ARGS), settings)

    def to_ours(self, state: Mapping[str, Tensor], model: nn.Module) -> Tensors:
        """Give the adapter's weights to the adapter and the rest to the transformer."""
        assert isinstance(model, ControlledSD3)
        if TABLE in state:
            stored = state.get("pos_embed.pos_embed")
            if stored is None:
                raise LayoutError(f"{self.name}: weights do not fit: missing pos_embed.pos_embed")
            check_table(self.name, state[TABLE], stored, TABLE)
        else:
            raise LayoutError(f"{self.name}: weights do not fit: missing {TABLE}")
        ours = {f"transformer.{key}": x for key, x in state.items() if SUFFIX not in key}
        return ours | {f"adapter.{key}": x for key, x in from_official(state).items()}

    def to_official(self, model: nn.Module) -> Tensors:
        """Put them together again."""
        assert isinstance(model, ControlledSD3)
        base = model.transformer.state_dict()
        return {**base, **model.adapter.state_dict(), TABLE: base["pos_embed.pos_embed"]}

    def complete(self, cases: Sequence[Case]) -> list[Case]:
        """Fill in what later cases take from the first, and what their names and outputs ask for."""
        first = next((case for case in cases if set(case.inputs) >= {*_MAIN, *_CONTROL}), None)
        for case in cases:
            if first is not None:
                for name in (*_MAIN, *_CONTROL):
                    case.inputs.setdefault(name, first.inputs[name])
            if case.name.endswith("_off"):
                case.inputs["control_scale"] = torch.zeros(())
        return list(cases)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
        """Run a case; a batch of three guidance branches is combined too."""
        assert isinstance(model, ControlledSD3)
        known = {*_MAIN, *_CONTROL}
        if set(inputs) - known - {"control_scale"} or not known <= set(inputs):
            raise LayoutError(
                f"{self.name}: a case has {', '.join(sorted(known))}, got {', '.join(sorted(inputs))}"
            )
        scale = inputs.get("control_scale")
        found = model.sample(inputs, model.scale if scale is None else float(scale))
        guided = {"guided": model.guidance.mixed(*found.chunk(3))} if len(found) % 3 == 0 else {}
        return {"sample": found} | guided

    def run_observed(self, model: nn.Module, case: Case) -> tuple[Tensors, Tensors]:
        """Watch the main stream at its blocks and query maps, and the second one step by step."""
        assert isinstance(model, ControlledSD3)
        with watched(model) as seen:
            outputs = self.run(model, case.inputs)
        if case.mids:
            seen |= of_second(model, case.inputs)
        return outputs, {name: x for name, x in seen.items() if name in case.mids}


@contextmanager
def watched(model: ControlledSD3) -> Iterator[Tensors]:
    """Collect the streams after each block of the main pass, and the queries of each crossing before they are turned."""
    seen: Tensors = {}
    handles = []

    def keeper(name: str) -> Any:
        def keep(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            # Not taken from the map's own call, which there is none of at strength 0.
            seen[name] = model.adapter.get_submodule(name)(kwargs["hidden_states"])

        return keep

    def around(block: Any, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        text, image = inner(*args, **kwargs)
        seen[f"{block.path}.image"] = image
        if text is not None:
            seen[f"{block.path}.text"] = text
        return text, image

    blocks = blocks_of(model.transformer)
    for block in blocks:
        path = f"{block.path}.to_q{SUFFIX}"
        attn: Any = block.module.attn
        handles.append(attn.register_forward_pre_hook(keeper(path), with_kwargs=True))
    try:
        with around_blocks(blocks, around):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def of_second(model: ControlledSD3, inputs: Mapping[str, Tensor]) -> Tensors:
    """Return what the released code shows of the second stream after each block, and its matrices of rotation."""
    facts: Any = facts_of(model.transformer)
    noise = inputs["hidden_states"]
    grid = facts.grid(model.transformer, {"hidden_states": noise})
    given = model.condition(inputs)
    found: Tensors = {}
    for step in model.adapter.steps(
        model.transformer,
        given,
        time=inputs["timestep"],
        guidance=None,
        grid=grid,
        dtype=noise.dtype,
        whole=True,
    ):
        for name, x in (("text", step.text), ("image", step.image)):
            if x is not None:
                found[f"{step.place.path}.control_{name}"] = x
    rows, columns = (torch.arange(float(count)) for count in grid)
    where = torch.cartesian_prod(torch.zeros(1), rows, columns)
    cos, sin = angles(
        facts, model.transformer, torch.cat([where, torch.zeros(inputs[_CONTROL[1]].shape[1], 3)])
    )
    cos, sin = cos[:, ::2], sin[:, ::2]  # [N + L, head size / 2]
    found["pe"] = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))[None, None]
    return found
