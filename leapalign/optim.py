"""The optimizer step: AdamW, exact global-norm clipping, learning-rate schedule and weight average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from leapalign.config import EmaConfig, OptimizerConfig


class Optimizer:
    """Moves the trainable weights once per iteration and keeps their average."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], config: OptimizerConfig, ema: EmaConfig, iterations: int
    ) -> None:
        self._parameters = parameters
        self._max_grad_norm = config.max_grad_norm
        self.adamw = torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.schedule = get_scheduler(
            config.schedule, self.adamw, num_warmup_steps=config.warmup_iterations, num_training_steps=iterations
        )
        self.ema = EMAModel(parameters, decay=ema.decay)

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def step(self) -> float:
        """Clips, steps and clears gradients; returns the global gradient norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad(set_to_none=True)
        self.ema.step(self._parameters)
        return float(norm)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block the model holds the weight average."""
        self.ema.store(self._parameters)
        self.ema.copy_to(self._parameters)
        try:
            yield
        finally:
            self.ema.restore(self._parameters)

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors ``PARAMETER.KEY``, parameters numbered in order."""
        state = self.adamw.state_dict()["state"]
        return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}

    def scalars(self) -> dict[str, Any]:
        """The rest of the state, fit for JSON."""
        return {"schedule": self.schedule.state_dict(), "ema_step": self.ema.optimization_step}

    def load(self, tensors: dict[str, Tensor], scalars: dict[str, Any], average: list[Tensor]) -> None:
        """Restores `tensors`, `scalars` and the weight average."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        self.adamw.load_state_dict({**self.adamw.state_dict(), "state": state})
        self.schedule.load_state_dict(scalars["schedule"])
        for group, rate in zip(self.adamw.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        self.ema.optimization_step = scalars["ema_step"]
        for shadow, value in zip(self.ema.shadow_params, average, strict=True):
            shadow.copy_(value)
