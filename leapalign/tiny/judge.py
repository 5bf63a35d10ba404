"""An exact, rule-based judge of tiny-world images: what is in the picture, and is it what the prompt asked for.

Two verdicts are given side by side. *Exact*: nothing missing, nothing extra, every blob recognised (merged blobs
are not). *Lenient*: GenEval's rule, which asks only that the objects named are there. Beside them stands how far the
picture is from a tidy drawing of what it holds: what stripes, stains and speckles cost.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from leapalign.tiny.world import (
    BACKGROUND,
    CELL_SIZE,
    COLORS,
    SHAPES,
    Placed,
    Prompt,
    Thing,
    relation_holds,
    render,
    shape_mask,
)

FOREGROUND_DISTANCE = 0.35  # RGB distance from the background above which a pixel belongs to an object
SPECK_AREA = 24  # pixels; smaller blobs are dust, not objects
MIN_OVERLAP = 0.75  # intersection over union with the best shape template, shifted by at most SHIFT pixels
SHIFT = 2
TEMPLATE_COVERAGE = 0.4  # a template pixel counts as covered above this, as FOREGROUND_DISTANCE sees it
MIN_COLOR_SHARE = 0.75  # of a blob's pixels must be nearest to one palette colour
MAX_COLOR_DISTANCE = 0.35  # mean RGB distance from that colour


@dataclass(frozen=True)
class Detection:
    """What an image holds: recognised objects, and the number of blobs that are no object of this world."""

    objects: tuple[Placed, ...]
    unrecognised: int


@dataclass(frozen=True)
class Verdict:
    """``exact``: nothing missing, nothing extra. ``lenient``: GenEval's rule. ``clean``: all blobs recognised."""

    exact: bool
    lenient: bool
    clean: bool


@functools.cache
def _templates() -> tuple[np.ndarray, tuple[str, ...]]:
    """Every shape at every shift of up to ``SHIFT`` pixels, ``(N, CELL_SIZE, CELL_SIZE)`` bool, and the N names."""
    masks, names = [], []
    for shape in SHAPES:
        mask = shape_mask(shape) > TEMPLATE_COVERAGE
        for shift in itertools.product(range(-SHIFT, SHIFT + 1), repeat=2):
            masks.append(np.roll(mask, shift, axis=(0, 1)))
            names.append(shape)
    return np.stack(masks), tuple(names)


def _classify_shape(mask: np.ndarray) -> str | None:
    """``mask (h, w)``: one blob in its bounding box. None where no template fits."""
    height, width = mask.shape
    if height > CELL_SIZE or width > CELL_SIZE:
        return None
    window = np.zeros((CELL_SIZE, CELL_SIZE), dtype=bool)
    top, left = (CELL_SIZE - height) // 2, (CELL_SIZE - width) // 2
    window[top : top + height, left : left + width] = mask
    templates, names = _templates()
    overlap = (window & templates).sum(axis=(1, 2)) / (window | templates).sum(axis=(1, 2))
    best = int(overlap.argmax())
    return names[best] if overlap[best] >= MIN_OVERLAP else None


def _classify_color(image: np.ndarray, mask: np.ndarray) -> str | None:
    """``image (3, h, w)``, ``mask (h, w)``: the blob without its blended rim. None for no palette colour."""
    core = ndimage.binary_erosion(mask, border_value=1)
    pixels = image[:, core if core.any() else mask].T
    palette = np.asarray(list(COLORS.values()))
    distance = np.linalg.norm(pixels[:, None] - palette[None], axis=-1)
    nearest = distance.argmin(axis=1)
    index = int(np.bincount(nearest, minlength=len(palette)).argmax())
    share = (nearest == index).mean()
    if share < MIN_COLOR_SHARE or distance[nearest == index, index].mean() > MAX_COLOR_DISTANCE:
        return None
    return list(COLORS)[index]


def detect(image: np.ndarray) -> Detection:
    """Objects in ``image (3, H, W)`` float RGB in [0, 1]."""
    background = np.asarray(BACKGROUND)[:, None, None]
    foreground = np.linalg.norm(image - background, axis=0) > FOREGROUND_DISTANCE
    labels, _ = ndimage.label(foreground)
    objects, unrecognised = [], 0
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[box] == index
        if mask.sum() < SPECK_AREA:
            continue
        shape = _classify_shape(mask)
        color = _classify_color(image[(slice(None), *box)], mask)
        if shape is None or color is None:
            unrecognised += 1
            continue
        rows, columns = box
        objects.append(Placed(shape, color, (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2))
    return Detection(tuple(objects), unrecognised)


def _matches(thing: Thing, item: Placed) -> bool:
    return thing.shape == item.shape and thing.color in (None, item.color)


def _asked_for(prompt: Prompt, objects: tuple[Placed, ...]) -> bool:
    """GenEval's rule: the objects named are there; a count must be exact for the shape counted."""
    if prompt.family == "counting":
        return sum(_matches(prompt.things[0], item) for item in objects) == len(prompt.things)
    candidates = [[item for item in objects if _matches(thing, item)] for thing in prompt.things]
    if prompt.relation is not None:
        return any(relation_holds(prompt.relation, a, b) for a in candidates[0] for b in candidates[1])
    return all(candidates)


def verdict(found: Detection, prompt: Prompt) -> Verdict:
    """The verdict on an image whose contents are known."""
    lenient = _asked_for(prompt, found.objects)
    clean = found.unrecognised == 0
    exact = lenient and clean and len(found.objects) == len(prompt.things)
    return Verdict(exact=exact, lenient=lenient, clean=clean)


def untidiness(image: np.ndarray, found: Detection) -> float:
    """Mean absolute difference between ``image (3, H, W)`` in [0, 1] and `render` of what was ``found`` in it, each
    object in the middle of its cell. 0 for a rendered scene."""
    middle = [
        replace(item, x=(item.x // CELL_SIZE + 0.5) * CELL_SIZE, y=(item.y // CELL_SIZE + 0.5) * CELL_SIZE)
        for item in found.objects
    ]
    return float(np.abs(image - render(middle)).mean())


def judge(image: np.ndarray, prompt: Prompt) -> Verdict:
    """The verdict on ``image (3, H, W)`` float RGB in [0, 1] for ``prompt``."""
    return verdict(detect(image), prompt)
