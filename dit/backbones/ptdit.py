"""PT-DiT (Qihoo-T2X): pictures and clips from text, with proxies for what is far and windows for what is near.

Paper: Qihoo-T2X: An Efficient Proxy-Tokenized Diffusion Transformer for Text-to-Any-Task, Wang et al. 2024, arXiv:2409.04005;
PixArt-alpha, Chen et al. 2023, arXiv:2310.00426 (shared modulation, text cross-attention without gate).
Differs: every sample keeps its own time (the released code gives windows the times of other samples; `mixed_times` does that
too); sizes need not divide by the window; tokens stay in the order of the grid between attentions; pictures and clips alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from dit.cross_attention import CrossAttention, text_mask
from dit.embeddings import TimeEmbedding
from dit.experts.dense import Experts, routed
from dit.grid import Grid
from dit.layers import PatchEmbed, PatchOut, PlainNorm
from dit.ledger import Part, part
from dit.mixers.full import Mixer
from dit.mixers.proxy import Proxy, ProxyTokens, WindowAttention, zero_linear
from dit.model import Backbone, Context, register_block, register_specs
from dit.modulation import SHARED, AdaLNSingle, modulate
from dit.partition import Window, window_mask
from dit.positions import sincos_3d
from dit.spec import parse

CONVENTIONS = ("flow", "release")


@dataclasses.dataclass(frozen=True, slots=True)
class Windows:
    """The two partitions of a call, and who hears whom in them: see `window_mask`."""

    plain: Window
    shifted: Window
    plain_mask: Tensor | None
    shifted_mask: Tensor | None


class ProxyBlock(nn.Module):
    """Proxies, windows, shifted windows, text, perceptron.

    The windows and the perceptron are shifted, scaled and gated by the conditioning; the proxies and the text are not.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        hidden: int,
        bias: bool,
        norm: Callable[[int], nn.Module],
        mixer: Proxy,
        experts: Experts,
    ) -> None:
        super().__init__()
        options = {"qk_norm": mixer.qk_norm, "bias": bias}
        self.proxies = ProxyTokens(mixer, width, heads, norm=norm, **options)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.modulation = AdaLNSingle().build(width, 6)
        self.attn = WindowAttention(mixer, width, heads, **options)
        if mixer.shift:
            self.norm_shift = norm(width)
            self.modulation_shift = AdaLNSingle().build(width, 3)
            self.shift_attn = WindowAttention(mixer, width, heads, **options)
            self.shift_out = zero_linear(width)
        self.shift = mixer.shift
        self.text_attn = CrossAttention(width, heads, **options)
        self.ff = experts.build(width, hidden)
        self.router = experts.router(width, heads, hidden)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        temb_shifted: Tensor,
        windows: Windows,
        context: Context,
    ) -> Tensor:
        """Tokens [B, N, D], text [B, L, D], shared modulation [B, 6 D] or [B, N, 6 D], that of shifted windows -> [B, N, D]."""

        def body(streams: dict[str, Tensor], inner: Context) -> dict[str, Tensor]:
            x = streams["hidden_states"]
            return {"hidden_states": self._body(x, encoder_hidden_states, temb, temb_shifted, windows, inner)}

        streams = {"hidden_states": hidden_states}
        streams = routed(self.router, body, streams, context)
        hidden_states = streams["hidden_states"]
        return hidden_states  # noqa: RET504 - by this name the seams know which stream it is

    def _body(
        self, x: Tensor, text: Tensor, temb: Tensor, temb_shifted: Tensor, windows: Windows, context: Context
    ) -> Tensor:
        kwargs = context.attention_kwargs
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.modulation(temb)  # each [B, 1 or N, D]
        added, _ = self.proxies(x, windows.plain)
        x = x + added
        inner = modulate(self.norm1(x), shift, scale)
        x = x + gate * self.attn(inner, windows.plain, windows.plain_mask, **kwargs)
        if self.shift:
            shift, scale, gate = self.modulation_shift(temb)
            if temb_shifted is not temb:  # the gate acts after the windows were put back
                shift, scale, _ = self.modulation_shift(temb_shifted)
            inner = modulate(self.norm_shift(x), shift, scale)
            x = x + self.shift_out(
                gate * self.shift_attn(inner, windows.shifted, windows.shifted_mask, **kwargs)
            )
        x = x + self.text_attn(x, text, context.mask, **kwargs)
        inner = modulate(self.norm2(x), shift_ff, scale_ff)
        return x + gate_ff * self.ff(inner, dataclasses.replace(context, residual=x))


