"""The sampler's trajectory: Euler steps without gradients, every latent and velocity kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from leap_kernels import euler_step
from torch import Tensor

from leapalign.memory.constants import made_there
from leapalign.memory.repetition import repeated
from leapalign.memory.residency import made_for
from leapalign.storage.faults import point

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""``velocity_fn(latents (B, ...), sigma (B,)) -> velocity (B, ...)``, guidance included."""


@dataclass(frozen=True)
class Rollout:
    """One batch of trajectories, from noise (index 0) to image (index T).

    latents: ``(T + 1, B, ...)``; ``latents[-1]`` is the generated latent.
    velocities: ``(T, B, ...)``; ``velocities[t]`` was evaluated at ``latents[t]``.
    sigmas: ``(T + 1,)`` noise levels, strictly descending to 0.

    Raises ValueError where the three do not fit together.
    """

    latents: Tensor
    velocities: Tensor
    sigmas: Tensor

    def __post_init__(self) -> None:
        steps = len(self.velocities)
        if steps < 1 or self.latents.shape != (steps + 1, *self.velocities.shape[1:]):
            raise ValueError(
                f"a rollout of T steps needs T+1 latents and T velocities of one shape, "
                f"got latents {tuple(self.latents.shape)} and velocities {tuple(self.velocities.shape)}"
            )
        if self.sigmas.shape != (steps + 1,):
            raise ValueError(f"sigmas must have shape ({steps + 1},), got {tuple(self.sigmas.shape)}")
        if not bool((self.sigmas.diff() < 0).all()) or self.sigmas[-1] != 0:
            raise ValueError("sigmas must descend strictly and end at 0")

    @property
    def num_steps(self) -> int:
        return len(self.velocities)

    @property
    def batch_size(self) -> int:
        return self.latents.shape[1]

    def latents_at(self, index: Tensor) -> Tensor:
        """Latents ``(N, ...)`` at the steps ``index (N,)``; entry n belongs to sample ``n % B``."""
        return picked(self.latents, index, self._samples(index))

    def velocities_at(self, index: Tensor) -> Tensor:
        """Velocities ``(N, ...)`` at the steps ``index (N,)``; entry n belongs to sample ``n % B``."""
        return self.velocities_of(index, self._samples(index))

    def velocities_of(self, steps: Tensor, samples: Tensor) -> Tensor:
        """Velocities ``(N, ...)``; entry n is of sample ``samples[n]`` at step ``steps[n]``."""
        return picked(self.velocities, steps, samples)

    def posterior_mean(self, index: int | Tensor) -> Tensor:
        """One leap to the image, ``x_t - sigma_t v_t``: ``(N, ...)``. ``index``: a step for all B samples, or ``(N,)``
        steps, entry n for sample ``n % B``."""
        steps = torch.as_tensor(index)
        steps = steps.expand(self.batch_size) if steps.dim() == 0 else steps
        sigma = per_sample(made_there(self.sigmas[steps].tolist(), self.latents), self.latents[0])
        return self.latents_at(steps) - sigma * self.velocities_at(steps)

    def _samples(self, index: Tensor) -> Tensor:
        return torch.arange(len(index)) % self.batch_size


def picked(of: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``of[rows, columns]``, ``(N, ...)``, for ``(N,)`` int64 positions in host memory.

    Entry by entry: positions as tensors would be copied to the device of ``of``, and have the host wait for it.
    """
    return torch.stack([of[row, column] for row, column in zip(rows.tolist(), columns.tolist(), strict=True)])


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """``value (B,)`` shaped to broadcast over ``like (B, ...)``, in its dtype."""
    return value.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


@torch.no_grad()
def sample_rollout(velocity_fn: VelocityFn, noise: Tensor, sigmas: Tensor) -> Rollout:
    """Integrates ``dx/dsigma = v`` from ``noise (B, ...)`` at ``sigmas[0]`` down ``sigmas (T + 1,)``.

    Each step is ``x_{t+1} = x_t + (sigma_{t+1} - sigma_t) v_t``, computed in float32 or wider.
    """
    latents, velocities = [noise], []
    # Once, as each copy of a level would have the host wait for the device.
    levels = sigmas.to(noise.device)
    for sigma, sigma_next in itertools.pairwise(levels):
        point("rollout")
        velocity = evaluated(velocity_fn, latents[-1], sigma.expand(len(noise)))
        velocities.append(velocity)
        with made_for("latents"):
            latents.append(euler_step(latents[-1], velocity, sigma, sigma_next))
    with made_for("latents"):
        return Rollout(torch.stack(latents), torch.stack(velocities), sigmas)


@repeated
def evaluated(velocity_fn: VelocityFn, latents: Tensor, sigma: Tensor) -> Tensor:
    """``velocity_fn(latents, sigma)``, where a simulation may step in."""
    return velocity_fn(latents, sigma)
