"""Stable Diffusion 3.5 against diffusers' pipeline, and through the trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import family_checks as checks
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_folders import PROMPTS, TOKENS, save_stable_diffusion_3

from leapalign.config import ModelConfig
from leapalign.inputs.validation import UserError
from leapalign.models import load_model
from leapalign.models.stable_diffusion_3 import StableDiffusion3Model

SIZE = {"height": 64, "width": 96}
NEGATIVE = "a green circle and"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "sd3"
    save_stable_diffusion_3(path)
    return path


def sampled(
    folder: Path,
    noise: torch.Tensor,
    output: str,
    prompts: list[str],
    scale: float,
    length: int = TOKENS,
    **parts: Any,
) -> Any:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=prompts,
        negative_prompt=[NEGATIVE] * len(prompts) if scale > 1 else None,
        guidance_scale=scale,
        num_inference_steps=checks.STEPS,
        latents=noise,
        max_sequence_length=length,
        output_type=output,
        **SIZE,
    ).images


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_rollout_is_the_pipelines(folder: Path, scale: float, batched: bool) -> None:
    config = ModelConfig(
        path=str(folder), true_cfg_scale=scale, negative_prompt=NEGATIVE, true_cfg_batched=batched, **SIZE
    )
    model, rollout = checks.rollout_of(config)
    latents, images = (sampled(folder, rollout.latents[0], kind, PROMPTS, scale) for kind in ("latent", "pt"))
    checks.check_images(model, rollout, latents, images)


def test_sigma_is_per_sample(folder: Path) -> None:
    checks.check_sigma_is_per_sample(ModelConfig(path=str(folder), **SIZE))


def test_gradient_reaches_latents(folder: Path) -> None:
    checks.check_gradient_reaches_latents(ModelConfig(path=str(folder), **SIZE))


def test_it_trains_and_the_pipeline_takes_what_it_learnt(folder: Path, tmp_path: Path) -> None:
    guided = {"true_cfg_scale": 4.5, "negative_prompt": NEGATIVE}
    trained = checks.check_training(tmp_path, {"path": str(folder), **guided, **SIZE})
    _, rollout = checks.rollout_of(ModelConfig(path=str(folder), **SIZE), weights=trained)
    transformer = SD3Transformer2DModel.from_pretrained(trained)
    expected = sampled(folder, rollout.latents[0], "latent", PROMPTS, 1.0, transformer=transformer)
    assert torch.equal(rollout.latents[-1], expected)


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_recomputing_keeps_the_gradients(folder: Path, scale: float) -> None:
    checks.check_recomputing(ModelConfig(path=str(folder), true_cfg_scale=scale, **SIZE))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_simulated_peaks_are_the_real_ones(folder: Path, tmp_path: Path, dtype: str) -> None:
    checks.check_simulation(tmp_path, {"path": str(folder), "dtype": dtype, **SIZE})


def test_shift_depends_on_the_resolution_where_the_scheduler_says_so(folder: Path) -> None:
    parts = load_model(ModelConfig(path=str(folder), **SIZE))
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    static = parts.scheduler

    def sigmas(scheduler: FlowMatchEulerDiscreteScheduler, side: int) -> torch.Tensor:
        return StableDiffusion3Model(parts.transformer, scheduler, parts.decoder, side, side).sigmas(6)

    assert torch.equal(sigmas(static, 32), sigmas(static, 192))
    assert bool((sigmas(dynamic, 192)[1:-1] > sigmas(dynamic, 32)[1:-1]).all())


@pytest.mark.parametrize(("size", "message"), [((64, 72), "multiples of 16"), ((208, 64), "at most 192")])
def test_sizes_that_the_model_cannot_make_are_refused(folder: Path, size: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(ModelConfig(path=str(folder), height=size[0], width=size[1]))


@pytest.fixture(params=["null", "absent"])
def without_t5(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """As diffusers saves a pipeline that was loaded without T5, and as it reads one whose index does not name it."""
    index = json.loads((folder / "model_index.json").read_text())
    bare = tmp_path / "without_t5"
    bare.mkdir()
    for part in folder.iterdir():
        if part.is_dir() and not part.name.endswith("_3"):
            (bare / part.name).symlink_to(part)
    for name in ("text_encoder_3", "tokenizer_3"):
        index[name] = [None, None]
        if request.param == "absent":
            del index[name]
    (bare / "model_index.json").write_text(json.dumps(index))
    return bare


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_without_t5_a_rollout_is_the_pipelines(without_t5: Path, scale: float) -> None:
    """Zeros of as many tokens as T5 would be given."""
    config = ModelConfig(path=str(without_t5), true_cfg_scale=scale, negative_prompt=NEGATIVE, **SIZE)
    model, rollout = checks.rollout_of(config)
    none = {"text_encoder_3": None, "tokenizer_3": None}
    latents, images = (
        sampled(without_t5, rollout.latents[0], kind, PROMPTS, scale, 256, **none) for kind in ("latent", "pt")
    )
    checks.check_images(model, rollout, latents, images)


@pytest.mark.slow
def test_without_t5_it_trains_as_simulated(without_t5: Path, tmp_path: Path) -> None:
    checks.check_training(tmp_path, {"path": str(without_t5), "true_cfg_scale": 4.5, **SIZE})
    checks.check_simulation(tmp_path, {"path": str(without_t5), **SIZE})
