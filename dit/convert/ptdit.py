"""Weights of PT-DiT (Qihoo-T2X) as its authors released them in MindSpeed-MM.

Paper: Qihoo-T2X: An Efficient Proxy-Tokenized Diffusion Transformer for Text-to-Any-Task, Wang et al. 2024, arXiv:2409.04005.
Differs: the stored position table is checked and then dropped, we compute it; tokens stay in the order of the grid, so what
the released code keeps window after window is put in that order to be compared.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dit.backbones.ptdit import PTDiT
from dit.convert.base import (
    Case,
    LayoutError,
    System,
    Tensors,
    about,
    check_table,
    folded,
    laid_flat,
    official_args,
    renamed,
    system,
)
from dit.grid import Grid
from dit.mixers.proxy import Proxy
from dit.partition import Window
from dit.seams import patched

_DEFAULTS: dict[str, Any] = {
    "num_heads": 16,
    "head_dim": 88,
    "in_channels": None,
    "out_channels": None,
    "num_layers": 1,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "cross_attention_dim": None,
    "attention_bias": False,
    "sample_size": None,
    "frame": None,
    "patch_size": None,
    "activation_fn": "geglu",
    "num_embeds_ada_norm": None,
    "upcast_attention": False,
    "norm_type": "layer_norm",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "attention_type": "default",
    "caption_channels": None,
    "shift_window": False,
    "compress_ratios": None,
    "proxy_compress_ratios": None,
}
_PLACES = {
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single": "modulation_shared",
    "adaln_single.linear": "modulation_shared.linear",
    "adaln_single.emb.timestep_embedder": "time_embed.timestep_embedder",
    "adaln_single.emb.resolution_embedder": "resolution_embed.timestep_embedder",
    "adaln_single.emb.aspect_ratio_embedder": "aspect_embed.timestep_embedder",
    "caption_projection": "context_embedder",
    "proj_out": "proj_out.proj",
}
_BLOCK_PLACES = {
    "": "",
    "proxy_norm1": "proxies.norm",
    "proxy_attn1": "proxies.attn",
    "proxy_cross_norm": "proxies.norm_out",
    "norm_before": "proxies.norm_image",
    "pvisual_attn2": "proxies.cross",
    "linear_1_visual": "proxies.proj_out",
    "norm1": "norm1",
    "attn1": "attn",
    "shift_window_norm": "norm_shift",
    "attn3": "shift_attn",
    "linear_2": "shift_out",
    "attn2": "text_attn",
    "norm2": "norm2",
    "ff": "ff",
}
_TABLES = {"scale_shift_table": "modulation.bias", "proxy_scale_shift_table": "modulation_shift.bias"}
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.?(.*)")
_POSITIONS = "pos_embed.pos_embed"
_SIZED = 128  # at this sample size the released code tells the network the size of the picture
_WINDOWED = ("", "attn1", "ff")  # outputs [B * windows, M, D]
_FLAT = ("attn2", "pvisual_attn2")  # outputs [B, windows * M, D]


@system("PT-DiT")
class PTDiTSystem(System):
    """The released PT-DiT. Times 0..1000 fall to the picture, the velocity is picture - noise."""

    tolerance = 5e-5

    def build(self, args: Mapping[str, Any], settings: Mapping[str, Any]) -> PTDiT:
        """Return our PT-DiT for the arguments of `PTDiTDiffuser`; `settings.other_proxies` are those of a recorded case."""
        given = official_args(self.name, args, _DEFAULTS)
        width = given["num_heads"] * given["head_dim"]
        _refuse(self.name, given, width)
        window = given["compress_ratios"] or [1, 8, 8]
        rows, columns = _counts(window, given["proxy_compress_ratios"] or [1, 4, 4])
        model = PTDiT(
            in_channels=given["in_channels"],
            out_channels=given["out_channels"],
            patch_size=given["patch_size"],
            sample_size=given["sample_size"],
            frames=given["frame"],
            width=width,
            depth=given["num_layers"],
            heads=given["num_heads"],
            context_dim=given["caption_channels"],
            position_scale=float(max(given["sample_size"] // 64, 1)),
            size_embeds=given["sample_size"] == _SIZED,
            convention="release",
            mixed_times=True,
            attention_bias=given["attention_bias"],
            norm_affine=given["norm_elementwise_affine"],
            norm_eps=given["norm_eps"],
            mixer=Proxy(
                frames=window[0],
                height=window[1],
                width=window[2],
                proxy_rows=rows,
                proxy_columns=columns,
                shift=given["shift_window"],
            ),
            experts={"name": "dense", "activation": given["activation_fn"]},
        )
        if "other_proxies" in settings:  # of a recording; they change nothing in the weights
            model.official_settings = {"other_proxies": _counts(window, settings["other_proxies"])}
        return model

    def to_ours(self, state: Mapping[str, Tensor], model: nn.Module) -> Tensors:
        """Rename, lay the patch convolution flat, check the position table."""
        ours: Tensors = {}
        if _POSITIONS not in state:
            raise LayoutError(f"{self.name}: {_POSITIONS} is missing; is this the official layout?")
        for key, tensor in state.items():
            if key == _POSITIONS:
                check_table(self.name, tensor, _table(model), key)
            elif key == "pos_embed.proj.weight":
                ours["x_embedder.proj.weight"] = laid_flat(tensor)
            else:
                ours[self._our_name(key)] = tensor
        return ours

    def to_official(self, model: nn.Module) -> Tensors:
        """Fold the patch map into a convolution, add the position table."""
        config: Any = model.config
        official: Tensors = {_POSITIONS: _table(model)}
        outside = {place: path for path, place in _PLACES.items()}
        inside = {place: path for path, place in _BLOCK_PLACES.items() if place}
        tables = {place: path for path, place in _TABLES.items()}
        for key, tensor in model.state_dict().items():
            block = _BLOCK.fullmatch(key)
            if key == "x_embedder.proj.weight":
                official["pos_embed.proj.weight"] = folded(tensor, config.patch_size, config.in_channels)
            elif key == "modulation_out.bias":
                official["scale_shift_table"] = tensor
            elif block is not None and block[2] in tables:
                official[f"transformer_blocks.{block[1]}.{tables[block[2]]}"] = tensor
            else:
                official[renamed(self.name, key, outside, inside)] = tensor
        return official

    def complete(self, cases: Sequence[Case]) -> list[Case]:
        """Give the case of other proxies the inputs of the first one, and say so in them."""
        done: list[Case] = []
        for case in cases:
            if not case.inputs and "other_proxies" in case.name and done:
                flag = {"other_proxies": torch.tensor(True)}
                case = dataclasses.replace(case, inputs=done[0].inputs | flag)
            done.append(case)
        return done

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
        """Run `forward` of the release: all output channels, velocity picture - noise."""
        needed = {"hidden_states", "timestep", "encoder_hidden_states"}
        sizes = {"resolution", "aspect_ratio"}
        unknown = sorted(set(inputs) - needed - sizes - {"encoder_attention_mask", "other_proxies"})
        if unknown or not needed <= set(inputs):
            raise LayoutError(
                f"{self.name}: a case has {', '.join(sorted(needed))} and maybe a mask or sizes, "
                f"got {', '.join(sorted(inputs))}"
            )
        ours: Any = model
        with ExitStack() as stack:
            if "other_proxies" in inputs:
                _, settings = about(model)
                if "other_proxies" not in settings:
                    raise LayoutError(f"{self.name}: config.json does not say which are the other proxies")
                for block in ours.transformer_blocks:
                    stack.enter_context(patched(block.proxies, "counts", settings["other_proxies"]))
            sample = ours.predict(
                *(inputs[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")),
                inputs.get("encoder_attention_mask"),
                {name: inputs[name] for name in sizes if name in inputs},
            )
        return {"sample": sample.float()}

    def place(self, path: str) -> str | None:
        block = _BLOCK.fullmatch(path)
        if block is None:
            return "x_embedder" if path == "pos_embed" else _PLACES.get(path)
        inner = _BLOCK_PLACES.get(block[2])
        return None if inner is None else f"transformer_blocks.{block[1]}.{inner}".rstrip(".")

    def run_observed(self, model: nn.Module, case: Case) -> tuple[Tensors, Tensors]:
        """Run a case; what the released code keeps window after window is put in that order."""
        outputs, mids = super().run_observed(model, case)
        config: Any = model.config
        picture = case.inputs["hidden_states"]
        grid = Grid.of(picture, (1, config.patch_size, config.patch_size))
        ours: Any = model
        plain, shifted = Window(grid, ours.window), Window(grid, ours.window, shifted=True)
        for name, value in mids.items():
            block = _BLOCK.fullmatch(name)
            if name == "pos_embed":
                mids[name] = value + ours.positions(grid, value.device)
            elif block and block[2] in (*_WINDOWED, *_FLAT):
                cut = plain.split(value)
                mids[name] = (
                    cut if block[2] in _WINDOWED else cut.unflatten(0, (len(value), -1)).flatten(1, 2)
                )
            elif block and block[2] == "attn3":
                mids[name] = shifted.split(value)
        mask = shifted.mask(picture.device)
        if "shift_window_mask" in case.mids and mask is not None:
            mids["shift_window_mask"] = mask.float() - 1
        return outputs, mids

    def _our_name(self, key: str) -> str:
        block = _BLOCK.fullmatch(key)
        if key == "scale_shift_table":
            return "modulation_out.bias"
        if block is not None and block[2] in _TABLES:
            return f"transformer_blocks.{block[1]}.{_TABLES[block[2]]}"
        return renamed(self.name, key, _PLACES, _BLOCK_PLACES)


def _counts(window: Sequence[int], proxies: Sequence[int]) -> tuple[int, int]:
    """Return how many proxies a window has along its rows and columns; all frames of a window share one."""
    if len(window) != 3 or len(proxies) != 3 or min(*window, *proxies) < 1:
        raise LayoutError(
            f"PT-DiT: windows and proxies are three sides of at least 1, got {list(window)} and {list(proxies)}"
        )
    if proxies[1] > window[1] or proxies[2] > window[2]:
        raise LayoutError(f"PT-DiT: proxies {list(proxies)} are larger than the window {list(window)}")
    return window[1] // proxies[1], window[2] // proxies[2]


def _refuse(owner: str, given: Mapping[str, Any], width: int) -> None:
    """Raises: LayoutError for arguments under which the released code itself cannot run."""
    for name in ("in_channels", "sample_size", "frame", "patch_size", "cross_attention_dim"):
        if given[name] is None:
            raise LayoutError(f"{owner}: {name} must be given")
    if given["norm_type"] != "ada_norm_single":
        raise LayoutError(
            f"{owner}: norm_type must be ada_norm_single, the only one that the released code runs, got {given['norm_type']!r}"
        )
    if given["cross_attention_dim"] != width:
        raise LayoutError(
            f"{owner}: cross_attention_dim must be num_heads * head_dim = {width}, as its proxies have so many channels, "
            f"got {given['cross_attention_dim']}"
        )


def _table(model: nn.Module) -> Tensor:
    ours: Any = model
    side = ours.config.sample_size // ours.config.patch_size
    frames = ours.config.frames
    return ours.positions(Grid(frames, side, side)).unflatten(0, (frames, -1)).unsqueeze(0)
