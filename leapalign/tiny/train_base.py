"""Trains the base model: crisp pictures, poor binding.

Rectified flow on rendered scenes whose captions are wrong in a known share of cases (a hard negative: swapped
colours, relation or count). Like a text-to-image model trained on noisy captions, it learns to draw everything and
to lay it out wrongly, which is what a reward can then repair.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextModel, T5EncoderModel

from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.flux import FluxModel
from leapalign.models.protocol import FlowModel
from leapalign.tiny.evaluate import evaluate
from leapalign.tiny.model import (
    MAX_TOKENS,
    build_pooled_encoder,
    build_scheduler,
    build_token_encoder,
    build_tokenizer,
    build_transformer,
    pack_pixels,
    save_model,
)
from leapalign.tiny.world import (
    IMAGE_SIZE,
    all_prompts,
    balanced_prompts,
    draw_prompts,
    draw_scene,
    hard_negative,
    render,
)

BATCH = 48
EMA_DECAY = 0.998


@dataclass(frozen=True)
class Phase:
    """``steps`` at a peak ``learning_rate``, with a share ``caption_noise`` of the captions wrong."""

    steps: int
    learning_rate: float
    caption_noise: float


# First to draw anything, then to bind, then to forget which layout belongs to which caption: what is left to choose
# from is good, and often the wrong one is chosen.
PHASES = (Phase(7000, 2e-3, 0.4), Phase(3000, 1e-3, 0.3), Phase(2500, 1e-3, 0.0), Phase(1200, 5e-4, 0.45))
# Snapshots, in steps: the reward models learn from pictures of every stage, as human-preference data does.
STAGES = (1000, 2000, 3500, 7000)


class TinyFlux(torch.nn.Module):
    """Transformer and both text encoders, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer: FluxTransformer2DModel = build_transformer()
        self.pooled_encoder: CLIPTextModel = build_pooled_encoder()
        self.token_encoder: T5EncoderModel = build_token_encoder()
        self.tokenizer = build_tokenizer()

    def encode(self, captions: list[str]) -> PromptEmbeddings:
        """Embeddings as ``FluxPipeline.encode_prompt`` computes them: padded, without an attention mask."""
        tokens = self.tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        return PromptEmbeddings(
            {
                "pooled": self.pooled_encoder(tokens.input_ids).pooler_output,
                "tokens": self.token_encoder(tokens.input_ids).last_hidden_state,
            }
        )

    def as_flow_model(self) -> FluxModel:
        return FluxModel(self.transformer, build_scheduler(), IMAGE_SIZE, IMAGE_SIZE)


def draw_batch(size: int, caption_noise: float, rng: random.Random) -> tuple[list[str], Tensor]:
    """Captions and images ``(size, 3, 32, 32)`` in [0, 1]; a share ``caption_noise`` of the captions is wrong."""
    captions, images = [], []
    for prompt in draw_prompts(all_prompts(), size, rng):
        shown = hard_negative(prompt, rng) if rng.random() < caption_noise else prompt
        captions.append(prompt.text)
        images.append(render(draw_scene(shown, rng)))
    return captions, torch.from_numpy(np.stack(images))


def flow_matching_loss(
    model: FlowModel, embeddings: PromptEmbeddings, images: Tensor, generator: torch.Generator
) -> Tensor:
    """``mean |v(x_s, s) - (noise - data)|^2`` over ``images (B, 3, H, W)``, with ``s = sigmoid(N(0.8, 1.1))``: the
    noisy end, where the layout is decided, is visited often."""
    data = pack_pixels(images)
    noise = torch.randn(data.shape, generator=generator)
    sigma = torch.sigmoid(0.8 + 1.1 * torch.randn(len(data), generator=generator))
    data, noise, sigma = (values.to(model.device) for values in (data, noise, sigma))
    latents = torch.lerp(data, noise, sigma[:, None, None])
    velocity = model.velocity(latents, sigma, embeddings)
    return (velocity - (noise - data)).square().mean()


def train_base(folder: Path, stage_folder: Path, seed: int, log: Callable[[str], None]) -> None:
    """Writes the base model to ``folder`` and its snapshots to ``stage_folder/step-N``."""
    torch.manual_seed(seed)
    model = TinyFlux()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    ema = cast(TinyFlux, average.module)
    step = 0
    for number, phase in enumerate(PHASES):
        for _ in train_phase(model, average, phase, seed + number):
            step += 1
            if step % 500 == 0:
                log(f"base step {step} {describe(ema, seed=step)}")
            if step in STAGES:
                save_model(stage_folder / f"step-{step}", ema.transformer, ema.pooled_encoder, ema.token_encoder)
    save_model(folder, ema.transformer, ema.pooled_encoder, ema.token_encoder)


def train_phase(model: TinyFlux, average: AveragedModel, phase: Phase, seed: int) -> Iterator[int]:
    """Trains ``model`` from its ``average``, which it updates; yields after each step."""
    model.load_state_dict(average.module.state_dict())
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rate = phase.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=phase.steps, pct_start=0.05, cycle_momentum=False
    )
    for step in range(phase.steps):
        captions, images = draw_batch(BATCH, phase.caption_noise, rng)
        loss = flow_matching_loss(model.as_flow_model(), model.encode(captions), images, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        yield step


@torch.no_grad()
def describe(model: TinyFlux, seed: int) -> str:
    """Accuracy over 192 prompts."""
    prompts = balanced_prompts(all_prompts(), 192)
    embeddings = model.encode([prompt.text for prompt in prompts])
    result = evaluate(model.as_flow_model(), embeddings, prompts, seed)
    return f"exact {result.accuracy('exact').mean:.3f} clean {result.accuracy('clean').mean:.3f}"
