"""What a tiny model draws for held-out prompts: scored by both rewards and by the exact judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.evaluation.generate import generate
from leapalign.evaluation.statistics import Interval, mean_interval, share_interval
from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.protocol import FlowModel
from leapalign.reward_gradient import RewardFn
from leapalign.tiny.judge import Verdict, detect, untidiness, verdict
from leapalign.tiny.world import FAMILIES, Prompt
from leapalign.watch import image_statistics

NUM_STEPS = 25
RULES = ("exact", "lenient", "clean")


@dataclass(frozen=True)
class Evaluation:
    """``images (N, 3, H, W)`` in [0, 1] with each one's prompt, verdict, untidiness, and scores ``(N,)`` by reward."""

    prompts: Sequence[Prompt]
    images: Tensor
    verdicts: Sequence[Verdict]
    untidy: Sequence[float]
    scores: dict[str, Tensor]

    def accuracy(self, rule: str = "exact", family: str | None = None) -> Interval:
        """Share of images that pass ``rule`` ("exact", "lenient", "clean"), in one family or in all."""
        pairs = zip(self.prompts, self.verdicts, strict=True)
        return share_interval([getattr(v, rule) for p, v in pairs if family in (None, p.family)])

    def score(self, reward: str) -> Interval:
        return mean_interval(self.scores[reward].tolist())

    def untidiness(self) -> Interval:
        """Mean absolute difference to a drawing of what the judge finds, images in [0, 1]."""
        return mean_interval(self.untidy)

    def diversity(self) -> float:
        """How much images of one prompt differ, whatever their seeds: see `image_statistics.diversity`."""
        groups = [
            image_statistics.small(self.images[[p == prompt for p in self.prompts]]) for prompt in set(self.prompts)
        ]
        return float(
            torch.tensor([image_statistics.diversity(group[None]) for group in groups if len(group) > 1]).mean()
        )

    def by_family(self, rule: str = "exact") -> dict[str, float]:
        return {family: self.accuracy(rule, family).mean for family in FAMILIES}


def evaluate(
    model: FlowModel,
    embeddings: PromptEmbeddings,
    prompts: Sequence[Prompt],
    seed: int,
    rewards: dict[str, RewardFn] | None = None,
    description: str = "evaluate",
) -> Evaluation:
    """One image a prompt; ``embeddings[i]`` belongs to ``prompts[i]``, whose noise is seeded ``seed + i``.

    ``description`` stands at the bar that shows the progress.
    """
    seeds = range(seed, seed + len(prompts))
    images = generate(model, embeddings, seeds, NUM_STEPS, description=description)
    texts = [prompt.text for prompt in prompts]
    with torch.no_grad():
        scores = {name: reward(images, texts) for name, reward in (rewards or {}).items()}
    found = [detect(image.numpy()) for image in images]
    verdicts = [verdict(seen, prompt) for seen, prompt in zip(found, prompts, strict=True)]
    untidy = [untidiness(image.numpy(), seen) for image, seen in zip(images, found, strict=True)]
    return Evaluation(prompts, images, verdicts, untidy, scores)
