"""The methods that `benchmarks.peers` compares, each attached to one loaded pipeline through its own public door.

Paper: First Block Cache (ParaAttention, 2025); TaylorSeer, arXiv:2503.06923; MagCache, arXiv:2506.09045; PAB, arXiv:2408.12588;
FasterCache, arXiv:2410.19355; DBCache (cache-dit, 2025).
Differs: nothing of theirs is written again here: diffusers' caches come from diffusers and are enabled on the transformer,
cache-dit's from cache-dit by its BlockAdapter. Both forget a picture when the pipeline's call ends, as their documents ask.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from acceleration.base import Accelerator, accelerated
from dit.spec import parse


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """A method, what it is set to, and how many steps the run it stands in for has."""

    method: str
    given: tuple[tuple[str, Any], ...]
    steps: int

    @classmethod
    def of(cls, method: str, steps: int, /, **given: Any) -> Setting:
        return cls(method, tuple(given.items()), steps)

    @property
    def values(self) -> dict[str, Any]:
        """The settings by name."""
        return dict(self.given)

    @property
    def run_steps(self) -> int:
        """Steps that are really taken: fewer only where that is the method."""
        return int(self.values["steps"]) if self.method == FEWER else self.steps

    @property
    def words(self) -> str:
        """The settings in words, one line."""
        return ", ".join(f"{name}={value}" for name, value in self.given)

    @property
    def key(self) -> str:
        """A text that tells this setting from every other."""
        return json.dumps([self.method, self.steps, *self.given], default=str)


EXACT, FEWER, OURS = "exact", "fewer steps", "leapfrog"
CACHE_DIT = ("cache-dit DBCache", "cache-dit DBCache + TaylorSeer")
DIFFUSERS = ("FirstBlockCache", "TaylorSeer", "MagCache", "PyramidAttentionBroadcast", "FasterCache")

CALIBRATION = (
    "penguin, flat illustration", "strawberry, 3d render", "key, cartoon", "wolf, black and white icon",
    "sailboat, cartoon", "melon, 3d render", "crab, flat illustration", "bell, black and white icon",
)  # fmt: skip
"""What MagCache's ratios are taken from: none of these is measured."""


def own(method: str) -> bool:
    """Whether a method is one of this project's."""
    return method.startswith(OURS)


def absent(method: str) -> str | None:
    """Return in words why a method cannot be measured here, or None if it can."""
    if method in CACHE_DIT and importlib.util.find_spec("cache_dit") is None:
        return "not installed"
    return None


def version(method: str) -> str:
    """Return package and version a method comes from."""
    if method in CACHE_DIT:
        return f"cache-dit {importlib.metadata.version('cache-dit')}"
    return f"diffusers {importlib.metadata.version('diffusers')}" if method in DIFFUSERS else OURS


@contextlib.contextmanager
def attached(pipeline: Any, setting: Setting, guidance: float) -> Iterator[None]:
    """Attach a method to the pipeline for as many pictures as one likes; each call of the pipeline is a run of its own."""
    if setting.method in (EXACT, FEWER):
        yield
    elif own(setting.method):
        methods = [parse(Accelerator, one) for one in str(setting.values["set"]).split(" + ")]
        with accelerated(pipeline.transformer, *methods, steps=setting.steps):
            yield
    elif setting.method in CACHE_DIT:
        with _cache_dit(pipeline, setting):
            yield
    else:
        pipeline.transformer.enable_cache(_config(pipeline, setting, guidance))
        try:
            yield
        finally:
            pipeline.transformer.disable_cache()


