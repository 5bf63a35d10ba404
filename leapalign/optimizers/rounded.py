"""What rules share that round bfloat16 weights stochastically."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.config import OptimizerConfig
from leapalign.parallel.sharding import positions
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
    def step_all(
        self,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        lr: float,
        steps: Sequence[int],
        offsets: Sequence[int],
    ) -> None:
        """Moves ``parameters`` and their moments. Of each, the number of its step, which counts from 1, and the
        position of its first random bits."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        # Every step and parameter draws from positions of its own.
        starts, total = positions(group["params"])
        parameters, gradients, steps, offsets = [], [], [], []
        for parameter, gradient, position in zip(group["params"], self.gradients, starts, strict=True):
            if gradient is not None:
                count = self.state[parameter]["step"]
                count += 1
                parameters.append(parameter)
                gradients.append(gradient)
                steps.append(int(count))
                offsets.append((steps[-1] - 1) * total + position)
        self.step_all(parameters, gradients, group["lr"], steps, offsets)
        point("optimizer")
