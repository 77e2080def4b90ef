"""What `benchmarks.peers` measures: prompts, seeds, and for every method a sweep over the settings that matter to it.

Where a method's author names settings, they are in the sweep; the rest spans from nearly exact to clearly broken. What the first
pictures show to be of no use (`benchmarks.peers`, `--screen`) is not measured on all of them, and has no row in the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks._peers_methods import CACHE_DIT, FEWER, OURS, Setting

PROMPTS = (
    "dog, 3d render", "red apple, cartoon", "rocket, flat illustration", "cat, black and white icon",
    "blue heart, 3d render", "cactus, cartoon", "lion, flat illustration", "guitar, black and white icon",
    "pizza, 3d render", "owl, cartoon", "tulip, flat illustration", "skull, black and white icon",
    "teapot, 3d render", "frog, cartoon", "volcano, flat illustration", "rose, black and white icon",
    "cupcake, 3d render", "fox, cartoon", "umbrella, flat illustration", "horse, black and white icon",
    "cherries, 3d render", "sunflower, cartoon", "whale, flat illustration", "crown, black and white icon",
)  # fmt: skip
"""Six of each style. Nothing may be tuned on these."""
SEEDS = (0, 1)
STEPS = (28, 50)
LEVELS = (25.0, 30.0, 35.0, 40.0)


def settings(steps: int, extra: tuple[str, ...] = ()) -> list[Setting]:
    """Return every setting tried at a step count, the exact run not among them; `extra` are further ones of ours, as text."""
    found = [*_fewer(steps), *_diffusers(steps), *_cache_dit(steps), *_ours(steps)]
    found += [Setting.of(f"{OURS} {text.partition(':')[0]}", steps, set=text) for text in extra]
    return list({one.key: one for one in found}.values())


def _fewer(steps: int) -> Iterator[Setting]:
    counts = (3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 20, 24, 28, 33, 40)
    for count in counts:
        if count < steps:
            yield Setting.of(FEWER, steps, steps=count)


def _diffusers(steps: int) -> Iterator[Setting]:
    given: dict[str, Any]
    for threshold in (0.08, 0.15, 0.2, 0.25, 0.3, 0.4, 0.55, 0.75):
        yield Setting.of("FirstBlockCache", steps, threshold=threshold)
    for order, before in ((1, 3), (2, 6)):
        for interval in (2, 3, 4, 5):
            given = {"cache_interval": interval, "max_order": order, "disable_cache_before_step": before}
            yield Setting.of("TaylorSeer", steps, **given)
        for interval in (2, 3, 4, 5, 6):
            given = {"cache_interval": interval, "max_order": order, "disable_cache_before_step": 3}
            yield Setting.of("TaylorSeer", steps, use_lite_mode=True, **given)
    for threshold, most in ((0.06, 3), (0.12, 3), (0.24, 4), (0.5, 5), (1.0, 6), (2.0, 8)):
        for retention in (0.1, 0.2):
            given = {"threshold": threshold, "max_skip_steps": most, "retention_ratio": retention}
            yield Setting.of("MagCache", steps, **given)
    for span, skips in (((100, 800), (2, 3, 6)), ((-1, 1001), (2, 4, 6))):
        for skip in skips:
            yield Setting.of(
                "PyramidAttentionBroadcast",
                steps,
                spatial_attention_block_skip_range=skip,
                spatial_attention_timestep_skip_range=span,
            )
    for skip, until, without, away in (
        (2, 681, 2, 641), (2, 681, 5, 641), (3, 901, 5, 901), (4, 1001, 6, 1001), (6, 1001, 8, 1001),
    ):  # fmt: skip
        yield Setting.of(
            "FasterCache",
            steps,
            spatial_attention_block_skip_range=skip,
            spatial_attention_timestep_skip_range=(-1, until),
            unconditional_batch_skip_range=without,
            unconditional_batch_timestep_skip_range=(-1, away),
        )


def _cache_dit(steps: int) -> Iterator[Setting]:
    for order in (0, 1, 2):
        method = CACHE_DIT[1] if order else CACHE_DIT[0]
        base = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 3} | (
            {"order": order} if order else {}
        )
        for threshold in (0.12, 0.24, 0.4, 0.6):
            yield Setting.of(method, steps, residual_diff_threshold=threshold, **base)
        for most in (1, 2, 3, 4, 6):
            yield Setting.of(
                method, steps, residual_diff_threshold=2.0, max_continuous_cached_steps=most, **base
            )
        for policy in ("slow", "medium", "fast", "ultra"):
            yield Setting.of(method, steps, policy=policy, steps_computation_policy="static", **base)
        if order < 2:
            yield Setting.of(method, steps, residual_diff_threshold=0.24, lists=2, **base)
            yield Setting.of(method, steps, residual_diff_threshold=0.24, **(base | {"max_warmup_steps": 8}))


FITTED = {28: (3, 4, 5, 6, 7, 8, 9, 10, 12, 14), 50: (3, 4, 5, 6, 7, 8, 10, 12, 15)}
"""Full steps of the fitted step forecasts, by step count."""
TRAINED_ON = 24
"""Pictures that step forecasts are fitted to: concepts that are in none of the prompts."""


def training_prompts(concepts: Iterable[str], styles: Iterable[str]) -> list[str]:
    """Return what the fit sees: concepts of the card that no prompt above names, spread evenly, in the styles in turns."""
    named = " ".join(PROMPTS).lower()
    free = [one for one in concepts if not any(word in named for word in one.lower().split())]
    chosen = [free[(2 * place + 1) * len(free) // (2 * TRAINED_ON)] for place in range(TRAINED_ON)]
    looks = list(styles)
    return [f"{one}, {looks[place % len(looks)]}" for place, one in enumerate(chosen)]


def _ours(steps: int) -> Iterator[Setting]:
    texts = ["delta-cache", "delta-cache:interval=3", "delta-cache:interval=4,cached_fraction=0.9"]
    texts += [f"delta-cache:mode=whole,interval={interval}" for interval in (2, 3, 4)]
    texts += [f"taylor-cache:interval={every}" for every in (2, 3, 4, 5)]
    texts += [f"taylor-cache:interval={every},order=1,fresh=0" for every in (2, 3, 4)]
    texts += ["taylor-cache:interval=2,order=2,fresh=0"]
    for gate, thresholds in (
        ("confidence", (0.1, 0.3)),
        ("first-block", (0.15, 0.4)),
        ("spectral", (0.1, 0.2, 0.4)),
    ):
        texts += [f"taylor-cache:gate={gate},threshold={threshold}" for threshold in thresholds]
    texts += [f"step-forecast:interval={interval}" for interval in (2, 3, 4, 5)]
    texts += ["step-forecast:interval=3,order=2", "step-forecast:interval=3,variable=logit"]
    for text in texts:
        yield Setting.of(f"{OURS} {text.partition(':')[0]}", steps, set=text)
