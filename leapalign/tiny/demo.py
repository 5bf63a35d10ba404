"""``leapalign demo``: aligns the tiny model, beside an equal-time control trained without reward."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from leapalign.config import Config, MemoryConfig
from leapalign.memory.placement import place, training_device
from leapalign.models import encode_prompts, load_model
from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.protocol import FlowModel
from leapalign.optimizers.optimizer import Optimizer
from leapalign.reports.progress import progress
from leapalign.reward_gradient import RewardFn
from leapalign.runs.run import Run
from leapalign.streams import CONTROL_STREAM, EVALUATION_STREAM, seed_of
from leapalign.tiny.critic import embedded_critic
from leapalign.tiny.evaluate import RULES, Evaluation, evaluate
from leapalign.tiny.train_base import PHASES, Examples, flow_matching_loss
from leapalign.tiny.world import FAMILIES, Prompt, all_prompts, balanced_prompts, split_prompts

EVALUATION_IMAGES = 432
SHOWN = 24
CONTROL_SCENES = 8  # of each prompt: what the control trains on
WITNESS = 'watch.rewards=[{name: custom, function: "leapalign.tiny.critic:critic"}]'
WATCHED = (
    "watch.every=20",
    "watch.prompts=embedded:watch_prompts.txt",
    WITNESS,
    "watch.stop_when=[held_out_custom < 0.8 base, diversity < 0.7 base, sharpness > 1.5 base]",
)
"""What a demo lays over the config ``tiny``."""
REWARD, HELD_OUT_REWARD = "reward", "held_out_reward"


@dataclass(frozen=True)
class Pair:
    """One prompt and noise: ``before`` and ``after`` training, ``(3, H, W)`` each, and whether each is right."""

    prompt: Prompt
    before: Tensor
    after: Tensor
    right_before: bool
    right_after: bool


@dataclass(frozen=True)
class Comparison:
    """The same held-out prompts and seeds before, after, and after the control; ``seconds`` of either training."""

    before: Evaluation
    after: Evaluation
    control: Evaluation
    seconds: float

    @property
    def shown(self) -> list[Pair]:
        """The first ``SHOWN`` pairs. Prompts cycle through the families: the first of each, not the best."""
        columns = zip(self.before.prompts, self.before.images, self.after.images, strict=True)
        verdicts = zip(self.before.verdicts, self.after.verdicts, strict=True)
        pairs = [Pair(*column, a.exact, b.exact) for column, (a, b) in zip(columns, verdicts, strict=True)]
        return pairs[:SHOWN]


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts, their embeddings, the rewards to score with, and the noise seed of the first image."""

    prompts: list[Prompt]
    embeddings: PromptEmbeddings
    rewards: dict[str, RewardFn]
    seed: int

    @classmethod
    def load(cls, config: Config, reward: RewardFn) -> HeldOut:
        prompts = balanced_prompts(split_prompts()[1], EVALUATION_IMAGES)
        embeddings = encode_prompts(config.model, [prompt.text for prompt in prompts])
        rewards: dict[str, RewardFn] = {REWARD: reward, HELD_OUT_REWARD: embedded_critic()}
        return cls(prompts, embeddings, rewards, seed_of(config.seed, EVALUATION_STREAM, 0))

    def evaluate(self, model: FlowModel, arm: str) -> Evaluation:
        return evaluate(model, self.embeddings, self.prompts, self.seed, self.rewards, f"evaluate, {arm}")


def train_control(config: Config, seconds: float) -> FlowModel:
    """The base model trained on for ``seconds`` without a reward, same optimizer settings; its weight average."""
    model = load_model(config.model)
    place(model, MemoryConfig(), training_device())
    parameters = list(model.transformer.parameters())
    optimizer = Optimizer(parameters, config.optimizer, config.ema, config.train.iterations, config.seed)
    texts = [prompt.text for prompt in all_prompts()]
    embeddings, row = encode_prompts(config.model, texts), {text: i for i, text in enumerate(texts)}
    seed = seed_of(config.seed, CONTROL_STREAM, 0)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    assert isinstance(model.decoder, AutoencoderKL)
    examples = Examples(model.decoder, CONTROL_SCENES, rng)
    started = time.perf_counter()
    with progress("train the control", math.ceil(seconds), "s") as bar:
        while (passed := time.perf_counter() - started) < seconds:
            bar.update(int(passed) - bar.n)
            captions, latents = examples.draw(config.train.batch_size, PHASES[-1].caption_noise, rng)
            chosen = embeddings[torch.tensor([row[caption] for caption in captions])]
            flow_matching_loss(model, chosen, latents, generator).backward()
            optimizer.step()
    optimizer.average.copy_to(parameters)
    return model


def run_demo(run: Run, train: Callable[[], float]) -> Comparison | None:
    """Evaluates before and after training by ``train``, which returns its seconds, and after an equal-time control.

    None where somebody stopped ``train`` before the last iteration; the watch may.
    """
    trainer, config = run.trainer, run.trainer.config
    held_out = HeldOut.load(config, trainer.rewards[0].reward)
    before = held_out.evaluate(trainer.model, "before")
    seconds = train()
    if trainer.iteration < config.train.iterations and not (run.watch and run.watch.stop):
        return None
    with trainer.optimizer.averaged_weights():
        after = held_out.evaluate(trainer.model, "after")
    control = held_out.evaluate(train_control(config, seconds), "control")
    return Comparison(before, after, control, seconds)


def summary(comparison: Comparison) -> dict[str, Any]:
    """The figures of a comparison, fit for JSON; intervals are 95 %, over images."""
    arms = {"before": comparison.before, "after": comparison.after, "control": comparison.control}

    def figures(arm: Evaluation) -> dict[str, Any]:
        return {
            REWARD: arm.score(REWARD).to_json(),
            HELD_OUT_REWARD: arm.score(HELD_OUT_REWARD).to_json(),
            **{rule: arm.accuracy(rule).to_json() for rule in RULES},
            "tidy": arm.untidiness().to_json(),
            "diversity": arm.diversity(),
            "exact_by_family": arm.by_family("exact"),
            "lenient_by_family": arm.by_family("lenient"),
        }

    detail = {name: figures(arm) for name, arm in arms.items()}
    headline = {REWARD: REWARD, HELD_OUT_REWARD: HELD_OUT_REWARD, "accuracy": "exact"}
    means = {
        key: {name: detail[name][figure]["mean"] for name in ("before", "after")} for key, figure in headline.items()
    }
    control = {key: detail["control"][figure]["mean"] for key, figure in headline.items()}
    families = {family: {name: detail[name]["exact_by_family"][family] for name in arms} for family in FAMILIES}
    pairs = comparison.shown
    return {
        **means,
        "control": control,
        "tidy": {name: detail[name]["tidy"]["mean"] for name in ("before", "after")},
        "grid": {
            "right_before": sum(pair.right_before for pair in pairs),
            "right_after": sum(pair.right_after for pair in pairs),
            "of": len(pairs),
        },
        "accuracy_by_family": families,
        "detail": detail,
    }
