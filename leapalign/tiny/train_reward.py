"""Trains the reward of the tiny world, a CLIP scorer, like a human-preference model whose gradient can be followed.

A scorer that only ranks pictures well is pleased by texture, tint and brightness when its gradient is followed: all
pictures move together that way, and nothing in the data says it is worse. So this one also learns

- what lies between pictures: one cell fades towards another picture's, and the score must change as the grade does;
- that drift costs: pictures with noise, tint or a perturbation shared by all are worth less, the more the farther;
- to be flat elsewhere: along its own gradient, for each picture and for all of them together, the score may change
  only as the grade does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from leapalign.rewards.clip_scorer import ClipScorer
from leapalign.storage.modes import save_pretrained
from leapalign.tiny.disturbance import Disturbance, length, worth
from leapalign.tiny.grades import grade
from leapalign.tiny.judged_pool import JudgedPool
from leapalign.tiny.lessons import FADED, Lesson, draw_lesson
from leapalign.tiny.model import MAX_TOKENS, SPECIAL, WORDS, build_tokenizer
from leapalign.tiny.train_critic import TESTED, auc, preference_loss
from leapalign.tiny.world import CELL_SIZE, IMAGE_SIZE, all_prompts

CLIP_SIDE = 16  # half the image: like real rewards, it sees a downsampled picture
PATCH = CLIP_SIDE * CELL_SIZE // IMAGE_SIZE  # one patch a cell
CODEC_SIZE = 16  # principal components that the patch embedding keeps
STEPS = 6500
LEARNING_RATE = 1e-3
PROMPTS = 64  # compared with every picture of a batch, besides those the pictures were made for
SLOPE_WEIGHT, FLAT_WEIGHT, SHARED_WEIGHT = 6.0, 30.0, 2500.0


def build_scorer() -> ClipScorer:
    """An untrained `ClipScorer` at tiny size, with cosine scores."""
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
    vision = {**layers, "num_hidden_layers": 4, "image_size": CLIP_SIDE, "patch_size": PATCH}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=96)
    processor = CLIPImageProcessor(
        size={"shortest_edge": CLIP_SIDE}, crop_size={"height": CLIP_SIDE, "width": CLIP_SIDE}
    )
    return ClipScorer(CLIPModel(config), build_tokenizer(), processor, scale="cosine")


def save_scorer(scorer: ClipScorer, folder: Path) -> None:
    """Writes what ``rewards.pickscore`` loads: a CLIP folder."""
    for part in (scorer.model, scorer.tokenizer, scorer.image_processor):
        save_pretrained(part, folder)


@torch.no_grad()
def set_codec(scorer: ClipScorer, images: Tensor) -> Tensor:
    """Makes the patch embedding a linear codec, the leading principal components of patches of ``images``, in a
    random rotation. Returns its weight, to be kept fixed: the gradient then lies among what pictures consist of."""
    weight = scorer.model.vision_model.embeddings.patch_embedding.weight
    patches = F.unfold(scorer.preprocess(images), PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    variance, axes = torch.linalg.eigh(patches.T.cov())
    variance, axes = variance.flip(0)[:CODEC_SIZE], axes.flip(1)[:, :CODEC_SIZE]
    basis = axes * variance.clamp(min=1e-4) ** -0.25  # the rare components count more, halfway to whitening
    rotation = torch.linalg.qr(torch.randn(len(weight), len(weight)))[0][:, :CODEC_SIZE]
    weight.copy_(0.3 * (rotation @ basis.T).view_as(weight))
    return weight


def train_reward(pool: JudgedPool, folder: Path, seed: int, log: Callable[[str], None]) -> None:
    """The reward that runs optimise, written to ``folder`` in CLIP layout with its ``logit_bias``."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    scorer, bias = build_scorer(), torch.nn.Parameter(torch.tensor(-2.0))
    kept, tested = pool.split(len(pool) - TESTED)
    tidy = kept[kept.misfits == 0]
    codec = set_codec(scorer, tidy.images()[:6000])
    trainable = [weight for weight in scorer.model.parameters() if weight is not codec] + [bias]
    for weight in trainable:
        weight.requires_grad_(True)
    scorer.train()
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    disturbance = Disturbance(generator)
    for step in range(1, STEPS + 1):
        disturbance.strength = min(1.0, 3 * step / STEPS)
        lesson = draw_lesson(kept, tidy, generator)
        loss = lesson_loss(scorer, bias, lesson, disturbance, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            log(f"step {step} loss {loss.item():.3f} {describe(scorer, bias, tested)}")
    scorer.eval().requires_grad_(False)
    scorer.model.config.logit_bias = bias.item()
    save_scorer(scorer, folder)


def lesson_loss(
    scorer: ClipScorer, bias: Tensor, lesson: Lesson, disturbance: Disturbance, generator: torch.Generator
) -> Tensor:
    """Fit to the grades, to their slope between pictures, and to how they fall along the scorer's own gradient."""
    texts = [prompt.text for prompt in all_prompts()]
    others = torch.randperm(len(texts), generator=generator)[:PROMPTS]
    chosen = torch.cat([lesson.own, others]).unique()
    own = torch.searchsorted(chosen, lesson.own)
    prompts = scorer.embed_prompts([texts[index] for index in chosen])

    def probabilities(embedded: Tensor, columns: Tensor, encoded: Tensor = prompts) -> Tensor:
        return logits_of(scorer, bias, embedded, encoded[columns]).sigmoid()

    images = disturbance.apply(lesson.clean)
    # Gradients are followed from all but the faded pictures, which differ little from the ones before them.
    start = torch.cat([torch.arange(FADED), torch.arange(2 * FADED, len(images))])
    x, clean, columns = images[start].requires_grad_(), lesson.clean[start], own[start]
    score = probabilities(scorer.embed_images(x), columns, prompts.detach()).sum()
    (gradient,) = torch.autograd.grad(score, x)
    x = x.detach()
    disturbance.learn(gradient)
    alone, together = disturbance.along(gradient), disturbance.together(gradient, x)

    embedded = scorer.embed_images(torch.cat([images, x + alone, x + together]))
    logits = logits_of(scorer, bias, embedded[: len(images), None], prompts[None])
    left = worth(images, lesson.clean)
    grades = lesson.grades * left[:, None]
    fit = preference_loss(logits, grades[:, chosen], own)

    p = logits.sigmoid()
    slope = (p[FADED : 2 * FADED] - p[:FADED]) / lesson.share[:, None]
    target = ((grades[FADED : 2 * FADED] - grades[:FADED]) / lesson.share[:, None])[:, chosen]
    error, weight = (slope - target).square(), target.abs() + 0.02
    slopes = (error * weight).sum() / weight.sum() + error.gather(1, own[:FADED, None]).mean()

    here = p[start].gather(1, columns[:, None])[:, 0]
    own_grade = lesson.grades[start].gather(1, lesson.own[start][:, None])[:, 0]

    def excess(moved: Tensor, step: Tensor) -> Tensor:
        """How much more the score rises along ``step`` than the grade does."""
        return probabilities(moved, columns) - here - own_grade * (worth(x + step, clean) - left[start])

    moved_alone, moved_together = embedded[len(images) :].chunk(2)
    flat = (excess(moved_alone, alone) / length(alone).flatten()).square().mean()
    shared = (excess(moved_together, together).mean() / length(together).mean()).square()
    return fit + SLOPE_WEIGHT * slopes + disturbance.strength * (FLAT_WEIGHT * flat + SHARED_WEIGHT * shared)


def logits_of(scorer: ClipScorer, bias: Tensor, images: Tensor, prompts: Tensor) -> Tensor:
    """Logits of embedded pairs, ``(..., D)`` each, broadcast against one another."""
    return (images * prompts).sum(dim=-1) * scorer.model.logit_scale.exp() + bias


@torch.no_grad()
def describe(scorer: ClipScorer, bias: Tensor, pool: JudgedPool) -> str:
    """On unseen images and the prompt of each: AUC against the judge, and error against the grade."""
    prompts = scorer.embed_prompts([prompt.text for prompt in all_prompts()])
    logits = logits_of(scorer, bias, scorer.embed_images(pool.images()), prompts[pool.own])
    edits = pool.own_edits()
    error = (logits.sigmoid() - grade(edits)).square().mean().sqrt()
    return f"AUC on unseen images {auc(logits, edits == 0):.4f} error {error:.3f}"
