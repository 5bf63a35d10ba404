"""Any valid plan is its in-line graph; any invalid one is refused before a forward runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import conditioned_world, relative_difference

from leapalign.surrogate import SurrogatePlan, surrogate_backward

STEPS, BATCH = 7, 2
WORLD = conditioned_world((5,), batch=BATCH, steps=STEPS)


@st.composite
def plans(draw: Any) -> SurrogatePlan:
    rows, draws = draw(st.integers(1, STEPS)), draw(st.integers(1, 3))
    columns = [
        sorted(draw(st.permutations(range(STEPS)))[:rows])  # every column its own steps
        for _ in range(BATCH * draws)
    ]
    weight = st.floats(-2, 2).filter(lambda value: value == 0 or abs(value) > 1e-3)
    return SurrogatePlan(
        index=torch.tensor(columns).T.contiguous(),
        coefficient=torch.tensor([[draw(weight) for _ in columns] for _ in range(rows)], dtype=torch.float64),
        discount=torch.tensor([draw(st.sampled_from([0.0, 0.3, 1.0])) for _ in range(rows)], dtype=torch.float64),
    )


def inline(plan: SurrogatePlan, gradient: Tensor) -> Tensor:
    """Rows in sampling order. ``state`` holds what the rows so far add to the end point; a row sees a share of it."""
    for column in range(plan.index.shape[1]):
        sample = torch.tensor([column % BATCH])
        state = torch.zeros(1, 5, dtype=torch.float64)
        for row, discount in enumerate(plan.discount.tolist()):
            step = int(plan.index[row, column])
            x = WORLD.rollout.latents[step, sample] + discount * (state - state.detach())
            velocity = WORLD.velocity.select(sample)(x, WORLD.rollout.sigmas[step][None])
            state = state + float(plan.coefficient[row, column]) * velocity
        if state.requires_grad:
            (state * gradient[column]).sum().backward()
    return WORLD.gradients()


@settings(deadline=None, max_examples=60)
@given(plan=plans(), microbatch=st.sampled_from([None, 1, 3, 50]), seed=st.integers(0, 99))
def test_a_valid_plan_is_its_inline_graph(plan: SurrogatePlan, microbatch: int | None, seed: int) -> None:
    shape = (plan.index.shape[1], 5)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = inline(plan, gradient)
    norms = surrogate_backward(plan, WORLD.rollout, WORLD.velocity, gradient, microbatch=microbatch)
    gradients = WORLD.gradients()
    assert norms.shape == plan.index.shape
    if bool((plan.coefficient == 0).all()):
        assert bool((gradients == 0).all())
    else:
        assert relative_difference(gradients, expected) <= 1e-10


@settings(deadline=None, max_examples=60)
@given(plan=plans(), data=st.data())
def test_an_invalid_plan_is_refused(plan: SurrogatePlan, data: st.DataObject) -> None:
    def never(latents: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError("a forward ran")

    row = data.draw(st.integers(0, len(plan.index) - 1))
    column = data.draw(st.integers(0, plan.index.shape[1] - 1))
    spoilt = data.draw(st.sampled_from(["order", "range", "shape", "nan", "gradient"]))
    index, coefficient, discount = plan.index.clone(), plan.coefficient.clone(), plan.discount.clone()
    gradient = torch.ones(plan.index.shape[1], 5, dtype=torch.float64)
    if spoilt == "order":
        index = torch.cat([index, index[-1:]])
        coefficient, discount = torch.ones(index.shape, dtype=torch.float64), torch.zeros(len(index))
    elif spoilt == "range":
        index[row, column] = data.draw(st.sampled_from([-1, -STEPS])) if row == 0 else STEPS + 3
        coefficient[row, column] = 0.5
    elif spoilt == "shape":
        coefficient = coefficient[:, :-1]
    elif spoilt == "nan":
        coefficient[row, column] = data.draw(st.sampled_from([float("nan"), float("inf")]))
    else:
        gradient = gradient[:-1]
    with pytest.raises(ValueError, match=r"^(the )?(plan|x0_gradient)"):
        surrogate_backward(SurrogatePlan(index, coefficient, discount), WORLD.rollout, never, gradient)


def test_columns_without_part_in_a_row_cost_no_forward() -> None:
    plan = SurrogatePlan(
        index=torch.tensor([[0, 1], [0, 3], [5, 4]]),
        coefficient=torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]),
        discount=torch.zeros(3),
    )
    WORLD.velocity.calls.clear()
    surrogate_backward(plan, WORLD.rollout, WORLD.velocity, torch.ones(2, 5, dtype=torch.float64), microbatch=10)
    WORLD.gradients()
    assert WORLD.velocity.calls == [4]


def test_a_negative_ratio_is_refused() -> None:
    plan = SurrogatePlan(torch.tensor([[0]]), torch.ones(1, 1), torch.zeros(1))
    with pytest.raises(ValueError, match="max_ratio"):
        dataclasses.replace(plan, max_ratio=-1.0)
