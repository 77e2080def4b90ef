"""Proxy-tokenised attention: a few proxies carry what is far between windows, windows see what is near.

Paper: Qihoo-T2X: An Efficient Proxy-Tokenized Diffusion Transformer for Text-to-Any-Task, Wang et al. 2024, arXiv:2409.04005;
Swin Transformer, Liu et al. 2021, arXiv:2103.14030 (shifted windows).
Differs: grids need not divide by the window (places without a token are masked, and are in no mean); a random proxy is drawn
anew only in training, so that a picture can be made again; text tokens of a block stand among the proxies as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dit.attention import Attention
from dit.cross_attention import CrossAttention
from dit.embeddings import Rotary
from dit.grid import Grid
from dit.layers import PlainNorm
from dit.ledger import macs_of
from dit.mixers.full import FullMixer, Mixer, heads_of
from dit.model import Context
from dit.partition import Window, window_mask
from dit.spec import knob, spec

Choice = Literal["mean", "corner", "random"]
_SOME_TOKENS = 1024  # attended to at a time on a CPU; 512 to 2048 differ little


@spec("proxy", paper="Qihoo-T2X, arXiv:2409.04005")
class Proxy(Mixer):
    """Window means hear each other and are heard by all; windows and shifted windows do the rest."""

    frames: int = knob(default=1, label="Frames of a window", low=1, unit="tokens")
    height: int = knob(default=4, label="Rows of a window", low=1, unit="tokens")
    width: int = knob(default=4, label="Columns of a window", low=1, unit="tokens")
    proxy_rows: int = knob(default=1, label="Proxies of a window along its rows", low=1)
    proxy_columns: int = knob(default=1, label="Proxies of a window along its columns", low=1)
    choice: str = knob(default="mean", label="What stands for a window", choices=("mean", "corner", "random"))
    shift: bool = knob(default=True, label="Attend in shifted windows too")
    qk_norm: bool = knob(default=False, label="RMS-normalise queries and keys per head")

    def check(self) -> None:
        for field, side in (("proxy_rows", self.height), ("proxy_columns", self.width)):
            if side % getattr(self, field):
                raise ValueError(
                    f"proxy: {field} must divide the {side} tokens of a window, got {getattr(self, field)}"
                )

    @property
    def window(self) -> tuple[int, int, int]:
        """Sides of a window: frames, rows, columns."""
        return self.frames, self.height, self.width

    @property
    def proxies(self) -> int:
        """Proxies of a window."""
        return self.proxy_rows * self.proxy_columns

    @property
    def needs_grid(self) -> bool:
        return True

    def build(self, width: int, heads: int, *, qk_norm: bool = False, pre_only: bool = False) -> nn.Module:
        return ProxyMixer(self, width, heads, qk_norm=self.qk_norm or qk_norm, pre_only=pre_only)

    def build_joint(
        self, width: int, heads: int, *, qk_norm: bool = False, context_pre_only: bool = False
    ) -> nn.Module:
        options = {"joint": True, "context_pre_only": context_pre_only}
        return ProxyMixer(self, width, heads, qk_norm=self.qk_norm or qk_norm, **options)

    def share(self, tokens: int) -> float:
        """Return the cost of all its attention as a share of full attention over `tokens` tokens, projections left out.

        With P tokens a window and one proxy each: 1 / P^2 (proxies) + 1 / P (injection) + 2 P / N (windows).
        """
        kept = self.proxies / math.prod(self.window)
        return kept**2 + kept + (1 + self.shift) * math.prod(self.window) / tokens


def pool(
    x: Tensor, window: Window, counts: tuple[int, int], choice: Choice, *, draw: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Let proxies stand for the tokens x [B, N, D], `counts` (along rows, along columns) of them for each window.

    Rows and columns of a window are cut as (coarse, fine), `counts` fine ones each; a proxy stands for one fine row, one fine
    column, and all frames and coarse ones: for the whole window where there is one. `draw` takes other random tokens at every
    call.

    Returns: proxies [B, Q, D], windows in order; and which of them stand for any token [Q], None where all do.
    """
    real = torch.ones(1, window.tokens, 1, dtype=torch.bool, device=x.device)
    if choice == "mean":
        total = _cells(window.lattice(x), counts).sum((2, 4, 7))  # [B, f, h, fine, w, fine, D]
        if not window.padded:
            members = math.prod(window.window) // math.prod(counts)
            return _in_order(total / members), None
        many = _cells(window.lattice(real), counts).sum((2, 4, 7))
        return _in_order(total / many.clamp_min(1).to(x.dtype)), _in_order(many > 0)[0, :, 0]
    real = _members(real, window, counts)[0, ..., 0]  # [Q, members]
    pick = _draw(real, draw=draw) if choice == "random" else torch.zeros_like(real[:, 0], dtype=torch.long)
    cells = _members(x, window, counts)  # [B, Q, members, D]
    chosen = cells.gather(2, pick[None, :, None, None].expand(len(x), -1, 1, x.shape[-1]))
    return chosen.squeeze(2), real.any(-1) if window.padded else None


