from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kernel_cases import BACKENDS, latents
from leap_kernels import euler_step, use_backend

by_backend = pytest.mark.parametrize("backend", BACKENDS)


def test_reaches_the_image_on_a_straight_path() -> None:
    noise, image = latents(2, 9), latents(2, 9)
    x = noise
    levels = torch.linspace(1, 0, 6, dtype=torch.float64)
    for sigma, sigma_next in pairwise(levels):
        x = euler_step(x, noise - image, sigma, sigma_next)
    torch.testing.assert_close(x, image)


@by_backend
@pytest.mark.parametrize("wanted", [("cond",), ("uncond",), ("cond", "uncond")], ids=str)
@pytest.mark.parametrize("uncond_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_each_velocity_gets_its_gradient_alone_and_with_the_other(backend: str, wanted, uncond_dtype) -> None:
    x = latents(2, 5, dtype=torch.float32)
    velocities = {"cond": latents(2, 5, dtype=torch.bfloat16), "uncond": latents(2, 5, dtype=uncond_dtype)}
    leaves = [velocities[name].requires_grad_() for name in wanted]
    # Native code takes velocities of one dtype.
    with use_backend(backend):
        stepped = euler_step(x, velocities["cond"], 0.9, 0.5, velocities["uncond"], 2.0)
    gradients = torch.autograd.grad(stepped.sum(), leaves)
    for name, gradient in zip(wanted, gradients, strict=True):
        assert gradient.dtype == velocities[name].dtype
        torch.testing.assert_close(
            gradient.float(), torch.full_like(x, {"cond": -0.8, "uncond": 0.4}[name]), rtol=8e-3, atol=0
        )


@by_backend
def test_mixed_dtypes_keep_the_dtype_of_x(backend: str) -> None:
    for kind in (torch.bfloat16, torch.float16):
        x, velocity = latents(2, 65, dtype=torch.float32), latents(2, 65, dtype=kind)
        with use_backend(backend, strict=True):
            wide, narrow = euler_step(x, velocity, 0.9, 0.5), euler_step(velocity, x, 0.9, 0.5)
        assert wide.dtype == torch.float32
        torch.testing.assert_close(wide, x - 0.4 * velocity.float())
        torch.testing.assert_close(narrow, (velocity.float() - 0.4 * x).to(kind), rtol=8e-3, atol=1e-5)


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
