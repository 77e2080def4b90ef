"""UNIC-Adapter: a condition picture and a text that says what it is, heard through a second stream of the transformer.

Picture and instruction run through the transformer's blocks once more, with attention and norms of their own and the
perceptrons of the base; in every block the picture that is made asks their keys and values in a rotary cross-attention,
added before the map out. One adapter serves many tasks, since the instruction tells them apart.

Paper: UNIC-Adapter: Unified Image-Instruction Adapter with Multi-modal Transformer for Image Generation; Duan, Zhao, et al.;
    2024; arXiv:2412.18928.
Differs: a light kind shares all of the base and adds a LoRA to its attention; the stream's time may be fixed to 0, and then it
    is computed once for all steps, prompts and seeds; a factor for each channel, 0 at the start, makes a fresh adapter change
    nothing; strength, start, end, regions, conditions of any size, several at once; on our MMDiT too. Released files keep
    their own weights, the step's time and no such factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from control._backbones import Place, facts_of
from control._files import ControlFile, grow, reader
from control._instructed import Instructed, ThreeWay, repeated
from control._second_stream import (
    Form,
    Part,
    SecondStream,
    StreamStep,
    form_of,
    head_size,
    known,
    own,
    part_at,
    twin,
)
from control._unic_hearing import Hearing
from control.base import Control, ControlAdapter, ControlRun, Refused, Use
from control.easycontrol import LowRank
from dit.embeddings import Rotary, rotate
from dit.seams import around_calls, unseen
from dit.spec import knob, spec

__all__ = [
    "Instructed",
    "ThreeWay",
    "UNICAdapter",
    "UNICAdapterWeights",
    "from_official",
    "read_official",
    "released",
]

SUFFIX = "_control"
TABLE = f"pos_embed{SUFFIX}.pos_embed"
_MAPS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_KEYS = ("to_k", "to_v", "add_k_proj", "add_v_proj")


@spec("unic-adapter", paper="UNIC-Adapter, arXiv:2412.18928")
class UNICAdapter(Control):
    """A second stream of condition picture and instruction, asked by a cross-attention in every block."""

    about = "A picture with an instruction (edges, depth, style, subject, restoration, ...)"

    stream: str = knob(
        default="light",
        label="Weights of the second stream: the base's with a LoRA (light), or attention, norms and embedders of its own (full)",
        choices=("light", "full"),
    )
    rank: int = knob(default=16, label="Rank of the LoRA of a light stream", low=1, high=1024)
    time: str = knob(
        default="zero",
        label="Time of the second stream: 0 (one pass serves all steps) or that of the step",
        choices=("zero", "current"),
    )
    queries: str = knob(
        default="own",
        label="What asks: the picture by a map of its own, or the base's queries (of the text too)",
        choices=("own", "base"),
    )
    gated: bool = knob(
        default=True, label="A factor for each channel, 0 at the start (released files have none)"
    )

    def refuses(self, transformer: nn.Module) -> str | None:
        facts, form = facts_of(transformer), form_of(transformer)
        if isinstance(facts, str):
            return facts
        if isinstance(form, str):
            return form
        first = facts.places(transformer)[0]
        rotates = facts.angles(transformer, torch.zeros(1, 3)) is not None
        if not rotates and head_size(first) % 4:
            return f"rows and columns turn half of a head's channels each, in pairs: {head_size(first)} does not divide by 4"
        if not rotates and self.queries == "base":
            return "its own queries carry no positions, and the condition's keys do: set queries='own'"
        if self.stream == "full" and not first.attn.to_k.weight.is_floating_point():
            return "its weights are quantised and cannot be copied for a full stream: set stream='light'"
        return unseen(transformer)

    def build(self, transformer: nn.Module) -> UNICAdapterWeights:
        return UNICAdapterWeights(self, transformer)


class UNICAdapterWeights(ControlAdapter):
    """What the second stream has for itself, under the transformer's names with `_control` behind them."""

    control: UNICAdapter

    def __init__(self, control: UNICAdapter, transformer: nn.Module) -> None:
        super().__init__(control)
        facts, form = known(control.name, transformer)
        weight, kind = next(transformer.parameters()), computed_in(transformer)
        places = facts.places(transformer)
        for place in places:
            if control.stream == "full":
                self._add_own(form, place, kind)
            else:
                names = _KEYS if place is places[-1] else _MAPS  # nothing follows the keys of the last block
                self._add_low_rank(place, names, kind, weight.device)
            if control.gated:
                gate = torch.zeros(place.attn.to_k.out_features, dtype=kind, device=weight.device)
                self.get_submodule(place.path).register_parameter(f"gate{SUFFIX}", nn.Parameter(gate))
        if control.stream == "full":
            for name in form.embedders:
                entry: Any = getattr(transformer, name)
                if name == "pos_embed":  # its table is no weight, and the base has it
                    grow(self, f"{name}{SUFFIX}.proj", own(entry.proj, kind))
                elif entry is not None:
                    grow(self, f"{name}{SUFFIX}", own(entry, kind))

    def refuses(self, transformer: nn.Module, use: Use) -> str | None:
        """Look at transformer and condition."""
        words = self.control.refuses(transformer)
        facts = facts_of(transformer)
        if words is not None or isinstance(facts, str):
            return words
        missing = [
            one.path for one in facts.places(transformer) if one.path.split(".")[0] not in self._modules
        ]
        if missing:
            return f"these weights are for another transformer: none for {missing[0]}"
        given = use.condition
        if not isinstance(given, Instructed):
            return f"condition must be Instructed(image, text, pooled), got {type(given).__name__}"
        entry: Any = transformer.context_embedder
        shape = (facts.channels(transformer), int(entry.in_features), facts.pooled_channels(transformer))
        return given.misfit(*shape, patch=facts.patch(transformer))

    @contextmanager
    def attached(self, transformer: nn.Module, use: Use, run: ControlRun) -> Iterator[None]:
        """Hear one condition."""
        with self.attached_together(transformer, (use,), run):
            yield

    @classmethod
    @contextmanager
    def attached_together(
        cls, transformer: nn.Module, uses: Sequence[Use], run: ControlRun
    ) -> Iterator[None]:
        """Hear all conditions in the same attention calls, each by itself."""
        hearing = Hearing(transformer, uses, run)
        with around_calls(transformer, hearing.enter, hearing.leave), hearing.cross.attached(transformer):
            yield

    def at(self, path: str) -> Any:
        """Return what stands at a path with `_control` behind it, or None."""
        try:
            return self.get_submodule(path + SUFFIX)
        except AttributeError:
            return None

    def gate(self, place: Place) -> Tensor | None:
        """Return the factors of a block's channels."""
        found: Tensor | None = self.get_submodule(place.path)._parameters.get(f"gate{SUFFIX}")
        return found

    def queries(self, place: Place, tokens: Tensor, table: Rotary) -> Tensor:
        """[B, N, D], the picture's tokens as an attention is given them -> rotated queries [B, K, N, head size]."""
        layer = self.at(f"{place.path}.to_q")
        if len(table[0]) != tokens.shape[1]:
            raise Refused(
                f"{self.control.name}: {place.layer} is given {tokens.shape[1]} tokens of the picture, and {len(table[0])} have "
                "a place: not where tokens were merged"
            )
        mapped = layer(tokens)
        if self.control.stream == "light":
            mapped = mapped + place.attn.to_q(tokens)
        q = mapped.unflatten(-1, (place.attn.heads, -1))
        if self.control.stream == "light" and place.attn.norm_q is not None:
            q = place.attn.norm_q(q)
        return rotate(q, table).transpose(1, 2)

    def stream(self, transformer: nn.Module) -> SecondStream:
        """Return the second stream beside a transformer."""
        facts, form = known(self.control.name, transformer)
        full = self.control.stream == "full"
        model: Any = transformer
        if full:
            own_parts = {name: self.at(name) for name in form.embedders if self.at(name) is not None}
            if "pos_embed" in own_parts:
                entry: Any = transformer.pos_embed
                own_parts["pos_embed"] = twin(entry, proj=own_parts["pos_embed"].proj)
            model = twin(transformer, **own_parts)

        def parts(place: Place) -> dict[str, nn.Module]:
            return {name: self.at(f"{place.path}.{name}") for name in form.parts(place)} if full else {}

        return SecondStream(facts, form, transformer, model, parts=parts, attention=self._attention)

    def steps(
        self,
        transformer: nn.Module,
        given: Instructed,
        *,
        time: Tensor,
        guidance: Tensor | None,
        grid: tuple[int, int],
        dtype: torch.dtype,
        whole: bool = False,
    ) -> Iterator[StreamStep]:
        """Yield keys, values and streams of every block for a condition, at times as the transformer is given them [B]."""
        facts, _ = known(self.control.name, transformer)
        patch, device, batch = facts.patch(transformer), time.device, len(time)
        image, text = (repeated(x, batch, self.control.name).to(device) for x in (given.image, given.text))
        channels = facts.pooled_channels(transformer)
        pooled = image.new_zeros(batch, channels) if given.pooled is None else given.pooled.to(device)
        where = given.places(grid, patch, device)
        yield from self.stream(transformer).steps(
            image, text, time=time, pooled=repeated(pooled, batch, self.control.name), guidance=guidance,
            grid=grid, where=where, dtype=dtype, whole=whole,
        )  # fmt: skip

    def _add_own(self, form: Form, place: Place, kind: torch.dtype) -> None:
        for name in form.parts(place):
            grow(self, f"{place.path}.{name}{SUFFIX}", own(getattr(place.block, name), kind))
        for name in ("attn", "attn2"):
            attn = getattr(place.block, name, None)
            if attn is not None:
                for part, module in attn.named_children():
                    grow(self, f"{place.path}.{name}{SUFFIX}.{part}", own(module, kind))
        if self.control.queries == "own":
            grow(self, f"{place.path}.to_q{SUFFIX}", own(place.attn.to_q, kind))

    def _add_low_rank(
        self, place: Place, names: Sequence[str], kind: torch.dtype, device: torch.device
    ) -> None:
        wanted = {f"attn{SUFFIX}.{name}": part_at(place.attn, name) for name in names}
        if self.control.queries == "own":
            wanted[f"to_q{SUFFIX}"] = place.attn.to_q
        for path, like in wanted.items():
            if like is not None:
                lora = LowRank(like, self.control.rank, post=False, dtype=kind, device=device)
                grow(self, f"{place.path}.{path}", lora)

    def _attention(self, place: Place, name: str) -> Part | None:
        """Return what gives the parts of an attention, None where the stream takes the block's own as it is."""
        mine: Any = self.at(f"{place.path}.{name}")
        if mine is None:
            return None
        if self.control.stream == "full":
            return lambda part: part_at(mine, part)

        def added(part: str) -> Any:
            base, lora = part_at(place.attn, part), part_at(mine, part)
            return base if lora is None or base is None else lambda x: base(x) + lora(x)

        return added


