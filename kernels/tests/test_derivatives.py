"""Forward-mode derivatives of the ops that are linear in their latents."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import latents
from leap_kernels import euler_step, leap_update, scale_gradient
from torch import Tensor
from torch.autograd import forward_ad

X = torch.ones(2, 3)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return latents(*shape, dtype=dtype).requires_grad_()


LINEAR = {
    "leap": lambda x, v, u: leap_update(x, v, 1.0, 0.25)[0],
    "connector": lambda x, v, u: leap_update(x, v, 1.0, 0.25, torch.ones_like(x))[0],
    "euler": lambda x, v, u: euler_step(x, v, 1.0, 0.25),
    "guided": lambda x, v, u: euler_step(x, v, 1.0, 0.25, u, 3.5),
    "scaled": lambda x, v, u: scale_gradient(x, 0.3),
    "scaled twice": lambda x, v, u: torch.autograd.grad(
        euler_step(X.double(), v * 1, 1.0, 0.25, u * 1, 3.5), (v, u), x, create_graph=True
    )[0],
}


@pytest.mark.parametrize("name", LINEAR)
def test_forward_mode_is_the_transpose_of_the_backward_pass(name: str) -> None:
    """Of each input by itself, and in the transform of torch.func."""
    inputs = [leaf(2, 3, dtype=torch.float64) for _ in range(3)]
    tangents = [latents(2, 3) for _ in inputs]
    cotangent = latents(2, 3)
    output = LINEAR[name](*inputs)
    gradients = torch.autograd.grad(output, inputs, cotangent, allow_unused=True, retain_graph=True)
    for number, (gradient, tangent) in enumerate(zip(gradients, tangents, strict=True)):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, tangent) if i == number else x for i, x in enumerate(inputs)]
            forward = forward_ad.unpack_dual(LINEAR[name](*duals)).tangent
        if gradient is None:
            assert forward is None or not forward.any()
        else:
            torch.testing.assert_close((forward * cotangent).sum(), (gradient * tangent).sum())


@pytest.mark.parametrize("name", [name for name in LINEAR if name != "scaled twice"])
def test_forward_mode_of_torch_func(name: str) -> None:
    x, v, u = (latents(2, 3) for _ in range(3))
    forward, reverse = (
        jacobian(LINEAR[name], argnums=1)(x, v, u) for jacobian in (torch.func.jacfwd, torch.func.jacrev)
    )
    torch.testing.assert_close(forward, reverse)
