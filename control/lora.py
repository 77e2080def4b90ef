"""Plain LoRA: low-rank additions to layers, from files of any of the usual layouts, several at once, each with its strength.

Paper: LoRA: Low-Rank Adaptation of Large Language Models; Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen; 2021;
    arXiv:2106.09685.
Differs: the additions stand beside the transformer and are heard through hooks, so its weights, its state dict and the
    strengths of other adapters (peft's too) are never touched; strength is a matter of one with-block and of each step; another
    file can take a LoRA's place while it is attached, and one that does not fit changes nothing. Files of released control
    LoRAs, which widen the first layer and replace norms, are taken as they are.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from control._files import ControlFile, Coverage, grow, load, reader
from control._layers import (
    ATTENTION,
    Change,
    changed_layers,
    check_targets,
    layers_refuse,
    linear_layers,
    made_like,
    targeted,
    use_refused,
    weight_of,
)
from control._lora_files import family_of, is_lora, replaced_norms, translated, unreadable
from control.base import Control, ControlAdapter, ControlRun, Refused, Use, filled
from control.easycontrol import LowRank
from dit.seams import patched
from dit.spec import knob, spec

_PART = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.(?P<part>weight|bias)")
_WIDE = "x_embedder"  # the one layer that a control LoRA reads more channels into


@spec("lora", paper="LoRA, arXiv:2106.09685")
class LoRA(Control):
    """Low-rank additions to layers: a style, a subject, a concept."""

    about = "A style, subject or concept from a LoRA file"

    rank: int = knob(default=16, label="Rank", low=1, high=1024)
    targets: tuple[str, ...] = knob(
        default=ATTENTION, label="Names of the layers in blocks that are added to"
    )

    def check(self) -> None:
        """Raises: ValueError if targets are no names of layers."""
        check_targets(self.name, self.targets)

    def refuses(self, transformer: nn.Module) -> str | None:
        return layers_refuse(transformer)

    def build(self, transformer: nn.Module) -> LoRAAdapter:
        """As `Control.build`. Raises: Refused if no layer has a name of `targets`."""
        layers = targeted(transformer, self.targets, self.name)
        shapes = {path: _Shape(one.in_features, one.out_features, self.rank) for path, one in layers.items()}
        return LoRAAdapter(self, transformer, shapes, {})

    def load(self, transformer: nn.Module, weights: Mapping[str, Tensor]) -> LoRAAdapter:
        """As `Control.load`; every layer may have a rank of its own. What finds no place is told in `coverage`."""
        reason = self.refuses(transformer)
        if reason is not None:
            raise Refused(f"{self.name}: {reason}")
        shapes, norms, left = _matched(transformer, weights)
        adapter = LoRAAdapter(self, transformer, shapes, norms)
        filled(adapter, {key: x for key, x in weights.items() if key not in set(left)})
        adapter.coverage = Coverage(len(weights) - len(left), len(weights), left)
        return adapter


class _Shape(SimpleNamespace):
    """Channels in and out, rank, and whether there is a bias, of one addition."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False) -> None:
        super().__init__(in_features=in_features, out_features=out_features, rank=rank, bias=bias)


