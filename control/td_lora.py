"""TD-LoRA: a LoRA whose map up is mixed from several by the time of the call, so that early and late steps learn apart.

dW(t) = sum over e of softmax(router(sinusoid(t)))_e B_e A, with one A and E maps B_e for each layer and one small router for
the transformer. At one time it is a plain LoRA, and merges exactly.

Paper: DyDiT++: Dynamic Diffusion Transformers for Efficient Visual Generation; Zhao, Han, Tang, Wang, Song, Huang, Wang, You;
    2025; arXiv:2504.06803.
Differs: the released code holds no LoRA, and router, experts and start are ours. The router begins random and not at 0: with
    equal gates and maps at 0 all experts would get one gradient for ever and never come apart. A condition that another
    adapter sends through the layers by itself stands at time 0 and is changed as at time 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from control._files import grow
from control._layers import (
    ATTENTION,
    Change,
    changed_layers,
    check_targets,
    layers_refuse,
    made_like,
    targeted,
    use_refused,
    weight_of,
)
from control.base import Control, ControlAdapter, ControlRun, Refused, Use
from dit.seams import arguments, patched, timestep_of
from dit.spec import knob, spec

ROUTER = "time_router"
_FREQUENCIES = 32  # sines and as many cosines that tell the router the time
_HIDDEN = 32
# Families whose pipelines count time from 0 to 1; all others count to 1000.
_COUNT_TO_1 = (
    "FluxTransformer2DModel", "Flux2Transformer2DModel", "Flux3Transformer2DModel", "ChromaTransformer2DModel",
    "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel", "QwenImageTransformer2DModel",
    "AuraFlowTransformer2DModel", "ZImageTransformer2DModel",
)  # fmt: skip


@spec("td-lora", paper="DyDiT++, arXiv:2504.06803")
class TDLoRA(Control):
    """A LoRA that depends on the timestep."""

    about = "A LoRA that does different things early and late in a run"

    rank: int = knob(default=4, label="Rank", low=1, high=1024)
    experts: int = knob(default=4, label="Maps up that are mixed", low=1, high=64)
    targets: tuple[str, ...] = knob(
        default=ATTENTION, label="Names of the layers in blocks that are added to"
    )
    span: float | None = knob(
        default=None,
        label="What the transformer calls the time of pure noise, 1 or 1000 (none: as its family does)",
        low=1e-6,
        high=1e6,
    )

    def check(self) -> None:
        """Raises: ValueError if targets are no names of layers."""
        check_targets(self.name, self.targets)

    def refuses(self, transformer: nn.Module) -> str | None:
        return layers_refuse(transformer)

    def build(self, transformer: nn.Module) -> TDLoRAAdapter:
        """As `Control.build`; the span is written into the settings. Raises: Refused if no layer has a name of `targets`."""
        span = self.span
        if span is None:
            family = {one.__name__ for one in type(transformer).__mro__}
            span = 1.0 if family.intersection(_COUNT_TO_1) else 1000.0
        return TDLoRAAdapter(self.replace(span=span), transformer)


class TimedLowRank(nn.Module):
    """x -> B(gates) A x with B mixed from several; zero at the start."""

    def __init__(self, layer: Any, control: TDLoRA, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        self.down = nn.Parameter(torch.empty(control.rank, layer.in_features, **made))
        self.ups = nn.Parameter(torch.zeros(control.experts, layer.out_features, control.rank, **made))
        nn.init.normal_(self.down, std=1 / control.rank)

    def up(self, gates: Tensor) -> Tensor:
        """Gates [T, E] -> maps up [T, D out, R]."""
        return torch.einsum("te,eor->tor", gates.to(self.ups.dtype), self.ups)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Input [B, ..., D in] of a layer, gates [1 or B, E] -> [B, ..., D out] in the dtype of the weights."""
        inner = x.to(self.down.dtype) @ self.down.T  # [B, ..., R]
        up = self.up(gates)
        if len(up) == 1:
            return inner @ up[0].T
        each = len(x) // len(up)  # a layer may see a picture in several rows
        found = torch.bmm(inner.reshape(len(up), -1, inner.shape[-1]), up.transpose(1, 2))
        return found.reshape(len(up) * each, *x.shape[1:-1], up.shape[1])


