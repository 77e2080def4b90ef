"""Gated linear attention: a state that is scanned over the tokens and forgets by a gate learned from each of them.

Paper: Gated Linear Attention Transformers with Hardware-Efficient Training, Yang et al. 2023, arXiv:2312.06635; DiG: Scalable
and Efficient Diffusion Models with Gated Linear Attention, Zhu et al. 2024, arXiv:2405.18428 (scan orders of a picture).
Differs: tokens stay where they are and each block scans them in its own order, where DiG turns the sequence around behind
every block; on a GPU the scan is flash-linear-attention's where it is installed, elsewhere our own by chunks.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import Any, ClassVar

import torch
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn
from torch.nn import functional as F

from dit.attention import skipped
from dit.embeddings import Rotary
from dit.grid import Grid
from dit.layers import HeadNorm
from dit.ledger import macs_of
from dit.mixers.full import Mixer, heads_of, same_for_all
from dit.model import Context
from dit.spec import knob, spec

ORDERS = ("row", "reversed-row", "column", "reversed-column")
"""Ways through a picture: along its rows or columns, from the first token or from the last."""

CYCLES = {
    "four": ORDERS,
    "reversing": ("row", "reversed-row"),
    "transposing": ("row", "row", "column", "column"),
}
"""Orders that follow each other from block to block; "four" is DiG's."""

CHUNK = 16
"""Tokens that are scanned together: within half of them no gate may forget more than float32 can divide by."""

MOST_FORGOTTEN = -10.0
"""Log of the smallest gate: a state that keeps less than e^-10 of itself has forgotten; DiG's gates stay far above."""


@spec("gated", paper="DiG, arXiv:2405.18428")
class Gated(Mixer):
    """Gated linear attention, causal along a scan that changes from block to block, O(N D^2 / heads)."""

    scan: str = knob(
        default="four",
        label="Order of the scan, or a cycle of orders over the blocks",
        choices=(*CYCLES, *ORDERS),
    )
    expand_k: float = knob(
        default=0.5, label="Channels of queries and keys, as part of the width", low=0.01, high=4.0
    )
    expand_v: float = knob(default=1.0, label="Channels of values, as part of the width", low=0.01, high=4.0)
    rank: int = knob(default=16, label="Channels between the two maps of the gate", low=1)
    normalizer: float = knob(default=16.0, label="What the logarithm of the gate is divided by", low=0.1)
    qk_norm: bool = knob(default=False, label="RMS-normalise queries and keys per head")

    def at(self, block: int) -> Gated:
        if self.scan not in CYCLES:
            return self
        cycle = CYCLES[self.scan]
        return self.replace(scan=cycle[block % len(cycle)])

    @property
    def needs_grid(self) -> bool:
        return True

    def build(self, width: int, heads: int, *, qk_norm: bool = False, pre_only: bool = False) -> nn.Module:
        return GatedMixer(self, width, heads, qk_norm=self.qk_norm or qk_norm, pre_only=pre_only)

    def build_joint(
        self, width: int, heads: int, *, qk_norm: bool = False, context_pre_only: bool = False
    ) -> nn.Module:
        norm = self.qk_norm or qk_norm
        return GatedMixer(self, width, heads, qk_norm=norm, joint=True, context_pre_only=context_pre_only)


