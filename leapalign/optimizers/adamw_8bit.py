"""AdamW with bitsandbytes' 8-bit moments, and weights rounded stochastically, decay included."""

from __future__ import annotations

from leap_kernels import Adam8bitState, adamw_8bit_step_
from torch import Tensor, nn

from leapalign.optimizers.rounded import RoundedOptimizer

_EPS = 1e-8
_MOMENTS = ("state1", "absmax1", "state2", "absmax2")


class AdamW8bit(RoundedOptimizer):
    """Two bytes of moments a weight."""

    def new_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        fresh = Adam8bitState.zeros_like(parameter)
        return {name: getattr(fresh, name) for name in _MOMENTS}

    def step_one(self, parameter: nn.Parameter, gradient: Tensor, lr: float, step: int, offset: int) -> None:
        state = self.state[parameter]
        adamw_8bit_step_(
            parameter,
            gradient,
            Adam8bitState(**{name: state[name] for name in _MOMENTS}),
            lr=lr,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=_EPS,
            weight_decay=self.config.weight_decay,
            step=step,
            gradient_scale=self.gradient_scale,
            seed=self.seed,
            offset=offset,
        )
