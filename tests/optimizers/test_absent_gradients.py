"""A step where some parameters have no gradient: a network's last block may leave parts of it unused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from leap_kernels import Adam8bitState, adamw_8bit_step_
from torch import Tensor, nn

from leapalign.config import EmaConfig, OptimizerConfig
from leapalign.memory.host_weights import HostWeights
from leapalign.optimizers.optimizer import Optimizer
from leapalign.streams import ROUNDING_STREAM, seed_of

SHAPES = ((40, 30), (300,), (256,), (7, 9, 11))
PRESENT = ((0, 1, 2, 3), (1, 3), (0, 3), (), (0, 1, 2, 3))
"""The numbers of the parameters that have a gradient, step by step."""
DECAY, RATE, SEED = 0.1, 1e-3, 3
MOMENTS = ("state1", "absmax1", "state2", "absmax2")


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((0.03 * torch.randn(shape, generator=generator)).to(dtype)) for shape in SHAPES]


def gradients(dtype: torch.dtype, step: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(step)
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    return {number: drawn[number] for number in PRESENT[step]}


def optimizer_of(weights: list[nn.Parameter], name: str, held: Any = None) -> Optimizer:
    config = OptimizerConfig(name=name, learning_rate=RATE, weight_decay=DECAY, max_grad_norm=1e9)
    return Optimizer(weights, config, EmaConfig(dtype="float32"), iterations=10, seed=SEED, weights=held)


def state_of(optimizer: Optimizer, weight: nn.Parameter) -> list[Tensor]:
    return [weight.detach().clone(), *(value.clone() for value in optimizer.rule.state[weight].values())]


RULES = [
    ("adamw", torch.float32),
    *(("adamw_8bit", dtype) for dtype in (torch.float32, torch.bfloat16)),
    *(("adafactor", dtype) for dtype in (torch.float32, torch.bfloat16)),
    pytest.param("bnb_adamw_8bit", torch.float32, marks=pytest.mark.bitsandbytes),
]


@pytest.mark.parametrize(("name", "dtype"), RULES)
def test_who_has_none_stays_as_it_is(name: str, dtype: torch.dtype) -> None:
    """Weight, moments and count of steps; the others change."""
    weights = parameters(dtype)
    optimizer = optimizer_of(weights, name)
    for step, present in enumerate(PRESENT):
        for number, gradient in gradients(dtype, step).items():
            weights[number].grad = gradient
        before = [state_of(optimizer, weight) for weight in weights]
        metrics = optimizer.step()
        assert (metrics["moved"] > 0) == (metrics["grad_norm"] > 0) == bool(present)
        for number, (weight, old) in enumerate(zip(weights, before, strict=True)):
            same = [torch.equal(a, b) for a, b in zip(state_of(optimizer, weight), old, strict=True)]
            # The first entry is the weight.
            assert all(same) if number not in present else not same[0]
    for number, weight in enumerate(weights):
        assert int(optimizer.rule.state[weight]["step"]) == sum(number in present for present in PRESENT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_those_of_each_parameter_alone(dtype: torch.dtype) -> None:
    """To the bit: each counts its own steps, and draws at positions that are its own."""
    weights, alone = parameters(dtype), parameters(dtype)
    optimizer = optimizer_of(weights, "adamw_8bit")
    states = [Adam8bitState.zeros_like(weight) for weight in alone]
    counts, total = [0] * len(alone), sum(weight.numel() for weight in alone)
    starts = [sum(weight.numel() for weight in alone[:number]) for number in range(len(alone))]
    for step in range(len(PRESENT)):
        for number, gradient in gradients(dtype, step).items():
            weights[number].grad = gradient.clone()
            counts[number] += 1
            adamw_8bit_step_(
                *(alone[number].data, gradient, states[number]),
                **{"lr": RATE, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": DECAY},
                **{"step": counts[number], "seed": seed_of(SEED, ROUNDING_STREAM, 0)},
                offset=(counts[number] - 1) * total + starts[number],
            )
        optimizer.step()
        for weight, other, state in zip(weights, alone, states, strict=True):
            assert torch.equal(weight, other)
            moments = [optimizer.rule.state[weight][name] for name in MOMENTS]
            assert all(torch.equal(a, b) for a, b in zip(moments, state.tensors(), strict=True))


def test_in_host_memory_they_are_as_absent() -> None:
    """The step of host memory is the device's, and what was added up for an earlier one is gone."""
    here, model = parameters(torch.float32), nn.ParameterList(parameters(torch.float32))
    held = HostWeights(model, torch.device("cpu"), buffers=None)
    away = list(model)
    on_device, on_host = optimizer_of(here, "adamw_8bit"), optimizer_of(away, "adamw_8bit", held)
    for step in range(len(PRESENT)):
        for number, gradient in gradients(torch.float32, step).items():
            here[number].grad = gradient
            on_host.gradient_sink(away[number], gradient)
        assert on_device.step() == on_host.step()
        for one, other in ((here, away), *zip(*map(_moments, (on_device, on_host)), strict=True)):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _moments(optimizer: Optimizer) -> list[list[Tensor]]:
    return [list(state.values()) for state in optimizer.rule.state.values()]
