"""The ops as PyTorch sees them: torch.library, compiled graphs, fake tensors, transforms."""

from __future__ import annotations

import dataclasses
import io
import sys
import threading

import block_cases
import leap_kernels
import pytest
import torch
from kernel_cases import BACKENDS, Case, by_case, latents
from leap_kernels import (
    Adam8bitState,
    BackendUnavailable,
    euler_step,
    leap_update,
    scale_gradient,
    stochastic_round_,
    use_backend,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

OPS = torch.ops.leap_kernels
X = torch.ones(2, 3)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return latents(*shape, dtype=dtype).requires_grad_()


def norm_rope_samples(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    heads = [leaf(2, tokens, 2, 4, dtype=dtype) for tokens in (3, 3, 2, 2)]
    weights, table = [leaf(4, dtype=dtype) for _ in range(4)], torch.rand(5, 2)
    alone = (*heads[:2], weights[0], *[None] * 7, 1e-6, False)
    joint = (*heads[:2], *weights[:2], *heads[2:], *weights[2:], table, table, 1e-6, True)
    grads = [latents(2, tokens, 2, 4, dtype=dtype) for tokens in (3, 3, 5, 5)]
    values = [argument.detach() if isinstance(argument, Tensor) else argument for argument in joint]
    return {
        "qk_norm_rope": [alone, joint],
        "qk_norm_rope_backward": [
            (*grads[2:], *values, [True] * 8),
            (*grads[2:], *values, [False, True, False, False, False, False, True, False]),
        ],
    }


def group_norm_samples(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    x, weight, bias = leaf(2, 4, 3, dtype=dtype), leaf(4, dtype=dtype), leaf(4, dtype=dtype)
    grad, values = latents(2, 4, 3, dtype=dtype), [value.detach() for value in (x, weight, bias)]
    moments = torch.rand(2, 2), torch.rand(2, 2)
    return {
        "group_norm_silu": [(x, 2, weight, bias, 1e-6), (x, 2, None, None, 1e-6)],
        "group_norm_silu_backward": [
            (grad, values[0], *moments, *values[1:], [True] * 3),
            (grad, values[0], *moments, None, None, [True, False, False]),
        ],
    }


def samples(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """Return arguments for every op in `torch.ops.leap_kernels`."""
    x, v, u = (leaf(2, 9, dtype=dtype) for _ in range(3))
    fixed = [latents(2, 9, dtype=dtype) for _ in range(5)]
    delta, scale = torch.rand(2, device=x.device), torch.rand(2, device=x.device)
    state = Adam8bitState.zeros_like(fixed[0])
    moments = [list(pair) for pair in zip(state.tensors(), Adam8bitState.zeros_like(fixed[2]).tensors(), strict=True)]
    return {
        "leap_update": [(x, v, delta, fixed[0])],
        "leap_distances": [(*fixed, delta, scale)],
        "consistency_weighted_loss": [(leaf(2), torch.rand(2, 2, device=x.device), 0.5, 0.1)],
        "combine_gradient_terms": [(*fixed[:2], delta, 0.3, None), (*fixed[:2], delta, 0.3, 0.5)],
        "euler_step": [(x, v, delta, None, None), (x, v, delta, u, scale)],
        "scale_gradient": [(x, delta)],
        **norm_rope_samples(dtype),
        **group_norm_samples(dtype),
        "scaled": [(x, delta, torch.float32)],
        "scaled_twice": [(x, delta, scale, dtype)],
        "stochastic_round_": [(fixed[0].bfloat16(), fixed[1].float(), -3, 5)],
        "accumulate_": [(fixed[0], fixed[1])],
        "ema_update_": [(fixed[0], fixed[1], 0.9)],
        "adamw_8bit_step_": [
            (fixed[0], *state.tensors(), fixed[1].float(), 1e-3, 0.9, 0.99, 1e-8, 0.1, 1, 0.5, -3, 5),
        ],
        "total_norm": [([fixed[0], fixed[1].float(), fixed[2][:, 1:]],)],
        "adamw_8bit_step_many_": [
            (
                *([fixed[0], fixed[2]], *moments, [fixed[1].float(), fixed[3]]),
                *(1e-3, 0.9, 0.99, 1e-8, 0.1, [1, 3], 0.5, -3, [5, 8]),
            ),
        ],
    }


WITHOUT_TRITON = {"adamw_8bit_step_"}
WITHOUT_NATIVE = {"total_norm"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", samples(torch.float32))
def test_opcheck(name: str, backend: str) -> None:
    lacking = {"triton": WITHOUT_TRITON, "native": WITHOUT_NATIVE}
    with use_backend(backend, strict=name not in lacking.get(backend, ())):
        for dtype in (torch.float32, torch.bfloat16):
            for arguments in samples(dtype)[name]:
                opcheck(getattr(OPS, name).default, arguments)


def test_every_op_is_checked() -> None:
    registered = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "leap_kernels::" in name}
    assert registered == set(samples(torch.float32)) | set(block_cases.samples(torch.float32))


@by_case
def test_compiles_to_one_graph(case: Case) -> None:
    inputs = case.inputs((2, 3, 5), torch.float32)
    compiled = dataclasses.replace(case, op=torch.compile(case.op, fullgraph=True, backend="aot_eager"))
    for got, want in zip(compiled.run(inputs), case.run(inputs), strict=True):
        assert torch.equal(got, want)
    torch.compiler.reset()


def two_leaps(x_k: Tensor, v_k: Tensor, x_j: Tensor, dst: Tensor) -> Tensor:
    first, distance = leap_update(x_k, v_k, 0.9, 0.4, x_j)
    second = euler_step(scale_gradient(first, 0.3), first.sin(), 0.4, 0.0)
    stochastic_round_(dst, second.detach(), 7, 0)
    return second * distance[:, None]


@pytest.mark.slow
def test_inductor_compiles_a_trajectory_with_an_op_in_place() -> None:
    x_k, x_j = latents(2, 64, dtype=torch.float32), latents(2, 64, dtype=torch.float32)
    results = []
    for function in (two_leaps, torch.compile(two_leaps, fullgraph=True)):
        v_k, dst = torch.ones_like(x_k, requires_grad=True), torch.zeros_like(x_k, dtype=torch.bfloat16)
        result = function(x_k, v_k, x_j, dst)
        result.sum().backward()
        results.append((result.detach(), v_k.grad, dst.float()))
    for eager, compiled in zip(*results, strict=True):
        assert eager.any()
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@by_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_have_the_shapes_of_real_ones(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs((2, 3, 5), dtype)
    with FakeTensorMode() as mode:
        fakes = case.run({name: mode.from_tensor(value) for name, value in inputs.items()})
    for fake, real in zip(fakes, case.run(inputs), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_differentiate_and_batch_ops() -> None:
    _, vjp = torch.func.vjp(lambda v: leap_update(X, v, 1.0, 0.25)[0], X)
    assert torch.equal(vjp(X)[0], -0.75 * X)
    _, vjp = torch.func.vjp(lambda v: leap_update(X, v, 1.0, 0.25, 2 * X)[0], X)
    assert torch.equal(vjp(X)[0], -0.75 * X)
    jacobian = torch.func.jacrev(lambda v: euler_step(X, v, 1.0, 0.5))(X)
    assert torch.equal(jacobian.view(6, 6), -0.5 * torch.eye(6))
    gradient = torch.func.grad(lambda x: (2 * scale_gradient(x, 0.5)).sum())(X)
    assert torch.equal(gradient, X)
    batched = torch.vmap(lambda v: leap_update(X, v, 1.0, 0.5)[0])(torch.stack([X, 2 * X]))
    assert torch.equal(batched, torch.stack([X / 2, 0 * X]))


def test_what_scale_gradient_returns_can_be_changed_in_place() -> None:
    x = leaf(2, 3)
    y = scale_gradient(x, 0.5)
    y += 1
    y.mul_(3)
    assert torch.equal(y, (x + 1) * 3)
    (gradient,) = torch.autograd.grad(y, x, X)
    assert torch.equal(gradient, 1.5 * X)


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_anomaly_mode_names_the_op() -> None:
    velocity = X.clone().requires_grad_()
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="'EulerStepBackward' returned nan"):
        euler_step(X, velocity, 1.0, 0.5).backward(torch.nan * X)


def test_moments_are_loaded_in_safe_mode() -> None:
    file = io.BytesIO()
    state = Adam8bitState.zeros_like(X)
    torch.save({"moments": state}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["moments"]
    assert isinstance(loaded, Adam8bitState)
    assert all(torch.equal(a, b) for a, b in zip(loaded.tensors(), state.tensors(), strict=True))


def test_backward_takes_a_batch_of_gradients() -> None:
    velocity = X.clone().requires_grad_()
    leapt, _ = leap_update(X, velocity, 1.0, 0.25)
    grads = torch.stack([X, 2 * X])
    (batched,) = torch.autograd.grad(leapt, velocity, grads, is_grads_batched=True)
    assert torch.equal(batched, -0.75 * grads)


def test_gradients_of_gradients() -> None:
    x = leaf(2, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: leap_update(x, x * x, 1.0, 0.25)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: euler_step(x, x * x, 1.0, 0.25, x * x * x, 3.5), x)


def test_views_that_are_negated_lazily() -> None:
    """Their memory holds the opposite of their values."""
    negative = torch.complex(X, X).conj().imag
    assert negative.is_neg()
    assert torch.equal(euler_step(negative, X, 0.0, 1.0), 0 * X)


class Passing(Tensor):
    """A subclass without a meaning of its own."""


@pytest.mark.native
def test_tensor_subclasses_get_the_reference() -> None:
    x = X.as_subclass(Passing)
    assert torch.equal(euler_step(x, X, 1.0, 0.5), X / 2)
    with use_backend("native", strict=True), pytest.raises(BackendUnavailable, match="subclass"):
        euler_step(x, X, 1.0, 0.5)


def test_backward_pass_in_another_thread_keeps_the_setting(monkeypatch) -> None:
    """As on a GPU, where the backward pass has a thread of its own."""
    used = []
    kernels = {name: lambda grad, *_, name=name: used.append(name) or [grad] for name in ("native", "reference")}
    monkeypatch.setattr(sys.modules["leap_kernels.scale_gradient"], "_SCALED", kernels)
    velocity = X.clone().requires_grad_()
    with use_backend("reference"):
        outputs = [
            leap_update(X, velocity, 1.0, 0.5, X)[0],
            euler_step(X, velocity, 1.0, 0.5),
            scale_gradient(velocity, 2),
        ]
    thread = threading.Thread(target=lambda: [output.sum().backward() for output in outputs])
    thread.start()
    thread.join()
    assert used == ["reference"] * 3


def test_ops_in_place_count_as_changes() -> None:
    weights = torch.ones(3, requires_grad=True)
    for average in (torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)):
        product = weights * average
        leap_kernels.ema_update_(average, weights, 0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_profiler_sees_the_op() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        euler_step(X, X, 1.0, 0.5)
    assert "leap_kernels::euler_step" in {event.key for event in profile.key_averages()}