def _config(pipeline: Any, setting: Setting, guidance: float) -> Any:
    from diffusers import (
        FasterCacheConfig,
        FirstBlockCacheConfig,
        PyramidAttentionBroadcastConfig,
        TaylorSeerCacheConfig,
    )
    from diffusers.hooks import MagCacheConfig

    given = setting.values
    if setting.method == "FirstBlockCache":
        return FirstBlockCacheConfig(**given)
    if setting.method == "TaylorSeer":
        return TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, **given)
    if setting.method == "MagCache":
        ratios = _ratios(pipeline, setting.steps, guidance)
        return MagCacheConfig(num_inference_steps=setting.steps, mag_ratios=ratios, **given)
    if setting.method == "PyramidAttentionBroadcast":
        return PyramidAttentionBroadcastConfig(current_timestep_callback=_clock(pipeline), **given)
    if setting.method == "FasterCache":
        split = [
            "hidden_states",
            "encoder_hidden_states",
            "timestep",
            "pooled_projections",
            "encoder_attention_mask",
        ]
        return FasterCacheConfig(
            tensor_format="BCHW",
            current_timestep_callback=_clock(pipeline),
            attention_weight_callback=lambda _: 0.3,
            _unconditional_conditional_input_kwargs_identifiers=split,
            **given,
        )
    raise ValueError(
        f"method must be one of {', '.join((EXACT, FEWER, *DIFFUSERS, *CACHE_DIT))}, got {setting.method!r}"
    )


def _clock(pipeline: Any) -> Callable[[], float]:
    """Return a function that gives the timestep of the step in progress, on 0-1000."""
    scheduler = pipeline.scheduler
    return lambda: float(scheduler.timesteps[scheduler.step_index or 0])


_known_ratios: dict[tuple[int, int], list[float]] = {}


def _ratios(pipeline: Any, steps: int, guidance: float) -> list[float]:
    """Return MagCache's ratios of a step count: the mean over runs of other prompts in diffusers' calibration mode.

    That mode prints its ratios and keeps none, so they are read from what it prints.
    """
    key = (id(pipeline), steps)
    if key not in _known_ratios:
        from diffusers.hooks import MagCacheConfig

        found = []
        for seed, prompt in enumerate(CALIBRATION):
            pipeline.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
            printed = io.StringIO()
            try:
                with contextlib.redirect_stdout(printed):
                    pipeline(
                        prompt=prompt,
                        seeds=[seed],
                        num_inference_steps=steps,
                        guidance_scale=guidance,
                        output_type="latent",
                    )
            finally:
                pipeline.transformer.disable_cache()
            found.append(ast.literal_eval(printed.getvalue().strip().splitlines()[-1]))
        _known_ratios[key] = [sum(column) / len(column) for column in zip(*found, strict=True)]
    return _known_ratios[key]


@contextlib.contextmanager
def _cache_dit(pipeline: Any, setting: Setting) -> Iterator[None]:
    """Attach DBCache by a BlockAdapter that holds the pipeline: cache-dit then starts anew with each of its calls.

    Both kinds of blocks are one list, which is how cache-dit itself takes FLUX; or each has a cache of its own (`lists=2`).
    """
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    import cache_dit  # type: ignore[import-not-found,unused-ignore]
    from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig

    given, transformer = setting.values, pipeline.transformer
    lists, order, policy = given.pop("lists", 1), given.pop("order", 0), given.pop("policy", None)
    pair = (transformer.transformer_blocks, transformer.single_transformer_blocks)
    blocks: dict[str, Any] = {"blocks": list(pair), "forward_pattern": [ForwardPattern.Pattern_1] * 2}
    if lists == 1:
        blocks = {
            "blocks": torch.nn.ModuleList([*pair[0], *pair[1]]),
            "blocks_name": "transformer_blocks",
            "dummy_blocks_names": ["single_transformer_blocks"],
            "forward_pattern": ForwardPattern.Pattern_1,
        }
    if policy is not None:
        given["steps_computation_mask"] = cache_dit.steps_mask(mask_policy=policy, total_steps=setting.steps)
    adapter = cache_dit.enable_cache(
        BlockAdapter(pipe=pipeline, transformer=transformer, has_separate_cfg=False, **blocks),
        cache_config=DBCacheConfig(num_inference_steps=setting.steps, **given),
        calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None,
    )
    try:
        yield
    finally:
        cache_dit.disable_cache(adapter)
