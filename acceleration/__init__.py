"""Training-free ways to spend less; importing this package registers the methods (torch is all it loads)."""

from acceleration.base import Accelerator, Refused, Run, RunReport, Untouched, accelerated, refusal
from acceleration.delta_cache import DeltaCache

__all__ = ["Accelerator", "DeltaCache", "Refused", "Run", "RunReport", "Untouched", "accelerated", "refusal"]
