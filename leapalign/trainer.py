"""The training loop: rollout, reward gradient, surrogate backward, optimizer step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leapalign.checkpoint import load_checkpoint, save_checkpoint
from leapalign.config import Config
from leapalign.embedded import resolve
from leapalign.methods import Method, get_method
from leapalign.models import FlowModel, PromptedVelocity, encode_prompts, load_model
from leapalign.optim import Optimizer
from leapalign.prompts import PromptOrder, read_prompts
from leapalign.reward_gradient import RewardFn, reward_gradient
from leapalign.rewards import get_reward
from leapalign.rollout import per_sample, sample_rollout
from leapalign.surrogate import surrogate_backward

NOISE_STREAM, INDEX_STREAM = 1, 2


def seed_of(seed: int, stream: int, position: int) -> int:
    """An independent 64-bit seed for each stream and position of a run: nothing random needs saving."""
    return int(np.random.SeedSequence([seed, stream, position]).generate_state(1, np.uint64)[0] >> 1)


@dataclass
class Trainer:
    """Everything a run needs, and the loop over it.

    ``embeddings[i]`` belongs to ``prompts[i]``. ``iteration`` counts finished optimizer steps.
    """

    config: Config
    model: FlowModel[Any]
    prompts: list[str]
    embeddings: Any
    reward: RewardFn
    method: Method
    optimizer: Optimizer
    iteration: int = 0
    order: PromptOrder = field(init=False)

    def __post_init__(self) -> None:
        self.order = PromptOrder(len(self.prompts), self.config.seed)

    @classmethod
    def from_config(cls, config: Config) -> Trainer:
        """Reads and checks every file the config names. Raises UserError before any long work."""
        method = get_method(**config.method)
        prompts = read_prompts(Path(resolve(config.prompts.path)))
        reward = get_reward(**config.reward)
        model = load_model(config.model)
        parameters = [p for p in model.transformer.parameters() if p.requires_grad]
        return cls(
            config=config,
            model=model,
            prompts=prompts,
            embeddings=encode_prompts(config.model, prompts),
            reward=reward,
            method=method,
            optimizer=Optimizer(parameters, config.optimizer, config.ema, config.train.iterations),
        )

    def resume(self, checkpoint: Path) -> None:
        """Continues after ``checkpoint``. Raises UserError where it cannot be read."""
        self.iteration = load_checkpoint(checkpoint, self.model.transformer, self.optimizer)

    def run(self) -> Iterator[dict[str, float]]:
        """Trains to the last iteration, yielding each one's metrics; saves checkpoints on the way."""
        while self.iteration < self.config.train.iterations:
            started = time.perf_counter()
            metrics = self._train_one()
            self.iteration += 1
            seconds = time.perf_counter() - started
            last = self.iteration == self.config.train.iterations
            if last or self.iteration % self.config.checkpoint.every == 0:
                save_checkpoint(Path(self.config.output), self.iteration, self.model.transformer, self.optimizer)
            yield {"iteration": self.iteration, **metrics, "seconds": seconds}

    def _train_one(self) -> dict[str, float]:
        """One optimizer step over ``train.batch_size`` images; the mean of their metrics."""
        total = self.config.train.batch_size
        size = min(self.config.rollout.batch_size, total)
        first = self.iteration * total
        parts = [
            self._accumulate(range(start, start + size), share=size / total)
            for start in range(first, first + total, size)
        ]
        metrics = {name: float(torch.cat([part[name] for part in parts]).mean()) for name in parts[0]}
        metrics["learning_rate"] = self.optimizer.learning_rate
        metrics["grad_norm"] = self.optimizer.step()
        return metrics

    def _accumulate(self, positions: range, share: float) -> dict[str, Tensor]:
        """Adds the gradient of ``share`` times the mean loss over the images at ``positions`` of the run."""
        config = self.config
        chosen = [self.order[position] for position in positions]
        velocity = PromptedVelocity(self.model, self.embeddings[torch.tensor(chosen)])
        noise = self.model.draw_noise([seed_of(config.seed, NOISE_STREAM, position) for position in positions])
        sigmas = self.model.sigmas(config.rollout.num_steps)
        rollout = sample_rollout(velocity, noise, sigmas)
        scored = reward_gradient(
            self.model.decode,
            self.reward,
            rollout.latents[-1],
            [self.prompts[index] for index in chosen],
            config.train.reward_chunk,
        )
        generator = torch.Generator().manual_seed(seed_of(config.seed, INDEX_STREAM, positions.start))
        indices = self.method.draw(rollout.num_steps, len(positions), generator)
        reward = scored.rewards.requires_grad_()
        loss, diagnostics = self.method.loss(reward, config.threshold, rollout, **indices)
        (loss_gradient,) = torch.autograd.grad(share * loss, reward)
        terms = surrogate_backward(
            self.method.plan(sigmas, **indices),
            rollout,
            velocity,
            per_sample(loss_gradient, scored.gradient) * scored.gradient,
            microbatch=config.train.microbatch,
        )
        row_terms = {f"gradient_term_{row}": norms for row, norms in enumerate(terms)}
        return {"reward": reward.detach(), "loss": loss.detach().view(1), **diagnostics, **row_terms}
