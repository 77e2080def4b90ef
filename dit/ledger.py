"""What a network costs: parameters and multiply-accumulates, total and activated, by analysis and by counting.

One multiply-accumulate (MAC) is two floating-point operations (FLOPs). The DiT, SiT and DiMR papers print MACs under the
name of GFLOPs, others print true FLOPs; everything here says which. The analytic way adds up what modules report of
themselves (`costs` of a backbone, `macs` of a module); the counted way runs the network, best on the meta device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dit.grid import Grid

Kind = Literal["attention", "mlp", "modulation", "embed"]
KINDS: tuple[Kind, ...] = ("attention", "mlp", "modulation", "embed")

_MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WORDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("modulation", re.compile(r"^(norm|adaln|mod$|modulation|img_mod|txt_mod|.*modulation)", re.IGNORECASE)),
    ("mlp", re.compile(r"^(ff|mlp|feed_?forward|ffn|experts|moe|.*mlp)", re.IGNORECASE)),
    ("attention", re.compile(r"^(.*attn|.*attention)", re.IGNORECASE)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The cost of one submodule for one sample. `activated` counts the parameters that one token passes through."""

    path: str
    kind: Kind
    macs: int
    parameters: int
    activated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The cost of one call of a network, by part. `tokens` is the count of tokens that per-token figures divide by."""

    parts: tuple[Part, ...]
    tokens: int
    method: Literal["analytic", "counted"]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the call."""
        return sum(one.macs for one in self.parts)

    @property
    def flops(self) -> int:
        """Floating-point operations of the call: two for each multiply-accumulate."""
        return 2 * self.macs

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(one.parameters for one in self.parts)

    @property
    def activated(self) -> int:
        """Parameters that one token passes through."""
        return sum(one.activated for one in self.parts)

    def by_kind(self) -> dict[Kind, int]:
        """Return MACs by kind of part."""
        return {kind: sum(one.macs for one in self.parts if one.kind == kind) for kind in KINDS}

    def parameters_by_kind(self) -> dict[Kind, int]:
        """Return parameters by kind of part."""
        return {kind: sum(one.parameters for one in self.parts if one.kind == kind) for kind in KINDS}

    def per_token(self) -> dict[Kind, float]:
        """Return MACs by kind, divided by the count of tokens."""
        return {kind: macs / self.tokens for kind, macs in self.by_kind().items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the sums in JSON form, with units in the names."""
        return {
            "method": self.method,
            "tokens": self.tokens,
            "parameters": self.parameters,
            "parameters_activated": self.activated,
            "macs": self.macs,
            "flops": self.flops,
            "macs_by_kind": self.by_kind(),
            "macs_per_token": self.per_token(),
            "parameters_by_kind": self.parameters_by_kind(),
        }

    def __str__(self) -> str:
        shares = ", ".join(f"{kind} {macs / max(self.macs, 1):.1%}" for kind, macs in self.by_kind().items())
        return (
            f"{self.parameters / 1e6:.2f} M parameters ({self.activated / 1e6:.2f} M activated), "
            f"{self.macs / 1e9:.3f} GMACs = {self.flops / 1e9:.3f} GFLOPs for {self.tokens} tokens, {self.method}: {shares}"
        )


def macs_of(module: nn.Module, rows: int, text: int = 0, grid: Grid | None = None) -> int:
    """Return the analytic MACs of a module that sees `rows` tokens (and `text` text tokens).

    A module that costs other than its linear maps and convolutions, once a row each, has a method `macs(rows, text)`; one
    whose cost hangs on the shape of the `grid` has `macs_on(grid, text)` too.
    """
    shaped = getattr(module, "macs_on", None)
    if grid is not None and callable(shaped):
        return int(shaped(grid, text))
    own = getattr(module, "macs", None)
    if callable(own):
        return int(own(rows, text))
    if isinstance(module, _MAPS):
        return module.weight.numel() * rows
    return sum(macs_of(child, rows, text, grid) for child in module.children())


def parameters_of(module: nn.Module) -> int:
    """Return the count of parameters, shared ones once."""
    return sum(one.numel() for one in module.parameters())


def activated_of(module: nn.Module) -> int:
    """Return the count of parameters that one token passes through; routed modules say it by `activated_parameters`."""
    own = getattr(module, "activated_parameters", None)
    if callable(own):
        return int(own())
    direct = sum(one.numel() for one in module.parameters(recurse=False))
    return direct + sum(activated_of(child) for child in module.children())


def part(
    model: nn.Module, path: str, kind: Kind, rows: int, text: int = 0, grid: Grid | None = None
) -> Part:
    """Return the analytic cost of the submodule at `path` for `rows` tokens and `text` text tokens; see `macs_of`."""
    module = model.get_submodule(path)
    return Part(
        path=path,
        kind=kind,
        macs=macs_of(module, rows, text, grid),
        parameters=parameters_of(module),
        activated=activated_of(module),
    )


def analytic(model: Any, height: int, width: int, *, frames: int = 1, text: int = 0) -> Ledger:
    """Return what one of our backbones costs for one sample of `height` x `width` latent pixels and `text` text tokens.

    Raises:
        TypeError: the network reports no costs. AssertionError: its report forgets parameters.
    """
    if not hasattr(model, "costs"):
        raise TypeError(f"{type(model).__name__} reports no costs: count it with `counted`")
    patch = model.x_embedder.patch
    grid = Grid(frames // patch[0], height // patch[1], width // patch[2])
    parts = tuple(model.costs(grid, text))
    assert sum(one.parameters for one in parts) == parameters_of(model), "costs() forgets or repeats a part"
    return Ledger(parts=parts, tokens=grid.tokens, method="analytic")


def counted(model: nn.Module, inputs: Mapping[str, Any], *, tokens: int | None = None) -> Ledger:
    """Run any transformer once with `inputs` under torch's FLOP counter and return what it cost by module.

    On the meta device nothing is computed: put model and inputs there. The kinds are told from the names of modules.
    `tokens` is what per-token figures divide by: the rows of a patched input by default, else given.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False, custom_mapping=extra_flops())
    with torch.no_grad(), counter:
        model(**inputs)
    root = type(model).__name__
    own = {
        name.removeprefix(root).removeprefix("."): sum(by_op.values())
        for name, by_op in counter.get_flop_counts().items()
        if name == root or name.startswith(f"{root}.")
    }
    parts = tuple(
        Part(
            path=path,
            kind=kind_of(path),
            macs=(_inside(module, path, own) - sum(_inside(*child, own) for child in _children(module, path)))
            // 2,
            parameters=sum(one.numel() for one in module.parameters(recurse=False)),
            # What a routed module leaves out is taken off at its own place, so that the sum is the network's.
            activated=activated_of(module) - sum(activated_of(one) for one in module.children()),
        )
        for path, module in model.named_modules()
    )
    return Ledger(parts=parts, tokens=tokens or _tokens(model, inputs), method="counted")


