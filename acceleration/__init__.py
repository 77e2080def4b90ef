"""Training-free ways to spend less; importing this package registers the methods (torch is all it loads)."""

from acceleration.adaspa import AdaSpa
from acceleration.base import Accelerator, Refused, Run, RunReport, Untouched, accelerated, refusal
from acceleration.delta_cache import DeltaCache
from acceleration.taylor_cache import TaylorCache
from acceleration.xattention import XAttention

__all__ = [
    "Accelerator",
    "AdaSpa",
    "DeltaCache",
    "Refused",
    "Run",
    "RunReport",
    "TaylorCache",
    "Untouched",
    "XAttention",
    "accelerated",
    "refusal",
]
