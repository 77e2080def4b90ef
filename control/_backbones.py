"""The few facts that adapters must know of a transformer: where its blocks are, how it embeds, and how one stream runs alone.

One class of facts a family, found by the name of the transformer's class; every other transformer is refused in words.
Only facts stand here: what an adapter does with them is its own file's.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit.embeddings import Rotary, sincos_1d
from dit.grid import Grid
from dit.seams import blocks_of

Hear = Callable[[Any, Tensor], Tensor]
"""(attention module, normed stream [B, N, D]) -> what it hears [B, N, D], after its map out if it has one."""


@dataclass(frozen=True, slots=True)
class Place:
    """One block and the joint attention in it. `dual` blocks have weights of their own for text, `single` ones share them."""

    index: int
    path: str
    kind: str
    block: Any

    @property
    def attn(self) -> Any:
        """The attention module."""
        return self.block.attn

    @property
    def layer(self) -> str:
        """The path of the attention module, as the attention seam calls it."""
        return f"{self.path}.attn"


class Facts(ABC):
    """What differs between families. Tensors `where` [N, 3] are positions (frame, row, column) in tokens, fractions allowed."""

    def refuses(self, transformer: Any) -> str | None:
        """Return in words why this member of the family cannot be served, or None."""
        blocks = blocks_of(transformer)
        if blocks.reason is not None:
            return blocks.reason
        for block in blocks:
            registry = getattr(block.module, "_diffusers_hook", None)
            if registry is not None and registry.get_hook("group_offloading") is not None:
                return (
                    "group offloading brings its blocks one by one, and a condition runs through their parts: "
                    'use offload_type="leaf_level"'
                )
        fused = next((one.path for one in self.places(transformer) if not hasattr(one.attn, "to_k")), None)
        return (
            None
            if fused is None
            else f"{fused}.attn has its projections fused: unfuse_qkv_projections() first"
        )

    def refuses_positions(self, transformer: Any, mode: str) -> str | None:
        """Return in words why tokens cannot stand where this mode puts them (see `control.easycontrol`), or None."""
        return None

    def places(self, transformer: Any) -> tuple[Place, ...]:
        """Return the blocks in order."""
        return tuple(
            Place(index, one.path, self.kind(one.module), one.module)
            for index, one in enumerate(blocks_of(transformer))
        )

    def kind(self, block: nn.Module) -> str:
        """Return dual or single."""
        return "single" if not hasattr(block, "norm1") else "dual"

    def dtype(self, transformer: Any, given: Mapping[str, Any]) -> torch.dtype:
        """Return the dtype in which the blocks run in a call."""
        found: torch.dtype = given["hidden_states"].dtype
        return found

    @abstractmethod
    def grid(self, transformer: Any, given: Mapping[str, Any]) -> tuple[int, int]:
        """Return rows and columns of the picture's tokens in a call."""

    @abstractmethod
    def patch(self, transformer: Any) -> int:
        """Return the side of a token in latent pixels."""

    @abstractmethod
    def channels(self, transformer: Any) -> int:
        """Return the channels of a latent (or picture)."""

    @abstractmethod
    def embed(self, transformer: Any, latent: Tensor, where: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, C, H, W] -> tokens [B, N, D] at positions `where`, beside a picture of `grid` tokens."""

    @abstractmethod
    def angles(self, transformer: Any, where: Tensor) -> Rotary | None:
        """Return cosines and sines [N, head size] of positions, or None where the attention does not rotate."""

    @abstractmethod
    def conditioning(self, transformer: Any, pooled: Tensor, guidance: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what modulates a stream at time 0, for pooled prompts [B, P] and guidance scales [B]."""

    @abstractmethod
    def pooled_channels(self, transformer: Any) -> int:
        """Return the channels of a pooled prompt (0: it takes none)."""

    @abstractmethod
    def step(self, place: Place, x: Tensor, emb: Tensor, hear: Hear, grid: Grid) -> Tensor:
        """Run the picture's half of a block on a stream x [B, N, D] that stands alone; `emb` modulates it."""

    def normed(self, place: Place, x: Tensor, emb: Tensor) -> Tensor:
        """Return what the attention of a block is given for x: its norm, modulated."""

        class Found(Exception):  # no error: it stops the block where its attention begins
            pass

        seen: list[Tensor] = []

        def hear(_attn: Any, inner: Tensor) -> Tensor:
            seen.append(inner)
            raise Found

        try:
            self.step(place, x, emb, hear, Grid(1, 1, x.shape[1]))
        except Found:
            pass
        return seen[0]


