"""DiT: pictures of a class by a plain stack of transformer blocks; and SiT, its flow-matching variant.

Paper: Scalable Diffusion Models with Transformers, Peebles and Xie 2023, arXiv:2212.09748; SiT: Exploring Flow and
Diffusion-based Generative Models with Scalable Interpolant Transformers, Ma et al. 2024, arXiv:2401.08740.
Differs: positions are computed for the grid at hand, so sizes may change and need not be square; a SiT answers in diffusers'
direction of time (its own is the opposite); guidance acts on all channels unless told otherwise (the releases: on three).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from dit.context_parallel import part_of, whole_of
from dit.embeddings import LabelEmbedding, TimeEmbedding, sincos_2d
from dit.experts.dense import Dense, Experts, routed
from dit.grid import Grid
from dit.layers import PatchEmbed, PatchOut, PlainNorm
from dit.ledger import Part, part
from dit.mixers.full import Full, Mixer
from dit.model import Backbone, Context, register_block, register_specs
from dit.modulation import Modulation, modulate
from dit.spec import parse

CONVENTIONS = ("ddpm", "flow", "sit")


class DiTBlock(nn.Module):
    """Tokens hear each other, then each is thought about alone; both steps shifted, scaled and gated by the conditioning."""

    def __init__(
        self, width: int, heads: int, *, hidden: int, mixer: Mixer, experts: Experts, modulation: Modulation
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = PlainNorm(width), PlainNorm(width)
        self.modulation = modulation.build(width, 6)
        self.attn = mixer.build(width, heads)
        self.ff = experts.build(width, hidden)
        self.router = experts.router(width, heads, hidden)

    def forward(self, hidden_states: Tensor, temb: Tensor, context: Context) -> Tensor:
        """Tokens [B, N, D] and conditioning [B, D] or [B, N, D] -> [B, N, D]."""
        if temb is not context.emb:
            context = dataclasses.replace(context, emb=temb)
        streams = {"hidden_states": hidden_states}
        streams = routed(self.router, self._body, streams, context)
        hidden_states = streams["hidden_states"]
        return hidden_states  # noqa: RET504 - by this name the seams know which stream it is

    def _body(self, streams: dict[str, Tensor], context: Context) -> dict[str, Tensor]:
        x = streams["hidden_states"]  # [B, N, D]
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.modulation(context.emb)  # each [B, 1 or N, D]
        x = x + gate * self.attn(hidden_states=modulate(self.norm1(x), shift, scale), context=context)
        inner = modulate(self.norm2(x), shift_ff, scale_ff)
        return {"hidden_states": x + gate_ff * self.ff(inner, dataclasses.replace(context, residual=x))}


class DiT(Backbone):
    """The class-to-image network.

    Args:
        in_channels: channels of the picture or latent.
        patch_size: side of a patch in latent pixels.
        sample_size: side in latent pixels that the network was made for (other sizes run too).
        width, depth, heads, mlp_ratio: size of the stack.
        num_classes: count of classes. null_class: one more row in the label table, the index `num_classes`, for "no class".
        learn_sigma: the last layer has 2 C channels; the second C interpolate the variance.
        convention: what goes in and comes out. "ddpm": timestep 0..999 (999 is noise), all output channels as they are.
            "flow": timestep 0..1000 (1000 is noise), velocity = noise - picture, C channels. "sit": seen from outside the same
            as "flow", but inside the released SiT, whose time is 1 - timestep / 1000 and whose velocity is picture - noise.
        mixer, experts, modulation: settings of the block slots.

    Raises:
        ValueError: sizes that do not fit together.
    """

    _repeated_blocks: ClassVar[list[str]] = ["DiTBlock"]
    _no_split_modules: ClassVar[list[str]] = ["DiTBlock"]
    _cp_plan: ClassVar[dict[str, Any]] = {}  # nothing for hooks: the network shares its streams itself

    @register_specs
    def __init__(
        self,
        in_channels: int = 4,
        patch_size: int = 2,
        sample_size: int = 32,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        null_class: bool = True,
        learn_sigma: bool = True,
        convention: Literal["ddpm", "flow", "sit"] = "ddpm",
        mixer: Mixer | dict[str, Any] | str = "full",
        experts: Experts | dict[str, Any] | str = "dense",
        modulation: Modulation | dict[str, Any] | str = "adaln-zero",
    ) -> None:
        super().__init__()
        _check(width, heads, depth, sample_size, patch_size, num_classes, convention)
        slots = (parse(Mixer, mixer), parse(Experts, experts), parse(Modulation, modulation))
        self.out_channels = in_channels * (1 + learn_sigma)
        patch = (1, patch_size, patch_size)
        self.x_embedder = PatchEmbed(in_channels, width, patch)
        self.time_embed = TimeEmbedding(width)
        self.label_embed = LabelEmbedding(num_classes, width, null=null_class)
        self.modulation_shared = slots[2].shared(width)
        self.transformer_blocks = nn.ModuleList(
            self._block(
                i,
                width=width,
                heads=heads,
                hidden=int(width * mlp_ratio),
                mixer=slots[0].at(i),
                experts=slots[1],
                modulation=slots[2],
            )
            for i in range(depth)
        )
        self.norm_out = PlainNorm(width)
        self.modulation_out = slots[2].build(width, 2)
        self.proj_out = PatchOut(width, self.out_channels, patch)
        self._start(slots[0], slots[1])

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return what the network predicts at a noisy picture (see `convention`).

        Args:
            hidden_states: noisy picture [B, C, H, W]; rows and columns divide by the patch.
            timestep: [B], or [B, N] with one time a token.
            class_labels: [B], `num_classes` for "no class".
            joint_attention_kwargs: passed to attention processors; `scale` is the LoRA scale.

        Returns:
            [B, C, H, W], or [B, 2 C, H, W] with a learned variance, as `sample`, or a one-tuple unless `return_dict`.
        """
        grid = Grid.of(hidden_states, self.x_embedder.patch)
        dtype, device = self.dtype, hidden_states.device
        x = self.x_embedder(hidden_states.to(dtype)) + sincos_2d(self.config.width, grid, device).to(
            dtype
        )  # [B, N, D]
        time = self.embed_time(timestep, dtype)  # [B, D] or [B, N, D]
        label = self.label_embed(class_labels)  # [B, D]
        temb = time + (label if time.dim() == 2 else label.unsqueeze(1))
        if self.modulation_shared is not None:
            temb = self.modulation_shared(temb)
        context = Context(
            grid, temb, time=time, timestep=timestep, attention_kwargs=joint_attention_kwargs or {}
        )
        x = self._through(x, temb, context)  # [B, N, D]
        shift, scale = self.modulation_out(temb)
        output = self.proj_out(modulate(self.norm_out(x), shift, scale), grid)  # [B, C or 2 C, H, W]
        output = output.to(hidden_states.dtype)
        if self.config.convention != "ddpm":
            output = output[:, : self.config.in_channels]
        if self.config.convention == "sit":
            output = -output
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def costs(self, grid: Grid, text: int = 0) -> Iterator[Part]:
        """Yield the analytic cost of every part for one picture of `grid`."""
        yield part(self, "x_embedder", "embed", grid.tokens)
        yield part(self, "time_embed", "embed", 1)
        yield part(self, "label_embed", "embed", 0)
        if self.modulation_shared is not None:
            yield part(self, "modulation_shared", "modulation", 1)
        for i in range(len(self.transformer_blocks)):
            yield part(self, f"transformer_blocks.{i}.modulation", "modulation", 1)
            yield part(self, f"transformer_blocks.{i}.attn", "attention", grid.tokens, grid=grid)
            yield part(self, f"transformer_blocks.{i}.ff", "mlp", grid.tokens)
            if self.transformer_blocks[i].router is not None:
                yield part(self, f"transformer_blocks.{i}.router", "mlp", grid.tokens)
        yield part(self, "modulation_out", "modulation", 1)
        yield part(self, "proj_out", "embed", grid.tokens)

    def _block(self, index: int, **settings: Any) -> DiTBlock:
        """Make the block of this index: what a network of other blocks overrides."""
        return DiTBlock(**settings)

    def _through(self, x: Tensor, temb: Tensor, context: Context) -> Tensor:
        share, context, x, _ = self._among_ranks(context, x)
        for block in self.transformer_blocks:
            x = self._run(block, hidden_states=x, temb=part_of(share, temb, tokens=True), context=context)
        return whole_of(share, x)

    def embed_time(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """[B] or [B, N] -> the embedding of the time alone, [B, D] or [B, N, D]."""
        if self.config.convention == "sit":
            timestep = 1 - timestep / 1000
        time: Tensor = self.time_embed(timestep, dtype)
        return time

    def _start(self, mixer: Mixer, experts: Experts) -> None:
        """Draw the weights as the paper does; slots other than the plain ones start as they like."""
        blocks: Iterable[Any] = self.transformer_blocks
        for block in blocks:
            plain = [block.attn] * isinstance(mixer, Full) + [block.ff] * isinstance(experts, Dense)
            for linear in (one for slot in plain for one in slot.modules() if isinstance(one, nn.Linear)):
                nn.init.xavier_uniform_(linear.weight)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        mlp = self.time_embed.timestep_embedder
        for table in (mlp.linear_1, mlp.linear_2, self.label_embed.embedding_table):
            nn.init.normal_(table.weight, std=0.02)


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor, channels: int) -> Tensor:
    """uncond + scale * (cond - uncond) in the first `channels`, the rest as in `cond`; all [B, C, H, W]."""
    first = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([first, cond[:, channels:]], dim=1)


