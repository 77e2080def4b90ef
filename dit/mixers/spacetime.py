"""Attention over time at every place, then over the places of every frame: F N^2 + N F^2 in place of (F N)^2.

Paper: VDT: General-purpose Video Diffusion Transformers via Mask Modeling, Lu et al. 2023, arXiv:2305.13311.
Differs: as the slot of any one-stream block, both steps stand where that block has its attention; VDT's own block, where
the first one comes before the block's norm, is in `dit.backbones.vdt`. Masks of keys, rotary positions and routed heads are split
along with the tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dit.attention import attend
from dit.embeddings import Rotary
from dit.grid import Grid
from dit.ledger import macs_of
from dit.mixers.full import FullMixer, Mixer, grid_alone, keys_of, within
from dit.model import Context
from dit.spec import knob, spec


@spec("spacetime", paper="VDT, arXiv:2305.13311")
class SpaceTime(Mixer):
    """Temporal, then spatial attention; a picture is a clip of one frame."""

    temporal: bool = knob(True, "Attend over time")
    qk_norm: bool = knob(False, "RMS-normalise queries and keys per head")

    @property
    def needs_grid(self) -> bool:
        return True

    @property
    def cut_between(self) -> str:
        return "frames"

    def build(self, width: int, heads: int, *, qk_norm: bool = False, pre_only: bool = False) -> nn.Module:
        return SpaceTimeMixer(
            width, heads, temporal=self.temporal, qk_norm=self.qk_norm or qk_norm, pre_only=pre_only
        )

    def build_temporal(self, width: int, heads: int) -> TemporalAttention | None:
        """Return what VDT's block adds to its stream before its norm, or None where frames do not hear each other."""
        return TemporalAttention(width, heads, qk_norm=self.qk_norm) if self.temporal else None

    def build_spatial(self, width: int, heads: int) -> SpatialAttention:
        """Return the attention within every frame."""
        return SpatialAttention(width, heads, qk_norm=self.qk_norm)


class TimeNorm(nn.LayerNorm):
    """Layer norm with weights, eps 1e-5, computed in its weights' dtype: casting by layers leaves norms in theirs."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> the same, in the dtype that came in."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class TemporalAttention(nn.Module):
    """Norm with weights, attention over the frames at every place, one more linear map; no modulation and no gate."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm = TimeNorm(width)
        self.attn = FullMixer(width, heads, qk_norm=qk_norm)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, context: Context) -> Tensor:
        """[B, N, D] -> what is to be added to it, [B, N, D]."""
        grid = grid_alone("spacetime", context)
        x = _sites(self.norm(hidden_states), grid)  # [B * S, F, D]
        keys = keys_of("spacetime", context.mask, *hidden_states.shape[:2])
        mask = None if keys is None else _heard(_sites(keys, grid))
        rotary = None if context.rotary is None else _each(context.rotary, hidden_states, grid, _sites)
        told = dict(context.attention_kwargs)
        if context.share is not None:  # the frames of a place lie with several ranks
            told["attention"] = context.share.along_time.attention(attend)
        attended = self.attn(x, None, mask, rotary, **told)
        added: Tensor = self.proj(_from_sites(attended, grid))
        return added

    def macs_on(self, grid: Grid, _text: int = 0) -> int:
        """Return the multiply-accumulates for one clip of `grid`."""
        return grid.height * grid.width * self.attn.macs(grid.frames) + macs_of(self.proj, grid.tokens)


class SpatialAttention(FullMixer):
    """Full attention within every frame; its weights are those of full attention."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        context: Context | None = None,
        **kwargs: Any,
    ) -> Any:
        """[B, N, D] -> [B, N, D]. Raises: ValueError where text tokens stand in the sequence."""
        if context is None:
            return super().forward(
                hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
            )
        grid = grid_alone("spacetime", context)
        changes: dict[str, Any] = {"share": None}  # a frame lies with one rank
        keys = keys_of("spacetime", context.mask, *hidden_states.shape[:2])
        if keys is not None:
            changes["mask"] = _heard(_frames(keys, grid))
        if context.rotary is not None:
            changes["rotary"] = _each(context.rotary, hidden_states, grid, _frames)
        inner = within(
            context,
            hidden_states,
            lambda one: one.repeat_interleave(grid.frames, dim=0),
            grid=Grid(1, grid.height, grid.width),
            **changes,
        )
        attended: Tensor = super().forward(_frames(hidden_states, grid), context=inner, **kwargs)
        return attended.reshape(hidden_states.shape[0], grid.tokens, -1)

    def macs_on(self, grid: Grid, _text: int = 0) -> int:
        """Return the multiply-accumulates for one clip of `grid`."""
        return grid.frames * self.macs(grid.height * grid.width)


class SpaceTimeMixer(SpatialAttention):
    """The network of `SpaceTime` in the slot of a block: temporal attention is added first, spatial attention answers."""

    def __init__(self, width: int, heads: int, *, temporal: bool = True, **options: Any) -> None:
        super().__init__(width, heads, **options)
        qk_norm = bool(options.get("qk_norm", False))
        self.temporal = TemporalAttention(width, heads, qk_norm=qk_norm) if temporal else None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[B, N, D] -> [B, N, D]."""
        context = kwargs.get("context")
        if context is not None and self.temporal is not None:
            hidden_states = hidden_states + self.temporal(hidden_states, context)
        return super().forward(hidden_states, *args, **kwargs)

    def macs_on(self, grid: Grid, text: int = 0) -> int:
        """Return the multiply-accumulates for one clip of `grid`."""
        return super().macs_on(grid, text) + (0 if self.temporal is None else self.temporal.macs_on(grid))


def _frames(x: Tensor, grid: Grid) -> Tensor:
    """[B, N, ...] -> [B * F, S, ...], S being the places of a frame."""
    return x.reshape(x.shape[0] * grid.frames, grid.height * grid.width, *x.shape[2:])


def _sites(x: Tensor, grid: Grid) -> Tensor:
    """[B, N, ...] -> [B * S, F, ...]."""
    return x.unflatten(1, (grid.frames, -1)).transpose(1, 2).flatten(0, 1)


def _from_sites(x: Tensor, grid: Grid) -> Tensor:
    """The inverse of `_sites`."""
    return x.unflatten(0, (-1, grid.height * grid.width)).transpose(1, 2).flatten(1, 2)


def _heard(keys: Tensor) -> Tensor:
    """[B', M] -> [B', 1, 1, M]. Where nobody is heard, all are: the answer is dropped, and must not be NaN."""
    return (keys | ~keys.any(dim=-1, keepdim=True))[:, None, None]


def _each(table: Rotary, x: Tensor, grid: Grid, split: Any) -> Rotary:
    """Give every token of every group its angles: [N, head size] or [B, N, head size] -> [B', M, head size]."""
    cos, sin = (split(one.expand(len(x), *one.shape[-2:]), grid) for one in table)
    return cos, sin
