"""Peak activation bytes of backward passes on the tiny FLUX: staged against in-line, the whole sampler against a step.

    python benchmarks/activation_memory.py --batch-size 16

Counts live tensor storages on the CPU, from after the rollout to the last gradient; weights, gradients, embeddings
and the rollout's own latents are there in both and not counted. The in-line graph holds both leaps at once, and with
the reward the decoder and the reward too, as a trainer that calls ``loss.backward()`` does. Without the reward both
start from the same gradient at the generated latents.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from leap_kernels import consistency_weighted_loss, leap_update, scale_gradient
from torch import Tensor

from leapalign.config import ModelConfig
from leapalign.methods import Method, get_method
from leapalign.models import encode_prompts, load_model
from leapalign.models.velocity import PromptedVelocity
from leapalign.planning.ledger import StorageLedger
from leapalign.reward_gradient import reward_gradient, to_unit_range
from leapalign.rewards import get_reward
from leapalign.rollout import Rollout, per_sample, sample_rollout
from leapalign.surrogate import surrogate_backward
from leapalign.tiny.world import all_prompts, balanced_prompts

ALPHA, TAU, THRESHOLD = 0.3, 0.1, 1.0


class Setting:
    """The shipped tiny model and reward, one rollout on them, and one draw of leaps."""

    def __init__(self, batch_size: int, num_steps: int = 25) -> None:
        self.prompts = [prompt.text for prompt in balanced_prompts(all_prompts(), batch_size)]
        self.model = load_model(ModelConfig())
        self.reward: Any = get_reward("pickscore", path="embedded:reward")
        self.velocity = PromptedVelocity(self.model, encode_prompts(ModelConfig(), self.prompts))
        self.sigmas = self.model.sigmas(num_steps)
        self.rollout: Rollout = sample_rollout(self.velocity, self.model.draw_noise(range(batch_size)), self.sigmas)
        self.method = get_method("leapalign", alpha=ALPHA, tau=TAU)
        self.indices = self.method.draw(num_steps, batch_size, torch.Generator().manual_seed(0))
        self.parameters = list(self.model.transformer.parameters())
        self.clear()

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])

    def staged(self, chunk: int | None = None) -> None:
        scored = reward_gradient(self.model.decode, self.reward, self.rollout.latents[-1], self.prompts, chunk)
        reward = scored.rewards.requires_grad_()
        loss, _ = self.method.loss(reward, THRESHOLD, self.rollout, **self.indices)
        (factor,) = torch.autograd.grad(loss, reward)
        gradient = per_sample(factor, scored.gradient) * scored.gradient
        del scored
        surrogate_backward(self.method.plan(self.sigmas, **self.indices), self.rollout, self.velocity, gradient)

    def staged_without_reward(self, method: Method | None = None) -> None:
        method = method or self.method
        indices = method.draw(len(self.sigmas) - 1, len(self.prompts), torch.Generator().manual_seed(0))
        plan = method.plan(self.sigmas, **indices)
        surrogate_backward(plan, self.rollout, self.velocity, torch.ones_like(self.rollout.latents[-1]))

    def inline(self) -> None:
        x_end, distances = self.leaps()
        reward = self.reward(to_unit_range(self.model.decode(x_end)), self.prompts)
        loss, _ = consistency_weighted_loss(reward, distances, THRESHOLD, TAU)
        loss.backward()

    def inline_without_reward(self) -> None:
        x_end, _ = self.leaps()
        x_end.backward(torch.ones_like(x_end))

    def leaps(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        k, j = self.indices["k"], self.indices["j"]
        samples, latents = torch.arange(len(k)), self.rollout.latents
        sigma_k, sigma_j, zero = self.sigmas[k], self.sigmas[j], torch.zeros(len(k))
        velocity_k = self.velocity(latents[k, samples], sigma_k)
        x_j, d_j = leap_update(latents[k, samples], velocity_k, sigma_k, sigma_j, target=latents[j, samples])
        velocity_j = self.velocity(scale_gradient(x_j, ALPHA), sigma_j)
        x_end, d_end = leap_update(x_j, velocity_j, sigma_j, zero, target=latents[-1])
        assert d_j is not None
        assert d_end is not None
        return x_end, (d_j, d_end)


def peak_bytes(setting: Setting, backward: Callable[[], None]) -> int:
    setting.clear()
    with StorageLedger() as ledger:
        ledger.exclude(setting.rollout.latents, setting.rollout.velocities, setting.sigmas)
        ledger.exclude(*setting.velocity.embeddings.tensors())
        for module in (setting.model.transformer, setting.reward):
            ledger.exclude(*module.parameters(), *module.buffers())
        ledger.exclude(*(p.grad for p in setting.parameters if p.grad is not None))
        backward()
    return ledger.peak


def measure(batch_size: int) -> dict[str, float]:
    """Peaks in bytes, their ratios, and the relative difference of the staged and the in-line gradient."""
    setting = Setting(batch_size)
    inline = peak_bytes(setting, setting.inline)
    expected = setting.gradient()
    staged = peak_bytes(setting, setting.staged)
    difference = float((setting.gradient() - expected).norm() / expected.norm())
    chunked = peak_bytes(setting, partial(setting.staged, chunk=1))
    inline_alone = peak_bytes(setting, setting.inline_without_reward)
    staged_alone = peak_bytes(setting, setting.staged_without_reward)
    step, sampler = (
        peak_bytes(setting, partial(setting.staged_without_reward, get_method("draft_k", steps=steps)))
        for steps in (1, None)
    )
    return {
        "batch_size": batch_size,
        "num_steps": setting.rollout.num_steps,
        "inline_bytes": inline,
        "staged_bytes": staged,
        "ratio": staged / inline,
        "ratio_decoding_one_at_a_time": chunked / inline,
        "inline_bytes_without_reward": inline_alone,
        "staged_bytes_without_reward": staged_alone,
        "ratio_without_reward": staged_alone / inline_alone,
        "one_step_bytes": step,
        "whole_sampler_bytes": sampler,
        "sampler_to_step_ratio": sampler / step,
        "gradient_difference": difference,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    print(json.dumps(measure(parser.parse_args().batch_size)))
