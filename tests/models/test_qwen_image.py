"""Qwen-Image against diffusers' pipeline, and through the trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import family_checks as checks
import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from tiers import some_slow
from tiny_folders import PROMPTS, TOKENS, save_qwen_image
from torch import Tensor
from worlds import relative_difference

from leapalign.config import ModelConfig
from leapalign.inputs.validation import UserError
from leapalign.memory.attention import set_attention
from leapalign.methods import get_method
from leapalign.models import encode_prompts, load_model
from leapalign.models.embeddings import PromptEmbeddings, joined
from leapalign.models.velocity import prompted_velocity
from leapalign.planning.ledger import StorageLedger
from leapalign.rollout import Rollout, sample_rollout
from leapalign.surrogate import surrogate_backward

SIZE = {"height": 64, "width": 96}
NEGATIVE = "a cross"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "qwen"
    save_qwen_image(path)
    return path


def sampled(folder: Path, noise: Tensor, output: str, prompts: list[str], scale: float, **parts: Any) -> Any:
    pipeline = QwenImagePipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=prompts,
        negative_prompt=[NEGATIVE] * len(prompts) if scale > 1 else None,
        true_cfg_scale=scale,
        num_inference_steps=checks.STEPS,
        latents=noise,
        output_type=output,
        **SIZE,
    ).images


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_rollout_is_the_pipelines(folder: Path, scale: float, batched: bool) -> None:
    """Prompts of different lengths, and the negative prompt of another."""
    config = ModelConfig(
        path=str(folder), true_cfg_scale=scale, negative_prompt=NEGATIVE, true_cfg_batched=batched, **SIZE
    )
    model, rollout = checks.rollout_of(config)
    latents, images = (sampled(folder, rollout.latents[0], kind, PROMPTS, scale) for kind in ("latent", "pt"))
    checks.check_images(model, rollout, latents, images)


def test_a_prompt_does_not_depend_on_how_long_others_are(folder: Path) -> None:
    config = ModelConfig(path=str(folder), **SIZE)
    alone, beside = (checks.rollout_of(config, prompts)[1].latents[-1][0] for prompts in (PROMPTS[:1], PROMPTS))
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)
    parts = encode_prompts(config, PROMPTS).parts
    assert parts["mask"].sum(dim=1).tolist() == [8, TOKENS]


def test_sigma_is_per_sample(folder: Path) -> None:
    checks.check_sigma_is_per_sample(ModelConfig(path=str(folder), **SIZE))


def test_gradient_reaches_latents(folder: Path) -> None:
    checks.check_gradient_reaches_latents(ModelConfig(path=str(folder), **SIZE))


def test_pixels_that_are_cut_off_have_a_gradient(folder: Path) -> None:
    """`decode` of the autoencoder clamps to [-1, 1]."""
    model = load_model(ModelConfig(path=str(folder), **SIZE))
    with torch.no_grad():
        model.decoder.decoder.conv_out.bias.fill_(5.0)
    latents = model.draw_noise([3]).requires_grad_()
    images = model.decode(latents)
    assert images.min() > 1
    (gradient,) = torch.autograd.grad(images.sum(), latents)
    assert gradient.norm() > 0


def test_it_trains_and_the_pipeline_takes_what_it_learnt(folder: Path, tmp_path: Path) -> None:
    guided = {"true_cfg_scale": 4.0, "negative_prompt": NEGATIVE}
    trained = checks.check_training(tmp_path, {"path": str(folder), **guided, **SIZE})
    # Prompts of one length: others would be padded here and there alike, but the pipeline batches only its own.
    prompts = PROMPTS[1:]
    _, rollout = checks.rollout_of(ModelConfig(path=str(folder), **SIZE), prompts, weights=trained)
    transformer = QwenImageTransformer2DModel.from_pretrained(trained)
    expected = sampled(folder, rollout.latents[0], "latent", prompts, 1.0, transformer=transformer)
    assert torch.equal(rollout.latents[-1], expected)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_recomputing_keeps_the_gradients(folder: Path, scale: float) -> None:
    checks.check_recomputing(ModelConfig(path=str(folder), true_cfg_scale=scale, **SIZE))


@pytest.mark.parametrize("dtype", some_slow(["float32", "bfloat16"], ["bfloat16"]))
def test_simulated_peaks_are_the_real_ones(folder: Path, tmp_path: Path, dtype: str) -> None:
    checks.check_simulation(tmp_path, {"path": str(folder), "dtype": dtype, **SIZE})


def guided_gradient(model: Any, embeddings: Any, rollout: Rollout) -> tuple[Tensor, int]:
    """Of two leaps, and the most bytes that were alive on the way."""
    method = get_method("leapalign", alpha=0.7)
    plan = method.plan(rollout.sigmas, k=torch.tensor([0, 1]), j=torch.tensor([2, 3]))
    parameters = list(model.transformer.parameters())
    with StorageLedger() as ledger:
        ledger.exclude(*parameters, rollout.latents, rollout.velocities, rollout.sigmas)
        surrogate_backward(plan, rollout, prompted_velocity(model, embeddings), torch.ones_like(rollout.latents[-1]))
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    model.transformer.zero_grad(set_to_none=True)
    return gradient, ledger.peak


def test_one_branch_after_the_other_has_the_same_gradient(folder: Path) -> None:
    """Though guidance is no weighted sum here."""
    config = ModelConfig(path=str(folder), true_cfg_scale=4.0, negative_prompt=NEGATIVE, **SIZE)
    model, embeddings = load_model(config), encode_prompts(config, PROMPTS)
    model.transformer.double()
    noise, sigmas = model.draw_noise(checks.SEEDS).double(), model.sigmas(checks.STEPS).double()
    rollout = sample_rollout(prompted_velocity(model, embeddings), noise, sigmas)
    together, most = guided_gradient(model, embeddings, rollout)
    apart, less = guided_gradient(model, dataclasses.replace(embeddings, batched=False), rollout)
    assert relative_difference(apart, together) <= 1e-10
    assert less < 0.7 * most


def inline_gradient(model: Any, embeddings: Any, rollout: Rollout) -> Tensor:
    """Of the same two leaps in one graph, guidance written out: the norm of each token is the prompt's."""
    k, j, samples = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.arange(2)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        c, u = (
            model.velocity(x, sigma, one) for one in (embeddings.prompts, embeddings.negative[torch.zeros(2).long()])
        )
        u = u.detach() if embeddings.gradient == "detached" else u
        guided = u + 4.0 * (c - u)
        return guided * c.square().sum(-1, keepdim=True).sqrt() / guided.square().sum(-1, keepdim=True).sqrt()

    sigma_k, sigma_j = rollout.sigmas[k], rollout.sigmas[j]
    x_k, x_j = rollout.latents[k, samples], rollout.latents[j, samples]
    predicted = x_k - (sigma_k - sigma_j).view(-1, 1, 1) * velocity(x_k, sigma_k)
    connected = x_j + predicted - predicted.detach()
    end = connected - sigma_j.view(-1, 1, 1) * velocity(0.7 * connected + 0.3 * connected.detach(), sigma_j)
    end.sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.transformer.parameters() if p.grad is not None])
    model.transformer.zero_grad(set_to_none=True)
    return gradient


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("gradient", ["full", "detached"])
def test_the_staged_gradient_is_the_inline_one(folder: Path, gradient: Any, batched: bool) -> None:
    config = ModelConfig(
        path=str(folder),
        true_cfg_scale=4.0,
        negative_prompt=NEGATIVE,
        true_cfg_batched=batched,
        cfg_gradient=gradient,
        **SIZE,
    )
    model, embeddings = load_model(config), encode_prompts(config, PROMPTS)
    model.transformer.double()
    noise, sigmas = model.draw_noise(checks.SEEDS).double(), model.sigmas(checks.STEPS).double()
    rollout = sample_rollout(prompted_velocity(model, embeddings), noise, sigmas)
    staged, _ = guided_gradient(model, embeddings, rollout)
    assert relative_difference(staged, inline_gradient(model, embeddings, rollout)) <= 1e-10


