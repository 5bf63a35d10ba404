"""Runs of a few iterations on a small random model and reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_folders import save_flux
from torch import Tensor

from leapalign.config import Config, override
from leapalign.inputs.validation import validated
from leapalign.runs.checkpoint import latest_checkpoint
from leapalign.runs.run import Run
from leapalign.tiny.train_reward import build_scorer, save_scorer
from leapalign.trainer import Trainer

PROMPTS = ["a circle", "two squares", "a red cross", "a cross and a square", "four circles"]
SHORT = ("optimizer.name=adamw_8bit", "train.iterations=3", "checkpoint.every=1", "samples.every=1", "samples.count=1")


def make_parts(folder: Path) -> None:
    """Writes a random tiny FLUX, a random CLIP reward and a prompt file."""
    save_flux(folder / "model")
    save_scorer(build_scorer(), folder / "reward")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))


def config_of(parts: Path, output: Path, *assignments: str) -> Config:
    settings = (
        f"output={output}",
        f"model.path={parts / 'model'}",
        f"reward.path={parts / 'reward'}",
        "reward.name=pickscore",
        f"prompts.path={parts / 'prompts.txt'}",
        "threshold=1.0",
        "rollout.num_steps=3",
        "rollout.batch_size=4",
        "train.batch_size=4",
        "train.iterations=4",
        "optimizer.learning_rate=1e-3",
        "checkpoint.every=2",
        "samples.every=2",
        "samples.count=2",
    )
    return validated(Config, override({}, (*settings, *assignments)), "test")


def train(config: Config, resume: bool = False) -> Trainer:
    run = Run.from_config(config, latest_checkpoint(Path(config.output)) if resume else None)
    run.train()
    return run.trainer


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.transformer.parameters()])


def without_time(records: list[dict[str, float]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def gradient(config: Config) -> Tensor:
    """The gradient of the first iteration."""
    trainer = Trainer.from_config(config)
    trainer.accumulate_gradients()
    return torch.cat([p.grad.flatten() for p in trainer.model.transformer.parameters() if p.grad is not None])
