"""How far a picture is from a prompt: the least number of objects that would have to change."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

from leapalign.tiny.judge import Detection
from leapalign.tiny.world import CELL_SIZE, CELLS, COLORS, SHAPES, Placed, Prompt, all_prompts, relation_holds

# What a cell can hold. A scene is four of these numbers, one a cell.
KINDS = (None, *itertools.product(SHAPES, COLORS))
MOST_EDITS = len(CELLS)


def scene_of(found: Detection) -> tuple[list[int], int]:
    """The kind in each cell, and the number of things that fit in none."""
    scene, misfits = [0] * len(CELLS), found.unrecognised
    for item in found.objects:
        cell = CELLS.index((int(item.y // CELL_SIZE), int(item.x // CELL_SIZE)))
        misfits += scene[cell] != 0
        scene[cell] = KINDS.index((item.shape, item.color))
    return scene, misfits


def satisfying_scenes(prompt: Prompt) -> list[tuple[int, ...]]:
    """Every scene that ``prompt`` asks for: nothing missing, nothing extra."""
    fitting = [
        [n for n, kind in enumerate(KINDS) if kind and kind[0] == thing.shape and thing.color in (None, kind[1])]
        for thing in prompt.things
    ]
    scenes = []
    for cells in itertools.permutations(range(len(CELLS)), len(prompt.things)):
        if prompt.relation:
            first, second = (Placed("", "", x=CELLS[c][1] * CELL_SIZE, y=CELLS[c][0] * CELL_SIZE) for c in cells)
            if not relation_holds(prompt.relation, first, second):
                continue
        for kinds in itertools.product(*fitting):
            scene = [0] * len(CELLS)
            for cell, kind in zip(cells, kinds, strict=True):
                scene[cell] = kind
            scenes.append(tuple(scene))
    return scenes


@functools.cache
def _edit_table() -> Tensor:
    """``(scenes, prompts)`` uint8, scenes numbered in base ``len(KINDS)``."""
    columns = []
    for prompt in all_prompts():
        edits = np.full((len(KINDS),) * len(CELLS), MOST_EDITS, dtype=np.uint8)
        edits[tuple(np.array(satisfying_scenes(prompt)).T)] = 0
        for axis in range(len(CELLS)):  # changing one cell costs one
            edits = np.minimum(edits, edits.min(axis=axis, keepdims=True) + 1)
        columns.append(edits.reshape(-1))
    return torch.from_numpy(np.stack(columns, axis=1))


def edits_needed(scenes: Tensor) -> Tensor:
    """``(N, P)`` float32: cells of each scene ``(N, 4)`` to change until it satisfies each of `all_prompts`."""
    place = torch.tensor([len(KINDS) ** power for power in reversed(range(len(CELLS)))])
    return _edit_table()[(scenes * place).sum(dim=-1)].float()


def grade(edits: Tensor) -> Tensor:
    """1 for a picture that satisfies its prompt; every object that would have to change halves it."""
    return torch.exp2(-edits)
