"""DiffScaler: each task scales and shifts what the frozen layers say and adds a small part of its own; many tasks in one model.

A layer's W x + b becomes (1 + scale) * W x + b + shift + up(relu(down(x))). Tasks share nothing but the transformer, so one
can be trained without touching another, and they are switched for a request, mixed, or given to each sample of one batch.

Paper: DiffScaler: Enhancing the Generative Prowess of Diffusion Transformers; Nair, Valanarasu, Patel; 2024; arXiv:2404.09976.
Differs: no code was released, and rank, layers and start are ours: scale, shift and the map up begin at 0, so that an
    untrained task changes nothing. Strength scales the whole change of a layer. Mixing tasks, a task for each sample and
    merging (where there is no part behind the ReLU, which no weight can hold) are ours; new class embeddings are not made.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from control._files import grow
from control._layers import (
    ATTENTION,
    PERCEPTRON,
    Change,
    changed_layers,
    check_targets,
    layers_refuse,
    made_like,
    targeted,
    use_refused,
    weight_of,
)
from control.base import Control, ControlAdapter, ControlRun, Refused, Use
from dit.seams import arguments, patched
from dit.spec import knob, spec

_NAME = re.compile(r"[A-Za-z0-9_-]+")
Choice = Mapping[str, float]


@spec("diffscaler", paper="DiffScaler, arXiv:2404.09976")
class DiffScaler(Control):
    """Scales, shifts and small parts beside the layers, a set for each task."""

    about = "Several tasks or data sets in one model, switched by name"

    tasks: tuple[str, ...] = knob(default=("task",), label="Names of the tasks")
    rank: int = knob(default=8, label="Rank of the part behind a ReLU (0: none)", low=0, high=1024)
    affine: bool = knob(default=True, label="Scale and shift what layers say")
    targets: tuple[str, ...] = knob(
        default=(*ATTENTION, *PERCEPTRON), label="Names of the layers in blocks that are changed"
    )

    def check(self) -> None:
        """Raises: ValueError for names of tasks or layers that are none, and for nothing to learn."""
        check_targets(self.name, self.targets)
        named = all(isinstance(one, str) and _NAME.fullmatch(one) for one in self.tasks)
        if not self.tasks or not named or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(
                f"{self.name}: tasks must be different names of letters, digits, - and _, got {self.tasks!r}"
            )
        if not self.affine and not self.rank:
            raise ValueError(f"{self.name}: with affine=False rank must be at least 1, got 0")

    def refuses(self, transformer: nn.Module) -> str | None:
        return layers_refuse(transformer)

    def build(self, transformer: nn.Module) -> DiffScalerAdapter:
        """As `Control.build`. Raises: Refused if no layer has a name of `targets`."""
        return DiffScalerAdapter(self, transformer)


class Affiner(nn.Module):
    """What one task changes of one layer; nothing at the start."""

    def __init__(self, layer: Any, control: DiffScaler, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        if control.affine:
            self.scale = nn.Parameter(torch.zeros(layer.out_features, **made))
            self.shift = nn.Parameter(torch.zeros(layer.out_features, **made))
        if control.rank:
            self.down = nn.Linear(layer.in_features, control.rank, bias=False, **made)
            self.up = nn.Linear(control.rank, layer.out_features, bias=False, **made)
            nn.init.zeros_(self.up.weight)
        self.affine, self.low_rank = control.affine, control.rank > 0

    def forward(self, x: Tensor, y: Tensor, bias: Tensor | None, share: float = 1.0) -> Tensor:
        """Input [..., D in] and output [..., D out] of the layer -> the output with a share of the change, in its dtype."""
        found = y
        if self.affine:
            scale, shift = self.scale.to(y.dtype) * share, self.shift.to(y.dtype) * share
            if bias is not None:  # scale acts on W x alone
                shift = shift - scale * bias.to(y.dtype)
            found = torch.addcmul(shift, scale + 1, y)
        if self.low_rank:
            inner = self.down(x.to(self.down.weight.dtype)).relu().to(y.dtype)
            up = self.up.weight.to(y.dtype).T
            # One pass over the output: it is far larger than what is added to it.
            found = torch.addmm(found.flatten(0, -2), inner.flatten(0, -2), up, alpha=share).view_as(y)
        return found


class DiffScalerAdapter(ControlAdapter):
    """The sets of all tasks. A use's condition says which: a name, {name: weight}, or a list with one of these a sample.

    In such a list None is a sample without a task. Without a condition the only task acts.
    """

    control: DiffScaler
    needs_condition = False
    acts_on_weights = True

    def __init__(self, control: DiffScaler, transformer: nn.Module) -> None:
        super().__init__(control)
        dtype, device = made_like(transformer)
        layers = targeted(transformer, control.targets, control.name)
        self.layers = tuple(layers)
        for path, layer in layers.items():
            for task in control.tasks:
                grow(self, f"{path}.{task}", Affiner(layer, control, dtype, device))

    def refuses(self, transformer: nn.Module, use: Use) -> str | None:
        """Look at transformer, use and the tasks that are asked for."""
        words = self.control.refuses(transformer) or use_refused(transformer, use, self.layers)
        if words is not None:
            return words
        try:
            self.chosen(use.condition)
        except Refused as error:
            return str(error)
        return None

    def chosen(self, condition: Any) -> list[Choice]:
        """Return the weights of tasks for all samples (one entry) or for each (several). Raises: Refused."""
        tasks = self.control.tasks
        if condition is None:
            if len(tasks) > 1:
                raise Refused(f"the condition must name a task, one of {', '.join(tasks)}")
            return [{tasks[0]: 1.0}]
        if isinstance(condition, str | Mapping):
            return [self._choice(condition)]
        if not isinstance(condition, Sequence) or not condition:
            raise Refused(
                f"the condition must be the name of a task, weights by name, or a list of these, got {condition!r}"
            )
        return [{} if one is None else self._choice(one) for one in condition]

    def _choice(self, given: Any) -> Choice:
        found = {given: 1.0} if isinstance(given, str) else given
        if not isinstance(found, Mapping):
            raise Refused(f"a sample's task must be a name, weights by name or none, got {given!r}")
        for name, weight in found.items():
            if name not in self.control.tasks:
                raise Refused(f"there is no task {name!r}; there are: {', '.join(self.control.tasks)}")
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not abs(weight) < float("inf"):
                raise Refused(f"the weight of task {name!r} must be a number, got {weight!r}")
        return {name: float(weight) for name, weight in found.items() if weight}

    def variant(self, use: Use) -> Hashable:
        return tuple(tuple(sorted(choice.items())) for choice in self.chosen(use.condition))

    @contextmanager
    def attached(self, transformer: nn.Module, use: Use, run: ControlRun) -> Iterator[None]:
        """Change the layers. Raises: Refused for a task a sample beside adapters that run other batches through them."""
        switch = _Switch(self, self.chosen(use.condition), run)
        if len(switch.chosen) > 1:
            other = next((one.name for one in run.uses if one.adapter.needs_condition and not one.off), None)
            if other is not None:
                raise Refused(
                    f"diffscaler: {other} runs its condition through the same layers, and a condition has no task of its "
                    "own: give one task for all samples"
                )
        changes = {path: switch.change(transformer, path) for path in self.layers}
        with switch.counting(transformer), changed_layers(transformer, use, run, changes):
            yield

    @torch.no_grad()
    def merged(
        self, transformer: nn.Module, condition: Any = None, strength: float = 1.0
    ) -> dict[str, Tensor]:
        """Return the transformer's weights, by name, with a task in them; the transformer stays as it is.

        Raises: Refused where that is not exact: a part behind a ReLU, a shift without a bias, a task for each sample.
        """
        chosen = self.chosen(condition)
        if len(chosen) > 1:
            raise Refused("diffscaler: weights hold one task, not one for each sample")
        found = {}
        for path in self.layers:
            parts = [(self.part(path, task), strength * weight) for task, weight in chosen[0].items()]
            if any(part.low_rank and bool(part.up.weight.any()) for part, _ in parts):
                raise Refused(
                    f"diffscaler: the part of {path} behind a ReLU is not linear and cannot be merged into a weight; "
                    "only rank=0 can"
                )
            weight, bias = (
                weight_of(transformer, path),
                getattr(transformer.get_submodule(path), "bias", None),
            )
            scale, shift = torch.ones(()), torch.zeros(())
            for part, share in parts:
                if part.affine:
                    scale, shift = scale + share * part.scale.float(), shift + share * part.shift.float()
            if scale.dim():
                found[f"{path}.weight"] = (scale[:, None] * weight.float()).to(weight.dtype)
            if bias is None and bool(shift.any()):
                raise Refused(f"diffscaler: {path} has no bias that could take the shift")
            if bias is not None and shift.dim():
                found[f"{path}.bias"] = (bias.float() + shift).to(bias.dtype)
        return found

    def part(self, path: str, task: str) -> Any:
        """Return what a task changes of the layer at a path."""
        return self.get_submodule(f"{path}.{task}")


class _Switch:
    """Which task acts on which rows of a layer's input."""

    def __init__(self, adapter: DiffScalerAdapter, chosen: list[Choice], run: ControlRun) -> None:
        self.adapter, self.chosen, self.run = adapter, chosen, run
        self._batch = 1
        self._rows: dict[tuple[int, int, torch.device], list[tuple[str, Tensor, Tensor]]] = {}

    def change(self, transformer: nn.Module, path: str) -> Change:
        """Return what answers for the layer at a path."""
        layer: Any = transformer.get_submodule(path)
        parts = {task: self.adapter.part(path, task) for task in self.adapter.control.tasks}

        def change(x: Tensor, y: Tensor, strength: float) -> Tensor:
            bias = getattr(layer, "bias", None)
            if len(self.chosen) == 1:
                shares = [(parts[task], strength * weight) for task, weight in self.chosen[0].items()]
                if len(shares) == 1:
                    return cast(Tensor, shares[0][0](x, y, bias, shares[0][1]))
                return y + sum(part(x, y, bias, share) - y for part, share in shares)
            found = y
            for task, rows, weights in self.rows(x):
                one = parts[task](x[rows], y[rows], bias) - y[rows]
                share = strength * weights.view(-1, *(1,) * (y.dim() - 1)).to(y.dtype)
                found = found.index_add(0, rows, one * share)
            return found

        return change

    @contextmanager
    def counting(self, transformer: nn.Module) -> Iterator[None]:
        """Count the pictures of every forward: an accelerator may answer a call by two forwards of half of its batch."""
        if len(self.chosen) == 1:
            yield
            return
        inner = transformer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._batch = len(arguments(transformer, args, kwargs)["hidden_states"])
            return inner(*args, **kwargs)

        forward.__wrapped__ = inner  # type: ignore[attr-defined]  # inspect.signature sees the transformer's arguments
        with patched(transformer, "forward", forward):
            yield

    def rows(self, x: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """Return tasks with the rows of x [n B, ...] they act on and their weights there; guidance branches repeat the list."""
        batch, count = self._batch, len(self.chosen)
        if batch % count or len(x) % batch:
            raise Refused(
                f"diffscaler: {count} tasks for a batch of {batch} ({len(x)} in this layer): give one for all, or one a picture"
            )
        key = (len(x), batch, x.device)
        if key not in self._rows:
            each = len(x) // batch
            named = [self.chosen[(row // each) % count] for row in range(len(x))]
            tasks = dict.fromkeys(task for choice in named for task in choice)
            self._rows[key] = [
                (
                    task,
                    torch.tensor([i for i, one in enumerate(named) if task in one], device=x.device),
                    torch.tensor([one[task] for one in named if task in one], device=x.device),
                )
                for task in tasks
            ]
        return self._rows[key]


def joined(transformer: nn.Module, *adapters: DiffScalerAdapter) -> DiffScalerAdapter:
    """Put the tasks of several adapters, trained one by one, into one.

    Raises: Refused if their other settings differ or two tasks have one name.
    """
    if not adapters:
        raise Refused("diffscaler: nothing to join")
    first, names = adapters[0].control, [task for one in adapters for task in one.control.tasks]
    for one in adapters:
        if one.control.replace(tasks=first.tasks) != first:
            raise Refused(f"diffscaler: {one.control} and {first} differ in more than their tasks")
    if len(set(names)) < len(names):
        raise Refused(f"diffscaler: two tasks have one name among {', '.join(names)}")
    weights = {key: x for one in adapters for key, x in one.state_dict().items()}
    made = first.replace(tasks=tuple(names)).load(transformer, weights)
    assert isinstance(made, DiffScalerAdapter)
    return made
