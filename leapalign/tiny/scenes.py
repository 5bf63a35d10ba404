"""Scenes as numbers: what each cell of the grid holds, and which scenes satisfy a prompt."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

from leapalign.tiny.judge import Detection
from leapalign.tiny.world import CELL_SIZE, CELLS, COLORS, SHAPES, Placed, Prompt, all_prompts, relation_holds, render

# What a cell can hold. A scene is four of these numbers, one a cell.
KINDS = (None, *itertools.product(SHAPES, COLORS))
# (x, y) in pixels.
CELL_CENTRES = tuple(((column + 0.5) * CELL_SIZE, (row + 0.5) * CELL_SIZE) for row, column in CELLS)


def scene_of(found: Detection) -> tuple[list[int], int]:
    """The kind in each cell, and the number of things that fit in none."""
    scene, misfits = [0] * len(CELLS), found.unrecognised
    for item in found.objects:
        cell = CELLS.index((int(item.y // CELL_SIZE), int(item.x // CELL_SIZE)))
        misfits += scene[cell] != 0
        scene[cell] = KINDS.index((item.shape, item.color))
    return scene, misfits


@functools.cache
def kind_pictures() -> Tensor:
    """``(K, 3, CELL_SIZE, CELL_SIZE)`` in [0, 1]: a cell with each of ``KINDS`` in it."""
    x, y = CELL_CENTRES[0]
    pictures = [render([Placed(*kind, x, y)] if kind else []) for kind in KINDS]
    return torch.from_numpy(np.stack(pictures))[..., :CELL_SIZE, :CELL_SIZE].contiguous()


def whole_pictures(cells: Tensor) -> Tensor:
    """Pictures of the four cells, ``(N, 4, 3, S, S)``, put together: ``(N, 3, 2S, 2S)``."""
    rows = [torch.cat([cells[:, row], cells[:, row + 1]], dim=-1) for row in (0, 2)]
    return torch.cat(rows, dim=-2)


def scene_pictures(scenes: Tensor) -> Tensor:
    """``scenes (N, 4)`` as `render` draws them, ``(N, 3, H, W)`` in [0, 1]."""
    return whole_pictures(kind_pictures()[scenes])


@functools.cache
def satisfying_scenes(prompt: Prompt) -> Tensor:
    """Every scene that ``prompt`` asks for, ``(N, 4)`` int64: nothing missing, nothing extra."""
    fitting = [
        [n for n, kind in enumerate(KINDS) if kind and kind[0] == thing.shape and thing.color in (None, kind[1])]
        for thing in prompt.things
    ]
    scenes = set()
    for cells in itertools.permutations(range(len(CELLS)), len(prompt.things)):
        if prompt.relation:
            first, second = (Placed("", "", *CELL_CENTRES[cell]) for cell in cells)
            if not relation_holds(prompt.relation, first, second):
                continue
        for kinds in itertools.product(*fitting):
            scene = [0] * len(CELLS)
            for cell, kind in zip(cells, kinds, strict=True):
                scene[cell] = kind
            scenes.add(tuple(scene))
    return torch.tensor(sorted(scenes))


@functools.cache
def _satisfaction_table() -> Tensor:
    """``(scenes, prompts)`` bool, scenes numbered in base ``len(KINDS)``."""
    columns = []
    for prompt in all_prompts():
        column = torch.zeros((len(KINDS),) * len(CELLS), dtype=torch.bool)
        column[tuple(satisfying_scenes(prompt).T)] = True
        columns.append(column.flatten())
    return torch.stack(columns, dim=1)


def satisfied(scenes: Tensor) -> Tensor:
    """``(N, P)`` bool: whether each scene ``(N, 4)`` satisfies each of `all_prompts`."""
    place = torch.tensor([len(KINDS) ** power for power in reversed(range(len(CELLS)))])
    return _satisfaction_table()[(scenes * place).sum(dim=-1)]
