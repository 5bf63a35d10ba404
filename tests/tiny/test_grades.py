"""The grades the tiny rewards learn from, against the judge and against brute force."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from leapalign.tiny.grades import KINDS, edits_needed, grade, satisfying_scenes, scene_of
from leapalign.tiny.judge import detect, judge
from leapalign.tiny.judged_pool import corrupt, judge_pictures
from leapalign.tiny.world import (
    CELL_SIZE,
    CELLS,
    Placed,
    all_prompts,
    draw_scene,
    hard_negative,
    prompts_by_text,
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
        ((RED, None, None, BLUE), "a red circle and a blue square", 0),
        ((RED, None, None, None), "a red circle and a blue square", 1),  # missing
        ((RED, RED, None, BLUE), "a red circle and a blue square", 1),  # extra
        ((("circle", "blue"), None, None, ("square", "red")), "a red circle and a blue square", 2),  # swapped
        ((None, None, None, None), "four circles", 4),
        ((RED, BLUE, None, None), "a circle left of a square", 0),
        ((BLUE, RED, None, None), "a circle left of a square", 2),
        ((RED, None, BLUE, None), "a circle left of a square", 2),  # above: one of them has to move
        ((RED, None, BLUE, None), "a circle above a square", 0),
    ],
)
def test_edits(kinds: tuple[tuple[str, str] | None, ...], prompt: str, expected: int) -> None:
    assert edits_needed(scene(*kinds))[0, column(prompt)] == expected


def test_edits_are_the_distance_to_the_nearest_scene_that_satisfies() -> None:
    rng = random.Random(0)
    prompts = all_prompts()
    for _ in range(40):
        number = rng.randrange(len(prompts))
        here = [rng.randrange(len(KINDS)) for _ in CELLS]
        nearest = min(
            sum(a != b for a, b in zip(here, there, strict=True)) for there in satisfying_scenes(prompts[number])
        )
        assert edits_needed(torch.tensor([here]))[0, number] == nearest


def test_no_edit_is_needed_exactly_where_the_judge_agrees() -> None:
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
    assert (pool.own_edits() == 0).tolist() == agreed
    assert 0 < sum(agreed) < len(agreed)


def test_two_things_in_one_cell_are_one_misfit() -> None:
    at = [(4.0, 4.0), (12.0, 12.0)]
    found = detect(render([]))
    assert scene_of(found) == ([0] * 4, 0)
    crowded = type(found)(tuple(Placed("circle", "red", x, y) for x, y in at), unrecognised=1)
    assert scene_of(crowded) == ([KINDS.index(RED), 0, 0, 0], 2)


def test_every_scene_that_satisfies_is_judged_so() -> None:
    prompt = prompts_by_text()["a cross above a square"]
    for kinds in itertools.islice(satisfying_scenes(prompt), 0, None, 7):
        placed = [
            Placed(*KINDS[kind], x=c * CELL_SIZE + CELL_SIZE / 2, y=r * CELL_SIZE + CELL_SIZE / 2)
            for kind, (r, c) in zip(kinds, CELLS, strict=True)
            if KINDS[kind]
        ]
        assert judge(render(placed), prompt).exact


def test_each_edit_halves_the_grade() -> None:
    assert grade(torch.arange(5.0)).tolist() == [1, 0.5, 0.25, 0.125, 0.0625]
