"""What rules share that step a parameter at a time and round bfloat16 weights stochastically."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.config import OptimizerConfig
from leapalign.storage.faults import point


class RoundedOptimizer(torch.optim.Optimizer):
    """An `UpdateRule` in float32: gradients of bfloat16 parameters may come in float32, and are scaled in it.

    State of a parameter: the number of its steps, and the moments of the rule.
    """

    gradients: Sequence[Tensor | None] = ()
    gradient_scale = 1.0

    def __init__(self, parameters: Sequence[nn.Parameter], config: OptimizerConfig, seed: int) -> None:
        super().__init__(parameters, {"lr": config.learning_rate})
        self.config, self.seed = config, seed
        # Moments are made at once: a run that does not fit fails before its first iteration.
        for parameter in parameters:
            self.state[parameter] = {"step": torch.tensor(0), **self.new_moments(parameter)}

    @abstractmethod
    def new_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The moments before the first step, on the parameter's device."""

    @abstractmethod
    def step_one(self, parameter: nn.Parameter, gradient: Tensor, lr: float, step: int, offset: int) -> None:
        """Moves ``parameter`` and its moments; ``step`` counts from 1, random bits are those from ``offset`` on."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        # Every step and parameter draws from positions of its own.
        total, position = sum(parameter.numel() for parameter in group["params"]), 0
        for parameter, gradient in zip(group["params"], self.gradients, strict=True):
            if gradient is not None:
                count = self.state[parameter]["step"]
                count += 1
                step = int(count)
                self.step_one(parameter, gradient, group["lr"], step, (step - 1) * total + position)
            position += parameter.numel()
            point("optimizer")
