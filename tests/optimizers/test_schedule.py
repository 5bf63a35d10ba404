"""The learning rate of every iteration, by every schedule; no iteration is wasted at rate 0."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from leapalign.config import EmaConfig, OptimizerConfig
from leapalign.optimizers.optimizer import Optimizer

ITERATIONS = 8
RATES: dict[tuple[str, int], list[float]] = {
    ("constant", 0): [1.0] * 8,
    ("constant", 4): [1.0] * 8,
    ("constant_with_warmup", 0): [1.0] * 8,
    ("constant_with_warmup", 1): [1.0] * 8,
    ("constant_with_warmup", 4): [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1],
    ("linear", 0): [1 - step / 8 for step in range(8)],
    ("linear", 4): [1 / 4, 2 / 4, 3 / 4, 1, 1, 3 / 4, 2 / 4, 1 / 4],
    ("cosine", 0): [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)],
    ("cosine", 4): [1 / 4, 2 / 4, 3 / 4, 1, *((1 + math.cos(math.pi * step / 4)) / 2 for step in range(4))],
}


def optimizer_of(schedule: str, warmup: int, rate: float = 1e-3) -> Optimizer:
    config = OptimizerConfig(schedule=schedule, warmup_iterations=warmup, learning_rate=rate)
    return Optimizer([nn.Parameter(torch.zeros(3))], config, EmaConfig(), ITERATIONS, seed=0)


def step(optimizer: Optimizer) -> tuple[float, float]:
    """The rate that is told, and how far a weight goes: Adam's steps for a steady gradient are the rate."""
    (weight,) = optimizer.rule.param_groups[0]["params"]
    weight.grad, before, told = torch.ones(3), float(weight.detach()[0]), optimizer.learning_rate
    optimizer.step()
    return told, before - float(weight.detach()[0])


def test_every_schedule_is_here() -> None:
    assert {name for name, _ in RATES} == set(get_args(get_type_hints(OptimizerConfig)["schedule"]))


@pytest.mark.parametrize(("schedule", "warmup"), RATES)
def test_rates_are_these_and_never_zero(schedule: str, warmup: int) -> None:
    optimizer = optimizer_of(schedule, warmup)
    optimizer.rule.param_groups[0]["weight_decay"] = 0
    steps = [step(optimizer) for _ in range(ITERATIONS)]
    expected = [1e-3 * factor for factor in RATES[schedule, warmup]]
    assert [told for told, _ in steps] == pytest.approx(expected)
    assert [moved for _, moved in steps] == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 0


@pytest.mark.parametrize(("schedule", "warmup"), RATES)
@pytest.mark.parametrize("done", [2, 5])
def test_a_resumed_run_has_its_own_rates_or_those_it_asks_for(schedule: str, warmup: int, done: int) -> None:
    first = optimizer_of(schedule, warmup)
    for _ in range(done):
        step(first)
    tensors = {name: value.clone() for name, value in first.tensors().items()}
    for factor in (1, 3):
        second = optimizer_of(schedule, warmup, factor * 1e-3)
        second.load(dict(tensors), first.scalars(), [torch.zeros(3)])
        told = [step(second)[0] for _ in range(ITERATIONS - done)]
        assert told == pytest.approx([factor * 1e-3 * one for one in RATES[schedule, warmup][done:]])
