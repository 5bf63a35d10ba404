"""AdamW with bitsandbytes' 8-bit moments, and weights rounded stochastically, decay included."""

from __future__ import annotations

from collections.abc import Sequence

from leap_kernels import Adam8bitState, adamw_8bit_step_many_
from torch import Tensor, nn

from leapalign.optimizers.rounded import RoundedOptimizer

_EPS = 1e-8
_MOMENTS = ("state1", "absmax1", "state2", "absmax2")


class AdamW8bit(RoundedOptimizer):
    """Two bytes of moments a weight."""

    def new_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        fresh = Adam8bitState.zeros_like(parameter)
        return {name: getattr(fresh, name) for name in _MOMENTS}

    def step_all(
        self,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        lr: float,
        steps: Sequence[int],
        offsets: Sequence[int],
    ) -> None:
        moments = [self.state[parameter] for parameter in parameters]
        adamw_8bit_step_many_(
            parameters,
            gradients,
            [Adam8bitState(**{name: of_one[name] for name in _MOMENTS}) for of_one in moments],
            lr=lr,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=_EPS,
            weight_decay=self.config.weight_decay,
            steps=steps,
            gradient_scale=self.gradient_scale,
            seed=self.seed,
            offsets=offsets,
        )
