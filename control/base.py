"""Attach learned adapters to a transformer for the length of a with-block, each with its strength, window and region.

`Control` is the family of settings, `ControlAdapter` the weights beside the transformer (never inside it), `Use` one
adapter in use, and `controlled(transformer, *uses)` the with-block. Its state lives in `ControlRun` and dies with it.
Control goes outside and acceleration inside: `with controlled(...): with accelerated(...):`; so an accelerator sees what
is really computed, and a block that it leaves out leaves out what was added to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from control._caches import BeneathCaches
from control._memory import Memory
from control._report import Account, ControlReport
from dit import seams
from dit.seams import Clock, Moment
from dit.spec import Spec

__all__ = [
    "Account", "Control", "ControlAdapter", "ControlReport", "ControlRun", "Memory", "Refused", "Strength", "Untouched", "Use",
    "controlled", "filled", "frozen", "refusal",
]  # fmt: skip

Strength = float | Sequence[float] | Callable[[float], float]


AdapterType = TypeVar("AdapterType", bound="ControlAdapter")


class Refused(ValueError):
    """A transformer, a file or a combination of adapters that cannot work, in words."""


class Untouched(RuntimeError):
    """An adapter that should have changed something and did not, in words."""


class Control(Spec):
    """The family of learned ways to steer: the settings from which an adapter's weights are built and read."""

    __slots__ = ()
    about: ClassVar[str] = ""  # one line for a page: what the condition is and what it does

    def refuses(self, transformer: nn.Module) -> str | None:
        """Return in words why this way to steer cannot serve the transformer, or None if it can."""
        return None

    def build(self, transformer: nn.Module) -> ControlAdapter:
        """Return a fresh, untrained adapter for the transformer, on its device and in its dtype."""
        raise NotImplementedError(f"{type(self).__name__}.build")

    def load(self, transformer: nn.Module, weights: Mapping[str, Tensor]) -> ControlAdapter:
        """Return an adapter with `weights` (the keys of its `state_dict`); nothing is attached, nothing half loaded.

        Raises: Refused for a transformer it cannot serve, or weights that do not fit.
        """
        reason = self.refuses(transformer)
        if reason is not None:
            raise Refused(f"{self.name}: {reason}")
        return filled(self.build(transformer), weights)


class ControlAdapter(nn.Module):
    """The weights of one way to steer, beside the transformer. Its `state_dict` is what a file holds.

    A derived class implements `attached`; where several uses are better served together (conditions in one batch) it
    replaces `attached_together`.
    """

    needs_condition: ClassVar[bool] = True
    acts_on_weights: ClassVar[bool] = False  # changes what the transformer's own layers compute (a LoRA)
    coverage: Any = None  # how much of its file found a place, a `control._files.Coverage`

    def __init__(self, control: Control) -> None:
        super().__init__()
        self.control = control

    def refuses(self, transformer: nn.Module, use: Use) -> str | None:
        """Return in words why this use cannot work, looked at before anything is attached."""
        return self.control.refuses(transformer)

    def attached(self, transformer: nn.Module, use: Use, run: ControlRun) -> AbstractContextManager[None]:
        """Take hold of the transformer until the end of the context. Ask `run.strength(use)` in every call."""
        raise NotImplementedError(f"{type(self).__name__}.attached")

    def variant(self, use: Use) -> Hashable:
        """Return what, beside weights and strength, decides how a use that acts on weights changes them (a task)."""
        return None

    @classmethod
    @contextmanager
    def attached_together(
        cls, transformer: nn.Module, uses: Sequence[Use], run: ControlRun
    ) -> Iterator[None]:
        """Take hold for all uses of adapters of this class; one after the other unless replaced."""
        with ExitStack() as stack:
            for use in uses:
                stack.enter_context(use.adapter.attached(transformer, use, run))
            yield

    @property
    def trained_now(self) -> bool:
        """Whether gradients of these weights are wanted: then nothing may be kept from call to call."""
        return torch.is_grad_enabled() and any(one.requires_grad for one in self.parameters())


