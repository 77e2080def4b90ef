"""Cross-attention: tokens ask, others answer.

Paper: Attention Is All You Need, Vaswani et al. 2017, arXiv:1706.03762.
"""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from dit.attention import Attention, attend
from dit.embeddings import Rotary, rotate
from dit.ledger import macs_of


class CrossProcessor:
    """Queries of one sequence over keys and values of another, through one `attend`."""

    _attention_backend: ClassVar[Any] = None
    _parallel_config: ClassVar[Any] = None

    def __call__(
        self,
        attn: CrossAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        key_rotary_emb: Rotary | None = None,
    ) -> Tensor:
        q, k, v = attn.ask(hidden_states, encoder_hidden_states)
        q = q if image_rotary_emb is None else rotate(q, image_rotary_emb)
        k = k if key_rotary_emb is None else rotate(k, key_rotary_emb)
        out = attend(q, k, v, attention_mask, processor=self).flatten(2).to(hidden_states.dtype)
        return attn.project_out(out)


class CrossAttention(Attention):
    """Multi-head attention of one sequence over another; names of weights are those of `Attention`."""

    to_kv: nn.Module
    _default_processor_cls = CrossProcessor  # type: ignore[assignment]
    _available_processors: ClassVar[list[type]] = [CrossProcessor]

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False, bias: bool = True) -> None:
        super().__init__(width, heads, qk_norm=qk_norm, bias=bias)
        self.is_cross_attention = True
        AttentionModuleMixin.set_processor(self, CrossProcessor())

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Askers [B, N, D], answerers [B, M, D], mask broadcast to [B, K, N, M] -> [B, N, D]."""
        return self.processor(self, hidden_states, encoder_hidden_states, *args, **kwargs)

    def ask(self, asking: Tensor, answering: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, N, K, head size] of the one, keys and values [B, M, K, head size] of the other, normalised."""
        q = self._split(self.to_q(asking))
        if self.fused_projections:
            k, v = self.to_kv(answering).chunk(2, dim=-1)
        else:
            k, v = self.to_k(answering), self.to_v(answering)
        return self.norm_q(q), self.norm_k(self._split(k)), self._split(v)

    def macs(self, rows: int, text: int = 0) -> int:
        """Return the multiply-accumulates for `rows` tokens that ask `text` others."""
        linear = macs_of(self.to_q, rows) + macs_of(self.to_out, rows)
        return linear + macs_of(self.to_k, text) + macs_of(self.to_v, text) + 2 * rows * text * self.inner_dim


def text_mask(given: Tensor | None) -> Tensor | None:
    """Turn a mask of text tokens [B, L] into one of keys [B, 1, 1, L]; a prompt without any real token is heard whole."""
    if given is None:
        return None
    mask = given.bool()
    return (mask | ~mask.any(dim=1, keepdim=True))[:, None, None]


def _skipped(_: Any, hidden_states: Tensor, *__: Any, **___: Any) -> Tensor:
    return hidden_states


# Not by `register`, which first imports many transformers; diffusers does that when it looks something up.
AttentionProcessorRegistry._registry[CrossProcessor] = AttentionProcessorMetadata(
    skip_processor_output_fn=_skipped
)
