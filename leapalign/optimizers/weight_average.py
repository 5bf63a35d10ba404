"""Exponential moving average of the trainable weights, held in host memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from leap_kernels import ema_update_, stochastic_round_
from torch import Tensor, nn

from leapalign.config import EmaConfig
from leapalign.memory.residency import host_memory, note_host_work
from leapalign.memory.transfer import ToHost
from leapalign.parallel.sharding import positions
from leapalign.storage.faults import point

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def kept(config: EmaConfig, iteration: int) -> float:
    """The share ``d`` of itself that an average keeps at an ``iteration``, counted from 1; 1 between updates."""
    averaged = iteration - config.start
    if averaged <= 0:
        return 0.0
    if averaged % config.interval:
        return 1.0
    n = averaged // config.interval
    warm = (n / (9 + n) if n > 1 else 0.0) if config.warmup else 1.0
    return min(config.decay, warm)


def base_share(config: EmaConfig, iterations: int) -> float:
    """How much of an average is still the model that training began with: the product of `kept`."""
    return math.prod(kept(config, iteration) for iteration in range(1, iterations + 1))


class WeightAverage:
    """``average <- d average + (1 - d) weights`` every ``interval`` iterations after ``start``.

    ``d = decay``; with a warm-up ``min(decay, n / (9 + n))`` at update n, 0 at the first. Up to ``start`` the average
    is the weights.

    A bfloat16 average is rounded stochastically: near its goal, rounding to nearest would leave it where it is.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: EmaConfig, seed: int) -> None:
        self._parameters = parameters
        self._config = config
        self._seed = seed
        self.updates = 0
        with host_memory("average"):
            self.tensors: list[Tensor] = [
                parameter.detach().to("cpu", _DTYPES[config.dtype], copy=True) for parameter in parameters
            ]
            # Weights in host memory are beside their average.
            device = parameters[0].device
            self._to_host = None if device.type == "cpu" else ToHost(device, parameters)

    def update(self) -> None:
        """Moves the average towards the weights, if it is time."""
        self.updates += 1
        decay = kept(self._config, self.updates)
        if decay == 1:
            return
        # Every update draws from positions of its own.
        starts, total = positions(self._parameters)
        for average, parameter, start in zip(self.tensors, self._parameters, starts, strict=True):
            move = partial(self._move, average, decay, (self.updates - 1) * total + start)
            # Of another dtype than float32 it is widened, moved and rounded, which is three passes.
            wide = 0 if average.dtype == torch.float32 else 4 * 4 * average.numel()
            note_host_work(2 * average.nbytes + parameter.nbytes + wide)
            if self._to_host is None:
                move(parameter.detach())
            else:
                self._to_host.send(parameter.detach(), move)
            point("average")
        if self._to_host is not None:
            self._to_host.wait()

    @torch.no_grad()
    def _move(self, average: Tensor, decay: float, position: int, weights: Tensor) -> None:
        with host_memory("average"):
            if average.dtype == torch.float32:
                ema_update_(average, weights, decay)
            else:
                stochastic_round_(average, ema_update_(average.float(), weights, decay), self._seed, position)

    def copy_to(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sets ``parameters`` to the average, rounded to their dtype."""
        with torch.no_grad():
            for parameter, value in zip(parameters, self.tensors, strict=True):
                parameter.copy_(value)

    def as_weights(self) -> list[Tensor]:
        """The average in the dtype of the weights, in host memory: its own tensors, where they have it."""
        with host_memory("average"):
            return [value.to(weights.dtype) for value, weights in zip(self.tensors, self._parameters, strict=True)]
