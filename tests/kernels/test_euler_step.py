from __future__ import annotations

from itertools import pairwise

import pytest
import tolerances
import torch
from kernel_cases import HALVES_AND_FLOAT, LAYOUTS, SHAPES, latents, sigmas
from leap_kernels import euler_step
from leap_kernels.euler_step import reference_backward, reference_forward


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_float64(guided: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, cond, uncond = (latents(*shape, dtype=dtype) for _ in range(3))
    sigma, sigma_next = sigmas(shape[0])
    scale = 1 + 3 * torch.rand(shape[0], device=x.device)
    guidance = (uncond, scale) if guided else ()
    got = euler_step(x, cond, sigma, sigma_next, *guidance)
    assert got.dtype == dtype
    for b in range(shape[0]):
        xb, c, u = x[b].double(), cond[b].double(), uncond[b].double()
        g = scale[b].double() if guided else torch.ones((), dtype=torch.float64)
        step = sigma_next[b].double() - sigma[b].double()
        exact = xb + step * (g * c + (1 - g) * u)
        magnitude = xb.abs() + step.abs() * (u.abs() + g * (c.abs() + u.abs()))
        allowed = tolerances.elementwise(exact, magnitude, dtype, operations=6)
        assert ((got[b].double() - exact).abs() <= allowed).all()


def test_reaches_the_image_on_a_straight_path() -> None:
    noise, image = latents(2, 9), latents(2, 9)
    x = noise
    levels = torch.linspace(1, 0, 6, dtype=torch.float64)
    for sigma, sigma_next in pairwise(levels):
        x = euler_step(x, noise - image, sigma, sigma_next)
    torch.testing.assert_close(x, image)


def test_gradcheck() -> None:
    x, cond, uncond = (latents(2, 3, 4).requires_grad_() for _ in range(3))
    a, b = (s.double() for s in sigmas(2))
    scale = torch.tensor([3.5, 1.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, c, u: euler_step(x, c, a, b, u, scale), (x, cond, uncond))
    assert torch.autograd.gradcheck(lambda x, c: euler_step(x, c, a, b), (x, cond))


def test_reference_backward_is_autograd_of_reference_forward() -> None:
    x, cond, uncond, grad = (latents(2, 5) for _ in range(4))
    cond.requires_grad_(), uncond.requires_grad_()
    delta, scale = sigmas(2)[0].double() - 1, torch.tensor([3.5, 0.5], dtype=torch.float64)
    by_autograd = torch.autograd.grad(reference_forward(x, cond, delta, uncond, scale), (cond, uncond), grad)
    for factor, expected in zip((delta * scale, delta * (1 - scale)), by_autograd, strict=True):
        torch.testing.assert_close(reference_backward(grad, factor, torch.float64), expected)


def test_gradients_keep_their_tensors_dtypes() -> None:
    x = latents(2, 5, dtype=torch.float32).requires_grad_()
    cond, uncond = (latents(2, 5, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    euler_step(x, cond, 0.9, 0.5, uncond, 2.0).sum().backward()
    assert x.grad.dtype == torch.float32
    assert cond.grad.dtype == uncond.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout) -> None:
    x, cond, uncond = (latents(3, 8, 9) for _ in range(3))
    strided = euler_step(layout(x), layout(cond), 0.9, 0.4, layout(uncond), 3.5)
    torch.testing.assert_close(strided, euler_step(x, cond, 0.9, 0.4, uncond, 3.5))


def test_wrong_arguments_are_named() -> None:
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="together"):
        euler_step(good, good, 1.0, 0.5, uncond_velocity=good)
    with pytest.raises(ValueError, match="together"):
        euler_step(good, good, 1.0, 0.5, guidance_scale=3.5)
    with pytest.raises(ValueError, match="uncond_velocity"):
        euler_step(good, good, 1.0, 0.5, torch.zeros(2, 4), 3.5)
    with pytest.raises(ValueError, match="guidance_scale"):
        euler_step(good, good, 1.0, 0.5, good, torch.zeros(3))
    with pytest.raises(ValueError, match="at least one element"):
        euler_step(torch.zeros(0, 3), torch.zeros(0, 3), 1.0, 0.5)
