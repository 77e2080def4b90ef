"""The one attention call, and the module around it.

Every attention of the project ends in `attend`, which hands [B, N, K, head size] tensors to diffusers' dispatcher; so
`set_attention_backend` (native, flex, xformers, flash where installed) and sparse accelerators reach all of it.

Paper: Scaling Rectified Flow Transformers, Esser et al. 2024, arXiv:2403.03206 (joint attention, QK-norm).
Differs: a pre-only text stream supplies keys and values alone; its queries, which nobody reads, are not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from dit.embeddings import Rotary, rotate
from dit.layers import HeadNorm, cut, sliceable
from dit.ledger import macs_of

_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, processor: Any = None) -> Tensor:
    """Softmax attention of q [B, N, K, head size] over k, v [B, M, K, head size] -> [B, N, K, head size].

    `mask` is boolean and broadcastable to [B, K, N, M], True where a key may be heard. `processor` carries the backend that
    `set_attention_backend` chose.
    """
    out: Tensor = dispatch_attention_fn(
        q,
        k,
        v,
        attn_mask=mask,
        backend=getattr(processor, "_attention_backend", None),
    )  # where ranks share the sequence, dit.context_parallel stands around this call, not diffusers' exchange inside it
    return out


class JointProcessor:
    """Queries, keys and values of one or two streams, text first, through one `attend`."""

    _attention_backend: ClassVar[Any] = None
    _parallel_config: ClassVar[Any] = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        heads: Tensor | None = None,
        attention: Callable[..., Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`heads` are the places of the heads to compute [K'], or gates [B, K] to multiply all of them by.

        `attention` is called in the place of `attend` by mixers that cut the sequence.
        """
        keep = heads if heads is not None and heads.dim() == 1 else None
        q, k, v = attn.project(hidden_states, keep)
        text = 0
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            added_q, added_k, added_v = attn.project_added(encoder_hidden_states, keep)
            q = q if added_q is None else torch.cat([added_q, q], dim=1)
            k, v = torch.cat([added_k, k], dim=1), torch.cat([added_v, v], dim=1)
        if image_rotary_emb is not None:
            k = rotate(k, image_rotary_emb)
            skipped = k.shape[1] - q.shape[1]
            q = rotate(q, (image_rotary_emb[0][..., skipped:, :], image_rotary_emb[1][..., skipped:, :]))
        attended = (attention or attend)(
            q, k, v, attention_mask, processor=self
        )  # [B, L + N, K or K', head size]
        if heads is not None and keep is None:
            attended = attended * heads[:, None, :, None].to(attended.dtype)
        out = attended.flatten(2).to(hidden_states.dtype)
        if encoder_hidden_states is None or attn.context_pre_only:
            return attn.project_out(out, keep)
        out_text, out_image = out.split_with_sizes([text, out.shape[1] - text], dim=1)
        return attn.project_out(out_image, keep), attn.project_out(out_text, keep, added=True)


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head attention of one stream, or of an image and a text stream that hear each other.

    Names of weights are diffusers' (`to_q`, `add_q_proj`, `norm_q`, ...), so LoRA files and processors fit.
    """

    processor: Callable[..., Any]
    to_qkv: Callable[[Tensor], Tensor]
    to_added_qkv: Callable[[Tensor], Tensor]
    to_out: nn.ModuleList
    _default_processor_cls = JointProcessor
    _available_processors: ClassVar[list[type]] = [JointProcessor]

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool = False,
        joint: bool = False,
        context_pre_only: bool = False,
        pre_only: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide by {heads} heads")
        self.heads, self.head_dim, self.inner_dim = heads, width // heads, width
        self.joint, self.context_pre_only, self.pre_only = joint, context_pre_only, pre_only
        self.use_bias, self.added_proj_bias = bias, bias
        self.added_kv_proj_dim = width if joint else None
        self.is_cross_attention = False

        def norm() -> nn.Module:
            return HeadNorm(self.head_dim) if qk_norm else nn.Identity()

        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.norm_q, self.norm_k = norm(), norm()
        if not pre_only:
            self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Identity()])
        if joint:
            self.add_k_proj, self.add_v_proj = (
                nn.Linear(width, width, bias=bias),
                nn.Linear(width, width, bias=bias),
            )
            self.norm_added_k = norm()
            if not context_pre_only:
                self.add_q_proj, self.to_add_out = nn.Linear(width, width, bias=bias), nn.Linear(width, width)
                self.norm_added_q = norm()
        self._supports_qkv_fusion = not (joint and context_pre_only)
        AttentionModuleMixin.set_processor(self, JointProcessor())

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        **kwargs: Any,
    ) -> Any:
        """[B, N, D] (and text [B, L, D]) -> [B, N, D], or the pair (image, text) unless the text is pre-only."""
        return self.processor(
            self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
        )

    def project(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> queries, keys, values [B, N, K, head size], normalised; of the heads `keep` alone where given."""
        if keep is not None:
            q, k, v = (self._split(self._some(one, x, keep)) for one in (self.to_q, self.to_k, self.to_v))
            return self.norm_q(q), self.norm_k(k), v
        q, k, v = (
            self.to_qkv(x).chunk(3, dim=-1)
            if self.fused_projections
            else (self.to_q(x), self.to_k(x), self.to_v(x))
        )
        q, k, v = self._split(q), self._split(k), self._split(v)
        return self.norm_q(q), self.norm_k(k), v

    def project_added(self, text: Tensor, keep: Tensor | None = None) -> tuple[Tensor | None, Tensor, Tensor]:
        """[B, L, D] -> the text stream's queries (None where it is pre-only), keys and values, normalised."""
        q: Tensor | None
        if keep is not None:
            q = None if self.context_pre_only else self._some(self.add_q_proj, text, keep)
            k, v = self._some(self.add_k_proj, text, keep), self._some(self.add_v_proj, text, keep)
        elif self.fused_projections:
            q, k, v = self.to_added_qkv(text).chunk(3, dim=-1)
        else:
            q = None if self.context_pre_only else self.add_q_proj(text)
            k, v = self.add_k_proj(text), self.add_v_proj(text)
        k, v = self._split(k), self._split(v)
        queries = None if q is None else self.norm_added_q(self._split(q))
        return queries, self.norm_added_k(k), v

    def project_out(self, x: Tensor, keep: Tensor | None = None, *, added: bool = False) -> Tensor:
        """The output map of the image stream (or the `added` one); the identity in a pre-only (parallel) block."""
        if keep is not None:
            return self._out_of_some(x, keep, added)
        if added:
            out: Tensor = self.to_add_out(x)
        else:
            out = x if self.pre_only else self.to_out[1](self.to_out[0](x))
        return out

    def can_leave_out_heads(self, dtype: torch.dtype) -> bool:
        """Whether single heads need not be computed: every map can be cut, and q, k, v were not made one."""
        maps = [self.to_q, self.to_k, self.to_v] + ([] if self.pre_only else [self.to_out[0]])
        maps += [getattr(self, name) for name in _ADDED if self.joint and hasattr(self, name)]
        return not self.fused_projections and all(sliceable(one, dtype) for one in maps)

    def macs(self, rows: int, text: int = 0) -> int:
        """Return the multiply-accumulates for `rows` tokens and, in joint attention, `text` text tokens."""
        image = [self.to_q, self.to_k, self.to_v] + ([] if self.pre_only else [self.to_out])
        added = [getattr(self, name) for name in _ADDED if hasattr(self, name)] if self.joint else []
        queries = rows + (text if self.joint and not self.context_pre_only else 0)
        keys = rows + (text if self.joint else 0)
        linear = sum(macs_of(one, rows) for one in image) + sum(macs_of(one, text) for one in added)
        return linear + 2 * queries * keys * self.inner_dim

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _some(self, layer: nn.Linear, x: Tensor, keep: Tensor) -> Tensor:
        """The rows of a linear map that belong to the heads `keep`."""
        return nn.functional.linear(x, *cut(layer, self._channels(keep), 0))

    def _channels(self, keep: Tensor) -> Tensor:
        return (keep[:, None] * self.head_dim + torch.arange(self.head_dim, device=keep.device)).flatten()

    def _out_of_some(self, x: Tensor, keep: Tensor, added: bool) -> Tensor:
        """The output map of the heads `keep`; in a pre-only block zeros stand for the others."""
        if self.pre_only and not added:
            whole = x.new_zeros(*x.shape[:2], self.heads, self.head_dim)
            return whole.index_copy(2, keep, self._split(x)).flatten(2)
        layer: Any = self.to_add_out if added else self.to_out[0]
        return nn.functional.linear(x, *cut(layer, self._channels(keep), 1))


def skipped(
    attn: Attention, hidden_states: Tensor, *_: Any, encoder_hidden_states: Tensor | None = None, **__: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """What an attention returns where diffusers' layer skip leaves it out: its inputs."""
    if encoder_hidden_states is None or attn.context_pre_only:
        return hidden_states
    return hidden_states, encoder_hidden_states


def joint_mask(text: Tensor | None, tokens: int) -> Tensor | None:
    """Turn a mask of text tokens [B, L] into one of the keys of a joint sequence, text first: [B, 1, 1, L + N]."""
    if text is None:
        return None
    keys = nn.functional.pad(text.bool(), (0, tokens), value=True)
    return keys[:, None, None, :]


# Not by `register`, which first imports many transformers; diffusers does that when it looks something up.
AttentionProcessorRegistry._registry[JointProcessor] = AttentionProcessorMetadata(
    skip_processor_output_fn=skipped
)