class LoRAAdapter(ControlAdapter):
    """The additions of one LoRA, and the norms it replaces, under the paths of the transformer's layers."""

    control: LoRA
    needs_condition = False
    acts_on_weights = True

    def __init__(
        self, control: LoRA, transformer: nn.Module, shapes: Mapping[str, _Shape], norms: Mapping[str, Tensor]
    ) -> None:
        super().__init__(control)
        dtype, device = made_like(transformer)
        self.layers, self.norms = tuple(shapes), tuple(norms)
        self._attached: list[_Attached] = []
        for path, shape in shapes.items():
            low = LowRank(shape, shape.rank, post=False, dtype=dtype, device=device)
            if shape.bias:
                low.lora_B = nn.Linear(shape.rank, shape.out_features, dtype=dtype, device=device)
            grow(self, path, low)
        for path, weight in norms.items():
            one = nn.Module()
            one.weight = nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=device))
            grow(self, path, one)

    def refuses(self, transformer: nn.Module, use: Use) -> str | None:
        """Look at transformer, use, and the picture that a control LoRA reads."""
        words = self.control.refuses(transformer) or use_refused(
            transformer, use, (*self.layers, *self.norms)
        )
        if words is not None:
            return words
        extra = self.extra_channels(transformer)
        seen = use.condition
        if seen is None:
            return None
        if not extra:
            return "it takes no condition"
        if not isinstance(seen, Tensor) or seen.dim() != 4 or 4 * seen.shape[1] != extra:
            got = f"shape {tuple(seen.shape)}" if isinstance(seen, Tensor) else type(seen).__name__
            return f"condition must be a tensor [B, {extra // 4}, H, W], got {got}"
        odd = not seen.numel() or seen.shape[2] % 2 or seen.shape[3] % 2
        return f"condition must have even sides, got {tuple(seen.shape[2:])}" if odd else None

    def extra_channels(self, transformer: nn.Module) -> int:
        """Return how many channels more than the transformer's own a control LoRA reads of each token."""
        if _WIDE not in self.layers:
            return 0
        low: Any = self.get_submodule(_WIDE)
        layer: Any = transformer.get_submodule(_WIDE)
        return int(low.lora_A.in_features - layer.in_features)

    @contextmanager
    def attached(self, transformer: nn.Module, use: Use, run: ControlRun) -> Iterator[None]:
        """Add to the layers; `joint_attention_kwargs` with a scale acts on peft's adapters and not on this."""
        other = next((one.name for one in run.uses if one.adapter.needs_condition and not one.off), None)
        if other is not None and self.extra_channels(transformer):
            raise Refused(
                f"lora: a control LoRA reads a picture in the first layer, which {other} needs for its own"
            )
        held = _Attached(self, transformer, use, run)
        self._attached.append(held)
        try:
            held.attach()
            yield
        finally:
            self._attached.remove(held)
            held.detach()

    def swap(self, path: str | Path, transformer: nn.Module, *, any_base: bool = False) -> None:
        """Take the weights of another file, also while attached. A file that does not fit changes nothing.

        Raises: FileNotFoundError; Refused in words, as `control._files.load`.
        """
        new = load(path, transformer, any_base=any_base)
        if not isinstance(new, LoRAAdapter):
            raise Refused(f"{Path(path).name} is no LoRA but {new.control.name}")
        for held in self._attached:
            if held.transformer is not transformer:
                raise Refused(
                    "lora: it is attached to another transformer than the one the file was read for"
                )
            words = new.refuses(transformer, held.use)
            if words is not None:
                raise Refused(f"{Path(path).name}: {words}")
        for held in self._attached:
            held.detach()
        self._modules, self.layers, self.norms = new._modules, new.layers, new.norms
        self.control, self.coverage = new.control, new.coverage
        for held in self._attached:
            held.attach()

    @torch.no_grad()
    def merged(self, transformer: nn.Module, strength: float = 1.0) -> dict[str, Tensor]:
        """Return the transformer's weights, by name, with the additions in them; the transformer stays as it is.

        Raises: Refused where that is not exact: a wider first layer, a bias, quantised or wrapped layers.
        """
        found = {}
        for path in self.layers:
            low: Any = self.get_submodule(path)
            weight = weight_of(transformer, path)
            if low.lora_B.bias is not None or low.lora_A.in_features != weight.shape[1]:
                raise Refused(
                    f"lora: the addition to {path} has a bias or reads more channels and cannot be merged"
                )
            added = low.lora_B.weight.float() @ low.lora_A.weight.float() * strength
            found[f"{path}.weight"] = (weight.float() + added).to(weight.dtype)
        for path in self.norms:
            old: Any = transformer.get_submodule(path).weight
            new: Any = self.get_submodule(path).weight
            found[f"{path}.weight"] = torch.lerp(old.float(), new.float(), strength).to(old.dtype)
        return found


