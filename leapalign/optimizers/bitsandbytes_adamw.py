"""bitsandbytes' own eight-bit AdamW, resident and paged, for weights in float32."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.config import OptimizerConfig
from leapalign.inputs.validation import UserError
from leapalign.optimizers.adamw import refuse_rounding_to_nearest, scale


def resident(parameters: Sequence[nn.Parameter], config: OptimizerConfig, seed: int) -> Any:
    """An `UpdateRule`: bitsandbytes' AdamW8bit; gradients are those in ``.grad``. Raises UserError as `_rule`."""
    return _rule(parameters, config, paged=False)


def paged(parameters: Sequence[nn.Parameter], config: OptimizerConfig, seed: int) -> Any:
    """The same with moments in memory that moves between host and device as it is needed: PagedAdamW8bit."""
    return _rule(parameters, config, paged=True)


def _rule(parameters: Sequence[nn.Parameter], config: OptimizerConfig, paged: bool) -> Any:
    """Raises UserError without bitsandbytes, for bfloat16 weights, and for pages without a GPU."""
    refuse_rounding_to_nearest(parameters, config)
    if paged and parameters[0].device.type != "cuda":
        raise UserError(
            f"optimizer.name {config.name} pages memory of an NVIDIA GPU, and there is none; choose bnb_adamw_8bit"
        )
    try:
        AdamW8bit: Any = import_module("bitsandbytes.optim").AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optimizer.name {config.name} needs bitsandbytes ({error}); install it with pip install bitsandbytes, or "
            "choose adamw_8bit, which does not"
        ) from None

    class Rule(AdamW8bit):
        """State of a parameter, made at once: tensors and nothing else; below 4096 weights moments are float32."""

        gradients: Sequence[Tensor | None] = ()
        gradient_scale = 1.0

        def __init__(self) -> None:
            betas = (config.beta1, config.beta2)
            super().__init__(parameters, config.learning_rate, betas, weight_decay=config.weight_decay, is_paged=paged)
            self.check_overrides()
            self.initialized = True
            for number, parameter in enumerate(parameters):
                self.init_state(self.param_groups[0], parameter, 0, number)
                state = self.state[parameter]
                # All have one map in common, and a file takes no tensor twice.
                self.state[parameter] = {
                    name: value.clone() if name.startswith("qmap") else value for name, value in state.items()
                } | {"step": torch.tensor(0)}

        def step(self, closure: Any = None) -> None:
            scale(self.gradients, self.gradient_scale)
            super().step(closure)

        def update_step(self, group: Any, p: nn.Parameter, gindex: int, pindex: int) -> None:
            # The library counts in Python numbers.
            state = self.state[p]
            state["step"] = int(state["step"])
            super().update_step(group, p, gindex, pindex)
            state["step"] = torch.tensor(state["step"])

    return Rule()
