"""The FLUX adapter against the real diffusers pipeline and autoencoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from small_models import small_flux, small_vae
from tiny_folders import save_flux
from worlds import flux_embeddings

from leapalign.config import ModelConfig
from leapalign.inputs.validation import UserError
from leapalign.models import encode_prompts, load_model
from leapalign.models.flux import FluxModel
from leapalign.models.velocity import PromptedVelocity
from leapalign.rollout import sample_rollout
from leapalign.tiny.model import (
    build_scheduler,
)

PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny FLUX in the layout that the pipeline reads."""
    path = tmp_path_factory.mktemp("flux")
    save_flux(path)
    return path


def test_rollout_is_the_pipelines(folder: Path) -> None:
    """Same noise, prompts and steps as ``FluxPipeline.__call__``: same latents, resolution shift included."""
    model = load_model(ModelConfig(path=str(folder)))
    embeddings = encode_prompts(ModelConfig(path=str(folder)), PROMPTS)
    noise = model.draw_noise([3, 4])
    rollout = sample_rollout(PromptedVelocity(model, embeddings), noise, model.sigmas(6))
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt=PROMPTS,
        height=64,
        width=64,
        num_inference_steps=6,
        latents=noise,
        max_sequence_length=8,
        output_type="latent",
    ).images
    torch.testing.assert_close(rollout.latents[-1], expected, rtol=1e-5, atol=1e-5)


def test_more_tokens_shift_the_sigmas_up() -> None:
    small, large = (
        FluxModel(small_flux(), build_scheduler(), side, side, small_vae()).sigmas(8) for side in (128, 512)
    )
    assert small[0] == large[0] == 1
    assert small[-1] == large[-1] == 0
    assert bool((large[1:-1] > small[1:-1]).all())


def test_decode_is_the_pipelines(folder: Path) -> None:
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    model = FluxModel(small_flux(), build_scheduler(), 32, 48, vae)
    latents = torch.randn(2, 8 * 12, 16)
    pipeline = FluxPipeline(build_scheduler(), vae, None, None, None, None, small_flux())
    unpacked = FluxPipeline._unpack_latents(latents, 32, 48, pipeline.vae_scale_factor)
    expected = vae.decode(unpacked / 0.36 + 0.12, return_dict=False)[0]
    with torch.no_grad():
        torch.testing.assert_close(model.decode(latents), expected / 2 + 0.5)


def test_guidance_goes_in_where_the_model_takes_it() -> None:
    network = small_flux(guidance_embeds=True)
    latents, sigma = torch.randn(2, 16, 16), torch.tensor([0.5, 0.9])
    embeddings = flux_embeddings(2)
    weak, strong = (
        FluxModel(network, build_scheduler(), 64, 64, small_vae(), guidance=g).velocity(latents, sigma, embeddings)
        for g in (1.0, 4.0)
    )
    assert not torch.allclose(weak, strong)


def test_sigma_is_per_sample() -> None:
    model = FluxModel(small_flux(), build_scheduler(), 64, 64, small_vae())
    latents, sigma, embeddings = torch.randn(2, 16, 16), torch.tensor([0.2, 0.9]), flux_embeddings(2)
    together = model.velocity(latents, sigma, embeddings)
    for i in range(2):
        alone = model.velocity(latents[i : i + 1], sigma[i : i + 1], embeddings[slice(i, i + 1)])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="check model"):
        load_model(ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="no model in diffusers layout"):
        encode_prompts(ModelConfig(path=str(tmp_path)), PROMPTS)


def test_scheduler_is_read_from_the_folder(folder: Path) -> None:
    config = build_scheduler().config
    FlowMatchEulerDiscreteScheduler.from_config(config, max_shift=3.0, base_shift=2.0).save_pretrained(folder / "other")
    other = FluxModel(
        small_flux(), FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "other"), 64, 64, small_vae()
    )
    assert bool((other.sigmas(8)[1:-1] > load_model(ModelConfig(path=str(folder))).sigmas(8)[1:-1]).all())


def test_sizes_that_do_not_divide_into_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="multiples of 16"):
        FluxModel(small_flux(), build_scheduler(), 64, 56, small_vae())
