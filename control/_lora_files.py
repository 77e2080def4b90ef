"""LoRA files of other code bases, recognised by their content, under the paths of the transformer at hand.

Names that the transformer knows are taken as they are (diffusers, peft, kohya's underscores, with or without prefix). Others
go through the converters of diffusers' own loader for the transformer's family, which are called and not rewritten.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from control._files import ControlFile
from control.base import Refused

_SIDE = re.compile(
    r"(?P<path>.+?)\.(?P<side>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.default)?\.(?P<part>weight|bias)"
)
_XLABS = re.compile(r"\.processor\.(?:qkv|proj)_lora\d?\.(?:down|up)\.weight$")
_PREFIXES = (
    "transformer.",
    "base_model.model.",
    "diffusion_model.",
    "model.",
    "lora_unet_",
    "lora_transformer_",
)
_UNREADABLE = {
    "lokr_": "a LoKr", "hada_": "a LoHa", "oft_": "an OFT", "dora_scale": "a DoRA", "lora_magnitude_vector": "a DoRA",
    "lora_mid": "a Tucker LoRA",
}  # fmt: skip
# What the keys of each family hold; the first that fits tells for what a file was made.
_FAMILIES = (
    ("Stable Diffusion (U-Net)", re.compile(r"(?:down|up|input|output|mid|middle)_blocks?[._]")),
    ("Qwen-Image", re.compile(r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mlp|mod)")),
    ("FLUX.2", re.compile(r"single_transformer_blocks[._]\d+[._]attn[._]to_qkv_mlp_proj|double_stream_modulation")),
    ("FLUX", re.compile(r"(?:double|single)_blocks[._]\d+|single_transformer_blocks[._]\d+")),
    ("Stable Diffusion 3", re.compile(r"joint_blocks[._]\d+|transformer_blocks[._]\d+[._]attn2?[._](?:add_[qkv]_proj|to_add_out)")),
    ("Wan", re.compile(r"blocks[._]\d+[._](?:self_attn|cross_attn|attn1[._]add)")),
    ("Lumina or Z-Image", re.compile(r"layers[._]\d+[._](?:attention|adaLN)")),
    ("a transformer with attn1 and attn2 (PixArt, Sana, LTX)", re.compile(r"transformer_blocks[._]\d+[._]attn[12][._]")),
    ("a transformer with transformer_blocks", re.compile(r"transformer_blocks[._]\d+[._]attn[._]")),
    ("a transformer with blocks", re.compile(r"blocks[._]\d+[._]attn[._]")),
    ("a text encoder", re.compile(r"text_encoder|lora_te")),
)  # fmt: skip


def is_lora(weights: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of a plain LoRA; a condition's LoRA (EasyControl) is none."""
    if any("_loras." in key for key in weights):
        return False
    return any(_SIDE.fullmatch(key) or _XLABS.search(key) for key in weights)


def unreadable(weights: Mapping[str, Tensor]) -> str | None:
    """Return what kin of a LoRA the keys are of, which is not read here."""
    return next((words for part, words in _UNREADABLE.items() if any(part in key for key in weights)), None)


def family_of(weights: Mapping[str, Tensor]) -> str:
    """Return in words for which family of networks a LoRA was made, by its keys."""
    for name, pattern in _FAMILIES:
        if any(pattern.search(key) for key in weights):
            return name
    return "an unknown network"


def translated(file: ControlFile, transformer: nn.Module) -> dict[str, Tensor]:
    """Return a file's weights as `<path>.lora_A.weight`, `<path>.lora_B.weight` (strength folded in), `<path>.weight`.

    Keys without a place stand there as they were. Raises: Refused for kin of a LoRA, and a broken file of a family.
    """
    kin = unreadable(file.weights)
    if kin is not None:
        raise Refused(f"{file.name} is {kin} and no plain LoRA; merge it into a model or convert it first")
    names = _names(transformer)
    weights = dict(file.weights)
    if not any((found := _SIDE.fullmatch(key)) and _placed(found["path"], names) for key in weights):
        weights = _converted(file, transformer)
    return _scaled(weights, _Scales(file), names)