def kind_of(path: str) -> Kind:
    """Tell the kind of a module from its path: the first telling name in it; unknown ones in a block count as MLP."""
    names = path.split(".")
    for name in names:
        for kind, words in _WORDS:
            if words.match(name):
                return kind
    return "mlp" if any(name.isdigit() for name in names) else "embed"


def _children(module: nn.Module, path: str) -> list[tuple[nn.Module, str]]:
    return [(child, f"{path}.{name}" if path else name) for name, child in module.named_children()]


def _inside(module: nn.Module, path: str, own: Mapping[str, int]) -> int:
    """Return the FLOPs counted in a module; a list of modules is never called itself and has those of its members."""
    if path in own:
        return own[path]
    return sum(_inside(*child, own) for child in _children(module, path))


def extra_flops() -> dict[Any, Any]:
    """Return what torch's own table of FLOPs leaves out, for its `FlopCounterMode`: attention on the processor."""
    from torch.utils.flop_counter import sdpa_flop_count

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    return {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}


def _tokens(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    x = inputs["hidden_states"]
    if x.dim() == 3:
        return int(x.shape[1])
    patch = getattr(getattr(model, "config", None), "patch_size", 1)
    sides = tuple(patch) if isinstance(patch, tuple | list) else (patch, patch)
    sides = (1,) * (x.dim() - 2 - len(sides)) + sides
    return math.prod(side // cut for side, cut in zip(x.shape[2:], sides, strict=True))