def filled(adapter: AdapterType, weights: Mapping[str, Tensor]) -> AdapterType:
    """Put `weights` into an adapter, all of them and no others, in its own dtype. Raises: Refused naming what does not fit."""
    from control._files import fitted

    adapter.load_state_dict(fitted(adapter.control.name, weights, adapter.state_dict()), strict=True)
    return adapter.eval()


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One adapter in use.

    Attributes:
        adapter: the weights.
        condition: what it is given; for pictures a tensor [B, C, H, W] as the transformer's own encoder makes it (latents,
            or pixels from -1 to 1 where the transformer takes pixels). One sample serves a batch.
        strength: 1 as trained, 0 exactly off; a number, numbers spread evenly over the steps from the first to the last,
            or a function of the fraction of the run that is over (0-1).
        start, end: fractions of the run; step i of n is inside where start <= i / n < end. Nothing is computed outside.
        region: where on the picture it acts, [H, W] or [B, H, W] from 0 to 1, of any size; None everywhere.
        region_text: how far text tokens hear it where a region is given; None: as far as its weakest place, so that
            the text does not carry it out of the region.
    """

    adapter: ControlAdapter
    condition: Any = None
    strength: Strength = 1.0
    start: float = 0.0
    end: float = 1.0
    region: Tensor | None = None
    region_text: float | None = None

    def __post_init__(self) -> None:
        who = self.name
        if not callable(self.strength):
            given = list(self.strength) if isinstance(self.strength, Sequence) else [self.strength]
            if not given or not all(_number(one) and one >= 0 for one in given):
                raise Refused(f"{who}: strength must be numbers of at least 0, got {self.strength!r}")
        if not (_number(self.start) and _number(self.end) and 0 <= self.start < self.end <= 1):
            raise Refused(
                f"{who}: start and end are fractions of the run with 0 <= start < end <= 1, "
                f"got start={self.start!r}, end={self.end!r}"
            )
        if self.region is not None:
            region = self.region
            if not isinstance(region, Tensor) or region.dim() not in (2, 3) or not region.numel():
                raise Refused(f"{who}: region must be a tensor [H, W] or [B, H, W], got {_seen(region)}")
            if not (
                bool(torch.isfinite(region).all()) and 0 <= float(region.min()) <= float(region.max()) <= 1
            ):
                low, high = float(region.min()), float(region.max())
                raise Refused(f"{who}: region must hold numbers from 0 to 1, got {low:g} to {high:g}")
        if self.region_text is not None and not (_number(self.region_text) and 0 <= self.region_text <= 1):
            raise Refused(f"{who}: region_text must be a number from 0 to 1, got {self.region_text!r}")

    @property
    def name(self) -> str:
        """The name of its kind, for messages and reports."""
        return self.adapter.control.name if isinstance(self.adapter, ControlAdapter) else "controlled()"

    @property
    def off(self) -> bool:
        """Whether it is off in every step: then it is not attached at all."""
        if callable(self.strength):
            return False
        given = self.strength if isinstance(self.strength, Sequence) else (self.strength,)
        return not any(given)

    @property
    def timed(self) -> bool:
        """Whether it changes over the steps, so that their number must be known."""
        return (
            callable(self.strength) or isinstance(self.strength, Sequence) or (self.start, self.end) != (0, 1)
        )

    def strength_at(self, step: int, steps: int) -> float:
        """Return the strength in a step (from 0) of a run; 0 outside of start and end."""
        fraction = step / steps
        if not self.start <= fraction < self.end:
            return 0.0
        if callable(self.strength):
            value = float(self.strength(fraction))
            if not (math.isfinite(value) and value >= 0):
                raise Refused(
                    f"{self.name}: strength at {fraction:g} of the run is {value}, allowed is at least 0"
                )
            return value
        if not isinstance(self.strength, Sequence):
            return float(self.strength)
        place = (len(self.strength) - 1) * step / max(1, steps - 1)
        low = min(int(place), len(self.strength) - 1)
        high = min(low + 1, len(self.strength) - 1)
        return self.strength[low] + (self.strength[high] - self.strength[low]) * (place - low)


class ControlRun:
    """One with-block: its clock, the call that is running, and what each use has done.

    Attributes:
        moment: step, branch and run of the call that is running (None between calls).
        given: the arguments of that call by name.
        memory: what adapters keep from call to call (keys and values of a condition, ...).
    """

    def __init__(
        self, transformer: nn.Module, uses: tuple[Use, ...], clock: Clock, memory: Memory | None = None
    ) -> None:
        self.transformer, self.uses, self.clock = transformer, uses, clock
        self.memory = Memory() if memory is None else memory
        self._turns = memory is None  # what the caller keeps is the caller's to clear
        self._number = 0
        self.moment: Moment | None = None
        self.given: dict[str, Any] = {}
        self.calls = 0
        self.notes: list[str] = []
        self.accounts: dict[int, Account] = {id(use): Account() for use in uses}
        self._now: dict[int, float] = {}

    def strength(self, use: Use) -> float:
        """Return the strength of a use in the call that is running, 0 outside of its window and between calls."""
        return self._now.get(id(use), 0.0)

    @property
    def acting(self) -> tuple[bool, ...]:
        """Which uses act in the call that is running: what an accelerator stored beside others fits no more."""
        return tuple(self.strength(use) > 0 for use in self.uses)

    def account(self, use: Use) -> Account:
        """Return the account of a use; an adapter adds to `acted` and may leave words in `told`."""
        return self.accounts[id(use)]

    def note(self, words: str) -> None:
        """Put a remark into the report, once however often it is made."""
        if words not in self.notes:
            self.notes.append(words)

    def report(self) -> ControlReport:
        """Return what was requested and what took effect so far."""
        return ControlReport(
            uses=[self._row(use) for use in self.uses],
            calls=self.calls,
            bytes=self.memory.bytes,
            notes=list(self.notes),
        )

    def _row(self, use: Use) -> dict[str, Any]:
        account = self.account(use)
        strength = "a function" if callable(use.strength) else use.strength
        return {
            "control": use.adapter.control.to_dict(),
            "strength": list(strength) if isinstance(strength, tuple | list) else strength,
            "start": use.start, "end": use.end, "region": use.region is not None,
            "calls": account.calls, "acted": account.acted,
            "effective": [account.least, account.most] if account.calls else None,
            **account.told,
        }  # fmt: skip

    def _enter(self, given: dict[str, Any]) -> None:
        self.moment = self.clock.tick(seams.timestep_of(given), seams.prompt_of(given))
        self.given = given
        self.calls += 1
        if self._turns and self.moment.run != self._number:
            self.memory.turn()
        self._number = self.moment.run
        self._now = {id(use): self._strength_now(use, self.moment) for use in self.uses}
        for use in self.uses:
            now, account = self._now[id(use)], self.account(use)
            if now > 0:
                account.calls += 1
                account.least, account.most = min(account.least, now), max(account.most, now)

    def _strength_now(self, use: Use, moment: Moment) -> float:
        if use.off:
            return 0.0
        if not use.timed:
            return float(use.strength)  # type: ignore[arg-type]  # a plain number, or it would be timed
        steps = self.clock.steps
        if steps is None or not moment.known:
            raise Refused(
                f"{use.name}: start, end and a strength that changes need the number of steps: "
                "controlled(..., steps=) or dit.seams.announce"
            )
        return use.strength_at(min(moment.step, steps - 1), steps)

    def _leave(self, _failed: bool) -> None:
        self.moment, self.given, self._now = None, {}, {}

    def _check(self) -> None:
        for use in self.uses:
            account = self.account(use)
            if account.calls and not account.acted:
                raise Untouched(
                    f"{use.name} changed nothing in {account.calls} calls of {type(self.transformer).__name__}: "
                    + ("; ".join(self.notes) or "none of the places it acts on was reached")
                )


@contextmanager
def controlled(
    transformer: nn.Module,
    *uses: Use,
    steps: int | None = None,
    calls_per_step: int | None = None,
    memory: Memory | None = None,
) -> Iterator[ControlRun]:
    """Let adapters steer every forward of a transformer inside the block.

    Args:
        uses: what to attach. One that is off in every step attaches nothing.
        steps: denoising steps of a run, where the pipeline does not announce them (`dit.seams.announce`).
        calls_per_step: forwards for each timestep; only needed where guidance branches cannot be told apart.
        memory: keep it and give it again, and what was computed of a condition serves the next with-block too. Without one
            the block keeps what its last run used.

    Raises:
        Refused: at entry, if an adapter cannot serve this transformer or the uses do not go together.
        Untouched: at the end, if an adapter should have changed something and did not.
    """
    for name, value in (("steps", steps), ("calls_per_step", calls_per_step)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise Refused(f"{name} must be a whole number of at least 1, got {value!r}")
    reason = refusal(transformer, *uses)
    if reason is not None:
        raise Refused(reason)
    run = ControlRun(transformer, uses, Clock(steps, calls_per_step), memory)
    acting = [use for use in uses if not use.off]
    if not acting:
        yield run
        return
    with BeneathCaches(transformer) as stack:
        stack.enter_context(seams.patched(transformer, seams.CONTROL_RUN, run))
        stack.enter_context(seams.named_contexts(transformer, run.clock))
        stack.enter_context(seams.around_calls(transformer, run._enter, run._leave))
        for kind in dict.fromkeys(type(use.adapter) for use in acting):
            together = [use for use in acting if type(use.adapter) is kind]
            stack.enter_context(kind.attached_together(transformer, together, run))
        stack.enable_caches()
        yield run
    run._check()


def refusal(transformer: Any, *uses: Any) -> str | None:
    """Return in words why `controlled(transformer, *uses)` would refuse, or None if it would not."""
    who = type(transformer).__name__
    if not isinstance(transformer, nn.Module):
        return f"controlled() takes a transformer (torch.nn.Module), got {who}"
    for use in uses:
        if not isinstance(use, Use) or not isinstance(use.adapter, ControlAdapter):
            return f"controlled() takes Use(adapter, ...), got {type(use).__name__}"
    if transformer.__dict__.get(seams.CONTROL_RUN) is not None:
        return f"{who} is already controlled: end that with-block first, or give all uses to one controlled()"
    if transformer.__dict__.get(seams.RUN) is not None:
        return f"{who} is already accelerated: controlled() goes outside and accelerated() inside"
    for use in uses:
        if use.off:
            continue
        if use.adapter.needs_condition and use.condition is None:
            return f"{use.name}: needs a condition, got none"
        words = use.adapter.refuses(transformer, use)
        if words is not None:
            return f"{use.name}: {words}"
    return None


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no gradient reach the weights of `module` inside, for training an adapter beside it."""
    wanted = [one for one in module.parameters() if one.requires_grad]
    for one in wanted:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in wanted:
            one.requires_grad_(True)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _seen(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