def test_attention_that_takes_no_mask_is_not_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = load_model(ModelConfig(path=str(folder), **SIZE)).transformer
    asked: list[Any] = []

    def refuses_masks(query: Tensor, *_: Any, attn_mask: Tensor | None = None, **__: Any) -> Tensor:
        asked.append(attn_mask)
        if attn_mask is not None:
            raise ValueError("`attn_mask` is not supported")
        return query

    monkeypatch.setattr("leapalign.memory.attention.dispatch_attention_fn", refuses_masks)
    with pytest.raises(UserError, match=r"memory\.attention 'native' needs another version"):
        set_attention(transformer, "native", torch.device("cpu"), torch.float32)
    assert asked[0].dtype == torch.bool


def test_prompts_of_fewer_tokens_are_padded() -> None:
    short, long = (
        PromptEmbeddings({"tokens": torch.ones(1, n, 2), "mask": torch.ones(1, n, dtype=torch.bool)}) for n in (1, 3)
    )
    parts = joined([short, long]).parts
    assert parts["mask"].tolist() == [[True, False, False], [True, True, True]]
    assert parts["tokens"].sum(dim=(1, 2)).tolist() == [2, 6]


def test_sizes_that_the_model_cannot_make_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="multiples of 16"):
        load_model(ModelConfig(path=str(folder), height=64, width=72))