class FluxFacts(Facts):
    """diffusers' FLUX.1: packed latents, rotary ids, text first."""

    def grid(self, transformer: Any, given: Mapping[str, Any]) -> tuple[int, int]:
        ids = given["img_ids"]
        ids = ids[0] if ids.dim() == 3 else ids
        own = ids[ids[:, 0] == 0]
        return int(own[:, 1].max()) + 1, int(own[:, 2].max()) + 1

    def patch(self, transformer: Any) -> int:
        return 2

    def channels(self, transformer: Any) -> int:
        return int(transformer.config.in_channels) // 4

    def embed(self, transformer: Any, latent: Tensor, where: Tensor, grid: tuple[int, int]) -> Tensor:
        batch, channels, rows, columns = latent.shape
        x = latent.reshape(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
        tokens: Tensor = transformer.x_embedder(x.reshape(batch, -1, channels * 4))
        return tokens

    def angles(self, transformer: Any, where: Tensor) -> Rotary | None:
        found: Rotary = transformer.pos_embed(where)
        return found

    def conditioning(self, transformer: Any, pooled: Tensor, guidance: Tensor, dtype: torch.dtype) -> Tensor:
        time = torch.zeros(len(pooled), dtype=dtype, device=pooled.device)
        scales = (guidance.to(dtype) * 1000,) if transformer.config.guidance_embeds else ()
        emb: Tensor = transformer.time_text_embed(time, *scales, pooled)
        return emb

    def pooled_channels(self, transformer: Any) -> int:
        return int(transformer.config.pooled_projection_dim)

    def step(self, place: Place, x: Tensor, emb: Tensor, hear: Hear, grid: Grid) -> Tensor:
        block = place.block
        if place.kind == "single":
            inner, gate = block.norm(x, emb=emb)
            both = torch.cat([hear(block.attn, inner), block.act_mlp(block.proj_mlp(inner))], dim=2)
            added: Tensor = gate.unsqueeze(1) * block.proj_out(both)
            return x + added
        inner, gate, shift_ff, scale_ff, gate_ff = block.norm1(x, emb=emb)
        x = x + gate.unsqueeze(1) * hear(block.attn, inner)
        inner = block.norm2(x) * (1 + scale_ff[:, None]) + shift_ff[:, None]
        return x + gate_ff.unsqueeze(1) * block.ff(inner)


class SD3Facts(Facts):
    """diffusers' Stable Diffusion 3: latents, a table of positions added once, text last."""

    def refuses_positions(self, transformer: Any, mode: str) -> str | None:
        if mode in ("corner", "center"):
            return None
        return f"positions {mode!r} lie beside the picture, and its table of positions ends there; use corner or center"

    def grid(self, transformer: Any, given: Mapping[str, Any]) -> tuple[int, int]:
        rows, columns = given["hidden_states"].shape[-2:]
        return rows // self.patch(transformer), columns // self.patch(transformer)

    def patch(self, transformer: Any) -> int:
        return int(transformer.config.patch_size)

    def channels(self, transformer: Any) -> int:
        return int(transformer.config.in_channels)

    def embed(self, transformer: Any, latent: Tensor, where: Tensor, grid: tuple[int, int]) -> Tensor:
        entry = transformer.pos_embed
        tokens = entry.proj(latent).flatten(2).transpose(1, 2)
        side = entry.pos_embed_max_size
        table = entry.pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
        first = torch.tensor([(side - grid[0]) // 2, (side - grid[1]) // 2], device=where.device)
        at = (where[:, 1:] + first) / max(1, side - 1) * 2 - 1  # -1..1 between the corners of the table
        read = F.grid_sample(table, at.flip(-1)[None, None], align_corners=True, padding_mode="border")
        return (tokens + read[:, :, 0].transpose(1, 2)).to(latent.dtype)

    def angles(self, transformer: Any, where: Tensor) -> Rotary | None:
        return None

    def conditioning(self, transformer: Any, pooled: Tensor, guidance: Tensor, dtype: torch.dtype) -> Tensor:
        time = torch.zeros(len(pooled), dtype=dtype, device=pooled.device)
        emb: Tensor = transformer.time_text_embed(time, pooled)
        return emb

    def pooled_channels(self, transformer: Any) -> int:
        return int(transformer.config.pooled_projection_dim)

    def step(self, place: Place, x: Tensor, emb: Tensor, hear: Hear, grid: Grid) -> Tensor:
        block = place.block
        second = None
        if block.use_dual_attention:
            inner, gate, shift_ff, scale_ff, gate_ff, second, gate_second = block.norm1(x, emb=emb)
        else:
            inner, gate, shift_ff, scale_ff, gate_ff = block.norm1(x, emb=emb)
        x = x + gate.unsqueeze(1) * hear(block.attn, inner)
        if second is not None:
            x = x + gate_second.unsqueeze(1) * block.attn2(hidden_states=second)
        inner = block.norm2(x) * (1 + scale_ff[:, None]) + shift_ff[:, None]
        return x + gate_ff.unsqueeze(1) * block.ff(inner)


class MMDiTFacts(Facts):
    """Our MMDiT: pictures, rotary or added positions, text first."""

    def refuses(self, transformer: Any) -> str | None:
        from dit.mixers.full import FullMixer

        for place in self.places(transformer):
            if place.block.router is not None:
                return (
                    f"{place.path} decides by a router which parts it computes, and a condition has no routes"
                )
            if type(place.attn) is not FullMixer:
                return f"{place.path} mixes its tokens by {type(place.attn).__name__}, not by full attention"
        return super().refuses(transformer)

    def refuses_positions(self, transformer: Any, mode: str) -> str | None:
        rotates = transformer.config.position != "sincos"
        if mode == "frame" and not (rotates and transformer.axes[0]):
            return "positions 'frame' need rotary channels for frames, and it has none (rope_axes); use rows"
        return None

    def dtype(self, transformer: Any, given: Mapping[str, Any]) -> torch.dtype:
        found: torch.dtype = transformer.dtype
        return found

    def grid(self, transformer: Any, given: Mapping[str, Any]) -> tuple[int, int]:
        found = Grid.of(given["hidden_states"], transformer.x_embedder.patch)
        return found.height, found.width

    def patch(self, transformer: Any) -> int:
        return int(transformer.config.patch_size)

    def channels(self, transformer: Any) -> int:
        return int(transformer.config.in_channels)

    def embed(self, transformer: Any, latent: Tensor, where: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens: Tensor = transformer.x_embedder(latent)
        if transformer.config.position == "rope":
            return tokens
        width = transformer.config.width
        table = torch.cat([sincos_1d(width // 2, where[:, 2]), sincos_1d(width // 2, where[:, 1])], dim=1)
        return tokens + table.to(tokens.dtype)

    def angles(self, transformer: Any, where: Tensor) -> Rotary | None:
        config = transformer.config
        if config.position == "sincos":
            return None
        kind = torch.float32 if where.device.type == "mps" else torch.float64
        found = []
        for axis, size in enumerate(transformer.axes):
            powers = torch.arange(0, size, 2, dtype=kind, device=where.device) / max(size, 1)
            found.append(where[:, axis : axis + 1].to(kind) * config.rope_theta**-powers)
        full = torch.cat(found, dim=1).repeat_interleave(2, dim=1)
        return full.cos().float(), full.sin().float()

    def conditioning(self, transformer: Any, pooled: Tensor, guidance: Tensor, dtype: torch.dtype) -> Tensor:
        emb = transformer.embed_time(torch.zeros(len(pooled), device=pooled.device), dtype)
        if transformer.guidance_embed is not None:
            emb = emb + transformer.guidance_embed(guidance * 1000, dtype)
        if transformer.text_embed is not None:
            emb = emb + transformer.text_embed(pooled.to(dtype))
        found: Tensor = emb if transformer.modulation_shared is None else transformer.modulation_shared(emb)
        return found

    def pooled_channels(self, transformer: Any) -> int:
        return int(transformer.config.pooled_dim or 0)

    def step(self, place: Place, x: Tensor, emb: Tensor, hear: Hear, grid: Grid) -> Tensor:
        from dit.model import Context

        block, context = place.block, Context(grid, emb)
        if place.kind == "single":
            shift, scale, gate = block.modulation(emb)
            inner = block.norm(x) * (1 + scale) + shift
            heard = hear(block.attn, inner)
            if block.proj_mlp is None:
                added = block.proj_out(heard) + block.ff(inner, dataclasses.replace(context, residual=x))
            else:
                added = block.proj_out(torch.cat([heard, block.act_mlp(block.proj_mlp(inner))], dim=-1))
            return x + gate * added
        shift, scale, gate, shift_ff, scale_ff, gate_ff = block.modulation(emb)
        x = x + gate * hear(block.attn, block.norm1(x) * (1 + scale) + shift)
        inner = block.norm2(x) * (1 + scale_ff) + shift_ff
        return x + gate_ff * block.ff(inner, dataclasses.replace(context, residual=x))


KNOWN: dict[str, Facts] = {
    "FluxTransformer2DModel": FluxFacts(),
    "SD3Transformer2DModel": SD3Facts(),
    "MMDiT": MMDiTFacts(),
}


def facts_of(transformer: nn.Module) -> Facts | str:
    """Return the facts of a transformer's family, or in words why there are none."""
    if hasattr(transformer, "_orig_mod"):
        return "it is compiled as a whole, and a compiled graph cannot be steered: compile_repeated_blocks() after"
    for cls in type(transformer).__mro__:
        found = KNOWN.get(cls.__name__)
        if found is not None:
            return found.refuses(transformer) or found
    return f"{type(transformer).__name__} is not known here; known are {', '.join(KNOWN)}"