def gated_scan(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, scale: float | None = None) -> Tensor:
    """Scan keys k [B, N, K, d] and values v [B, N, K, e] into a state and read it with q [B, N, K, d] -> [B, N, K, e].

    `gate` [B, N, K, d] is the logarithm of what each channel of the state keeps, at most 0; the state is
    h_n = exp(gate_n) h_(n-1) + k_n v_n, the answer scale * q_n h_n, with scale 1 / sqrt(d) by default.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kernel = _kernel() if q.is_cuda else None
    if kernel is not None:
        out: Tensor = kernel(q, k, v, gate.to(q.dtype), scale=scale)[0]
        return out
    return gated_scan_chunked(q, k, v, gate, scale=scale)


def gated_scan_reference(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, scale: float) -> Tensor:
    """The recurrence as it is written, token by token: what `gated_scan` is compared to."""
    q, k, v, kept = q.float(), k.float(), v.float(), gate.float().exp()
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])  # [B, K, d, e]
    out = []
    for n in range(q.shape[1]):
        state = state * kept[:, n, :, :, None] + k[:, n, :, :, None] * v[:, n, :, None, :]
        out.append((scale * q[:, n, :, None, :] @ state)[:, :, 0])
    return torch.stack(out, dim=1)


def gated_scan_chunked(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, scale: float) -> Tensor:
    """The recurrence by chunks of tokens, in matrix products; only the states between chunks follow one another.

    Within a chunk exp(gates between two tokens) is split in two at the middle of the chunk, so that neither part overflows.
    """
    count = q.shape[1]
    q, k, v, gate = (_chunks(x) for x in (q, k, v, gate.clamp_min(MOST_FORGOTTEN)))
    q = q * scale
    kept = gate.cumsum(dim=3)  # [B, K, C, chunk, d]: since the start of the chunk, this token's gate included
    last = kept[:, :, :, -1:]
    middle = kept[:, :, :, CHUNK // 2 : CHUNK // 2 + 1]
    weights = ((q * (kept - middle).exp()) @ (k * (middle - kept).exp()).mT).tril()  # [B, K, C, chunk, chunk]
    added = (k * (last - kept).exp()).mT @ v  # [B, K, C, d, e]
    states = _states(added, last.mT.exp())  # before each chunk
    out = weights @ v + (q * kept.exp()) @ states
    return out.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :count]


def _chunks(x: Tensor) -> Tensor:
    """[B, N, K, d] -> [B, K, C, chunk, d] in float32, the last chunk filled up with zeros."""
    x = F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % CHUNK))
    return x.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4)


def _states(added: Tensor, kept: Tensor) -> Tensor:
    """What each chunk adds [B, K, C, d, e] and keeps of the past [B, K, C, d, 1] -> the state before each chunk."""
    state = torch.zeros_like(added[:, :, 0])
    states = [state]
    for one, part in zip(added.unbind(2)[:-1], kept.unbind(2)[:-1], strict=True):
        state = state * part + one
        states.append(state)
    return torch.stack(states, dim=2)


@functools.cache
def _kernel() -> Any:
    """Return flash-linear-attention's scan, or None where it is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    scan = importlib.import_module("fla.ops.gla").chunk_gla
    older = (
        "head_first" in inspect.signature(scan).parameters
    )  # there heads came before tokens unless told otherwise
    return functools.partial(scan, head_first=False) if older else scan


def scan_index(
    order: str,
    grid: Grid | None,
    text: int,
    tokens: int,
    device: torch.device | str,
    *,
    text_first: bool = False,
) -> Tensor | None:
    """Return which token comes when, [L + N]; None where the tokens stand in the order already.

    The prompt comes before the picture and is heard by it, or behind it in a reversed order and hears it itself, unless
    `text_first`. A video is scanned frame by frame.

    Raises: ValueError where the tokens are not those of the grid.
    """
    if order == "row":
        return None
    if grid is not None and tokens != text + grid.tokens:
        raise ValueError(
            f"gated: scans {text} text tokens and {grid.frames} x {grid.height} x {grid.width} others, got {tokens} in all"
        )
    index = torch.arange(tokens, device=device)
    if grid is not None and order.endswith("column"):
        places = index[text:].reshape(grid.frames, grid.height, grid.width)
        index = torch.cat([index[:text], places.transpose(1, 2).flatten()])
    if order.startswith("reversed"):
        index = torch.cat([index[:text], index[text:].flip(0)]) if text_first else index.flip(0)
    return index


