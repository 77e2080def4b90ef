"""Forecast the outputs of attention and feed-forward modules, while norms, modulations and gates around them still run.

A block whose attention and perceptron share one map out (FLUX's single blocks) has no such outputs: what the block adds
is forecast instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from acceleration._newton import Ladder
from acceleration._ranges import Recording, Replay
from acceleration._reuse import Branch, Reuse, Way
from acceleration.base import Call, Reached
from acceleration.gates import Judge, Sight
from dit.seams import Block, Blocks, around_blocks, blocks_of

_QUERIES = ("to_q", "to_qkv", "to_qkv_mlp_proj", "q_proj", "qkv", "qkv_proj", "query", "wq", "q", "to_query")
_FORWARD = ("ff", "ffn", "mlp", "feed_forward", "img_mlp", "txt_mlp", "ff_context")
_PROMPT = ("context", "caption", "text", "txt")  # words in the names of modules that serve the prompt
Key = tuple[str, int]  # path of a module, and which of its calls in a forward


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention: by its class and its bases, or by its map to queries."""
    named = any(cls.__name__.endswith(("Attention", "AttentionModuleMixin")) for cls in type(module).__mro__)
    return any(name in _QUERIES for name, _ in module.named_children()) or (named and _weights(module) > 1)


def is_feed_forward(name: str, module: nn.Module) -> bool:
    """Whether a module is a perceptron: by its class or by its name, with two maps at least."""
    classes = [cls.__name__.lower() for cls in type(module).__mro__]
    named = any("feedforward" in one or one.endswith(("mlp", "mbconv")) for one in classes)
    return (named or name in _FORWARD) and _weights(module) > 1


def serves_prompt(path: str) -> bool:
    """Whether a module serves the prompt, by the last part of its path."""
    return any(word in path.rsplit(".", 1)[-1] for word in _PROMPT)


def _weights(module: nn.Module) -> int:
    return sum(one.dim() > 1 for one in module.parameters())


@dataclass(frozen=True, slots=True)
class _Targets:
    modules: tuple[Block, ...]
    fused: frozenset[str]  # paths of the blocks that are forecast as a whole

    def __len__(self) -> int:
        return len(self.modules) + len(self.fused)

    def stored(self, picture: int, prompt: int) -> int:
        """Return what one anchor of all holds, in the unit of what a picture's and a prompt's tokens hold: an estimate.

        Attention and fused blocks return both, a feed-forward module one of them.
        """
        total = len(self.fused) * (picture + prompt)
        for one in self.modules:
            if not is_feed_forward(one.path.rsplit(".", 1)[-1], one.module):
                total += picture + prompt
            else:
                total += prompt if serves_prompt(one.path) else picture
        return total


def parts_of(transformer: nn.Module) -> _Targets:
    """Find the attention and feed-forward modules of all blocks, outermost ones only, and the fused blocks."""
    modules: list[Block] = []
    fused: set[str] = set()
    for block in blocks_of(transformer):
        found = [Block(f"{block.path}.{path}", one) for path, one in _within(block.module)]
        attends = any(is_attention(one.module) for one in found)
        maps = [one for one in block.module.children() if isinstance(one, nn.Linear)]
        if attends and len(maps) > 1 and all(is_attention(one.module) for one in found):
            fused.add(block.path)
        else:
            modules += found
    return _Targets(tuple(modules), frozenset(fused))


