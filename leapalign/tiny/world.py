"""A world small enough for a laptop CPU: coloured shapes on a 2x2 grid, and captions about them.

Captions come in the six families of GenEval (single object, two objects, counting, colors, position, color
attribution). A scene is at most one object per cell of the grid; it is rendered to a 64x64 RGB image whose
objects are 24 pixels wide, each in the middle of its cell.
"""

from __future__ import annotations

import functools
import itertools
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

IMAGE_SIZE = 64
CELL_SIZE = 32
OBJECT_SIZE = 24
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (row, column)
BACKGROUND = (0.94, 0.94, 0.92)
COLORS = {
    "red": (0.86, 0.15, 0.15),
    "green": (0.13, 0.62, 0.28),
    "blue": (0.16, 0.33, 0.85),
    "yellow": (0.96, 0.77, 0.10),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
FAMILIES = ("single", "two", "counting", "colors", "position", "attribute")

# This share of each family is kept for evaluation: no alignment run sees it. The reward models know all prompts.
HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class Thing:
    """An object as a caption names it: ``color`` is None where the caption leaves it open."""

    shape: str
    color: str | None = None

    @property
    def text(self) -> str:
        return f"a {self.color} {self.shape}" if self.color else f"a {self.shape}"


@dataclass(frozen=True)
class Placed:
    """An object in an image: its centre is in pixels, x to the right and y downwards."""

    shape: str
    color: str
    x: float
    y: float


@dataclass(frozen=True)
class Prompt:
    """What a caption asks for. ``relation`` (position family only) reads ``things[0] relation things[1]``."""

    family: str
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        if self.family == "counting":
            return f"{NUMBERS[len(self.things)]} {PLURALS[self.things[0].shape]}"
        joint = f" {self.relation} " if self.relation else " and "
        return joint.join(thing.text for thing in self.things)


def all_prompts() -> list[Prompt]:
    """Every prompt of the world, family by family."""
    shape_pairs = list(itertools.permutations(SHAPES, 2))
    color_pairs = list(itertools.permutations(COLORS, 2))
    prompts = [Prompt("single", (Thing(s),)) for s in SHAPES]
    prompts += [Prompt("two", (Thing(a), Thing(b))) for a, b in shape_pairs]
    prompts += [Prompt("counting", (Thing(s),) * n) for n in NUMBERS for s in SHAPES]
    prompts += [Prompt("colors", (Thing(s, c),)) for c in COLORS for s in SHAPES]
    prompts += [Prompt("position", (Thing(a), Thing(b)), r) for r in OPPOSITE for a, b in shape_pairs]
    prompts += [Prompt("attribute", (Thing(a, c), Thing(b, d))) for a, b in shape_pairs for c, d in color_pairs]
    return prompts


@functools.cache
def split_prompts() -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """``(training, held_out)`` prompts: a fixed share of each family, chosen by a hash of the text."""
    training: list[Prompt] = []
    held_out: list[Prompt] = []
    for family in FAMILIES:
        members = [p for p in all_prompts() if p.family == family]
        members.sort(key=lambda p: zlib.crc32(p.text.encode()))
        cut = max(1, round(HELD_OUT_SHARE * len(members)))
        held_out += members[:cut]
        training += members[cut:]
    return tuple(training), tuple(held_out)


def training_prompts() -> list[Prompt]:
    """The training side of `split_prompts`, small families repeated until each is as large as the largest."""
    training, _ = split_prompts()
    largest = max(sum(prompt.family == family for prompt in training) for family in FAMILIES)
    return balanced_prompts(training, len(FAMILIES) * largest)


def watched_prompts() -> list[Prompt]:
    """Up to four held-out prompts of each family, for the watch."""
    _, held_out = split_prompts()
    return [prompt for family in FAMILIES for prompt in [p for p in held_out if p.family == family][:4]]


@functools.cache
def prompts_by_text() -> dict[str, Prompt]:
    return {prompt.text: prompt for prompt in all_prompts()}


def draw_prompts(pool: Sequence[Prompt], count: int, rng: random.Random) -> list[Prompt]:
    """``count`` prompts with families drawn evenly, then a prompt within the family."""
    groups = [[p for p in pool if p.family == family] for family in FAMILIES]
    return [rng.choice(groups[rng.randrange(len(FAMILIES))]) for _ in range(count)]


def balanced_prompts(pool: Sequence[Prompt], count: int) -> list[Prompt]:
    """``count`` prompts cycling through the families and, within each, through its prompts."""
    groups = [itertools.cycle([p for p in pool if p.family == family]) for family in FAMILIES]
    return [next(groups[i % len(FAMILIES)]) for i in range(count)]


def hard_negative(prompt: Prompt, rng: random.Random) -> Prompt:
    """A prompt that differs from ``prompt`` in the one thing its family is about."""
    things = list(prompt.things)
    if prompt.family == "counting":
        count = rng.choice([n for n in (1, *NUMBERS) if abs(n - len(things)) == 1])
        return Prompt("counting" if count > 1 else "single", (things[0],) * count)
    if prompt.family == "position":
        assert prompt.relation is not None
        return replace(prompt, relation=OPPOSITE[prompt.relation])
    index = rng.randrange(len(things))
    if prompt.family == "attribute" and rng.random() < 0.5:
        a, b = things
        return replace(prompt, things=(Thing(a.shape, b.color), Thing(b.shape, a.color)))
    taken = {thing.color for thing in things} if prompt.family in ("colors", "attribute") else None
    if taken is not None:
        color = rng.choice([c for c in COLORS if c not in taken])
        things[index] = Thing(things[index].shape, color)
    else:
        shape = rng.choice([s for s in SHAPES if s not in {thing.shape for thing in things}])
        things[index] = Thing(shape, things[index].color)
    return replace(prompt, things=tuple(things))


def relation_holds(relation: str, a: Placed, b: Placed, margin: float = CELL_SIZE / 4) -> bool:
    """Whether ``a relation b``; centres must differ by more than ``margin`` pixels along the axis."""
    offset = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return offset[relation] > margin


def draw_scene(prompt: Prompt, rng: random.Random) -> list[Placed]:
    """A scene that satisfies ``prompt`` exactly, uniform over placements and over colours left open."""
    while True:
        cells = rng.sample(CELLS, len(prompt.things))
        scene = [
            Placed(
                thing.shape,
                thing.color or rng.choice(list(COLORS)),
                x=column * CELL_SIZE + CELL_SIZE / 2,
                y=row * CELL_SIZE + CELL_SIZE / 2,
            )
            for thing, (row, column) in zip(prompt.things, cells, strict=True)
        ]
        if prompt.relation is None or relation_holds(prompt.relation, scene[0], scene[1]):
            return scene


@functools.cache
def shape_mask(shape: str) -> np.ndarray:
    """Antialiased coverage of ``shape`` in its own cell, ``(CELL_SIZE, CELL_SIZE)`` float32 in [0, 1]."""
    fine = 8
    grid = (np.arange(CELL_SIZE * fine) + 0.5) / fine - CELL_SIZE / 2
    y, x = np.meshgrid(grid, grid, indexing="ij")
    half, inset, bar = OBJECT_SIZE / 2, OBJECT_SIZE / 12, OBJECT_SIZE / 6
    inside = {
        "circle": x**2 + y**2 <= half**2,
        "square": (abs(x) <= half - inset) & (abs(y) <= half - inset),
        "triangle": (abs(y) <= half) & (abs(x) <= (y + half) / 2),
        "cross": ((abs(x) <= bar) & (abs(y) <= half)) | ((abs(y) <= bar) & (abs(x) <= half)),
    }[shape]
    coverage = inside.reshape(CELL_SIZE, fine, CELL_SIZE, fine).mean(axis=(1, 3))
    return coverage.astype(np.float32)


def render(scene: Sequence[Placed]) -> np.ndarray:
    """The scene as ``(3, IMAGE_SIZE, IMAGE_SIZE)`` float32 RGB in [0, 1]."""
    image = np.empty((3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    image[:] = np.asarray(BACKGROUND, dtype=np.float32)[:, None, None]
    for item in scene:
        top, left = round(item.y - CELL_SIZE / 2), round(item.x - CELL_SIZE / 2)
        window = image[:, top : top + CELL_SIZE, left : left + CELL_SIZE]
        coverage = shape_mask(item.shape)
        color = np.asarray(COLORS[item.color], dtype=np.float32)[:, None, None]
        window[:] = (1 - coverage) * window + coverage * color
    return image
