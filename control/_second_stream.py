"""A second stream of picture and text beside a transformer's own: its blocks once more, with some parts replaced.

A *twin* of a block runs the class's own forward with other parts in it (norms, attention) and shares the rest (the
perceptrons); so each family's block is written once, where it is. Hooks and patches that hang on the original are not
taken over: what accelerates the main stream does not touch this one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from control._backbones import Facts, Place, facts_of
from control.base import Refused
from dit.attention import attend
from dit.embeddings import Rotary, rotate
from dit.grid import Grid

THETA = 10000.0
_OUTER = ("forward", "_compiled_call_impl", "_diffusers_hook", "_hf_hook", "_old_forward")
Part = Callable[[str], Callable[[Tensor], Tensor] | None]


def twin(module: nn.Module, **parts: nn.Module) -> Any:
    """Return a module of the same class that shares everything with `module` but `parts`, without what hangs on it."""
    made: Any = object.__new__(type(module))
    nn.Module.__init__(made)
    fresh = set(made.__dict__)
    made.__dict__.update({k: v for k, v in module.__dict__.items() if k not in fresh and k not in _OUTER})
    made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
    made._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    made._modules = {**module._modules, **parts}
    made.training = module.training
    return made


def own(module: nn.Module, dtype: torch.dtype) -> Any:
    """Return a copy of a module with weights of its own (the same values), without what hangs on the original.

    Weights kept in fp8, which are cast when their layer is called, are copied in `dtype`.
    """
    module = _beneath_adapters(module)
    made = twin(module, **{k: own(v, dtype) for k, v in module._modules.items() if v is not None})
    for name, weight in module._parameters.items():
        if weight is not None:
            x = weight.detach().clone()
            made._parameters[name] = nn.Parameter(x.to(dtype) if x.dtype.itemsize == 1 else x)
    made._buffers = {k: None if v is None else v.clone() for k, v in module._buffers.items()}
    return made


def _beneath_adapters(module: nn.Module) -> nn.Module:
    """The layer itself, where peft stands around it."""
    layer: Any = module
    found: nn.Module = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return found


def part_at(owner: Any, path: str) -> Any:
    """Return the module at a dotted path below `owner`, or None."""
    for name in path.split("."):
        owner = None if owner is None else owner._modules.get(name)
    return owner


class Form(ABC):
    """What a second stream must know of a family beside `Facts`: names of its parts, its conditioning, a block's call."""

    embedders: ClassVar[tuple[str, ...]]
    dual: ClassVar[tuple[str, ...]]
    single: ClassVar[tuple[str, ...]]
    text_first = True
    alone = False  # whether the attention of a block without text output returns the picture alone

    def parts(self, place: Place) -> tuple[str, ...]:
        """Return the parts of a block, beside its attention, that a stream with weights of its own has for itself."""
        names = self.single if place.kind == "single" else self.dual
        return tuple(name for name in names if getattr(place.block, name, None) is not None)

    def embed(self, facts: Facts, model: Any, latent: Tensor, where: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, C, H, W] -> tokens [B, N, D] at positions `where` [N, 3] beside a picture of `grid` tokens."""
        return facts.embed(model, latent, where, grid)

    @abstractmethod
    def conditioning(
        self, model: Any, time: Tensor, pooled: Tensor, guidance: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Return what modulates a stream, for times as the transformer is given them [B]."""

    @abstractmethod
    def call(
        self, block: Any, image: Tensor, text: Tensor, emb: Tensor, time: Tensor, own: Grid
    ) -> tuple[Any, Tensor]:
        """Run a (twin of a) block; return text (None where it has none any more) and image."""


