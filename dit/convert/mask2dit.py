"""Weights of Mask2DiT as its authors released them.

Paper: Mask^2DiT, Qi et al. 2025, arXiv:2503.19881. Code: Tianhao-Qi/Mask2DiT, commit 36bbe26, Apache-2.0.
Differs: clips are [B, C, F, H, W] with us, [B, F, C, H, W] there; the release knows two times, of one scene and of all others,
where we take one a scene.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dit.backbones.mask2dit import Mask2DiT
from dit.convert.base import Case, LayoutError, System, Tensors, about, official_args, renamed, system
from dit.grid import Grid
from dit.mixers.full import FullMixer
from dit.mixers.scenes import ScenesMixer
from dit.model import Context
from dit.positions import still
from dit.seams import patched

_DEFAULTS: dict[str, Any] = {
    "attn_msk_version": 2,
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "num_layers": 30,
    "dropout": 0.0,
    "attention_bias": True,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "patch_size": 2,
    "patch_size_t": None,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 226,
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "spatial_interpolation_scale": 1.875,
    "temporal_interpolation_scale": 1.0,
    "use_rotary_positional_embeddings": False,
    "use_learned_positional_embeddings": False,
    "patch_bias": True,
    "add_noise_in_inpaint_model": False,
}
_MASKS = {2: "scenes", 5: "full"}
_PLACES = {
    "patch_embed.proj": "x_embedder.proj",
    "patch_embed.text_proj": "context_embedder",
    "time_embedding": "time_embed.timestep_embedder",
    "norm_final": "norm_final",
    "norm_out.linear": "modulation_out.linear",
    "norm_out.norm": "norm_out",
    "proj_out": "proj_out.proj",
}
_BLOCK_PLACES = {
    "norm1.linear": "modulation1.linear",
    "norm1.norm": "norm1",
    "attn1": "attn",
    "norm2.linear": "modulation2.linear",
    "norm2.norm": "norm2",
    "ff": "ff",
}
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_TABLE, _PATCH_BIAS = "patch_embed.pos_embedding", "patch_embed.proj.bias"
_TIME = "time_embedding.linear_1.weight"
_ATTENTION = {"video", "text"}
_KNOWN = {
    "hidden_states", "encoder_hidden_states", "timestep", "rope_cos", "rope_sin", "clip_idx", "timestep_conditioning", "case",
    "everything",
}  # fmt: skip


@system("Mask2DiT")
class Mask2DiTSystem(System):
    """The released multi-scene CogVideoX: the symmetric mask of captions and scenes, or all pairs for comparison."""

    tolerance = 1e-5

    def build(self, args: Mapping[str, Any], settings: Mapping[str, Any]) -> Mask2DiT:
        """Return our Mask2DiT for the arguments of `MultiPromptCogVideoXTransformer3DModel`."""
        given = official_args(self.name, args, _DEFAULTS)
        _refuse(self.name, given)
        learned, rotary = (given[f"use_{kind}_positional_embeddings"] for kind in ("learned", "rotary"))
        model = Mask2DiT(
            in_channels=given["in_channels"],
            out_channels=given["out_channels"],
            patch_size=given["patch_size"],
            patch_frames=given["patch_size_t"] or 1,
            sample_height=given["sample_height"],
            sample_width=given["sample_width"],
            frames=(given["sample_frames"] - 1) // given["temporal_compression_ratio"] + 1,
            width=given["num_attention_heads"] * given["attention_head_dim"],
            depth=given["num_layers"],
            heads=given["num_attention_heads"],
            time_dim=given["time_embed_dim"],
            context_dim=given["text_embed_dim"],
            caption_length=given["max_text_seq_length"],
            position="stored" if learned else "rope" if rotary else "sincos",
            spatial_scale=given["spatial_interpolation_scale"],
            frame_scale=given["temporal_interpolation_scale"],
            attention_bias=given["attention_bias"],
            norm_affine=given["norm_elementwise_affine"],
            norm_eps=given["norm_eps"],
            mixer=_MASKS[given["attn_msk_version"]],
            experts={"name": "dense", "activation": given["activation_fn"]},
        )
        model.official_settings = given | dict(settings)
        return model

    def to_ours(self, state: Mapping[str, Tensor], model: nn.Module) -> Tensors:
        """Rename; order the values of a patch (frame, row, column, channel) on both sides."""
        config, given = about(model)
        ours: Tensors = {}
        for key, tensor in state.items():
            if key == _TABLE and config.position == "stored":
                ours["pos_embed"] = tensor.squeeze(0)
            elif key == "patch_embed.proj.weight":
                flat = tensor.flatten(1).unflatten(1, (config.in_channels, -1))  # a convolution, or laid flat
                ours["x_embedder.proj.weight"] = flat.transpose(1, 2).flatten(1).contiguous()
            elif key in ("proj_out.weight", "proj_out.bias"):
                ours[f"proj_out.proj{key.removeprefix('proj_out')}"] = _patches_out(tensor, config)
            elif key == _TIME:
                ours[renamed(self.name, key, _PLACES, _BLOCK_PLACES)] = _waves(tensor, given)
            else:
                ours[renamed(self.name, key, _PLACES, _BLOCK_PLACES)] = tensor
        if _unbiased(given) and "x_embedder.proj.weight" in ours and _PATCH_BIAS not in state:
            ours["x_embedder.proj.bias"] = ours["x_embedder.proj.weight"].new_zeros(config.width)
        return ours

    def to_official(self, model: nn.Module) -> Tensors:
        """Undo `to_ours`."""
        config, given = about(model)
        outside = {place: path for path, place in _PLACES.items()}
        inside = {place: path for path, place in _BLOCK_PLACES.items()}
        official: Tensors = {}
        for key, tensor in model.state_dict().items():
            if key == "pos_embed":
                official[_TABLE] = tensor.unsqueeze(0)
            elif key == "x_embedder.proj.weight":
                flat = tensor.unflatten(1, (-1, config.in_channels)).transpose(1, 2).flatten(1).contiguous()
                plane = (config.in_channels, config.patch_size, config.patch_size)
                laid = config.patch_frames > 1 or given.get("patch_size_t") is not None
                official["patch_embed.proj.weight"] = flat if laid else flat.unflatten(1, plane)
            elif key.startswith("proj_out.proj."):
                official[f"proj_out.{key.rpartition('.')[2]}"] = _patches_out(tensor, config, back=True)
            else:
                official[renamed(self.name, key, outside, inside)] = tensor
        official[_TIME] = _waves(official[_TIME], given)
        if _unbiased(given):
            del official[_PATCH_BIAS]
        return official

    def complete(self, cases: Sequence[Case]) -> list[Case]:
        """Give every case what it leaves to the first whole one, and say which takes which scene or no mask."""
        whole = next((case.inputs for case in cases if "hidden_states" in case.inputs), {})
        done = []
        for case in cases:
            if not set(case.inputs) >= _ATTENTION:
                alone = {"everything": torch.tensor(True)} if not case.inputs else {}
                number = re.search(r"\d+$", case.name)
                alone["case"] = torch.tensor(int(number[0]) if number else -1)
                case = dataclasses.replace(case, inputs=whole | case.inputs | alone)
            elif "rope_cos" in whole:
                table = {name: whole[name] for name in ("rope_cos", "rope_sin")}
                case = dataclasses.replace(case, inputs=table | case.inputs)
            done.append(case)
        return done

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
        """Run the network, or the attention of its first block."""
        if set(inputs) >= _ATTENTION:
            return self._attention(model, inputs)
        unknown = sorted(set(inputs) - _KNOWN)
        if unknown or not {"hidden_states", "encoder_hidden_states", "timestep"} <= set(inputs):
            raise LayoutError(
                f"{self.name}: a case has hidden_states, encoder_hidden_states, timestep, maybe a rotary table, a scene and "
                f"its other time, or video and text; got {', '.join(sorted(inputs))}"
            )
        ours: Any = model
        with ExitStack() as stack:
            if "everything" in inputs:
                for block in ours.transformer_blocks:
                    whole = FullMixer.told.__get__(block.attn)
                    stack.enter_context(patched(block.attn, "told", whole))
            sample = ours(
                hidden_states=inputs["hidden_states"].transpose(1, 2),
                timestep=_times(ours, inputs)[0],
                encoder_hidden_states=inputs["encoder_hidden_states"],
                image_rotary_emb=_table(inputs),
            ).sample
        return {"sample": sample.transpose(1, 2).float()}

    def _attention(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
        """The first block's attention alone: joint inputs, its answers, and who hears whom."""
        ours: Any = model
        text, video = inputs["text"], inputs["video"]
        scenes = max(1, text.shape[1] // int(ours.config.caption_length))
        grid = Grid(scenes, 1, video.shape[1] // scenes)
        context = Context(
            grid,
            video,
            rotary=still(_table(inputs), text.shape[1]),
            length=text.shape[1],
            segments=ours.segments(grid, text.shape[1]),
        )
        out = ours.transformer_blocks[0].attn(hidden_states=torch.cat([text, video], dim=1), context=context)
        mask = context.segments.mask() if context.segments is not None else torch.ones(0)
        if not isinstance(ours.transformer_blocks[0].attn, ScenesMixer):
            mask = torch.ones_like(mask)
        return {"text": out[:, : text.shape[1]], "video": out[:, text.shape[1] :], "mask": mask.int()}

    def place(self, path: str) -> str | None:
        block = _BLOCK.fullmatch(path)
        if block is None:
            return _PLACES.get(path)
        inner = _BLOCK_PLACES.get(block[2])
        return None if inner is None else f"transformer_blocks.{block[1]}.{inner}"

    def run_observed(self, model: nn.Module, case: Case) -> tuple[Tensors, Tensors]:
        """Run a case; the streams are watched where they enter the blocks and where they leave them."""
        ours: Any = model
        mids: Tensors = {}

        def entered(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
            both = [given["encoder_hidden_states"], given["hidden_states"]]
            mids["patch_embed"] = torch.cat(both, dim=1)

        def left(index: int) -> Any:
            def hook(_: nn.Module, __: Any, out: tuple[Tensor, Tensor]) -> None:
                mids[f"blocks.{index}.text"], mids[f"blocks.{index}.video"] = out

            return hook

        handles = [ours.transformer_blocks[0].register_forward_pre_hook(entered, with_kwargs=True)]
        handles += [one.register_forward_hook(left(i)) for i, one in enumerate(ours.transformer_blocks)]
        try:
            outputs = self.run(model, case.inputs)
        finally:
            for handle in handles:
                handle.remove()
        if "timestep" in case.inputs:
            mids["time_embedding"] = ours.embed_time(case.inputs["timestep"], ours.dtype)
        if "timestep_conditioning" in case.inputs:
            other = case.inputs["timestep_conditioning"]
            mids["time_embedding_conditioning"] = ours.embed_time(other, ours.dtype)
        return outputs, mids


def _unbiased(given: Mapping[str, Any]) -> bool:
    """Whether the release has no bias where it cuts patches; where these have several frames it always has one."""
    return not given.get("patch_bias", True) and given.get("patch_size_t") is None


def _times(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, int | None]:
    """Return the time of every scene, [B] or [B, S], and the scene that stands out."""
    time = inputs["timestep"]
    if "timestep_conditioning" not in inputs:
        return time, None
    config, given = about(model)
    scenes = max(1, inputs["encoder_hidden_states"].shape[1] // int(config.caption_length))
    index = given.get(f"case{int(inputs['case'])}_clip_idx", scenes - 1) if "case" in inputs else scenes - 1
    index = int(inputs["clip_idx"]) if "clip_idx" in inputs else int(index)
    other = inputs["timestep_conditioning"]
    times = other.to(torch.promote_types(other.dtype, time.dtype)).reshape(-1, 1).repeat(1, scenes)
    times = times.repeat(len(time) // len(times), 1)
    times[:, index] = time.to(times.dtype)
    return times, index


def _table(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    return (inputs["rope_cos"], inputs["rope_sin"]) if "rope_cos" in inputs else None


def _patches_out(tensor: Tensor, config: Any, *, back: bool = False) -> Tensor:
    """Turn the order of a patch's values (channel, frame, row, column) into ours, channel last; or `back`."""
    channels = int(config.out_channels or config.in_channels)
    values = tensor.shape[0] // channels
    cut = (values, channels) if back else (channels, values)
    return tensor.unflatten(0, cut).transpose(0, 1).flatten(0, 1).contiguous()


def _waves(tensor: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Order the inputs of the time's first map: ours are cosines, then sines."""
    if given.get("flip_sin_to_cos", True):
        return tensor
    half = tensor.shape[1] // 2
    return torch.cat([tensor[:, half:], tensor[:, :half]], dim=1)


def _refuse(owner: str, given: Mapping[str, Any]) -> None:
    """Raises: LayoutError for arguments that the released code or ours cannot run."""
    rotary, learned = (given[f"use_{kind}_positional_embeddings"] for kind in ("rotary", "learned"))
    wrong = {
        "attn_msk_version": given["attn_msk_version"] not in _MASKS and "2 or 5, the only ones that the released code has",
        "freq_shift": given["freq_shift"] != 0 and "0",
        "timestep_activation_fn": given["timestep_activation_fn"] != "silu" and "silu",
        "use_learned_positional_embeddings": learned and not rotary and "False without rotary positions",
        "patch_size_t": given["patch_size_t"] is not None and (not rotary or learned)
        and "None without rotary positions or with learned ones",
    }  # fmt: skip
    for name, allowed in wrong.items():
        if allowed:
            raise LayoutError(f"{owner}: {name} must be {allowed}, got {given[name]!r}")
