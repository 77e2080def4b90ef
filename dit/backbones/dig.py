"""DiG: pictures of a class by gated linear attention, scanned in another direction in every block.

Paper: DiG: Scalable and Efficient Diffusion Models with Gated Linear Attention, Zhu et al. 2024, arXiv:2405.18428.
Differs: tokens stay in the order of the rows; the block scans them in its own order, and its convolution is the released one
turned accordingly, so accelerators and controls see one picture throughout. Where the number of blocks is no multiple of the
cycle, tokens are back in their rows at the end, and long skips join equal tokens (the released code joins equal places of two
scans); both released ways are there as settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dit.backbones.dit import DiT, DiTBlock
from dit.experts.dense import Experts
from dit.grid import Grid
from dit.ledger import Part, part
from dit.mixers.full import Mixer
from dit.mixers.gated import Gated, scan_index
from dit.mixers.linear import convolved
from dit.model import Context, register_block, register_specs
from dit.modulation import Modulation, modulate
from dit.spec import parse

CONVOLUTIONS = ("after", "inside", "none")
SKIPS = ("none", "aligned", "as-scanned")


class DiGBlock(DiTBlock):
    """A block of DiT and a depthwise convolution over its tokens: behind both branches, or before the attention."""

    def __init__(
        self, *, width: int, convolution: str, kernel: int, rms_norm: bool, skip: bool, **settings: Any
    ) -> None:
        super().__init__(width=width, **settings)
        self.inside = convolution == "inside"
        if rms_norm:
            self.add_module("norm1", nn.RMSNorm(width, eps=1e-6))
            self.add_module("norm2", nn.RMSNorm(width, eps=1e-6))
        self.conv = None
        if convolution != "none":
            self.conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
            nn.init.dirac_(self.conv.weight, groups=width)  # at the start it changes nothing
            assert self.conv.bias is not None
            nn.init.zeros_(self.conv.bias)
        self.skip = nn.Linear(2 * width, width) if skip else None

    def forward(
        self, hidden_states: Tensor, temb: Tensor, context: Context, skipped: Tensor | None = None
    ) -> Tensor:
        """Tokens [B, N, D], conditioning [B, D] or [B, N, D], and tokens of an earlier block -> [B, N, D]."""
        if self.skip is not None and skipped is not None:
            hidden_states = self.skip(torch.cat([hidden_states, skipped], dim=-1))
        return super().forward(hidden_states, temb, context)

    def _body(self, streams: dict[str, Tensor], context: Context) -> dict[str, Tensor]:
        if self.conv is None:
            return super()._body(streams, context)
        assert context.grid is not None
        if not self.inside:
            x = super()._body(streams, context)["hidden_states"]
            return {"hidden_states": convolved(self.conv, x, context.grid)}
        x = streams["hidden_states"]  # [B, N, D]
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.modulation(context.emb)  # each [B, 1 or N, D]
        inner = convolved(self.conv, modulate(self.norm1(x), shift, scale), context.grid)
        x = x + gate * self.attn(hidden_states=inner, context=context)
        inner = modulate(self.norm2(x), shift_ff, scale_ff)
        return {"hidden_states": x + gate_ff * self.ff(inner, dataclasses.replace(context, residual=x))}


class DiG(DiT):
    """The class-to-image network of DiG. Its arguments are those of `DiT`, and these.

    Args:
        convolution: "after" both branches, on the stream itself; "inside", before the attention; or "none".
        kernel: side of the convolution in tokens.
        rms_norm: RMS norms with weights in the blocks, instead of plain layer norms.
        skip: from the first half of the blocks to the second: "none", "aligned", or "as-scanned" as in the released code.
        restore: tokens go back to the order of the rows before the last layer; the released code does not.

    Raises:
        ValueError: sizes that do not fit together.
    """

    _repeated_blocks: ClassVar[list[str]] = ["DiGBlock"]
    _no_split_modules: ClassVar[list[str]] = ["DiGBlock"]

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
        convention: Literal["ddpm", "flow"] = "ddpm",
        mixer: Mixer | dict[str, Any] | str = "gated",
        experts: Experts | dict[str, Any] | str = "swiglu",
        modulation: Modulation | dict[str, Any] | str = "adaln-zero",
        convolution: Literal["after", "inside", "none"] = "after",
        kernel: int = 3,
        rms_norm: bool = False,
        skip: Literal["none", "aligned", "as-scanned"] = "none",
        restore: bool = True,
    ) -> None:
        if convolution not in CONVOLUTIONS or skip not in SKIPS:
            raise ValueError(
                f"DiG: convolution is one of {', '.join(CONVOLUTIONS)} and skip one of {', '.join(SKIPS)}, "
                f"got {convolution!r} and {skip!r}"
            )
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"DiG: kernel is an odd count of tokens, got {kernel}")
        if skip != "none" and depth % 2:
            raise ValueError(f"DiG: long skips need an even depth, got {depth}")
        super().__init__(
            in_channels=in_channels, patch_size=patch_size, sample_size=sample_size, width=width, depth=depth, heads=heads,
            mlp_ratio=mlp_ratio, num_classes=num_classes, null_class=null_class, learn_sigma=learn_sigma,
            convention=convention, mixer=parse(Mixer, mixer), experts=parse(Experts, experts),
            modulation=parse(Modulation, modulation),
        )  # fmt: skip

    def costs(self, grid: Grid, text: int = 0) -> Iterator[Part]:
        """Yield the analytic cost of every part for one picture of `grid`."""
        yield from super().costs(grid, text)
        for path, block in self.transformer_blocks.named_children():
            for name in ("norm1", "norm2", "conv", "skip"):
                if getattr(block, name) is not None:
                    yield part(self, f"transformer_blocks.{path}.{name}", "mlp", grid.tokens)

    def order(self, block: int) -> str:
        """Return the order in which the block of this index scans its tokens; at the count of blocks, that of the end."""
        mixer = parse(Mixer, self.config.mixer)
        if not isinstance(mixer, Gated):
            return "row"
        return mixer.at(block).scan

    def _block(self, index: int, **settings: Any) -> DiTBlock:
        config = self.config
        later = config.skip != "none" and index > config.depth // 2
        about = {"convolution": config.convolution, "kernel": config.kernel, "rms_norm": config.rms_norm}
        return DiGBlock(**settings, **about, skip=later)

    def _through(self, x: Tensor, temb: Tensor, context: Context) -> Tensor:
        assert context.grid is not None
        depth, grid = self.config.depth, context.grid
        kept: list[tuple[Tensor, int]] = []
        for i, block in enumerate(self.transformer_blocks):
            given = {"hidden_states": x, "temb": temb, "context": context}
            if kept and i > depth // 2:
                skipped, left = kept.pop()
                given["skipped"] = self._met(skipped, left, i, grid)
            x = self._run(block, **given)  # [B, N, D]
            if self.config.skip != "none" and i < depth // 2 - 1:
                kept.append((x, i + 1))
        return x if self.config.restore else self._scanned(x, depth, grid)

    def _met(self, x: Tensor, left: int, block: int, grid: Grid) -> Tensor:
        """What a later block meets of tokens that were left for the block `left`: the same tokens, or equal places of the scans."""
        if self.config.skip == "aligned":
            return x
        index = scan_index(self.order(block), grid, 0, grid.tokens, x.device)
        scanned = self._scanned(x, left, grid)
        return scanned if index is None else scanned[:, index.argsort()]

    def _scanned(self, x: Tensor, block: int, grid: Grid) -> Tensor:
        index = scan_index(self.order(block), grid, 0, grid.tokens, x.device)
        return x if index is None else x[:, index]


register_block(DiGBlock, hidden_states=0)
