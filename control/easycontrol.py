"""EasyControl: a picture steers as keys and values that the transformer computes of it once, with a LoRA of its own.

The condition's tokens run alone through the frozen blocks at time 0, with a low-rank addition to their projections; what
they would say (keys after norm and rotation, values) is recorded and appended in the main pass. They never hear noise or
prompt, so one pass serves all steps, and the noise branch is untouched.

Paper: EasyControl: Adding Efficient and Flexible Control for Diffusion Transformer; Zhang, Yuan, Song, Wang, Liu; 2025;
    arXiv:2503.07027.
Differs: the pass over the condition is made by itself, without a mask, and a cached step does not touch the condition at all
    (the released cache still runs its tokens through every projection and perceptron); entries are found by content and
    cannot go stale; strength is a bias of attention, exactly off at 0; start, end and regions; any size and aspect, with
    positions in fp32; ours are modulated by an empty prompt ("null"), so that one pass serves all prompts and guidance
    branches, while released files keep the prompt's ("prompt").
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from control._backbones import Facts, Place, facts_of
from control._condition import ConditionPass
from control._files import ControlFile, grow, reader
from control._memory import mark, probe
from control._tokens import Heard, KeyValues, Tokens, on_grid
from control.base import Control, ControlAdapter, ControlRun, Refused, Use, filled
from dit.seams import around_calls, unseen
from dit.spec import knob, spec

_PARTS = ("to_q", "to_k", "to_v")
_OFFICIAL = re.compile(
    r"(?:transformer\.)?((?:single_)?transformer_blocks\.\d+)\.attn\.processor\.(q|k|v|proj)_loras\.(\d+)\.(down|up)\.weight"
)
_A = re.compile(r"\.(?:post_)?lora_A\.weight$")
_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v"}


@spec("easycontrol", paper="EasyControl, arXiv:2503.07027")
class EasyControl(Control):
    """Keys and values of a condition picture, from a pass of its own with a LoRA."""

    about = "A picture (edges, pose, mask, subject) heard in the attention"

    rank: int = knob(default=16, label="Rank of the LoRA", low=1, high=1024)
    positions: str = knob(
        default="corner",
        label="Where the condition's tokens stand: on the picture (corner, center), beside it (rows) or behind it (frame)",
        choices=("corner", "center", "rows", "frame"),
    )
    offset: int = knob(
        default=64, label="Rows between picture and condition where it stands beside", low=1, high=4096
    )
    conditioning: str = knob(
        default="null",
        label="Prompt that modulates the condition: none (one pass serves all prompts) or the picture's own",
        choices=("null", "prompt"),
    )
    lora_weight: float = knob(
        default=1.0,
        label="Weight of the LoRA (0 is not off: the condition is still heard)",
        low=0.0,
        high=10.0,
    )
    blocks: tuple[int, ...] | None = knob(
        default=None, label="Blocks in which the condition is heard (none: all)"
    )

    def check(self) -> None:
        """Raises: ValueError if blocks are no places of blocks."""
        blocks = self.blocks
        if blocks is not None and (
            not blocks or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in blocks)
        ):
            raise ValueError(f"{self.name}: blocks must be places of blocks from 0, got {blocks!r}")

    def refuses(self, transformer: nn.Module) -> str | None:
        facts = facts_of(transformer)
        if isinstance(facts, str):
            return facts
        highest = len(facts.places(transformer)) - 1
        if self.blocks is not None and max(self.blocks) > highest:
            return f"there is no block {max(self.blocks)}: {type(transformer).__name__} has blocks 0 to {highest}"
        return facts.refuses_positions(transformer, self.positions) or unseen(transformer)

    def build(self, transformer: nn.Module) -> EasyControlAdapter:
        return EasyControlAdapter(self, transformer)

    def load(self, transformer: nn.Module, weights: Mapping[str, Tensor]) -> EasyControlAdapter:
        """As `Control.load`; every projection may have a rank of its own."""
        reason = self.refuses(transformer)
        if reason is not None:
            raise Refused(f"{self.name}: {reason}")
        ranks = {_A.sub("", key): x.shape[0] for key, x in weights.items() if _A.search(key) and x.dim() == 2}
        return filled(EasyControlAdapter(self, transformer, ranks), weights)


class LowRank(nn.Module):
    """x -> B A x, zero at the start. Beside a projection it is called lora; `post` stands behind the map out instead."""

    def __init__(self, like: Any, rank: int, *, post: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.prefix = "post_" if post else ""
        inner = like.out_features if post else like.in_features
        made: dict[str, Any] = {"bias": False, "dtype": dtype, "device": device}
        down, up = nn.Linear(inner, rank, **made), nn.Linear(rank, like.out_features, **made)
        nn.init.normal_(down.weight, std=1 / rank)
        nn.init.zeros_(up.weight)
        self.add_module(f"{self.prefix}lora_A", down)
        self.add_module(f"{self.prefix}lora_B", up)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D], computed in the dtype of its weights."""
        down: Any = self._modules[f"{self.prefix}lora_A"]
        up: Any = self._modules[f"{self.prefix}lora_B"]
        added: Tensor = up(down(x.to(down.weight.dtype)))
        return added.to(x.dtype)


