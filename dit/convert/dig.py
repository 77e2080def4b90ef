"""Weights of hustvl/DiG: the layout of DiT with gated linear attention, a gated perceptron and a convolution in every block.

Code: hustvl/DiG (MIT), commit e3ac0ba.
Differs: the released blocks hand on a sequence that is turned around; ours stays, so convolutions are turned once, here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dit.backbones.dig import DiG
from dit.convert.base import Case, LayoutError, Tensors, official_args, system
from dit.convert.dit import DEFAULTS, DiTSystem
from dit.grid import Grid
from dit.mixers.gated import Gated, scan_index

_DEFAULTS: dict[str, Any] = {name: one for name, one in DEFAULTS.items() if name != "mlp_ratio"} | {
    "expand_k": 0.5, "expand_v": 1, "hidden_act": "swish", "bid_mode": "layer", "if_dw_conv": False, "if_quad_dir": False,
    "conv_kernel_size": 3, "if_in_block_conv": False, "if_rms_norm": False, "if_skip": False, "if_fuse_norm": True,
}  # fmt: skip
_WITHOUT_EFFECT = (
    "mlp_ratio", "enable_flashattn", "enable_layernorm_kernel", "enable_modulate_kernel", "sequence_parallel_size",
    "sequence_parallel_group", "sequence_parallel_type", "dtype", "use_video", "text_encoder", "attn_model", "use_dirpe",
    "if_norm_qkv", "if_scale_qkv", "if_old", "if_zero_init_skip", "gate_low_rank_dim", "gate_logit_normalizer",
)  # fmt: skip
"""Arguments that the released constructor takes and that change neither its weights nor what it computes."""

_CYCLES = {
    (True, True): "four",
    (True, False): "reversing",
    (False, True): "transposing",
    (False, False): "row",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_PARTS = {
    "attn.q_proj": "attn.to_q",
    "attn.k_proj": "attn.to_k",
    "attn.v_proj": "attn.to_v",
    "attn.g_proj": "attn.to_g",
    "attn.gk_proj.0": "attn.to_gate.0",
    "attn.gk_proj.1": "attn.to_gate.1",
    "attn.o_proj": "attn.to_out.0",
    "attn.g_norm_swish_gate": "attn.norm_out",
    "attn.g_norm": "attn.norm_out",
    "mlp.gate_proj": "ff.proj_in",
    "mlp.down_proj": "ff.proj_out",
    "adaLN_modulation.1": "modulation.linear",
    "dw_conv": "conv",
    "skip_linear": "skip",
    "norm1": "norm1",
    "norm2": "norm2",
}
_TWINS = {"attn_norm": "norm1", "mlp_norm": "norm2"}
"""With RMS norms the released state holds every norm under two names."""


@system("DiG")
class DiGSystem(DiTSystem):
    """The released DiG: noise and variance at steps 0..999."""

    tolerance = 2e-5

    def build(self, args: Mapping[str, Any], settings: Mapping[str, Any]) -> DiG:
        """Return our DiG for the arguments of `models_dig.DiG`."""
        given = official_args(
            self.name, {k: v for k, v in args.items() if k not in _WITHOUT_EFFECT}, _DEFAULTS
        )
        if given["bid_mode"] not in ("layer", "seq"):
            raise LayoutError(f"{self.name}: bid_mode is layer or seq, got {given['bid_mode']!r}")
        if given["hidden_act"] not in ("swish", "silu"):
            raise LayoutError(f"{self.name}: hidden_act is swish, got {given['hidden_act']!r}")
        if given["num_classes"] < 1:
            raise LayoutError(
                f"{self.name}: a network without classes is not read, got num_classes={given['num_classes']}"
            )
        scan = _CYCLES[given["bid_mode"] == "layer", bool(given["if_quad_dir"])]
        convolution: Any = "none"
        if given["if_dw_conv"]:
            convolution = "inside" if given["if_in_block_conv"] else "after"
        model = DiG(
            **self.our_args({name: given[name] for name in DEFAULTS if name in given}),
            mixer=Gated(scan=scan, expand_k=float(given["expand_k"]), expand_v=float(given["expand_v"])),
            convolution=convolution,
            kernel=given["conv_kernel_size"],
            rms_norm=bool(given["if_rms_norm"]),
            skip="as-scanned" if given["if_skip"] else "none",
            restore=False,
        )
        fused = given["hidden_act"] == "swish" and given["if_fuse_norm"]
        model.official_norm = "attn.g_norm_swish_gate" if fused else "attn.g_norm"
        return model

    def to_ours(self, state: Mapping[str, Tensor], model: nn.Module) -> Tensors:
        """Rename, drop the second names of norms, turn the convolutions to the order of the rows."""
        assert isinstance(model, DiG)
        rest: Tensors = {}
        ours: Tensors = {}
        for key, tensor in state.items():
            block = _BLOCK.fullmatch(key)
            if block is None:
                rest[key] = tensor
            elif block[2] in _TWINS:
                twin = state.get(f"blocks.{block[1]}.{_TWINS[block[2]]}.{block[3]}")
                if twin is None or twin.shape != tensor.shape:
                    raise LayoutError(f"{self.name}: {key} is there, and {_TWINS[block[2]]} is not")
            elif block[2] not in _PARTS:
                raise LayoutError(f"{self.name}: unknown weight {key!r}")
            else:
                name = f"transformer_blocks.{block[1]}.{_PARTS[block[2]]}.{block[3]}"
                ours[name] = _turned(tensor, model.order(int(block[1]))) if block[2] == "dw_conv" else tensor
        return ours | super().to_ours(rest, model)

    def to_official(self, model: nn.Module) -> Tensors:
        """Rename back, with the second names of norms; turn the convolutions to the scan of their block."""
        assert isinstance(model, DiG)
        names = {ours: theirs for theirs, ours in _PARTS.items() if not theirs.startswith("attn.g_norm")}
        names["attn.norm_out"] = getattr(model, "official_norm", "attn.g_norm_swish_gate")
        twins = {ours: theirs for theirs, ours in _TWINS.items()}
        official: Tensors = {}
        rest: Tensors = {}
        for key, tensor in model.state_dict().items():
            block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)", key)
            if block is None:
                rest[key] = tensor
                continue
            turned = _turned(tensor, model.order(int(block[1]))) if block[2] == "conv" else tensor
            for name in [names[block[2]], *([twins[block[2]]] if block[2] in twins else [])]:
                official[f"blocks.{block[1]}.{name}.{block[3]}"] = turned
        return official | self.official_of(model, rest)

    def run_observed(self, model: nn.Module, case: Case) -> tuple[Tensors, Tensors]:
        """Watch the blocks, and hand out their tokens in the order in which the released block saw them."""
        assert isinstance(model, DiG)
        outputs, mids = super().run_observed(model, case)
        side = model.config.sample_size // model.config.patch_size
        for name, tensor in mids.items():
            block = re.fullmatch(r"blocks\.(\d+)", name)
            if block:
                index = scan_index(model.order(int(block[1])), Grid(1, side, side), 0, side**2, tensor.device)
                mids[name] = tensor if index is None else tensor[:, index]
        return outputs, mids

    def place(self, path: str) -> str | None:
        block = re.fullmatch(r"blocks\.(\d+)(?:\.(.+))?", path)
        if block is None or block[2] is None or block[2] in ("attn", "mlp"):
            return super().place(path)
        return f"transformer_blocks.{block[1]}.{_PARTS[block[2]]}" if block[2] in _PARTS else None


def _turned(tensor: Tensor, order: str) -> Tensor:
    """A convolution over the grid of a scan as one over the rows, or back; what has no sides (a bias) stays as it is."""
    if tensor.dim() != 4:
        return tensor
    if order.endswith("column"):
        tensor = tensor.mT
    return (tensor.flip(-1, -2) if order.startswith("reversed") else tensor).contiguous()
