"""Direct-gradient methods by name. A method draws its indices, turns them into a plan, and weighs the loss."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from leapalign.methods.leapalign import LeapAlign
from leapalign.rollout import Rollout
from leapalign.surrogate import SurrogatePlan
from leapalign.validation import UserError, did_you_mean, validated


class Method(Protocol):
    """One direct-gradient method: a frozen dataclass whose fields are its options."""

    def draw(self, num_steps: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """All of the method's randomness: named index tensors ``(B,)`` int64."""
        ...

    def plan(self, sigmas: Tensor, **indices: Tensor) -> SurrogatePlan:
        """The surrogate for ``sigmas (T + 1,)``: pure arithmetic."""
        ...

    def loss(
        self, reward: Tensor, threshold: float, rollout: Rollout, **indices: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of ``reward (B,)`` and named per-sample diagnostics ``(B,)``."""
        ...


METHODS: dict[str, type[Any]] = {"leapalign": LeapAlign}


def get_method(name: str, **options: Any) -> Method:
    """The method called ``name``. Raises UserError, naming the nearest valid one, for an unknown name or option."""
    if name not in METHODS:
        raise UserError(f"unknown method '{name}'{did_you_mean(name, METHODS)}")
    return validated(METHODS[name], options, f"method '{name}'")
