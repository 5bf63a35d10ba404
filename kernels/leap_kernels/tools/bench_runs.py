"""Runs the variants of a case in turns, and keeps what they took."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._dispatch import use_backend
from .bench_case import Case, Inputs, Outputs
from .bench_measures import Clock, peak_bytes, relative_error

FORWARD, BACKWARD = "forward", "backward"
COPIES = ("copy", "clone")
"""A plain copy of the largest latents into memory that is there, and into new memory, as ops write outputs to."""
_WARM_UP = 2
_TURN_SECONDS, _TURN_CALLS = 0.02, 20

Key = tuple[str, str]
"""A variant and a pass."""
Seconds = dict[Key, list[float]]


@dataclass(frozen=True)
class Variant:
    """A way to compute a case; `backend` is the one that the op must use, None for plain PyTorch."""

    name: str
    function: Callable[[Inputs], Outputs]
    backend: str | None = None

    def context(self) -> contextlib.AbstractContextManager[None]:
        """Choose the backend, for the forward as for the backward pass; strictly, so that nothing falls back."""
        return contextlib.nullcontext() if self.backend is None else use_backend(self.backend, strict=True)


class Bench:
    """A case on latents of one shape: its inputs, exact results, and the gradients that its backward begins with."""

    def __init__(self, case: Case, shape: tuple[int, ...], device: torch.device) -> None:
        self.case = case
        self.device = device
        self.clock = Clock(device)
        self.inputs = case.inputs(shape, device)
        self.gradients = self._first_gradients() if case.differentiable else ()
        latents = sorted((self.inputs[name].detach() for name in case.latents), key=lambda tensor: tensor.nbytes)
        self.copied = latents[-1:]
        elements = case.elements(shape)
        self.least_bytes = {FORWARD: case.forward_bytes * elements, BACKWARD: (case.backward_bytes or 0) * elements}
        self.least_bytes |= {copy: 2 * latents.nbytes for latents in self.copied for copy in COPIES}

    def forward(self, variant: Variant) -> Outputs:
        """Compute the outputs, with a graph where the case has a backward pass."""
        with variant.context(), torch.set_grad_enabled(bool(self.gradients)):
            return variant.function(self.inputs)

    def backward(self, variant: Variant, outputs: Outputs) -> tuple[Tensor, ...]:
        """Send the gradients back through the first outputs."""
        with variant.context():
            return self._gradients(self.inputs, outputs, self.gradients)

    def take_turns(self, variants: list[Variant], repeats: int) -> Seconds:
        """Give every variant one turn a repeat, and then plain copies of latents; keep the median call of each turn."""
        seconds: Seconds = {}
        copies = [functools.partial(self._call_copies, it, torch.empty_like(it)) for it in self.copied]
        for repeat in range(_WARM_UP + repeats):
            first = repeat % len(variants)
            calls = [functools.partial(self._call, variant) for variant in variants[first:] + variants[:first]]
            for call in [*calls, *copies]:
                taken = _take_turn(call)
                for key, value in taken.items() if repeat >= _WARM_UP else ():
                    seconds.setdefault(key, []).append(value)
        return seconds

    def _call_copies(self, latents: Tensor, room: Tensor) -> dict[Key, float]:
        copied, _ = self.clock.seconds(functools.partial(room.copy_, latents))
        cloned, _ = self.clock.seconds(latents.clone)
        return {("copy", "copy"): copied, ("clone", "clone"): cloned}

    def _call(self, variant: Variant) -> dict[Key, float]:
        taken: dict[Key, float] = {}
        taken[variant.name, FORWARD], outputs = self.clock.seconds(lambda: self.forward(variant))
        if self.gradients:
            taken[variant.name, BACKWARD], _ = self.clock.seconds(lambda: self.backward(variant, outputs))
        return taken

    def observe(self, variant: Variant) -> dict[Key, dict[str, Any]]:
        """Return for each pass the error against float64 and the peak of memory; not timed."""
        exact, exact_gradients = self._exact()
        outputs = self.forward(variant)
        # Before anything else: a case that works in place changes its outputs with the next call.
        error = relative_error(outputs, exact)
        peak = peak_bytes(lambda: None, lambda _: self.forward(variant), self.device)
        observed = {(variant.name, FORWARD): {"error": error, "peak_bytes": peak}}
        if self.gradients:
            error = relative_error(self.backward(variant, outputs), exact_gradients)
            peak = peak_bytes(lambda: self.forward(variant), lambda again: self.backward(variant, again), self.device)
            observed[variant.name, BACKWARD] = {"error": error, "peak_bytes": peak}
        return observed

    def _exact(self) -> tuple[Outputs, tuple[Tensor, ...]]:
        """Compute outputs and gradients in float64 from the same inputs."""
        inputs = {name: value.detach().double() for name, value in self.inputs.items()}
        for name in self.case.differentiable:
            inputs[name].requires_grad_()
        outputs = (self.case.exact or self.case.plain)(inputs)
        if not self.gradients:
            return outputs, ()
        return outputs, self._gradients(inputs, outputs, tuple(gradient.double() for gradient in self.gradients))

    def _gradients(self, inputs: Inputs, outputs: Outputs, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wanted = [inputs[name] for name in self.case.differentiable]
        return torch.autograd.grad(outputs[: self.case.sources], wanted, gradients)

    def _first_gradients(self) -> tuple[Tensor, ...]:
        """Draw the gradients at the first outputs, in their dtypes."""
        generator = torch.Generator().manual_seed(0)
        sources = self.case.plain(self.inputs)[: self.case.sources]
        return tuple(torch.randn(like.shape, generator=generator).to(like) for like in sources)


def _take_turn(call: Callable[[], dict[Key, float]]) -> dict[Key, float]:
    """Repeat a call for a while: the first ones find the caches full of what the last variant left there."""
    turn: dict[Key, list[float]] = {}
    spent, calls = 0.0, 0
    while calls == 0 or (spent < _TURN_SECONDS and calls < _TURN_CALLS):
        taken = call()
        for key, seconds in taken.items():
            turn.setdefault(key, []).append(seconds)
        spent, calls = spent + sum(taken.values()), calls + 1
    return {key: statistics.median(times) for key, times in turn.items()}
