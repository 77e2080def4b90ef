"""Weights of RERV/VDT: DiT's layout, plus attention over time in every block and a table of frame positions.

Paper: VDT: General-purpose Video Diffusion Transformers via Mask Modeling, Lu et al. 2023, arXiv:2305.13311. Code: commit cdbad2b,
CC-BY-NC-4.0 (facts alone are taken from it).
Differs: the stored tables are checked and then dropped; without time (mode "image") the network is our DiT. The loss of the
release, which weighs clips by the size of their mask and leaves the variational term unmasked, is here alone, for comparison:
ours is `dit.clip_masks.masked_mean`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit.backbones.dit import DiT
from dit.backbones.vdt import VDT
from dit.clip_masks import blend
from dit.convert.base import Case, LayoutError, Tensors, check_table, official_args, system
from dit.convert.dit import DEFAULTS, DiTSystem
from dit.embeddings import sincos_1d

_DEFAULTS = DEFAULTS | {"mode": "video", "num_frames": 16}
_TEMPORAL = {
    "temporal_norm1": "temporal.norm",
    "temporal_attn": "temporal.attn",
    "temporal_attn.proj": "temporal.attn.to_out.0",
    "temporal_fc": "temporal.proj",
}
_KEY = re.compile(r"blocks\.(\d+)\.(temporal_.+)\.(weight|bias)")
_OURS = re.compile(r"transformer_blocks\.(\d+)\.(temporal\..+)\.(weight|bias)")
_QKV = "temporal_attn.qkv"
_MASK = "mask."
_STEPS = 1000


@system("VDT")
class VDTSystem(DiTSystem):
    """The released VDT: noise and variance at steps 0..999, always of class 0; clips are [B, F, C, H, W]."""

    tolerance = 2e-5

    def build(self, args: Mapping[str, Any], settings: Mapping[str, Any]) -> VDT | DiT:
        """Return our network for the arguments of `models.VDT`."""
        given = official_args(self.name, args, _DEFAULTS)
        plain = {name: given[name] for name in DEFAULTS}
        if given["mode"] != "video":
            return super().build(plain, settings)
        return VDT(**self.our_args(plain), frames=given["num_frames"], default_class=0)

    def to_ours(self, state: Mapping[str, Tensor], model: nn.Module) -> Tensors:
        """Rename what attends over time, check the table of frames, and read the rest as a DiT."""
        rest, ours = {}, {}
        table = self._frames(model)
        if table is not None and "time_embed" not in state:
            raise LayoutError(f"{self.name}: time_embed is missing; is this the official layout?")
        for key, tensor in state.items():
            found = _KEY.fullmatch(key)
            if key == "time_embed" and table is not None:
                check_table(self.name, tensor, table, key)
            elif found and found[2] == _QKV:
                for name, piece in zip("qkv", tensor.chunk(3), strict=True):
                    ours[f"transformer_blocks.{found[1]}.temporal.attn.to_{name}.{found[3]}"] = piece.clone()
            elif found and found[2] in _TEMPORAL:
                ours[f"transformer_blocks.{found[1]}.{_TEMPORAL[found[2]]}.{found[3]}"] = tensor
            else:
                rest[key] = tensor
        return ours | super().to_ours(rest, model)

    def to_official(self, model: nn.Module) -> Tensors:
        """Write what attends over time under its official names, add the table of frames, and write the rest as a DiT."""
        names = {ours: theirs for theirs, ours in _TEMPORAL.items()}
        state, table = model.state_dict(), self._frames(model)
        official: Tensors = {} if table is None else {"time_embed": table}
        rest: Tensors = {}
        for key, tensor in state.items():
            found = _OURS.fullmatch(key)
            if not found:
                rest[key] = tensor
            elif found[2] in names:
                official[f"blocks.{found[1]}.{names[found[2]]}.{found[3]}"] = tensor
            elif found[2].endswith("to_q"):
                start = f"transformer_blocks.{found[1]}.temporal.attn.to_"
                whole = [state[f"{start}{name}.{found[3]}"] for name in "qkv"]
                official[f"blocks.{found[1]}.{_QKV}.{found[3]}"] = torch.cat(whole)
        return official | self.official_of(model, rest)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
        """Run `forward`, one forward for each recorded mask, or the masked training loss."""
        masks = {name.removeprefix(_MASK): one for name, one in inputs.items() if name.startswith(_MASK)}
        others = set(inputs) - {_MASK + name for name in masks}
        if others == {"x_start", "t", "noise", "mask"}:
            return released_loss(self, model, inputs)
        if others == {"x", "t"} and not masks:
            return {"model": self.answer(model, inputs["x"], inputs["t"])}
        if others != {"x", "t", "raw_x"} or not masks:
            raise LayoutError(
                f"{self.name}: a case has x and t, or x, t, raw_x and mask.*, or x_start, t, noise and mask, "
                f"got {', '.join(sorted(inputs))}"
            )
        found: Tensors = {}
        x, t = inputs["x"], inputs["t"]
        for name, mask in masks.items():
            found[f"model_input.{name}"] = _blended(inputs["raw_x"], x, mask)
            found[f"model.{name}"] = self.answer(model, found[f"model_input.{name}"], t)
            noise = _swapped(found[f"model.{name}"])[:, : x.shape[2]]
            found[f"mean.{name}"] = Steps(x.device).mean(_swapped(x), noise, t)
        return found

    def answer(self, model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        """Return what the release does for a clip [B, F, C, H, W]: [B, F, C or 2 C, H, W]."""
        if isinstance(model, DiT):
            labels = torch.zeros(len(x) * x.shape[1], dtype=torch.long, device=x.device)
            out = model(x.flatten(0, 1), t.repeat_interleave(x.shape[1]), labels, return_dict=False)[0]
            return out.unflatten(0, x.shape[:2])
        return _swapped(model(_swapped(x), t, return_dict=False)[0])

    def run_observed(self, model: nn.Module, case: Case) -> tuple[Tensors, Tensors]:
        """Run a case; what the release keeps frame after frame is put in that form."""
        outputs, mids = super().run_observed(model, case)
        config: Any = model.config
        sites = (config.sample_size // config.patch_size) ** 2
        for name, value in mids.items():
            if name.endswith("temporal_norm1"):  # the release norms rows of frames
                frames = value.unflatten(1, (-1, sites)).transpose(1, 2)
                mids[name] = frames.flatten(0, 1)
            elif value.dim() == 3 and not name.endswith(("temporal_attn", "temporal_attn.proj")):
                mids[name] = value.reshape(-1, sites, value.shape[-1])
        inputs = {name: value for name, value in outputs.items() if name.startswith("model_input.")}
        return outputs, mids | {name: value for name, value in inputs.items() if name in case.mids}

    def place(self, path: str) -> str | None:
        block = re.fullmatch(r"blocks\.(\d+)\.(temporal_.+)", path)
        if block is None:
            return super().place(path)
        inner = _TEMPORAL.get(block[2])
        return None if inner is None else f"transformer_blocks.{block[1]}.{inner}"

    def _frames(self, model: nn.Module) -> Tensor | None:
        config: Any = model.config
        if isinstance(model, DiT):
            return None
        return sincos_1d(config.width, torch.arange(config.frames)).float().unsqueeze(0)


class Steps:
    """The thousand steps of the release: variances rise linearly from 0.0001 to 0.02."""

    def __init__(self, device: torch.device) -> None:
        betas = torch.linspace(1e-4, 0.02, _STEPS, dtype=torch.float64)
        kept = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        variance = betas * (1 - before) / (1 - kept)
        self.signal, self.noise = kept.sqrt().to(device), (1 - kept).sqrt().to(device)
        self.from_start = (betas * before.sqrt() / (1 - kept)).to(device)
        self.from_noisy = ((1 - before) * (1 - betas).sqrt() / (1 - kept)).to(device)
        self.low = torch.cat([variance[1:2], variance[1:]]).log().to(device)
        self.high = betas.log().to(device)

    def at(self, table: Tensor, t: Tensor) -> Tensor:
        """Return the entries of a table for steps [B], as [B, 1, 1, 1, 1] in float32."""
        return table[t].float().reshape(-1, 1, 1, 1, 1)

    def posterior(self, start: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Return the mean of the step before, given clean and noisy clips [B, C, F, H, W]."""
        return self.at(self.from_start, t) * start + self.at(self.from_noisy, t) * noisy

    def mean(self, noisy: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the mean of the step before, given the noise that was predicted in a clip."""
        start = (noisy - self.at(self.noise, t) * noise) / self.at(self.signal, t)
        return self.posterior(start, noisy, t)


def released_loss(found: VDTSystem, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
    """Return the training loss of the release for clean clips [B, F, C, H, W] with given noise [B, C, F, H, W], a value a clip."""
    t, noise, mask = inputs["t"], inputs["noise"], inputs["mask"]
    start, steps = _swapped(inputs["x_start"]), Steps(t.device)
    noisy = steps.at(steps.signal, t) * start + steps.at(steps.noise, t) * noise
    shown = _blended(inputs["x_start"], _swapped(noisy), mask)
    said = _swapped(found.answer(model, shown, t))
    guessed, spread = said[:, : start.shape[1]], said[:, start.shape[1] :]
    mse = _mean((mask.unsqueeze(1) * (noise - guessed)) ** 2)
    if not spread.shape[1]:
        return {"mse": mse, "loss": mse}
    share = (spread + 1) / 2
    log_variance = share * steps.at(steps.high, t) + (1 - share) * steps.at(steps.low, t)
    mean, true = steps.mean(noisy, guessed, t), steps.posterior(start, noisy, t)
    low = steps.at(steps.low, t)
    divergence = 0.5 * (
        log_variance - low - 1 + (low - log_variance).exp() + (true - mean) ** 2 * (-log_variance).exp()
    )
    bits = torch.where(
        t == 0, _mean(_unlikely(start, mean, 0.5 * log_variance)), _mean(divergence)
    ) / math.log(2)
    return {"mse": mse, "vb": bits, "loss": mse + bits}


def _unlikely(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Minus the log-likelihood of values that were rounded to 256 levels in -1..1, by the tanh form of the normal integral."""

    def below(value: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    scaled, half = x - mean, 1 / 255
    upper, lower = below((scaled + half) * (-log_scale).exp()), below((scaled - half) * (-log_scale).exp())
    inside = (upper - lower).clamp_min(1e-12).log()
    found = torch.where(x > 0.999, (1 - lower).clamp_min(1e-12).log(), inside)
    return -torch.where(x < -0.999, upper.clamp_min(1e-12).log(), found)


def _blended(raw: Tensor, noisy: Tensor, mask: Tensor) -> Tensor:
    return _swapped(blend(_swapped(raw), _swapped(noisy), mask))


def _swapped(x: Tensor) -> Tensor:
    """[B, F, C, H, W] <-> [B, C, F, H, W]."""
    return x.transpose(1, 2)


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)
