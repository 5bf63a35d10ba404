from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, latents, sigmas
from leap_kernels import leap_distances, leap_update, use_backend


def test_are_those_of_the_two_leaps() -> None:
    x_k, v_k, x_j, v_j, x_end = (latents(3, 5, 7) for _ in range(5))
    sigma_k, sigma_j = (s.double() for s in sigmas(3))
    d_j, d_end = leap_distances(x_k, v_k, x_j, v_j, x_end, sigma_k, sigma_j)
    torch.testing.assert_close(d_j, leap_update(x_k, v_k, sigma_k, sigma_j, x_j)[1])
    torch.testing.assert_close(d_end, leap_update(x_j, v_j, sigma_j, 0.0, x_end)[1])
    assert d_j.dtype == d_end.dtype == torch.float64


def test_vanish_on_straight_trajectories() -> None:
    noise, image = latents(2, 9), latents(2, 9)
    x_k, x_j, velocity = 0.75 * noise + 0.25 * image, 0.5 * noise + 0.5 * image, noise - image
    d_j, d_end = leap_distances(x_k, velocity, x_j, velocity, image, 0.75, 0.5)
    assert d_j.max() < 1e-15
    assert d_end.max() < 1e-15


@pytest.mark.parametrize("backend", BACKENDS)
def test_latents_and_velocities_may_differ_in_dtype(backend: str) -> None:
    for latent, velocity in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        kinds = (latent, velocity, latent, velocity, latent)
        tensors = [latents(2, 70, dtype=kind) for kind in kinds]
        with use_backend(backend, strict=True):
            measured = leap_distances(*tensors, 0.9, 0.4)
        expected = leap_distances(*(t.double() for t in tensors), 0.9, 0.4)
        for got, want in zip(measured, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_no_gradient() -> None:
    tensors = [latents(2, 3).requires_grad_() for _ in range(5)]
    assert not any(d.requires_grad for d in leap_distances(*tensors, 0.9, 0.4))


def test_wrong_arguments_are_named() -> None:
    good = [torch.zeros(2, 3)] * 5
    with pytest.raises(ValueError, match="x_end"):
        leap_distances(*good[:4], torch.zeros(2, 4), 0.9, 0.4)
    with pytest.raises(ValueError, match="at least one element"):
        leap_distances(*[torch.zeros(0, 3)] * 5, 0.9, 0.4)
    with pytest.raises(ValueError, match="sigma_j"):
        leap_distances(*good, 0.9, torch.zeros(3))
