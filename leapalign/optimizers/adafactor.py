"""Adafactor (Shazeer and Stern, 2018, arXiv:1804.04235): second moments as outer products, and no first ones.

    R = beta R + (1 - beta) mean_columns(g^2),    C = beta C + (1 - beta) mean_rows(g^2),    beta = 1 - step^-0.8
    u = g / sqrt(R C^T / mean(R)),    change = lr u / max(1, rms(u)) + lr weight_decay parameter

The arithmetic is that of `transformers.Adafactor` with a given learning rate; vectors keep whole second moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from leap_kernels import stochastic_round_
from torch import Tensor, nn

from leapalign.optimizers.rounded import RoundedOptimizer


class Adafactor(RoundedOptimizer):
    """A float32 number of moments for every row and column of a matrix, of its last two dimensions."""

    def new_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        shape = parameter.shape
        if len(shape) < 2:
            return {"exp_avg_sq": parameter.new_zeros(shape, dtype=torch.float32)}
        return {
            "exp_avg_sq_row": parameter.new_zeros(shape[:-1], dtype=torch.float32),
            "exp_avg_sq_col": parameter.new_zeros(shape[:-2] + shape[-1:], dtype=torch.float32),
        }

    def step_all(
        self,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        lr: float,
        steps: Sequence[int],
        offsets: Sequence[int],
    ) -> None:
        for parameter, gradient, step, offset in zip(parameters, gradients, steps, offsets, strict=True):
            self._step(parameter, gradient, lr, step, offset)

    def _step(self, parameter: nn.Parameter, gradient: Tensor, lr: float, step: int, offset: int) -> None:
        # The library steps from zero, and without decay: what it leaves is the whole change, however small beside the
        # weight. Both meet the weight together, in one rounding.
        change = torch.zeros_like(parameter, dtype=torch.float32)
        change.grad = gradient.float() * self.gradient_scale
        library = transformers.Adafactor([change], lr=lr, scale_parameter=False, relative_step=False)
        # It changes moments in place, and counts the step itself.
        library.state[change] = {**self.state[parameter], "step": step - 1}
        library.step()
        old = parameter.float()
        stepped = change.sub_(old, alpha=lr * self.config.weight_decay).add_(old)
        if parameter.dtype == torch.bfloat16:
            stochastic_round_(parameter, stepped, self.seed, offset)
        else:
            parameter.copy_(stepped)
