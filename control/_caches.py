"""diffusers' own step caches above what is attached: a part that is kept must hold what an adapter added, once."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any


class BeneathCaches(ExitStack):
    """An exit stack whose contexts lie beneath diffusers' step caches: one that is on is put on again above them.

    A cache that was switched on first would keep what a block returned and then have the adapter's part added once more.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer, self.before = transformer, _cache_of(transformer)
        if self.before is not None:
            transformer.disable_cache()

    def enable_caches(self) -> None:
        """Put the cache above what has been entered so far."""
        if self.before is not None:
            self.transformer.enable_cache(self.before)

    def __exit__(self, *about: Any) -> bool:
        config = _cache_of(self.transformer)
        if config is not None:
            self.transformer.disable_cache()
        try:
            return bool(super().__exit__(*about))
        finally:
            config = config or self.before
            if config is not None:
                self.transformer.enable_cache(config)


def _cache_of(transformer: Any) -> Any:
    """The settings of the diffusers cache that is switched on, or None."""
    return transformer.__dict__.get("_cache_config")
