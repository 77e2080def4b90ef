"""Mixture of Blocks: consecutive blocks form a group, and a router keeps a few adjacent ones for each sample and step.

Paper: Dense2MoE: Restructuring Diffusion Transformer to MoE for Efficient Text-to-Image Generation, Zheng et al. 2025,
arXiv:2510.09094.
Differs: the router reads means over tokens, normalised; the choice is the window of adjacent blocks with the best mean score.
A chosen block counts exactly 1, and the router learns through the softmax behind that 1 (straight through).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.ledger import activated_of, parameters_of
from dit.model import BLOCK_GROUPS, Backbone, Context, register_block
from dit.routing import RouteDecision
from dit.seams import arguments

STREAMS = ("encoder_hidden_states", "hidden_states")
"""The order in which dual-stream blocks return their streams, ours and diffusers'."""
_WHOLE = ("image_rotary_emb", "rotary", "grid")  # the same for every sample of a batch, whatever their shapes


@dataclass(frozen=True, slots=True)
class BlockMixture:
    """Settings of the groups of one stack. Raises: ValueError for counts that do not fit.

    Attributes:
        size: blocks in a group. active: adjacent blocks of a group that are computed.
        alpha: weight of what the tokens say, 0-1; the rest is what time and prompt say.
    """

    size: int
    active: int
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 2 or not 1 <= self.active <= self.size or not 0 <= self.alpha <= 1:
            raise ValueError(
                "block mixture: size is at least 2, active from 1 to size and alpha from 0 to 1, got "
                f"size={self.size}, active={self.active}, alpha={self.alpha}"
            )


class BlockRouter(nn.Module):
    """Scores blocks by the tokens [B, N, D] (and text [B, L, D]) and the conditioning [B, D], and chooses a window of them."""

    def __init__(self, width: int, streams: int, settings: BlockMixture) -> None:
        super().__init__()
        self.settings = settings
        self.tokens = nn.Linear(width * streams, settings.size)
        self.condition = nn.Linear(width, settings.size)

    def forward(self, streams: Sequence[Tensor], temb: Tensor) -> RouteDecision:
        """Return the decision [B, m]: `active` 0 or 1, `gates` of the same value and with the gradient of a softmax."""
        alpha, count = self.settings.alpha, self.settings.active
        pooled = torch.cat([_pooled(one) for one in streams], dim=-1)
        scores = alpha * self.tokens(pooled) + (1 - alpha) * self.condition(_pooled(temb))  # [B, m]
        windows = scores.float().unfold(1, count, 1).mean(dim=-1)  # [B, m - k + 1]
        places = torch.arange(windows.shape[1], device=scores.device)[:, None]
        blocks = torch.arange(self.settings.size, device=scores.device)
        member = ((blocks >= places) & (blocks < places + count)).to(windows.dtype)  # [m - k + 1, m]
        active = member[windows.argmax(dim=1)]
        soft = torch.softmax(windows, dim=1) @ member
        gates = active + (soft - soft.detach())
        share = active.new_full((len(active),), count / self.settings.size)
        return RouteDecision("sample", gates=gates, active=active, compact=not self.training, share=share)


