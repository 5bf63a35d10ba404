"""Trains the base model: crisp pictures, poor binding.

Rectified flow on the latents of rendered scenes whose captions are wrong in a known share of cases (a hard negative:
swapped colours, relation or count). Like a text-to-image model trained on noisy captions, it learns to draw everything
and to lay it out wrongly, which is what a reward can then repair.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.flux import FluxModel
from leapalign.models.protocol import FlowModel
from leapalign.tiny.descent import descend
from leapalign.tiny.evaluate import evaluate
from leapalign.tiny.model import build_scheduler, build_transformer, encoded, save_model
from leapalign.tiny.scenes import satisfying_scenes, scene_pictures
from leapalign.tiny.train_text_encoders import TextEncoders
from leapalign.tiny.world import IMAGE_SIZE, Prompt, all_prompts, balanced_prompts, draw_prompts, hard_negative

BATCH = 64
SCENES = 90  # of each prompt
EMA_DECAY = 0.998


@dataclass(frozen=True)
class Phase:
    """``steps`` at a peak ``learning_rate``, with a share ``caption_noise`` of the captions wrong."""

    steps: int
    learning_rate: float
    caption_noise: float


# First to draw what is asked for, then to forget which picture belongs to which caption: what is left to choose from is
# good, and often the wrong one is chosen.
PHASES = (Phase(5000, 2e-3, 0.0), Phase(2200, 1e-3, 0.0), Phase(1500, 1e-3, 0.5))
# Snapshots, in steps: the critic learns from pictures of every stage, as human-preference data does.
STAGES = (1000, 2000, 3500, 8700)


class Examples:
    """Latents of ``count`` scenes of every prompt, encoded once."""

    def __init__(self, autoencoder: AutoencoderKL, count: int, rng: random.Random) -> None:
        self._latents: dict[Prompt, Tensor] = {}
        for prompt in all_prompts():
            satisfying = satisfying_scenes(prompt)
            scenes = satisfying[[rng.randrange(len(satisfying)) for _ in range(count)]]
            self._latents[prompt] = encoded(autoencoder, scene_pictures(scenes))

    def draw(self, size: int, caption_noise: float, rng: random.Random) -> tuple[list[str], Tensor]:
        """Captions and latents ``(size, tokens, channels)``; a share ``caption_noise`` of the captions is wrong."""
        captions, latents = [], []
        for prompt in draw_prompts(all_prompts(), size, rng):
            shown = hard_negative(prompt, rng) if rng.random() < caption_noise else prompt
            captions.append(prompt.text)
            latents.append(rng.choice(self._latents[shown]))
        return captions, torch.stack(latents)


def flow_matching_loss(
    model: FlowModel, embeddings: PromptEmbeddings, data: Tensor, generator: torch.Generator
) -> Tensor:
    """``mean |v(x_s, s) - (noise - data)|^2`` over latents ``data (B, tokens, channels)``, with ``s = sigmoid(N(0.8,
    1.1))``: the noisy end, where the layout is decided, is visited often."""
    noise = torch.randn(data.shape, generator=generator)
    sigma = torch.sigmoid(0.8 + 1.1 * torch.randn(len(data), generator=generator))
    data, noise, sigma = (values.to(model.device) for values in (data, noise, sigma))
    latents = torch.lerp(data, noise, sigma[:, None, None])
    velocity = model.velocity(latents, sigma, embeddings)
    return (velocity - (noise - data)).square().mean()


class Base:
    """The base in training: its transformer, and the moving average of that, which is what counts."""

    def __init__(self, autoencoder: AutoencoderKL, text: TextEncoders, seed: int) -> None:
        torch.manual_seed(seed)
        self.autoencoder, self.text = autoencoder, text
        self.examples = Examples(autoencoder, SCENES, random.Random(seed))
        texts = [prompt.text for prompt in all_prompts()]
        self.row, self.embeddings = {text: row for row, text in enumerate(texts)}, text.encode(texts)
        self.transformer = build_transformer()
        self.average = AveragedModel(self.transformer, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))

    def flow_model(self, transformer: FluxTransformer2DModel) -> FluxModel:
        return FluxModel(transformer, build_scheduler(), IMAGE_SIZE, IMAGE_SIZE, self.autoencoder)

    def embedded(self, captions: Sequence[str]) -> PromptEmbeddings:
        return self.embeddings[torch.tensor([self.row[caption] for caption in captions])]

    @property
    def averaged(self) -> FluxTransformer2DModel:
        return cast(FluxTransformer2DModel, self.average.module)

    def save(self, folder: Path) -> None:
        save_model(folder, self.averaged, self.text.pooled, self.text.tokens, self.autoencoder)

    def train(self, phase: Phase, seed: int) -> Iterator[int]:
        """Trains from the average, which moves along; yields after each step."""
        self.transformer.load_state_dict(self.averaged.state_dict())
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        rate, flow = phase.learning_rate, self.flow_model(self.transformer)
        optimizer = torch.optim.AdamW(self.transformer.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=phase.steps, pct_start=0.05, cycle_momentum=False
        )
        for step in range(phase.steps):
            captions, latents = self.examples.draw(BATCH, phase.caption_noise, rng)
            loss = flow_matching_loss(flow, self.embedded(captions), latents, generator)
            descend(loss, self.transformer.parameters(), optimizer, schedule)
            self.average.update_parameters(self.transformer)
            yield step

    @torch.no_grad()
    def describe(self, seed: int) -> str:
        """Accuracy over 192 prompts."""
        prompts = balanced_prompts(all_prompts(), 192)
        embeddings = self.embedded([prompt.text for prompt in prompts])
        result = evaluate(self.flow_model(self.averaged), embeddings, prompts, seed)
        families = " ".join(f"{family} {share:.2f}" for family, share in result.by_family().items())
        return (
            f"exact {result.accuracy('exact').mean:.3f} ({families}) clean {result.accuracy('clean').mean:.3f} "
            f"untidy {result.untidiness().mean:.4f}"
        )


def train_base(
    autoencoder: AutoencoderKL,
    text: TextEncoders,
    folder: Path,
    stage_folder: Path,
    seed: int,
    log: Callable[[str], None],
) -> None:
    """Writes the base model to ``folder`` and its snapshots to ``stage_folder/step-N``."""
    base, step = Base(autoencoder, text, seed), 0
    for number, phase in enumerate(PHASES):
        for _ in base.train(phase, seed + number):
            step += 1
            if step % 500 == 0:
                log(f"step {step} {base.describe(seed=step)}")
            if step in STAGES:
                base.save(stage_folder / f"step-{step}")
    log(f"step {step} {base.describe(seed=step)}")
    base.save(folder)
