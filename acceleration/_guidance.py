"""The forwards of guidance: which of them is unconditional, a doubled batch taken apart, and one made from the other.

A branch is known by the name that the pipeline gives it. Without a name, a batch whose halves hold equal latents and
different prompts is both branches, and the second of two calls with equal latents and different prompts is the
unconditional one, as in all pipelines of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from acceleration._latents import LATENTS
from acceleration._newton import Ladder, precise
from acceleration.base import Call, Run
from dit.seams import Moment, arguments, patched, prompt_of, writes_cache

COND = ("cond", "conditional", "positive", "pred_cond")  # the last is what a guider of diffusers calls it
UNCOND = ("uncond", "unconditional", "negative", "pred_uncond")
BOTH = ("cond_uncond", "uncond_cond", "uncond+cond", "cond+uncond")
COND_FIRST = ("DiTTransformer2DModel", "LuminaNextDiT2DModel", "ZImageTransformer2DModel")
"""Transformers whose pipelines put the conditional half of a batch first; all others of diffusers put it last."""
# Arguments with these words in their name are tables of positions, one for all samples, unless they have a batch too.
_TABLES = ("img_ids", "txt_ids", "image_ids", "rotary", "rope", "freqs", "indices")
_SECOND = ("encoder_hidden_states_llama3",)  # [layers, B, L, D]

Inner = Callable[..., Any]
Key = tuple[int, int, int]  # run, step, evaluation


class Schedule(Protocol):
    """What the method says about a step."""

    @property
    def name(self) -> str: ...
    @property
    def mode(self) -> str: ...
    @property
    def order(self) -> int: ...
    @property
    def interval(self) -> int: ...
    @property
    def unconditional(self) -> str: ...
    @property
    def guide_from(self) -> float: ...
    @property
    def guide_to(self) -> float: ...
    @property
    def neutral(self) -> bool: ...
    def omits(self, step: int, steps: int | None) -> bool: ...
    def skips(self, step: int, steps: int | None) -> bool: ...


@dataclass(slots=True)
class Distance:
    """What the conditional output is ahead of the unconditional one, as known from the last steps that computed both."""

    ladders: list[Ladder] = field(default_factory=list)
    step: int = -1
    blocks: int = 0

    @property
    def bytes(self) -> int:
        """Size of what is stored."""
        return sum(one.bytes for one in self.ladders)


@dataclass(slots=True)
class _Seen:
    """The conditional forward of the present moment."""

    key: Key
    given: Mapping[str, Any]
    output: Any


class Guiding:
    """Answer every forward of a transformer: as it is, or where it is unconditional and left out, from the conditional one."""

    def __init__(self, plan: Schedule, run: Run) -> None:
        self.plan, self.run = plan, run
        self._seen: _Seen | None = None
        self._approximated: dict[tuple[str, int], Key] = {}  # by branch and evaluation, the last made up

    @contextmanager
    def attached(self, transformer: nn.Module) -> Iterator[None]:
        """Hold the forward of the transformer."""
        if self.plan.neutral:
            yield
            return
        inner = transformer.forward
        first = self.plan.unconditional == "first"
        if self.plan.unconditional == "auto":
            first = type(transformer).__name__ not in COND_FIRST

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self.run.call
            if call is None or not call.moment.known or writes_cache(call.given):
                return inner(*args, **kwargs)
            given = arguments(transformer, args, kwargs)
            role = self._role(call.moment, given)
            if role == "both":
                return self._both(call, inner, given, first)
            if role == "uncond":
                return self._unconditional(call, lambda: inner(*args, **kwargs))
            output = inner(*args, **kwargs)
            if role == "cond":
                self._remember(call, given, output)
            return output

        forward.__wrapped__ = inner  # type: ignore[attr-defined]  # inspect.signature sees the model's own arguments
        try:
            with patched(transformer, "forward", forward):
                yield
        finally:
            self._seen = None

    def _role(self, moment: Moment, given: Mapping[str, Any]) -> str | None:
        name = moment.branch
        if name in COND or name in UNCOND:
            return "cond" if name in COND else "uncond"
        if name in BOTH:
            return "both" if halves(given) is not None else "cond"
        if not name.startswith("call "):
            return None
        if doubled(given):
            return "both"
        seen = self._seen
        if seen is None or seen.key != _key(moment):
            return "cond" if name == "call 1" else None
        return "uncond" if name == "call 2" and rivals(seen.given, given) else None

    def _remember(self, call: Call, given: Mapping[str, Any], output: Any) -> None:
        # Other tensor objects of the same contents: the clock knows prompts by the object that carries them.
        self._seen = _Seen(_key(call.moment), mapped(dict(given), Tensor.detach), output)

    def _both(self, call: Call, inner: Inner, given: Mapping[str, Any], first: bool) -> Any:
        """Compute a doubled batch as two, the conditional half first."""
        parts = halves(given)
        assert parts is not None
        uncond, cond = parts if first else reversed(parts)
        plain = call.moment.branch in (*BOTH, "call 1")
        names = [one if plain else f"{call.moment.branch} {one}" for one in ("cond", "uncond")]
        with self.run.part(call, names[0], cond) as part:
            output = inner(**cond)
            self._remember(part, cond, output)
        with self.run.part(call, names[1], uncond) as part:
            other = self._unconditional(part, lambda: inner(**uncond))
        listed = isinstance(_latent(given), list)
        return joined(other, output, listed) if first else joined(output, other, listed)

    def _unconditional(self, call: Call, compute: Callable[[], Any]) -> Any:
        """Answer the unconditional forward."""
        plan, steps, moment = self.plan, self.run.clock.steps, call.moment
        if steps is None and (plan.guide_from, plan.guide_to) != (0.0, 1.0):
            self.run.note(
                f"{plan.name}: the number of steps is unknown, so guidance is on in all of them; give steps="
            )
        distance = call.state(self, Distance)
        seen = self._seen if self._seen is not None and self._seen.key == _key(moment) else None
        omits, skips = plan.omits(moment.step, steps), plan.skips(moment.step, steps)
        if omits or skips:
            self.run.wanted[plan.name] = self.run.wanted.get(plan.name, 0) + 1
            reason = self._objection(moment, distance, seen, omits or plan.mode == "cond")
            if reason is None and seen is not None:
                return self._made(call, distance, seen.output, omits or plan.mode == "cond")
            self.run.note(
                f"{plan.name} computed an unconditional forward that it meant to leave out: {reason}"
            )
        output = compute()
        call.remarks["unconditional"] = "computed"
        distance.blocks = len(call.states)
        if seen is not None and plan.mode != "cond":
            self._keep(distance, seen.output, output, moment.step)
        return output

    def _objection(self, moment: Moment, distance: Distance, seen: _Seen | None, equal: bool) -> str | None:
        """Say in words why an output cannot be made from the conditional one; `equal` wants nothing but that."""
        if seen is None:
            return "no conditional forward came before it in its step"
        if equal:
            return None
        if not distance.ladders:
            return "the distance of the branches is not known yet for this size and type"
        if not 0 < moment.step - distance.step < self.plan.interval:
            return "the distance of the branches that is known is too old"
        if not _fits(distance, seen.output):
            return "the two branches return different things"
        if moment.corrects is not None:
            step, evaluation = moment.corrects
            if self._approximated.get((moment.branch, evaluation)) == (moment.run, step, evaluation):
                return "it corrects an evaluation that was itself made up"
        return None

    def _made(self, call: Call, distance: Distance, output: Any, equal: bool) -> Any:
        forecast = not equal and self.plan.mode == "forecast"
        how = "left out" if equal else "forecast" if forecast else "reused"
        call.remarks.update(unconditional=how, answered=True)
        blocks = distance.blocks or len(self.run.blocks)
        call.states.extend(("F" if forecast else "R") * blocks)
        self._approximated[call.moment.branch, call.moment.evaluation] = _key(call.moment)
        ahead, step = iter(distance.ladders), float(call.moment.step)

        def behind(x: Tensor) -> Tensor:
            if equal or not x.is_floating_point():
                return x.clone()
            return (precise(x) - precise(next(ahead).at(step))).to(x.dtype)

        return mapped(output, behind)

    def _keep(self, distance: Distance, cond: Any, uncond: Any, step: int) -> None:
        ahead, behind = leaves(cond), leaves(uncond)
        if [one.shape for one in ahead] != [one.shape for one in behind]:
            distance.ladders = []
            return
        if len(distance.ladders) != len(ahead):
            order = self.plan.order if self.plan.mode == "forecast" else 0
            distance.ladders = [Ladder(order) for _ in ahead]
        for ladder, x, y in zip(distance.ladders, ahead, behind, strict=True):
            ladder.push((precise(x.detach()) - precise(y.detach())).to(x.dtype), float(step))
        distance.step = step
        self.run.weigh()


def latents_of(given: Mapping[str, Any]) -> list[Tensor]:
    """Return the latents of a call: one tensor for all samples, or one each."""
    value = _latent(given)
    parts = value if isinstance(value, list | tuple) else [value]
    return [one for one in parts if isinstance(one, Tensor)]


def halves(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Take the arguments of a call apart, first and second half of the batch; None where that cannot be done."""
    latent, prompt = _latent(given), prompt_of(given)
    listed = isinstance(latent, list)
    rows = len(latent) if isinstance(latent, Tensor | list) else 0
    if rows < 2 or rows % 2 or (isinstance(latent, Tensor) and latent.dim() < 2):
        return None
    if not listed and prompt is not None and prompt.shape[:1] != (rows,):
        return None
    keeps = slice(0, rows // 2), slice(rows // 2, rows)
    first, second = (
        {name: _part(name, value, keep, rows, listed) for name, value in given.items()} for keep in keeps
    )
    return first, second


def doubled(given: Mapping[str, Any]) -> bool:
    """Whether the two halves of a batch are rivals."""
    parts = halves(given)
    return parts is not None and rivals(*parts)


def rivals(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two calls have equal latents and a different condition."""
    if not _equal(latents_of(one), latents_of(other)):
        return False
    return not _equal(*(tensors_in(call) for call in (one, other)))


def joined(first: Any, second: Any, listed: bool = False) -> Any:
    """Put what two halves of a batch return together; `listed` where lists hold one entry a sample."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping):
        kind: Any = type(first)
        return kind(**{name: joined(value, second[name], listed) for name, value in first.items()})
    if isinstance(first, list) and listed:
        return first + second
    if isinstance(first, list | tuple):
        return type(first)(joined(a, b, listed) for a, b in zip(first, second, strict=True))
    return first


def mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a value of lists, tuples and mappings with every tensor changed, in the order of `tensors_in`."""
    if isinstance(output, Tensor):
        return change(output)
    if type(output) is dict:
        return {name: mapped(value, change) for name, value in output.items()}
    if isinstance(output, Mapping):
        kind: Any = type(output)
        return kind(**{name: mapped(value, change) for name, value in output.items()})
    if isinstance(output, list | tuple):
        return type(output)(mapped(one, change) for one in output)
    return output


def leaves(output: Any) -> list[Tensor]:
    """Return the floating tensors in an output."""
    return [one for one in tensors_in(output) if one.is_floating_point()]


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in a value made of lists, tuples and mappings."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [one for part in parts for one in tensors_in(part)]


def _latent(given: Mapping[str, Any]) -> Any:
    return next((given[name] for name in LATENTS if given.get(name) is not None), None)


def _part(name: str, value: Any, keep: slice, rows: int, listed: bool) -> Any:
    if name in _SECOND and isinstance(value, Tensor) and value.dim() > 1:
        return value[:, keep] if value.shape[1] == rows else value
    if any(word in name for word in _TABLES) and all(one.dim() < 3 for one in tensors_in(value)):
        return value
    return _half(value, keep, rows, listed)


def _half(value: Any, keep: slice, rows: int, listed: bool) -> Any:
    if isinstance(value, Tensor):
        return value[keep] if value.shape[:1] == (rows,) else value
    if isinstance(value, Mapping):
        return {name: _half(one, keep, rows, listed) for name, one in value.items()}
    if isinstance(value, list) and len(value) == rows:
        batched = any(isinstance(one, Tensor) and one.shape[:1] == (rows,) for one in value)
        if listed or not batched:
            return value[keep]
    if isinstance(value, list | tuple):
        found = [_half(one, keep, rows, listed) for one in value]
        return found if isinstance(value, list) else tuple(found)
    return value


def _fits(distance: Distance, output: Any) -> bool:
    found = leaves(output)
    return len(found) == len(distance.ladders) and all(
        ladder.fits(x) for ladder, x in zip(distance.ladders, found, strict=True)
    )


def _same(x: Tensor, y: Tensor) -> bool:
    if x is y:
        return True
    return x.shape == y.shape and x.device == y.device and bool(torch.equal(x, y))


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) > 0 and all(_same(x, y) for x, y in zip(some, others, strict=True))


def _key(moment: Moment) -> Key:
    return moment.run, moment.step, moment.evaluation