class _Group(nn.Module):
    """Blocks in a row and their router. In training all are computed and blended; otherwise only the chosen ones run."""

    context_pre_only = False  # diffusers' SD3 asks its blocks
    pre_only = False

    def __init__(self, blocks: Sequence[nn.Module], width: int, settings: BlockMixture, streams: int) -> None:
        super().__init__()
        self.settings = settings
        self.blocks = nn.ModuleList(blocks)
        self.router = BlockRouter(width, streams, settings)

    def activated_parameters(self) -> int:
        """Return the parameters that one sample goes through."""
        blocks = sum(activated_of(one) for one in self.blocks)
        return parameters_of(self.router) + blocks * self.settings.active // self.settings.size

    def _through(self, given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        """Run the blocks on their arguments by name; the streams in it, by `names`, go on from block to block."""
        decision = self.router([given[name] for name in names], given["temb"])
        assert decision.gates is not None
        assert decision.active is not None
        batch = len(decision.active)
        rows = None if self.training else _rows(decision.active, self.settings.active)
        for i, block in enumerate(self.blocks):
            if rows is None:
                gates = decision.gates[:, i].to(given[names[0]].dtype).view(-1, 1, 1)
                after = _split(block(**given), names)
                given |= {name: gates * after[name] + (1 - gates) * given[name] for name in names}
            elif len(rows[i]) == batch:
                given |= _split(block(**given), names)
            elif rows[i]:
                pick = torch.tensor(rows[i], device=decision.active.device)
                after = _split(block(**_some(given, pick, batch)), names)
                given |= {name: given[name].index_copy(0, pick, after[name]) for name in names}
        return given


class BlockGroup(_Group):
    """A group of dual-stream or joint blocks: (hidden_states, encoder_hidden_states, temb, ...) -> (text, image)."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Image [B, N, D], text [B, L, D], conditioning [B, D] or [B, N, D] -> (text, image)."""
        given = arguments(self.blocks[0], (hidden_states, encoder_hidden_states, temb, *args), kwargs)
        given = self._through(given, STREAMS)
        encoder_hidden_states, hidden_states = given["encoder_hidden_states"], given["hidden_states"]
        return encoder_hidden_states, hidden_states


class PlainBlockGroup(_Group):
    """A group of blocks with one stream: (hidden_states, temb, ...) -> hidden_states."""

    def forward(self, hidden_states: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens [B, N, D], conditioning [B, D] or [B, N, D] -> tokens."""
        given = arguments(self.blocks[0], (hidden_states, temb, *args), kwargs)
        hidden_states = self._through(given, ("hidden_states",))["hidden_states"]
        return hidden_states  # noqa: RET504 - by this name the seams know which stream it is


def group_blocks(model: Any, stacks: Mapping[str, BlockMixture]) -> list[str]:
    """Put groups in the place of consecutive blocks, in place, and return the paths of the groups; ours are saved with them.

    Args:
        model: one of our backbones or a diffusers transformer whose blocks take `hidden_states` and `temb` (Flux, SD3, ...).
        stacks: name of a stack (`transformer_blocks`) -> its settings. Blocks that are left over at the end, and a last one
            that drops its text, stay as they are.

    Raises:
        ValueError: no such stack, blocks of another form, or fewer blocks than one group needs; nothing has been changed then.
    """
    plans = {name: _plan(model, name, settings) for name, settings in stacks.items()}
    made: list[str] = []
    for name, (members, kind) in plans.items():
        made += [f"{name}.{i}" for i, one in enumerate(members) if len(one) > 1]
        width = int(getattr(model, "inner_dim", None) or model.config.width)
        streams = 2 if kind is BlockGroup else 1
        stack = [
            one[0]
            if len(one) == 1
            else kind(one, width, stacks[name], streams).to(next(one[0].parameters())).train(model.training)
            for one in members
        ]
        setattr(model, name, nn.ModuleList(stack))
    if isinstance(model, Backbone):
        earlier = model.config.get(BLOCK_GROUPS, {})
        model.register_to_config(
            **{BLOCK_GROUPS: earlier | {name: asdict(one) for name, one in stacks.items()}}
        )
    return made


def groups_of(model: nn.Module) -> dict[str, _Group]:
    """Return the groups of blocks in a network by path."""
    return {path: one for path, one in model.named_modules() if isinstance(one, _Group)}


@contextmanager
def executed(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count, for every block in a group, the samples that it computed inside the `with`."""
    counts: dict[str, int] = {}
    hooks = []
    for path, group in groups_of(model).items():
        for i, block in enumerate(group.blocks):
            name = f"{path}.blocks.{i}"
            counts[name] = 0

            def count(module: nn.Module, args: Any, kwargs: dict[str, Any], name: str = name) -> None:
                counts[name] += len(arguments(module, args, kwargs)["hidden_states"])

            hooks.append(block.register_forward_pre_hook(count, with_kwargs=True))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _plan(
    model: Any, name: str, settings: BlockMixture
) -> tuple[list[list[nn.Module]], type[BlockGroup] | type[PlainBlockGroup]]:
    """Return the blocks of a stack, those of a group together, and the kind of group they make."""
    stack = getattr(model, name, None)
    if not isinstance(stack, nn.ModuleList) or not len(stack):
        raise ValueError(f"group_blocks: {type(model).__name__} has no stack of blocks {name!r}")
    taken = list(inspect.signature(type(stack[0]).forward).parameters)[1:]
    pair = taken[:3] == ["hidden_states", "encoder_hidden_states", "temb"]
    if not pair and taken[:2] != ["hidden_states", "temb"]:
        raise ValueError(
            f"group_blocks: {type(stack[0]).__name__} takes {', '.join(taken[:3])}; groups need hidden_states, "
            "(encoder_hidden_states,) temb"
        )
    blocks = list(stack)
    free = blocks[:-1] if _drops_text(blocks[-1]) else blocks
    whole = len(free) // settings.size * settings.size
    if not whole:
        raise ValueError(f"group_blocks: {name} has {len(free)} blocks, a group needs {settings.size}")
    members = [blocks[i : i + settings.size] for i in range(0, whole, settings.size)]
    return members + [[one] for one in blocks[whole:]], BlockGroup if pair else PlainBlockGroup


def _drops_text(block: nn.Module) -> bool:
    return bool(getattr(block, "context_pre_only", False) or getattr(block, "pre_only", False))


def _rows(active: Tensor, count: int) -> list[list[int]]:
    """Which samples each block computes; on the meta device, where nothing is known, the first blocks compute all."""
    if active.device.type == "meta":
        return [list(range(len(active))) if i < count else [] for i in range(active.shape[1])]
    return [[row for row, on in enumerate(column) if on] for column in active.T.tolist()]


def _split(output: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    return dict(zip(names, (output,) if isinstance(output, Tensor) else output, strict=True))


def _some(value: Any, pick: Tensor, batch: int, name: str = "") -> Any:
    """Return an argument of a block for some samples of the batch alone."""
    if name in _WHOLE:
        return value
    if isinstance(value, Tensor):
        return value[pick] if value.dim() and len(value) == batch else value
    if isinstance(value, dict):
        return {key: _some(one, pick, batch, key) for key, one in value.items()}
    if isinstance(value, Context):
        fields = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
        return Context(**_some(fields, pick, batch))
    return value


def _pooled(x: Tensor) -> Tensor:
    """Tokens [B, N, D] or one vector a sample [B, D] -> normalised mean [B, D]."""
    mean = x.mean(dim=1) if x.dim() == 3 else x
    return F.layer_norm(mean, mean.shape[-1:])


register_block(BlockGroup, hidden_states=1, encoder_hidden_states=0)
register_block(PlainBlockGroup, hidden_states=0)
