"""Z-Image against diffusers' pipeline, and through the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import family_checks as checks
import pytest
import torch
from chat_folders import TOKENS, save_z_image
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from streaming_checks import check_blocks_run_in_order, check_streaming
from tiny_folders import PROMPTS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.config import Config, ModelConfig
from leapalign.inputs.validation import UserError
from leapalign.models import encode_prompts, load_model
from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.z_image import ZImageModel
from leapalign.planning.model_skeleton import skeleton

SIZE = {"height": 32, "width": 48}
"""24 tokens, which the model fills up to 32."""
NEGATIVE = "a green circle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "z_image"
    save_z_image(path)
    return path


def sampled(folder: Path, output: str, guidance: float, **parts: Any) -> Tensor:
    """The pipeline's latents or images from the seeds of the checks."""
    pipeline = ZImagePipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        # It writes its chat templates over them.
        prompt=list(PROMPTS),
        negative_prompt=[NEGATIVE] * len(PROMPTS),
        guidance_scale=guidance,
        num_inference_steps=checks.STEPS,
        generator=[torch.Generator().manual_seed(seed) for seed in checks.SEEDS],
        max_sequence_length=TOKENS,
        output_type=output,
        **SIZE,
    ).images


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_rollout_is_the_pipelines(folder: Path, guidance: float, batched: bool) -> None:
    guided = {"true_cfg_scale": 1 + guidance, "negative_prompt": NEGATIVE, "true_cfg_batched": batched}
    model, rollout = checks.rollout_of(ModelConfig(path=str(folder), **guided, **SIZE))
    latents, images = (sampled(folder, output, guidance) for output in ("latent", "pt"))
    checks.check_images(model, rollout, latents, images)


def test_prompts_keep_their_lengths(folder: Path) -> None:
    """One prompt has to be filled up to one, the other to two times the 32 tokens that the model counts in."""
    parts = encode_prompts(ModelConfig(path=str(folder)), PROMPTS).parts
    lengths = parts["lengths"].tolist()
    assert 0 < lengths[0] < 32 < lengths[1] < TOKENS
    for tokens, length in zip(parts["tokens"], lengths, strict=True):
        assert bool(tokens[:length].any(dim=1).all())
        assert not bool(tokens[length:].any())


def test_blank_embeddings_are_full_prompts(folder: Path) -> None:
    model = load_model(ModelConfig(path=str(folder), **SIZE))
    latents, sigma, blank = model.draw_noise([1, 2]), torch.tensor([0.3, 0.8]), model.blank_embeddings(2, 40)
    full = PromptEmbeddings({**blank.parts, "lengths": torch.tensor([40, 40])})
    half = PromptEmbeddings({**blank.parts, "lengths": torch.tensor([20, 40])})
    with torch.no_grad():
        expected, other = (model.velocity(latents, sigma, embeddings) for embeddings in (full, half))
        found = model.velocity(latents, sigma, blank)
    assert torch.equal(found, expected)
    assert not torch.allclose(found[0], other[0])


def test_sigma_is_per_sample(folder: Path) -> None:
    checks.check_sigma_is_per_sample(ModelConfig(path=str(folder), **SIZE))


def test_gradient_reaches_latents(folder: Path) -> None:
    checks.check_gradient_reaches_latents(ModelConfig(path=str(folder), **SIZE))


def test_it_trains_and_the_pipeline_takes_what_it_learnt(folder: Path, tmp_path: Path) -> None:
    trained = checks.check_training(tmp_path, {"path": str(folder), "true_cfg_scale": 5.0, **SIZE})
    _, rollout = checks.rollout_of(ModelConfig(path=str(folder), **SIZE), weights=trained)
    transformer = ZImageTransformer2DModel.from_pretrained(trained)
    expected = sampled(folder, "latent", 0.0, transformer=transformer)
    assert torch.equal(rollout.latents[-1], expected)


def test_recomputing_keeps_the_gradients(folder: Path) -> None:
    checks.check_recomputing(ModelConfig(path=str(folder), **SIZE))


def test_streamed_weights_train_as_resident_ones(folder: Path, tmp_path: Path) -> None:
    check_streaming(tmp_path, {"path": str(folder), **SIZE})
    check_blocks_run_in_order(ModelConfig(path=str(folder), **SIZE))


@pytest.mark.slow
def test_simulated_peaks_are_the_real_ones(folder: Path, tmp_path: Path) -> None:
    checks.check_simulation(tmp_path, {"path": str(folder), "dtype": "bfloat16", **SIZE})


def test_more_tokens_shift_the_sigmas_where_the_scheduler_says_so(folder: Path) -> None:
    parts = load_model(ModelConfig(path=str(folder), **SIZE))
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)

    def sigmas(scheduler: FlowMatchEulerDiscreteScheduler, side: int) -> Tensor:
        return ZImageModel(parts.transformer, scheduler, parts.decoder, side, side).sigmas(6)

    assert torch.equal(sigmas(parts.scheduler, 32), sigmas(parts.scheduler, 256))
    assert bool((sigmas(dynamic, 256)[1:-1] > sigmas(dynamic, 32)[1:-1]).all())


def test_sizes_that_do_not_divide_into_tokens_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="multiples of 8"):
        load_model(ModelConfig(path=str(folder), height=44, width=48))


def test_the_skeleton_of_z_image_has_its_size() -> None:
    config = Config(model=ModelConfig(path="Tongyi-MAI/Z-Image", height=1024, width=1024))
    parts = skeleton(config, FakeTensorMode(allow_non_fake_inputs=True))
    assert sum(p.numel() for p in parts.model.transformer.parameters()) == 6_154_908_736
    assert parts.embeddings.parts["tokens"].shape[1:] == (512, 2560)
