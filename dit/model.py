"""What every Leapfrog network is to diffusers: a model that can be saved, cast, offloaded, adapted, cached and compiled."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from dit.context_parallel import Ranks, Share, refusal, resolved
from dit.embeddings import Rotary
from dit.grid import Grid
from dit.routing import RouteDecision
from dit.segments import Segments
from dit.spec import Spec, parse

Init = TypeVar("Init", bound=Callable[..., None])

BLOCK_GROUPS = "_block_groups"
"""Where a config says which blocks form groups; diffusers leaves keys that begin so out of `__init__`, and saves them."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the slots of a block may know beside its tokens.

    Attributes:
        grid: the places of the picture's tokens, None where the tokens are a prompt's.
        emb: what the block's modulation takes: the conditioning of time and class or prompt, [B, D] or [B, N, D], or the
            vectors that a modulation shares between blocks, [B, S] or [B, N, S].
        time: embedding of the time alone [B, D] or [B, N, D].
        timestep: the time as the network was given it, [B] or [B, N].
        rotary: positions.
        text: text tokens [B, L, D] that a mixer may hear.
        mask: keys that may be heard, broadcast to [B, K, N, M].
        length: how many text tokens stand before the picture's in the sequence at hand.
        residual: the stream before the norm of the perceptron [B, N, D], for experts that look at it.
        route: what the block's router decided for this call.
        segments: which text tokens belong to which of the others, where a clip has several scenes.
        share: which tokens of the sequence this process has, where several share it; then mask and segments are the whole's.
    """

    grid: Grid | None
    emb: Tensor
    time: Tensor | None = None
    timestep: Tensor | None = None
    rotary: Rotary | None = None
    text: Tensor | None = None
    mask: Tensor | None = None
    length: int = 0
    residual: Tensor | None = None
    route: RouteDecision | None = None
    segments: Segments | None = None
    share: Share | None = None
    attention_kwargs: dict[str, Any] = field(default_factory=dict)


class Backbone(
    ModelMixin,
    ConfigMixin,
    PeftAdapterMixin,
    FromOriginalModelMixin,
    CacheMixin,
    AttentionMixin,
):
    """Base of all backbones: diffusers' mixins, and the auxiliary losses that experts and routers leave behind."""

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["pos_embed", "norm"]
    gradient_checkpointing = False

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build the untrained network of a config, its blocks in groups where they were when it was saved."""
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        model = made[0] if return_unused_kwargs else made
        if groups := model.config.get(BLOCK_GROUPS):
            from dit.block_mixture import BlockMixture, group_blocks

            group_blocks(model, {name: BlockMixture(**one) for name, one in groups.items()})
        return made

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Return the named losses (load balance, FLOPs target, ...) that the last forward pass left in its modules, summed."""
        losses: dict[str, Tensor] = {}
        for module in self.modules():
            for name, loss in getattr(module, "auxiliary", {}).items():
                losses[name] = losses[name] + loss if name in losses else loss
        experts = self.config.get("experts")
        if experts is not None:
            from dit.experts.dense import Experts

            losses |= parse(Experts, experts).losses(self)
        return losses

    def enable_parallelism(self, *, config: Any, cp_plan: Any = None) -> None:
        """Share every sequence between the ranks of torch.distributed (diffusers' `ContextParallelConfig`), for inference.

        Raises: ValueError for a network whose slots ranks cannot share, in words.
        """
        reason = refusal(self)
        if reason is not None:
            raise ValueError(reason)
        super().enable_parallelism(config=config, cp_plan=cp_plan)

    def _resolve_parallel_config(self, config: Any) -> Any:
        return resolved(self, config)

    def _among_ranks(
        self, context: Context, x: Tensor, text: Tensor | None = None
    ) -> tuple[Share | None, Context, Tensor, Tensor]:
        """Return who has what of a sequence, and this rank's context, picture and text tokens; all of them in a single process."""
        words = x[:, :0] if text is None else text
        if self._parallel_config is None or context.grid is None:
            return None, context, x, words
        from dit.mixers.full import Mixer

        frames = parse(Mixer, self.config["mixer"]).cut_between == "frames"
        share = Share.of(Ranks.of(self._parallel_config), context.grid, words.shape[1], frames=frames)
        return share, share.context(context), share.cut(x), share.cut_text(words)

    def _run(self, block: nn.Module, **inputs: Any) -> Any:
        """Call a block with keywords, through gradient checkpointing when that is on."""
        if self.gradient_checkpointing and self.training:
            names = list(inputs)

            def positional(*values: Any) -> Any:
                return block(**dict(zip(names, values, strict=True)))

            return self._gradient_checkpointing_func(positional, *inputs.values())
        return block(**inputs)


def register_specs(init: Init) -> Init:
    """Decorate a backbone's `__init__`: its arguments become the saved config, specs as dictionaries."""
    registered = register_to_config(init)
    names = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        registered(self, **{k: v.to_dict() if isinstance(v, Spec) else v for k, v in given.items()})

    return wrapper  # type: ignore[return-value]


def register_block(
    block: type[nn.Module], *, hidden_states: int, encoder_hidden_states: int | None = None
) -> None:
    """Tell diffusers' caches at which places of its output a block returns its streams (0 and None: a bare tensor).

    Not by `TransformerBlockRegistry.register`, which first imports thirty transformers; diffusers does that when a cache is
    switched on.
    """
    metadata = TransformerBlockMetadata(
        return_hidden_states_index=hidden_states, return_encoder_hidden_states_index=encoder_hidden_states
    )
    metadata._cls = block
    TransformerBlockRegistry._registry[block] = metadata