def _within(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if is_attention(child) or is_feed_forward(name, child):
            yield f"{prefix}{name}", child
        else:
            yield from _within(child, f"{prefix}{name}.")


@dataclass(slots=True)
class _Stored:
    """The output of one call of a module: its form, and a ladder for each tensor in it."""

    kind: type
    ladders: list[Ladder | None]

    @classmethod
    def of(cls, output: Any, order: int, offload: bool) -> _Stored | None:
        parts = output if isinstance(output, tuple | list) else (output,)
        if not any(isinstance(one, Tensor) for one in parts):
            return None
        if any(one is not None and not isinstance(one, Tensor) for one in parts):
            return None
        ladders = [Ladder(order, offload) if isinstance(one, Tensor) else None for one in parts]
        return cls(type(output), ladders)

    def push(self, output: Any, at: float) -> bool:
        """Take an output as known at `at`; False if it has another form."""
        parts: Sequence[Any] = output if isinstance(output, tuple | list) else (output,)
        if type(output) is not self.kind or [one is None for one in parts] != [
            one is None for one in self.ladders
        ]:
            return False
        for ladder, part in zip(self.ladders, parts, strict=True):
            if ladder is not None:
                ladder.push(part.detach().clone(), at)  # the block may write into it
        return True

    def at(self, where: float) -> Any:
        # A copy even at order 0: the block may write into what it gets.
        parts = [None if one is None else one.at(where).clone() for one in self.ladders]
        return self.kind(parts) if issubclass(self.kind, tuple | list) else parts[0]


@dataclass(slots=True)
class _ModuleBranch(Branch):
    """What one branch knows of its modules' outputs; blocks that are forecast as a whole are branches of their own."""

    outputs: dict[Key, _Stored] = field(default_factory=dict)
    whole: dict[int, Branch] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        modules = sum(one.bytes for stored in self.outputs.values() for one in stored.ladders if one)
        return modules + sum(one.bytes - self.judge.bytes for one in self.whole.values()) + self.judge.bytes

    @property
    def empty(self) -> bool:
        return not self.outputs and not any(one.parts for one in self.whole.values())

    def clear(self) -> None:
        self.outputs, self.whole, self.span = {}, {}, None


class _Watching:
    """A full call: every module is computed and its output kept; fused blocks are recorded one by one."""

    def __init__(self, control: ModuleReuse, branch: _ModuleBranch, at: float) -> None:
        self.control, self.branch, self.at = control, branch, at
        self.recordings: dict[int, Recording] = {}

    def visited(self, call: Call, reached: Reached) -> Any:
        """Compute a block."""
        place = reached.place
        if reached.block.path not in self.control.targets.fused:
            return call.compute(reached)
        recording = self.recordings[place] = Recording(range(place, place + 1), self.branch.careful)
        return recording.visited(call, reached)

    def module(
        self, key: Key, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute a module and keep what it returns."""
        output, manner = inner(*args, **kwargs), self.control.manner
        stored = self.branch.outputs.get(key)
        if stored is None or not stored.push(output, self.at):
            fresh = _Stored.of(output, manner.order, manner.offload)
            if fresh is not None:
                fresh.push(output, self.at)
                self.branch.outputs[key] = fresh
        return output


class _Forecasting:
    """A shortened call: modules return what is forecast for them."""

    def __init__(self, control: ModuleReuse, branch: _ModuleBranch, at: float) -> None:
        self.branch, self.at = branch, at
        self.forecast = 0
        self._whole = {
            place: Replay(one.forecast(at), control.manner.letter) for place, one in branch.whole.items()
        }
        self.letter = control.manner.letter

    def visited(self, call: Call, reached: Reached) -> Any:
        """Answer for a block: F where at least one of its modules was forecast."""
        if reached.place in self._whole:
            return self._whole[reached.place].visited(call, reached)
        before = self.forecast
        output = call.compute(reached)
        if self.forecast > before:
            call.states[-1] = self.letter
        return output

    def module(
        self, key: Key, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the forecast, or compute a module of which nothing is known."""
        stored = self.branch.outputs.get(key)
        if stored is None:
            return inner(*args, **kwargs)
        self.forecast += 1
        return stored.at(self.at)


class ModuleReuse(Reuse):
    """Decide about each call as `Reuse` does; what is recorded and forecast are modules."""

    unfit = None  # blocks of any form have modules

    @contextmanager
    def attached(self, transformer: nn.Module) -> Iterator[None]:
        """Hold the blocks and the modules in them."""
        self.targets = parts_of(transformer)
        self._seen: dict[str, int] = {}
        with self.run.controlled_by(self), around_blocks(Blocks(self.targets.modules), self._module):
            yield

    def started(self, call: Call) -> bool:
        """Decide about a call."""
        self._seen = {}
        return super().started(call)

    def _module(
        self, block: Block, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        number = self._seen[block.path] = self._seen.get(block.path, -1) + 1
        if isinstance(self._way, _Watching | _Forecasting):
            return self._way.module((block.path, number), inner, args, kwargs)
        return inner(*args, **kwargs)

    def _expected(self, sizes: dict[str, int], main: int) -> int:
        return self.targets.stored(main, sum(sizes.values()) - main)

    def _fresh(self) -> Branch:
        return _ModuleBranch(len(self.run.blocks), Judge(self.gate))

    def _replay(self, branch: Branch, at: float) -> Way:
        assert isinstance(branch, _ModuleBranch)
        return _Forecasting(self, branch, at)

    def _recording(self, branch: Branch, sight: Sight) -> Way:
        assert isinstance(branch, _ModuleBranch)
        return _Watching(self, branch, sight.at)

    def _conclude(self, call: Call, branch: Branch, way: Way | None) -> None:
        if isinstance(way, _Forecasting):
            call.remarks["modules"] = way.forecast
        if not isinstance(way, _Watching):
            return
        assert isinstance(branch, _ModuleBranch)
        for place, recording in way.recordings.items():
            parts = recording.finish()
            for reason in recording.reasons:
                self.run.note(reason)
            branch.careful = branch.careful or recording.careful or recording.overwritten
            if parts:
                whole = branch.whole.setdefault(place, Branch(1, branch.judge))
                whole.keep(parts, way.at, self.manner)
            else:
                branch.whole.pop(place, None)
        branch.span = self.plan.span(call.moment.step + 1, self.run.clock.steps, branch.blocks)
        branch.step = call.moment.step
        self.run.weigh()
