"""Relevance of layers: what becomes of a transformer's output when one layer, or what an adapter adds there, is left out.

One measurement serves two ends: RelaCtrl's blocks stand where it is high, and EasyControl is heard only there. Nothing but a
function that runs the transformer is needed, so any checkpoint and any figure of merit will do.

Paper: RelaCtrl: Relevance-Guided Efficient Control for Diffusion Transformers; Cao et al.; 2025; arXiv:2502.14377 (its relevance
    score: a control block is skipped, and two figures of the pictures are put on one scale and averaged).
Differs: any figures, by default the relative difference of the output, which needs no picture; a layer of the transformer itself
    can be left out too, where there is no adapter yet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from control.base import ControlAdapter, Refused
from control.easycontrol import EasyControl
from control.relactrl import RelaCtrl
from dit.seams import Block, Blocks, around_blocks, blocks_of, match, observed, patched, tensor_arguments

Metric = Callable[[Any, Any], float]
"""(what the plain run gave, what the run without the layer gave) -> how much worse, at least 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relevance:
    """What was measured: for each place (index of a block) the figures of the run without it.

    Attributes:
        transformer: name of its class. depth: count of its blocks. left_out: "block" or the name of the control.
        places: indices of the blocks. figures: by name, one figure a place; higher is more relevant.
    """

    transformer: str
    depth: int
    left_out: str
    places: tuple[int, ...]
    figures: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        if not self.places or not self.figures:
            raise ValueError("relevance: nothing was measured")
        for name, values in self.figures.items():
            if len(values) != len(self.places) or not all(math.isfinite(one) for one in values):
                raise ValueError(
                    f"relevance: {name} needs {len(self.places)} finite numbers, one for each place, got {list(values)}"
                )

    @property
    def scores(self) -> tuple[float, ...]:
        """Each figure put on a scale from 0 (least relevant place) to 1, and their mean: one score a place."""
        scaled = [_scaled(values) for values in self.figures.values()]
        return tuple(sum(one) / len(scaled) for one in zip(*scaled, strict=True))

    def chosen(self, count: int) -> tuple[int, ...]:
        """Return the `count` most relevant places, in order of the blocks. Raises: ValueError for more than were measured."""
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(self.places):
            raise ValueError(
                f"relevance: count must be 1 to {len(self.places)}, the places measured, got {count!r}"
            )
        ranked = sorted(zip(self.scores, self.places, strict=True), key=lambda one: (-one[0], one[1]))
        return tuple(sorted(place for _, place in ranked[:count]))

    def relactrl(self, count: int, **settings: Any) -> RelaCtrl:
        """Return RelaCtrl at the most relevant places: few wide groups at the best third, many narrow ones at the last.

        Args:
            settings: further settings. `most_groups` (default 6) is the count at the last third.
        """
        places = self.chosen(count)
        most = int(settings.pop("most_groups", 6))
        by_place = dict(zip(self.places, self.scores, strict=True))
        ranked = sorted(places, key=lambda place: (-by_place[place], place))
        steps = (min(2, most), min(4, most), most)
        groups = {place: steps[3 * rank // count] for rank, place in enumerate(ranked)}
        return RelaCtrl(places=places, groups=tuple(groups[place] for place in places), **settings)

    def pruned(self, control: EasyControl, count: int) -> EasyControl:
        """Return EasyControl heard in the most relevant blocks alone; its pass over the condition ends with the last of them."""
        return control.replace(blocks=self.chosen(count))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, scores included."""
        return {
            "transformer": self.transformer, "depth": self.depth, "left_out": self.left_out, "places": list(self.places),
            "figures": {name: list(values) for name, values in self.figures.items()}, "scores": list(self.scores),
        }  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write the JSON form."""
        file = Path(path)
        file.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return file

    @classmethod
    def read(cls, path: str | Path) -> Relevance:
        """Read what `save` wrote. Raises: FileNotFoundError, ValueError."""
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                transformer=str(given["transformer"]),
                depth=int(given["depth"]),
                left_out=str(given["left_out"]),
                places=tuple(int(one) for one in given["places"]),
                figures={str(k): tuple(float(x) for x in v) for k, v in given["figures"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{Path(path).name} holds no relevance of layers: {error!r}") from error

    def chart(self, chosen: Sequence[int] = ()) -> str:
        """Return a bar chart of the scores as SVG; the places `chosen` are filled darker."""
        step, tall, left, top = 22, 160, 44, 34
        wide = left + step * len(self.places) + 12
        what = "block" if self.left_out == "block" else f"{self.left_out} behind block"
        title = escape(f"{self.transformer}: relevance of each {what}")
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(wide, 320)} {tall + top + 40}" role="img">',
            f'<title>{title}</title><g font-family="sans-serif" font-size="10">',
            f'<text x="8" y="16" font-size="12">{title}</text>',
        ]
        for level in (0.0, 0.5, 1.0):
            y = top + tall * (1 - level)
            parts.append(f'<text x="{left - 8}" y="{y + 3:g}" text-anchor="end">{level:g}</text>')
            parts.append(f'<path d="M{left} {y:g}H{wide - 12}" stroke="#ccc"/>')
        for number, (place, score) in enumerate(zip(self.places, self.scores, strict=True)):
            x, high = left + step * number + 3, tall * score
            fill = "#1f4e79" if place in chosen else "#9dc3e6"
            values = ", ".join(f"{name} {v[number]:.4g}" for name, v in self.figures.items())
            parts.append(
                f'<rect x="{x}" y="{top + tall - high:g}" width="{step - 6}" height="{high:g}" fill="{fill}">'
                f"<title>{escape(f'block {place}: score {score:.3f} ({values})')}</title></rect>"
            )
            parts.append(
                f'<text x="{x + (step - 6) / 2:g}" y="{top + tall + 14}" text-anchor="middle">{place}</text>'
            )
        return "\n".join([*parts, "</g></svg>", ""])


def relative_difference(plain: Tensor, without: Tensor) -> float:
    """Return |without - plain| / |plain|, of all values together."""
    size = float(plain.double().norm())
    return float((without.double() - plain.double()).norm()) / max(size, 1e-12)


def relevance_of_blocks(
    transformer: nn.Module, run: Callable[[], Any], metrics: Mapping[str, Metric] | None = None
) -> Relevance:
    """Measure every block of a transformer by leaving it out: its streams pass unchanged.

    Args:
        run: runs the transformer, once or for whole pictures, always on the same inputs; returns what the metrics look at.
        metrics: by name; the relative difference of tensors if none are given.

    Raises: Refused where a block cannot be left out.
    """
    blocks = blocks_of(transformer)
    if blocks.reason is not None:
        raise Refused(blocks.reason)
    places = _may_be_left_out(transformer, run)
    return _measured(
        transformer, "block", places, run, lambda place: block_left_out(transformer, place), metrics
    )


def relevance_of_control(
    transformer: nn.Module,
    adapter: ControlAdapter,
    run: Callable[[], Any],
    metrics: Mapping[str, Metric] | None = None,
) -> Relevance:
    """Measure every place of an adapter by leaving out what it adds there (RelaCtrl) or what is heard there (EasyControl).

    Args:
        run: runs the transformer under `controlled(...)` with this adapter, always on the same inputs.

    Raises: Refused for an adapter that has no places.
    """
    places = places_of(adapter, transformer)
    return _measured(
        transformer,
        adapter.control.name,
        places,
        run,
        lambda place: place_left_out(adapter, transformer, place),
        metrics,
    )


def places_of(adapter: ControlAdapter, transformer: nn.Module) -> tuple[int, ...]:
    """Return the blocks in which an adapter acts. Raises: Refused for one that has no places."""
    control = adapter.control
    if isinstance(control, RelaCtrl):
        return tuple(control.places or ())
    if isinstance(control, EasyControl):
        return tuple(range(len(blocks_of(transformer)))) if control.blocks is None else tuple(control.blocks)
    raise Refused(f"{control.name} has no places that could be left out one by one")


@contextmanager
def place_left_out(adapter: ControlAdapter, transformer: nn.Module, place: int) -> Iterator[None]:
    """Let an adapter do nothing at one of its places inside."""
    places = places_of(adapter, transformer)
    if place not in places or len(places) == 1:
        raise Refused(f"{adapter.control.name}: place {place} cannot be left out of {list(places)}")
    if isinstance(adapter.control, EasyControl):
        rest = tuple(one for one in places if one != place)
        with patched(adapter, "control", adapter.control.replace(blocks=rest)):
            yield
        return
    silent: Any = adapter.get_submodule(f"blocks.{places.index(place)}")
    whole = silent.forward

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stream, added = whole(*args, **kwargs)
        return stream, torch.zeros_like(
            added
        )  # the control stream goes on: only what is added here is left out

    with patched(silent, "forward", forward):
        yield


@contextmanager
def block_left_out(transformer: nn.Module, place: int) -> Iterator[None]:
    """Let the streams pass a block unchanged inside. The first call inside computes it once, to see the form of its output."""
    block = blocks_of(transformer).blocks[place]
    forms: list[Any] = []

    def around(block: Block, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = tensor_arguments(block.module, args, kwargs)
        if not forms:
            form = match(block.module, inputs, inner(*args, **kwargs))
            if isinstance(form, str):
                raise Refused(f"{block.path} cannot be left out: {form}")
            forms.append(form)
        return forms[0].join(inputs)

    with around_blocks(Blocks((block,)), around):
        yield


def _may_be_left_out(transformer: nn.Module, run: Callable[[], Any]) -> tuple[int, ...]:
    """Return the blocks that run at all. Raises: Refused where one of them does not hand on its streams."""
    with observed(transformer) as visits:
        run()
    streams = {visit.path: visit.streams for visit in visits}
    wrong = next((f"{path}: {found}" for path, found in streams.items() if isinstance(found, str)), None)
    if wrong is not None:
        raise Refused(f"a block cannot be left out: {wrong}")
    return tuple(place for place, block in enumerate(blocks_of(transformer)) if block.path in streams)


@torch.no_grad()
def _measured(
    transformer: nn.Module,
    left_out: str,
    places: Sequence[int],
    run: Callable[[], Any],
    without: Callable[[int], AbstractContextManager[None]],
    metrics: Mapping[str, Metric] | None,
) -> Relevance:
    found = metrics or {"relative difference": relative_difference}
    plain = run()
    figures: dict[str, list[float]] = {name: [] for name in found}
    for place in places:
        with without(place):
            changed = run()
        for name, metric in found.items():
            figures[name].append(float(metric(plain, changed)))
    return Relevance(
        transformer=type(transformer).__name__,
        depth=len(blocks_of(transformer)),
        left_out=left_out,
        places=tuple(places),
        figures={name: tuple(values) for name, values in figures.items()},
    )


def _scaled(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(one - low) / (high - low) if high > low else 0.0 for one in values]