class PTDiT(Backbone):
    """The text-to-picture and text-to-clip network. Time runs in diffusers' direction: 1000 is noise, 0 the picture.

    Args:
        in_channels: channels of the picture or latent; `out_channels` where the last layer has others, of which the first
            `in_channels` are the velocity and the rest is not used (as in the release).
        patch_size: side of a patch in latent pixels; a frame is a token of its own.
        sample_size: side in latent pixels that the network was made for (other sizes run too). frames: frames likewise.
        width, depth, heads, mlp_ratio: size of the stack.
        context_dim: channels of a text token; None for text tokens that have `width` channels already.
        position_scale: how many tokens along rows and columns are one step of the position table.
        size_embeds: add what size the picture has to the time (the release does at `sample_size` 128).
        codec_scale: picture pixels of a latent pixel, to tell sizes where none are given.
        convention: "flow": velocity = noise - picture. "release": seen from outside the same, inside it is picture - noise.
        mixed_times: repeat the mistake of the released code in batches of several times.
        attention_bias, norm_affine, norm_eps: biases of queries, keys and values; weights and epsilon of norms.
        mixer: settings of proxies and windows. experts: settings of the perceptron's slot.

    Raises:
        ValueError: sizes that do not fit together, or a mixer that has no proxies.
    """

    _repeated_blocks: ClassVar[list[str]] = ["ProxyBlock"]
    _no_split_modules: ClassVar[list[str]] = ["ProxyBlock"]

    @register_specs
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int | None = None,
        patch_size: int = 2,
        sample_size: int = 32,
        frames: int = 1,
        width: int = 288,
        depth: int = 10,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        context_dim: int | None = 4096,
        position_scale: float = 1.0,
        size_embeds: bool = False,
        codec_scale: int = 8,
        convention: Literal["flow", "release"] = "flow",
        mixed_times: bool = False,
        attention_bias: bool = True,
        norm_affine: bool = False,
        norm_eps: float = 1e-6,
        mixer: Mixer | dict[str, Any] | str = "proxy:height=2,width=2",
        experts: Experts | dict[str, Any] | str = "dense",
    ) -> None:
        super().__init__()
        mixer, experts = parse(Mixer, mixer), parse(Experts, experts)
        mixer = _check(width, heads, depth, sample_size, patch_size, convention, mixer, size_embeds)
        self.window, self.out_channels = mixer.window, out_channels or in_channels
        patch = (1, patch_size, patch_size)

        def norm(size: int) -> nn.Module:
            return nn.LayerNorm(size, elementwise_affine=norm_affine, eps=norm_eps)

        self.x_embedder = PatchEmbed(in_channels, width, patch)
        self.time_embed = TimeEmbedding(width)
        self.resolution_embed = TimeEmbedding(width // 3) if size_embeds else None
        self.aspect_embed = TimeEmbedding(width // 3) if size_embeds else None
        self.modulation_shared = AdaLNSingle().shared(width)
        self.context_embedder = None if context_dim is None else PixArtAlphaTextProjection(context_dim, width)
        self.transformer_blocks = nn.ModuleList(
            ProxyBlock(
                width,
                heads,
                hidden=int(width * mlp_ratio),
                bias=attention_bias,
                norm=norm,
                mixer=mixer,
                experts=experts,
            )
            for _ in range(depth)
        )
        self.norm_out = PlainNorm(width)
        self.modulation_out = AdaLNSingle().build(width, 2)
        self.proj_out = PatchOut(width, self.out_channels, patch)

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return the velocity, noise - picture, at a noisy picture or clip.

        Args:
            hidden_states: noisy picture [B, C, H, W] or clip [B, C, F, H, W]; rows and columns divide by the patch.
            timestep: [B], or [B, N] with one time a token, on 0..1000.
            encoder_hidden_states: text tokens [B, L, context_dim].
            encoder_attention_mask: [B, L], true (or 1) at real text tokens; None if all are.
            added_cond_kwargs: `resolution` [B, 2] (rows and columns in px) and `aspect_ratio` [B, 1] (rows by columns) for
                networks with `size_embeds`; by default those of the picture at hand.
            joint_attention_kwargs: passed to attention processors; `scale` is the LoRA scale.

        Returns:
            velocity in the shape of `hidden_states` as `sample`, or a one-tuple unless `return_dict`.
        """
        output = self.predict(
            hidden_states,
            timestep,
            encoder_hidden_states,
            encoder_attention_mask,
            added_cond_kwargs,
            joint_attention_kwargs,
        )
        output = output[:, : self.config.in_channels].to(hidden_states.dtype)
        if self.config.convention == "release":
            output = -output
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def predict(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Return what the last layer says, all its channels in its own sign: [B, out_channels, (F,) H, W]. See `forward`."""
        grid = Grid.of(hidden_states, self.x_embedder.patch)
        dtype, device, batch = self.dtype, hidden_states.device, len(hidden_states)
        x = self.x_embedder(hidden_states.to(dtype)) + self.positions(grid, device).to(dtype)  # [B, N, D]
        text = encoder_hidden_states.to(dtype)
        text = text if self.context_embedder is None else self.context_embedder(text)  # [B, L, D]
        time = self.embed_time(timestep, dtype, hidden_states, added_cond_kwargs)  # [B, D] or [B, N, D]
        plain, shifted = Window(grid, self.window), Window(grid, self.window, shifted=True)
        windows = Windows(
            plain,
            shifted,
            window_mask(plain, batch, device, dtype),
            window_mask(shifted, batch, device, dtype),
        )
        temb = temb_shifted = self.modulation_shared(time)
        if self.config.mixed_times and time.dim() == 2 and batch > 1:
            temb, temb_shifted = mixed(temb, plain), mixed(temb, shifted)
        context = Context(
            grid,
            time,
            time=time,
            timestep=timestep,
            text=text,
            mask=text_mask(encoder_attention_mask),
            attention_kwargs=joint_attention_kwargs or {},
        )
        for block in self.transformer_blocks:
            x = self._run(
                block,
                hidden_states=x,
                encoder_hidden_states=text,
                temb=temb,
                temb_shifted=temb_shifted,
                windows=windows,
                context=context,
            )  # [B, N, D]
        shift, scale = self.modulation_out(torch.cat([time] * SHARED, dim=-1))
        inner = modulate(self.norm_out(x), shift, scale)
        output: Tensor = self.proj_out(inner, grid, frames=hidden_states.dim() == 5)
        return output

    def positions(self, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
        """Return the frozen table [N, D]: a quarter of the channels holds the frame, the others column and row."""
        scale = float(self.config.position_scale)
        return sincos_3d(self.config.width, grid, spatial_scale=scale, device=device)

    def embed_time(
        self,
        timestep: Tensor,
        dtype: torch.dtype,
        picture: Tensor,
        sizes: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """[B] or [B, N] -> the embedding of the time and, with `size_embeds`, of the size: [B, D] or [B, N, D]."""
        time: Tensor = self.time_embed(timestep, dtype)
        if self.resolution_embed is None or self.aspect_embed is None:
            return time
        rows, columns = (side * self.config.codec_scale for side in picture.shape[-2:])
        given = {
            "resolution": picture.new_tensor([rows, columns]),
            "aspect_ratio": picture.new_tensor([rows / columns]),
        }
        given |= {name: value for name, value in (sizes or {}).items() if value is not None}
        resolution = given["resolution"].reshape(-1, 2).expand(len(time), -1)
        aspect = given["aspect_ratio"].reshape(-1, 1).expand(len(time), -1)
        parts = (self.resolution_embed(resolution, dtype), self.aspect_embed(aspect, dtype))
        added = torch.cat([one.flatten(1) for one in parts], dim=1)  # [B, D]
        return time + (added if time.dim() == 2 else added.unsqueeze(1))

    def costs(self, grid: Grid, text: int = 0) -> Iterator[Part]:
        """Yield the analytic cost of every part for one picture or clip of `grid` and a prompt of `text` tokens."""
        yield part(self, "x_embedder", "embed", grid.tokens)
        yield part(self, "time_embed", "embed", 1)
        for name, count in (("resolution_embed", 2), ("aspect_embed", 1), ("context_embedder", text)):
            if getattr(self, name) is not None:
                yield part(self, name, "embed", count)
        yield part(self, "modulation_shared", "modulation", 1)
        kinds: dict[str, Any] = dict.fromkeys(("norm1", "norm2", "modulation"), "modulation")
        kinds |= {"proxies": "attention", "attn": "attention", "text_attn": "attention", "ff": "mlp"}
        shifted: dict[str, Any] = {"norm_shift": "modulation", "modulation_shift": "modulation"}
        shifted |= {"shift_attn": "attention", "shift_out": "attention"}
        for i, block in enumerate(self.transformer_blocks):
            for name, kind in (kinds | (shifted if block.shift else {})).items():
                said = 0 if name == "proxies" else text
                yield part(self, f"transformer_blocks.{i}.{name}", kind, grid.tokens, said, grid)
            if block.router is not None:
                yield part(self, f"transformer_blocks.{i}.router", "mlp", grid.tokens)
        yield part(self, "modulation_out", "modulation", 1)
        yield part(self, "proj_out", "embed", grid.tokens)


def mixed(emb: Tensor, window: Window) -> Tensor:
    """Deal what belongs to the samples [B, D] out to their windows as the released code does: [B, N, D].

    Windows are counted through the batch, sample after sample; window r gets what belongs to sample r modulo B.
    """
    batch = len(emb)
    owner = torch.arange(batch * window.groups, device=emb.device) % batch
    return emb[window.join(owner.unsqueeze(1).expand(-1, window.length))]


def _check(
    width: int,
    heads: int,
    depth: int,
    sample_size: int,
    patch_size: int,
    convention: str,
    mixer: Mixer,
    size_embeds: bool,
) -> Proxy:
    if width < 16 or heads < 1 or width % heads or width % 16:
        raise ValueError(f"PT-DiT: width must divide by heads and by 16, got width={width}, heads={heads}")
    if size_embeds and width % 3:
        raise ValueError(f"PT-DiT: size_embeds needs a width that divides by 3, got {width}")
    if depth < 1 or patch_size < 1 or sample_size < 1 or sample_size % patch_size:
        raise ValueError(
            "PT-DiT: depth is at least 1 and sample_size divides by patch_size, "
            f"got depth={depth}, sample_size={sample_size}, patch_size={patch_size}"
        )
    if convention not in CONVENTIONS:
        raise ValueError(f"PT-DiT: convention is one of {', '.join(CONVENTIONS)}, got {convention!r}")
    if not isinstance(mixer, Proxy):
        raise ValueError(
            f"PT-DiT: its mixer is proxy, got {mixer.name}; other mixers have a place in DiT and MMDiT"
        )
    return mixer


register_block(ProxyBlock, hidden_states=0)
