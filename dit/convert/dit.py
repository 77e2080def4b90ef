"""Weights of facebookresearch/DiT and willisma/SiT: one network, one layout, two meanings of time.

Paper: Scalable Diffusion Models with Transformers, Peebles and Xie 2023, arXiv:2212.09748; SiT, Ma et al. 2024,
arXiv:2401.08740.
Differs: the stored position table is checked and then dropped, we compute it; the one qkv map becomes three.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit.backbones.dit import DiT, guide
from dit.convert.base import (
    LayoutError,
    System,
    Tensors,
    check_table,
    folded,
    laid_flat,
    official_args,
    system,
)
from dit.embeddings import sincos_2d
from dit.grid import Grid

DEFAULTS: dict[str, Any] = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
}
_PLACES = {
    "x_embedder": "x_embedder",
    "x_embedder.proj": "x_embedder.proj",
    "t_embedder": "time_embed",
    "t_embedder.mlp": "time_embed.timestep_embedder",
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    "y_embedder": "label_embed",
    "y_embedder.embedding_table": "label_embed.embedding_table",
    "final_layer": "proj_out.proj",
    "final_layer.linear": "proj_out.proj",
    "final_layer.norm_final": "norm_out",
    "final_layer.adaLN_modulation": "modulation_out.linear",
    "final_layer.adaLN_modulation.1": "modulation_out.linear",
}
_BLOCK_PLACES = {
    "": "",
    ".norm1": ".norm1",
    ".norm2": ".norm2",
    ".attn": ".attn",
    ".attn.proj": ".attn.to_out.0",
    ".mlp": ".ff",
    ".mlp.act": ".ff.net.0",
    ".mlp.fc1": ".ff.net.0.proj",
    ".mlp.fc2": ".ff.net.2",
    ".adaLN_modulation": ".modulation.linear",
    ".adaLN_modulation.1": ".modulation.linear",
}
_BLOCK = re.compile(r"blocks\.(\d+)(.*)")
_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_GUIDED_CHANNELS = 3  # the released samplers guide the first three channels only


@system("DiT", "SiT")
class DiTSystem(System):
    """The released DiT (noise and variance at steps 0..999) and SiT (velocity at times 0..1, 1 being the picture)."""

    def build(self, args: Mapping[str, Any], settings: Mapping[str, Any]) -> DiT:
        """Return our DiT for the arguments of `models.DiT` or `models.SiT`."""
        return DiT(**self.our_args(args))

    def our_args(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of our DiT for the official ones; others than DiT's are refused. Raises: LayoutError."""
        given = official_args(self.name, args, DEFAULTS)
        return {
            "in_channels": given["in_channels"],
            "patch_size": given["patch_size"],
            "sample_size": given["input_size"],
            "width": given["hidden_size"],
            "depth": given["depth"],
            "heads": given["num_heads"],
            "mlp_ratio": given["mlp_ratio"],
            "num_classes": given["num_classes"],
            "null_class": given["class_dropout_prob"] > 0,
            "learn_sigma": bool(given["learn_sigma"]),
            "convention": "sit" if self.name == "SiT" else "ddpm",
        }

    def to_ours(self, state: Mapping[str, Tensor], model: nn.Module) -> Tensors:
        """Rename, cut qkv in three, lay the patch convolution flat, check the position table."""
        ours: Tensors = {}
        if "pos_embed" not in state:
            raise LayoutError(f"{self.name}: pos_embed is missing; is this the official layout?")
        for key, tensor in state.items():
            qkv = _QKV.fullmatch(key)
            path, _, leaf = key.rpartition(".")
            if key == "pos_embed":
                check_table(self.name, tensor, self._table(model), key)
            elif qkv:
                for name, piece in zip("qkv", tensor.chunk(3), strict=True):
                    ours[f"transformer_blocks.{qkv[1]}.attn.to_{name}.{qkv[2]}"] = piece.clone()
            elif key == "x_embedder.proj.weight":
                ours[key] = laid_flat(tensor)
            else:
                place = self.place(path)
                if place is None or leaf not in ("weight", "bias"):
                    raise LayoutError(f"{self.name}: unknown weight {key!r}")
                ours[f"{place}.{leaf}"] = tensor
        return ours

    def to_official(self, model: nn.Module) -> Tensors:
        """Join q, k, v, fold the patch map into a convolution, add the position table."""
        return self.official_of(model, model.state_dict())

    def official_of(self, model: nn.Module, state: Mapping[str, Tensor]) -> Tensors:
        """Return the weights of `state` under the official names; `model` gives the sizes."""
        config: Any = model.config
        official: Tensors = {"pos_embed": self._table(model)}
        names = {
            place: path for path, place in _PLACES.items()
        }  # the last name of a place is that of its weights
        inner = {place: path for path, place in _BLOCK_PLACES.items()}
        for key, tensor in state.items():
            path, _, leaf = key.rpartition(".")
            block = re.fullmatch(r"transformer_blocks\.(\d+)(.*)", path)
            if key == "x_embedder.proj.weight":
                official[key] = folded(tensor, config.patch_size, config.in_channels)
            elif block is None:
                official[f"{names[path]}.{leaf}"] = tensor
            elif block[2] in (".attn.to_q", ".attn.to_k", ".attn.to_v"):
                whole = [state[f"transformer_blocks.{block[1]}.attn.to_{name}.{leaf}"] for name in "qkv"]
                official[f"blocks.{block[1]}.attn.qkv.{leaf}"] = torch.cat(whole)
            else:
                official[f"blocks.{block[1]}{inner[block[2]]}.{leaf}"] = tensor
        return official

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
        """Run `forward` or, where a guidance scale was recorded, `forward_with_cfg`."""
        unknown = sorted(set(inputs) - {"x", "t", "y", "cfg_scale"})
        if unknown or not {"x", "t", "y"} <= set(inputs):
            raise LayoutError(
                f"{self.name}: a case has x, t, y and maybe cfg_scale, got {', '.join(sorted(inputs))}"
            )
        x, t, y = inputs["x"], inputs["t"], inputs["y"]
        if "cfg_scale" not in inputs:
            return {"model": self._official_forward(model, x, t, y)}
        return {"model": self._guided(model, x, t, y, inputs["cfg_scale"], _GUIDED_CHANNELS)}

    def place(self, path: str) -> str | None:
        block = _BLOCK.fullmatch(path)
        if block is None:
            return _PLACES.get(path)
        inner = _BLOCK_PLACES.get(block[2])
        return None if inner is None else f"transformer_blocks.{block[1]}{inner}"

    def _guided(
        self, model: nn.Module, x: Tensor, t: Tensor, y: Tensor, scale: Tensor, channels: int
    ) -> Tensor:
        """`forward_with_cfg`: the first half of `x` with both halves of the labels, the first `channels` guided."""
        half = x[: len(x) // 2]
        cond, uncond = self._official_forward(model, torch.cat([half, half]), t, y).chunk(2)
        towards = guide(cond, uncond, scale, channels)
        rest = uncond[:, channels:]
        return torch.cat([towards, torch.cat([towards[:, :channels], rest], dim=1)])

    def _official_forward(self, model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """A SiT's own time runs the other way and its velocity is picture - noise."""
        if self.name == "SiT":
            flipped: Tensor = model(x, (1 - t) * 1000, y, return_dict=False)[0]
            return -flipped
        out: Tensor = model(x, t, y, return_dict=False)[0]
        return out

    def _table(self, model: nn.Module) -> Tensor:
        config: Any = model.config
        side = config.sample_size // config.patch_size
        return sincos_2d(config.width, Grid(1, side, side)).unsqueeze(0)
