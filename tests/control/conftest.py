"""`tiny`: one tiny random transformer of each family that adapters serve, with its inputs; `easy`: EasyControl on it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from control.base import ControlAdapter, Use
from control.easycontrol import EasyControl

STEPS = (1000.0, 750.0, 500.0, 250.0)


@dataclass
class Tiny:
    """A transformer of heads x head size channels, its latents' channels, and a draw of inputs."""

    name: str
    model: Any
    channels: int
    inputs: Callable[..., dict[str, Any]]
    scale: float = 1.0  # a call's timestep is `scale` times one of 0..1000
    extra: dict[str, Any] = field(default_factory=dict)

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def given(self, batch: int = 1, rows: int = 8, columns: int = 12, seed: int = 0) -> dict[str, Any]:
        """Inputs for a picture of rows x columns latent pixels, without the timestep."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        return self.inputs(draw, batch, rows, columns)

    def call(self, given: dict[str, Any], time: float = 500.0) -> Tensor:
        batch = len(given["hidden_states"])
        found: Tensor = self.model(
            **given, timestep=torch.full((batch,), time * self.scale), return_dict=False
        )[0]
        return found

    def run(self, given: dict[str, Any], steps: tuple[float, ...] = STEPS) -> list[Tensor]:
        return [self.call(given, time) for time in steps]

    def condition(self, rows: int = 8, columns: int = 12, seed: int = 5, batch: int = 1) -> Tensor:
        return self.draw(batch, self.channels, rows, columns, seed=seed)


def _flux_inputs(draw: Any, batch: int, rows: int, columns: int) -> dict[str, Any]:
    height, width = rows // 2, columns // 2
    return {
        "hidden_states": draw(batch, height * width, 16),
        "encoder_hidden_states": draw(batch, 5, 16),
        "pooled_projections": draw(batch, 12),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": torch.cartesian_prod(
            torch.zeros(1), torch.arange(float(height)), torch.arange(float(width))
        ),
        "txt_ids": torch.zeros(5, 3),
    }


def _picture_inputs(draw: Any, batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 4, rows, columns),
        "encoder_hidden_states": draw(batch, 5, 16),
        "pooled_projections": draw(batch, 12),
    }


def _flux() -> Tiny:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    return Tiny("flux", model, 4, _flux_inputs, scale=0.001)


def _sd3(second: tuple[int, ...] = (), norm: str | None = None) -> Tiny:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=12,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=24, pooled_projection_dim=12,
        pos_embed_max_size=12, dual_attention_layers=second, qk_norm=norm,
    )  # fmt: skip
    return Tiny("sd3", model, 4, _picture_inputs)


def _mmdit(**changes: Any) -> Tiny:
    from dit.backbones.mmdit import MMDiT

    settings: dict[str, Any] = {
        "in_channels": 4, "patch_size": 2, "sample_size": 8, "width": 24, "heads": 2, "dual_depth": 2, "single_depth": 2,
        "context_dim": 16, "pooled_dim": 12, "rope_axes": (4, 4, 4),
    }  # fmt: skip
    return Tiny("mmdit", MMDiT(**(settings | changes)), 4, _picture_inputs)


KINDS: dict[str, Callable[[], Tiny]] = {
    "flux": _flux,
    "sd3": _sd3,
    "sd3.5": lambda: _sd3((0, 1), "rms_norm"),
    "mmdit": _mmdit,
    "mmdit-dual": lambda: _mmdit(single_depth=0, position="sincos"),
    "mmdit-single": lambda: _mmdit(dual_depth=0, position="both", modulation="adaln-single"),
}


@functools.cache
def _made(kind: str) -> Tiny:
    torch.manual_seed(0)
    found = KINDS[kind]()
    for parameter in found.model.parameters():  # nothing may be zero, or a missing part would not show
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            nn.init.normal_(parameter, mean=1.0 if parameter.numel() == 12 else 0.0, std=0.1)
    found.model.eval().requires_grad_(False)
    return found


@pytest.fixture
def make() -> Iterator[Callable[[str], Tiny]]:
    """Models by kind, made once; what diffusers' hooks leave on them (`forward`, restored as an attribute) goes with the test."""
    used: list[Tiny] = []

    def made(kind: str) -> Tiny:
        used.append(_made(kind))
        return used[-1]

    yield made
    for tiny in used:
        for module in tiny.model.modules():
            if vars(module).pop("_diffusers_hook", None) is not None:
                vars(module).pop("forward", None)


@pytest.fixture(params=sorted(KINDS))
def tiny(request: pytest.FixtureRequest, make: Callable[[str], Tiny]) -> Tiny:
    return make(request.param)


def shaken(adapter: ControlAdapter, seed: int = 1, size: float = 0.4) -> ControlAdapter:
    """Give an adapter weights that do something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * size
    return adapter.requires_grad_(False)


@pytest.fixture
def easy() -> Callable[..., Use]:
    """A use of a random EasyControl adapter: `easy(tiny, seed, strength=..., positions=...)`."""

    def make_use(tiny: Tiny, seed: int = 1, condition: Tensor | None = None, **about: Any) -> Use:
        names = ("rank", "positions", "offset", "conditioning", "lora_weight", "blocks")
        control = EasyControl(**({"rank": 4} | {name: about.pop(name) for name in names if name in about}))
        adapter = shaken(control.build(tiny.model), seed)
        return Use(adapter, tiny.condition(seed=seed + 50) if condition is None else condition, **about)

    return make_use
