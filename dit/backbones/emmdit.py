"""E-MMDiT: a light MMDiT that thinks on few tokens in the middle, hears in subregions, and shares its modulation.

Paper: E-MMDiT: Revisiting Multimodal Diffusion Transformer Design for Fast Image Synthesis under Limited Resources, Shen et al.
2025, arXiv:2510.27135 (released as Nitro-E).
Differs: any grid of patches, square or not (the released code cuts the compressed tokens apart by the height alone and has
positions for one size); a mask of the prompt is obeyed where one is given; a pooled prompt vector may join the time; the network
may predict the clean picture and still return the velocity. The prompt stands first in joint attention, which changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import MagCacheConfig
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from dit.attention import joint_mask
from dit.backbones.mmdit import DualBlock
from dit.compress import TokenCompressor, TokenReconstructor
from dit.embeddings import PooledProjection, TimeEmbedding, sincos_1d
from dit.experts.dense import Experts
from dit.grid import Grid
from dit.layers import PatchEmbed, PatchOut, PlainNorm
from dit.ledger import Part, part
from dit.mixers.full import Mixer
from dit.model import Backbone, Context, register_block, register_specs
from dit.modulation import Modulation
from dit.prediction import velocity_from_picture
from dit.spec import parse


class EMMDiTBlock(DualBlock):
    """A dual block whose norms before attention have weights; the prompt of the last block is not modulated."""

    def __init__(self, width: int, heads: int, *, pre_only: bool, **slots: Any) -> None:
        super().__init__(width, heads, pre_only=pre_only, **slots)
        for name in ("norm1", "norm1_context"):
            self.add_module(name, nn.LayerNorm(width))
        if pre_only:
            self.modulation_context = Unmodulated()


class Unmodulated(nn.Module):
    """Shift and scale of 0."""

    def forward(self, emb: Tensor) -> tuple[Tensor, Tensor]:
        zero = emb.new_zeros(())
        return zero, zero


@dataclasses.dataclass
class EMMDiTOutput(Transformer2DModelOutput):
    """`sample`: velocity [B, C, H, W]; `projections`: one [B, N, size] for each size of `projection_dims`, where asked for."""

    projections: tuple[Tensor, ...] | None = None


class EMMDiT(Backbone):
    """The text-to-image network. Time runs in diffusers' direction: 1000 is noise, 0 the picture; velocity = noise - picture.

    Args:
        in_channels: channels of the picture or latent; `out_channels` where the output has others.
        patch_size: side of a patch in latent pixels.
        sample_size: side in latent pixels that the network was made for (other sizes run too).
        width, heads, mlp_ratio: size of a block.
        groups: counts of blocks before, within and after compression; a single count for no compression.
        ratios: sides of the squares of tokens that become one token, one path for each.
        context_dim: channels of a text token. pooled_dim: channels of a pooled prompt vector, None for no such path.
        qk_norm: RMS-normalise queries and keys per head.
        position_size, position_scale: positions are places of a centred table of `position_size` a side (None: as many as
            the patches of `sample_size`) that spans `sample_size` patches divided by `position_scale`.
        reinforce: add the positions again after reconstruction. skip_features: reconstruct from what was there before too.
        projection_dims, projection_hidden: sizes of the features that a projector of the first group's tokens is trained to
            meet (REPA), and its inner size; no sizes for no projector.
        prediction_type: "velocity", or "sample" where the last layer predicts the clean picture.
        mixer, experts, modulation: settings of the block slots.

    Raises:
        ValueError: sizes that do not fit together.
    """

    _repeated_blocks: ClassVar[list[str]] = ["EMMDiTBlock"]
    _no_split_modules: ClassVar[list[str]] = ["EMMDiTBlock"]

    @register_specs
    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int | None = None,
        patch_size: int = 1,
        sample_size: int = 16,
        width: int = 768,
        heads: int = 24,
        mlp_ratio: float = 3.0,
        groups: Sequence[int] = (4, 16, 4),
        ratios: Sequence[int] = (2, 4),
        context_dim: int = 2048,
        pooled_dim: int | None = None,
        qk_norm: bool = True,
        position_size: int | None = None,
        position_scale: float = 1.0,
        reinforce: bool = True,
        skip_features: bool = True,
        projection_dims: Sequence[int] = (),
        projection_hidden: int = 2048,
        prediction_type: Literal["velocity", "sample"] = "velocity",
        mixer: Mixer | dict[str, Any] | str = "subregion",
        experts: Experts | dict[str, Any] | str = "dense",
        modulation: Modulation | dict[str, Any] | str = "adaln-affine",
    ) -> None:
        super().__init__()
        _check(width, heads, groups, ratios, prediction_type)
        patch, hidden = (1, patch_size, patch_size), int(width * mlp_ratio)
        mixer, modulation, experts = (
            parse(Mixer, mixer),
            parse(Modulation, modulation),
            parse(Experts, experts),
        )
        for slot in (mixer, experts):
            if slot.needs_grid and len(groups) == 3:
                raise ValueError(
                    f"E-MMDiT: {slot.name} looks at the places of tokens, and the compressed tokens of the middle group are no "
                    "grid; use groups of one, or another kind"
                )
        self.x_embedder = PatchEmbed(in_channels, width, patch)
        self.context_embedder = nn.Linear(context_dim, width)
        self.time_embed = TimeEmbedding(width)
        self.text_embed = PooledProjection(pooled_dim, width) if pooled_dim else None
        self.modulation_shared = modulation.shared(width)
        self.transformer_blocks = nn.ModuleList(
            EMMDiTBlock(
                width, heads, pre_only=i == sum(groups) - 1, hidden=hidden, qk_norm=qk_norm, mixer=mixer.at(i),
                experts=experts, modulation=modulation,
            )
            for i in range(sum(groups))
        )  # fmt: skip
        self.compressor = TokenCompressor(width, ratios) if len(groups) == 3 else None
        self.reconstructor = (
            TokenReconstructor(width, ratios, skip=skip_features) if len(groups) == 3 else None
        )
        self.projectors = nn.ModuleList(
            _projector(width, projection_hidden, size) for size in projection_dims
        )
        self.norm_out = PlainNorm(width)
        self.proj_out = PatchOut(width, out_channels or in_channels, patch)

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        skip_layers: Sequence[int] | None = None,
        return_projections: bool = False,
        return_dict: bool = True,
    ) -> EMMDiTOutput | tuple[Any, ...]:
        """Return the velocity at a noisy picture.

        Args:
            hidden_states: noisy picture [B, C, H, W]; rows and columns divide by the patch.
            timestep: [B], on 0..1000.
            encoder_hidden_states: text tokens [B, L, context_dim].
            pooled_projections: pooled prompt [B, pooled_dim], for a network that has this path.
            encoder_attention_mask: [B, L], true (or 1) at real text tokens; None if all are (and always with released weights).
            joint_attention_kwargs: passed to attention processors; `scale` is the LoRA scale.
            skip_layers: blocks to leave out, by their index within each of the groups.
            return_projections: add the projected tokens of the first group.

        Returns:
            velocity [B, C, H, W] as `sample`, or in a tuple unless `return_dict`.

        Raises: ValueError for one time a token, or projections of a network without a projector.
        """
        grid = Grid.of(hidden_states, self.x_embedder.patch)
        dtype = self.dtype
        positions = self.positions(grid, hidden_states.device).to(dtype)
        image = self.x_embedder(hidden_states.to(dtype)) + positions  # [B, N, D]
        text = self.context_embedder(encoder_hidden_states.to(dtype))  # [B, L, D]
        context = self._context(timestep, pooled_projections, joint_attention_kwargs, dtype)
        projections: tuple[Tensor, ...] = ()
        before, first = image, 0
        for stage, depth in enumerate(self.config.groups):
            if stage == 1 and self.compressor is not None:
                before, image = image, self.compressor(image, grid)  # [B, N / 4 + N / 16, D]
            elif stage == 2 and self.reconstructor is not None:
                image = self.reconstructor(image, before, grid)  # [B, N, D]
                image = image + positions if self.config.reinforce else image
            context = dataclasses.replace(
                context,
                grid=None if stage == 1 else grid,
                mask=joint_mask(encoder_attention_mask, image.shape[1]),
            )
            blocks = self.transformer_blocks[first : first + depth]
            text, image = self._through(blocks, image, text, context, skip_layers or ())
            first += depth
            if stage == 0 and return_projections:
                projections = self._project(image)
        output = self.proj_out(self.norm_out(image), grid).to(hidden_states.dtype)
        if self.config.prediction_type == "sample":
            output = velocity_from_picture(output, hidden_states, timestep, self.config.patch_size)
        if not return_dict:
            return (output, projections) if return_projections else (output,)
        return EMMDiTOutput(sample=output, projections=projections or None)

    def _through(
        self, blocks: nn.ModuleList, image: Tensor, text: Tensor, context: Context, skipped: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Take image [B, N, D] and text [B, L, D] through a group of blocks, but for those skipped -> (text, image)."""
        for i, block in enumerate(blocks):
            if i not in skipped:
                text, image = self._run(
                    block, hidden_states=image, encoder_hidden_states=text, temb=context.emb, context=context
                )
        return text, image

    def enable_cache(self, config: Any) -> None:
        """Switch one of diffusers' caches on. Raises: ValueError for those that replace all blocks by one difference."""
        if self.compressor is not None and isinstance(config, FirstBlockCacheConfig | MagCacheConfig):
            raise ValueError(
                f"{type(config).__name__} replaces all blocks by the difference of the last and the first, and between those of "
                "this network tokens are compressed and reconstructed; use a cache of single blocks, DeltaCache or TaylorCache"
            )
        super().enable_cache(config)

    def positions(self, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
        """Return the frozen table [N, D]: the first half of the channels holds the column, the second the row."""
        side = self.config.sample_size // self.config.patch_size
        size = self.config.position_size or side
        step = side / size / self.config.position_scale
        rows, columns = (
            sincos_1d(
                self.config.width // 2,
                (torch.arange(count, device=device) + (size - count) // 2).float() * step,
            )
            for count in (grid.height, grid.width)
        )
        rows = rows.unsqueeze(1).expand(-1, grid.width, -1)
        columns = columns.unsqueeze(0).expand(grid.height, -1, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()

    def embed_time(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """[B] -> the embedding of the time alone, [B, D]."""
        time: Tensor = self.time_embed(timestep, dtype)
        return time

    def costs(self, grid: Grid, text: int = 0) -> Iterator[Part]:
        """Yield the analytic cost of every part for one picture of `grid` and a prompt of `text` tokens."""
        yield part(self, "x_embedder", "embed", grid.tokens)
        yield part(self, "context_embedder", "embed", text)
        yield part(self, "time_embed", "embed", 1)
        if self.text_embed is not None:
            yield part(self, "text_embed", "embed", 1)
        if self.modulation_shared is not None:
            yield part(self, "modulation_shared", "modulation", 1)
        few = grid.tokens if self.compressor is None else self.compressor.tokens(grid)
        stages = [stage for stage, depth in enumerate(self.config.groups) for _ in range(depth)]
        for i, stage in enumerate(stages):
            yield from self._block_costs(i, few if stage == 1 else grid.tokens, text)
        for name in ("compressor", "reconstructor"):
            if getattr(self, name) is not None:
                for path, rows in getattr(self, name).rows(grid).items():
                    yield part(self, f"{name}.{path}", "mlp", rows)
        yield part(self, "projectors", "embed", 0)
        yield part(self, "proj_out", "embed", grid.tokens)

    def _block_costs(self, index: int, tokens: int, text: int) -> Iterator[Part]:
        path, block = f"transformer_blocks.{index}", self.transformer_blocks[index]
        for name in ("norm1", "norm1_context", "modulation", "modulation_context"):
            yield part(self, f"{path}.{name}", "modulation", 1)
        yield part(self, f"{path}.attn", "attention", tokens, text)
        yield part(self, f"{path}.ff", "mlp", tokens)
        if not block.pre_only:
            yield part(self, f"{path}.ff_context", "mlp", text)
        if block.router is not None:
            yield part(self, f"{path}.router", "mlp", tokens, text)

    def _context(
        self, timestep: Tensor, pooled: Tensor | None, kwargs: dict[str, Any] | None, dtype: torch.dtype
    ) -> Context:
        if timestep.dim() != 1:
            raise ValueError(
                f"E-MMDiT: one time a sample [B], got {tuple(timestep.shape)}; tokens are joined in the middle"
            )
        time = self.embed_time(timestep, dtype)
        emb = time
        if self.text_embed is not None:
            if pooled is None:
                raise ValueError("this model has a pooled path: pass pooled_projections [B, pooled_dim]")
            emb = emb + self.text_embed(pooled.to(dtype))
        if self.modulation_shared is not None:
            emb = self.modulation_shared(emb)
        return Context(None, emb, time=time, timestep=timestep, attention_kwargs=kwargs or {})

    def _project(self, image: Tensor) -> tuple[Tensor, ...]:
        if not len(self.projectors):
            raise ValueError("E-MMDiT: this network has no projector; build it with projection_dims")
        return tuple(projector(image) for projector in self.projectors)


def _projector(width: int, hidden: int, size: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, size)
    )


def _check(width: int, heads: int, groups: Sequence[int], ratios: Sequence[int], prediction: str) -> None:
    if width % heads or width % 4:
        raise ValueError(f"E-MMDiT: width must divide by heads and by 4, got width={width}, heads={heads}")
    if len(groups) not in (1, 3) or any(count < 1 for count in groups):
        raise ValueError(
            f"E-MMDiT: groups are three counts of blocks, or one for no compression, got {list(groups)}"
        )
    if not ratios or any(ratio < 1 or width % ratio**2 for ratio in ratios):
        raise ValueError(
            f"E-MMDiT: width must divide by the square of every ratio, got width={width}, ratios={list(ratios)}"
        )
    if prediction not in ("velocity", "sample"):
        raise ValueError(f"E-MMDiT: prediction_type is velocity or sample, got {prediction!r}")


register_block(EMMDiTBlock, hidden_states=1, encoder_hidden_states=0)
