"""What a run does between iterations, on a model of fake tensors: samples, the watch, a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from leapalign.memory.residency import host_memory, stage
from leapalign.planning.ledger import StorageLedger
from leapalign.reward_gradient import RewardFn
from leapalign.trainer import Trainer
from leapalign.watch.watch import Watch

_SHARD = 10 * 10**9
"""Bytes of weights in one file, at most: diffusers' default."""


def between_iterations(trainer: Trainer, ledger: StorageLedger, rewards: Mapping[str, RewardFn]) -> None:
    """One of each that the configuration has, of one batch. ``rewards``: the watch's, else in host memory."""
    config = trainer.config
    if config.samples.every:
        trainer.draw_samples()
    if config.watch.every:
        _look(trainer, ledger, rewards)
    with stage("saving"):
        _save(trainer)


def _look(trainer: Trainer, ledger: StorageLedger, rewards: Mapping[str, RewardFn]) -> None:
    """A measurement of one batch after the first, beside the base's latents."""
    config, size = trainer.config, min(trainer.config.rollout.batch_size, len(trainer.prompts))
    seeds = config.watch.seeds
    prompts = trainer.prompts[: max(size // seeds, 1)]
    with host_memory("latents"):
        base = trainer.model.draw_noise(range(len(prompts) * seeds))
    watch = Watch(config, prompts, dict(rewards), [], trainer.embeddings, base, {})
    with stage("watch"), trainer.optimizer.averaged_weights():
        count_watch_rewards(ledger, rewards, host=False)
        watch.look(1, trainer.model, trainer.rewards)
    count_watch_rewards(ledger, rewards, host=True)


def count_watch_rewards(ledger: StorageLedger, rewards: Mapping[str, RewardFn], host: bool) -> None:
    """Counts them where they are."""
    for reward in rewards.values():
        if isinstance(reward, nn.Module):
            ledger.count(*reward.parameters(), *reward.buffers(), role="reward", host=host)


def _save(trainer: Trainer) -> None:
    """What writing a checkpoint copies to host memory: the tensors of one file that are on the device, and an average
    of another dtype than the weights, rounded. Computed from sizes; nothing is written."""
    optimizer, model = trainer.optimizer, trainer.model.transformer
    model.state_dict()
    if optimizer.gradient_sink is None:  # Else all that is saved is in host memory.
        weights = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        moments = sum(v.nbytes for state in optimizer.rule.state.values() for v in state.values())
        with host_memory("optimizer"):
            for size in (min(weights, _SHARD), moments):
                torch.empty(size, dtype=torch.uint8)
    optimizer.average.as_weights()
