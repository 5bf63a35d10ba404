"""What every family's adapter is held to, on a tiny folder of its real classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from measured_iterations import measured
from tiny_folders import PROMPTS
from torch import Tensor

from leapalign.cli import main
from leapalign.config import MemoryConfig, ModelConfig, load_config
from leapalign.memory.checkpointing import prepare_model
from leapalign.models import encode_prompts, load_model
from leapalign.models.velocity import prompted_velocity
from leapalign.models.weights import read_weights
from leapalign.planning.ledger import StorageLedger
from leapalign.planning.simulate import ITERATION, simulate
from leapalign.rollout import Rollout, sample_rollout
from leapalign.runs.checkpoint import TRANSFORMER
from leapalign.runs.run_folder import read_metrics
from leapalign.tiny.train_reward import build_scorer, save_scorer

SEEDS, STEPS = [3, 4], 4


def rollout_of(config: ModelConfig, prompts: list[str] = PROMPTS, weights: Path | None = None) -> tuple[Any, Rollout]:
    """The model that ``config`` names, with the ``weights`` of a checkpoint, and its rollout for ``prompts``."""
    model = load_model(config)
    if weights:
        model.transformer.load_state_dict(read_weights(weights))
    noise = model.draw_noise(SEEDS[: len(prompts)])
    velocity = prompted_velocity(model, encode_prompts(config, prompts))
    return model, sample_rollout(velocity, noise, model.sigmas(STEPS))


@torch.no_grad()
def check_images(model: Any, rollout: Rollout, latents: Tensor, images: Tensor) -> None:
    """Those of the pipeline, whose images are clamped."""
    torch.testing.assert_close(rollout.latents[-1], latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.decode(rollout.latents[-1]).clamp(0, 1), images, rtol=1e-5, atol=1e-5)


def check_sigma_is_per_sample(config: ModelConfig) -> None:
    model, embeddings = load_model(config), encode_prompts(config, PROMPTS)
    latents, sigma = model.draw_noise(SEEDS), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        together = prompted_velocity(model, embeddings)(latents, sigma)
        for i in range(2):
            one = slice(i, i + 1)
            alone = prompted_velocity(model, embeddings[one])(latents[one], sigma[one])
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)
        swapped = prompted_velocity(model, embeddings)(latents, sigma.flip(0))
    assert not torch.allclose(together, swapped, rtol=1e-2, atol=1e-3)


def check_gradient_reaches_latents(config: ModelConfig) -> None:
    """Through the decoder, as finite differences have it."""
    model = load_model(config)
    model.decoder.double()
    latents = model.draw_noise(SEEDS[:1]).double().requires_grad_()
    (gradient,) = torch.autograd.grad(model.decode(latents).sum(), latents)
    direction = torch.randn_like(latents)
    with torch.no_grad():
        ahead, behind = (model.decode(latents + step * direction).sum() for step in (1e-3, -1e-3))
    # Qwen's upsampling is in float32 whatever it gets.
    assert (gradient * direction).sum().item() == pytest.approx(((ahead - behind) / 2e-3).item(), rel=1e-3)
    assert all(p.grad is None for p in model.decoder.parameters())


def write_config(folder: Path, model: dict[str, Any], **sections: Any) -> Path:
    """A configuration that trains ``model`` on a random tiny reward, and the files that it names."""
    save_scorer(build_scorer(), folder / "reward")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    settings: dict[str, Any] = {
        "output": str(folder / "run"),
        "threshold": 1.0,
        "model": model,
        "prompts": {"path": str(folder / "prompts.txt")},
        "reward": {"name": "pickscore", "path": str(folder / "reward")},
        "rollout": {"num_steps": 3, "batch_size": 2},
        "method": {"name": "leapalign"},
        "optimizer": {"name": "adamw_8bit", "learning_rate": 1e-3},
        "train": {"iterations": 5, "batch_size": 2},
        "samples": {"count": 2},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps({**settings, **sections}))
    return path


def check_training(folder: Path, model: dict[str, Any]) -> Path:
    """Trains from the command line; returns the transformer of the checkpoint."""
    assert main(["train", "--config", str(write_config(folder, model))]) == 0
    records = read_metrics(folder / "run")
    assert len(records) == 5
    assert all(record["grad_norm"] > 0 for record in records)
    trained = folder / "run" / "checkpoints" / "step-5" / TRANSFORMER
    before = load_model(ModelConfig(**model)).transformer.state_dict()
    assert any(not torch.equal(before[name], weight) for name, weight in read_weights(trained).items())
    return trained


def check_recomputing(config: ModelConfig) -> None:
    """Blocks and decoder recomputed: equal gradients from less memory."""
    found: list[tuple[Tensor, Tensor]] = []
    kept: list[tuple[int, int]] = []
    for memory in (MemoryConfig(), MemoryConfig(checkpointing="blocks", checkpoint_decoder=True)):
        model, embeddings = load_model(config), encode_prompts(config, PROMPTS)
        prepare_model(model.transformer, model.decoder, memory)
        latents, parameters = model.draw_noise(SEEDS), list(model.transformer.parameters())
        with StorageLedger() as ledger:
            ledger.exclude(*parameters, *model.decoder.parameters(), latents)
            velocity = prompted_velocity(model, embeddings)(latents, torch.tensor([0.3, 0.8]))
            of_blocks = ledger.live
            gradients = torch.autograd.grad(velocity.square().sum(), parameters, allow_unused=True)
            before = ledger.live
            latents.requires_grad_()
            images = model.decode(latents)
            kept.append((of_blocks, ledger.live - before))
            (of_latents,) = torch.autograd.grad(images.square().sum(), latents)
        found.append((torch.cat([g.flatten() for g in gradients if g is not None]), of_latents))
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)
    for plain, recomputed in zip(*kept, strict=True):
        assert recomputed < 0.6 * plain


def check_simulation(folder: Path, model: dict[str, Any]) -> None:
    """The peaks of a simulated iteration are the real one's."""
    two_rollouts = {"iterations": 1, "batch_size": 4}
    config = load_config(write_config(folder, model, train=two_rollouts))
    real, found = measured(config), simulate(config)
    assert found.trainable_parameters == sum(p.numel() for p in load_model(config.model).transformer.parameters())
    for stage in ITERATION:
        simulated, counted = found.device[stage], real.device.peaks[stage]
        assert simulated.by_role["weights"] == counted.by_role["weights"]
        assert simulated.total == pytest.approx(counted.total, rel=0.005)
