"""LinGen's MATE block: a state-space scan for what is far and attention in small windows for what is near, added.

Paper: LinGen: Towards High-Resolution Minute-Length Text-to-Video Generation with Linear Computational Complexity, Wang et al.
2024, arXiv:2412.09856.
Differs: there is no public code. Both branches see the same tokens and their answers are added, which the paper leaves open; the
sizes of states, windows and review tokens are ours.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dit.grid import Grid
from dit.mixers.full import Mixer
from dit.mixers.mamba import ORDERS, Mamba, MambaMixer
from dit.mixers.window import WindowMixer, Windows
from dit.spec import knob, spec


@spec("lingen", paper="LinGen, arXiv:2412.09856")
class LinGen(Mixer):
    """Scan and windows, O(N); every part can be left out."""

    mamba: bool = knob(default=True, label="Scan the clip (MA-branch)")
    windows: bool = knob(default=True, label="Attend in windows (TE-branch)")
    scan: str = knob(
        default="rotary", label="Order of the scan, or a cycle over the blocks", choices=("rotary", *ORDERS)
    )
    both_ends: bool = knob(default=True, label="Scan from the last token too")
    shared: bool = knob(default=False, label="Both directions have the same weights")
    review: int = knob(
        default=4, label="Review tokens along an axis, 0 for none", low=0, high=64, unit="tokens"
    )
    state: int = knob(default=64, label="Size of the state for each channel", low=1, high=1024)
    frames: int = knob(default=4, label="Frames of a window", low=1, unit="tokens")
    height: int = knob(default=4, label="Rows of a window", low=1, unit="tokens")
    width: int = knob(default=4, label="Columns of a window", low=1, unit="tokens")
    shift: str = knob(
        default="alternate",
        label="Blocks whose windows are shifted",
        choices=("alternate", "always", "never"),
    )
    qk_norm: bool = knob(default=False, label="RMS-normalise queries and keys per head")

    def check(self) -> None:
        if not self.mamba and not self.windows:
            raise ValueError(
                "lingen: mamba or windows must be on, or no token hears another; got false for both"
            )

    @property
    def scans(self) -> Mamba:
        """Settings of the MA-branch."""
        return Mamba(
            scan=self.scan,
            both_ends=self.both_ends,
            shared=self.shared,
            review=self.review,
            state=self.state,
        )

    @property
    def boxes(self) -> Windows:
        """Settings of the TE-branch."""
        return Windows(
            frames=self.frames, height=self.height, width=self.width, shift=self.shift, qk_norm=self.qk_norm
        )

    @property
    def needs_grid(self) -> bool:
        return True

    def at(self, block: int) -> LinGen:
        shift, scan = self.boxes.at(block).shift, self.scans.at(block).scan
        return self.replace(shift=shift, scan=scan)

    def build(self, width: int, heads: int, *, qk_norm: bool = False, pre_only: bool = False) -> nn.Module:
        if not self.windows:
            return self.scans.build(width, heads)
        if not self.mamba:
            return self.boxes.build(width, heads, qk_norm=qk_norm, pre_only=pre_only)
        return LinGenMixer(self, width, heads, qk_norm=self.qk_norm or qk_norm, pre_only=pre_only)


class LinGenMixer(WindowMixer):
    """The network of `LinGen` with both branches: the weights of its own are those of the windows."""

    def __init__(
        self, settings: LinGen, width: int, heads: int, *, qk_norm: bool = False, pre_only: bool = False
    ) -> None:
        super().__init__(settings.boxes, width, heads, qk_norm=qk_norm, pre_only=pre_only)
        self.mamba = MambaMixer(settings.scans, width, heads)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[B, N, D] -> [B, N, D]. Raises: ValueError without a grid, or where text tokens stand in the sequence."""
        near = super().forward(hidden_states, *args, **kwargs)
        return near + self.mamba(hidden_states, context=kwargs.get("context"))

    def macs_on(self, grid: Grid, text: int = 0) -> int:
        """Return the multiply-accumulates for one sample of `grid`."""
        return super().macs_on(grid, text) + self.mamba.macs_on(grid, text)
