"""DyDiT's released layout: DiT's, plus two width gates and a token gate a block.

Code: alibaba-damo-academy/DyDiT, class-to-image part, commit 0ddc509 (no licence file; facts alone are taken from it).
Differs: its inference multiplies by masks; ours leaves out what is off, which is the same picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dit.backbones.dit import DiT
from dit.convert.base import Case, LayoutError, Tensors, about, system
from dit.convert.dit import DiTSystem
from dit.experts.dynamic import StraightThrough, WidthRouter, complete, spent_share
from dit.seams import patched

_PARTS = {
    "attn_rate.router": "router.heads",
    "mlp_rate.router": "router.groups",
    "token_selection.mlp_head.0": "ff.tokens.0",
    "token_selection.mlp_head.2": "ff.tokens.2",
}
_KEY = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_OURS = re.compile(r"transformer_blocks\.(\d+)\.((?:router|ff\.tokens)\..+)\.(weight|bias)")
_WIDTHS = {"S": 384, "B": 768, "L": 1024, "XL": 1152}
_PLAIN = {"x", "t", "y"}


@system("DyDiT")
class DyDiTSystem(DiTSystem):
    """The released class-to-image DyDiT: noise and variance at steps 0..999, guidance of three channels."""

    tolerance = 1e-5

    def build(self, args: Mapping[str, Any], settings: Mapping[str, Any]) -> DiT:
        """Return our DiT with dynamic experts; `settings` may hold tau, flops_model, token_target_ratio, token_loss_ratio."""
        experts = {
            "name": "dynamic",
            "target": settings.get("token_target_ratio", 0.5),
            "temperature": settings.get("tau", 5),
            "weight": settings.get("token_loss_ratio", 2.0),
        }
        made = DiT(**self.our_args(args), experts=experts)
        made.official_settings = {"class_dropout_prob": args.get("class_dropout_prob", 0.1)} | dict(settings)
        return made

    def to_ours(self, state: Mapping[str, Tensor], model: nn.Module) -> Tensors:
        """Rename the gates and read the rest as a DiT."""
        rest, ours = {}, {}
        for key, tensor in state.items():
            found = _KEY.fullmatch(key)
            if found and found[2] in _PARTS:
                if not tensor.numel():  # the width gates of a network of one head, which choose nothing
                    continue
                ours[f"transformer_blocks.{found[1]}.{_PARTS[found[2]]}.{found[3]}"] = tensor
            else:
                rest[key] = tensor
        return ours | super().to_ours(rest, model)

    def to_official(self, model: nn.Module) -> Tensors:
        """Write the gates under their official names and the rest as a DiT."""
        names = {ours: theirs for theirs, ours in _PARTS.items()}
        config: Any = model.config
        gates: Tensors = {}
        rest: Tensors = {}
        if config.heads == 1:
            none = next(model.parameters()).new_empty(0, config.width)
            for i in range(config.depth):
                for gate in ("attn_rate", "mlp_rate"):
                    path = f"blocks.{i}.{gate}.router"
                    gates |= {f"{path}.weight": none, f"{path}.bias": none[:, 0]}
        for key, tensor in model.state_dict().items():
            found = _OURS.fullmatch(key)
            if found:
                gates[f"blocks.{found[1]}.{names[found[2]]}.{found[3]}"] = tensor
            else:
                rest[key] = tensor
        return gates | self.official_of(model, rest)

    def complete(self, cases: Sequence[Case]) -> list[Case]:
        """Mark the cases of the complete network: they have no draws, no guidance, and record no masks."""
        for case in cases:
            if set(case.inputs) == _PLAIN and set(case.outputs) == {"model"}:
                case.inputs["complete_model"] = torch.tensor(True)
        return list(cases)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
        """Run `forward` in evaluation or, with recorded draws, in training; guided; or complete."""
        known = _PLAIN | {"cfg_scale", "rand_label", "complete_model"}
        if not set(inputs) >= _PLAIN or any(
            name not in known and not name.startswith("exp.") for name in inputs
        ):
            raise LayoutError(
                f"{self.name}: a case has x, t, y, maybe cfg_scale or draws, got {', '.join(sorted(inputs))}"
            )
        plain = {name: inputs[name] for name in _PLAIN}
        if "cfg_scale" in inputs:
            return super().run(model, plain | {"cfg_scale": inputs["cfg_scale"]})
        if "complete_model" in inputs:
            with complete(model):
                return super().run(model, plain)
        if "rand_label" not in inputs:
            with _watched(model) as seen:
                made = super().run(model, plain)
            return made | seen()
        config, settings = about(model)
        if config.null_class:
            dropped = inputs["rand_label"] < settings.get("class_dropout_prob", 0.1)
            plain["y"] = torch.where(dropped, config.num_classes, plain["y"])
        model.train()
        try:
            with _drawn(model, inputs), _watched(model) as seen:
                made = super().run(model, plain)
        finally:
            model.eval()
        masks = seen()
        return made | masks | _budget(settings, config, masks)

    def run_observed(self, model: nn.Module, case: Case) -> tuple[Tensors, Tensors]:
        """Watch the token gates beside the blocks."""
        seen: Tensors = {}
        blocks: Any = model.get_submodule("transformer_blocks")

        def keep(place: int) -> Any:
            def hook(_: nn.Module, __: Any, logits: Tensor) -> None:
                seen[f"token_logits.{place}"] = logits

            return hook

        handles = [block.ff.tokens.register_forward_hook(keep(i)) for i, block in enumerate(blocks)]
        try:
            outputs, mids = super().run_observed(model, case)
        finally:
            for handle in handles:
                handle.remove()
        return outputs, {name: value for name, value in (mids | seen).items() if name in case.mids}


@contextmanager
def _watched(model: nn.Module) -> Iterator[Any]:
    """Collect the masks of a pass; the yielded function stacks them as the release does."""
    found: dict[str, list[Tensor]] = {"attn_head_mask": [], "mlp_group_mask": [], "token_mask": []}
    blocks: Any = model.get_submodule("transformer_blocks")

    def keep(name: str) -> Any:
        return lambda _module, _args, mask: found[name].append(mask)

    handles = []
    for block in blocks:
        if isinstance(block.router, WidthRouter):
            handles.append(block.router.choose_heads.register_forward_hook(keep("attn_head_mask")))
            handles.append(block.router.choose_groups.register_forward_hook(keep("mlp_group_mask")))
        handles.append(block.ff.choose.register_forward_hook(keep("token_mask")))

    def masks() -> Tensors:
        stacked = {name: torch.stack(parts, dim=1) for name, parts in found.items() if parts}
        for name in set(found) - set(stacked):  # one head: there are no gates
            tokens = stacked["token_mask"]
            stacked[name] = tokens.new_empty(*tokens.shape[:2], 0)
        for name in set(stacked) - {"token_mask"}:  # the first head and the first group are always on
            first = stacked["token_mask"].new_ones(*stacked[name].shape[:2], 1)
            stacked[name] = torch.cat([first, stacked[name]], dim=-1)
        return stacked

    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _drawn(model: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the recorded draws to the choices of each block."""
    blocks: Any = model.get_submodule("transformer_blocks")
    with ExitStack() as stack:
        for i, block in enumerate(blocks):
            parts: dict[str, StraightThrough] = {"token": block.ff.choose}
            if isinstance(block.router, WidthRouter):
                parts |= {"attn": block.router.choose_heads, "mlp": block.router.choose_groups}
            for name, choice in parts.items():
                pair = tuple(inputs[f"exp.{i}.{name}.{n}"] for n in (1, 2))
                stack.enter_context(patched(choice, "noise", lambda _logits, pair=pair: pair))
        yield


def _budget(settings: Mapping[str, Any], config: Any, masks: Tensors) -> Tensors:
    """The share of the cost and its loss, with costs counted at the size the run names: 256 tokens of a DiT/2."""
    name, _, patch = str(settings.get("flops_model", "DiT-XL/2")).removeprefix("DiT-").partition("/")
    if name not in _WIDTHS or not patch.isdigit():
        raise LayoutError(f"DyDiT: flops_model is DiT-S/2 .. DiT-XL/8, got {settings.get('flops_model')!r}")
    width, count = _WIDTHS[name], (32 // int(patch)) ** 2
    attention = count * 4 * width * width + 2 * count * count * width
    perceptron = 2 * count * width * 4 * width
    heads, groups = masks["attn_head_mask"].mean(dim=2), masks["mlp_group_mask"].mean(dim=2)
    rate = spent_share(heads, groups, masks["token_mask"].mean(dim=(2, 3)), attention, perceptron)
    loss = settings.get("token_loss_ratio", 2.0) * (rate - settings.get("token_target_ratio", 0.5)) ** 2
    return {"flops_rate": rate, "flops_loss": loss}
