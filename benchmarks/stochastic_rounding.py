"""How far bfloat16 weights get by stochastic rounding, beside float32 weights and rounding to nearest.

    python benchmarks/stochastic_rounding.py > benchmarks/results/stochastic_rounding.jsonl

Weights as a transformer has them take 2,000 steps of the trainer's optimizer: of a constant update of 1e-5, or of
weight decay alone, a millionth of the weight a step. Prints one JSON object for each optimizer and change: the mean
movement, along the update or towards zero, of the three, and the ratios to that in float32. Rounding to nearest is the
float32 step, rounded after it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any, Literal

import torch
from leap_kernels.tools.bench import processor
from leap_kernels.tools.report import provenance
from torch import nn

from leapalign.config import EmaConfig, OptimizerConfig
from leapalign.optimizers.optimizer import Optimizer

OPTIMIZERS = ("adamw_8bit", "adafactor")
COLUMNS = 256


@dataclass(frozen=True)
class Change:
    """What a step does to a weight: of a constant gradient these optimizers make an update of the learning rate."""

    gradient: float
    learning_rate: float
    weight_decay: float


CHANGES = {"update": Change(1.0, 1e-5, 0.0), "decay": Change(0.0, 1e-3, 1e-3)}


def movement(
    optimizer: str, change: Change, rounding: Literal["float32", "stochastic", "nearest"], elements: int, steps: int
) -> float:
    """The mean movement of ``elements`` weights, against the gradient, or towards zero where there is none."""
    generator = torch.Generator().manual_seed(0)
    start = (0.03 * torch.randn(elements // COLUMNS, COLUMNS, generator=generator)).bfloat16()
    weight = nn.Parameter(start.clone() if rounding == "stochastic" else start.float())
    config = OptimizerConfig(optimizer, learning_rate=change.learning_rate, weight_decay=change.weight_decay)
    moved_by = Optimizer([weight], config, EmaConfig(), iterations=steps, seed=0)
    gradient = torch.full_like(weight.detach(), change.gradient)
    for _ in range(steps):
        weight.grad = gradient
        moved_by.step()
        if rounding == "nearest":
            weight.data.copy_(weight.data.bfloat16())
    moved = start.double() - weight.detach().double()
    return float((moved if change.gradient else moved * start.sign()).mean())


def measure(optimizer: str, name: str, elements: int, steps: int) -> dict[str, Any]:
    """The movement of ``CHANGES[name]`` by each rounding."""
    change = CHANGES[name]
    full = movement(optimizer, change, "float32", elements, steps)
    stochastic = movement(optimizer, change, "stochastic", elements, steps)
    nearest = movement(optimizer, change, "nearest", elements, steps)
    return {
        "optimizer": optimizer,
        "change": name,
        "elements": elements,
        "steps": steps,
        "float32": full,
        "stochastic": stochastic,
        "nearest": nearest,
        "stochastic_to_float32": stochastic / full,
        "nearest_to_float32": nearest / full,
        "device": processor(),
        **provenance(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 19)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    for optimizer in OPTIMIZERS:
        for name in CHANGES:
            print(json.dumps(measure(optimizer, name, arguments.elements, arguments.steps)), flush=True)
