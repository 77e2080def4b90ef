"""Training-free ways to spend less; importing this package registers the methods (torch is all it loads)."""

from acceleration.adaspa import AdaSpa
from acceleration.base import Accelerator, Refused, Run, RunReport, Untouched, accelerated, refusal
from acceleration.delta_cache import DeltaCache
from acceleration.guidance_skip import GuidanceSkip
from acceleration.step_forecast import StepForecast
from acceleration.taylor_cache import TaylorCache
from acceleration.token_merge import TokenMerge
from acceleration.xattention import XAttention

__all__ = [
    "Accelerator",
    "AdaSpa",
    "DeltaCache",
    "GuidanceSkip",
    "Refused",
    "Run",
    "RunReport",
    "StepForecast",
    "TaylorCache",
    "TokenMerge",
    "Untouched",
    "XAttention",
    "accelerated",
    "refusal",
]
