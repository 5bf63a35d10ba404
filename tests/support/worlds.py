"""Small models that several tests share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from small_models import small_flux, small_vae
from torch import Tensor, nn

from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.flux import FluxModel
from leapalign.models.velocity import PromptedVelocity
from leapalign.rollout import Rollout, sample_rollout
from leapalign.tiny.model import build_scheduler


@dataclass
class World:
    """A velocity network with a rollout on it, and a reward gradient at the generated latent."""

    velocity: Any
    parameters: list[nn.Parameter]
    rollout: Rollout
    x0_gradient: Tensor
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(7))

    def gradients(self) -> Tensor:
        """All parameter gradients as one vector, cleared afterwards."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([part.flatten() for part in parts])
        for parameter in self.parameters:
            parameter.grad = None
        return flat


class VectorField(nn.Module):
    """A perceptron over flattened latents and sigma."""

    def __init__(self, shape: tuple[int, ...], width: int = 24) -> None:
        super().__init__()
        size = int(torch.tensor(shape).prod())
        self.layers = nn.Sequential(nn.Linear(size + 1, width), nn.Tanh(), nn.Linear(width, size))

    def forward(self, latents: Tensor, sigma: Tensor) -> Tensor:
        inputs = torch.cat([latents.flatten(1), sigma[:, None].to(latents)], dim=1)
        return self.layers(inputs).view_as(latents)


def vector_world(shape: tuple[int, ...], batch: int, steps: int, dtype: torch.dtype = torch.float64) -> World:
    """A `VectorField` world; sigmas are unevenly spaced."""
    network = VectorField(shape).to(dtype)
    sigmas = torch.linspace(1, 0, steps + 1, dtype=dtype) ** 1.3
    rollout = sample_rollout(network, torch.randn(batch, *shape, dtype=dtype), sigmas)
    return World(network, list(network.parameters()), rollout, torch.randn(batch, *shape, dtype=dtype))


@dataclass
class Conditioned:
    """A velocity that depends on a condition per sample, and records how many samples each call had."""

    network: VectorField
    condition: Tensor
    calls: list[int] = field(default_factory=list)

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        self.calls.append(len(latents))
        return self.network(latents * self.condition.view(-1, *[1] * (latents.dim() - 1)), sigma)

    def select(self, samples: Tensor) -> Conditioned:
        return Conditioned(self.network, self.condition[samples], self.calls)


def conditioned_world(shape: tuple[int, ...], batch: int, steps: int) -> World:
    """A `vector_world` whose velocity is conditioned."""
    network = VectorField(shape).double()
    velocity = Conditioned(network, torch.linspace(0.5, 1.5, batch, dtype=torch.float64))
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 1.3
    rollout = sample_rollout(velocity, torch.randn(batch, *shape, dtype=torch.float64), sigmas)
    return World(velocity, list(network.parameters()), rollout, torch.randn(batch, *shape, dtype=torch.float64))


def flux_embeddings(batch: int, dtype: torch.dtype = torch.float32) -> PromptEmbeddings:
    tokens, pooled = torch.randn(batch, 5, 20, dtype=dtype), torch.randn(batch, 10, dtype=dtype)
    return PromptEmbeddings({"tokens": tokens, "pooled": pooled})


def flux_world(batch: int, steps: int, dtype: torch.dtype) -> World:
    """A `small_flux` world; the velocity is conditioned on prompts."""
    model = FluxModel(small_flux().to(dtype), build_scheduler(), 64, 64, small_vae())
    velocity = PromptedVelocity(model, flux_embeddings(batch, dtype))
    sigmas = model.sigmas(steps).to(dtype)
    rollout = sample_rollout(velocity, torch.randn(batch, 16, 16, dtype=dtype), sigmas)
    return World(velocity, list(model.transformer.parameters()), rollout, torch.randn(batch, 16, 16, dtype=dtype))


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
