"""One sequence over several processes: each has a share of the tokens, and only attention exchanges anything.

Paper: DeepSpeed Ulysses, Jacobs et al. 2023, arXiv:2309.14509 (each rank answers for all tokens, but for its share of the
heads); Ring Attention with Blockwise Transformers, Liu et al. 2023, arXiv:2310.01889 (keys and values go round, answers are
merged by their log-sum-exp).
Differs: tokens and heads need not divide by the ranks, text stands before the picture, masks of keys and Mask2DiT's scenes hold;
every exchange is one all-to-all, so gloo on CPUs serves as well as nccl. It is switched on by diffusers' own
`model.enable_parallelism(config=ContextParallelConfig(...))`; a network cuts its streams itself, because what a block knows
beside them (positions, scenes, keys) lies where no plan of tensors reaches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from dit._exchange import Attends, Span, exchange, ring, ulysses
from dit.grid import Grid
from dit.segments import Segments
from dit.spec import parse

if TYPE_CHECKING:
    from dit.model import Context

HOWS = ("ulysses", "ring")


class Unshareable(ValueError):
    """A network, or a sequence, that ranks cannot share, in words."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that share a sequence: how, which of them this is, how many there are, and their group."""

    how: str
    rank: int
    size: int
    group: Any = None

    @classmethod
    def of(cls, config: Any) -> Self:
        """Return those of a model's `_parallel_config`. Raises: ValueError for Ulysses inside a ring."""
        found = config.context_parallel_config
        if found.ring_degree > 1 and found.ulysses_degree > 1:
            raise ValueError(
                "context parallelism: one of ulysses_degree and ring_degree is 1 for Leapfrog's networks, got "
                f"ulysses_degree={found.ulysses_degree}, ring_degree={found.ring_degree}"
            )
        group = found._flattened_mesh.get_group()
        how = "ring" if found.ring_degree > 1 else "ulysses"
        return cls(how, dist.get_rank(group), dist.get_world_size(group), group)

    def split(self, count: int, what: str) -> tuple[int, ...]:
        """Deal `count` things out as evenly as can be, the first ranks one more. Raises: ValueError if a rank gets none."""
        if count < self.size:
            raise Unshareable(
                f"context parallelism: at least one of the {what} for each of {self.size} ranks, got {count}"
            )
        whole, rest = divmod(count, self.size)
        return tuple(whole + (rank < rest) for rank in range(self.size))


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """What each rank has of a joint sequence, text first: counts of text tokens and of picture tokens, rank by rank.

    `grid` is where this rank's picture tokens stand if it has whole frames, else where all stand. Inside a rank its text
    stands before its part of the picture.
    """

    ranks: Ranks
    text: tuple[int, ...]
    picture: tuple[int, ...]
    grid: Grid | None = None
    plane: int = 0  # tokens of a frame where frames are kept whole

    @classmethod
    def of(cls, ranks: Ranks, grid: Grid, text: int = 0, *, frames: bool = False) -> Self:
        """Deal out a picture of `grid` and `text` text tokens; `frames`: by whole frames. Raises: ValueError for too few."""
        words = ranks.split(text, "text tokens") if text else (0,) * ranks.size
        if not frames:
            return cls(ranks, words, ranks.split(grid.tokens, "picture tokens"), grid)
        plane, counts = grid.height * grid.width, ranks.split(grid.frames, "frames")
        mine = dataclasses.replace(grid, frames=counts[ranks.rank])
        return cls(ranks, words, tuple(count * plane for count in counts), mine, plane)

    @property
    def length(self) -> int:
        """Number of text tokens of the whole sequence."""
        return sum(self.text)

    @property
    def tokens(self) -> int:
        """Number of picture tokens of the whole sequence."""
        return sum(self.picture)

    @property
    def along_time(self) -> Share:
        """The same ranks with the frames of one place as their sequence."""
        none = (0,) * self.ranks.size
        return Share(self.ranks, none, tuple(count // self.plane for count in self.picture))

    def cut(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's part of what is one a picture token along `dim`."""
        return x.split(self.picture, dim)[self.ranks.rank]

    def cut_text(self, text: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's part of what is one a text token along `dim`."""
        return text.split(self.text, dim)[self.ranks.rank]

    def vectors(self, x: Tensor) -> Tensor:
        """Return this rank's part of [B, N, D], one vector a token; [B, D], one a sample, stays as it is."""
        return self.cut(x) if x.dim() == 3 else x

    def whole(self, x: Tensor) -> Tensor:
        """Put the parts of all ranks [B, n, D] together to all picture tokens [B, N, D]."""
        batch, _, width = x.shape
        sizes = [batch * count * width for count in self.picture]
        found = exchange(
            x.reshape(-1).repeat(self.ranks.size), [x.numel()] * self.ranks.size, sizes, self.ranks.group
        )
        parts = zip(found.split(sizes), self.picture, strict=True)
        return torch.cat([part.view(batch, count, width) for part, count in parts], dim=1)

    def counts(self, scenes: Sequence[int], *, text: bool = False) -> tuple[int, ...]:
        """Return how many tokens of each scene (or caption) of these lengths are this rank's; maybe none."""
        start, end = self._span(self.text if text else self.picture, self.ranks.rank)
        ends = list(accumulate(scenes))
        return tuple(
            max(0, min(b, end) - max(b - count, start)) for b, count in zip(ends, scenes, strict=True)
        )

    def context(self, context: Context) -> Context:
        """Return what this rank's blocks may know. The mask stays that of the whole sequence: attention reads it there.

        Raises: ValueError for one time a token where text takes the mean of all, and for masked keys where frames are whole.
        """
        emb = context.emb if context.segments is not None else self.vectors(context.emb)
        if emb is not context.emb and self.length:
            raise Unshareable("context parallelism: one time a sample beside a text stream, got one a token")
        if self.plane and context.mask is not None:
            raise Unshareable(
                "context parallelism: all frames are heard where they are shared, got a mask of keys"
            )
        time, step = context.time, context.timestep
        return dataclasses.replace(
            context,
            emb=emb,
            time=None if time is None else self.vectors(time),
            timestep=None if step is None else self.cut(step) if step.dim() == 2 else step,
            rotary=None if context.rotary is None else (self._angles(context.rotary[0]), self._angles(context.rotary[1])),
            grid=self.grid,
            share=self,
        )  # fmt: skip

    def attention(self, inner: Attends, segments: Segments | None = None) -> Attends:
        """Return what stands in the place of `inner` (attend, or attention within `segments`) on this rank's tokens."""
        if self.ranks.how == "ring":
            return functools.partial(ring, share=self, segments=segments)
        return functools.partial(ulysses, share=self, inner=inner)

    def asks(self, q: Tensor) -> tuple[int, ...]:
        """Return the text tokens of each rank among the queries: all or, where the text is heard alone, none."""
        mine, picture = self.text[self.ranks.rank], self.picture[self.ranks.rank]
        if q.shape[1] not in (mine + picture, picture):
            raise ValueError(
                f"context parallelism: {q.shape[1]} queries are not this rank's {mine} text and {picture} picture tokens"
            )
        return self.text if q.shape[1] == mine + picture else (0,) * self.ranks.size

    def places(self, rank: int, *, text: bool = True) -> list[tuple[Span, int]]:
        """Return where in the whole sequence a rank's text and picture tokens stand, and from which of its own on."""
        words = self._span(self.text, rank)
        start, end = self._span(self.picture, rank)
        moved = ((start + self.length, end + self.length), words[1] - words[0] if text else 0)
        return [(words, 0), moved] if text else [moved]

    def _angles(self, table: Tensor) -> Tensor:
        """Cut a table of positions, of the picture or of text and picture [..., L + N, head size]."""
        if table.shape[-2] == self.tokens:
            return self.cut(table, -2)
        words, picture = table.split([self.length, self.tokens], dim=-2)
        return torch.cat([self.cut_text(words, -2), self.cut(picture, -2)], dim=-2)

    @staticmethod
    def _span(counts: Sequence[int], rank: int) -> Span:
        start = sum(counts[:rank])
        return start, start + counts[rank]


def part_of(share: Share | None, x: Tensor, *, tokens: bool = False) -> Tensor:
    """Return this rank's part of what is one a picture token; `tokens`: if it is, [B, N, D], and not one a sample, [B, D]."""
    if share is None:
        return x
    return share.vectors(x) if tokens else share.cut(x)


def whole_of(share: Share | None, x: Tensor) -> Tensor:
    """Return the picture tokens of all ranks [B, N, D]; in a single process, x."""
    return x if share is None else share.whole(x)


def refusal(network: Any) -> str | None:
    """Return in words why a network cannot be shared by ranks, or None if it can."""
    who = type(network).__name__
    if getattr(network, "_cp_plan", None) is None:
        return f"{who} has no plan for context parallelism"
    from dit.experts.dense import Experts
    from dit.mixers.full import Mixer
    from dit.model import Backbone

    if not isinstance(network, Backbone):
        return None
    mixer, experts = parse(Mixer, network.config["mixer"]), parse(Experts, network.config["experts"])
    if not mixer.cut_between:
        return (
            f"{who}: its mixer {mixer.name} reads tokens across every cut of the sequence, so ranks cannot share it; full, "
            "scenes and spacetime can be shared"
        )
    if not experts.alone:
        return f"{who}: its experts {experts.name} decide by all tokens, so ranks cannot share them; dense and swiglu can be shared"
    return None


def resolved(network: Any, config: Any) -> Any:
    """Record a config on a model as diffusers does, but on the device of its weights: diffusers itself asks for an accelerator."""
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

    whole = (
        ParallelConfig(context_parallel_config=config)
        if isinstance(config, ContextParallelConfig)
        else config
    )
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "context parallelism: torch.distributed.init_process_group comes first, as under torchrun"
        )
    found, device = whole.context_parallel_config, next(network.parameters()).device
    mesh = found.mesh or dist.device_mesh.init_device_mesh(
        device.type, found.mesh_shape, mesh_dim_names=found.mesh_dim_names
    )
    whole.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
    network._parallel_config = whole
    return whole


@contextmanager
def shared(network: Any, how: str, mesh: Any = None) -> Iterator[None]:
    """Share a network's sequences between all ranks of torch.distributed inside the block; at the end it is as before.

    Args:
        network: one of Leapfrog's, or one of diffusers that has a plan.
        how: "ulysses" or "ring". mesh: diffusers' device mesh ("ring", "ulysses"), where one is there already.

    Raises:
        Unshareable: another `how`, or a network that cannot be shared, in words.
    """
    from diffusers.hooks.context_parallel import remove_context_parallel
    from diffusers.models._modeling_parallel import ContextParallelConfig

    from dit.model import Backbone
    from dit.seams import patched

    size, ours = dist.get_world_size(), isinstance(network, Backbone)
    reason = refusal(network) if ours else _refusal_of_guest(network, how, size)
    if how not in HOWS or reason is not None:
        raise Unshareable(reason or f"context parallelism: ulysses or ring, got {how!r}")
    # nccl gathers parts of different lengths, gloo does not: there diffusers' plain form asks for equal ones
    anything = not ours and next(network.parameters()).is_cuda
    options: dict[str, Any] = {f"{how}_degree": size, "mesh": mesh} | (
        {f"{how}_anything": True} if anything else {}
    )
    kept = [
        module.processor
        for module in network.modules()
        if hasattr(getattr(module, "processor", None), "_parallel_config")
    ]
    try:
        with patched(network, "_resolve_parallel_config", functools.partial(resolved, network)):
            _enable(network, ContextParallelConfig(**options))
        yield
    except AssertionError as error:
        if "divisible by mesh size" not in str(error):
            raise
        raise Unshareable(
            f"context parallelism: a count of tokens that divides by {size} ranks for {type(network).__name__} on this"
            " device; choose another size or number of frames"
        ) from error
    finally:
        remove_context_parallel(network, network._cp_plan)
        network._parallel_config = None
        for processor in kept:
            vars(processor).pop("_parallel_config", None)


def _enable(network: Any, config: Any) -> None:
    """Let diffusers do its part. Raises: Unshareable for what it refuses, such as an attention backend."""
    try:
        network.enable_parallelism(config=config)
    except ValueError as error:
        raise Unshareable(str(error)) from error


def _refusal_of_guest(network: Any, how: str, size: int) -> str | None:
    """Return in words why one of diffusers' networks cannot be shared by `size` ranks, or None."""
    who, heads = type(network).__name__, getattr(network.config, "num_attention_heads", size)
    reason = refusal(network)
    on_device = next(network.parameters()).is_cuda
    if reason is None and how == "ring" and not on_device:
        return (
            f"{who}: diffusers' ring needs an attention backend that says its log-sum-exp (flash, cudnn), and there is none on "
            "this device; take ulysses"
        )
    if reason is None and not on_device and heads % size:
        return f"{who}: its {heads} heads do not divide by {size} ranks"
    return reason
