"""Weights of AMD-AGI/Nitro-E, the release of E-MMDiT.

Paper: E-MMDiT, Shen et al. 2025, arXiv:2510.27135.
Differs: the stored position table is checked and then dropped, we compute it; 1 x 1 convolutions become linear maps; the last
block's queries of the prompt, which nobody reads, are dropped.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dit.backbones.emmdit import EMMDiT
from dit.convert.base import (
    Case,
    LayoutError,
    System,
    Tensors,
    check_table,
    folded,
    laid_flat,
    observed,
    official_args,
    system,
)
from dit.grid import Grid, patchify
from dit.mixers.subregion import SubregionMixer
from dit.seams import patched

_DEFAULTS: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 1,
    "in_channels": 32,
    "num_layers": 24,
    "attention_head_dim": 32,
    "num_attention_heads": 24,
    "caption_channels": 2048,
    "caption_projection_dim": 768,
    "out_channels": 32,
    "interpolation_scale": None,
    "pos_embed_max_size": 96,
    "use_sub_attn": True,
    "qk_norm": "rms_norm",
    "repa_depth": -1,
    "projector_dim": 2048,
    "z_dims": [768],
}
_GROUPS = (4, 16, 4)  # the release fixes them in its constructor, whatever num_layers says
_PLACES = {
    "context_embedder": "context_embedder",
    "adaln_single": "modulation_shared",
    "adaln_single.linear": "modulation_shared.linear",
    "adaln_single.emb.timestep_embedder": "time_embed.timestep_embedder",
    "adaln_single.emb.timestep_embedder.linear_1": "time_embed.timestep_embedder.linear_1",
    "adaln_single.emb.timestep_embedder.linear_2": "time_embed.timestep_embedder.linear_2",
    "pos_embed.proj": "x_embedder.proj",
    "tokencompressor.0.0": "compressor",
    "tokencompressor.0.0.body2x.1": "compressor.paths.0.0",
    "tokencompressor.0.0.body2x.3": "compressor.paths.0.2",
    "tokencompressor.0.0.body4x.1": "compressor.paths.1.0",
    "tokencompressor.0.0.body4x.3": "compressor.paths.1.2",
    "tokenreconstructor.0.0": "reconstructor",
    "tokenreconstructor.0.0.body2x.1": "reconstructor.paths.0.0",
    "tokenreconstructor.0.0.body2x.3": "reconstructor.paths.0.2",
    "tokenreconstructor.0.0.body4x.1": "reconstructor.paths.1.0",
    "tokenreconstructor.0.0.body4x.3": "reconstructor.paths.1.2",
    "tokenreconstructor.0.0.mergers": "reconstructor.merger",
    "tokenreconstructor.0.0.mergers.0": "reconstructor.merger.0",
    "tokenreconstructor.0.0.mergers.2": "reconstructor.merger.2",
    "norm_out": "norm_out",
    "proj_out": "proj_out.proj",
}
_TABLES = {
    "scale_shift_bias": "modulation.bias",
    "scale_shift_scale": "modulation.scale",
    "scale_shift_bias_c": "modulation_context.bias",
    "scale_shift_scale_c": "modulation_context.scale",
}
_BLOCK = re.compile(r"block_groups\.(\d+)\.(\d+)\.(.+)")
_OURS = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_UNREAD = ("attn.add_q_proj.weight", "attn.add_q_proj.bias", "attn.norm_added_q.weight")
_TABLE = "pos_embed.pos_embed"


@system("Nitro-E")
class NitroSystem(System):
    """The released E-MMDiT, at any of its constructor's sizes."""

    def build(self, args: Mapping[str, Any], settings: Mapping[str, Any]) -> EMMDiT:
        """Return our E-MMDiT for the arguments of `EMMDiTTransformer`."""
        given = official_args(self.name, args, _DEFAULTS)
        width = given["attention_head_dim"] * given["num_attention_heads"]
        if given["caption_projection_dim"] != width:
            raise LayoutError(
                f"{self.name}: caption_projection_dim must be heads times head size, {width}, got {given['caption_projection_dim']}"
            )
        if given["qk_norm"] not in ("rms_norm", None):
            raise LayoutError(f"{self.name}: qk_norm is rms_norm or none, got {given['qk_norm']!r}")
        return EMMDiT(
            in_channels=given["in_channels"],
            out_channels=given["out_channels"] or given["in_channels"],
            patch_size=given["patch_size"],
            sample_size=given["sample_size"],
            width=width,
            heads=given["num_attention_heads"],
            groups=list(_GROUPS),
            ratios=[2, 4],
            context_dim=given["caption_channels"],
            qk_norm=given["qk_norm"] is not None,
            position_size=given["pos_embed_max_size"],
            position_scale=float(max(given["sample_size"] // 16, 1)),
            projection_dims=list(given["z_dims"]) if given["repa_depth"] != -1 else [],
            projection_hidden=given["projector_dim"],
            mixer="subregion" if given["use_sub_attn"] else "full",
        )

    def to_ours(self, state: Mapping[str, Tensor], model: nn.Module) -> Tensors:
        """Rename, lay convolutions flat, check the position table, drop what nobody reads."""
        config: Any = model.config
        ours: Tensors = {}
        if _TABLE not in state:
            raise LayoutError(f"{self.name}: {_TABLE} is missing; is this the official layout?")
        for key, tensor in state.items():
            if key == _TABLE:
                check_table(self.name, tensor, _table(model), key)
            elif (place := _to_ours(key, config.groups)) is None:
                raise LayoutError(f"{self.name}: unknown weight {key!r}")
            elif place == "x_embedder.proj.weight":
                ours[place] = laid_flat(tensor)
            elif place:
                flat = tensor.dim() == 4 and tensor.shape[2:] == (1, 1)
                ours[place] = tensor.flatten(1) if flat else tensor
        return ours

    def to_official(self, model: nn.Module) -> Tensors:
        """Undo `to_ours`; the last block's unread queries of the prompt come back as zeros, their norm as ones."""
        config: Any = model.config
        official: Tensors = {_TABLE: _table(model)}
        names = {place: path for path, place in _PLACES.items()}
        for key, tensor in model.state_dict().items():
            block = _OURS.fullmatch(key)
            path, _, leaf = key.rpartition(".")
            if block:
                group, index = _position(int(block[1]), config.groups)
                tables = {place: name for name, place in _TABLES.items()}
                official[f"block_groups.{group}.{index}.{tables.get(block[2], block[2])}"] = tensor
            elif key == "x_embedder.proj.weight":
                official["pos_embed.proj.weight"] = folded(tensor, config.patch_size, config.in_channels)
            elif path.startswith("projectors."):
                official[key] = tensor
            else:
                name = names[path]
                convolves = ".body" in name and leaf == "weight"
                official[f"{name}.{leaf}"] = tensor[..., None, None] if convolves else tensor
        return official | _unread(official, len(config.groups) - 1, config.groups[-1] - 1)

    def complete(self, cases: Sequence[Case]) -> list[Case]:
        """Give a case that names no picture the inputs of the case before it, and say in its inputs what its name says."""
        done: list[Case] = []
        for case in cases:
            inputs = (
                dict(case.inputs)
                if "hidden_states" in case.inputs or not done
                else _plain(done) | case.inputs
            )
            if "full_attention" in case.name:
                inputs["full_attention"] = torch.tensor(True)
            if "tokens" in case.outputs:
                inputs["training"] = torch.tensor(True)
            done.append(dataclasses.replace(case, inputs=inputs))
        return done

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
        """Run `forward`: the picture, or what it returns in training: tokens and the projected features."""
        needed = {"hidden_states", "encoder_hidden_states", "timestep"}
        unknown = sorted(set(inputs) - needed - {"skip_layers", "full_attention", "training"})
        if unknown or not needed <= set(inputs):
            raise LayoutError(
                f"{self.name}: a case has {', '.join(sorted(needed))} and maybe skip_layers, got {', '.join(sorted(inputs))}"
            )
        config: Any = model.config
        given: dict[str, Any] = {name: inputs[name] for name in needed}
        if "skip_layers" in inputs:
            given["skip_layers"] = [int(one) for one in inputs["skip_layers"].flatten()]
        with _full_attention(model, "full_attention" in inputs):
            if "training" not in inputs:
                return {"sample": model(**given, return_dict=False)[0]}
            sample, projections = model(**given, return_projections=True, return_dict=False)
        tokens = patchify(sample, (1, config.patch_size, config.patch_size))
        return {"tokens": tokens} | {f"zs.{i}": one for i, one in enumerate(projections)}

    def place(self, path: str) -> str | None:
        return _PLACES.get(path)

    def run_observed(self, model: nn.Module, case: Case) -> tuple[Tensors, Tensors]:
        """Run a case; blocks return two streams, and positions are added outside of any module."""
        config: Any = model.config
        blocks = dict(enumerate(model.get_submodule("transformer_blocks").children()))
        seen: Tensors = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
                seen[f"{name}.text"], seen[f"{name}.image"] = output

            return hook

        handles = [
            block.register_forward_hook(keep("block_groups.{}.{}".format(*_position(i, config.groups))))
            for i, block in blocks.items()
        ]
        places = {name: self.place(name) for name in case.mids} | {"pos_embed": "x_embedder"}
        try:
            with observed(
                model, {name: place for name, place in places.items() if place is not None}
            ) as mids:
                outputs = self.run(model, case.inputs)
        finally:
            for handle in handles:
                handle.remove()
        grid = Grid.of(case.inputs["hidden_states"], (1, config.patch_size, config.patch_size))
        network: Any = model
        mids["pos_embed"] = mids["pos_embed"] + network.positions(grid)
        return outputs, mids | seen


@contextmanager
def _full_attention(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Let every token hear every other inside, with the same weights."""
    with ExitStack() as stack:
        for one in model.modules() if wanted else ():
            if isinstance(one, SubregionMixer):
                stack.enter_context(patched(one, "groups", 1))
        yield


def _plain(cases: Sequence[Case]) -> Tensors:
    """The inputs of the last case that says nothing beside the picture, the prompt and the time."""
    found = next((case for case in reversed(cases) if len(case.inputs) == 3), cases[-1])
    return dict(found.inputs)


def _to_ours(key: str, groups: Sequence[int]) -> str | None:
    """Return our name of an official weight, "" for one that nobody reads, None for one that is not known."""
    block = _BLOCK.fullmatch(key)
    path, _, leaf = key.rpartition(".")
    if block is None:
        if path.startswith("projectors."):
            return key
        return f"{_PLACES[path]}.{leaf}" if path in _PLACES and leaf in ("weight", "bias") else None
    group, index, rest = int(block[1]), int(block[2]), block[3]
    if group >= len(groups) or index >= groups[group]:
        return None
    if rest in _UNREAD and (group, index) == (len(groups) - 1, groups[-1] - 1):
        return ""
    return f"transformer_blocks.{sum(groups[:group]) + index}.{_TABLES.get(rest, rest)}"


def _position(index: int, groups: Sequence[int]) -> tuple[int, int]:
    """Group and index within it of a block counted through the whole network."""
    for group, count in enumerate(groups):
        if index < count:
            return group, index
        index -= count
    raise IndexError(index)


def _unread(official: Tensors, group: int, index: int) -> Tensors:
    """The released last block has queries of the prompt, which change nothing."""
    found: Tensors = {}
    for name in _UNREAD:
        like = official.get(
            f"block_groups.{group}.{index}.{name.replace('add_q', 'add_k').replace('added_q', 'added_k')}"
        )
        if like is not None:
            found[f"block_groups.{group}.{index}.{name}"] = (
                torch.ones_like if "norm" in name else torch.zeros_like
            )(like)
    return found


def _table(model: Any) -> Tensor:
    """The stored position table: all places of the centred square."""
    side = model.config.position_size
    return model.positions(Grid(1, side, side)).unsqueeze(0)
