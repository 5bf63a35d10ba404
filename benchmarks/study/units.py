"""Forward units: what a training computes, whatever it runs on.

A forward of the transformer for one sample is one unit, and one with gradient four: itself, once more for what was not
kept, and twice as much backwards. A forward that leaves blocks out counts by the share of blocks that it ran.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WITH_GRADIENT = 4


class Units:
    """Counts in ``total`` what ``transformer`` computes from now on."""

    def __init__(self, transformer: nn.Module) -> None:
        self.total = 0.0
        blocks = [module for module in transformer.modules() if isinstance(getattr(module, "attn", None), nn.Module)]
        for block in blocks:
            block.attn.register_forward_pre_hook(self._counted(1 / len(blocks)), with_kwargs=True)

    def _counted(self, share: float) -> Any:
        def count(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            hidden = options["hidden_states"] if "hidden_states" in options else arguments[0]
            self.total += share * len(hidden) * (WITH_GRADIENT if torch.is_grad_enabled() else 1)

        return count
