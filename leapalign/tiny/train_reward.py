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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from leapalign.rewards.pickscore import ClipScorer
from leapalign.tiny.grades import edits_needed, grade
from leapalign.tiny.judged_pool import JudgedPool
from leapalign.tiny.model import MAX_TOKENS, SPECIAL, WORDS, build_tokenizer
from leapalign.tiny.train_critic import TESTED, auc, preference_loss
from leapalign.tiny.world import BACKGROUND, CELL_SIZE, CELLS, IMAGE_SIZE, all_prompts

CLIP_SIDE = 16  # half the image: like real rewards, it sees a downsampled picture
PATCH = CLIP_SIDE * CELL_SIZE // IMAGE_SIZE  # one patch a cell
CODEC_SIZE = 16  # principal components that the patch embedding keeps
STEPS = 6500
LEARNING_RATE = 1e-3
FADED, WHOLE = 72, 40  # pairs of pictures that differ in one cell, and pictures as they are, in a batch
PROMPTS = 64  # compared with every picture of a batch, besides those the pictures were made for
NOISE = 0.1  # largest standard deviation of the pixel noise
DRIFT = 60.0  # squared distance (over an image in [0, 1]) that halves what a picture is worth
SHARED_RADIUS = 6.0  # longest perturbation shared by a batch; recolouring an object is about 9
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
    scorer.model.save_pretrained(folder)
    scorer.tokenizer.save_pretrained(folder)
    scorer.image_processor.save_pretrained(folder)


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


@dataclass(frozen=True)
class Lesson:
    """clean: ``(B, 3, H, W)``, undisturbed; grades: ``(B, P)``; own: ``(B,)`` int64, the prompt of each.

    The first ``FADED`` pictures are followed by the same with one cell faded by ``share (FADED,)``, then come whole
    ones.
    """

    clean: Tensor
    grades: Tensor
    own: Tensor
    share: Tensor


def by_cell(values: Tensor) -> Tensor:
    """``(N, 4)``, a number a cell, as ``(N, 1, H, W)``."""
    square = values.view(-1, 1, 2, 2)
    return square.repeat_interleave(CELL_SIZE, dim=2).repeat_interleave(CELL_SIZE, dim=3)


def draw_lesson(whole: JudgedPool, tidy: JudgedPool, generator: torch.Generator) -> Lesson:
    """``whole``: any pictures; ``tidy``: those without misfits, whose cells can be exchanged."""

    def pick(pool: JudgedPool, count: int) -> JudgedPool:
        return pool[torch.randint(len(pool), (count,), generator=generator)]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    # A picture, in most cases with some cells of a second one: scenes that the base would rarely draw.
    first, second = pick(tidy, FADED), pick(tidy, FADED)
    taken = uniform(FADED, 4) < 0.3 * (uniform(FADED, 1) < 0.7)
    before = torch.lerp(first.images(), second.images(), by_cell(taken.float()))
    scenes = torch.where(taken, second.scenes, first.scenes)
    grades = grade(edits_needed(scenes))
    nearby = torch.multinomial(grades**2, 1, generator=generator)[:, 0]
    own = torch.where(uniform(FADED) < 0.5, first.own, nearby)

    # Of six cells of other pictures, the one that changes the grade most.
    donors = [pick(tidy, FADED) for _ in range(6)]
    cells = [torch.randint(len(CELLS), (FADED,), generator=generator) for _ in donors]
    masks = [F.one_hot(cell, len(CELLS)).float() for cell in cells]
    grades_after = [
        grade(edits_needed(torch.where(mask.bool(), donor.scenes, scenes)))
        for donor, mask in zip(donors, masks, strict=True)
    ]
    change = torch.stack([(after - grades).gather(1, own[:, None])[:, 0].abs() for after in grades_after])
    best, row = (change + 0.02 * uniform(*change.shape)).argmax(dim=0), torch.arange(FADED)
    share = 0.1 + 0.9 * uniform(FADED) ** 1.5
    mask = torch.stack(masks)[best, row] * share[:, None]
    after = torch.lerp(before, torch.stack([donor.images() for donor in donors])[best, row], by_cell(mask))
    grades_faded = torch.lerp(grades, torch.stack(grades_after)[best, row], share[:, None])

    rest = pick(whole, WHOLE)
    return Lesson(
        clean=torch.cat([before, after, rest.images()]),
        grades=torch.cat([grades, grades_faded, grade(rest.edits())]),
        own=torch.cat([own, own, rest.own]),
        share=share,
    )


def worth(images: Tensor, clean: Tensor) -> Tensor:
    """What is left of the grade ``(B,)`` of ``clean`` after a drift to ``images``, both ``(B, 3, H, W)``."""
    drift = 4 * F.avg_pool2d(images - clean, 2).square().sum(dim=(1, 2, 3))
    return torch.exp2(-drift / DRIFT)


def every_token(pattern: Tensor) -> Tensor:
    """The mean of ``pattern (1, 3, H, W)`` over the model's 4x4 patches, in all of them: what a bias can paint."""
    side = IMAGE_SIZE // 4
    mean = pattern.view(1, 3, side, 4, side, 4).mean(dim=(2, 4))
    return mean[:, :, None, :, None, :].expand(1, 3, side, 4, side, 4).reshape(1, 3, IMAGE_SIZE, IMAGE_SIZE)


