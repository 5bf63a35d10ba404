"""PyTorch's AdamW, for weights in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.config import OptimizerConfig
from leapalign.inputs.validation import UserError


class AdamW(torch.optim.AdamW):
    """An `UpdateRule` with moments in the dtype of the weights; gradients are those in ``.grad``."""

    gradients: Sequence[Tensor | None] = ()
    gradient_scale = 1.0

    def __init__(self, parameters: Sequence[nn.Parameter], config: OptimizerConfig, seed: int) -> None:
        refuse_rounding_to_nearest(parameters, config)
        betas = (config.beta1, config.beta2)
        super().__init__(parameters, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay)
        # Moments are made at once: a run that does not fit fails before its first iteration.
        for parameter in parameters:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": torch.tensor(0.0), **moments}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        scale(self.gradients, self.gradient_scale)
        super().step(closure)


def scale(gradients: Sequence[Tensor | None], factor: float) -> None:
    """Multiplies ``gradients`` in place."""
    if factor != 1:
        torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], factor)


def refuse_rounding_to_nearest(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> None:
    """Raises UserError for bfloat16 weights, saying how many of them a step of the learning rate would not move."""
    learning_rate = config.learning_rate
    half = [parameter.detach() for parameter in parameters if parameter.dtype == torch.bfloat16]
    if not half:
        return
    # A step below half the distance to the next bfloat16, 2^(exponent - 7), is rounded away.
    stuck = sum(int((learning_rate < torch.exp2(weights.float().frexp().exponent - 9.0)).sum()) for weights in half)
    share = stuck / sum(weights.numel() for weights in half)
    raise UserError(
        f"optimizer.name {config.name} rounds bfloat16 weights to nearest, and a step of {learning_rate:g} would leave "
        f"{share:.0%} of them where they are; choose adamw_8bit or adafactor, which round stochastically, or "
        "model.dtype float32"
    )
