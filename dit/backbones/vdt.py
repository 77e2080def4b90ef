"""VDT: clips by attention over time and then within frames; any part of a clip may be given, and a mask says which.

Paper: VDT: General-purpose Video Diffusion Transformers via Mask Modeling, Lu et al. 2023, arXiv:2305.13311; Mask2DiT, Qi et al.
2025, arXiv:2503.19881 (time 0 for what is clean); PixArt-alpha, Chen et al. 2023, arXiv:2310.00426 (text by cross-attention).
Differs: positions are computed for the frames and sides at hand; text, pooled text and real classes may be heard; clean tokens
may have a time of their own, 0; given frames may stand beside the clip as further tokens; velocities can be learnt, not only noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from dit.backbones._vdt import Given, VDTBlock, each, token_times
from dit.clip_masks import batch_mask, blend, given_tokens
from dit.context_parallel import whole_of
from dit.cross_attention import text_mask
from dit.embeddings import (
    LabelEmbedding,
    PooledProjection,
    Rotary,
    TimeEmbedding,
    rotary_at,
    sincos_1d,
    sincos_2d,
)
from dit.experts.dense import Dense, Experts
from dit.grid import Grid
from dit.layers import PatchEmbed, PatchOut, PlainNorm
from dit.ledger import Part, part
from dit.mixers.full import Full, Mixer
from dit.mixers.spacetime import SpaceTime
from dit.model import Backbone, Context, register_specs
from dit.modulation import Modulation, modulate
from dit.positions import places_at
from dit.prediction import velocity_from_picture
from dit.spec import parse

CHOICES = {
    "convention": ("ddpm", "flow"),
    "prediction_type": ("velocity", "sample"),
    "conditioning": ("replace", "concatenate"),
    "position": ("sincos", "rope", "both"),
}


class VDT(Backbone):
    """The network of clips.

    Args:
        in_channels, patch_size, sample_size: channels of the latent, side of a patch, side that the network was made for.
        frames: frames that the network was made for (other counts run too); a frame is a token of its own along time.
        width, depth, heads, mlp_ratio: size of the stack.
        num_classes: count of classes, None for none. null_class: one more row, the index `num_classes`, for "no class".
        default_class: the class of a call without one; None for "no class".
        context_dim: channels of a text token, None for no text. pooled_dim: of the pooled prompt, None for none.
        learn_sigma: the last layer has 2 C channels; the second C interpolate the variance.
        convention: "ddpm": timestep 0..999 (999 is noise), noise and variance come out. "flow": timestep 0..1000 (1000 is
            noise), velocity = noise - clip, C channels.
        prediction_type: "velocity", or "sample" where the last layer predicts the clean clip ("flow" alone).
        conditioning: what of a clip is given is put in its place ("replace"), or frames that are given may also stand beside the
            clip, marked by a learned vector ("concatenate").
        clean_time: tokens that are given have time 0, not the time of the noisy ones.
        position: "sincos" (added once, as released), "rope" (rotary, of frame, row and column) or "both". rope_theta: its base.
        mixer, experts, modulation: settings of the block slots; the mixer "full" makes a plain 3-D transformer.

    Raises:
        ValueError: sizes or choices that do not fit together.
    """

    _repeated_blocks: ClassVar[list[str]] = ["VDTBlock"]
    _no_split_modules: ClassVar[list[str]] = ["VDTBlock"]
    _cp_plan: ClassVar[dict[str, Any]] = {}  # nothing for hooks: the network shares its streams itself

    @register_specs
    def __init__(
        self,
        in_channels: int = 4,
        patch_size: int = 2,
        sample_size: int = 32,
        frames: int = 16,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        null_class: bool = True,
        default_class: int | None = None,
        context_dim: int | None = None,
        pooled_dim: int | None = None,
        learn_sigma: bool = False,
        convention: Literal["ddpm", "flow"] = "flow",
        prediction_type: Literal["velocity", "sample"] = "velocity",
        conditioning: Literal["replace", "concatenate"] = "replace",
        clean_time: bool = False,
        position: Literal["sincos", "rope", "both"] = "sincos",
        rope_theta: float = 100.0,
        mixer: Mixer | dict[str, Any] | str = "spacetime",
        experts: Experts | dict[str, Any] | str = "dense",
        modulation: Modulation | dict[str, Any] | str = "adaln-zero",
    ) -> None:
        super().__init__()
        _check(self.config)
        slots = (parse(Mixer, mixer), parse(Experts, experts), parse(Modulation, modulation))
        self.out_channels = in_channels * (1 + learn_sigma)
        patch = (1, patch_size, patch_size)
        self.x_embedder = PatchEmbed(in_channels, width, patch)
        self.time_embed = TimeEmbedding(width)
        self.label_embed = LabelEmbedding(num_classes, width, null=null_class) if num_classes else None
        self.context_embedder = nn.Linear(context_dim, width) if context_dim else None
        self.text_embed = PooledProjection(pooled_dim, width) if pooled_dim else None
        self.given_embed = nn.Embedding(1, width) if conditioning == "concatenate" else None
        self.modulation_shared = slots[2].shared(width)
        self.transformer_blocks = nn.ModuleList(
            VDTBlock(
                width, heads, hidden=int(width * mlp_ratio), text=bool(context_dim), mixer=slots[0].at(i),
                experts=slots[1], modulation=slots[2],
            )
            for i in range(depth)
        )  # fmt: skip
        self.norm_out = PlainNorm(width)
        self.modulation_out = slots[2].build(width, 2)
        self.proj_out = PatchOut(width, self.out_channels, patch)
        self._start(slots[0], slots[1])

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        mask: Tensor | None = None,
        clean: Tensor | None = None,
        condition_frames: Tensor | None = None,
        condition_index: Tensor | None = None,
        condition_mask: Tensor | None = None,
        frame_index: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return what the network predicts at a noisy clip (see `convention`); at given sites it says nothing of use.

        Args:
            hidden_states: noisy clip [B, C, F, H, W] (or pictures [B, C, H, W]); rows and columns divide by the patch.
            timestep: [B], or [B, F] or [B, N] with one time a frame or a token.
            class_labels: [B], `num_classes` for "no class".
            encoder_hidden_states: text tokens [B, L, context_dim]. encoder_attention_mask: [B, L], true (or 1) at real ones;
                or [B, F, L], those that each frame hears, where scenes of the clip have captions of their own.
            pooled_projections: pooled prompt [B, pooled_dim].
            mask: sites to generate, 1, and sites that are given, 0: [F, H, W] or [B, F, H, W]; see `dit.clip_masks`.
            clean: the clip [B, C, F, H, W] that has the given sites.
            condition_frames: frames beside the clip [B, C, M, H, W] ("concatenate"). condition_index: where they stand in
                time, [M] or [B, M], by default 0..M-1. condition_mask: [B, M], true where a frame is there.
            frame_index: where the clip's frames stand in time, [F] or [B, F], maybe broken numbers; by default 0..F-1.
            joint_attention_kwargs: passed to attention processors; `scale` is the LoRA scale.

        Returns:
            [B, C, F, H, W], or [B, 2 C, F, H, W] with a learned variance, as `sample`, or a one-tuple unless `return_dict`.

        Raises:
            ValueError: inputs that this network lacks or has no place for, or of the wrong shape.
        """
        self._expect(class_labels, encoder_hidden_states, pooled_projections, mask, clean)
        x, grid, tokens = self._see(hidden_states, mask, clean, frame_index)  # [B, N, D]
        times = token_times(timestep, grid)  # [B] or [B, N]
        keys, clip, when = None, grid, [_in_time(grid, frame_index, x.device)]
        if condition_frames is not None:
            beside, keys = self._beside(condition_frames, condition_index, condition_mask, grid)
            at = dataclasses.replace(grid, frames=condition_frames.shape[2])
            when = [_in_time(at, condition_index, x.device), *when]
            count = beside.shape[1]
            tokens = torch.zeros_like(x[..., 0], dtype=torch.bool) if tokens is None else tokens
            tokens = nn.functional.pad(tokens, (count, 0), value=True)
            times = times if times.dim() == 1 else nn.functional.pad(times, (count, 0))
            x = torch.cat([beside, x], dim=1)
            grid = dataclasses.replace(grid, frames=grid.frames + condition_frames.shape[2])
        temb, context, given = self._conditioning(times, tokens, grid, class_labels, pooled_projections)
        text, heard = self._text(encoder_hidden_states, encoder_attention_mask, grid)
        context = dataclasses.replace(
            context, text=text, mask=keys, attention_kwargs=joint_attention_kwargs or {}, rotary=self._rotary(when, grid)
        )
        x = self._through(x, temb, context, given, heard)  # [B, N, D]
        vectors = self.modulation_out(temb)
        shift, scale = vectors if given is None else given.choose(self.modulation_out, vectors)
        x = modulate(self.norm_out(x), shift, scale)[:, grid.tokens - clip.tokens :]
        output = self.proj_out(x, clip, frames=hidden_states.dim() == 5).to(hidden_states.dtype)
        output = self._answer(output, hidden_states, token_times(timestep, clip))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _through(
        self, x: Tensor, temb: Tensor, context: Context, given: Given | None, heard: Tensor | None
    ) -> Tensor:
        """Take the tokens [B, N, D] through all blocks; where ranks share a clip, each has a part of it."""
        share, context, x, _ = self._among_ranks(context, x)
        if share is not None:
            temb = share.vectors(temb)
            given = None if given is None else dataclasses.replace(given, tokens=share.cut(given.tokens))
            heard = heard if heard is None or heard.shape[2] == 1 else share.cut(heard, 2)
        for block in self.transformer_blocks:
            x = self._run(block, hidden_states=x, temb=temb, context=context, given=given, text_mask=heard)
        return whole_of(share, x)

    def costs(self, grid: Grid, text: int = 0) -> Iterator[Part]:
        """Yield the analytic cost of every part for one clip of `grid` without frames beside it, and `text` text tokens."""
        yield part(self, "x_embedder", "embed", grid.tokens)
        for name, rows in (
            ("time_embed", 1), ("label_embed", 0), ("context_embedder", text), ("text_embed", 1), ("given_embed", 0),
            ("modulation_shared", 1),
        ):  # fmt: skip
            if getattr(self, name) is not None:
                yield part(self, name, "modulation" if name == "modulation_shared" else "embed", rows)
        kinds: dict[str, Any] = {"modulation": "modulation", "temporal": "attention", "attn": "attention"}
        kinds |= {"text_attn": "attention", "ff": "mlp", "router": "mlp"}
        for i, block in enumerate(self.transformer_blocks):
            for name, kind in kinds.items():
                if getattr(block, name) is not None:
                    rows = 1 if name == "modulation" else grid.tokens
                    said = text if name == "text_attn" else 0
                    yield part(self, f"transformer_blocks.{i}.{name}", kind, rows, said, grid)
        yield part(self, "modulation_out", "modulation", 1)
        yield part(self, "proj_out", "embed", grid.tokens)

    def positions(
        self, grid: Grid, frame_index: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return the frozen table [1 or B, N, D]: column and row as in DiT, plus the frame's place in time."""
        index = _in_time(grid, frame_index, device)
        time = (
            sincos_1d(self.config.width, index.flatten()).float().unflatten(0, index.shape)
        )  # [1 or B, F, D]
        place = sincos_2d(self.config.width, dataclasses.replace(grid, frames=1), device)  # [S, D]
        return (place + time.unsqueeze(2)).flatten(1, 2)

    def _see(
        self, x: Tensor, mask: Tensor | None, clean: Tensor | None, frame_index: Tensor | None
    ) -> tuple[Tensor, Grid, Tensor | None]:
        """Return the clip's tokens [B, N, D], their grid, and which of them are given [B, N] (None for none)."""
        grid, tokens = Grid.of(x, self.x_embedder.patch), None
        if mask is not None and clean is not None:
            tokens = given_tokens(batch_mask(mask, x), self.config.patch_size)
            x = blend(clean, x, mask)
        embedded = self.x_embedder(x.to(self.dtype))
        if self.config.position == "rope":
            return embedded, grid, tokens
        return embedded + self.positions(grid, frame_index, x.device).to(self.dtype), grid, tokens

    def _rotary(self, times: list[Tensor], grid: Grid) -> Rotary | None:
        """Return cosines and sines [1 or B, N, head size] of frames that stand in time at `times`, [1 or B, F] each, or None."""
        if self.config.position == "sincos":
            return None
        most = max(len(one) for one in times)  # tables of all samples only where samples differ
        places = places_at(torch.cat([one.expand(most, -1) for one in times], dim=1), grid)
        size = self.config.width // self.config.heads
        plane = size // 3 // 2 * 2
        return rotary_at(places, (size - 2 * plane, plane, plane), self.config.rope_theta)

    def _beside(
        self, frames: Tensor, index: Tensor | None, there: Tensor | None, clip: Grid
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens of frames beside the clip, and which of all keys are heard, [B, 1, 1, N] or None for all."""
        x, grid, _ = self._see(frames, None, None, index)
        if self.given_embed is None or (grid.height, grid.width) != (clip.height, clip.width):
            raise ValueError(
                f"condition_frames: frames of {clip.height} x {clip.width} patches as in the clip, for a network made with "
                f"conditioning 'concatenate', got {grid.height} x {grid.width} and {self.config.conditioning!r}"
            )
        x = x + self.given_embed(torch.zeros(1, dtype=torch.long, device=x.device)).to(x.dtype)
        if there is None:
            return x, None
        if there.shape != (len(x), grid.frames):
            raise ValueError(
                f"condition_mask: {(len(x), grid.frames)} for these condition_frames, got {tuple(there.shape)}"
            )
        there = nn.functional.pad(there.bool(), (0, clip.frames), value=True)
        return x, there.repeat_interleave(clip.height * clip.width, dim=1)[:, None, None]

    def _text(
        self, text: Tensor | None, there: Tensor | None, grid: Grid
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return text tokens [B, L, D] and which are heard, [B, 1, 1 or N, L]; a prompt without any real token is heard whole."""
        if text is None or self.context_embedder is None:
            return None, None
        text = self.context_embedder(text.to(self.dtype))
        if there is None or there.dim() == 2:
            return text, text_mask(there)
        if there.shape != (len(text), grid.frames, text.shape[1]):
            raise ValueError(
                f"encoder_attention_mask: [B, L] {tuple(text.shape[:2])}, or [B, F, L] with all {grid.frames} frames (those "
                f"beside the clip too), got {tuple(there.shape)}"
            )
        heard = text_mask(there.flatten(0, 1))
        assert heard is not None
        heard = heard.reshape(len(text), 1, grid.frames, -1)
        return text, heard.repeat_interleave(grid.height * grid.width, dim=2)

    def _conditioning(
        self, times: Tensor, tokens: Tensor | None, grid: Grid, labels: Tensor | None, pooled: Tensor | None
    ) -> tuple[Tensor, Context, Given | None]:
        """Return the conditioning of noisy tokens, what the slots may know, and the conditioning of clean tokens."""
        start = torch.zeros_like(times if times.dim() == 1 else times[:, 0])  # [B]
        added = self._added(labels, pooled, len(times), times.device)  # [B, D]
        time = self.time_embed(times, self.dtype)
        temb = self._shared(time + (added if time.dim() == 2 else added.unsqueeze(1)))
        if tokens is None or not self.config.clean_time:
            return temb, Context(grid, temb, time=time, timestep=times), None
        zero = self.time_embed(start, self.dtype)
        clean = self._shared(zero + added)
        context = Context(
            grid,
            each(tokens, clean, temb),
            time=each(tokens, zero, time),
            timestep=each(tokens, start, times),
        )
        return temb, context, Given(tokens, clean)

    def _added(
        self, labels: Tensor | None, pooled: Tensor | None, batch: int, device: torch.device
    ) -> Tensor:
        """Return what class and pooled prompt add to the time, [B, D]."""
        added = torch.zeros(batch, self.config.width, dtype=self.dtype, device=device)
        if self.label_embed is not None:
            if labels is None:
                default = self.config.default_class
                default = self.config.num_classes if default is None else default
                labels = torch.full((batch,), default, device=device)
            added = added + self.label_embed(labels)
        if self.text_embed is not None and pooled is not None:
            added = added + self.text_embed(pooled.to(self.dtype))
        return added

    def _shared(self, temb: Tensor) -> Tensor:
        return temb if self.modulation_shared is None else self.modulation_shared(temb)

    def _answer(self, output: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """Turn what the last layer says into what is returned."""
        if self.config.convention == "ddpm":
            return output
        output = output[:, : self.config.in_channels]
        if self.config.prediction_type == "velocity":
            return output
        return velocity_from_picture(output, noisy, times, self.config.patch_size)

    def _expect(
        self,
        labels: Tensor | None,
        text: Tensor | None,
        pooled: Tensor | None,
        mask: Tensor | None,
        clean: Tensor | None,
    ) -> None:
        """Raises: ValueError for inputs that are missing, or that this network has no place for."""
        config = self.config
        needed = (
            ("encoder_hidden_states", text, "context_dim"),
            ("pooled_projections", pooled, "pooled_dim"),
        )
        for name, value, setting in needed:
            if (value is None) != (not config[setting]):
                what = "needs" if value is None else "has no place for"
                raise ValueError(f"VDT: this network ({setting}={config[setting]}) {what} {name}")
        if labels is not None and not config.num_classes:
            raise ValueError("VDT: this network (num_classes=None) has no place for class_labels")
        lost = labels is None and bool(config.num_classes) and config.default_class is None
        if lost and not config.null_class:
            raise ValueError('VDT: class_labels must be given: this network has no class for "none"')
        if (mask is None) != (clean is None):
            raise ValueError("VDT: mask and clean come together: which sites are given, and what is there")

    def _start(self, mixer: Mixer, experts: Experts) -> None:
        """Draw the weights as the release does; slots other than the plain ones start as they like, text starts unheard."""
        blocks: Iterable[Any] = self.transformer_blocks
        for block in blocks:
            plain = [block.attn] * isinstance(mixer, Full | SpaceTime) + [block.ff] * isinstance(
                experts, Dense
            )
            plain += [one for one in (block.temporal, block.text_attn) if one is not None]
            for linear in (one for slot in plain for one in slot.modules() if isinstance(one, nn.Linear)):
                nn.init.xavier_uniform_(linear.weight)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            if block.text_attn is not None:
                nn.init.zeros_(block.text_attn.to_out[0].weight)
        mlp = self.time_embed.timestep_embedder
        tables = [mlp.linear_1, mlp.linear_2, self.given_embed]
        tables += [] if self.label_embed is None else [self.label_embed.embedding_table]
        for table in tables:
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)


def _in_time(grid: Grid, index: Tensor | None, device: torch.device | str) -> Tensor:
    """Return where frames stand in time, [1 or B, F]. Raises: ValueError unless there is one place for each."""
    index = torch.arange(grid.frames, device=device) if index is None else index.to(device)
    index = index.reshape(-1, index.shape[-1])
    if index.shape[1] != grid.frames:
        raise ValueError(
            f"places in time: one for each of {grid.frames} frames, got a tensor of shape {tuple(index.shape)}"
        )
    return index


def _check(config: Any) -> None:
    width, heads, patch = config.width, config.heads, config.patch_size
    if width < 4 or heads < 1 or width % heads or width % 4:
        raise ValueError(f"VDT: width must divide by heads and by 4, got width={width}, heads={heads}")
    if config.depth < 1 or config.frames < 1:
        raise ValueError(
            f"VDT: depth and frames are at least 1, got depth={config.depth}, frames={config.frames}"
        )
    if patch < 1 or config.sample_size < 1 or config.sample_size % patch:
        raise ValueError(
            f"VDT: sample_size must divide by patch_size, got sample_size={config.sample_size}, patch_size={patch}"
        )
    if config.position != "sincos" and width // heads % 2:
        raise ValueError(f"VDT: rotary positions need an even head size, got {width // heads}")
    for name, allowed in CHOICES.items():
        if config[name] not in allowed:
            raise ValueError(f"VDT: {name} is one of {', '.join(allowed)}, got {config[name]!r}")
    if config.prediction_type == "sample" and (config.convention != "flow" or config.learn_sigma):
        raise ValueError("VDT: prediction_type 'sample' goes with convention 'flow' and without learn_sigma")
    rows = 0 if not config.num_classes else config.num_classes + bool(config.null_class)
    if config.default_class is not None and not 0 <= config.default_class < rows:
        raise ValueError(
            f"VDT: default_class is a row of the label table (0 to {rows - 1}), got {config.default_class}"
        )
