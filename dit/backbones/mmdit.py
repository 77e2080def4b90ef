"""MMDiT: text and image as two streams with weights of their own that hear each other in joint attention.

Paper: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, Esser et al. 2024, arXiv:2403.03206 (dual
stream, QK-norm, pre-only last block); FLUX.1, Black Forest Labs 2024 (single-stream blocks, rotary positions).
Differs: takes the picture itself and cuts it into patches; positions are computed for the grid at hand; the network may
predict the clean picture (Back to Basics, Li and He 2025, arXiv:2511.13720) and still return the velocity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from dit.attention import joint_mask
from dit.context_parallel import part_of, whole_of
from dit.embeddings import PooledProjection, Rotary, TimeEmbedding, rotary, sincos_2d
from dit.experts.dense import Dense, Experts, routed
from dit.grid import Grid
from dit.layers import PatchEmbed, PatchOut, PlainNorm
from dit.ledger import Part, part
from dit.mixers.full import Mixer
from dit.model import Backbone, Context, register_block, register_specs
from dit.modulation import Modulation, modulate
from dit.prediction import velocity_from_picture
from dit.spec import parse

Streams = tuple[Tensor, Tensor]


class DualBlock(nn.Module):
    """Two streams, one joint attention, two perceptrons. A pre-only block passes the text stream on unchanged."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        hidden: int,
        qk_norm: bool,
        pre_only: bool,
        mixer: Mixer,
        experts: Experts,
        modulation: Modulation,
    ) -> None:
        super().__init__()
        self.pre_only = pre_only
        self.norm1, self.norm1_context, self.norm2 = PlainNorm(width), PlainNorm(width), PlainNorm(width)
        self.modulation = modulation.build(width, 6)
        self.modulation_context = modulation.build(width, 2 if pre_only else 6)
        self.attn = mixer.build_joint(width, heads, qk_norm=qk_norm, context_pre_only=pre_only)
        self.ff = experts.build(width, hidden)
        self.router = experts.router(width, heads, hidden)
        if not pre_only:
            self.norm2_context = PlainNorm(width)
            self.ff_context = experts.build(width, hidden)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, context: Context
    ) -> Streams:
        """Image [B, N, D], text [B, L, D], conditioning [B, D] or [B, N, D] -> (text, image), in FLUX's order."""
        if temb is not context.emb:
            context = dataclasses.replace(context, emb=temb)
        streams = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
        streams = routed(self.router, self._body, streams, context)
        encoder_hidden_states, hidden_states = streams["encoder_hidden_states"], streams["hidden_states"]
        return encoder_hidden_states, hidden_states

    def _body(self, streams: dict[str, Tensor], context: Context) -> dict[str, Tensor]:
        image, words = streams["hidden_states"], streams["encoder_hidden_states"]  # [B, N, D], [B, L, D]
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.modulation(context.emb)
        text = self.modulation_context(context.emb if context.emb.dim() == 2 else context.emb.mean(dim=1))
        attended = self.attn(
            hidden_states=modulate(self.norm1(image), shift, scale),
            encoder_hidden_states=modulate(self.norm1_context(words), text[0], text[1]),
            context=context,
        )
        attended, attended_text = (attended, None) if self.pre_only else attended
        image = image + gate * attended
        inner = modulate(self.norm2(image), shift_ff, scale_ff)
        image = image + gate_ff * self.ff(inner, dataclasses.replace(context, residual=image))
        if not self.pre_only:
            words = words + text[2] * attended_text
            inner = modulate(self.norm2_context(words), text[3], text[4])
            alone = dataclasses.replace(context, grid=None, residual=words)
            words = words + text[5] * self.ff_context(inner, alone)
        return {"hidden_states": image, "encoder_hidden_states": words}


