"""Classifier-free guidance with two velocities: values, gradients, and what is alive at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_folders import small_vae
from torch import Tensor
from worlds import flux_embeddings, relative_difference, small_flux

from leapalign.methods import get_method
from leapalign.models.flux import FluxModel
from leapalign.models.velocity import GuidedEmbeddings, GuidedVelocity, prompted_velocity
from leapalign.planning.ledger import StorageLedger
from leapalign.rollout import Rollout, sample_rollout
from leapalign.surrogate import surrogate_backward
from leapalign.tiny.model import build_scheduler

SCALE, BATCH, STEPS = 3.5, 3, 5


@pytest.fixture(scope="module")
def model() -> FluxModel:
    return FluxModel(small_flux().double(), build_scheduler(), 64, 64, small_vae())


@pytest.fixture(scope="module")
def embeddings() -> GuidedEmbeddings:
    prompts, negative = flux_embeddings(BATCH, torch.float64), flux_embeddings(1, torch.float64)
    return GuidedEmbeddings(prompts, negative, SCALE, batched=True)


@pytest.fixture(scope="module")
def rollout(model: FluxModel, embeddings: GuidedEmbeddings) -> Rollout:
    noise = torch.randn(BATCH, 16, 16, dtype=torch.float64)
    return sample_rollout(prompted_velocity(model, embeddings), noise, model.sigmas(STEPS).double())


def plain(model: FluxModel, embeddings: GuidedEmbeddings, x: Tensor, sigma: Tensor) -> Tensor:
    """``u + s (c - u)``, written out."""
    negative = embeddings.negative[torch.zeros(len(x), dtype=torch.int64)]
    u, c = model.velocity(x, sigma, negative), model.velocity(x, sigma, embeddings.prompts)
    return u + SCALE * (c - u)


def gradients(model: FluxModel, embeddings: GuidedEmbeddings, rollout: Rollout, microbatch: int | None) -> Tensor:
    method = get_method("leapalign", alpha=0.7)
    indices = method.draw(STEPS, BATCH, torch.Generator().manual_seed(1))
    gradient = torch.ones_like(rollout.latents[-1])
    velocity = prompted_velocity(model, embeddings)
    surrogate_backward(method.plan(rollout.sigmas, **indices), rollout, velocity, gradient, microbatch=microbatch)
    return collected(model)


def collected(model: FluxModel) -> Tensor:
    parameters = list(model.transformer.parameters())
    flat = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters])
    model.transformer.zero_grad(set_to_none=True)
    return flat


def test_rollout_follows_the_guided_velocity(model, embeddings, rollout) -> None:
    sigma = rollout.sigmas[2].expand(BATCH)
    with torch.no_grad():
        expected = plain(model, embeddings, rollout.latents[2], sigma)
    assert relative_difference(rollout.velocities[2], expected) <= 1e-12
    unguided = dataclasses.replace(embeddings, scale=1.0)
    with torch.no_grad():
        other = prompted_velocity(model, unguided)(rollout.latents[2], sigma)
    assert relative_difference(other, expected) > 1e-3, "guidance matters"


@pytest.mark.parametrize("microbatch", [None, 1, 2, 9])
@pytest.mark.parametrize("batched", [True, False])
def test_gradients_go_through_both_branches(model, embeddings, rollout, batched: bool, microbatch) -> None:
    method = get_method("leapalign", alpha=0.7)
    indices = method.draw(STEPS, BATCH, torch.Generator().manual_seed(1))
    k, j, samples = indices["k"], indices["j"], torch.arange(BATCH)
    sigma_k, sigma_j = rollout.sigmas[k], rollout.sigmas[j]
    x_k, x_j = rollout.latents[k, samples], rollout.latents[j, samples]
    predicted = x_k - (sigma_k - sigma_j).view(-1, 1, 1) * plain(model, embeddings, x_k, sigma_k)
    connected = predicted + (x_j - predicted).detach()
    discounted = 0.7 * connected + 0.3 * connected.detach()
    end = connected - sigma_j.view(-1, 1, 1) * plain(model, embeddings, discounted, sigma_j)
    end.sum().backward()
    expected = collected(model)
    chosen = dataclasses.replace(embeddings, batched=batched)
    assert relative_difference(gradients(model, chosen, rollout, microbatch), expected) <= 1e-10


def test_one_branch_after_the_other_holds_half_the_activations(model, embeddings, rollout) -> None:
    peaks = {}
    for batched in (True, False):
        with StorageLedger() as ledger:
            ledger.exclude(*model.transformer.parameters(), rollout.latents, rollout.velocities, rollout.sigmas)
            gradients(model, dataclasses.replace(embeddings, batched=batched), rollout, None)
        peaks[batched] = ledger.peak
    weights = sum(p.numel() * 8 for p in model.transformer.parameters())
    assert peaks[False] - weights < 0.6 * (peaks[True] - weights)


def test_selected_samples_keep_their_prompts(model, embeddings) -> None:
    velocity = prompted_velocity(model, embeddings)
    assert isinstance(velocity, GuidedVelocity)
    x, sigma = torch.randn(BATCH, 16, 16, dtype=torch.float64), torch.full((BATCH,), 0.5, dtype=torch.float64)
    chosen = torch.tensor([2, 0])
    with torch.no_grad():
        torch.testing.assert_close(velocity.select(chosen)(x[chosen], sigma[chosen]), velocity(x, sigma)[chosen])