def guided(
    model: DiT, x: Tensor, timestep: Tensor, labels: Tensor, scale: float, *, channels: int | None = None
) -> Tensor:
    """Return a prediction guided towards its class by `scale` (1 is none).

    Args:
        model: a network with a null class.
        x: [B, C, H, W]. timestep, labels: [B].
        scale: how many times the way from "no class" to the class is gone.
        channels: how many of the first channels are guided; None for all, 3 for the sampler of the released DiT and SiT.

    Raises:
        ValueError: the model has no null class.
    """
    if not model.config.null_class:
        raise ValueError("guided: this model has no null class, it was trained without label dropout")
    null = torch.full_like(labels, model.config.num_classes)
    both = model(
        torch.cat([x, x]), torch.cat([timestep, timestep]), torch.cat([labels, null]), return_dict=False
    )[0]
    cond, uncond = both.chunk(2)
    return guide(cond, uncond, scale, model.config.in_channels if channels is None else channels)


def _check(
    width: int, heads: int, depth: int, sample_size: int, patch_size: int, num_classes: int, convention: str
) -> None:
    if width < 4 or heads < 1 or width % heads or width % 4:
        raise ValueError(f"DiT: width must divide by heads and by 4, got width={width}, heads={heads}")
    if depth < 1 or num_classes < 1:
        raise ValueError(
            f"DiT: depth and num_classes are at least 1, got depth={depth}, num_classes={num_classes}"
        )
    if patch_size < 1 or sample_size < 1 or sample_size % patch_size:
        raise ValueError(
            f"DiT: sample_size must divide by patch_size, got sample_size={sample_size}, patch_size={patch_size}"
        )
    if convention not in CONVENTIONS:
        raise ValueError(f"DiT: convention is one of {', '.join(CONVENTIONS)}, got {convention!r}")


register_block(DiTBlock, hidden_states=0)
