"""What sparse methods share: which attention calls may be thinned out, what is remembered of each layer, and the account of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from acceleration._sparse import Bits, sparse_attention, tiles
from acceleration.base import Run
from dit.seams import Attending, attention_seam, blocks_of, unseen

FULL = 0.95
"""Part of the tiles from which on dense attention is as good."""
_UNKNOWN_STEPS = 50  # what warm-up fractions are taken of where nobody says how long a run is


class Settings(Protocol):
    """What a sparse method has to say about itself."""

    @property
    def name(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def block(self) -> int: ...
    @property
    def warmup(self) -> float: ...
    @property
    def dense_layers(self) -> int: ...
    @property
    def min_tokens(self) -> int: ...
    @property
    def measure(self) -> bool: ...
    @property
    def neutral(self) -> bool: ...


@dataclass(slots=True)
class Layer:
    """What is known of one attention layer in one branch; masks as bits."""

    mask: Bits | None = None
    lse: Tensor | None = None
    step: int = -1  # of the last search
    dense: str | None = None  # why this layer stays dense
    density: float = 1.0

    @property
    def bytes(self) -> int:
        lse = 0 if self.lse is None else self.lse.numel() * self.lse.element_size()
        return lse + (0 if self.mask is None else self.mask.bytes)


@dataclass(slots=True)
class Row:
    """The account of one attention layer over all branches and steps."""

    layer: str
    kind: str
    tokens: int
    calls: int = 0
    sparse: int = 0
    density: float = 0.0
    recall: float = 0.0
    weighed: int = 0
    reason: str | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"dense": 0.0, "sparse": 0.0, "search": 0.0})
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: means over the calls, milliseconds for each kind of work."""
        for name, start, end in self.spans:  # on a GPU times are only known when it is done
            end.synchronize()
            self.seconds[name] += start.elapsed_time(end) / 1000
        self.spans.clear()
        return {
            "layer": self.layer, "kind": self.kind, "tokens": self.tokens, "calls": self.calls, "sparse": self.sparse,
            "density": self.density / self.sparse if self.sparse else 1.0,
            "recall": self.recall / self.weighed if self.weighed else None,
            "ms": {name: round(spent * 1000, 3) for name, spent in self.seconds.items()},
            "reason": self.reason,
        }  # fmt: skip

    @contextmanager
    def timed(self, name: str, device: torch.device) -> Iterator[None]:
        """Add the time of what happens inside to `name`, without making a GPU wait."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.spans.append((name, start, end))
            return
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun

    def weigh(self, recall: Tensor) -> None:
        """Add a measured recall [B, K]."""
        self.recall += float(recall.mean())
        self.weighed += 1


@dataclass(frozen=True, slots=True)
class Sight:
    """What a method may look at when it chooses tiles: the call, its valid keys [B, M], and the tiles always kept."""

    call: Attending
    keys: Tensor | None
    step: int
    steps: int
    row: Row

    def forced(self, rows: int, block: int) -> tuple[Tensor, Tensor]:
        """Return the query tiles [P] and the key tiles [Q] that hold text or are partly filled: always kept."""
        N, M = self.call.q.shape[2], self.call.k.shape[2]
        device = self.call.q.device
        queries = _touched(tiles(N, rows), rows, N, self.call.query_text, device)
        columns = _touched(tiles(M, block), block, M, self.call.text, device)
        if M % block:
            columns[-1] = True
        return queries, columns

    def full(self, rows: int, block: int) -> str | None:
        """Say so where the tiles that are always kept are nearly all of them: beside a long prompt nothing is left to thin out."""
        queries, columns = (float(one.float().mean()) for one in self.forced(rows, block))
        share = 1 - (1 - queries) * (1 - columns)
        if share < FULL:
            return None
        if any(self.call.text):
            return f"its prompt lies in {share:.0%} of the tiles, which are always kept"
        tokens = self.call.k.shape[2]
        return f"its {tokens} tokens fill none of the tiles of {block} keys, and those that are partly filled are always kept"


Chooses = Callable[[Sight, Layer], Tensor | None]


def _touched(count: int, size: int, length: int, text: tuple[int, int], device: torch.device) -> Tensor:
    touched = torch.zeros(count, dtype=torch.bool, device=device)
    touched[: tiles(text[0], size)] = True
    if text[1]:
        touched[(length - text[1]) // size :] = True
    return touched


class Thinning:
    """Answer every attention call of a transformer: by the tiles that `choose` keeps, or exactly."""

    def __init__(self, settings: Settings, run: Run, choose: Chooses) -> None:
        self.settings, self.run, self.choose = settings, run, choose
        self._rows: dict[str, Row] = run.attention
        self._masks: tuple[Any, str | Tensor | None] = (None, None)
        self._pays: dict[tuple[Any, ...], bool] = {}
        self._order: list[str] = []  # layers that may be thinned out, by their first call

    @contextmanager
    def attached(self, transformer: nn.Module) -> Iterator[None]:
        """Hold the attention of the transformer."""
        try:
            with attention_seam(transformer, self.answer):
                yield
        finally:
            self._masks = (None, None)

    @torch.no_grad()
    def _chosen(self, sight: Sight, layer: Layer) -> Tensor | None:
        return self.choose(sight, layer)

    def answer(self, call: Attending) -> Tensor:
        """Compute one attention call, thinned out where it may be."""
        row = self._rows.get(call.path)
        if row is None:
            row = self._rows[call.path] = Row(call.path, call.kind, call.k.shape[2])
        row.calls += 1
        row.tokens = max(row.tokens, call.k.shape[2])
        keys = self._refusal(call)
        if isinstance(keys, str) or (self.run.call is not None and not self.run.call.moment.known):
            row.reason = keys if isinstance(keys, str) else "the step could not be told"
            return call.exact()
        row.reason = None
        steps, moment = self.run.clock.steps, self.run.call.moment  # type: ignore[union-attr]  # _refusal looked at it
        if steps is None:
            self.run.note(
                f"{self.settings.name}: the number of steps is unknown, so {_UNKNOWN_STEPS} are assumed; give steps="
            )
        count = _UNKNOWN_STEPS if steps is None else steps
        early = moment.step < round(self.settings.warmup * count)
        first = self._place(call.path) < self.settings.dense_layers
        if self.settings.neutral or early or first:
            return self._exact(call, row)
        layers: dict[str, Layer] = self.run.call.state(self, dict)  # type: ignore[union-attr]
        layer = layers.setdefault(call.path, Layer())
        with row.timed("search", call.q.device):
            kept = self._chosen(Sight(call, keys, moment.step, count, row), layer)
        self.run.weigh()
        if kept is None or not self._worth(call, keys, kept, layer.density):
            row.reason = layer.dense or "dense is faster here"
            return self._exact(call, row)
        return self._thinned(call, keys, kept, layer, row)

    def _thinned(self, call: Attending, keys: Tensor | None, kept: Tensor, layer: Layer, row: Row) -> Tensor:
        with row.timed("sparse", call.q.device):
            out = self._sparse(call, keys, kept)
        row.sparse += 1
        row.density += layer.density
        if self.run.call is not None and self.run.call.states:
            self.run.call.states[-1] = "S"
        return out

    def _exact(self, call: Attending, row: Row) -> Tensor:
        with row.timed("dense", call.q.device):
            return call.exact()

    def _sparse(self, call: Attending, keys: Tensor | None, kept: Tensor) -> Tensor:
        settings = self.settings
        return sparse_attention(
            call.q, call.k, call.v, kept, settings.rows, settings.block, keys=keys, scale=call.scale
        )

    def _place(self, path: str) -> int:
        """Return the place of a layer among those that may be thinned out, in the order of their first call."""
        if path not in self._order:
            self._order.append(path)
        return self._order.index(path)

    def _refusal(self, call: Attending) -> str | Tensor | None:
        """Say why a call stays dense, or return its valid keys [B, M] (None: all of them)."""
        keys = call.k.shape[2] if call.k.ndim == 4 and call.q.ndim == 4 else 0
        if call.kind == "cross":
            return "it hears the prompt alone (cross-attention)"
        if keys < self.settings.min_tokens:
            return f"it has {keys} tokens, and min_tokens is {self.settings.min_tokens}"
        if call.causal or call.dropout > 0:
            return "it is causal" if call.causal else "it uses dropout"
        if torch.is_grad_enabled() and (call.q.requires_grad or call.k.requires_grad or call.v.requires_grad):
            return "gradients are wanted"
        if self.run.call is None:
            return "it was called outside of the transformer"
        if call.mask is None:
            return None
        known, found = self._masks
        if known is not call.mask:
            found = valid_keys(call.mask, call.q.shape[0], keys)
            self._masks = (call.mask, found)
        return found

    def _worth(self, call: Attending, keys: Tensor | None, kept: Tensor, density: float) -> bool:
        """Measure once for each shape and density whether sparse is the faster one."""
        if not self.settings.measure:
            return True
        q, k = call.q, call.k
        key = (q.shape[2], k.shape[2], q.shape[1], q.shape[3], q.dtype, round(density, 1))
        if key not in self._pays:
            sparse, dense = _fastest(lambda: self._sparse(call, keys, kept), q), _fastest(call.exact, q)
            self._pays[key] = sparse < dense
            if sparse >= dense:
                self.run.note(
                    f"{self.settings.name}: dense attention is faster at {k.shape[2]} tokens, {q.shape[1]} heads of "
                    f"{q.shape[3]} and density {density:.2f} ({dense * 1e3:.1f} against {sparse * 1e3:.1f} ms), so it stays dense"
                )
        return self._pays[key]


def _fastest(compute: Callable[[], Tensor], near: Tensor, rounds: int = 2) -> float:
    """Return the seconds of the fastest round; the first on a GPU, which may compile, does not count."""
    times = []
    for _ in range(rounds + near.is_cuda):
        if near.is_cuda:
            torch.cuda.synchronize(near.device)
        begun = time.perf_counter()
        compute()
        if near.is_cuda:
            torch.cuda.synchronize(near.device)
        times.append(time.perf_counter() - begun)
    return min(times[-rounds:])


def valid_keys(mask: Tensor, samples: int, length: int) -> Tensor | str | None:
    """Turn a mask into the keys that may be heard [B, M] (None: all), or say why it is more than that."""
    if mask.dtype != torch.bool:
        return "it has an additive mask"
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    found = mask.view(shape) if mask.ndim < 4 else mask
    if found.shape[3] == 1:
        found = found.expand(*found.shape[:3], length)
    plain = all(found.shape[axis] == 1 or found.stride(axis) == 0 for axis in (1, 2))
    if not plain and not bool((found == found[:, :1, :1]).all()):
        return "its mask differs from query to query"
    keys = found[:, 0, 0].expand(samples, length)
    if bool(keys.all()):
        return None
    return keys if bool(keys.any(-1).all()) else "its mask leaves a sample without keys"


def refuses(transformer: nn.Module) -> str | None:
    """Return in words why the attention of a transformer cannot be thinned out, or None."""
    return blocks_of(transformer).reason or unseen(transformer)


def effect(name: str, run: Run) -> str:
    """Say in words how much of the attention was thinned out."""
    rows = list(run.attention.values())
    sparse, eligible = (
        sum(row.sparse for row in rows),
        sum(row.calls for row in rows if row.reason is None or row.sparse),
    )
    if not sparse:
        tried = [row for row in rows if _tried(row)]
        reason = f" ({max(tried, key=lambda row: row.tokens).reason})" if tried else ""
        return f"{name}: every attention call was dense{reason}"
    density = sum(row.density for row in rows) / sparse
    weighed = sum(row.weighed for row in rows)
    recall = f", recall {sum(row.recall for row in rows) / weighed:.3f}" if weighed else ""
    return f"{name}: {sparse} of {eligible} attention calls sparse, density {density:.2f}{recall}"


def _tried(row: Row) -> bool:
    """Whether a layer stayed dense because of what was found when its tiles were looked for."""
    return any(word in (row.reason or "") for word in ("faster", "recall", "tiles"))


def untouched(settings: Settings, run: Run) -> str | None:
    """Return in words why no attention call could be thinned out, or None if one could."""
    rows = list(run.attention.values())
    if settings.neutral or any(row.reason is None or row.sparse for row in rows):
        return None
    if not rows:
        return "none of its attention calls was seen; it does not use scaled_dot_product_attention"
    main = [row for row in rows if row.kind != "cross"]
    if any(map(_tried, rows)):
        return None  # tried, measured and said in the notes
    reasons = dict.fromkeys(row.reason or "" for row in sorted(main or rows, key=lambda row: -row.tokens))
    return "; ".join(list(reasons)[:3])
