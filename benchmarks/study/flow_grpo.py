"""Flow-GRPO (Liu et al., arXiv 2505.05470), compact: the policy gradient that direct gradients are compared with.

Images of one prompt are a group. They are drawn by the stochastic sampler that has the marginals of the deterministic
one, with sigma falling from 1 to 0 by d at a step (their equation 9):

    m = x - [v + s^2 / (2 sigma) (x + (1 - sigma) v)] d,    x' = m + s sqrt(d) eps,
    s = NOISE sqrt(sigma / (1 - sigma))

Each step is rewarded by its image's reward, normalised within the group, ``A = (r - mean) / std``, and the loss is
``-min(q A, clip(q, 1 - CLIP, 1 + CLIP) A) + BETA KL``: q the ratio of the densities of x' today and when it was drawn,
KL that of the step to the base model's, both means over elements, as in the authors' code. As there, steps are few in
training, the first takes s from the second sigma, and the last is not trained on; here it has no noise, either. A
rollout serves one update, so that q is 1.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.models.velocity import prompted_velocity
from leapalign.reward_gradient import scores_of, to_unit_range
from leapalign.rollout import VelocityFn
from leapalign.streams import NOISE_STREAM, seed_of
from leapalign.trainer import Trainer

GROUP = 8
"""Images of a prompt."""
NOISE, CLIP, BETA, LARGEST_ADVANTAGE = 0.7, 1e-4, 0.004, 5.0


@dataclass(frozen=True)
class Step:
    """From sigma ``start`` to ``end``; ``spread`` is s."""

    start: float
    end: float
    spread: float

    @property
    def deviation(self) -> float:
        """Of the noise."""
        return self.spread * (self.start - self.end) ** 0.5

    def mean(self, x: Tensor, velocity: Tensor) -> Tensor:
        drift = velocity + self.spread**2 / (2 * self.start) * (x + (1 - self.start) * velocity)
        return x - drift * (self.start - self.end)


def steps_of(sigmas: Tensor) -> list[Step]:
    """All but the last with noise."""
    levels = sigmas.tolist()
    spreads = [NOISE * (sigma / (1 - min(sigma, levels[1]))) ** 0.5 for sigma in levels[:-2]]
    return list(itertools.starmap(Step, zip(levels, levels[1:], [*spreads, 0.0], strict=False)))


def advantages(rewards: Tensor) -> Tensor:
    """``(B,)`` of groups in turn."""
    groups = rewards.view(-1, GROUP)
    normal = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    return normal.flatten().clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE)


def step_loss(step: Step, mean: Tensor, base_mean: Tensor, landed: Tensor, drawn: Tensor, advantage: Tensor) -> Tensor:
    """``(B,)``; mean, base_mean: of today's weights and the base's; landed: x'; drawn: log density of x' when drawn."""
    ratio = (log_density(step, mean, landed) - drawn).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    divergence = ((mean - base_mean) ** 2).flatten(1).mean(1) / (2 * step.deviation**2)
    return -torch.minimum(ratio * advantage, clipped * advantage) + BETA * divergence


def log_density(step: Step, mean: Tensor, landed: Tensor) -> Tensor:
    """``(B,)``, the mean over elements, up to a constant."""
    return -((landed - mean) ** 2).flatten(1).mean(1) / (2 * step.deviation**2)


@dataclass
class FlowGRPO(Trainer):
    """A trainer whose gradient is Flow-GRPO's; optimizer, schedule, average and draws are the others'."""

    base: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.base = copy.deepcopy(self.model.transformer).requires_grad_(False)

    def accumulate_gradients(self) -> dict[str, float]:
        positions = self._positions
        chosen = torch.tensor([self.order[position // GROUP] for position in positions])
        velocity = prompted_velocity(self.model, self.embeddings[chosen])
        noise = self.model.draw_noise([seed_of(self.config.seed, NOISE_STREAM, position) for position in positions])
        steps = steps_of(self.model.sigmas(self.config.rollout.num_steps))
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, NOISE_STREAM, positions.start) + 1)
        with torch.no_grad():
            latents = [noise]
            for step in steps:
                mean = step.mean(latents[-1], self._velocity(velocity, latents[-1], step))
                latents.append(mean + step.deviation * torch.randn(mean.shape, generator=generator))
            images = to_unit_range(self.model.decode(latents[-1]))
            prompts = [self.prompts[index] for index in chosen.tolist()]
            rewards = scores_of(self.rewards[0].reward, images, prompts)
        advantage, trained = advantages(rewards), steps[:-1]
        total = 0.0
        for step, x, landed in zip(trained, latents, latents[1:], strict=False):
            mean = step.mean(x, self._velocity(velocity, x, step))
            base_mean = step.mean(x, self._of_base(velocity, x, step))
            drawn = log_density(step, mean, landed).detach()
            loss = step_loss(step, mean, base_mean, landed, drawn, advantage).mean() / len(trained)
            loss.backward()
            total += float(loss.detach())
        return {"reward": float(rewards.mean()), "loss": total, "skipped_samples": 0.0}

    def _velocity(self, velocity: VelocityFn, x: Tensor, step: Step) -> Tensor:
        return velocity(x, torch.full((len(x),), step.start))

    @torch.no_grad()
    def _of_base(self, velocity: VelocityFn, x: Tensor, step: Step) -> Tensor:
        model: Any = self.model
        trained, model.transformer = model.transformer, self.base
        try:
            return self._velocity(velocity, x, step)
        finally:
            model.transformer = trained