class FluxForm(Form):
    """diffusers' FLUX.1: times from 0 to 1."""

    embedders = ("x_embedder", "context_embedder", "time_text_embed")
    dual = ("norm1", "norm1_context")
    single = ("norm",)

    def conditioning(
        self, model: Any, time: Tensor, pooled: Tensor, guidance: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        scales = () if guidance is None else (guidance.to(dtype) * 1000,)
        emb: Tensor = model.time_text_embed(time.to(dtype) * 1000, *scales, pooled)
        return emb

    def call(
        self, block: Any, image: Tensor, text: Tensor, emb: Tensor, time: Tensor, own: Grid
    ) -> tuple[Any, Tensor]:
        found: tuple[Any, Tensor] = block(hidden_states=image, encoder_hidden_states=text, temb=emb)
        return found


class SD3Form(Form):
    """diffusers' Stable Diffusion 3 and 3.5."""

    embedders = ("pos_embed", "context_embedder", "time_text_embed")
    dual = ("norm1", "norm1_context")
    single = ()
    text_first = False

    def embed(self, facts: Facts, model: Any, latent: Tensor, where: Tensor, grid: tuple[int, int]) -> Tensor:
        side = model.pos_embed.patch_size
        if (latent.shape[2] // side, latent.shape[3] // side) == grid:
            tokens: Tensor = model.pos_embed(latent)  # the table itself, not read between its places
            return tokens
        return facts.embed(model, latent, where, grid)

    def conditioning(
        self, model: Any, time: Tensor, pooled: Tensor, guidance: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        emb: Tensor = model.time_text_embed(time, pooled)
        return emb

    def call(
        self, block: Any, image: Tensor, text: Tensor, emb: Tensor, time: Tensor, own: Grid
    ) -> tuple[Any, Tensor]:
        found: tuple[Any, Tensor] = block(hidden_states=image, encoder_hidden_states=text, temb=emb)
        return found


class MMDiTForm(Form):
    """Our MMDiT."""

    embedders = (
        "x_embedder", "context_embedder", "time_embed", "guidance_embed", "text_embed", "modulation_shared",
    )  # fmt: skip
    dual = ("modulation", "modulation_context")
    single = ("modulation",)
    alone = True

    def conditioning(
        self, model: Any, time: Tensor, pooled: Tensor, guidance: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        emb: Tensor = model.embed_time(time, dtype)
        if model.guidance_embed is not None and guidance is not None:
            emb = emb + model.guidance_embed(guidance * 1000, dtype)
        if model.text_embed is not None:
            emb = emb + model.text_embed(pooled)
        return emb if model.modulation_shared is None else model.modulation_shared(emb)

    def call(
        self, block: Any, image: Tensor, text: Tensor, emb: Tensor, time: Tensor, own: Grid
    ) -> tuple[Any, Tensor]:
        from dit.model import Context

        context = Context(own, emb, timestep=time)
        found: tuple[Any, Tensor] = block(
            hidden_states=image, encoder_hidden_states=text, temb=emb, context=context
        )
        return found


_FORMS: Mapping[str, Form] = {
    "FluxTransformer2DModel": FluxForm(),
    "SD3Transformer2DModel": SD3Form(),
    "MMDiT": MMDiTForm(),
}


def form_of(transformer: nn.Module) -> Form | str:
    """Return the form of a transformer's family, or in words why there is none."""
    for cls in type(transformer).__mro__:
        if cls.__name__ in _FORMS:
            return _FORMS[cls.__name__]
    return f"no second stream is known for {type(transformer).__name__}; known are {', '.join(_FORMS)}"


def known(owner: str, transformer: nn.Module) -> tuple[Facts, Form]:
    """Return facts and form of a transformer. Raises: Refused where there are none."""
    facts, form = facts_of(transformer), form_of(transformer)
    if isinstance(facts, str) or isinstance(form, str):
        raise Refused(f"{owner}: {facts if isinstance(facts, str) else form}")
    return facts, form


def angles(facts: Facts, transformer: Any, where: Tensor) -> Rotary:
    """Return cosines and sines [N, head size] of positions (frame, row, column) [N, 3].

    Where the transformer does not rotate, rows turn the first half of the channels and columns the second.
    """
    found = facts.angles(transformer, where)
    if found is not None:
        return found
    half = head_size(facts.places(transformer)[0]) // 2
    kind = torch.float32 if where.device.type == "mps" else torch.float64
    powers = THETA ** -(torch.arange(0, half, 2, dtype=kind, device=where.device) / half)
    turned = torch.cat([where[:, axis : axis + 1].to(kind) * powers for axis in (1, 2)], dim=1)
    turned = turned.repeat_interleave(2, dim=1)
    return turned.cos().float(), turned.sin().float()


def head_size(place: Place) -> int:
    """Return the channels of one head."""
    return int(place.attn.to_k.out_features) // int(place.attn.heads)


class StreamEnds(Exception):
    """No error: a stream has all that was wanted of it."""


class StreamAttention(nn.Module):
    """The attention of a second stream: parts by diffusers' names, rotated, its keys and values kept.

    Args:
        part: gives the map or norm of a name, None where there is none. table: angles of text, then picture.
        alone: return the picture alone where the text has no map out. last: stop the stream at keys and values.
    """

    def __init__(
        self, part: Part, heads: int, table: Rotary | None, *, alone: bool = False, last: bool = False
    ) -> None:
        super().__init__()
        self.part, self.heads, self.table, self.alone, self.last = part, heads, table, alone, last
        self.kept: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Any:
        """[B, N, D] (and text [B, L, D]) -> the same after attention."""
        k, v = self._mapped("to_k", "norm_k", hidden_states), self._mapped("to_v", None, hidden_states)
        words = 0
        if encoder_hidden_states is not None:
            words = encoder_hidden_states.shape[1]
            k = torch.cat([self._mapped("add_k_proj", "norm_added_k", encoder_hidden_states), k], dim=1)
            v = torch.cat([self._mapped("add_v_proj", None, encoder_hidden_states), v], dim=1)
        k = k if self.table is None else rotate(k, self.table)
        self.kept = (k.transpose(1, 2), v.transpose(1, 2))
        if self.last:
            raise StreamEnds
        q = self._mapped("to_q", "norm_q", hidden_states)
        answered = encoder_hidden_states is not None and self.part("to_add_out") is not None
        if answered:
            assert encoder_hidden_states is not None
            q = torch.cat([self._mapped("add_q_proj", "norm_added_q", encoder_hidden_states), q], dim=1)
        if self.table is not None:
            first = k.shape[1] - q.shape[1]
            q = rotate(q, (self.table[0][first:], self.table[1][first:]))
        heard = attend(q, k, v).flatten(2).to(hidden_states.dtype)
        if encoder_hidden_states is None:
            return self._out("to_out.0", heard)
        if not answered:
            image = self._out("to_out.0", heard)
            return image if self.alone else (image, encoder_hidden_states)
        return self._out("to_out.0", heard[:, words:]), self._out("to_add_out", heard[:, :words])

    def _mapped(self, name: str, norm: str | None, x: Tensor) -> Tensor:
        layer = self.part(name)
        assert layer is not None, name
        mapped = layer(x).unflatten(-1, (self.heads, -1))
        found = None if norm is None else self.part(norm)
        return mapped if found is None else found(mapped)

    def _out(self, name: str, x: Tensor) -> Tensor:
        layer = self.part(name)
        return x if layer is None else layer(x)


@dataclass(frozen=True, slots=True)
class StreamStep:
    """What the stream has in one block: keys and values [B, K, L + N, head size], and text and image after it."""

    place: Place
    k: Tensor
    v: Tensor
    text: Tensor | None
    image: Tensor | None


class SecondStream:
    """Run a picture [B, C, H, W] and a text [B, L, J] through the twins of a transformer's blocks.

    Args:
        model: the transformer, or its twin with other embedders. parts: other parts of a block (its attention is not
            among them). attention: what gives the parts of the attention called so (attn, attn2) in a block, None for the
            block's own.
        grid: rows and columns of the picture that is made. where: positions [N, 3] of the condition's tokens on it.
    """

    def __init__(
        self,
        facts: Facts,
        form: Form,
        transformer: nn.Module,
        model: Any,
        *,
        parts: Callable[[Place], Mapping[str, nn.Module]],
        attention: Callable[[Place, str], Part | None],
    ) -> None:
        self.facts, self.form, self.transformer, self.model = facts, form, transformer, model
        self.parts, self.attention = parts, attention

    def steps(
        self,
        latent: Tensor,
        words: Tensor,
        *,
        time: Tensor,
        pooled: Tensor,
        guidance: Tensor | None,
        grid: tuple[int, int],
        where: Tensor,
        dtype: torch.dtype,
        whole: bool = False,
    ) -> Iterator[StreamStep]:
        """Yield the blocks in order; in the last one nothing is computed beyond keys and values, unless `whole`."""
        patch = self.facts.patch(self.transformer)
        grid_own = Grid(1, latent.shape[2] // patch, latent.shape[3] // patch)
        image: Any = self.form.embed(self.facts, self.model, latent.to(dtype), where, grid)
        text: Any = self.model.context_embedder(words.to(dtype))
        emb = self.form.conditioning(self.model, time, pooled.to(dtype), guidance, dtype)
        count = text.shape[1]
        table = angles(self.facts, self.transformer, torch.cat([where.new_zeros(count, 3), where]))
        places = self.facts.places(self.transformer)
        for place in places:
            block, attn = self._twin(place, table, last=place is places[-1] and not whole)
            try:
                text, image = self.form.call(block, image, text, emb, time, grid_own)
            except StreamEnds:
                text = image = None
            assert attn.kept is not None
            yield StreamStep(place, *attn.kept, text, image)

    def _twin(self, place: Place, table: Rotary, *, last: bool) -> tuple[nn.Module, StreamAttention]:
        parts = dict(self.parts(place))
        part = self.attention(place, "attn")
        assert part is not None
        heads = int(place.attn.heads)
        attn = StreamAttention(part, heads, table, alone=self.form.alone, last=last)
        parts["attn"] = attn
        second = self.attention(place, "attn2")
        if second is not None:
            parts["attn2"] = StreamAttention(second, heads, None)  # it turns nothing, as released
        return twin(place.block, **parts), attn
