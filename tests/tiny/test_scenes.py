"""Scenes as numbers, against the judge and the renderer."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from leapalign.tiny.judge import detect, judge
from leapalign.tiny.judged_pool import corrupt, judge_pictures
from leapalign.tiny.scenes import (
    CELL_CENTRES,
    KINDS,
    satisfied,
    satisfying_scenes,
    scene_of,
    scene_pictures,
)
from leapalign.tiny.world import (
    Placed,
    Prompt,
    all_prompts,
    balanced_prompts,
    draw_scene,
    hard_negative,
    render,
)


def column(prompt: str) -> int:
    return [each.text for each in all_prompts()].index(prompt)


def scene(*kinds: tuple[str, str] | None) -> torch.Tensor:
    return torch.tensor([[KINDS.index(kind) for kind in kinds]])


RED, BLUE = ("circle", "red"), ("square", "blue")


@pytest.mark.parametrize(
    ("kinds", "prompt", "expected"),
    [
        ((RED, None, None, BLUE), "a red circle and a blue square", True),
        ((RED, None, None, None), "a red circle and a blue square", False),  # missing
        ((RED, RED, None, BLUE), "a red circle and a blue square", False),  # extra
        ((("circle", "blue"), None, None, ("square", "red")), "a red circle and a blue square", False),  # swapped
        ((None, None, None, None), "four circles", False),
        ((RED, BLUE, None, None), "a circle left of a square", True),
        ((BLUE, RED, None, None), "a circle left of a square", False),
        ((RED, None, BLUE, None), "a circle left of a square", False),  # above
        ((RED, None, BLUE, None), "a circle above a square", True),
    ],
)
def test_which_scenes_satisfy(kinds: tuple[tuple[str, str] | None, ...], prompt: str, expected: bool) -> None:
    assert satisfied(scene(*kinds))[0, column(prompt)] == expected


@pytest.mark.parametrize("prompt", balanced_prompts(all_prompts(), 12), ids=lambda prompt: prompt.text)
def test_every_scene_that_satisfies_is_drawn_and_judged_so(prompt: Prompt) -> None:
    scenes = satisfying_scenes(prompt)[::7]
    for kinds, picture in zip(scenes.tolist(), scene_pictures(scenes), strict=True):
        placed = [Placed(*KINDS[kind], *at) for kind, at in zip(kinds, CELL_CENTRES, strict=True) if KINDS[kind]]
        assert np.array_equal(picture.numpy(), render(placed))
        assert judge(picture.numpy(), prompt).exact
        assert scene_of(detect(picture.numpy())) == (kinds, 0)


def test_a_pool_is_satisfied_exactly_where_the_judge_agrees() -> None:
    rng, noise = random.Random(1), np.random.default_rng(1)
    prompts = all_prompts()
    numbers = rng.sample(range(len(prompts)), 60)
    pictures = []
    for number in numbers:
        shown = prompts[number] if rng.random() < 0.5 else hard_negative(prompts[number], rng)
        picture = render(draw_scene(shown, rng))
        pictures.append(corrupt(picture, noise) if rng.random() < 0.3 else picture)
    stored = np.stack([np.round(picture * 255).astype(np.uint8) for picture in pictures])
    pool = judge_pictures(stored, torch.tensor(numbers))
    agreed = [
        judge(picture.astype(np.float32) / 255, prompts[n]).exact for picture, n in zip(stored, numbers, strict=True)
    ]
    assert pool.own_satisfied().tolist() == agreed
    assert 0 < sum(agreed) < len(agreed)


def test_two_things_in_one_cell_are_one_misfit() -> None:
    at = [(8.0, 8.0), (24.0, 24.0)]
    found = detect(render([]))
    assert scene_of(found) == ([0] * 4, 0)
    crowded = type(found)(tuple(Placed("circle", "red", x, y) for x, y in at), unrecognised=1)
    assert scene_of(crowded) == ([KINDS.index(RED), 0, 0, 0], 2)