class _Attached:
    """One LoRA on one transformer for the length of a with-block; let go and taken hold of again when its file changes."""

    def __init__(self, adapter: LoRAAdapter, transformer: nn.Module, use: Use, run: ControlRun) -> None:
        self.adapter, self.transformer, self.use, self.run = adapter, transformer, use, run
        self._stack = ExitStack()

    def attach(self) -> None:
        """Take hold of the layers and norms that the adapter has now."""
        adapter, transformer = self.adapter, self.transformer
        changes: dict[str, Change] = {path: self._adds(path) for path in adapter.layers}
        changes |= {path: self._replaces(path) for path in adapter.norms}
        self._stack = ExitStack()
        self._stack.enter_context(changed_layers(transformer, self.use, self.run, changes))
        if adapter.extra_channels(transformer):
            layer: Any = transformer.get_submodule(_WIDE)
            inner, own = layer.forward, layer.in_features
            self._stack.enter_context(patched(layer, "forward", lambda x: inner(x[..., :own])))
        if adapter.coverage is not None:
            self.run.account(self.use).told["coverage"] = str(adapter.coverage)

    def detach(self) -> None:
        """Let go of all of it."""
        self._stack.close()

    def _adds(self, path: str) -> Change:
        low: Any = self.adapter.get_submodule(path)

        def change(x: Tensor, y: Tensor, strength: float) -> Tensor:
            if x.shape[-1] < low.lora_A.in_features:
                x = self._beside(x, low.lora_A.in_features)
            added: Tensor = low(x)
            return y.add(added.to(y.dtype), alpha=strength)

        return change

    def _replaces(self, path: str) -> Change:
        module: Any = self.transformer.get_submodule(path)
        plain = copy.copy(module)  # the same norm without hooks, to be given another weight for one call
        plain.__dict__ = dict(module.__dict__, _forward_hooks={}, _forward_pre_hooks={})
        part: Any = self.adapter.get_submodule(path)

        def change(x: Tensor, y: Tensor, strength: float) -> Tensor:
            other = part.weight.to(module.weight.dtype)
            # A difference of outputs, so that several that replace one norm add up.
            own: Tensor = torch.func.functional_call(plain, {"weight": module.weight}, (x,))
            new: Tensor = torch.func.functional_call(plain, {"weight": other}, (x,))
            return y + strength * (new - own)

        return change

    def _beside(self, x: Tensor, channels: int) -> Tensor:
        """Put the tokens of the condition beside those of the noise: [B, N, C] -> [B, N, channels]."""
        condition = self.use.condition
        if condition is None:
            raise Refused(
                f"lora: it reads a control picture: give a condition, or hidden_states of {channels} channels"
            )
        b, c, h, w = condition.shape
        if len(x) % b or h * w // 4 != x.shape[1]:
            raise Refused(
                f"lora: a condition of {h} x {w} for {b} pictures has no place beside {x.shape[1]} tokens of {len(x)}"
            )
        tokens = condition.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)
        return torch.cat([x, tokens.repeat(len(x) // b, 1, 1).to(x)], dim=-1)


def _matched(
    transformer: nn.Module, weights: Mapping[str, Tensor]
) -> tuple[dict[str, _Shape], dict[str, Tensor], tuple[str, ...]]:
    """Return additions and norms by path, and keys without a place. Raises: Refused in words for what does not fit."""
    layers, modules = linear_layers(transformer), dict(transformer.named_modules())
    parts: dict[str, dict[str, Tensor]] = {}
    norms: dict[str, Tensor] = {}
    left = []
    for key, x in weights.items():
        found, path = _PART.fullmatch(key), key.rpartition(".")[0]
        if found is not None and found["path"] in layers:
            parts.setdefault(found["path"], {})[f"{found['side']}.{found['part']}"] = x
        elif found is None and path in modules and replaced_norms(path, modules[path], x):
            norms[path] = x
        else:
            left.append(key)
    who = f"{type(transformer).__name__}"
    if not parts and not norms:
        raise Refused(
            f"0/{len(weights)} keys have a place in {who}: this is a LoRA for {family_of(weights)} "
            f"(its keys begin with {next(iter(weights), 'none')})"
        )
    return {path: _shape(path, layers[path], one, weights) for path, one in parts.items()}, norms, tuple(left)


def _shape(path: str, layer: Any, parts: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> _Shape:
    missing = [f"{path}.lora_{one}" for one in ("A.weight", "B.weight") if one not in parts]
    if missing or "A.bias" in parts:
        raise Refused(f"missing {missing[0]}" if missing else f"{path}.lora_A.bias is not understood")
    down, up = parts["A.weight"], parts["B.weight"]
    fits = down.dim() == up.dim() == 2 and down.shape[0] == up.shape[1] and up.shape[0] == layer.out_features
    wide = path == _WIDE and down.dim() == 2 and down.shape[1] > layer.in_features
    if not fits or not (wide or down.shape[1] == layer.in_features):
        raise Refused(
            f"{path} has {layer.in_features} channels in and {layer.out_features} out, and the file's lora_A is "
            f"{tuple(down.shape)}, lora_B {tuple(up.shape)}: it is for another size of {family_of(weights)}"
        )
    return _Shape(down.shape[1], up.shape[0], down.shape[0], "B.bias" in parts)


@reader("LoRA (diffusers, peft, kohya, XLabs, BFL)")
def read_foreign(file: ControlFile, transformer: nn.Module) -> tuple[Control, Mapping[str, Tensor]] | None:
    """Read a LoRA of another code base; the settings tell its highest rank and the names of its layers."""
    if not is_lora(file.weights) and unreadable(file.weights) is None:
        return None
    weights = translated(file, transformer)
    ranks = [len(x) for key, x in weights.items() if key.endswith(".lora_A.weight")]
    names = {_name(key.removesuffix(".lora_A.weight")) for key in weights if key.endswith(".lora_A.weight")}
    if not ranks:
        return LoRA(), weights
    return LoRA(rank=min(1024, max(1, *ranks)), targets=tuple(sorted(names))), weights


def _name(path: str) -> str:
    """The name of a layer within its block: what follows the last number that is not the end of it."""
    return re.sub(r"^.*?\.\d+\.(?:attn2?\.)?", "", path) if re.search(r"\.\d+\.", path) else path
