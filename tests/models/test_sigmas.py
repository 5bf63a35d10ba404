"""Noise levels by their formulas, those of the pipeline and linear ones, and every command on those that are set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_checks as checks
import pytest
import torch
from chat_folders import save_flux2_dev, save_flux2_klein, save_z_image
from diffusers import StableDiffusion3Pipeline
from tiny_folders import PROMPTS, TOKENS, save_flux, save_qwen_image, save_stable_diffusion_3
from torch import Tensor

from leapalign.cli import main
from leapalign.config import ModelConfig, SigmaSpacing
from leapalign.methods import get_method
from leapalign.models import encode_prompts, load_model
from leapalign.models.stable_diffusion_3 import StableDiffusion3Model
from leapalign.models.velocity import prompted_velocity
from leapalign.rollout import sample_rollout

SHIFT = 3.0
"""Stable Diffusion 3.5's, the same at every resolution."""
SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "sd3"
    save_stable_diffusion_3(path)
    return path


def shifted(level: float) -> float:
    return SHIFT * level / (1 + (SHIFT - 1) * level)


@pytest.mark.parametrize("steps", [25, 28])
def test_levels_of_stable_diffusion_3_are_the_formulas(folder: Path, steps: int) -> None:
    """The pipeline's scheduler shifts 1, 0.999, ... 0.001, spaces evenly between the ends, and shifts that again."""
    model, share = load_model(ModelConfig(path=str(folder), **SIZE)), [1 - step / steps for step in range(steps)]
    lowest = shifted(0.001)
    pipeline = [1 - step / (steps - 1) * (1 - lowest) for step in range(steps)]
    for spacing, levels in (("pipeline", pipeline), ("linear", share)):
        expected = torch.tensor([*map(shifted, levels), 0.0])
        torch.testing.assert_close(model.sigmas(steps, spacing), expected, rtol=0, atol=1e-6)


def test_the_last_level_is_a_twelfth_of_the_linear_one(folder: Path) -> None:
    """And so is what DRaFT-LV, whose coefficient it is, sends back."""
    model = load_model(ModelConfig(path=str(folder), **SIZE))
    last = {spacing: model.sigmas(25, spacing)[-2].item() for spacing in ("pipeline", "linear")}
    assert last == pytest.approx({"pipeline": 0.00893, "linear": 1 / 9}, abs=1e-5)
    method = get_method("draft_lv", copies=0)
    coefficient = {}
    for spacing in ("pipeline", "linear"):
        indices = method.draw(25, 1, torch.Generator())
        plan = method.plan(model.sigmas(25, spacing), **indices)
        coefficient[spacing] = plan.coefficient.abs().max().item()
    assert coefficient["linear"] / coefficient["pipeline"] == pytest.approx(12.4, abs=0.1)


def test_a_linear_rollout_is_the_pipelines_on_these_sigmas(folder: Path) -> None:
    config = ModelConfig(path=str(folder), **SIZE)
    model = load_model(config)
    velocity = prompted_velocity(model, encode_prompts(config, PROMPTS))
    rollout = sample_rollout(velocity, model.draw_noise(checks.SEEDS), model.sigmas(checks.STEPS, "linear"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt=PROMPTS,
        guidance_scale=1.0,
        num_inference_steps=checks.STEPS,
        sigmas=[1.0, 0.75, 0.5, 0.25],
        latents=rollout.latents[0],
        max_sequence_length=TOKENS,
        output_type="latent",
        **SIZE,
    ).images
    torch.testing.assert_close(rollout.latents[-1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save", [save_flux, save_flux2_klein, save_flux2_dev, save_qwen_image, save_z_image])
def test_other_pipelines_are_linear(save: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path), **SIZE))
    for steps in (25, 28):
        assert torch.equal(model.sigmas(steps, "pipeline"), model.sigmas(steps, "linear"))


@pytest.mark.slow
def test_every_command_takes_the_spacing_of_the_rollout(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    sigmas = StableDiffusion3Model.sigmas

    def noted(model: Any, num_steps: int, spacing: SigmaSpacing = "pipeline") -> Tensor:
        asked.append(spacing)
        return sigmas(model, num_steps, spacing)

    monkeypatch.setattr(StableDiffusion3Model, "sigmas", noted)
    (tmp_path / "held_out.txt").write_text("a green circle")
    settings = {"path": str(folder), **SIZE}
    path = checks.write_config(
        tmp_path,
        settings,
        rollout={"num_steps": 3, "batch_size": 2, "sigmas": "linear"},
        train={"iterations": 1, "batch_size": 2},
        watch={"every": 1, "prompts": str(tmp_path / "held_out.txt")},
        checkpoint={"every": 1},
        samples={"every": 1, "count": 1},
    )
    run, one = str(tmp_path / "run"), ["--prompt", "a circle"]
    for command, least in (
        # Before it, and the plan's check, rollout, watch and samples.
        (["train", "--config", str(path)], 6),
        (["generate", "--run", run, *one, "--output", str(tmp_path / "images")], 1),
        (["evaluate", "--run", run, "--prompts", str(tmp_path / "held_out.txt")], 2),
        (["probe", "--config", str(path), "--images", "2", "--steps", "4"], 1),
        (["memory", "--config", str(path)], 1),
    ):
        asked.clear()
        assert main(command) == 0
        assert len(asked) >= least
        assert set(asked) == {"linear"}, command[0]
    assert main(["export", "--run", run, "--output", str(tmp_path / "export")]) == 0
    assert (
        "3 steps of sigmas=linspace(1, 1/steps, steps), 96 x 64 pixels" in (tmp_path / "export/README.md").read_text()
    )
