"""Blocks that are left out of a rollout, by the caches of diffusers: on for its steps, and for no other forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from diffusers import CacheMixin, FirstBlockCacheConfig
from diffusers.hooks import HookRegistry
from torch import nn

from leapalign.config import RolloutConfig
from leapalign.inputs.validation import UserError


def require_cache(transformer: nn.Module, config: RolloutConfig) -> None:
    """Raises UserError where ``config`` asks for a cache and ``transformer`` is of a class that has none."""
    if config.cache is not None and not isinstance(transformer, CacheMixin):
        raise UserError(
            f"rollout.cache {config.cache.name} is for FLUX.1, FLUX.2 and Qwen-Image: diffusers has none for "
            f"{type(transformer).__name__}; set rollout.cache to null"
        )


@contextlib.contextmanager
def cached_blocks(transformer: Any, config: RolloutConfig) -> Iterator[None]:
    """Within the block, one rollout's, ``transformer`` leaves blocks out as ``config`` says; after it nothing is left
    of the cache, its memory included."""
    if config.cache is None:
        yield
        return
    own = {module for module in transformer.modules() if "forward" in vars(module)}
    transformer.enable_cache(FirstBlockCacheConfig(threshold=config.cache.threshold))
    try:
        yield
    finally:
        transformer.disable_cache()
        for module in transformer.modules():
            # Diffusers leaves each block its own forward as an attribute, with which a copy would run the original.
            if module not in own:
                vars(module).pop("forward", None)
            if isinstance(vars(module).get("_diffusers_hook"), HookRegistry):
                del module._diffusers_hook


def cache_of(transformer: Any, name: str) -> contextlib.AbstractContextManager[None]:
    """Within the block, a forward's, a cache that is on takes up what the last forward called ``name`` left."""
    if getattr(transformer, "is_cache_enabled", False):
        context: contextlib.AbstractContextManager[None] = transformer.cache_context(name)
        return context
    return contextlib.nullcontext()
