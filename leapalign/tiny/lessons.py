"""What the tiny reward learns from: graded pictures, and pictures on the way from one to another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from leapalign.tiny.grades import edits_needed, grade
from leapalign.tiny.judged_pool import JudgedPool
from leapalign.tiny.world import CELL_SIZE, CELLS

FADED, WHOLE = 72, 40  # pairs of pictures that differ in one cell, and pictures as they are, in a lesson


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
