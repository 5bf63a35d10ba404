"""Pictures the tiny reward learns from: scenes and ways between them, stained; and what its own gradient leads to."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from leapalign.models.flux import FluxModel
from leapalign.tiny.model import encoded
from leapalign.tiny.nearest import small_kinds
from leapalign.tiny.scenes import KINDS, satisfying_scenes, scene_pictures, whole_pictures
from leapalign.tiny.world import Prompt, all_prompts, draw_prompts

STAIN = 0.12  # largest standard deviation of noise, of a picture's own stain, and of the stain of a batch
BETWEEN = 0.6  # share of the pictures with one cell on the way to another kind
CLIMB = 0.4  # length of a step in latents; that of a picture's latents is about 16
LONGEST_CLIMB = 40  # steps


def draw_scene_near(prompt: Prompt, rng: random.Random) -> list[int]:
    """A scene that satisfies ``prompt``, in most cases with a cell or two changed."""
    satisfying = satisfying_scenes(prompt)
    scene = satisfying[rng.randrange(len(satisfying))].tolist()
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        scene[rng.randrange(4)] = rng.randrange(len(KINDS)) if rng.random() < 0.7 else 0
    return scene


def draw_lesson(
    count: int, rng: random.Random, generator: torch.Generator, stain: float = STAIN, between: float = BETWEEN
) -> tuple[Tensor, list[str]]:
    """Stained pictures ``(count, 3, SIDE, SIDE)``, a share ``between`` of them between two scenes; their prompts."""
    prompts = draw_prompts(all_prompts(), count, rng)
    scenes = torch.tensor([draw_scene_near(prompt, rng) for prompt in prompts])
    place = torch.randint(4, (count, 1), generator=generator)
    other = scenes.scatter(1, place, torch.randint(len(KINDS), (count, 1), generator=generator))
    moved = torch.rand(count, 1, 1, 1, generator=generator) < between
    share = torch.rand(count, 1, 1, 1, generator=generator) * moved
    kinds = small_kinds()
    images = torch.lerp(whole_pictures(kinds[scenes]), whole_pictures(kinds[other]), share)
    return stained(images, stain, generator), [prompt.text for prompt in prompts]


def stained(images: Tensor, stain: float, generator: torch.Generator) -> Tensor:
    """``images (B, 3, S, S)`` with noise, a smooth stain of each one's own, and one that all of them share."""
    count, _, height, width = images.shape
    grain = torch.randn(images.shape, generator=generator)
    own, shared = (
        F.interpolate(torch.randn(n, 3, 8, 8, generator=generator), size=(height, width), mode="bilinear")
        for n in (count, 1)
    )
    for pattern in (grain, own, shared):
        images = images + stain * torch.rand(count, 1, 1, 1, generator=generator) * pattern
    return images


class Climbers:
    """Latents that climb a scorer's gradient through the decoder, as a training run will; each begins anew at times.

    What the scorer is wrongly pleased by shows itself here, and is then among what it learns from.
    """

    def __init__(self, model: FluxModel, count: int, rng: random.Random) -> None:
        self._model, self._rng = model, rng
        self._steps = [rng.randrange(LONGEST_CLIMB) for _ in range(count)]
        self._prompts = draw_prompts(all_prompts(), count, rng)
        self._latents = self._start(self._prompts)

    def _start(self, prompts: Sequence[Prompt]) -> Tensor:
        assert self._model.vae is not None
        scenes = torch.tensor([draw_scene_near(prompt, self._rng) for prompt in prompts])
        return encoded(self._model.vae, scene_pictures(scenes))

    def step(self, count: int, score: Callable[[Tensor, list[str]], Tensor]) -> tuple[Tensor, list[str]]:
        """Moves ``count`` of them up the gradient of ``score(images, prompts) -> (B,)``; where they were is returned:
        pictures ``(count, 3, H, W)`` and prompts."""
        chosen = self._rng.sample(range(len(self._prompts)), count)
        for index in chosen:
            self._steps[index] += 1
        worn = [index for index in chosen if self._steps[index] > LONGEST_CLIMB]
        if worn:
            fresh = draw_prompts(all_prompts(), len(worn), self._rng)
            for index, prompt in zip(worn, fresh, strict=True):
                self._prompts[index], self._steps[index] = prompt, 0
            self._latents[worn] = self._start(fresh)
        prompts = [self._prompts[index].text for index in chosen]
        latents = self._latents[chosen].requires_grad_()
        images = self._model.decode(latents).clamp(0, 1)
        (gradient,) = torch.autograd.grad(score(images, prompts).sum(), latents)
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-9)[:, None, None]
        self._latents[chosen] = (latents + CLIMB * gradient / length).detach()
        return images.detach(), prompts
