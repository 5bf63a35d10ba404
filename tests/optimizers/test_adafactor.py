"""Adafactor: the library's steps, from the moments that are saved, where the weights are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Adafactor

from leapalign.config import EmaConfig, OptimizerConfig
from leapalign.optimizers.optimizer import Optimizer

SHAPES = ((48, 20), (3, 8, 5), (300,), ())


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((0.03 * torch.randn(shape, generator=generator)).to(dtype)) for shape in SHAPES]


def give_gradients(weights: list[nn.Parameter], step: int) -> None:
    """Outer products with noise, of very different rows and columns."""
    generator = torch.Generator().manual_seed(step)
    for weight in weights:
        scale = torch.logspace(-3, 0, weight.shape[-1]) if weight.dim() else torch.tensor(1.0)
        weight.grad = (scale * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


def optimizer_of(weights: list[nn.Parameter], **options: object) -> Optimizer:
    config = OptimizerConfig(name="adafactor", learning_rate=1e-3, **options)
    return Optimizer(weights, config, EmaConfig(), iterations=10, seed=3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e9])
def test_steps_are_the_librarys(weight_decay: float, max_grad_norm: float) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = optimizer_of(ours, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    settings = {"scale_parameter": False, "relative_step": False, "weight_decay": weight_decay}
    reference = Adafactor(theirs, lr=1e-3, **settings)
    for step in range(20):
        for weights in (ours, theirs):
            give_gradients(weights, step)
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        assert optimizer.step()["grad_norm"] == pytest.approx(float(expected))
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        if weight_decay or max_grad_norm == 0.5:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
        else:
            assert torch.equal(a, b)


def test_moments_are_rows_and_columns_in_float32() -> None:
    matrix, stack, vector, scalar = parameters(torch.bfloat16)
    state = optimizer_of([matrix, stack, vector, scalar]).rule.state
    found = [{key: tuple(value.shape) for key, value in state[p].items()} for p in (matrix, stack, vector, scalar)]
    assert found == [
        {"step": (), "exp_avg_sq_row": (48,), "exp_avg_sq_col": (20,)},
        {"step": (), "exp_avg_sq_row": (3, 8), "exp_avg_sq_col": (3, 5)},
        {"step": (), "exp_avg_sq": (300,)},
        {"step": (), "exp_avg_sq": ()},
    ]
    assert {value.dtype for key, value in state[matrix].items() if key != "step"} == {torch.float32}


def test_bfloat16_weights_draw_other_bits_at_every_step_and_parameter() -> None:
    weights = [nn.Parameter(torch.full((64, 64), 1.0, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = optimizer_of(weights)
    moved = []
    for _ in range(2):
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved += [weight.detach() != old for weight, old in zip(weights, before, strict=True)]
    pairs = [(a, b) for number, a in enumerate(moved) for b in moved[:number]]
    assert all(0.1 < float(share.float().mean()) < 0.5 for share in moved)
    assert not any(torch.equal(a, b) for a, b in pairs)
