"""FLUX.2 against diffusers' pipelines, and through the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import family_checks as checks
import pytest
import torch
from chat_folders import TOKENS, pixtral_processor, save_flux2_dev, save_flux2_klein
from diffusers import DiffusionPipeline, Flux2Transformer2DModel
from streaming_checks import check_blocks_run_in_order, check_streaming
from tiny_folders import PROMPTS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.config import Config, ModelConfig
from leapalign.inputs.validation import UserError
from leapalign.models import encode_prompts, load_model
from leapalign.planning.model_skeleton import skeleton

SIZE = {"height": 32, "width": 48}


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "klein"
    save_flux2_klein(path)
    return path


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "dev"
    save_flux2_dev(path)
    return path


def sampled(folder: Path, output: str, guidance: float, length: int = TOKENS, **parts: Any) -> Tensor:
    """The pipeline's latents, packed and in the transformer's units, or images, from the seeds of the checks."""
    pipeline = DiffusionPipeline.from_pretrained(folder, **parts)
    if pipeline.tokenizer is None:
        pipeline.tokenizer = pixtral_processor(folder)
    pipeline.set_progress_bar_config(disable=True)
    last: list[Tensor] = []
    images = pipeline(
        prompt=PROMPTS,
        guidance_scale=guidance,
        num_inference_steps=checks.STEPS,
        generator=[torch.Generator().manual_seed(seed) for seed in checks.SEEDS],
        max_sequence_length=length,
        callback_on_step_end=lambda *step: last.append(step[-1]["latents"]) or {},
        output_type="pt",
        **SIZE,
    ).images
    return images if output == "pt" else last[-1]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_rollout_is_the_pipelines(klein: Path, scale: float, batched: bool) -> None:
    config = ModelConfig(path=str(klein), true_cfg_scale=scale, true_cfg_batched=batched, **SIZE)
    model, rollout = checks.rollout_of(config)
    latents, images = (sampled(klein, output, scale) for output in ("latent", "pt"))
    checks.check_images(model, rollout, latents, images)


def test_rollout_of_dev_is_the_pipelines(dev: Path) -> None:
    model, rollout = checks.rollout_of(ModelConfig(path=str(dev), guidance=2.5, **SIZE))
    latents, images = (sampled(dev, output, 2.5, 512, tokenizer=None) for output in ("latent", "pt"))
    checks.check_images(model, rollout, latents, images)


def test_dev_trains_and_the_pipeline_takes_what_it_learnt(dev: Path, tmp_path: Path) -> None:
    trained = checks.check_training(tmp_path, {"path": str(dev), "guidance": 2.5, **SIZE})
    _, rollout = checks.rollout_of(ModelConfig(path=str(dev), guidance=2.5, **SIZE), weights=trained)
    transformer = Flux2Transformer2DModel.from_pretrained(trained)
    own = {"tokenizer": None, "transformer": transformer}
    assert torch.equal(rollout.latents[-1], sampled(dev, "latent", 2.5, 512, **own))


@pytest.mark.parametrize("variant", ["klein", "dev"])
def test_sigma_is_per_sample(variant: str, request: pytest.FixtureRequest) -> None:
    checks.check_sigma_is_per_sample(ModelConfig(path=str(request.getfixturevalue(variant)), **SIZE))


def test_gradient_reaches_latents(klein: Path) -> None:
    checks.check_gradient_reaches_latents(ModelConfig(path=str(klein), **SIZE))


def test_it_trains_and_the_pipeline_takes_what_it_learnt(klein: Path, tmp_path: Path) -> None:
    trained = checks.check_training(tmp_path, {"path": str(klein), "true_cfg_scale": 4.0, **SIZE})
    _, rollout = checks.rollout_of(ModelConfig(path=str(klein), **SIZE), weights=trained)
    transformer = Flux2Transformer2DModel.from_pretrained(trained)
    expected = sampled(klein, "latent", 1.0, transformer=transformer)
    assert torch.equal(rollout.latents[-1], expected)


def test_recomputing_keeps_the_gradients(klein: Path) -> None:
    checks.check_recomputing(ModelConfig(path=str(klein), **SIZE))


def test_streamed_weights_train_as_resident_ones(klein: Path, tmp_path: Path) -> None:
    check_streaming(tmp_path, {"path": str(klein), **SIZE})
    check_blocks_run_in_order(ModelConfig(path=str(klein), **SIZE))


@pytest.mark.slow
def test_simulated_peaks_are_the_real_ones(klein: Path, tmp_path: Path) -> None:
    checks.check_simulation(tmp_path, {"path": str(klein), "dtype": "bfloat16", **SIZE})


def test_more_tokens_and_fewer_steps_shift_the_sigmas_up(klein: Path) -> None:
    def sigmas(side: int, steps: int) -> Tensor:
        return load_model(ModelConfig(path=str(klein), height=side, width=side)).sigmas(steps)

    few, more, slow = sigmas(32, 6), sigmas(128, 6), sigmas(32, 12)
    assert few[0] == more[0] == 1
    assert few[-1] == more[-1] == 0
    assert bool((more[1:-1] > few[1:-1]).all())
    assert bool((few[1:-1] > slow[2:-1:2]).all())


def test_sizes_that_do_not_divide_into_tokens_are_refused(klein: Path) -> None:
    with pytest.raises(UserError, match="multiples of 8"):
        load_model(ModelConfig(path=str(klein), height=32, width=44))


def test_prompts_are_told_apart(klein: Path) -> None:
    tokens = encode_prompts(ModelConfig(path=str(klein)), PROMPTS).parts["tokens"]
    assert tokens.shape[1] == TOKENS
    assert not torch.allclose(tokens[0, -1], tokens[1, -1], rtol=0.1)


def test_the_skeleton_of_klein_has_its_size() -> None:
    config = Config(model=ModelConfig(path="black-forest-labs/FLUX.2-klein-base-9B", height=1024, width=1024))
    parts = skeleton(config, FakeTensorMode(allow_non_fake_inputs=True))
    assert sum(p.numel() for p in parts.model.transformer.parameters()) == 9_078_581_248
    assert sum(p.numel() for p in parts.model.decoder.parameters()) == 84_046_115
    assert parts.embeddings.parts["tokens"].shape[1:] == (512, 12288)
