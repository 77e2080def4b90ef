"""Mask2DiT: a clip of several scenes from one caption a scene, with a time of its own for every scene.

Paper: Mask^2DiT: Dual Mask-based Diffusion Transformer for Multi-Scene Long Video Generation, Qi et al. 2025,
arXiv:2503.19881; CogVideoX, Yang et al. 2024, arXiv:2408.06072 (the blocks: one set of weights for text and video, a
modulation for each).
Differs: any scene may be given (time 0), not one against all others; scenes and captions may have lengths of their own;
padding may be masked; sizes other than trained take their positions as the released pipeline computes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn
from torch.nn import functional as F

from dit.attention import joint_mask
from dit.context_parallel import whole_of
from dit.embeddings import Rotary, TimeEmbedding
from dit.experts.dense import Experts
from dit.grid import Grid
from dit.layers import PatchEmbed, PatchOut
from dit.ledger import Part, part
from dit.mixers.full import Full, Mixer
from dit.mixers.scenes import Scenes
from dit.model import Backbone, Context, register_specs
from dit.modulation import ZeroModulation, modulate
from dit.positions import rotary_fitted, sincos_3d, still, stretched
from dit.scene_block import ScaledNorm, SceneBlock
from dit.segments import Segments, spread
from dit.spec import parse

POSITIONS = ("rope", "sincos", "stored")


class Mask2DiT(Backbone):
    """The story-to-clip network. What the last layer says is returned as it is: noise - clip, or whatever it was trained for.

    Args:
        in_channels: channels of the clip or latent; `out_channels` where the output has others.
        patch_size: side of a patch in latent pixels. patch_frames: frames of a patch.
        sample_height, sample_width, frames: rows, columns and frames of one scene, in latent pixels, that the network was made
            for (other sizes run too). scenes: how many scenes it was trained with; more run, and a story of more is told by
            windows of this many.
        width, depth, heads, mlp_ratio: size of the stack. time_dim: channels of the time.
        context_dim: channels of a text token. caption_length: text tokens of a caption where `scene_texts` does not tell.
        position: "rope" (rotary, 3-D; frames count on through all scenes), "sincos" (a table of one scene, stretched over all
            scenes) or "stored" (such a table that is learned, beside rotary positions).
        spatial_scale, frame_scale: how many rows or columns, and frames, are one step of the table.
        attention_bias, norm_affine, norm_eps: biases of queries, keys and values; weights and epsilon of norms.
        mixer: "scenes", or "full" for the control without a mask. experts: settings of the perceptron's slot.

    Raises:
        ValueError: sizes that do not fit together, or another mixer.
    """

    _repeated_blocks: ClassVar[list[str]] = ["SceneBlock"]
    _no_split_modules: ClassVar[list[str]] = ["SceneBlock"]
    _cp_plan: ClassVar[dict[str, Any]] = {}  # nothing for hooks: the network shares its streams itself

    @register_specs
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int | None = None,
        patch_size: int = 2,
        patch_frames: int = 1,
        sample_height: int = 60,
        sample_width: int = 90,
        frames: int = 13,
        scenes: int = 3,
        width: int = 1920,
        depth: int = 30,
        heads: int = 30,
        mlp_ratio: float = 4.0,
        time_dim: int = 512,
        context_dim: int = 4096,
        caption_length: int = 226,
        position: Literal["rope", "sincos", "stored"] = "rope",
        rope_theta: float = 10000.0,
        spatial_scale: float = 1.875,
        frame_scale: float = 1.0,
        attention_bias: bool = True,
        norm_affine: bool = True,
        norm_eps: float = 1e-5,
        mixer: Mixer | dict[str, Any] | str = "scenes",
        experts: Experts | dict[str, Any] | str = "dense",
    ) -> None:
        super().__init__()
        mixer, experts = _mixer(parse(Mixer, mixer), caption_length), parse(Experts, experts)
        sides = (frames, sample_height, sample_width)
        _check(width, heads, depth, caption_length, scenes, position, (patch_frames, patch_size), sides)
        self.out_channels = out_channels or in_channels
        patch = (patch_frames, patch_size, patch_size)
        self.x_embedder = PatchEmbed(in_channels, width, patch)
        self.context_embedder = nn.Linear(context_dim, width)
        self.time_embed = TimeEmbedding(time_dim, width)
        self.pos_embed: nn.Parameter | None = None
        if position == "stored":
            words = torch.zeros(caption_length, width)
            self.pos_embed = nn.Parameter(torch.cat([words, self.scene_table(words.device)]))
        self.transformer_blocks = nn.ModuleList(
            SceneBlock(
                width,
                heads,
                hidden=int(width * mlp_ratio),
                time_dim=time_dim,
                bias=attention_bias,
                norm_affine=norm_affine,
                norm_eps=norm_eps,
                mixer=mixer.at(i),
                experts=experts,
            )
            for i in range(depth)
        )
        self.norm_final = ScaledNorm(width, norm_eps, norm_affine)
        self.norm_out = ScaledNorm(width, norm_eps, norm_affine)
        self.modulation_out = ZeroModulation(width, 2, inputs=time_dim)
        self.proj_out = PatchOut(width, self.out_channels, patch)

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        scene_texts: Sequence[int] | None = None,
        scene_frames: Sequence[int] | None = None,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return the prediction at a noisy clip.

        Args:
            hidden_states: clip [B, C, F, H, W], all scenes one after another, or a picture [B, C, H, W].
            timestep: [B], or [B, S] with one time a scene: 0 where a scene is given. Caption and scene share it.
            encoder_hidden_states: text tokens [B, L, context_dim], all captions one after another.
            encoder_attention_mask: [B, L], true (or 1) at real text tokens; None if all are, as with released weights.
            scene_texts: text tokens of each caption; by default `caption_length` each.
            scene_frames: latent frames of each scene; by default equally many.
            image_rotary_emb: cosines and sines [N, head size] of the clip's tokens, in the place of the network's own.
            joint_attention_kwargs: passed to attention processors; `scale` is the LoRA scale.

        Returns:
            prediction in the shape of `hidden_states` as `sample`, or a one-tuple unless `return_dict`.

        Raises: ValueError for captions, scenes and times that do not fit each other.
        """
        grid = Grid.of(hidden_states, self.x_embedder.patch)
        dtype, device = self.dtype, hidden_states.device
        segments = self.segments(grid, encoder_hidden_states.shape[1], scene_texts, scene_frames)
        video = self.x_embedder(hidden_states.to(dtype))  # [B, N, D]
        text = self.context_embedder(encoder_hidden_states.to(dtype))  # [B, L, D]
        text, video = self.placed(text, video, grid, segments)
        time = self.embed_time(timestep, dtype)  # [B, T] or [B, S, T]
        if time.dim() == 3 and time.shape[1] != segments.scenes:
            raise ValueError(
                f"Mask2DiT: one time a sample or one a scene, got {time.shape[1]} for {segments.scenes} scenes"
            )
        context = self._context(grid, segments, time, timestep, encoder_attention_mask)
        rotary = self.rotary(grid, device) if image_rotary_emb is None else image_rotary_emb
        context = dataclasses.replace(
            context, rotary=still(rotary, segments.length), attention_kwargs=joint_attention_kwargs or {}
        )
        share, context, video, text = self._among_ranks(context, video, text)
        for block in self.transformer_blocks:
            text, video = self._run(
                block, hidden_states=video, encoder_hidden_states=text, temb=time, context=context
            )
        shift, scale = (spread(one, segments.video) for one in self.modulation_out(time))
        inner = modulate(self.norm_out(self.norm_final(whole_of(share, video))), shift, scale)
        output = self.proj_out(inner, grid, frames=hidden_states.dim() == 5).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    @property
    def scene_grid(self) -> Grid:
        """The tokens of one scene at the trained size."""
        config, cut = self.config, self.config.patch_size
        return Grid(
            config.frames // config.patch_frames, config.sample_height // cut, config.sample_width // cut
        )

    def segments(
        self,
        grid: Grid,
        text: int,
        scene_texts: Sequence[int] | None = None,
        scene_frames: Sequence[int] | None = None,
    ) -> Segments:
        """Return which of `text` text tokens belong to which of the clip's. Raises: ValueError where they do not add up."""
        cut = self.config.patch_frames
        if scene_frames is not None:
            if any(count % cut for count in scene_frames):
                raise ValueError(f"scene_frames must divide by patch_frames {cut}, got {list(scene_frames)}")
            scene_frames = [count // cut for count in scene_frames]
        return Segments.of(grid, text, self.config.caption_length, texts=scene_texts, frames=scene_frames)

    def placed(self, text: Tensor, video: Tensor, grid: Grid, segments: Segments) -> tuple[Tensor, Tensor]:
        """Add the table of positions, where there is one, to text [B, L, D] and video [B, N, D]."""
        if self.config.position == "rope":
            return text, video
        length = self.config.caption_length
        if self.pos_embed is None:
            table = self.scene_table(video.device)
        else:
            words, table = self.pos_embed[None, :length], self.pos_embed[length:]
            words = F.interpolate(words.float().transpose(1, 2), text.shape[1], mode="linear")
            text = text + words.transpose(1, 2).to(text.dtype)
        added = stretched(table, self.scene_grid, grid, segments.scenes)
        return text, video + added.to(video.dtype)

    def scene_table(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the table of one scene at the trained size, [N', D]."""
        config = self.config
        return sincos_3d(
            config.width,
            self.scene_grid,
            spatial_scale=config.spatial_scale,
            frame_scale=config.frame_scale,
            device=device,
        )

    def rotary(self, grid: Grid, device: torch.device | str = "cpu") -> Rotary | None:
        """Return cosines and sines [N, head size] of the clip's tokens, or None without rotary positions."""
        if self.config.position == "sincos":
            return None
        size, theta = self.config.width // self.config.heads, self.config.rope_theta
        return rotary_fitted(size, grid, self.scene_grid, theta=theta, device=device)

    def embed_time(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """[B] or [B, S] -> [B, T] or [B, S, T]."""
        time: Tensor = self.time_embed(timestep, dtype)
        return time

    def costs(self, grid: Grid, text: int = 0) -> Iterator[Part]:
        """Yield the analytic cost of every part for one clip of `grid` with captions of `text` tokens in all, and one time."""
        yield part(self, "x_embedder", "embed", grid.tokens)
        yield part(self, "context_embedder", "embed", text)
        yield part(self, "time_embed", "embed", 1)
        if self.pos_embed is not None:
            count = self.pos_embed.numel()
            yield Part(path="pos_embed", kind="embed", macs=0, parameters=count, activated=count)
        both = grid.tokens + text
        for i, block in enumerate(self.transformer_blocks):
            path = f"transformer_blocks.{i}"
            for name in ("norm1", "norm2", "modulation1", "modulation2"):
                yield part(self, f"{path}.{name}", "modulation", 1)
            yield part(self, f"{path}.attn", "attention", both, text, grid)
            yield part(self, f"{path}.ff", "mlp", both)
            if block.router is not None:
                yield part(self, f"{path}.router", "mlp", grid.tokens, text)
        for name in ("norm_final", "norm_out", "modulation_out"):
            yield part(self, name, "modulation", 1)
        yield part(self, "proj_out", "embed", grid.tokens)

    def _context(
        self, grid: Grid, segments: Segments, time: Tensor, timestep: Tensor, mask: Tensor | None
    ) -> Context:
        """What the blocks may know. Experts that read the time need one of the tokens' width, one a sample or a token."""
        told: Tensor | None = None
        if self.config.time_dim == self.config.width:
            told = time if time.dim() == 2 else spread(time, segments.video)
        times = timestep
        if timestep.dim() == 2:
            times = spread(timestep.unsqueeze(-1), segments.video).squeeze(-1)
        return Context(
            grid,
            time,
            time=told,
            timestep=times,
            mask=joint_mask(mask, grid.tokens),
            segments=segments,
        )


def _mixer(mixer: Mixer, caption: int) -> Mixer:
    if isinstance(mixer, Scenes):
        return mixer.replace(caption=caption)
    if isinstance(mixer, Full):
        return mixer
    raise ValueError(
        f"Mask2DiT: its mixer is scenes, or full for the control without a mask, got {mixer.name}"
    )


def _check(
    width: int,
    heads: int,
    depth: int,
    caption: int,
    scenes: int,
    position: str,
    patch: tuple[int, int],
    sides: tuple[int, int, int],
) -> None:
    if position not in POSITIONS:
        raise ValueError(f"Mask2DiT: position is one of {', '.join(POSITIONS)}, got {position!r}")
    if min(width, heads, depth, caption, scenes, *patch) < 1 or width % heads:
        raise ValueError(
            "Mask2DiT: sizes are at least 1 and width divides by heads, got "
            f"width={width}, heads={heads}, depth={depth}, caption_length={caption}, scenes={scenes}, patch={patch}"
        )
    if position != "sincos" and width // heads % 16:
        raise ValueError(
            f"Mask2DiT: rotary positions of three axes need a head size that divides by 16, got {width // heads}"
        )
    if position != "rope" and width % 16:
        raise ValueError(f"Mask2DiT: a table of positions needs a width that divides by 16, got {width}")
    if sides[0] < patch[0] or min(sides[1:]) < patch[1]:
        raise ValueError(
            f"Mask2DiT: frames, sample_height and sample_width hold at least one patch, got {sides}"
        )
