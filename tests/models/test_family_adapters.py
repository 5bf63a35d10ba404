"""Adapters of every family: trained from the command line, they load into the family's own pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_checks as checks
import pytest
import torch
from chat_folders import save_flux2_klein, save_z_image
from diffusers import Flux2KleinPipeline, QwenImagePipeline, StableDiffusion3Pipeline, ZImagePipeline
from tiny_folders import PROMPTS, save_qwen_image, save_stable_diffusion_3
from torch import Tensor

from leapalign.config import ModelConfig
from leapalign.models import encode_prompts, load_model
from leapalign.models.weights import load_weights

FAMILIES: dict[str, tuple[Callable[[Path], None], Any]] = {
    "flux2": (save_flux2_klein, Flux2KleinPipeline),
    "qwen_image": (save_qwen_image, QwenImagePipeline),
    "stable_diffusion_3": (save_stable_diffusion_3, StableDiffusion3Pipeline),
    "z_image": (save_z_image, ZImagePipeline),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pipeline_takes_the_adapter(family: str, tmp_path: Path) -> None:
    save, pipeline_class = FAMILIES[family]
    save(tmp_path / "model")
    settings = {"path": str(tmp_path / "model"), "height": 64, "width": 64}
    trained = checks.check_training(tmp_path, {**settings, "lora_rank": 2})
    assert [file.name for file in trained.iterdir()] == ["pytorch_lora_weights.safetensors"]
    embeddings = encode_prompts(ModelConfig(**settings), PROMPTS)

    @torch.no_grad()
    def velocity(config: ModelConfig, change: Callable[[Any], None]) -> Tensor:
        model = load_model(config)
        change(model)
        latents = model.draw_noise(range(len(PROMPTS)))
        return model.velocity(latents, torch.full((len(PROMPTS),), 0.5), embeddings)

    def take_the_pipelines(model: Any) -> None:
        pipeline = pipeline_class.from_pretrained(tmp_path / "model")
        pipeline.load_lora_weights(trained)
        model.transformer = pipeline.transformer

    ours = velocity(ModelConfig(**settings, lora_rank=2), lambda model: load_weights(model.transformer, trained))
    assert torch.equal(ours, velocity(ModelConfig(**settings), take_the_pipelines))
    assert not torch.equal(ours, velocity(ModelConfig(**settings), lambda model: None))
