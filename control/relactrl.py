"""RelaCtrl: small control blocks beside the layers where control matters, each a residual of the picture's stream.

A control stream begins as the condition's tokens; at each chosen place it takes in the transformer's own stream, mixes it by a
two-dimensional shuffle, and what a last map makes of it is added behind the block.

Paper: RelaCtrl: Relevance-Guided Efficient Control for Diffusion Transformers; Cao, Wang, Ma, Feng, Zhang, He, Liu, Cheng, Leng,
    Yin, Zhang; 2025; arXiv:2502.14377.
Differs: permutations come from a seed and are the same in every call (the released code draws them from the global generator
    at inference too); the strength acts, and nothing is computed at 0 or outside of start and end; a block without a control
    block adds nothing (released weights were trained with the last residual added again and again, so `hold_residual` is for
    them); it serves other transformers than PixArt, any size of picture, and several adapters at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from control._files import ControlFile, reader
from control._residual import ControlStream, residual_after
from control._shuffle import Draws, ShuffleMixer, widths
from control._trunk import Shape, Trunk, refuses_condition, trunk_of
from control.base import Control, ControlAdapter, ControlRun, Refused, Use
from dit.ledger import macs_of
from dit.seams import Tensors, around_calls
from dit.spec import knob, spec

PLACES = (0, 2, 3, 4, 5, 6, 7, 8, 9, 18, 19)
"""The blocks of PixArt-alpha behind which the released adapter acts, of 28."""
GROUPS = (6, 2, 6, 4, 2, 2, 4, 4, 6, 6, 6)
"""Groups of each of its control blocks: few where control matters most, since a wide group can do more."""
_DEPTH = 28


@spec("relactrl", paper="RelaCtrl, arXiv:2502.14377")
class RelaCtrl(Control):
    """Control blocks of few parameters where the relevance of layers is highest."""

    about = "A picture of the same size (edges, depth, ...) added behind chosen blocks"

    places: tuple | None = knob(default=None, label="Blocks behind which it acts")  # type: ignore[type-arg]
    groups: tuple | None = knob(default=None, label="Groups of channels at each")  # type: ignore[type-arg]
    heads: int = knob(default=4, label="Heads in each group", low=1, high=64)
    segments: int = knob(default=4, label="Segments a group's values are cut into", low=1, high=64)
    shuffle: str = knob(
        default="fixed",
        label="Permutations: of the seed, or drawn anew in every call as released (not repeatable)",
        choices=("fixed", "drawn"),
    )
    seed: int = knob(default=0, label="Seed of the permutations", low=0, high=2**31 - 1)
    hold_residual: bool = knob(
        default=False, label="Add the last residual behind blocks without a place too (released weights)"
    )

    def check(self) -> None:
        """Raises: ValueError if places and groups are no such numbers, or do not go together."""
        for name, values, low in (("places", self.places, 0), ("groups", self.groups, 1)):
            wrong = [
                one for one in values or () if isinstance(one, bool) or not isinstance(one, int) or one < low
            ]
            if values is not None and (wrong or not values):
                raise ValueError(
                    f"{self.name}: {name} must be whole numbers of at least {low}, got {values!r}"
                )
        if self.places is not None and list(self.places) != sorted(set(self.places)):
            raise ValueError(f"{self.name}: places must rise, got {self.places!r}")
        if self.groups is not None and (self.places is None or len(self.places) != len(self.groups)):
            raise ValueError(
                f"{self.name}: groups go with places, one for each; got {self.groups!r} for {self.places!r}"
            )

    def refuses(self, transformer: nn.Module) -> str | None:
        trunk = trunk_of(transformer)
        return trunk if isinstance(trunk, str) else self.misfit(trunk.shape(transformer))

    def misfit(self, shape: Shape) -> str | None:
        """Return in words why these settings do not fit a transformer of this shape, or None."""
        if self.places is not None and self.places[-1] >= shape.depth:
            return f"there is no block {self.places[-1]}: the blocks are 0 to {shape.depth - 1}"
        unit = 8 * self.heads
        if shape.width % unit:
            fits = [heads for heads in (1, 2, 3, 4, 6, 8) if shape.width % (8 * heads) == 0]
            return f"{shape.width} channels do not divide by 8 x heads = {unit}; heads that fit: " + (
                ", ".join(map(str, fits)) or "none"
            )
        for groups in self.groups or ():
            if groups > shape.width // unit:
                return f"{shape.width} channels hold at most {shape.width // unit} groups of {unit}, got {groups}"
        return None

    def resolved(self, shape: Shape) -> RelaCtrl:
        """Return the settings with places and groups written out: the paper's, at the same fractions of the depth."""
        most = max(1, shape.width // (8 * self.heads))
        found: dict[int, int] = {}
        if self.places is not None:
            found = dict(zip(self.places, self.groups or (min(6, most),) * len(self.places), strict=True))
        else:
            for place, count in zip(PLACES, GROUPS, strict=True):
                found.setdefault(place * shape.depth // _DEPTH, min(count, most))
        return self.replace(places=tuple(found), groups=tuple(found.values()))

    def build(self, transformer: nn.Module) -> RelaCtrlAdapter:
        """As `Control.build`. Raises: Refused."""
        trunk = trunk_of(transformer)
        if isinstance(trunk, str):
            raise Refused(f"{self.name}: {trunk}")
        weight = next(transformer.parameters())
        adapter = RelaCtrlAdapter(self, trunk.shape(transformer))
        kind = weight.dtype if weight.dtype.itemsize > 1 else torch.bfloat16  # layers may be kept in fp8
        return adapter.to(weight.device, kind)


class ControlBlock(nn.Module):
    """One control block: what comes in from one side is mapped, the streams are added and mixed, and a map leads out.

    The first one maps the condition and takes the picture as it is; the others map the picture. Both maps are zero at the start.
    """

    def __init__(self, mixer: ShuffleMixer, *, first: bool) -> None:
        super().__init__()
        width = sum(mixer.parts)
        self.first, self.mixer = first, mixer
        self.before_proj, self.after_proj = nn.Linear(width, width), nn.Linear(width, width)
        for linear in (self.before_proj, self.after_proj):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, image: Tensor, stream: Tensor, vectors: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Picture and control stream [B, N, D] -> the next control stream and the residual, [B, N, D]."""
        both = image + self.before_proj(stream) if self.first else stream + self.before_proj(image)
        stream = self.mixer(both, vectors, draws)
        return stream, self.after_proj(stream)


class RelaCtrlAdapter(ControlAdapter):
    """The control blocks, and a map of the transformer's conditioning to their vectors where it does not make such itself."""

    control: RelaCtrl

    def __init__(self, control: RelaCtrl, shape: Shape) -> None:
        reason = control.misfit(shape)
        if reason is not None:
            raise Refused(f"{control.name}: {reason}")
        super().__init__(control.resolved(shape))
        self.shape, settings = shape, self.control
        # Released files have six rows, of which the mixer uses three; they are kept, so that such files survive.
        rows = 6 if shape.vectors else 3
        self.blocks = nn.ModuleList(
            ControlBlock(
                ShuffleMixer(
                    widths(shape.width, groups, 8 * settings.heads),
                    settings.heads,
                    settings.segments,
                    rows=rows,
                    seed=settings.seed * 1009 + number,
                ),
                first=number == 0,
            )
            for number, groups in enumerate(settings.groups or ())
        )
        self.time_proj = None if shape.vectors else nn.Linear(shape.conditioning, 3 * shape.width)
        if self.time_proj is not None:
            nn.init.zeros_(self.time_proj.weight)
            nn.init.zeros_(self.time_proj.bias)

    @property
    def places(self) -> tuple[int, ...]:
        """The blocks behind which it acts."""
        return tuple(self.control.places or ())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        return next(self.parameters()).dtype

    def refuses(self, transformer: nn.Module, use: Use) -> str | None:
        """Look at transformer and condition."""
        trunk = trunk_of(transformer)
        if isinstance(trunk, str):
            return trunk
        shape = trunk.shape(transformer)
        if shape != self.shape:
            return f"these weights are for another transformer: made for {self.shape}, this is {shape}"
        return refuses_condition(trunk, transformer, use.condition)

    def vectors(self, conditioning: Tensor) -> Tensor:
        """[B, S] or [B, N, S] -> shift, scale and gate (and more) [B, 1 or N, 3 or 6, D]."""
        x = conditioning.to(self.dtype)
        x = x.unsqueeze(1) if x.dim() == 2 else x
        if self.time_proj is not None:
            x = self.time_proj(F.silu(x))
        return x.unflatten(-1, (-1, self.shape.width))

    def draws(self, number: int, tokens: int, device: torch.device) -> Draws:
        """Return the permutations of a control block in a call."""
        mixer: Any = self.blocks[number].mixer
        found: Draws = (mixer.fixed if self.control.shuffle == "fixed" else mixer.drawn)(tokens, device)
        return found

    def macs(self, rows: int, text: int = 0) -> int:
        """Return the multiply-accumulates it adds to one call, for one picture of `rows` tokens."""
        time = 0 if self.time_proj is None else self.time_proj.weight.numel()
        return time + sum(macs_of(block, rows) for block in self.blocks)

    @classmethod
    @contextmanager
    def attached_together(
        cls, transformer: nn.Module, uses: Sequence[Use], run: ControlRun
    ) -> Iterator[None]:
        """Add what all uses make of one and the same picture stream, so that their order does not matter."""
        trunk = trunk_of(transformer)
        assert isinstance(trunk, Trunk)
        acting = [ControlStream(use, trunk, run) for use in uses]
        depth = acting[0].adapter.shape.depth
        places = {place for one in acting for place in one.places(depth)}

        def enter(given: dict[str, Any]) -> None:
            if torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False):
                raise Refused(
                    "relactrl: blocks that are computed again in the backward pass do not see the residual: "
                    "disable_gradient_checkpointing()"
                )
            for one in acting:
                one.enter(given)

        def leave(failed: bool) -> None:
            for one in acting:
                one.leave(failed)

        def residual(place: int, inputs: Tensors, image: Tensor) -> Tensor | None:
            parts = [one.residual(place, inputs, image) for one in acting]
            given = [part for part in parts if part is not None]
            return sum(given[1:], given[0]) if given else None

        with (
            around_calls(transformer, enter, leave),
            residual_after(transformer, dict.fromkeys(sorted(places)), residual),
        ):
            yield


def released(blocks: int = len(PLACES)) -> RelaCtrl:
    """Return the settings of the released PixArt adapter, or of its first control blocks."""
    return RelaCtrl(places=PLACES[:blocks], groups=GROUPS[:blocks], hold_residual=True)


@reader("RelaCtrl")
def read_released(file: ControlFile, transformer: nn.Module) -> tuple[Control, Mapping[str, Tensor]] | None:
    """Read a released file; the base model's weights that lie beside the control blocks are left out."""
    from control.convert.relactrl import from_official, groups_of

    groups = groups_of(file.weights)
    if not groups:
        return None
    trunk = trunk_of(transformer)
    if isinstance(trunk, str) or not trunk.shape(transformer).vectors:
        raise Refused(
            f"{file.name} holds control blocks for PixArt, and {type(transformer).__name__} "
            + (trunk if isinstance(trunk, str) else "gives its blocks an embedding in place of six vectors")
        )
    if len(groups) > len(PLACES):
        raise Refused(
            f"{file.name} has {len(groups)} control blocks; released ones have at most {len(PLACES)}"
        )
    settings = released(len(groups)).replace(groups=groups)
    return settings, from_official(file.weights)
