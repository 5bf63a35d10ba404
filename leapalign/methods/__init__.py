"""Direct-gradient methods by name. A method draws its indices, turns them into a plan, and weighs the loss."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from leapalign.inputs.validation import UserError, did_you_mean, shortened, validated
from leapalign.methods.draft_k import DRaFTK
from leapalign.methods.draft_lv import DRaFTLV
from leapalign.methods.drtune import DRTune
from leapalign.methods.flowbp_bridge import FlowBPBridge
from leapalign.methods.flowbp_lagrange import FlowBPLagrange
from leapalign.methods.flowbp_sparse import FlowBPSparse
from leapalign.methods.leapalign import LeapAlign
from leapalign.methods.refl import ReFL
from leapalign.rollout import Rollout
from leapalign.surrogate import ConditionedVelocity, SurrogatePlan


class Method(Protocol):
    """One direct-gradient method: a frozen dataclass whose fields are its options.

    N columns: the B samples of a rollout, or those of several draws in turn, column n belonging to sample ``n % B``.
    """

    def draw(self, num_steps: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """All of the method's randomness: named index tensors ``(..., B)`` int64. Raises ValueError for too few
        steps."""
        ...

    def plan(self, sigmas: Tensor, **indices: Tensor) -> SurrogatePlan:
        """The surrogate for the ``sigmas (T + 1,)`` of the trajectory: pure arithmetic."""
        ...

    def trajectory(self, rollout: Rollout, velocity: ConditionedVelocity, **indices: Tensor) -> Rollout:
        """The trajectory that the plan is for: the rollout, or what the method makes of it."""
        ...

    def reward_latents(self, rollout: Rollout, **indices: Tensor) -> Tensor:
        """What is decoded and rewarded, of that trajectory: ``(B, ...)``, or ``(N, ...)`` where draws differ in it."""
        ...

    def loss(
        self, reward: Tensor, threshold: float, rollout: Rollout, **indices: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of ``reward (N,)`` and named diagnostics ``(N,)``."""
        ...


METHODS: dict[str, type[Any]] = {
    "refl": ReFL,
    "draft_lv": DRaFTLV,
    "draft_k": DRaFTK,
    "drtune": DRTune,
    "leapalign": LeapAlign,
    "flowbp_sparse": FlowBPSparse,
    "flowbp_bridge": FlowBPBridge,
    "flowbp_lagrange": FlowBPLagrange,
}


def get_method(name: str, **options: Any) -> Method:
    """The method called ``name``. Raises UserError, naming the nearest valid one, for an unknown name or option."""
    if name not in METHODS:
        raise UserError(f"unknown method '{shortened(name)}'{did_you_mean(name, METHODS)}")
    return validated(METHODS[name], options, f"method '{name}'")