def _converted(file: ControlFile, transformer: nn.Module) -> dict[str, Tensor]:
    """Let diffusers' loader for the transformer's family rename the keys; as they are where it has none."""
    from diffusers.loaders import lora_pipeline

    family = type(transformer).__name__.partition("Transformer")[0]
    loader: Any = getattr(lora_pipeline, f"{family}LoraLoaderMixin", None)
    if loader is None:
        return dict(file.weights)
    try:
        found = loader.lora_state_dict(dict(file.weights))
    except (
        Exception
    ) as error:  # a converter fails in many ways on a file that is not whole, or not of its family
        raise Refused(
            f"{file.name} is a LoRA for {family_of(file.weights)}, and diffusers cannot read it for "
            f"{type(transformer).__name__}: {type(error).__name__}: {error}"
        ) from error
    return dict(found[0] if isinstance(found, tuple) else found)


def _names(transformer: nn.Module) -> dict[str, str]:
    """Paths of modules by themselves and by kohya's spelling."""
    paths = [path.replace(".base_layer", "") for path, _ in transformer.named_modules() if path]
    return {path.replace(".", "_"): path for path in paths} | {path: path for path in paths}


def _placed(path: str, names: Mapping[str, str]) -> str | None:
    """The transformer's path for a path of a file, with any of the prefixes in use."""
    while path not in names:
        prefix = next((one for one in _PREFIXES if path.startswith(one)), None)
        if prefix is None:
            return None
        path = path.removeprefix(prefix)
    return names[path]


def _scaled(weights: Mapping[str, Tensor], scales: _Scales, names: Mapping[str, str]) -> dict[str, Tensor]:
    alphas = {
        key.removesuffix(".alpha"): float(x)
        for key, x in weights.items()
        if key.endswith(".alpha") and x.numel() == 1
    }
    ranks: dict[str, int] = {}
    found: dict[str, Tensor] = {}
    ups: list[tuple[str, str]] = []
    for key, x in weights.items():
        match = _SIDE.fullmatch(key)
        path = _placed(match["path"] if match else key.rpartition(".")[0], names)
        if path is None or (match is None and not key.endswith((".weight", ".alpha"))):
            found[key] = x
        elif match is None:
            if not key.endswith(".alpha"):
                found[f"{path}.weight"] = x
        else:
            down = match["side"] in ("lora_A", "lora_down", "lora.down")
            ours = f"{path}.lora_{'A' if down else 'B'}.{match['part']}"
            if ours in found:
                raise Refused(f"two keys of the file stand for {ours}, one of them {key}")
            found[ours] = x
            if down and match["part"] == "weight":
                ranks[path] = len(x)
            elif not down:
                ups.append((ours, match["path"]))
    for ours, theirs in ups:
        path = ours.rpartition(".lora_B.")[0]
        scale = scales.of(path, ranks.get(path, 1), alphas.get(theirs))
        if scale != 1:
            found[ours] = (found[ours].float() * scale).to(found[ours].dtype)
    return found


class _Scales:
    """By how much a file multiplies B A: alpha / rank, from its keys or from peft's settings in its metadata."""

    def __init__(self, file: ControlFile) -> None:
        try:
            given = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
            self.settings = {key.removeprefix("transformer."): value for key, value in dict(given).items()}
        except (ValueError, TypeError) as error:
            raise Refused(f"{file.name}: lora_adapter_metadata cannot be read: {error}") from error

    def of(self, path: str, rank: int, alpha: float | None) -> float:
        """Return the factor for the layer at a path; without any word of it alpha is the rank."""
        settings = self.settings
        if alpha is None and settings.get("lora_alpha") is not None:
            patterns = settings.get("alpha_pattern") or {}
            named = next((one for one in patterns if re.match(rf"(?:.*\.)?(?:{one})$", path)), None)
            alpha = float(settings["lora_alpha"] if named is None else patterns[named])
        if alpha is None:
            return 1.0
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        if not math.isfinite(scale):
            raise Refused(f"{path}: alpha {alpha} of rank {rank} is no factor")
        return scale


def replaced_norms(path: str, module: nn.Module, x: Tensor) -> bool:
    """Whether `x` replaces the weight of a norm of queries or keys, as released control LoRAs do."""
    weight: Any = getattr(module, "weight", None)
    last = path.rpartition(".")[2]
    return last.startswith("norm_") and isinstance(weight, torch.Tensor) and weight.shape == x.shape
