"""Turn the perceptrons of any trained diffusion transformer into shared and routed experts, in place.

Paper: Dense2MoE: Restructuring Diffusion Transformer to MoE for Efficient Text-to-Image Generation, Zheng et al. 2025,
arXiv:2510.09094 (first-order Taylor importance; the most important channels are shared, the rest dealt out evenly).
Differs: works on sub-modules, so diffusers' own classes stay what they are and their loaders, caches and adapters go on working.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from safetensors.torch import load_file
from torch import Tensor, nn

from dit.block_mixture import BlockMixture, group_blocks, groups_of
from dit.experts._dispatch import GATED
from dit.experts.dense import Experts
from dit.experts.mixture import BLIND, Mixture, MixtureLayer
from dit.ledger import activated_of, parameters_of
from dit.seams import blocks_of
from dit.spec import parse

DESCRIPTION = "conversion.json"
Scores = Mapping[str, Tensor]
"""Path of a perceptron -> importance of each of its hidden channels [H]."""


@dataclass(frozen=True, slots=True)
class Perceptron:
    """A two-layer perceptron found in a block: its maps, its activation, and whether it shares its map out with attention.

    `block` and `name` say where it stands; `name` is `proj_mlp` where the map out is shared (FLUX's single-stream blocks).
    """

    block: str
    name: str
    first: nn.Linear
    second: nn.Linear
    activation: str
    offset: int = 0

    @property
    def path(self) -> str:
        """Where it stands in the network."""
        return f"{self.block}.{self.name}"

    @property
    def hidden(self) -> int:
        """Hidden channels."""
        return int(self.second.weight.shape[1]) - self.offset


@dataclass(frozen=True, slots=True)
class Converted:
    """One perceptron that became a mixture; `kept` is the shared expert's share of all importance, 0-1."""

    path: str
    hidden: int
    shared: int
    expert: int
    kept: float


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion did: mixtures made, perceptrons left with the reason, parameters before and activated after."""

    experts: str
    converted: tuple[Converted, ...]
    left: dict[str, str]
    parameters: int
    activated: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        first = self.converted[0]
        text = (
            f"{len(self.converted)} perceptrons of {first.hidden} became {self.experts} (shared {first.shared}, routed "
            f"{first.expert} each); {self.activated / 1e6:.2f} M of {self.parameters / 1e6:.2f} M parameters activated"
        )
        return text + "".join(f"; left {path}: {reason}" for path, reason in self.left.items())


def perceptrons_of(model: nn.Module) -> tuple[list[Perceptron], dict[str, str]]:
    """Find the perceptrons of the main blocks, and those that cannot be cut into experts, with the reason."""
    found: list[Perceptron] = []
    left: dict[str, str] = {}
    for block in blocks_of(model):
        for name, child in block.module.named_modules():
            path = f"{block.path}.{name}".rstrip(".")
            if isinstance(child, FeedForward) and not _inside(name, block.module, MixtureLayer):
                kind = _activation(child.net[0])
                if kind is None:
                    left[path] = f"its activation is {type(child.net[0]).__name__}"
                    continue
                parent, _, last = path.rpartition(".")
                found.append(Perceptron(parent, last, child.net[0].proj, child.net[2], kind))
            elif isinstance(getattr(child, "proj_mlp", None), nn.Linear):
                kind = _plain(getattr(child, "act_mlp", None))
                rest = child.proj_out.in_features - child.proj_mlp.out_features
                if kind is None or rest != child.proj_out.out_features:
                    left[f"{path}.proj_mlp"] = "its activation or its map out has another form"
                    continue
                found.append(Perceptron(path, "proj_mlp", child.proj_mlp, child.proj_out, kind, rest))
            elif name in ("ff", "ff_context", "mlp", "feed_forward") and not isinstance(
                child, FeedForward | MixtureLayer
            ):
                left[path] = f"{type(child).__name__} is no two-layer perceptron"
    return found, left


def taylor_scores(model: nn.Module, losses: Iterable[Callable[[], Tensor]]) -> Scores:
    """Return the sum over a hidden channel's weights of |dL/dw * w|, added up over the batches.

    Args:
        model: the dense network; its gradients are empty afterwards.
        losses: one function a batch that runs the network and returns its loss.
    """
    found, _ = perceptrons_of(model)
    scores = {one.path: torch.zeros(one.hidden, device=one.first.weight.device) for one in found}
    for loss in losses:
        model.zero_grad(set_to_none=True)
        loss().backward()
        for one in found:
            scores[one.path] += _by_channel(one, _change)
    model.zero_grad(set_to_none=True)
    return scores


def magnitude_scores(model: nn.Module) -> Scores:
    """Return the sum over a hidden channel's weights of w squared: the importance that needs no data."""
    found, _ = perceptrons_of(model)
    return {one.path: _by_channel(one, lambda weight: weight.detach().float().square()) for one in found}


def random_scores(model: nn.Module, seed: int) -> Scores:
    """Return no importance at all: the yardstick of the other two."""
    dice = torch.Generator().manual_seed(seed)
    return {one.path: torch.rand(one.hidden, generator=dice) for one in perceptrons_of(model)[0]}


def convert(model: nn.Module, experts: str | Mapping[str, Any] | Mixture, scores: Scores) -> ConversionReport:
    """Cut every perceptron of a dense network into experts, in place; all of them on with unit gates give the same output.

    Args:
        model: one of our backbones, or a diffusers transformer whose blocks have two-layer perceptrons.
        experts: settings of the mixture; the activation is that of the perceptron, whatever they say.
        scores: importance of the hidden channels of every perceptron (`taylor_scores`, ...).

    Raises:
        ValueError: no perceptrons, no scores for one, or too few channels; nothing has been changed then.
    """
    settings = parse(Experts, experts)
    if not isinstance(settings, Mixture):
        raise ValueError(f"convert: experts must be a mixture, got {settings}")
    found, left = perceptrons_of(model)
    if not found:
        reasons = "".join(f"; {path}: {reason}" for path, reason in left.items())
        raise ValueError(
            f"convert: {type(model).__name__} has no two-layer perceptrons in its blocks{reasons}"
        )
    for one in found:
        settings.sizes(one.hidden)
        if one.path not in scores or scores[one.path].shape != (one.hidden,):
            raise ValueError(f"convert: no importance for the {one.hidden} hidden channels of {one.path}")
    parameters = parameters_of(model)
    activations = {one.activation for one in found}
    made = tuple(_convert_one(model, one, settings, scores[one.path]) for one in found)
    _write_config(model, settings, activations)
    return ConversionReport(str(settings), made, left, parameters, activated_of(model))


def deal(scores: Tensor, shared: int, experts: int) -> tuple[Tensor, Tensor]:
    """Return the channels of the shared expert [S], and those of the routed ones [E, h], each getting its share of the rest."""
    order = scores.argsort(descending=True, stable=True)
    rest = order[shared:].view(-1, experts)  # each row goes round the table once, every second time backwards
    rest = torch.where(torch.arange(len(rest), device=rest.device)[:, None] % 2 == 0, rest, rest.flip(1))
    return order[:shared], rest.T.contiguous()


class SplitOut(nn.Linear):
    """The map out of attention alone; what stands behind it in the row, [.., D], has been mapped already and is added."""

    def forward(self, both: Tensor) -> Tensor:
        """[B, N, 2 D] -> [B, N, D]."""
        attended, added = both[..., : self.in_features], both[..., self.in_features :]
        out: Tensor = super().forward(attended)
        return out + added


def save_converted(model: Any, folder: Path | str, **options: Any) -> None:
    """Write weights, config and a description of the conversion, so that `load_converted` can build the network again.

    `options` go to `save_pretrained`.
    """
    layers = [one for one in model.modules() if isinstance(one, MixtureLayer)]
    groups = {path.rpartition(".")[0]: asdict(one.settings) for path, one in groups_of(model).items()}
    experts = layers[0].settings.replace(active=layers[0].active).to_dict() if layers else None
    model.save_pretrained(folder, **options)
    text = json.dumps({"experts": experts, "groups": groups}, indent=1)
    (Path(folder) / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def load_converted(folder: Path | str, *, torch_dtype: torch.dtype | None = None) -> Any:
    """Build a network as its class does, change it as its description says, and fill it; in evaluation mode.

    Raises:
        ValueError: no description in the folder, or a class that is neither ours nor diffusers'.
        RuntimeError: weights that do not fit the description.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(f"{folder}: no {DESCRIPTION}, so this is no converted network")
    about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    cls = network_class(folder)
    model = cls.from_config(cls.load_config(folder))
    if (
        about["experts"] is not None and perceptrons_of(model)[0]
    ):  # ours come converted, and grouped, from their config
        convert(model, about["experts"], random_scores(model, 0))
    if about["groups"] and not groups_of(model):
        group_blocks(model, {name: BlockMixture(**one) for name, one in about["groups"].items()})
    tensors = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    model.load_state_dict(tensors, strict=True)
    return model.to(torch_dtype or next(iter(tensors.values())).dtype).eval()


def network_class(folder: Path) -> Any:
    """Return the class of a saved transformer, ours or diffusers'. Raises: ValueError for any other."""
    import diffusers

    from dit.presets import BACKBONES, backbone_class

    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    ours = {cls: module for module, cls in BACKBONES.items()}
    if name in ours:
        return backbone_class(ours[name])
    if not hasattr(diffusers, name):
        raise ValueError(
            f"{folder}: unknown class {name!r}; there are {', '.join(ours)} and those of diffusers"
        )
    return getattr(diffusers, name)


def _convert_one(model: nn.Module, one: Perceptron, settings: Mixture, scores: Tensor) -> Converted:
    first, second = one.first, one.second
    shared, size = settings.sizes(one.hidden)
    common, dealt = deal(scores.float(), shared, settings.experts)
    kept = float(scores[common].sum() / scores.sum().clamp_min(1e-30))
    settings = settings.replace(activation=one.activation)
    width, device = second.out_features, first.weight.device
    with device:  # made where the weights are, on the meta device too: what a conversion costs can be told without weights
        layer = MixtureLayer(width, one.hidden, settings, bias=first.bias is not None).to(first.weight)
    with torch.no_grad():
        _fill(layer, one, common.to(device), dealt.to(device))
    layer.train(model.training)
    _put(model, one, layer)
    return Converted(one.path, one.hidden, shared, size, kept)


def _fill(layer: MixtureLayer, one: Perceptron, common: Tensor, dealt: Tensor) -> None:
    """Copy the hidden channels of a perceptron to the experts that got them; the bias of its map out is the shared one's."""
    gated = one.activation in GATED
    columns = one.second.weight[:, one.offset :]
    up, down = layer.shared.net[0].proj, layer.shared.net[2]
    rows = torch.cat([common, common + one.hidden]) if gated else common
    routed = torch.cat([dealt, dealt + one.hidden], dim=1) if gated else dealt  # [E, h or 2 h]
    up.weight.copy_(one.first.weight[rows])
    down.weight.copy_(columns[:, common])
    nn.init.normal_(layer.gate.weight, std=BLIND)
    layer.up.copy_(one.first.weight[routed.flatten()])
    layer.down.copy_(columns[:, dealt.flatten()])
    if one.first.bias is not None:
        assert layer.up_bias is not None
        up.bias.copy_(one.first.bias[rows])
        layer.up_bias.copy_(one.first.bias[routed.flatten()])
        down.bias.zero_()
        if one.second.bias is not None and not one.offset:
            down.bias.copy_(one.second.bias)


def _put(model: nn.Module, one: Perceptron, layer: MixtureLayer) -> None:
    block: Any = model.get_submodule(one.block)
    if not one.offset:
        setattr(block, one.name, layer)
        return
    kind = nn.Linear if _has_slot(block) else SplitOut
    out = kind(one.offset, one.second.out_features, bias=one.second.bias is not None).to(one.second.weight)
    with torch.no_grad():
        out.weight.copy_(one.second.weight[:, : one.offset])
        if one.second.bias is not None:
            out.bias.copy_(one.second.bias)
    _replace_pair(block, layer, out.train(block.training))


def _replace_pair(block: Any, layer: nn.Module, out: nn.Module) -> None:
    """Ours have a place for experts beside attention; in FLUX's block the experts stand where the first map stood."""
    if _has_slot(block):
        block.proj_mlp, block.act_mlp, block.ff, block.proj_out = None, None, layer, out
    else:
        block.proj_mlp, block.act_mlp, block.proj_out = layer, nn.Identity(), out


def _has_slot(block: nn.Module) -> bool:
    return hasattr(block, "ff") and hasattr(block, "proj_mlp")


def _write_config(model: Any, settings: Mixture, activations: set[str]) -> None:
    """Ours can say it in their config, so that `from_pretrained` builds the converted network."""
    if "experts" in getattr(model, "config", {}):
        if len(activations) == 1:
            settings = settings.replace(activation=activations.pop())
        model.register_to_config(experts=settings.to_dict())


def _by_channel(one: Perceptron, value: Callable[[Tensor], Tensor | None]) -> Tensor:
    """Add up what `value` says of each weight, by hidden channel."""
    total = torch.zeros(one.hidden, device=one.first.weight.device)
    for weight in (one.first.weight, one.first.bias):
        found = None if weight is None else value(weight)
        if found is not None:
            total += found.reshape(len(found), -1).sum(dim=1).view(-1, one.hidden).sum(dim=0)
    found = value(one.second.weight)
    return total if found is None else total + found[:, one.offset :].sum(dim=0)


def _change(weight: Tensor) -> Tensor | None:
    """How much the loss would change without a weight, to first order."""
    return None if weight.grad is None else (weight.grad.float() * weight.detach().float()).abs()


def _inside(name: str, block: nn.Module, kind: type[nn.Module]) -> bool:
    parts = name.split(".")
    parents = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(isinstance(block.get_submodule(one), kind) for one in parents)


def _activation(module: nn.Module) -> str | None:
    name = type(module).__name__
    if name == "GELU":
        return "gelu-approximate" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    if name == "LinearActivation":
        return "linear-silu" if isinstance(getattr(module, "activation", None), nn.SiLU) else None
    return {"GEGLU": "geglu", "SwiGLU": "swiglu"}.get(name)


def _plain(module: nn.Module | None) -> str | None:
    if not isinstance(module, nn.GELU):
        return None
    return "gelu-approximate" if module.approximate == "tanh" else "gelu"
