"""Names for sizes: `build("dit-xl/2")` gives the network of the papers, untrained.

Paper: Scalable Diffusion Models with Transformers, Peebles and Xie 2023, arXiv:2212.09748; SiT, Ma et al. 2024,
arXiv:2401.08740; LiT, Wang et al. 2025, arXiv:2501.12976; DiG, Zhu et al. 2024, arXiv:2405.18428; Stable Diffusion 3, Esser et
al. 2024, arXiv:2403.03206; Qihoo-T2X (PT-DiT), Wang et al. 2024, arXiv:2409.04005; E-MMDiT, Shen et al. 2025, arXiv:2510.27135;
VDT, Lu et al. 2023, arXiv:2305.13311; Mask^2DiT, Qi et al. 2025, arXiv:2503.19881; FLUX.1, Black Forest Labs 2024.
LinGen, Wang et al. 2024, arXiv:2412.09856.
Differs: the lingen-* presets have VDT's sizes, LinGen's own are not told; the mmdit-* presets have the sizes of SD3, SD3.5 and
FLUX.1, not their weights: for those use diffusers' own classes.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

# depth, width, heads; the sample size is that of 256 px pictures behind a codec that divides sides by 8
_DIT_SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}

_LIT_HEADS = {"s": 2, "b": 3, "l": 4, "xl": 4}
_DIG_HEADS = {"s": 6, "b": 12, "l": 16, "xl": 18}

# depth, width, heads of PT-DiT; and its windows (rows and columns in tokens) by the side of the picture in px
_PTDIT_SIZES = {"s": (10, 288, 6), "b": (12, 640, 10), "l": (28, 864, 12), "xl": (28, 1152, 16), "h": (30, 1440, 20)}
_PTDIT_WINDOWS = {256: 2, 512: 4, 1024: 8, 2048: 16}

_VDT_SIZES = {"s": (12, 384, 6), "l": (28, 1152, 16)}

_SD3 = {
    "in_channels": 16, "patch_size": 2, "sample_size": 128, "context_dim": 4096, "pooled_dim": 2048, "single_depth": 0,
    "position": "sincos",
}  # fmt: skip

_NITRO_E = {
    "backbone": "emmdit", "in_channels": 32, "patch_size": 1, "sample_size": 16, "width": 768, "heads": 24,
    "groups": [4, 16, 4], "context_dim": 2048, "position_size": 96,
}  # fmt: skip


def _dit(family: str, size: str, patch: int) -> dict[str, Any]:
    depth, width, heads = _DIT_SIZES[size]
    return {
        "backbone": "dit", "in_channels": 4, "sample_size": 32, "patch_size": patch, "depth": depth, "width": width,
        "heads": heads, "num_classes": 1000, "learn_sigma": True, "convention": {"dit": "ddpm", "sit": "sit"}[family],
    }  # fmt: skip


def _vdt(size: str) -> dict[str, Any]:
    depth, width, heads = _VDT_SIZES[size]
    return {
        "backbone": "vdt", "in_channels": 4, "sample_size": 32, "patch_size": 2, "frames": 16, "depth": depth, "width": width,
        "heads": heads, "num_classes": 1000, "default_class": 0, "learn_sigma": True, "convention": "ddpm",
    }  # fmt: skip


def _lingen(size: str) -> dict[str, Any]:
    depth, width, heads = _VDT_SIZES[size]
    return {
        "backbone": "vdt", "in_channels": 4, "sample_size": 64, "patch_size": 2, "frames": 16, "depth": depth, "width": width,
        "heads": heads, "context_dim": 4096, "mixer": "lingen",
    }  # fmt: skip


def _ptdit(size: str, side: int, **changes: Any) -> dict[str, Any]:
    depth, width, heads = _PTDIT_SIZES[size]
    return {
        "backbone": "ptdit", "in_channels": 4, "out_channels": 8, "sample_size": side // 8, "patch_size": 2, "depth": depth,
        "width": width, "heads": heads, "context_dim": 4096,
        "mixer": {"name": "proxy", "height": _PTDIT_WINDOWS[side], "width": _PTDIT_WINDOWS[side]},
    } | changes  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    f"{family}-{size}/{patch}": _dit(family, size, patch)
    for family in ("dit", "sit")
    for size in _DIT_SIZES
    for patch in (2, 4, 8)
} | {
    f"switch-dit-{size}/2": _dit("dit", size, 2) | {"experts": "switch"} for size in _DIT_SIZES
} | {
    f"lit-{size}/2": _dit("dit", size, 2) | {"mixer": f"linear:heads={heads}"} for size, heads in _LIT_HEADS.items()
} | {
    f"dig-{size}/2": _dit("dit", size, 2) | {"backbone": "dig", "heads": heads} for size, heads in _DIG_HEADS.items()
} | {
    f"pt-dit-{size}/{side}": _ptdit(size, side) for size in _PTDIT_SIZES for side in _PTDIT_WINDOWS
} | {
    f"vdt-{size}/2": _vdt(size) for size in _VDT_SIZES
} | {
    f"lingen-{size}/2": _lingen(size) for size in _VDT_SIZES
} | {
    # as released: 1024 px, positions of a network made for 256; clips of 96 frames behind a codec that divides them by 4
    "qihoo-t2i": _ptdit("xl", 1024, sample_size=32, convention="release", mixed_times=True),
    "qihoo-t2v": _ptdit("xl", 512, frames=24, mixer={"name": "proxy", "frames": 4, "height": 4, "width": 4}),
} | {
    "mmdit-sd3": _SD3 | {"backbone": "mmdit", "width": 1536, "heads": 24, "dual_depth": 24, "qk_norm": False},
    "mmdit-sd3.5-l": _SD3 | {"backbone": "mmdit", "width": 2432, "heads": 38, "dual_depth": 38, "qk_norm": True},
    "mmdit-flux": {
        "backbone": "mmdit", "in_channels": 16, "patch_size": 2, "sample_size": 128, "width": 3072, "heads": 24,
        "dual_depth": 19, "single_depth": 38, "context_dim": 4096, "pooled_dim": 768, "qk_norm": True, "position": "rope",
        "rope_axes": (16, 56, 56), "guidance_embeds": True,
    },
    "nitro-e": _NITRO_E,
    "nitro-e-1024": _NITRO_E | {"sample_size": 32, "position_scale": 2.0, "mixer": "full"},
    "emmdit-emoji": {
        "backbone": "emmdit", "in_channels": 3, "patch_size": 2, "sample_size": 32, "width": 160, "heads": 5,
        "groups": [1, 4, 1], "context_dim": 384, "pooled_dim": 384, "prediction_type": "sample",
    },
    "mask2dit-5b": {
        "backbone": "mask2dit", "in_channels": 16, "patch_size": 2, "sample_height": 60, "sample_width": 90, "frames": 13,
        "width": 3072, "depth": 42, "heads": 48, "context_dim": 4096, "caption_length": 226,
    },
    "emoji": {
        "backbone": "mmdit", "in_channels": 3, "patch_size": 4, "sample_size": 32, "width": 256, "heads": 4,
        "dual_depth": 4, "single_depth": 6, "context_dim": 384, "pooled_dim": 384, "qk_norm": True, "position": "both",
        "rope_theta": 100.0, "prediction_type": "sample",
    },
}  # fmt: skip
"""Preset name -> `backbone` (the module of `dit.backbones`) and the arguments of its class."""

BACKBONES = {
    "dit": "DiT", "mmdit": "MMDiT", "emmdit": "EMMDiT", "ptdit": "PTDiT", "dig": "DiG", "vdt": "VDT", "mask2dit": "Mask2DiT",
}  # fmt: skip
"""Module of `dit.backbones` -> the class of the network in it."""


def backbone_class(name: str) -> Any:
    """Return the class of a backbone by the name of its module. Raises: ValueError naming those there are."""
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; there are: {', '.join(BACKBONES)}")
    return getattr(importlib.import_module(f"dit.backbones.{name}"), BACKBONES[name])


def settings(name: str) -> dict[str, Any]:
    """Return a copy of a preset's settings, `backbone` among them. Raises: ValueError naming the nearest preset."""
    key = name.lower()
    if key not in PRESETS:
        close = difflib.get_close_matches(key, list(PRESETS), n=1, cutoff=0.0)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown preset {name!r}{hint}; there are: {', '.join(PRESETS)}")
    return dict(PRESETS[key])


def build(name: str, **changes: Any) -> Any:
    """Return the untrained network of a preset, with some settings changed; under `torch.device("meta")` without memory.

    Raises: ValueError for an unknown preset, naming the nearest one, or for changes that do not fit.
    """
    chosen = settings(name)
    cls = backbone_class(chosen.pop("backbone"))
    unknown = sorted(set(changes) - set(cls._get_init_keys(cls)))
    if unknown:
        raise ValueError(f"{name}: {cls.__name__} has no setting {unknown[0]!r}")
    return cls(**(chosen | changes))
