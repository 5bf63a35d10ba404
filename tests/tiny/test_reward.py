"""How the tiny world's reward is trained, and whether the shipped one's gradient can be followed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from leapalign.config import load_config
from leapalign.config.profiles import profiles
from leapalign.rewards import get_reward
from leapalign.tiny import train_reward
from leapalign.tiny.disturbance import DRIFT, Disturbance, every_token, worth
from leapalign.tiny.grades import KINDS, satisfying_scenes
from leapalign.tiny.judged_pool import JudgedPool, judge_pictures
from leapalign.tiny.lessons import FADED, draw_lesson
from leapalign.tiny.train_reward import build_scorer, set_codec
from leapalign.tiny.world import (
    CELL_SIZE,
    CELLS,
    Placed,
    Prompt,
    all_prompts,
    balanced_prompts,
    draw_scene,
    hard_negative,
    render,
)


@pytest.fixture(scope="module")
def pool() -> JudgedPool:
    rng, prompts = random.Random(0), all_prompts()
    own = [rng.randrange(len(prompts)) for _ in range(200)]
    pictures = [render(draw_scene(prompts[number], rng)) for number in own]
    return judge_pictures(np.stack([np.round(p * 255).astype(np.uint8) for p in pictures]), torch.tensor(own))


def test_a_faded_picture_differs_in_one_cell_and_its_grade_by_the_share(pool: JudgedPool) -> None:
    lesson = draw_lesson(pool, pool, torch.Generator().manual_seed(0))
    before, after = lesson.clean[:FADED], lesson.clean[FADED : 2 * FADED]
    cells = (after - before).unfold(2, CELL_SIZE, CELL_SIZE).unfold(3, CELL_SIZE, CELL_SIZE)
    assert (cells.abs().sum(dim=(1, 4, 5)).flatten(1) > 0).sum(dim=1).max() == 1
    change = (lesson.grades[FADED : 2 * FADED] - lesson.grades[:FADED]) / lesson.share[:, None]
    whole = torch.exp2(-torch.arange(5.0))
    differences = (whole[:, None] - whole[None]).flatten()
    assert (change[..., None] - differences).abs().amin(dim=-1).max() < 1e-5
    assert (change.gather(1, lesson.own[:FADED, None]) != 0).float().mean() > 0.8


def test_worth_halves_at_the_drift_distance_and_is_one_without() -> None:
    clean = torch.rand(3, 3, 32, 32)
    shift = torch.full((3, 3, 32, 32), (DRIFT / (3 * 32 * 32)) ** 0.5)
    torch.testing.assert_close(worth(clean, clean), torch.ones(3))
    torch.testing.assert_close(worth(clean + shift, clean), torch.full((3,), 0.5))


def test_disturbance_has_no_effect_at_strength_zero_but_grain(pool: JudgedPool) -> None:
    generator = torch.Generator().manual_seed(0)
    lesson = draw_lesson(pool, pool, generator)
    disturbance = Disturbance(generator)
    torch.testing.assert_close(disturbance.tint(lesson.clean), lesson.clean)
    disturbance.strength = 1.0
    shift = disturbance.apply(lesson.clean) - lesson.clean
    assert shift.std() > 0.02
    # A faded picture is disturbed as the one it came from, so that only the fading tells them apart.
    same = lesson.clean.clone()
    same[FADED : 2 * FADED] = same[:FADED]
    disturbed = disturbance.apply(same)
    torch.testing.assert_close(disturbed[:FADED], disturbed[FADED : 2 * FADED])


def test_every_token_repeats_the_mean_patch() -> None:
    pattern = torch.rand(1, 3, 32, 32)
    tiled = every_token(pattern)
    torch.testing.assert_close(tiled[..., 4:8, 8:12], tiled[..., :4, :4])
    torch.testing.assert_close(tiled[0, 1, 2, 3], pattern[0, 1, 2::4, 3::4].mean())


def test_training_keeps_the_codec_and_learns(pool: JudgedPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_reward, "STEPS", 3)
    monkeypatch.setattr(train_reward, "TESTED", 20)
    train_reward.train_reward(pool, tmp_path, 0, print)
    torch.manual_seed(0)
    start = build_scorer()
    kept, _ = pool.split(180)
    codec = set_codec(start, kept.images())
    trained = get_reward("pickscore", path=str(tmp_path), scale="probability")
    embeddings = trained.model.vision_model.embeddings
    torch.testing.assert_close(embeddings.patch_embedding.weight, codec)
    assert torch.linalg.matrix_rank(codec.flatten(1)) == train_reward.CODEC_SIZE
    assert not torch.equal(embeddings.class_embedding, start.model.vision_model.embeddings.class_embedding)


def squared_distance(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """From each image to the nearest rendering that satisfies its prompt, ``(B,)``."""
    centre = CELL_SIZE / 2
    kinds = torch.from_numpy(
        np.stack([render([Placed(*k, centre, centre)] if k else [])[:, :CELL_SIZE, :CELL_SIZE] for k in KINDS])
    )
    cells = torch.stack(
        [images[:, :, r * CELL_SIZE : (r + 1) * CELL_SIZE, c * CELL_SIZE : (c + 1) * CELL_SIZE] for r, c in CELLS], 1
    )
    cost = (cells[:, :, None] - kinds).square().sum(dim=(3, 4, 5))
    nearest = []
    for row, prompt in zip(cost, prompts, strict=True):
        scenes = torch.tensor(satisfying_scenes(prompt))
        nearest.append(row.gather(1, scenes.T).sum(dim=0).min())
    return torch.stack(nearest)


def test_following_the_shipped_gradient_leads_towards_the_prompt() -> None:
    """What a reward is for here. A scorer that only ranks well leads pictures away from any that satisfy."""
    rng = random.Random(0)
    prompts = [p for p in balanced_prompts(all_prompts(), 120) if p.family != "position"]
    start = torch.from_numpy(np.stack([render(draw_scene(hard_negative(p, rng), rng)) for p in prompts]))
    demo = load_config(profiles()["tiny"])
    reward, texts = get_reward(**demo.reward), [p.text for p in prompts]
    images = start
    for _ in range(20):
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(x, texts).sum(), x)
        step = 0.5 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
        images = (images + step).clamp(0, 1)
    wrong, moved = squared_distance(start, prompts), squared_distance(images, prompts)
    assert (moved < wrong).float().mean() > 0.7
    assert moved.mean() < 0.8 * wrong.mean()
