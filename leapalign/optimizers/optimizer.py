"""The optimizer step: exact global-norm clipping, an update rule, learning-rate schedule, weight average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from leap_kernels import total_norm
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from leapalign.config import EmaConfig, OptimizerConfig
from leapalign.inputs.validation import UserError
from leapalign.memory.exchange import exchanged
from leapalign.memory.host_gradients import HostGradients
from leapalign.memory.host_weights import HostWeights
from leapalign.memory.residency import host_memory, made_for, note_host_work
from leapalign.optimizers import get_optimizer
from leapalign.optimizers.weight_average import WeightAverage
from leapalign.parallel.processes import count, gathered, mean_of_all, rank
from leapalign.parallel.processes import first as is_first
from leapalign.parallel.sharding import Held, Part
from leapalign.streams import AVERAGE_STREAM, ROUNDING_STREAM, seed_of

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
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """``weights``: where they have their masters in host memory, and so have gradients and moments. ``changed`` is
        called after each change of the parameters."""
        self._changed = changed
        self._held = Held(parameters)
        self._parameters = parameters = self._held.own
        self._weights = weights
        self.offending: int | None = None
        self._gradients = HostGradients(parameters, weights.device) if weights else None
        self._name, self._max_grad_norm = config.name, config.max_grad_norm
        # Moments are made at once: a run that does not fit fails before its first iteration.
        with self.changing_weights():
            self.rule = get_optimizer(parameters, config, seed_of(seed, ROUNDING_STREAM, 0))
            self.average = WeightAverage(parameters, ema, seed_of(seed, AVERAGE_STREAM, 0))
        self._config, self._iterations = config, iterations
        self.schedule = self._scheduled(0)

    def _scheduled(self, done: int) -> LambdaLR:
        """The learning rate after so many iterations, and from then on.

        Diffusers' schedules start a warm-up of W iterations at 0, which would waste the first. Here iteration i of it
        has i / W of the rate; the decay behind it is theirs, and its last iteration does not have 0.
        """
        warmup = self._config.warmup_iterations
        rate = get_scheduler(
            self._config.schedule, self.rule, num_warmup_steps=warmup, num_training_steps=self._iterations
        ).lr_lambdas[0]
        return LambdaLR(self.rule, lambda step: rate(step + 1 if step < warmup else step), done - 1)  # type: ignore[arg-type]

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def step(self, hold: bool = False) -> dict[str, float]:
        """Clips, steps and clears gradients; ``hold``: moves nothing, as there was nothing to learn from.

        Returns ``grad_norm``, the global norm before clipping, and ``moved``, the share of weights that changed,
        of the first `_METER_ELEMENTS` of each parameter. Where the norm is not finite nothing moves, either, and
        ``offending`` is the number of the first parameter to blame. ``skipped`` is 1 where nothing moved.
        """
        if self._gradients is not None:
            self._gradients.wait()
        self._held.take_gradients()
        with self.changing_weights():
            gradients = [self._gradient_of(parameter) for parameter in self._parameters]
            # The device is waited for here, as nothing may move where the norm is not finite, and for the share.
            norm = self._norm(gradients)
            skipped = hold or not math.isfinite(norm)
            moved = 0.0 if skipped else self._move(gradients, norm)
            self.offending = None if math.isfinite(norm) else self._first_not_finite(gradients)
        self.schedule.step()
        self.rule.zero_grad(set_to_none=True)
        if self._gradients is not None:
            self._gradients.clear()
        return {"grad_norm": norm, "moved": moved, "skipped": float(skipped)}

    def bad_weight(self) -> int | None:
        """The number of the first parameter that is not finite; None where all are."""
        with self.changing_weights():
            if math.isfinite(self._norm(self._parameters)):
                return None
            return self._first_not_finite(self._parameters)

    def _move(self, gradients: list[Tensor | None], norm: float) -> float:
        """Steps weights and average; returns the share of watched weights that changed."""
        if self._weights is not None:
            self._note_step(gradients)
        self.rule.gradient_scale = min(1.0, self._max_grad_norm / (norm + 1e-6))
        before = _watched(self._parameters)
        self.rule.gradients = gradients
        self.rule.step()
        changed = [new != old for new, old in zip(_watched(self._parameters), before, strict=True)]
        self.average.update()
        return mean_of_all(torch.cat(changed).float())

    def _norm(self, tensors: Sequence[Tensor | None]) -> float:
        """Of ``tensors``, one a parameter, as a whole; of those that are divided, with the parts of all processes."""
        divided, alike = list[Tensor](), list[Tensor]()
        for parameter, tensor in zip(self._parameters, tensors, strict=True):
            if tensor is not None:
                (divided if isinstance(parameter, Part) else alike).append(tensor)
        if count() == 1:
            return float(total_norm(alike))
        norms = gathered(tuple(float(total_norm(some)) if some else 0.0 for some in (divided, alike)))
        return math.sqrt(sum(part**2 for part, _ in norms) + norms[0][1] ** 2)

    def _note_step(self, gradients: Sequence[Tensor | None]) -> None:
        """Of a step in host memory: gradients are read for their norm and by the step, weights and moments change."""
        note_host_work(2 * sum(gradient.nbytes for gradient in gradients if gradient is not None))
        moments = [value for state in self.rule.state.values() for value in state.values()]
        note_host_work(2 * sum(tensor.nbytes for tensor in (*self._parameters, *moments)))

    def _first_not_finite(self, tensors: Sequence[Tensor | None]) -> int | None:
        """None where each tensor is finite, and only the sum of their squares is not."""
        bad = (n for n, tensor in enumerate(tensors) if tensor is not None and not bool(tensor.isfinite().all()))
        return min((number for number in gathered(next(bad, None)) if number is not None), default=None)

    @property
    def gradient_sink(self) -> Callable[[Tensor, Tensor], None] | None:
        """What takes gradients over as they complete; None: they add up in ``.grad``."""
        return self._gradients.add if self._gradients is not None else None

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the model holds the weight average, and the average's tensors, of one dtype, the weights.

        Of another dtype, the average is rounded to a copy of its own first.
        """
        return exchanged(self._parameters, self.average.as_weights(), self.changing_weights)

    @contextlib.contextmanager
    def changing_weights(self) -> Iterator[None]:
        """Weights may be changed within the block, and only there."""
        if self._weights is None:
            try:
                with made_for("optimizer"):
                    yield
            finally:
                self._changed()
        else:
            with self._weights.changing(), host_memory("optimizer"):
                yield

    def _gradient_of(self, parameter: nn.Parameter) -> Tensor | None:
        return self._gradients[parameter] if self._gradients is not None else parameter.grad

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors ``PARAMETER.KEY``, parameters numbered in order.

        In the first process they are whole, where all call this.
        """
        return {name: self._held.whole(int(name.partition(".")[0]), value) for name, value in self._tensors().items()}

    def state_bytes(self) -> int:
        """Bytes of `tensors`."""
        return sum(self._held.bytes_of_all(int(n.partition(".")[0]), value) for n, value in self._tensors().items())

    def weights(self) -> list[Tensor]:
        """The trained weights; whole as `tensors` are."""
        return [self._held.whole(number, parameter.detach()) for number, parameter in enumerate(self._parameters)]

    def averages(self) -> list[Tensor]:
        """Their average in their dtypes, in host memory; whole as `tensors` are."""
        return [self._held.whole(number, average) for number, average in enumerate(self.average.as_weights())]

    def _tensors(self) -> dict[str, Tensor]:
        named = {
            f"{index}.{key}": value
            for index, parameter in enumerate(self._parameters)
            for key, value in self.rule.state[parameter].items()
        }
        # An average in the dtype of the weights is saved as a model, and nowhere else.
        for index, (average, parameter) in enumerate(zip(self.average.tensors, self._parameters, strict=True)):
            if average.dtype != parameter.dtype:
                named[f"{index}.average"] = average
        return named

    def scalars(self) -> dict[str, Any]:
        """The rest of the state, fit for JSON."""
        return {
            "name": self._name,
            "iterations": self.schedule.last_epoch,
            "average_updates": self.average.updates,
        }

    def load(self, tensors: dict[str, Tensor], scalars: dict[str, Any], average: list[Tensor]) -> None:
        """Restores `tensors`, `scalars` and the weight average, of which ``average`` holds what `tensors` does not.

        Raises UserError where they are another optimizer's. Rate, schedule, decay and clipping are the config's, which
        may have changed.
        """
        if scalars["name"] != self._name:
            raise UserError(
                f"a run begun with optimizer.name {scalars['name']} cannot go on with {self._name}; set it back, or "
                "choose another output"
            )
        for number, value in enumerate(average):
            self.average.tensors[number].copy_(self._held.part(number, tensors.pop(f"{number}.average", value)))
        self.average.updates = scalars["average_updates"]
        with self.changing_weights():
            for name, value in tensors.items():
                index, key = name.split(".", 1)
                parameter = self._parameters[int(index)]
                # The count of steps stays on the CPU, as PyTorch has it.
                self.rule.state[parameter][key] = (
                    value if key == "step" else self._held.part(int(index), value).to(parameter.device)
                )
        self.schedule = self._scheduled(scalars["iterations"])


def _watched(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """A copy of the first weights of all parameters, by dtype: on a GPU, PyTorch joins many tensors of one at once."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        # A part as far as it has some of the first, and what all processes have by one of them.
        divided = isinstance(parameter, Part)
        seen = _METER_ELEMENTS - rank() * parameter.numel() if divided else _METER_ELEMENTS * is_first()
        by_dtype.setdefault(parameter.dtype, []).append(parameter.detach().flatten()[: max(0, seen)])
    return [torch.cat(first) for first in by_dtype.values()]
