"""Linear attention: a ReLU in place of the softmax, so that keys and values are summed up once; few heads, a small convolution.

Paper: LiT: Delving into a Simple Linear Diffusion Transformer for Image Generation, Wang et al. 2025, arXiv:2501.12976;
Transformers are RNNs, Katharopoulos et al. 2020, arXiv:2006.16236.
Differs: joins two streams too (the convolution is the picture's alone); rotary positions, where the network has them, turn
queries and keys behind the ReLU, and the normaliser is taken of those that are not turned, since turned ones may be negative.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from dit.attention import skipped
from dit.embeddings import Rotary, rotate
from dit.grid import Grid
from dit.mixers.full import FullMixer, Mixer, heads_of, same_for_all
from dit.model import Context
from dit.spec import knob, spec

EPSILON = 1e-6
"""Added to the normaliser, which is 0 where the ReLU leaves nothing of a query."""


@spec("linear", paper="LiT, arXiv:2501.12976")
class Linear(Mixer):
    """ReLU linear attention with a depthwise convolution of the values, O(N D^2 / heads)."""

    heads: int = knob(
        default=2, label="Heads: fewer cost more operations, hardly time, and make better pictures", low=1
    )
    kernel: int = knob(
        default=5, label="Side of the convolution of the values; 0 for none", low=0, high=31, unit="tokens"
    )
    rotary: bool = knob(default=True, label="Turn queries and keys where the network has rotary positions")
    qk_norm: bool = knob(default=False, label="RMS-normalise queries and keys per head, before the ReLU")

    def check(self) -> None:
        """Raises: ValueError for a convolution without a middle."""
        if self.kernel and self.kernel % 2 == 0:
            raise ValueError(f"{self.name}: kernel must be odd, or 0 for none, got {self.kernel}")

    @property
    def needs_grid(self) -> bool:
        return self.kernel > 0

    def build(self, width: int, heads: int, *, qk_norm: bool = False, pre_only: bool = False) -> nn.Module:
        return LinearMixer(self, width, qk_norm=self.qk_norm or qk_norm, pre_only=pre_only)

    def build_joint(
        self, width: int, heads: int, *, qk_norm: bool = False, context_pre_only: bool = False
    ) -> nn.Module:
        return LinearMixer(
            self, width, qk_norm=self.qk_norm or qk_norm, joint=True, context_pre_only=context_pre_only
        )


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, table: Rotary | None = None, heard: Tensor | None = None
) -> Tensor:
    """ReLU attention of q [B, N, K, d] over k, v [B, M, K, d] -> [B, N, K, d], by way of one d x d sum a head.

    Args:
        q, k, v: queries, keys and values; queries may be the last N of the M tokens.
        table: rotary cosines and sines [M, size]; `size` need not be d, channels are turned in groups of it.
        heard: [B, M], true where a key may be heard.

    Sums run in float32: in half precision they would lose what single tokens add.
    """
    q, k, v = _kernels(q, k, v, heard)
    turned_q, turned_k = _turned(q, k, table)
    total = k.mean(
        dim=1, keepdim=True
    )  # [B, 1, K, d]: means instead of sums, so that N does not matter to EPSILON
    state = turned_k.permute(0, 2, 3, 1) @ v.transpose(1, 2) / k.shape[1]  # [B, K, d, d]
    out = (turned_q.transpose(1, 2) @ state).transpose(1, 2)  # [B, N, K, d]
    return out / ((q * total).sum(dim=-1, keepdim=True) + EPSILON)


def linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, table: Rotary | None = None, heard: Tensor | None = None
) -> Tensor:
    """The same by way of the N x M weights: what `linear_attention` is compared to, O(N M)."""
    q, k, v = _kernels(q, k, v, heard)
    turned_q, turned_k = _turned(q, k, table)
    weights = torch.einsum("bnkd,bmkd->bknm", turned_q, turned_k) / k.shape[1]
    norm = torch.einsum("bnkd,bmkd->bknm", q, k).sum(dim=-1) / k.shape[1] + EPSILON
    return torch.einsum("bknm,bmkd->bnkd", weights / norm[..., None], v)


def _kernels(q: Tensor, k: Tensor, v: Tensor, heard: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k = q.float().relu(), k.float().relu()
    return q, k if heard is None else k * heard[:, :, None, None], v.float()


def _turned(q: Tensor, k: Tensor, table: Rotary | None) -> tuple[Tensor, Tensor]:
    if table is None:
        return q, k
    size, skipped = table[0].shape[-1], k.shape[1] - q.shape[1]
    flat_q, flat_k = (x.flatten(2).unflatten(-1, (-1, size)) for x in (q, k))
    flat_q = rotate(flat_q, (table[0][skipped:], table[1][skipped:]))
    return flat_q.reshape(q.shape), rotate(flat_k, table).reshape(k.shape)


class LinearProcessor:
    """Queries, keys and values of one or two streams, text first, through one `linear_attention`.

    It carries the backend that `set_attention_backend` chose, as all processors do, and has no use for it: there is no softmax.
    """

    _attention_backend: ClassVar[Any] = None
    _parallel_config: ClassVar[Any] = None

    def __call__(
        self,
        attn: LinearMixer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        grid: Grid | None = None,
        length: int = 0,
        heads: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v = attn.project(hidden_states)
        local = attn.local(v[:, length:], grid)  # [B, N, D]
        if encoder_hidden_states is not None:
            length = encoder_hidden_states.shape[1]
            added_q, added_k, added_v = attn.project_added(encoder_hidden_states)
            q = q if added_q is None else torch.cat([added_q, q], dim=1)
            k, v = torch.cat([added_k, k], dim=1), torch.cat([added_v, v], dim=1)
        table = image_rotary_emb if attn.turns else None
        heard = attention_mask
        if heard is not None:
            heard = same_for_all(heard, "linear: sums up its keys once for all queries")
        out = linear_attention(q, k, v, table=table, heard=heard)
        out = out.flatten(2).to(hidden_states.dtype)
        text = out.shape[1] - (k.shape[1] - length)  # text tokens that ask
        out_text, out_image = out.split_with_sizes([text, out.shape[1] - text], dim=1)
        if local is not None:
            out_image = out_image + local
        if heads is not None:
            out_text, out_image = gated_heads(out_text, heads), gated_heads(out_image, heads)
        if encoder_hidden_states is None:
            return attn.project_out(torch.cat([out_text, out_image], dim=1) if text else out_image)
        if attn.context_pre_only:
            return attn.project_out(out_image)
        return attn.project_out(out_image), attn.to_add_out(out_text)


class LinearMixer(FullMixer):
    """The network of `Linear`: names of weights are those of `Attention`, and `conv` of the convolution."""

    processor: Any
    _default_processor_cls = LinearProcessor  # type: ignore[assignment]
    _available_processors: ClassVar[list[type]] = [LinearProcessor]

    def __init__(
        self,
        settings: Linear,
        width: int,
        *,
        qk_norm: bool = False,
        joint: bool = False,
        context_pre_only: bool = False,
        pre_only: bool = False,
    ) -> None:
        if width % settings.heads:
            raise ValueError(f"linear: the width {width} does not divide by {settings.heads} heads")
        super().__init__(
            width,
            settings.heads,
            qk_norm=qk_norm,
            joint=joint,
            context_pre_only=context_pre_only,
            pre_only=pre_only,
        )
        for one in self.modules():
            if isinstance(one, nn.Linear):
                nn.init.xavier_uniform_(one.weight)
                nn.init.zeros_(one.bias)
        self.turns, self.kernel = settings.rotary, settings.kernel
        self.conv = (
            nn.Conv2d(width, width, self.kernel, padding=self.kernel // 2, groups=width)
            if self.kernel
            else None
        )
        AttentionModuleMixin.set_processor(self, LinearProcessor())

    def told(self, context: Context, hidden_states: Tensor, text: Tensor | None) -> dict[str, Any]:
        """Return what the processor is told of a context: places, how many text tokens stand first, gates of heads."""
        return {"grid": context.grid, "length": context.length} | heads_of(context)

    def local(self, v: Tensor, grid: Grid | None) -> Tensor | None:
        """Values [B, N, K, d] -> [B, N, D], each token's neighbourhood weighed by the convolution, frame by frame.

        None where there is no convolution or no grid.

        Raises: ValueError where the tokens are not those of the grid.
        """
        if self.conv is None or grid is None:
            return None
        return convolved(self.conv, v.flatten(2), grid)

    def macs(self, rows: int, text: int = 0) -> int:
        """Return the multiply-accumulates for `rows` tokens. `text` more in joint attention, else so many of the rows."""
        linear = super().macs(rows, text)
        queries = rows + (text if self.joint and not self.context_pre_only else 0)
        keys = rows + (text if self.joint else 0)
        image = rows if self.joint else rows - text
        return (
            linear
            - 2 * queries * keys * self.inner_dim
            + (queries + keys) * self.inner_dim * self.head_dim
            + image * self.inner_dim * self.kernel**2
        )


def convolved(conv: nn.Conv2d, x: Tensor, grid: Grid) -> Tensor:
    """Run a convolution over the tokens x [B, N, C] of a grid, frame by frame -> [B, N, C].

    Raises: ValueError where the tokens are not those of the grid.
    """
    if x.shape[1] != grid.tokens:
        raise ValueError(
            f"a convolution over {grid.frames} x {grid.height} x {grid.width} tokens needs all {grid.tokens}, got {x.shape[1]}"
        )
    batch, tokens, channels = x.shape
    # a view with channels last: what the convolution needs, without a copy
    picture = x.reshape(batch * grid.frames, grid.height, grid.width, channels).permute(0, 3, 1, 2)
    return conv(picture).permute(0, 2, 3, 1).reshape(batch, tokens, channels)


def gated_heads(x: Tensor, heads: Tensor) -> Tensor:
    """Multiply the channels of x [B, N, D] that belong to each of the network's heads by its gate [B, K].

    Sums over all tokens have heads of their own kind, so a head that is off is computed all the same: it costs little here.
    """
    return x * heads.to(x.dtype).repeat_interleave(x.shape[-1] // heads.shape[-1], dim=1).unsqueeze(1)


# Not by `register`, which first imports many transformers; diffusers does that when it looks something up.
AttentionProcessorRegistry._registry[LinearProcessor] = AttentionProcessorMetadata(
    skip_processor_output_fn=skipped
)