class TDLoRAAdapter(ControlAdapter):
    """One down map and several maps up for each layer, and the router that mixes them by the time."""

    control: TDLoRA
    needs_condition = False
    acts_on_weights = True

    def __init__(self, control: TDLoRA, transformer: nn.Module) -> None:
        super().__init__(control)
        dtype, device = made_like(transformer)
        layers = targeted(transformer, control.targets, control.name)
        self.layers = tuple(layers)
        for path, layer in layers.items():
            grow(self, path, TimedLowRank(layer, control, dtype, device))
        # In fp32: gates decide for all layers, and the router is a few thousand numbers.
        first = nn.Linear(2 * _FREQUENCIES, _HIDDEN, device=device)
        last = nn.Linear(_HIDDEN, control.experts, device=device)
        nn.init.normal_(last.weight, std=0.5)
        self.add_module(ROUTER, nn.Sequential(first, nn.SiLU(), last))

    def refuses(self, transformer: nn.Module, use: Use) -> str | None:
        """Look at transformer and use."""
        if use.condition is not None:
            return "it takes no condition"
        words = self.control.refuses(transformer) or use_refused(transformer, use, self.layers)
        if words is None and getattr(transformer, "gradient_checkpointing", False) and self.trained_now:
            return (
                "blocks that are computed again in the backward pass do not know the time: "
                "disable_gradient_checkpointing()"
            )
        return words

    def gates(self, time: Tensor) -> Tensor:
        """Times [T] as the transformer counts them -> how much of each expert [T, E], adding up to 1."""
        router: Any = self._modules[ROUTER]
        part = time.float()[:, None] * (1000.0 / float(self.control.span or 1000.0))
        powers = torch.arange(_FREQUENCIES, device=time.device) / _FREQUENCIES
        angles = part * torch.exp(-math.log(10000.0) * powers)
        gates: Tensor = router(torch.cat([angles.cos(), angles.sin()], dim=-1)).softmax(dim=-1)
        return gates

    @contextmanager
    def attached(self, transformer: nn.Module, use: Use, run: ControlRun) -> Iterator[None]:
        """Add to the layers, mixed by the timestep of the call."""
        timed = _Timed(self, transformer, run)
        changes = {path: timed.adds(path) for path in self.layers}
        with patched(transformer, "forward", timed.forward()), changed_layers(transformer, use, run, changes):
            yield

    @torch.no_grad()
    def merged(self, transformer: nn.Module, timestep: float, strength: float = 1.0) -> dict[str, Tensor]:
        """Return the transformer's weights, by name, as they are at a timestep; the transformer stays as it is.

        Raises: Refused for quantised or wrapped layers, or a time outside of the span.
        """
        self.check_time(timestep)
        gates = self.gates(torch.tensor([timestep], device=next(self.parameters()).device))
        found = {}
        for path in self.layers:
            low, weight = self.get_submodule(path), weight_of(transformer, path)
            assert isinstance(low, TimedLowRank)
            added = low.up(gates)[0].float() @ low.down.float() * strength
            found[f"{path}.weight"] = (weight.float() + added).to(weight.dtype)
        return found

    def check_time(self, time: float) -> None:
        """Raises: Refused for a time that the router does not know."""
        span = float(self.control.span or 1000.0)
        if not 0 <= time <= span * 1.001:
            raise Refused(f"td-lora: the timestep is {time:g}, allowed is 0 to span={span:g}")


class _Timed:
    """The gates of the call that is running."""

    def __init__(self, adapter: TDLoRAAdapter, transformer: nn.Module, run: ControlRun) -> None:
        self.adapter, self.transformer, self.run = adapter, transformer, run
        self._gates: Tensor | None = None

    def forward(self) -> Any:
        """Return the transformer's forward with the gates set in it and nowhere else: before it conditions are computed."""
        inner = self.transformer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            own = arguments(self.transformer, args, kwargs)  # half of a call's, where guidance is split
            self._gates = self._now(own) if self._acts() else None
            try:
                return inner(*args, **kwargs)
            finally:
                self._gates = None

        forward.__wrapped__ = inner  # type: ignore[attr-defined]  # inspect.signature sees the transformer's arguments
        return forward

    def adds(self, path: str) -> Change:
        """Return what answers for the layer at a path."""
        low: Any = self.adapter.get_submodule(path)

        def change(x: Tensor, y: Tensor, strength: float) -> Tensor:
            gates = (
                self.adapter.gates(torch.zeros(1, device=x.device)) if self._gates is None else self._gates
            )
            if len(x) % len(gates):
                raise Refused(f"td-lora: {len(gates)} timesteps for {len(x)} rows in {path}")
            return y.add(low(x, gates).to(y.dtype), alpha=strength)

        return change

    def _acts(self) -> bool:
        return any(self.run.strength(one) > 0 for one in self.run.uses if one.adapter is self.adapter)

    def _now(self, given: Mapping[str, Any]) -> Tensor:
        """Gates for the times of a call, [1 or B, E]."""
        time = given.get("timestep")
        if not isinstance(time, Tensor):
            number = timestep_of(given)()
            if number is None:
                raise Refused("td-lora: the call has no timestep")
            noise = next((one for one in given.values() if isinstance(one, Tensor)), None)
            time = torch.tensor([number], device=None if noise is None else noise.device)
        if time.dim() > 1 and time.numel() != len(time):
            raise Refused(
                f"td-lora: timestep must be one a sample, got shape {tuple(time.shape)} (one a token cannot be served)"
            )
        moment = self.run.moment
        if (
            moment is not None and moment.timestep is not None
        ):  # what the clock has read already costs no waiting
            self.adapter.check_time(moment.timestep)
        return self.adapter.gates(time.reshape(-1))