class GatedProcessor:
    """One or two streams, text first, scanned in the order of their block.

    It carries the backend that `set_attention_backend` chose, as all processors do, and has no use for it: there is no softmax.
    """

    _attention_backend: ClassVar[Any] = None
    _parallel_config: ClassVar[Any] = None

    def __call__(
        self,
        attn: GatedMixer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        grid: Grid | None = None,
        length: int = 0,
        heads: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v, gate = attn.project(hidden_states)
        if encoder_hidden_states is not None:
            length = encoder_hidden_states.shape[1]
            added = attn.project_added(encoder_hidden_states)
            q, k, v, gate = (torch.cat(pair, dim=1) for pair in zip(added, (q, k, v, gate), strict=True))
        gate = F.logsigmoid(gate.float()) / attn.normalizer
        if attention_mask is not None:
            heard = same_for_all(attention_mask, "gated: scans each key once for all queries")[
                :, :, None, None
            ]
            k, gate = k * heard, gate * heard  # a token that may not be heard leaves the state as it is
        index = scan_index(attn.order, grid, length, q.shape[1], q.device, text_first=attn.context_pre_only)
        if index is not None:
            q, k, v, gate = (x[:, index] for x in (q, k, v, gate))
        out = gated_scan(q, k, v, gate).to(hidden_states.dtype)  # [B, L + N, K, e]
        if index is not None:
            out = out[:, index.argsort()]
        gates = 1.0 if heads is None else heads.to(out.dtype)[:, None, :, None]  # [B, 1, K, 1]
        if encoder_hidden_states is None:
            return attn.project_out(out, hidden_states, gates)
        image = attn.project_out(out[:, length:], hidden_states, gates)
        if attn.context_pre_only:
            return image
        return image, attn.project_added_out(out[:, :length], encoder_hidden_states, gates)


class GatedMixer(nn.Module, AttentionModuleMixin):
    """The network of `Gated`: maps without biases, a gate of low rank, and an output normalised per head and gated once more."""

    _default_processor_cls = GatedProcessor
    _available_processors: ClassVar[list[type]] = [GatedProcessor]
    use_bias = added_proj_bias = is_cross_attention = False
    processor: Any
    to_qkv: nn.Linear
    to_added_qkv: nn.Linear

    def __init__(
        self,
        settings: Gated,
        width: int,
        heads: int,
        *,
        qk_norm: bool = False,
        joint: bool = False,
        context_pre_only: bool = False,
        pre_only: bool = False,
    ) -> None:
        super().__init__()
        self.keys, self.values = int(width * settings.expand_k), int(width * settings.expand_v)
        if not self.keys or not self.values or self.keys % heads or self.values % heads:
            raise ValueError(
                f"gated: {self.keys} channels of keys (expand_k={settings.expand_k} of {width}) and {self.values} of values "
                f"(expand_v={settings.expand_v}) must divide by {heads} heads"
            )
        self.heads, self.order, self.normalizer = heads, settings.at(0).scan, settings.normalizer
        self.joint, self.context_pre_only = joint, context_pre_only
        self._supports_qkv_fusion = not (joint and context_pre_only)

        def norm() -> nn.Module:
            return HeadNorm(self.keys // heads) if qk_norm else nn.Identity()

        def gate() -> nn.Sequential:
            low = nn.Linear(width, settings.rank, bias=False)
            return nn.Sequential(low, nn.Linear(settings.rank, self.keys))

        self.to_q, self.to_k, self.to_v = self._maps(width)
        self.to_gate, self.to_g = gate(), nn.Linear(width, self.values, bias=False)
        self.norm_q, self.norm_k, self.norm_out = norm(), norm(), HeadNorm(self.values // heads)
        self.to_out = None
        if not pre_only or self.values != width:
            self.to_out = nn.ModuleList([nn.Linear(self.values, width, bias=False), nn.Identity()])
        if joint:
            added_q, self.add_k_proj, self.add_v_proj = self._maps(width)
            self.add_gate_proj, self.norm_added_k = gate(), norm()
            if not context_pre_only:
                self.add_q_proj, self.norm_added_q = added_q, norm()
                self.add_g_proj = nn.Linear(width, self.values, bias=False)
                self.norm_added_out = HeadNorm(self.values // heads)
                self.to_add_out = nn.Linear(self.values, width, bias=False)
        for one in self.modules():
            if isinstance(one, nn.Linear):
                nn.init.xavier_uniform_(one.weight, gain=2**-2.5)
                if one.bias is not None:
                    nn.init.zeros_(one.bias)
        AttentionModuleMixin.set_processor(self, GatedProcessor())

    def _maps(self, width: int) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        sizes = (self.keys, self.keys, self.values)
        return tuple(nn.Linear(width, size, bias=False) for size in sizes)  # type: ignore[return-value]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        context: Context | None = None,
        **kwargs: Any,
    ) -> Any:
        """[B, N, D] -> [B, N, D], or image and text -> (image, text). Positions lie in the order of the scan: none are added."""
        if context is not None:
            attention_mask = context.mask
            about = {"grid": context.grid, "length": context.length}
            kwargs = context.attention_kwargs | about | heads_of(context) | kwargs
        return self.processor(
            self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, N, D] -> queries, keys, values, and gates before their sigmoid, each [B, N, K, channels]."""
        sizes = [self.keys, self.keys, self.values]
        if self.fused_projections:
            q, k, v = self.to_qkv(x).split(sizes, dim=-1)
        else:
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        q, k, v, gate = (self._split(one) for one in (q, k, v, self.to_gate(x)))
        return self.norm_q(q), self.norm_k(k), v, gate

    def project_added(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of the text stream; its queries are zero where nobody reads its answers."""
        sizes = [self.keys, self.keys, self.values]
        if self.fused_projections:
            q, k, v = self.to_added_qkv(text).split(sizes, dim=-1)
        else:
            k, v = self.add_k_proj(text), self.add_v_proj(text)
            q = torch.zeros_like(k) if self.context_pre_only else self.add_q_proj(text)
        q, k, v, gate = (self._split(one) for one in (q, k, v, self.add_gate_proj(text)))
        return q if self.context_pre_only else self.norm_added_q(q), self.norm_added_k(k), v, gate

    def project_out(self, out: Tensor, x: Tensor, heads: Tensor | float = 1.0) -> Tensor:
        """What was read from the state [B, N, K, e], the tokens it is for [B, N, D], gates of heads -> [B, N, D]."""
        gate = F.silu(self._split(self.to_g(x))) * heads
        out = (self.norm_out(out) * gate).flatten(2)
        mapped: Tensor = out if self.to_out is None else self.to_out[1](self.to_out[0](out))
        return mapped

    def project_added_out(self, out: Tensor, text: Tensor, heads: Tensor | float = 1.0) -> Tensor:
        """The same for the text stream."""
        gate = F.silu(self._split(self.add_g_proj(text))) * heads
        mapped: Tensor = self.to_add_out((self.norm_added_out(out) * gate).flatten(2))
        return mapped

    def macs(self, rows: int, text: int = 0) -> int:
        """Return the multiply-accumulates for `rows` tokens and, in a joint scan, `text` text tokens."""
        added = [one for name, one in self.named_children() if "add_" in name or "added" in name]
        own = [one for one in self.children() if one not in added]
        linear = sum(macs_of(one, rows) for one in own) + sum(macs_of(one, text) for one in added)
        scanned = rows + (text if self.joint else 0)
        scanned += -scanned % CHUNK
        head = self.values // self.heads
        return linear + scanned * (CHUNK * (self.keys + self.values) + 2 * self.keys * head)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


# Not by `register`, which first imports many transformers; diffusers does that when it looks something up.
AttentionProcessorRegistry._registry[GatedProcessor] = AttentionProcessorMetadata(
    skip_processor_output_fn=skipped
)
