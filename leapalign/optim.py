"""The optimizer step: exact global-norm clipping, AdamW, learning-rate schedule, weight average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from leap_kernels import Adam8bitState, adamw_8bit_step_
from torch import Tensor, nn

from leapalign.config import EmaConfig, OptimizerConfig
from leapalign.memory.host_gradients import HostGradients
from leapalign.memory.host_weights import HostWeights
from leapalign.memory.residency import host_memory, made_for
from leapalign.streams import AVERAGE_STREAM, ROUNDING_STREAM, seed_of
from leapalign.surrogate import GradientSink
from leapalign.validation import UserError
from leapalign.weight_average import WeightAverage

_METER_ELEMENTS = 4096
"""Of each parameter, so many weights are watched for movement."""


class Optimizer:
    """Moves the trainable weights once per iteration and keeps their average.

    Raises UserError for bfloat16 weights that the chosen optimizer would round to nearest.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        config: OptimizerConfig,
        ema: EmaConfig,
        iterations: int,
        seed: int,
        weights: HostWeights | None = None,
    ) -> None:
        """``weights``: where they have their masters in host memory, and so have gradients and moments."""
        self._parameters = parameters
        self._weights = weights
        self._gradients = HostGradients(parameters, weights.device) if weights else None
        self._max_grad_norm = config.max_grad_norm
        # Moments are made at once: a run that does not fit fails before its first iteration.
        with self.changing_weights():
            self.adamw = OPTIMIZERS[config.name](parameters, config, seed_of(seed, ROUNDING_STREAM, 0))
            self.average = WeightAverage(parameters, ema, seed_of(seed, AVERAGE_STREAM, 0))
        self.schedule = get_scheduler(
            config.schedule, self.adamw, num_warmup_steps=config.warmup_iterations, num_training_steps=iterations
        )

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def step(self) -> dict[str, float]:
        """Clips, steps and clears gradients.

        Returns ``grad_norm``, the global norm before clipping, and ``moved``, the share of weights that changed,
        of the first `_METER_ELEMENTS` of each parameter.
        """
        if self._gradients is not None:
            self._gradients.wait()
        with self.changing_weights():
            gradients = [self._gradient_of(parameter) for parameter in self._parameters]
            norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
            self.adamw.gradient_scale = min(1.0, self._max_grad_norm / (float(norm) + 1e-6))
            before = [_watched(parameter).clone() for parameter in self._parameters]
            self.adamw.gradients = gradients
            self.adamw.step()
            changed = [(_watched(p) != old).float() for p, old in zip(self._parameters, before, strict=True)]
            self.average.update()
        self.schedule.step()
        self.adamw.zero_grad(set_to_none=True)
        if self._gradients is not None:
            self._gradients.clear()
        return {"grad_norm": float(norm), "moved": float(torch.cat(changed).mean())}

    @property
    def gradient_sink(self) -> GradientSink | None:
        """What takes gradients over as they complete; None: they add up in ``.grad``."""
        return self._gradients.add if self._gradients is not None else None

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block the model holds the weight average."""
        with self.changing_weights():
            own = self.average.swap_in()
        try:
            yield
        finally:
            with self.changing_weights():
                self.average.swap_out(own)

    @contextlib.contextmanager
    def changing_weights(self) -> Iterator[None]:
        """Weights may be changed within the block, and only there."""
        if self._weights is None:
            with made_for("optimizer"):
                yield
        else:
            with self._weights.changing(), host_memory("optimizer"):
                yield

    def _gradient_of(self, parameter: nn.Parameter) -> Tensor | None:
        return self._gradients[parameter] if self._gradients is not None else parameter.grad

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors ``PARAMETER.KEY``, parameters numbered in order."""
        named = {
            f"{index}.{key}": value
            for index, parameter in enumerate(self._parameters)
            for key, value in self.adamw.state[parameter].items()
        }
        # An average in the dtype of the weights is saved as a model, and nowhere else.
        for index, (average, parameter) in enumerate(zip(self.average.tensors, self._parameters, strict=True)):
            if average.dtype != parameter.dtype:
                named[f"{index}.average"] = average
        return named

    def scalars(self) -> dict[str, Any]:
        """The rest of the state, fit for JSON."""
        return {"schedule": self.schedule.state_dict(), "average_updates": self.average.updates}

    def load(self, tensors: dict[str, Tensor], scalars: dict[str, Any], average: list[Tensor]) -> None:
        """Restores `tensors`, `scalars` and the weight average, of which ``average`` holds what `tensors` does not."""
        for number, value in enumerate(average):
            self.average.tensors[number].copy_(tensors.pop(f"{number}.average", value))
        self.average.updates = scalars["average_updates"]
        for name, value in tensors.items():
            index, key = name.split(".", 1)
            parameter = self._parameters[int(index)]
            # Moments live with the weights' masters; numbers, such as the step, on the CPU.
            home = "cpu" if self._weights is not None or value.dim() == 0 else parameter.device
            self.adamw.state[parameter][key] = value.to(home)
        self.schedule.load_state_dict(scalars["schedule"])
        for group, rate in zip(self.adamw.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, moments in the dtype of the weights, for weights in float32."""

    gradients: Sequence[Tensor | None] = ()
    """Of the parameters, in order; here those in ``.grad``."""
    gradient_scale = 1.0
    """Multiplies the gradients of a step: the coefficient that clips their norm."""

    def __init__(self, parameters: Sequence[nn.Parameter], config: OptimizerConfig, seed: int) -> None:
        _refuse_rounding_to_nearest(parameters, config.learning_rate)
        betas = (config.beta1, config.beta2)
        super().__init__(parameters, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.gradient_scale != 1:
            torch._foreach_mul_([gradient for gradient in self.gradients if gradient is not None], self.gradient_scale)
        super().step(closure)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with bitsandbytes' 8-bit moments; bfloat16 weights are rounded stochastically, decay included."""

    gradients: Sequence[Tensor | None] = ()
    """Of the parameters, in order; float32 gradients of bfloat16 parameters, too."""
    gradient_scale = 1.0
    """As `AdamW.gradient_scale`, applied in float32."""

    def __init__(self, parameters: Sequence[nn.Parameter], config: OptimizerConfig, seed: int) -> None:
        super().__init__(parameters, {"lr": config.learning_rate})
        self._seed = seed
        self._settings = {
            "beta1": config.beta1,
            "beta2": config.beta2,
            "eps": 1e-8,
            "weight_decay": config.weight_decay,
        }
        for parameter in parameters:
            fresh = Adam8bitState.zeros_like(parameter)
            moments = {name: getattr(fresh, name) for name in _MOMENTS}
            self.state[parameter] = {"step": torch.tensor(0), **moments}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        # Every step and parameter draws from positions of its own.
        total, position = sum(parameter.numel() for parameter in group["params"]), 0
        for parameter, gradient in zip(group["params"], self.gradients, strict=True):
            if gradient is not None:
                self._step_one(parameter, gradient, group["lr"], total, position)
            position += parameter.numel()

    def _step_one(self, parameter: nn.Parameter, gradient: Tensor, lr: float, total: int, position: int) -> None:
        state = self.state[parameter]
        state["step"] += 1
        step = int(state["step"])
        adamw_8bit_step_(
            parameter,
            gradient,
            Adam8bitState(**{name: state[name] for name in _MOMENTS}),
            lr=lr,
            step=step,
            gradient_scale=self.gradient_scale,
            seed=self._seed,
            offset=(step - 1) * total + position,
            **self._settings,
        )


_MOMENTS = ("state1", "absmax1", "state2", "absmax2")
OPTIMIZERS: dict[str, Any] = {"adamw": AdamW, "adamw_8bit": AdamW8bit}


def _refuse_rounding_to_nearest(parameters: Sequence[nn.Parameter], learning_rate: float) -> None:
    """Raises UserError for bfloat16 weights, saying how many of them a step of the learning rate would not move."""
    half = [parameter.detach() for parameter in parameters if parameter.dtype == torch.bfloat16]
    if not half:
        return
    # A step below half the distance to the next bfloat16, 2^(exponent - 7), is rounded away.
    stuck = sum(int((learning_rate < torch.exp2(weights.float().frexp().exponent - 9.0)).sum()) for weights in half)
    share = stuck / sum(weights.numel() for weights in half)
    raise UserError(
        f"optimizer.name adamw rounds bfloat16 weights to nearest, and a step of {learning_rate:g} would leave "
        f"{share:.0%} of them where they are; choose adamw_8bit, which rounds stochastically, or model.dtype float32"
    )


def _watched(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().flatten()[:_METER_ELEMENTS]
