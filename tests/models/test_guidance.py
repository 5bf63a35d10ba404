"""Classifier-free guidance with two velocities: values, gradients, and what is alive at a time."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from family_checks import write_config
from small_models import small_flux, small_vae
from small_runs import config_of
from tiny_folders import save_qwen_image, save_stable_diffusion_3
from torch import Tensor
from worlds import flux_embeddings, relative_difference

from leapalign.config import config_from, load_config
from leapalign.diagnostics.true_gradient import true_gradient
from leapalign.inputs.validation import UserError
from leapalign.methods import get_method
from leapalign.models.flux import FluxModel
from leapalign.models.velocity import GuidedEmbeddings, GuidedVelocity, prompted_velocity, undetached
from leapalign.planning.ledger import StorageLedger
from leapalign.planning.simulate import simulate
from leapalign.rollout import Rollout, sample_rollout
from leapalign.surrogate import surrogate_backward
from leapalign.tiny.model import build_scheduler
from leapalign.trainer import Trainer

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
    """``u + s (c - u)``, written out; without gradient through ``u`` where it is detached."""
    negative = embeddings.negative[torch.zeros(len(x), dtype=torch.int64)]
    u, c = model.velocity(x, sigma, negative), model.velocity(x, sigma, embeddings.prompts)
    u = u.detach() if embeddings.gradient == "detached" else u
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
@pytest.mark.parametrize("gradient", ["full", "detached"])
def test_the_staged_gradient_is_the_inline_one(model, embeddings, rollout, gradient, batched, microbatch) -> None:
    embeddings = dataclasses.replace(embeddings, gradient=gradient)
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


@pytest.mark.parametrize("batched", [True, False])
def test_the_velocity_itself_may_be_differentiated(model, embeddings, rollout, batched: bool) -> None:
    """In line, as a trainer of your own would."""
    embeddings = dataclasses.replace(embeddings, gradient="detached", batched=batched)
    x, sigma = rollout.latents[2].clone().requires_grad_(), rollout.sigmas[2].expand(BATCH)
    found = []
    for velocity in (prompted_velocity(model, embeddings), functools.partial(plain, model, embeddings)):
        (of_input,) = torch.autograd.grad(velocity(x, sigma).sin().sum(), x, retain_graph=False)
        velocity(x, sigma).sin().sum().backward()
        found.append(torch.cat([of_input.flatten(), collected(model)]))
    assert relative_difference(*found) <= 1e-10


def test_what_is_left_out_is_the_negative_ones_share(model, embeddings, rollout) -> None:
    """``dv/dtheta = s J_c + (1 - s) J_u``, of which detached is the first term; the two are far apart."""
    method = get_method("draft_k", steps=1)
    plan = method.plan(rollout.sigmas, **method.draw(STEPS, BATCH, torch.Generator()))
    found = {}
    for gradient in ("full", "detached"):
        velocity = prompted_velocity(model, dataclasses.replace(embeddings, gradient=gradient))
        surrogate_backward(plan, rollout, velocity, torch.ones_like(rollout.latents[-1]))
        found[gradient] = collected(model)
    x, sigma = rollout.latents[-2], rollout.sigmas[-2].expand(BATCH)
    terms = []
    for share, prompts in ((SCALE, embeddings.prompts), (1 - SCALE, embeddings.negative[torch.zeros(BATCH).long()])):
        (-share * rollout.sigmas[-2] * model.velocity(x, sigma, prompts).sum()).backward()
        terms.append(collected(model))
    assert relative_difference(found["detached"], terms[0]) <= 1e-10
    assert relative_difference(found["full"], terms[0] + terms[1]) <= 1e-10
    assert relative_difference(found["detached"], found["full"]) > 0.5


def test_the_true_gradient_is_the_whole_one(model, embeddings, rollout) -> None:
    found = []
    for gradient in ("full", "detached"):
        velocity = prompted_velocity(model, dataclasses.replace(embeddings, gradient=gradient))
        true = true_gradient(rollout, undetached(velocity), torch.ones_like(rollout.latents[-1]))
        found.append(torch.cat([value.flatten() for value in true.values()]))
    assert torch.equal(*found)


def test_a_compensated_gradient_is_divided_by_the_scale_once(parts: Path, tmp_path: Path) -> None:
    """And so is the term through both leaps, which guidance multiplies by its square."""
    found = {}
    for scale, compensated in ((3.5, False), (3.5, True), (0.5, False), (0.5, True)):
        asked = (f"model.true_cfg_scale={scale}", f"model.cfg_gradient_compensated={compensated}")
        config = config_of(
            parts, tmp_path, "method={name: leapalign, alpha: 1.0}", "model.cfg_gradient=detached", *asked
        )
        trainer = Trainer.from_config(config)
        trainer.accumulate_gradients()
        found[scale, compensated] = collected(trainer.model)
    assert found[3.5, False].norm() > 0
    assert relative_difference(found[3.5, True], found[3.5, False] / 3.5) <= 1e-5
    assert torch.equal(found[0.5, True], found[0.5, False])


def test_guidance_without_a_gradient_is_refused() -> None:
    with pytest.raises(UserError, match=r"true_cfg_scale 0 .*; set model.cfg_gradient to full"):
        config_from({"model": {"true_cfg_scale": 0, "cfg_gradient": "detached"}}, "a config")


def test_one_branch_after_the_other_holds_half_the_activations(model, embeddings, rollout) -> None:
    peaks = {}
    for batched, gradient in ((True, "full"), (False, "full"), (True, "detached"), (False, "detached")):
        with StorageLedger() as ledger:
            ledger.exclude(*model.transformer.parameters(), rollout.latents, rollout.velocities, rollout.sigmas)
            gradients(model, dataclasses.replace(embeddings, batched=batched, gradient=gradient), rollout, None)
        peaks[batched, gradient] = ledger.peak
    weights = sum(p.numel() * 8 for p in model.transformer.parameters())
    most = peaks.pop((True, "full")) - weights
    assert all(peak - weights < 0.6 * most for peak in peaks.values())


def test_selected_samples_keep_their_prompts(model, embeddings) -> None:
    velocity = prompted_velocity(model, embeddings)
    assert isinstance(velocity, GuidedVelocity)
    x, sigma = torch.randn(BATCH, 16, 16, dtype=torch.float64), torch.full((BATCH,), 0.5, dtype=torch.float64)
    chosen = torch.tensor([2, 0])
    with torch.no_grad():
        torch.testing.assert_close(velocity.select(chosen)(x[chosen], sigma[chosen]), velocity(x, sigma)[chosen])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "ratio"), [("linear", 2.0), ("norm preserving", 1.6)])
def test_a_simulation_shows_the_work_that_is_saved(family: str, ratio: float, tmp_path: Path) -> None:
    """With blocks recomputed a velocity and its backward take four forwards, two velocities' eight; of the negative
    prompt none is left where guidance is a weighted sum, and one where it is not: 8 / 4, and 8 / (4 + 1)."""
    {"linear": save_stable_diffusion_3, "norm preserving": save_qwen_image}[family](tmp_path / "model")
    found = {}
    for gradient in ("full", "detached"):
        model = {"path": str(tmp_path / "model"), "true_cfg_scale": 4.0, "cfg_gradient": gradient, "width": 96}
        blocks = {"memory": {"checkpointing": "blocks"}, "method": {"name": "leapalign", "alpha": 1.0}}
        found[gradient] = simulate(load_config(write_config(tmp_path, model, **blocks)))
    full, detached = (found[gradient].flops["surrogate"] for gradient in ("full", "detached"))
    assert full / detached == pytest.approx(ratio, rel=0.05)
    assert found["full"].flops["rollout"] == found["detached"].flops["rollout"]
    peaks = {gradient: one.device["surrogate"].by_role for gradient, one in found.items()}
    assert peaks["detached"]["activations"] < 0.8 * peaks["full"]["activations"]