def length(images: Tensor) -> Tensor:
    """L2 norms ``(B, 1, 1, 1)``."""
    return images.flatten(1).norm(dim=1).clamp(min=1e-9)[:, None, None, None]


class Disturbance:
    """Noise, tint, contrast and shared perturbations, growing to full ``strength`` (in [0, 1])."""

    def __init__(self, generator: torch.Generator) -> None:
        self.strength = 0.0
        self._generator = generator
        self._background = torch.tensor(BACKGROUND).view(1, 3, 1, 1)
        self._shared = torch.zeros(8, 3, IMAGE_SIZE, IMAGE_SIZE)
        self._current: int | None = None

    def tint(self, images: Tensor) -> Tensor:
        """Each with its own contrast, colour matrix, tint and smooth stain."""
        count, rand = len(images), self._rand
        spread = self.strength * rand(count, 1, 1, 1)
        contrast = 1 + 0.3 * spread * (2 * rand(count, 1, 1, 1) - 1)
        matrix = torch.eye(3) + 0.15 * spread[:, 0] * self._randn(count, 3, 3)
        stain = F.interpolate(self._randn(count, 3, 4, 4), size=IMAGE_SIZE, mode="bilinear")
        stain = 0.1 * self.strength * rand(count, 1, 1, 1) * stain + 0.1 * spread * self._randn(count, 3, 1, 1)
        colors = torch.einsum("bcd,bdhw->bchw", matrix, images - self._background)
        return self._background + contrast * colors + stain

    def apply(self, clean: Tensor) -> Tensor:
        """``clean``, laid out as in `Lesson`, disturbed; a faded picture as the one it came from."""
        tinted = self._generator.get_state()
        before = self.tint(clean[:FADED])
        self._generator.set_state(tinted)
        images = torch.cat([before, self.tint(clean[FADED : 2 * FADED]), self.tint(clean[2 * FADED :])])
        grain = NOISE * self._rand(FADED + WHOLE, 1, 1, 1) * self._randn(FADED + WHOLE, *clean.shape[1:])
        images = images + torch.cat([grain[:FADED], grain])
        self._current = int(torch.randint(8, (1,), generator=self._generator)) if self._rand(1) < 0.6 else None
        if self._current is not None:
            images = images + self.strength * self._rand(1) * self._shared[self._current]
        return images.clamp(0, 1)

    def learn(self, gradient: Tensor) -> None:
        """Moves the shared perturbation just used towards what pleases the scorer, by its ``gradient``."""
        if self._current is None:
            return
        mean = gradient.mean(dim=0, keepdim=True)
        mean = every_token(mean) if self._current % 2 else mean
        moved = self._shared[self._current] + SHARED_RADIUS / 6 * (mean / length(mean))[0]
        moved = moved * (SHARED_RADIUS / moved.norm()).clamp(max=1)
        self._shared[self._current] = 0 if self._rand(1) < 0.02 else moved

    def along(self, gradient: Tensor) -> Tensor:
        """Steps of length 0.2 to 1, up or down each picture's ``gradient (B, 3, H, W)``."""
        sign = torch.where(self._rand(len(gradient), 1, 1, 1) < 0.5, -1.0, 1.0)
        return sign * self._rand(len(gradient), 1, 1, 1).clamp(min=0.2) * gradient / length(gradient)

    def together(self, gradient: Tensor, images: Tensor) -> Tensor:
        """One step for all pictures, of mean length 0.5 to 2: the mean gradient, that of the model's patches, or
        the colour matrix that pleases most."""
        kind = int(torch.randint(4, (1,), generator=self._generator))
        if kind >= 2:
            colors = images - self._background
            matrix = torch.einsum("bchw,bdhw->cd", gradient, colors)
            step = torch.einsum("cd,bdhw->bchw", matrix, colors)
        else:
            step = gradient.mean(dim=0, keepdim=True)
            step = (every_token(step) if kind else step).expand_as(images)
        sign = torch.where(self._rand(1) < 0.5, -1.0, 1.0)
        return sign * (0.5 + 1.5 * self._rand(1)) * step / length(step).mean()

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


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
    grades = lesson.grades * worth(images, lesson.clean)[:, None]
    fit = preference_loss(logits, grades[:, chosen], own)

    p = logits.sigmoid()
    slope = (p[FADED : 2 * FADED] - p[:FADED]) / lesson.share[:, None]
    target = ((grades[FADED : 2 * FADED] - grades[:FADED]) / lesson.share[:, None])[:, chosen]
    error, weight = (slope - target).square(), target.abs() + 0.02
    slopes = (error * weight).sum() / weight.sum() + error.gather(1, own[:FADED, None]).mean()

    here = p[start].gather(1, columns[:, None])[:, 0]
    worth_here, own_grade = worth(x, clean), lesson.grades[start].gather(1, lesson.own[start][:, None])[:, 0]
    moved_alone, moved_together = embedded[len(images) :].chunk(2)
    rise_alone = probabilities(moved_alone, columns) - here - own_grade * (worth(x + alone, clean) - worth_here)
    rise_together = (
        probabilities(moved_together, columns) - here - own_grade * (worth(x + together, clean) - worth_here)
    )
    flat = (rise_alone / length(alone).flatten()).square().mean()
    shared = (rise_together.mean() / length(together).mean()).square()
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
