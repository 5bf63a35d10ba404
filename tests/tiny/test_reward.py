"""What the tiny world's reward learns, how it is trained, and whether the shipped one's gradient can be followed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leapalign.config import load_config
from leapalign.config.profiles import profiles
from leapalign.models import load_model
from leapalign.models.flux import FluxModel
from leapalign.rewards import get_reward
from leapalign.rewards.preprocessing import cover
from leapalign.tiny import lessons
from leapalign.tiny.lessons import CLIMB, LONGEST_CLIMB, Climbers, draw_lesson
from leapalign.tiny.nearest import CELL, FALL, SIDE, distances, small_kinds, worth
from leapalign.tiny.scenes import KINDS, satisfying_scenes, scene_pictures, whole_pictures
from leapalign.tiny.train_reward import scores_of, sobolev_errors, train_reward
from leapalign.tiny.world import all_prompts, prompts_by_text

RED, BLUE = KINDS.index(("circle", "red")), KINDS.index(("square", "blue"))
PROMPT = "a red circle and a blue square"


def small(*scene: int) -> Tensor:
    return whole_pictures(small_kinds()[torch.tensor([scene])])


@pytest.fixture(scope="module")
def model() -> FluxModel:
    loaded = load_model(load_config(profiles()["tiny"]).model)
    assert isinstance(loaded, FluxModel)
    return loaded


def test_small_kinds_are_what_a_scorer_sees_of_a_rendered_scene() -> None:
    scene = torch.tensor([[RED, 0, 3, BLUE]])
    # Resizing looks a pixel beyond the edge of a cell.
    torch.testing.assert_close(
        whole_pictures(small_kinds()[scene]), cover(scene_pictures(scene), SIDE), atol=1e-3, rtol=0
    )


def test_a_scene_that_satisfies_is_worth_one_and_others_what_the_nearest_is_away() -> None:
    kinds = small_kinds()
    assert worth(small(RED, 0, 0, BLUE), [PROMPT]).item() == 1
    missing = (kinds[BLUE] - kinds[0]).square().sum()
    torch.testing.assert_close(distances(small(RED, 0, 0, 0), [PROMPT])[0], missing)
    torch.testing.assert_close(worth(small(RED, 0, 0, 0), [PROMPT])[0], torch.exp(-missing / FALL))


def test_distance_is_that_of_the_nearest_of_all_scenes_and_its_gradient_points_there() -> None:
    generator = torch.Generator().manual_seed(0)
    for text in (PROMPT, "two circles", "a circle left of a square"):
        image = torch.rand(1, 3, SIDE, SIDE, generator=generator).requires_grad_()
        scenes = whole_pictures(small_kinds()[satisfying_scenes(prompts_by_text()[text])])
        every = (scenes - image).square().sum(dim=(1, 2, 3))
        (gradient,) = torch.autograd.grad(distances(image, [text]).sum(), image)
        torch.testing.assert_close(distances(image, [text])[0], every.min())
        torch.testing.assert_close(gradient, 2 * (image - scenes[every.argmin()]).detach())


def test_sobolev_errors_vanish_for_worth_itself_and_not_for_its_half() -> None:
    generator = torch.Generator().manual_seed(0)
    images, prompts = draw_lesson(8, random.Random(0), generator)
    value, gradient, cosine = sobolev_errors(worth, images, prompts)
    assert (value.item(), gradient.item()) == (0, 0)
    assert cosine.item() == pytest.approx(1)
    value, gradient, cosine = sobolev_errors(lambda x, p: worth(x, p) / 2, images, prompts)
    torch.testing.assert_close(value, (worth(images, prompts) / 2).square().mean())
    assert gradient.item() == pytest.approx(0.25)
    assert cosine.item() == pytest.approx(1)


def test_a_lesson_without_stain_and_ways_is_of_scenes_and_a_way_changes_one_cell() -> None:
    def cells(images: Tensor) -> Tensor:
        return images.unfold(2, CELL, CELL).unfold(3, CELL, CELL).flatten(2, 3).transpose(1, 2)

    def draw(between: float) -> Tensor:
        return draw_lesson(32, random.Random(0), torch.Generator().manual_seed(0), stain=0.0, between=between)[0]

    def far_from_any(images: Tensor) -> Tensor:
        return (cells(images)[:, :, None] - small_kinds()).square().sum(dim=(3, 4, 5)).amin(dim=2) > 1e-6

    assert not far_from_any(draw(0.0)).any()
    between = far_from_any(draw(1.0))
    assert between.sum(dim=1).max() == 1
    assert between.any(dim=1).float().mean() > 0.5


def test_stains_change_every_picture_by_about_their_size() -> None:
    clean = torch.full((64, 3, SIDE, SIDE), 0.5)
    change = lessons.stained(clean, 0.12, torch.Generator().manual_seed(0)) - clean
    assert 0.03 < change.std() < 0.2
    assert change.flatten(1).std(dim=1).min() > 0.005
    assert torch.equal(lessons.stained(clean, 0.0, torch.Generator()), clean)


def test_climbers_go_uphill_by_steps_of_one_length_and_begin_anew(model: FluxModel) -> None:
    climbers = Climbers(model, 4, random.Random(0))

    def brighter(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    before, steps = climbers._latents.clone(), list(climbers._steps)
    was, prompts = climbers.step(4, brighter)
    assert (was.shape, len(prompts)) == ((4, 3, 64, 64), 4)
    moved = (climbers._latents - before).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, torch.full((4,), CLIMB))
    assert climbers._steps == [step + 1 for step in steps]
    higher = brighter(model.decode(climbers._latents).clamp(0, 1), []) - brighter(model.decode(before).clamp(0, 1), [])
    assert higher.sum() > 0
    climbers._steps = [LONGEST_CLIMB] * 4
    climbers.step(4, brighter)
    assert climbers._steps == [0] * 4


def test_training_learns_and_saves_what_it_scored(model: FluxModel, tmp_path: Path) -> None:
    lines: list[str] = []
    train_reward(model, tmp_path / "a", 0, lines.append, climbed=4, steps=2)
    train_reward(model, tmp_path / "b", 0, lines.append, climbed=4, steps=3)
    first, second = (get_reward("pickscore", path=str(tmp_path / name), scale="probability") for name in "ab")
    images, prompts = draw_lesson(4, random.Random(1), torch.Generator().manual_seed(1))
    assert not torch.allclose(first(images, prompts), second(images, prompts))
    bias = torch.tensor(second.model.config.logit_bias)
    torch.testing.assert_close(second(images, prompts), scores_of(second, bias, images, prompts))


def test_following_the_shipped_gradient_leads_towards_the_prompt() -> None:
    """What a reward is for here. A scorer that only ranks well leads pictures away from any that satisfy."""
    reward = get_reward(**{**load_config(profiles()["tiny"]).reward, "scale": "probability"})
    images, prompts = draw_lesson(240, random.Random(5), torch.Generator().manual_seed(5))
    x = images.clone().requires_grad_()
    (taught,) = torch.autograd.grad(reward(x, prompts).sum(), x)
    y = images.clone().requires_grad_()
    (true,) = torch.autograd.grad(worth(y, prompts).sum(), y)
    cosine = F.cosine_similarity(*(F.avg_pool2d(one, 2).flatten(1) for one in (taught, true)))
    assert cosine.mean() > 0.6
    error = (reward(images, prompts) - worth(images, prompts)).square().mean().sqrt()
    assert error < 0.12
    assert len(all_prompts()) > len(set(prompts)) > 60
