"""Trains the reward of the tiny world: a CLIP scorer whose gradient can be followed, because it is taught.

A scorer that only ranks pictures well is pleased by texture when its gradient is followed. This one learns value and
gradient of `nearest.worth` (Sobolev training: Czarnecki et al. 2017, arXiv:1706.04859), on scenes, on ways between
them, on stained ones, and on where its own gradient leads.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from leapalign.models.flux import FluxModel
from leapalign.rewards.clip_scorer import ClipScorer
from leapalign.rewards.preprocessing import cover
from leapalign.storage.modes import save_pretrained
from leapalign.tiny.descent import descend
from leapalign.tiny.lessons import Climbers, draw_lesson
from leapalign.tiny.model import MAX_TOKENS, SPECIAL, WORDS, build_tokenizer
from leapalign.tiny.nearest import CELL, SIDE, worth

SEEN = SIDE // 2  # like real rewards, it sees a picture smaller than the one that is rewarded
STEPS, LESSON, CLIMBED = 4000, 64, 16
LEARNING_RATE = 1e-3
CLIMBERS = 256
FIRST_CLIMB = 300  # steps after which there is a gradient worth following
VALUE_WEIGHT, SLOPE_WEIGHT = 10.0, 1.0


def build_scorer() -> ClipScorer:
    """An untrained `ClipScorer` at tiny size, a patch a cell, with scores in (0, 1)."""
    layers = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "projection_dim": 96}
    text = {
        **layers,
        "num_hidden_layers": 2,
        "vocab_size": len(SPECIAL) + len(WORDS),
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    vision = {**layers, "num_hidden_layers": 4, "image_size": SEEN, "patch_size": CELL // 2}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=96, logit_bias=0.0)
    processor = CLIPImageProcessor(size={"shortest_edge": SEEN}, crop_size={"height": SEEN, "width": SEEN})
    return ClipScorer(CLIPModel(config), build_tokenizer(), processor, scale="probability")


def save_scorer(scorer: ClipScorer, folder: Path) -> None:
    """Writes what ``rewards.pickscore`` loads: a CLIP folder, with its ``logit_bias``."""
    for part in (scorer.model, scorer.tokenizer, scorer.image_processor):
        save_pretrained(part, folder)


def scores_of(scorer: ClipScorer, bias: Tensor, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """``(B,)`` in (0, 1), as `ClipScorer.forward`, with a ``bias`` that learns."""
    cosine = (scorer.embed_images(images) * scorer.embed_prompts(prompts)).sum(dim=-1)
    return (cosine * scorer.model.logit_scale.exp() + bias).sigmoid()


def sobolev_errors(
    score: Callable[[Tensor, Sequence[str]], Tensor], images: Tensor, prompts: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """How far ``score`` is from `worth` on ``images (B, 3, SIDE, SIDE)``: the mean squared error of its values, the
    squared error of its gradients relative to theirs, and the mean cosine of the two gradients, both as far as the
    scorer's size shows them."""
    images = images.detach().requires_grad_()
    target = worth(images, prompts)
    (slope,) = torch.autograd.grad(target.sum(), images)
    scores = score(images, prompts)
    (own_slope,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    slope, own_slope = (F.avg_pool2d(one, SIDE // SEEN) for one in (slope, own_slope))
    value = (scores - target.detach()).square().mean()
    gradient = (own_slope - slope).square().sum() / slope.square().sum()
    return value, gradient, F.cosine_similarity(own_slope.flatten(1), slope.flatten(1)).mean()


def train_reward(
    model: FluxModel,
    folder: Path,
    seed: int,
    log: Callable[[str], None],
    draw: Callable[[int, random.Random, torch.Generator], tuple[Tensor, list[str]]] = draw_lesson,
    slope_weight: float = SLOPE_WEIGHT,
    climbed: int = CLIMBED,
    steps: int = STEPS,
) -> None:
    """The reward that runs optimise, written to ``folder``; ``model``: whose decoder stands before it.

    draw: `draw_lesson`, or what takes its place; slope_weight: of the gradient's error; climbed: pictures of
    `Climbers` in a batch.
    """
    torch.manual_seed(seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scorer, bias = build_scorer(), torch.nn.Parameter(torch.tensor(0.0))
    scorer.model.set_attn_implementation("eager")  # the fused one has no second derivative
    weights = [*scorer.model.parameters(), bias]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    climbers = Climbers(model, CLIMBERS, rng)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return scores_of(scorer, bias, images, prompts)

    for step in range(1, steps + 1):
        images, prompts = draw(LESSON, rng, generator)
        if climbed and step > FIRST_CLIMB:
            found, theirs = climbers.step(climbed, score)
            images, prompts = torch.cat([images, cover(found, SIDE)]), prompts + theirs
        value, gradient, cosine = sobolev_errors(score, images, prompts)
        descend(VALUE_WEIGHT * value + slope_weight * gradient, weights, optimizer, schedule)
        if step % 250 == 0:
            log(
                f"step {step} error of the value {value.sqrt().item():.3f}, of the gradient {gradient.item():.3f}, "
                f"cosine of the gradients {cosine.item():.3f}"
            )
    scorer.model.config.logit_bias = bias.item()
    save_scorer(scorer, folder)
