"""From gradients to moved weights: update rules by name; `Optimizer`, in its file, clips, schedules and averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from leapalign.config import OptimizerConfig
from leapalign.optimizers import bitsandbytes_adamw
from leapalign.optimizers.adafactor import Adafactor
from leapalign.optimizers.adamw import AdamW
from leapalign.optimizers.adamw_8bit import AdamW8bit


class UpdateRule(Protocol):
    """A `torch.optim.Optimizer` with one parameter group, whose state holds tensors and nothing else."""

    param_groups: list[dict[str, Any]]
    state: Any
    gradients: Sequence[Tensor | None]
    """What the next step takes, of the parameters in order: on the parameter's device, in its dtype or float32."""
    gradient_scale: float
    """Multiplies the gradients of a step: the coefficient that clips their norm."""

    def step(self) -> None: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter], OptimizerConfig, int], Any]] = {
    "adamw": AdamW,
    "adamw_8bit": AdamW8bit,
    "adafactor": Adafactor,
    "bnb_adamw_8bit": bitsandbytes_adamw.resident,
    "bnb_paged_adamw_8bit": bitsandbytes_adamw.paged,
}


def get_optimizer(parameters: Sequence[nn.Parameter], config: OptimizerConfig, seed: int) -> UpdateRule:
    """The rule that ``config`` names, for ``parameters``; ``seed`` is that of stochastic rounding, below 2^64.

    Raises UserError for bfloat16 weights that the rule would round to nearest.
    """
    rule: UpdateRule = OPTIMIZERS[config.name](parameters, config, seed)
    return rule
