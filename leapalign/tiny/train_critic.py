"""Trains the critic, the independent reward: which pictures satisfy which prompts exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from leapalign.tiny.critic import Critic
from leapalign.tiny.descent import descend
from leapalign.tiny.judged_pool import JudgedPool
from leapalign.tiny.world import all_prompts

STEPS, BATCH = 3000, 128
LEARNING_RATE = 1e-3
NOISE = 0.08  # largest standard deviation of the pixel noise
TESTED = 1000  # images kept for testing


def preference_loss(logits: Tensor, truth: Tensor, own: Tensor) -> Tensor:
    """Balanced cross-entropy over prompts, plus that of the prompt each image was made for.

    logits, truth in [0, 1]: ``(B, P)``; own: ``(B,)``, its column.
    """
    losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    every = (losses * truth).sum() / truth.sum() + (losses * (1 - truth)).topk(16, dim=1).values.mean()
    return every + 2 * losses.gather(1, own[:, None]).mean()


def train_critic(pool: JudgedPool, folder: Path, seed: int, log: Callable[[str], None]) -> None:
    """The reward that only evaluates, written to ``folder``."""
    torch.manual_seed(seed)
    critic = Critic()
    kept, tested = pool.split(len(pool) - TESTED)
    texts = [prompt.text for prompt in all_prompts()]
    optimizer = torch.optim.AdamW(critic.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, STEPS + 1):
        batch = kept[torch.randint(len(kept), (BATCH,), generator=generator)]
        images = batch.images()
        spread = NOISE * torch.rand(BATCH, 1, 1, 1, generator=generator)
        images = (images + spread * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        logits = critic.compare(critic.encode_images(images)[:, None], critic.encode_text(texts)[None])
        loss = preference_loss(logits, batch.satisfied().float(), batch.own)
        descend(loss, critic.parameters(), optimizer, schedule)
        if step % 500 == 0:
            with torch.no_grad():
                scores = critic(tested.images(), [texts[own] for own in tested.own])
            log(f"step {step} loss {loss.item():.3f} AUC on unseen images {auc(scores, tested.own_satisfied()):.4f}")
    critic.save(folder)


def auc(scores: Tensor, truth: Tensor) -> float:
    """Probability that an image that satisfies its prompt scores above one that does not, ``(N,)`` each."""
    ranked = truth[scores.argsort()]
    below = (~ranked).cumsum(0)
    return float(below[ranked].double().mean() / (~ranked).sum())
