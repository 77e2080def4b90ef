"""What the attention of a transformer hears of UNIC-Adapter's conditions, from call to call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from control._backbones import Place
from control._cross import Cross, Crossing
from control._instructed import Instructed
from control._memory import mark, probe
from control._second_stream import angles, known
from control._tokens import KeyValues, on_grid
from control.base import ControlRun, Refused, Use
from dit.embeddings import Rotary

if TYPE_CHECKING:
    from control.unic_adapter import UNICAdapterWeights


class Hearing:
    """Before each call of the transformer: what its attention hears of each condition, from memory or by a pass now."""

    def __init__(self, transformer: nn.Module, uses: Sequence[Use], run: ControlRun) -> None:
        self.transformer: Any = transformer
        self.uses, self.run = uses, run
        self.facts, form = known(uses[0].name, transformer)
        self.cross = Cross(run, self.facts.places(transformer), text_first=form.text_first)
        self._probed: tuple[int | None, Any] = (None, ())
        self._placed: tuple[Any, tuple[int, int], Rotary] | None = None

    def enter(self, given: dict[str, Any]) -> None:
        """Gather what this call hears; nothing is computed where nothing acts."""
        acting = [use for use in self.uses if self.run.strength(use) > 0]
        if not acting:
            self.cross.begin([])
            return
        if torch.is_grad_enabled() and getattr(self.transformer, "gradient_checkpointing", False):
            raise Refused(
                "unic-adapter: blocks that are computed again in the backward pass do not hear the condition: "
                "disable_gradient_checkpointing()"
            )
        words: Tensor = given["encoder_hidden_states"]
        self.cross.begin([self._crossing(use, given) for use in acting], words.shape[1])

    def leave(self, _failed: bool) -> None:
        """Hear nothing between calls."""
        self.cross.begin([])

    def _crossing(self, use: Use, given: Mapping[str, Any]) -> Crossing:
        adapter, (grid, table) = weights_of(use), self._places(given)
        source = self._source(use, given, grid)
        queries: Callable[[Place, Tensor], Tensor] | None = None
        if adapter.control.queries == "own":

            def queries(place: Place, tokens: Tensor) -> Tensor:
                return adapter.queries(place, tokens, table)

        where, text = None, 1.0
        if use.region is not None:
            where = on_grid(use.region, grid, source.device)
            text = float(use.region.min()) if use.region_text is None else use.region_text
        return Crossing(use, source, self.run.strength(use), queries, adapter.gate, where, text)

    def _places(self, given: Mapping[str, Any]) -> tuple[tuple[int, int], Rotary]:
        """Return rows and columns of the picture, and the angles of its tokens; reading ids waits for the device, so once."""
        ids, noise = given.get("img_ids"), given["hidden_states"]
        known = ids if ids is not None else (tuple(noise.shape[-2:]), noise.device)
        if self._placed is not None and (
            self._placed[0] is known or (ids is None and self._placed[0] == known)
        ):
            return self._placed[1], self._placed[2]
        grid = self.facts.grid(self.transformer, given)
        if ids is None:
            rows, columns = (torch.arange(count, dtype=torch.float32, device=noise.device) for count in grid)
            where = torch.cartesian_prod(torch.zeros(1, device=noise.device), rows, columns)
        else:
            where = (ids[0] if ids.dim() == 3 else ids).float()
        table = angles(self.facts, self.transformer, where)
        self._placed = (known, grid, table)
        return grid, table

    def _source(self, use: Use, given: Mapping[str, Any], grid: tuple[int, int]) -> KeyValues:
        """Return keys and values of a condition: what memory has of them, or what a pass gives now."""
        adapter, memory, noise = weights_of(use), self.run.memory, given["hidden_states"]
        condition: Instructed = use.condition
        fixed = adapter.control.time == "zero"
        keep = fixed and not torch.is_grad_enabled()
        dtype = self.facts.dtype(self.transformer, given)
        samples = condition.samples
        guidance = given.get("guidance")
        if fixed:
            time = torch.zeros(samples, device=noise.device)
            guidance = None if guidance is None else torch.ones(samples, device=noise.device)
        else:
            time = (
                given["timestep"].expand(len(noise))
                if given["timestep"].dim() < 2
                else given["timestep"].amax(1)
            )

        def make() -> KeyValues:
            steps = adapter.steps(
                self.transformer, condition, time=time, guidance=guidance, grid=grid, dtype=dtype
            )
            pairs = {step.place.layer: (step.k, step.v) for step in steps}
            source = KeyValues(pairs, memory.storage, memory.place) if keep else KeyValues(pairs)
            told = self.run.account(use).told
            told["passes"] = told.get("passes", 0) + 1
            told["tokens"], told["bytes"] = source.tokens, source.bytes
            return source

        if not keep:
            return make()
        tensors = [condition.image, condition.text] + ([] if condition.pooled is None else [condition.pooled])
        key = (*self._key(use), grid, guidance is None, dtype, noise.device)
        return memory.recall(key, tensors, make, lambda one: one.bytes)

    def _key(self, use: Use) -> tuple[Any, ...]:
        """What decides a pass beside its tensors: settings, weights, and adapters that act on the weights."""
        run, adapter = self.run, weights_of(use)
        acting = [one for one in run.uses if one.adapter.acts_on_weights]
        others = tuple((one.adapter, run.strength(one), mark(one.adapter), one.adapter.variant(one)) for one in acting)
        number = None if run.moment is None else run.moment.run
        if self._probed[0] != number or number is None:
            self._probed = (number, (probe(self.transformer), *(probe(one.adapter) for one in self.uses)))
        return (
            weakref.ref(self.transformer), adapter, adapter.control, mark(adapter), others, mark(self.transformer),
            self._probed[1], run.memory.storage, run.memory.place,
        )  # fmt: skip


def weights_of(use: Use) -> UNICAdapterWeights:
    """Return the adapter of a use, by its own type."""
    from control.unic_adapter import UNICAdapterWeights

    assert isinstance(use.adapter, UNICAdapterWeights)
    return use.adapter