class EasyControlAdapter(ControlAdapter):
    """The LoRA of one kind of condition: on q, k, v of every block, and behind the map out where a block has one."""

    control: EasyControl

    def __init__(
        self, control: EasyControl, transformer: nn.Module, ranks: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(control)
        facts = facts_of(transformer)
        if isinstance(facts, str):
            raise Refused(f"{control.name}: {facts}")
        weight = next(transformer.parameters())
        kind = weight.dtype if weight.dtype.itemsize > 1 else torch.bfloat16  # layers may be kept in fp8
        for place in facts.places(transformer):
            for name in parts_of(place):
                path, like = f"{place.layer}.{name}", place.attn.get_submodule(name)
                rank = (ranks or {}).get(path, control.rank)
                post = name not in _PARTS
                grow(self, path, LowRank(like, rank, post=post, dtype=kind, device=weight.device))

    def refuses(self, transformer: nn.Module, use: Use) -> str | None:
        """Look at transformer and condition."""
        words = self.control.refuses(transformer)
        facts = facts_of(transformer)
        if words is not None or isinstance(facts, str):
            return words
        latent, channels, patch = use.condition, facts.channels(transformer), facts.patch(transformer)
        if not isinstance(latent, Tensor) or latent.dim() != 4 or latent.shape[1] != channels:
            got = f"shape {tuple(latent.shape)}" if isinstance(latent, Tensor) else type(latent).__name__
            return f"condition must be a tensor [B, {channels}, H, W], got {got}"
        if not latent.numel() or latent.shape[2] % patch or latent.shape[3] % patch:
            return f"condition must have sides that divide by {patch}, got {tuple(latent.shape[2:])}"
        if not bool(torch.isfinite(latent).all()):
            return "condition holds values that are no finite numbers"
        missing = [
            one.layer for one in facts.places(transformer) if one.path.split(".")[0] not in self._modules
        ]
        return f"these weights are for another transformer: none for {missing[0]}" if missing else None

    @classmethod
    @contextmanager
    def attached_together(
        cls, transformer: nn.Module, uses: Sequence[Use], run: ControlRun
    ) -> Iterator[None]:
        """Hear all conditions; those of one size share a pass."""
        hearing = _Hearing(transformer, uses, run)
        with around_calls(transformer, hearing.enter, hearing.leave), hearing.tokens.attached(transformer):
            yield

    def added(self, path: str, x: Tensor) -> Tensor:
        """Return what the LoRA at a path adds for x [B, N, D]."""
        return self.get_submodule(path)(x) * self.control.lora_weight

    def positions(self, grid: tuple[int, int], own: tuple[int, int], device: torch.device) -> Tensor:
        """Return where the tokens of a condition of `own` rows and columns stand beside a picture of `grid`: [N, 3] in fp32."""
        mode = self.control.positions
        rows, columns = (torch.arange(count, dtype=torch.float32, device=device) for count in own)
        if mode in ("corner", "center"):
            half = 0.5 if mode == "center" else 0.0
            rows = (rows + half) * (grid[0] / own[0]) - half
            columns = (columns + half) * (grid[1] / own[1]) - half
        if mode == "rows":
            rows = rows + self.control.offset
        frame = torch.tensor([float(mode == "frame")], device=device)
        return torch.cartesian_prod(frame, rows, columns)


class _Hearing:
    """Before each call of the transformer: which conditions it hears, from memory or by a pass now."""

    def __init__(self, transformer: nn.Module, uses: Sequence[Use], run: ControlRun) -> None:
        facts = facts_of(transformer)
        assert isinstance(facts, Facts)
        self.transformer: Any = transformer
        self.uses, self.run, self.facts = uses, run, facts
        self.tokens = Tokens(run)
        self._probed: tuple[int | None, Any] = (None, ())
        self._grid: tuple[Any, tuple[int, int]] = (None, (0, 0))

    def enter(self, given: dict[str, Any]) -> None:
        """Gather what this call hears; nothing is computed where nothing acts."""
        groups: dict[Any, list[Use]] = {}
        for use in self.uses:
            if self.run.strength(use) > 0:
                control = _control(use)
                alike = (tuple(use.condition.shape), control.conditioning, control.blocks)
                groups.setdefault(alike, []).append(use)
        if groups and torch.is_grad_enabled() and getattr(self.transformer, "gradient_checkpointing", False):
            raise Refused(
                "easycontrol: blocks that are computed again in the backward pass do not hear the condition: "
                "disable_gradient_checkpointing()"
            )
        if groups and "scale" in (given.get("joint_attention_kwargs") or {}):
            self.run.note(
                "the LoRA scale of joint_attention_kwargs acts on the picture, not on the condition"
            )
        grid = self._grid_of(given) if groups else (0, 0)
        self.tokens.begin([one for uses in groups.values() for one in self._heard(uses, given, grid)])

    def leave(self, _failed: bool) -> None:
        """Hear nothing between calls."""
        self.tokens.begin([])

    def _grid_of(self, given: Mapping[str, Any]) -> tuple[int, int]:
        ids = given.get("img_ids")
        if (
            ids is None or self._grid[0] is not ids
        ):  # reading ids waits for the device, so once for each tensor
            self._grid = (ids, self.facts.grid(self.transformer, given))
        return self._grid[1]

    def _heard(self, uses: list[Use], given: Mapping[str, Any], grid: tuple[int, int]) -> list[Heard]:
        source = self._source(uses, given, grid)
        samples = source.samples // len(uses)
        found = []
        for place, use in enumerate(uses):
            control = _control(use)
            if control.positions == "rows" and grid[0] > control.offset:
                self.run.note(
                    f"the picture has {grid[0]} rows of tokens and the condition begins at row {control.offset}: "
                    "positions overlap; set offset higher"
                )
            where, text = None, 1.0
            if use.region is not None:
                where = on_grid(use.region, grid, source.device)
                text = float(use.region.min()) if use.region_text is None else use.region_text
            found.append(
                Heard(
                    use, source, place * samples, (place + 1) * samples, self.run.strength(use), where, text
                )
            )
        return found

    def _source(self, uses: list[Use], given: Mapping[str, Any], grid: tuple[int, int]) -> KeyValues:
        """Return keys and values of conditions of one size: what memory has of them, or what a pass gives now."""
        dtype = self.facts.dtype(self.transformer, given)
        pooled, guidance, tensors = self._modulating(uses, given)
        memory, conditions = self.run.memory, [use.condition for use in uses]
        keep = not torch.is_grad_enabled()

        def make() -> KeyValues:
            device = given["hidden_states"].device
            latents = [_repeated(one.to(device), len(pooled), uses[0].name) for one in conditions]
            adapters: list[Any] = [use.adapter for use in uses]
            made = ConditionPass(
                self.transformer, adapters, latents, grid=grid, pooled=pooled, guidance=guidance, dtype=dtype
            )
            blocks = _control(uses[0]).blocks
            wanted = range(len(self.facts.places(self.transformer))) if blocks is None else blocks
            pairs = {
                step.place.layer: (step.k, step.v)
                for step in made.steps(max(wanted))
                if step.place.index in wanted
            }
            source = KeyValues(pairs, memory.storage, memory.place) if keep else KeyValues(pairs)
            for use in uses:
                told = self.run.account(use).told
                told["passes"] = told.get("passes", 0) + 1
                told["tokens"], told["bytes"] = source.tokens, source.bytes // len(uses)
            return source

        if not keep:
            return make()
        key = (*self._key(uses), grid, dtype, given["hidden_states"].device)
        return memory.recall(key, [*conditions, *tensors], make, lambda one: one.bytes)

    def _modulating(self, uses: list[Use], given: Mapping[str, Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return pooled prompt, guidance, and those of them that the caller gave."""
        noise, channels = given["hidden_states"], self.facts.pooled_channels(self.transformer)
        pooled, guidance = given.get("pooled_projections"), given.get("guidance")
        if _control(uses[0]).conditioning == "null":
            batch = len(uses[0].condition)
            return noise.new_zeros(batch, channels), torch.ones(batch, device=noise.device), []
        batch = len(noise)
        tensors = [one for one in (pooled, guidance) if one is not None]
        pooled = noise.new_zeros(batch, channels) if pooled is None else pooled
        return pooled, torch.ones(batch, device=noise.device) if guidance is None else guidance, tensors

    def _key(self, uses: list[Use]) -> tuple[Any, ...]:
        """What decides a pass beside its tensors: settings, weights, and adapters that act on the weights."""
        run, acting = self.run, [one for one in self.run.uses if one.adapter.acts_on_weights]
        others = tuple(
            (one.adapter, run.strength(one), mark(one.adapter), one.adapter.variant(one)) for one in acting
        )
        number = None if run.moment is None else run.moment.run
        if self._probed[0] != number or number is None:
            self._probed = (number, probe(self.transformer, *(use.adapter for use in self.uses)))
        adapters = [use.adapter for use in uses]
        return (
            weakref.ref(self.transformer), tuple((one, one.control) for one in adapters), mark(*adapters), others,
            mark(self.transformer), self._probed[1], run.memory.storage, run.memory.place,
        )  # fmt: skip


def parts_of(place: Place) -> tuple[str, ...]:
    """Return the projections of a block that have a LoRA."""
    return _PARTS if getattr(place.attn, "to_out", None) is None else (*_PARTS, "to_out.0")


def from_official(weights: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Return the weights of condition `number` of a released file under our keys."""
    found = {}
    for key, x in weights.items():
        match = _OFFICIAL.fullmatch(key)
        if match is not None and int(match[3]) == number:
            found[_ours(match)] = x
    return found


def official_numbers(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the numbers of the conditions in a released file."""
    return tuple(sorted({int(found[3]) for key in weights if (found := _OFFICIAL.fullmatch(key))}))


def to_official(weights: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Return the weights of one adapter under the released names, as condition `number`: the inverse of `from_official`."""
    found = {}
    for key, x in weights.items():
        path, _, part = key.removesuffix(".weight").rpartition(".")
        block, _, name = path.partition(".attn.")
        short = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj"}[name]
        side = "down" if part.endswith("lora_A") else "up"
        found[f"{block}.attn.processor.{short}_loras.{number}.{side}.weight"] = x
    return found


@reader("EasyControl")
def read_official(file: ControlFile, transformer: nn.Module) -> tuple[Control, Mapping[str, Tensor]] | None:
    """Read a released file of one condition. Its kind is not written in it: a subject is known by the file's name alone."""
    numbers = official_numbers(file.weights)
    if not numbers:
        return None
    strange = [key for key in file.weights if not _OFFICIAL.fullmatch(key)]
    if strange or len(numbers) > 1:
        what = f"{strange[0]} among its keys" if strange else f"{len(numbers)} conditions in one file"
        raise Refused(f"{file.name} has {what}; a released EasyControl file holds the LoRA of one condition")
    weights = from_official(file.weights, numbers[0])
    rank, width = next(x.shape for key, x in weights.items() if key.endswith("lora_A.weight"))
    facts = facts_of(transformer)
    here = 0 if isinstance(facts, str) else facts.places(transformer)[0].attn.to_q.in_features
    if here not in (0, width):  # what has no places at all is refused with its reason later
        raise Refused(
            f"{file.name} is for a FLUX transformer of width {width}, and this {type(transformer).__name__} has {here}"
        )
    positions = "rows" if "subject" in file.name.lower() else "corner"
    return EasyControl(rank=rank, positions=positions, conditioning="prompt"), weights


def _ours(match: re.Match[str]) -> str:
    post = "post_" if match[2] == "proj" else ""
    side = {"down": "A", "up": "B"}[match[4]]
    return f"{match[1]}.attn.{_NAMES.get(match[2], 'to_out.0')}.{post}lora_{side}.weight"


def _control(use: Use) -> EasyControl:
    control = use.adapter.control
    assert isinstance(control, EasyControl)
    return control


def _repeated(latent: Tensor, batch: int, name: str) -> Tensor:
    """One condition for all samples, or as many as samples of each guidance branch."""
    if batch % len(latent):
        raise Refused(
            f"{name}: {len(latent)} conditions for a batch of {batch}; give one for all, or as many as pictures"
        )
    return latent.repeat(batch // len(latent), 1, 1, 1)