def computed_in(transformer: nn.Module) -> torch.dtype:
    """Return the dtype a transformer computes in, which is not that of its weights where those are cast layer by layer."""
    told: Any = getattr(transformer, "dtype", None)
    found: torch.dtype = next(transformer.parameters()).dtype if told is None else told
    return found


def from_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter's weights of a released state dict, which holds those of the base too, under our keys."""
    return {key: x for key, x in weights.items() if SUFFIX in key and key != TABLE}


@reader("UNIC-Adapter")
def read_official(file: ControlFile, transformer: nn.Module) -> tuple[Control, Mapping[str, Tensor]] | None:
    """Read the adapter of a released SD3 file; the base's weights in it are left aside."""
    weights = {key.removeprefix("transformer."): x for key, x in file.weights.items()}
    if not any(key.endswith(f".to_q{SUFFIX}.weight") for key in weights):
        return None
    from diffusers import SD3Transformer2DModel

    if not isinstance(transformer, SD3Transformer2DModel):
        raise Refused(
            f"{file.name} is a UNIC-Adapter for Stable Diffusion 3, this is {type(transformer).__name__}"
        )
    return released(), from_official(weights)


def released() -> UNICAdapter:
    """Return the settings of the released SD3 files."""
    return UNICAdapter(stream="full", time="current", queries="own", gated=False)