class SingleBlock(nn.Module):
    """One stream of text and image tokens; attention and perceptron side by side on one norm, one map out (FLUX).

    Experts other than the plain perceptron have a map out of their own, so that of the attention stands alone.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        hidden: int,
        qk_norm: bool,
        mixer: Mixer,
        experts: Experts,
        modulation: Modulation,
    ) -> None:
        super().__init__()
        plain = isinstance(experts, Dense) and experts.activation == "gelu-approximate"
        self.norm = PlainNorm(width)
        self.modulation = modulation.build(width, 3)
        self.attn = mixer.build(width, heads, qk_norm=qk_norm, pre_only=True)
        self.proj_mlp = nn.Linear(width, hidden) if plain else None
        self.act_mlp = nn.GELU(approximate="tanh") if plain else None
        self.ff = None if plain else experts.build(width, hidden)
        self.proj_out = nn.Linear(width + hidden if plain else width, width)
        self.router = experts.router(width, heads, hidden)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, context: Context
    ) -> Streams:
        """Image [B, N, D], text [B, L, D], conditioning [B, D] or [B, N, D] -> (text, image)."""
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if temb.dim() == 3:
            temb = torch.cat([temb.mean(dim=1, keepdim=True).expand(-1, text, -1), temb], dim=1)
        context = dataclasses.replace(context, emb=temb, length=text)
        streams = {"hidden_states": joint}
        streams = routed(self.router, self._body, streams, context)
        joint = streams["hidden_states"]
        return joint[:, :text], joint[:, text:]

    def _body(self, streams: dict[str, Tensor], context: Context) -> dict[str, Tensor]:
        x = streams["hidden_states"]  # [B, L + N, D]
        shift, scale, gate = self.modulation(context.emb)
        inner = modulate(self.norm(x), shift, scale)
        attended = self.attn(hidden_states=inner, context=context)
        if self.proj_mlp is None or self.act_mlp is None:
            assert self.ff is not None
            added = self.proj_out(attended) + self.ff(inner, dataclasses.replace(context, residual=x))
        else:
            added = self.proj_out(torch.cat([attended, self.act_mlp(self.proj_mlp(inner))], dim=-1))
        return {"hidden_states": x + gate * added}


class MMDiT(Backbone):
    """The text-to-image network. Time runs in diffusers' direction: 1000 is noise, 0 the picture; velocity = noise - picture.

    Args:
        in_channels: channels of the picture or latent; `out_channels` where the output has others.
        patch_size: side of a patch, sample_size: side that the network was made for (other sizes run too), in latent pixels.
        width, heads, mlp_ratio: size of a block. dual_depth, single_depth: counts of blocks of each kind.
        context_dim: channels of a text token. pooled_dim: channels of the pooled prompt vector, None for no pooled path.
        qk_norm: RMS-normalise queries and keys per head. position: "rope" (rotary, 2-D), "sincos" (added once), or "both".
        rope_axes: rotary channels of frame, row, column (their sum is the head size); None splits rows and columns evenly.
        guidance_embeds: take the guidance scale as an input (distilled models).
        prediction_type: "velocity", or "sample" where the last layer predicts the clean picture.
        mixer, experts, modulation: settings of the block slots.

    Raises:
        ValueError: sizes that do not fit together.
    """

    _repeated_blocks: ClassVar[list[str]] = ["DualBlock", "SingleBlock"]
    _no_split_modules: ClassVar[list[str]] = ["DualBlock", "SingleBlock"]
    _cp_plan: ClassVar[dict[str, Any]] = {}  # nothing for hooks: the network shares its streams itself

    @register_specs
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        patch_size: int = 4,
        sample_size: int = 32,
        width: int = 256,
        heads: int = 4,
        dual_depth: int = 4,
        single_depth: int = 6,
        mlp_ratio: float = 4.0,
        context_dim: int = 384,
        pooled_dim: int | None = 384,
        qk_norm: bool = True,
        position: Literal["rope", "sincos", "both"] = "rope",
        rope_axes: tuple[int, int, int] | None = None,
        rope_theta: float = 10000.0,
        guidance_embeds: bool = False,
        prediction_type: Literal["velocity", "sample"] = "velocity",
        mixer: Mixer | dict[str, Any] | str = "full",
        experts: Experts | dict[str, Any] | str = "dense",
        modulation: Modulation | dict[str, Any] | str = "adaln-zero",
    ) -> None:
        super().__init__()
        self.axes = _check(width, heads, dual_depth + single_depth, position, rope_axes, prediction_type)
        self.out_channels = out_channels or in_channels
        patch, hidden = (1, patch_size, patch_size), int(width * mlp_ratio)
        slots: dict[str, Any] = {
            "hidden": hidden, "qk_norm": qk_norm, "experts": parse(Experts, experts),
            "modulation": parse(Modulation, modulation),
        }  # fmt: skip
        mixer = parse(Mixer, mixer)
        self.x_embedder = PatchEmbed(in_channels, width, patch)
        self.context_embedder = nn.Linear(context_dim, width)
        self.time_embed = TimeEmbedding(width)
        self.guidance_embed = TimeEmbedding(width) if guidance_embeds else None
        self.text_embed = PooledProjection(pooled_dim, width) if pooled_dim else None
        self.modulation_shared = slots["modulation"].shared(width)
        self.transformer_blocks = nn.ModuleList(
            DualBlock(
                width, heads, pre_only=single_depth == 0 and i == dual_depth - 1, mixer=mixer.at(i), **slots
            )
            for i in range(dual_depth)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, heads, mixer=mixer.at(dual_depth + i), **slots) for i in range(single_depth)
        )
        self.norm_out = PlainNorm(width)
        self.modulation_out = slots["modulation"].build(width, 2)
        self.proj_out = PatchOut(width, self.out_channels, patch)

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        guidance: Tensor | None = None,
        controlnet_block_samples: list[Tensor] | None = None,
        controlnet_single_block_samples: list[Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return the velocity at a noisy picture.

        Args:
            hidden_states: noisy picture [B, C, H, W] or clip [B, C, F, H, W]; rows and columns divide by the patch.
            timestep: [B], or [B, N] with one time a token, on 0..1000.
            encoder_hidden_states: text tokens [B, L, context_dim].
            pooled_projections: pooled prompt [B, pooled_dim].
            encoder_attention_mask: [B, L], true (or 1) at real text tokens; None if all are.
            guidance: [B], the guidance scale of a distilled model.
            controlnet_block_samples, controlnet_single_block_samples: residuals [B, N, D] added after the blocks of each
                kind, spread evenly where there are fewer residuals than blocks.
            joint_attention_kwargs: passed to attention processors; `scale` is the LoRA scale.

        Returns:
            velocity in the shape of `hidden_states` as `sample`, or a one-tuple unless `return_dict`.
        """
        grid = Grid.of(hidden_states, self.x_embedder.patch)
        dtype, device = self.dtype, hidden_states.device
        image = self.x_embedder(hidden_states.to(dtype))
        if self.config.position != "rope":
            image = image + sincos_2d(self.config.width, grid, device).to(dtype)
        text = self.context_embedder(encoder_hidden_states.to(dtype))
        time = self.embed_time(timestep, dtype)
        temb = self._conditioning(time, pooled_projections, guidance, dtype)
        if self.modulation_shared is not None:
            temb = self.modulation_shared(temb)
        context = Context(
            grid,
            temb,
            time=time,
            timestep=timestep,
            rotary=self._rotary(grid, text.shape[1], device),
            mask=joint_mask(encoder_attention_mask, grid.tokens),
            attention_kwargs=joint_attention_kwargs or {},
        )
        added = (controlnet_block_samples or [], controlnet_single_block_samples or [])
        image = self._through(image, text, context, added)  # [B, N, D]
        shift, scale = self.modulation_out(temb)
        inner = modulate(self.norm_out(image), shift, scale)
        output = self.proj_out(inner, grid, frames=hidden_states.dim() == 5).to(hidden_states.dtype)
        if self.config.prediction_type == "sample":
            output = velocity_from_picture(output, hidden_states, timestep, self.config.patch_size)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _through(
        self, image: Tensor, text: Tensor, context: Context, added: tuple[list[Tensor], list[Tensor]]
    ) -> Tensor:
        """Take image [B, N, D] and text [B, L, D] through all blocks, adding residuals after those of each kind."""
        share, context, image, text = self._among_ranks(context, image, text)
        stacks = (self.transformer_blocks, self.single_transformer_blocks)
        for blocks, residuals in zip(stacks, added, strict=True):
            for i, block in enumerate(blocks):
                text, image = self._run(
                    block, hidden_states=image, encoder_hidden_states=text, temb=context.emb, context=context
                )
                if residuals:
                    image = image + part_of(share, residuals[i * len(residuals) // len(blocks)])
        return whole_of(share, image)

    def costs(self, grid: Grid, text: int = 0) -> Iterator[Part]:
        """Yield the analytic cost of every part for one picture of `grid` and a prompt of `text` tokens."""
        yield part(self, "x_embedder", "embed", grid.tokens)
        yield part(self, "context_embedder", "embed", text)
        for name in ("time_embed", "guidance_embed", "text_embed", "modulation_shared"):
            if getattr(self, name) is not None:
                yield part(self, name, "modulation" if name == "modulation_shared" else "embed", 1)
        for i, dual in enumerate(self.transformer_blocks):
            path = f"transformer_blocks.{i}"
            yield part(self, f"{path}.modulation", "modulation", 1)
            yield part(self, f"{path}.modulation_context", "modulation", 1)
            yield part(self, f"{path}.attn", "attention", grid.tokens, text, grid)
            yield part(self, f"{path}.ff", "mlp", grid.tokens)
            if not dual.pre_only:
                yield part(self, f"{path}.ff_context", "mlp", text)
            if dual.router is not None:
                yield part(self, f"{path}.router", "mlp", grid.tokens, text)
        for i in range(len(self.single_transformer_blocks)):
            yield from _single_costs(self, f"single_transformer_blocks.{i}", grid.tokens + text, text, grid)
        yield part(self, "modulation_out", "modulation", 1)
        yield part(self, "proj_out", "embed", grid.tokens)

    def embed_time(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """[B] or [B, N] -> the embedding of the time alone, [B, D] or [B, N, D]."""
        time: Tensor = self.time_embed(timestep, dtype)
        return time

    def _conditioning(
        self, temb: Tensor, pooled: Tensor | None, guidance: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        parts: list[Tensor] = []
        if self.guidance_embed is not None:
            if guidance is None:
                raise ValueError("this model was distilled with guidance: pass guidance [B]")
            parts.append(self.guidance_embed(guidance * 1000, dtype))
        if self.text_embed is not None:
            if pooled is None:
                raise ValueError("this model has a pooled path: pass pooled_projections [B, pooled_dim]")
            parts.append(self.text_embed(pooled.to(dtype)))
        for one in parts:
            temb = temb + (one if temb.dim() == 2 else one.unsqueeze(1))
        return temb

    def _rotary(self, grid: Grid, text: int, device: torch.device) -> Rotary | None:
        if self.config.position == "sincos":
            return None
        return rotary(self.axes, grid, text, self.config.rope_theta, device)


def _single_costs(model: MMDiT, path: str, rows: int, text: int, grid: Grid) -> Iterator[Part]:
    """The costs of a single-stream block; its map out is shared by attention and perceptron, and so is its cost.

    `text` of the `rows` are text, which modules that look at the grid of the picture must know.
    """
    yield part(model, f"{path}.modulation", "modulation", 1)
    yield part(model, f"{path}.attn", "attention", rows, text, grid)
    block: Any = model.get_submodule(path)
    if block.router is not None:
        yield part(model, f"{path}.router", "mlp", rows)
    if block.ff is not None:
        yield part(model, f"{path}.ff", "mlp", rows)
        yield part(model, f"{path}.proj_out", "attention", rows)
        return
    yield part(model, f"{path}.proj_mlp", "mlp", rows)
    both = part(model, f"{path}.proj_out", "mlp", rows)
    width = int(model.config.width)
    square = dataclasses.replace(
        both, kind="attention", macs=rows * width * width, parameters=width * width, activated=width * width
    )
    yield square
    yield dataclasses.replace(
        both,
        macs=both.macs - square.macs,
        parameters=both.parameters - square.parameters,
        activated=both.activated - square.activated,
    )


def _check(
    width: int, heads: int, depth: int, position: str, axes: tuple[int, int, int] | None, prediction: str
) -> tuple[int, int, int]:
    if width % heads or width % 4:
        raise ValueError(f"MMDiT: width must divide by heads and by 4, got width={width}, heads={heads}")
    if depth < 1:
        raise ValueError("MMDiT: needs at least one block: dual_depth + single_depth is 0")
    if position not in ("rope", "sincos", "both") or prediction not in ("velocity", "sample"):
        raise ValueError(
            f"MMDiT: position is rope, sincos or both and prediction_type velocity or sample, got {position}, {prediction}"
        )
    size = width // heads
    found = tuple(axes) if axes is not None else (0, size // 2, size // 2)
    if position != "sincos" and (len(found) != 3 or sum(found) != size or any(part % 2 for part in found)):
        raise ValueError(
            f"MMDiT: rope_axes are three even counts adding up to the head size {size}, got {found}"
        )
    return found[0], found[1], found[2]


for _block in (DualBlock, SingleBlock):
    register_block(_block, hidden_states=1, encoder_hidden_states=0)