def pool_reference(x: Tensor, window: Window, counts: tuple[int, int]) -> Tensor:
    """The means of `pool`, token by token: what it is compared to. Proxies without a token are 0."""
    sides = window.window
    found: dict[tuple[int, ...], list[int]] = {}
    for token, (frame, row, column) in enumerate(window.grid.positions().tolist()):
        box = (frame // sides[0], row // sides[1], column // sides[2])
        fine = ((row % sides[1]) % counts[0], (column % sides[2]) % counts[1])
        found.setdefault((*box, *fine), []).append(token)
    boxes = (*map(range, window.boxes), *map(range, counts))
    keys = torch.cartesian_prod(*(torch.tensor(list(one)) for one in boxes)).tolist()
    means = [
        x[:, found[tuple(key)]].mean(1) if tuple(key) in found else torch.zeros_like(x[:, 0]) for key in keys
    ]
    return torch.stack(means, dim=1)


def _cells(lattice: Tensor, counts: tuple[int, int]) -> Tensor:
    """[B, f, a, h, b, w, c, ...] -> [B, f, a, h, coarse, fine, w, coarse, fine, ...]."""
    return lattice.unflatten(6, (-1, counts[1])).unflatten(4, (-1, counts[0]))


def _in_order(proxies: Tensor) -> Tensor:
    """[B, f, h, fine, w, fine, D] -> [B, Q, D]."""
    return proxies.permute(0, 1, 2, 4, 3, 5, 6).flatten(1, 5)


def _members(x: Tensor, window: Window, counts: tuple[int, int]) -> Tensor:
    """[B, N, D] -> [B, Q, members, D]."""
    cells = _cells(window.lattice(x), counts)
    return cells.permute(0, 1, 3, 6, 5, 8, 2, 4, 7, 9).flatten(6, 8).flatten(1, 5)


def _draw(real: Tensor, *, draw: bool) -> Tensor:
    """Choose a member of each proxy [Q, members] among those that are `real`: by chance, or by chance once and for all."""
    if draw:
        chance = torch.rand(real.shape, device=real.device)
    else:
        count = torch.arange(1, real.numel() + 1, device=real.device, dtype=torch.float32)
        chance = (torch.sin(count * 12.9898) * 43758.547).frac().abs().reshape(real.shape)
    return chance.masked_fill(~real, -1).argmax(-1)


class ProxyTokens(nn.Module):
    """The way of what is far: proxies hear each other (and the text), then every token hears them, by a map that starts at 0.

    In joint use the text has weights of its own, as in dual-stream blocks. `norm` makes the norms, plain ones by default.
    """

    def __init__(
        self,
        settings: Proxy,
        width: int,
        heads: int,
        *,
        qk_norm: bool = False,
        joint: bool = False,
        pre_only: bool = False,
        bias: bool = True,
        norm: Callable[[int], nn.Module] = PlainNorm,
    ) -> None:
        super().__init__()
        self.sides, self.counts = settings.window, (settings.proxy_rows, settings.proxy_columns)
        self.choice = cast(Choice, settings.choice)
        self.joint, self.pre_only = joint, pre_only
        self.norm, self.norm_out, self.norm_image = norm(width), norm(width), norm(width)
        self.attn = FullMixer(
            width, heads, qk_norm=qk_norm, joint=joint, context_pre_only=pre_only, bias=bias
        )
        self.cross = CrossAttention(width, heads, qk_norm=qk_norm, bias=bias)
        self.proj_out = zero_linear(width)

    def forward(
        self,
        hidden_states: Tensor,
        window: Window,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, N, D], text [B, L, D] and mask [1 or B, 1, 1, L + N] of keys, text first -> what to add to either.

        A pre-only text is heard but not answered, its place is None.
        """
        proxies, there = pool(hidden_states, window, self.counts, self.choice, draw=self.training)
        length = 0 if text is None else text.shape[1]
        keys = _carriers(mask, there, length, proxies)
        where = None if rotary is None else _places(rotary, window, self.counts, length)
        answer: Tensor | None = None
        if text is None:
            carriers = proxies + self.attn(self.norm(proxies), None, keys, where)
        elif self.joint:
            found = self.attn(self.norm(proxies), self.norm(text), keys, where)
            found, answer = (found, None) if self.pre_only else found
            words = text if answer is None else text + answer
            carriers = torch.cat([words, proxies + found], dim=1)
        else:
            carriers = torch.cat([text, proxies], dim=1)
            found = self.attn(self.norm(carriers), None, keys, where)
            carriers, answer = carriers + found, found[:, :length]
        asking = None if rotary is None else (rotary[0][length:], rotary[1][length:])
        seen = self.cross(self.norm_image(hidden_states), self.norm_out(carriers), keys, asking, where)
        return self.proj_out(seen), answer

    def macs_on(self, grid: Grid, text: int = 0) -> int:
        """Return the multiply-accumulates for one sample of `grid` and `text` text tokens."""
        window = Window(grid, self.sides)
        proxies = window.groups * math.prod(self.counts)
        inner = self.attn.macs(proxies, text) if self.joint else self.attn.macs(proxies + text)
        return inner + self.cross.macs(window.tokens, proxies + text) + macs_of(self.proj_out, window.tokens)


class WindowAttention(Attention):
    """Softmax attention within windows; names of weights are those of `Attention`."""

    def __init__(
        self, settings: Proxy, width: int, heads: int, *, qk_norm: bool = False, bias: bool = True
    ) -> None:
        super().__init__(width, heads, qk_norm=qk_norm, bias=bias)
        self.sides = settings.window

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        window: Window,
        attention_mask: Tensor | None = None,
        rotary: Rotary | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]; `attention_mask` is that of `window_mask`, `rotary` the table of one window."""
        return _within(self, hidden_states, window, attention_mask, rotary, **kwargs)

    def macs_on(self, grid: Grid, text: int = 0) -> int:
        """Return the multiply-accumulates for one sample of `grid`."""
        window = Window(grid, self.sides)
        return window.groups * Attention.macs(self, window.length)


def _within(
    attn: Attention, x: Tensor, window: Window, mask: Tensor | None, rotary: Rotary | None, **kwargs: Any
) -> Tensor:
    """Softmax attention of x [B, N, D] within windows, by the weights of `attn` -> [B, N, D].

    Without gradients a CPU takes some windows at a time, whose queries, keys and values stay in its caches.
    """
    pieces = x.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or kwargs)
    some = max(1, _SOME_TOKENS // window.length) if pieces else len(x) * window.groups
    parts = window.split(x).split(some)  # each [windows, M, D]
    both = zip(parts, [None] * len(parts) if mask is None else mask.split(some), strict=True)
    out = [Attention.forward(attn, part, None, near, rotary, **kwargs) for part, near in both]
    return window.join(torch.cat(out) if len(out) > 1 else out[0])


def window_attention_reference(
    attn: WindowAttention, x: Tensor, window: Window, rotary: Rotary | None = None
) -> Tensor:
    """The same by full attention in which tokens of other windows are masked: what `WindowAttention` is compared to, O(N^2)."""
    sides = torch.tensor(window.window, device=x.device)
    start = sides // 2 if window.shifted else torch.zeros_like(sides)
    box = torch.div(window.grid.positions(x.device) - start, sides, rounding_mode="floor")  # [N, 3]
    near = (box[:, None] == box[None]).all(-1)  # [N, N]
    out: Tensor = Attention.forward(attn, x, None, near, rotary)
    return out


class ProxyMixer(Attention):
    """The network of `Proxy`: its own weights are those of the windows, so they fit those of full attention."""

    def __init__(
        self,
        settings: Proxy,
        width: int,
        heads: int,
        *,
        qk_norm: bool = False,
        joint: bool = False,
        context_pre_only: bool = False,
        pre_only: bool = False,
    ) -> None:
        super().__init__(width, heads, qk_norm=qk_norm, pre_only=pre_only)
        self.sides, self.context_pre_only = settings.window, context_pre_only
        self.proxies = ProxyTokens(
            settings, width, heads, qk_norm=qk_norm, joint=joint, pre_only=context_pre_only
        )
        self.norm_shift = PlainNorm(width)
        self.shift_attn = WindowAttention(settings, width, heads, qk_norm=qk_norm) if settings.shift else None
        self.shift_out = zero_linear(width) if settings.shift else None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        context: Context | None = None,
        **kwargs: Any,
    ) -> Any:
        """[B, N, D] -> [B, N, D], or image and text -> (image, text) unless the text is pre-only.

        Raises: ValueError without a context that tells the grid.
        """
        if context is None or context.grid is None:
            raise ValueError("proxy: needs context.grid, the places of the tokens")
        window, length = Window(context.grid, self.sides), context.length
        kwargs = context.attention_kwargs | kwargs
        text = hidden_states[:, :length] if length else encoder_hidden_states
        image = hidden_states[:, length:]
        added, answer = self.proxies(image, window, text, context.mask, context.rotary)
        out = added + self._near(
            image + added, window, context.rotary, **_gates(context, image, window), **kwargs
        )
        if self.shift_attn is not None and self.shift_out is not None:
            moved = Window(context.grid, self.sides, shifted=True)
            mask = window_mask(moved, len(image), image.device, image.dtype)
            table = _window_table(context.rotary, moved)
            near = self.shift_attn(
                self.norm_shift(image + out), moved, mask, table, **_gates(context, image, moved)
            )
            out = out + self.shift_out(near)
        if length:
            assert answer is not None
            return torch.cat([answer, out], dim=1)
        return out if encoder_hidden_states is None or answer is None else (out, answer)

    def macs_on(self, grid: Grid, text: int = 0) -> int:
        """Return the multiply-accumulates for one sample of `grid` and `text` text tokens."""
        window = Window(grid, self.sides)
        total = self.proxies.macs_on(grid, text) + window.groups * super().macs(window.length)
        if self.shift_attn is not None and self.shift_out is not None:
            total += self.shift_attn.macs_on(grid) + macs_of(self.shift_out, grid.tokens)
        return total

    def macs(self, rows: int, text: int = 0) -> int:
        """Return the multiply-accumulates where only a count of tokens is known: of whole windows in a row.

        In joint attention `text` text tokens come on top, else so many of the `rows` are text.
        """
        frames, height, width = self.sides
        image = rows if self.proxies.joint else rows - text
        return self.macs_on(Grid(frames, height, width * -(-image // math.prod(self.sides))), text)

    def _near(self, x: Tensor, window: Window, rotary: Rotary | None, **kwargs: Any) -> Tensor:
        mask = window_mask(window, len(x), x.device, x.dtype)
        return _within(self, x, window, mask, _window_table(rotary, window), **kwargs)


def _gates(context: Context, x: Tensor, window: Window) -> dict[str, Tensor]:
    """Return the gates of routed heads for every window as an argument, or nothing; a head that is off is computed anyway."""
    return {name: window.spread(one.expand(len(x), -1)) for name, one in heads_of(context).items()}


def zero_linear(width: int) -> nn.Linear:
    """Return a square linear map that starts at 0."""
    linear = nn.Linear(width, width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _carriers(mask: Tensor | None, there: Tensor | None, length: int, proxies: Tensor) -> Tensor | None:
    """Say which text tokens and proxies may be heard, [1 or B, 1, 1, L + Q], or None where all may."""
    if there is None and (mask is None or not length):
        return None
    if there is None:
        there = torch.ones(proxies.shape[1], dtype=torch.bool, device=proxies.device)
    there = there[None, None, None]
    if not length:
        return there
    words = there.new_ones(1, 1, 1, length) if mask is None else mask[..., :length]
    return torch.cat([words, there.expand(len(words), -1, -1, -1)], dim=-1)


def _places(table: Rotary, window: Window, counts: tuple[int, int], length: int) -> Rotary:
    """Return the angles of text and proxies, [L + Q, head size]; a proxy stands where the first of its tokens does."""
    device = table[0].device
    index = torch.arange(window.tokens, device=device)[None, :, None]
    first = _members(index, window, counts)[0, :, 0, 0]
    rows = torch.cat([torch.arange(length, device=device), length + first])
    return table[0][rows], table[1][rows]


def _window_table(table: Rotary | None, window: Window) -> Rotary | None:
    """Return the angles of one window, [M, head size]: within any window, tokens stand to each other as in the first."""
    if table is None:
        return None
    plain = Window(window.grid, window.window)
    first = plain.split(torch.arange(window.tokens, device=table[0].device)[None])[0]
    rows = first + len(table[0]) - window.tokens
    return table[0][rows], table[1][rows]
