"""What arms draw for the same prompts from the same noise, side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from leapalign.reports.pictures import to_picture
from leapalign.tiny.world import FAMILIES

STRIPS = Path(__file__).parents[1] / "results" / "study_pictures"
BASE = "before training"
COUNT, SIDE, LABEL, GAP, HEAD = 12, 64, 230, 4, 20
"""Images of an arm, two of each family of prompts; pixels."""


def save_strip(images: Tensor, arm: str) -> None:
    """Keep the first of ``images (N, 3, H, W)``, as a row."""
    row = Image.new("RGB", (COUNT * (SIDE + GAP) - GAP, SIDE), "white")
    for number, image in enumerate(images[:COUNT]):
        row.paste(to_picture(image, SIDE), (number * (SIDE + GAP), 0))
    STRIPS.mkdir(parents=True, exist_ok=True)
    row.save(_strip(arm))


def rows(arms: Iterable[str]) -> Image.Image:
    """The kept rows of ``arms``, under each other, with their names; a column is of one prompt."""
    strips = {arm: Image.open(_strip(arm)) for arm in arms if _strip(arm).exists()}
    width = LABEL + COUNT * (SIDE + GAP)
    sheet = Image.new("RGB", (width, HEAD + len(strips) * (SIDE + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number in range(COUNT):
        draw.text((LABEL + number * (SIDE + GAP), GAP), FAMILIES[number % len(FAMILIES)], "black", font)
    for number, (arm, strip) in enumerate(strips.items()):
        top = HEAD + number * (SIDE + GAP)
        draw.text((GAP, top + SIDE // 2 - 6), arm, "black", font)
        sheet.paste(strip, (LABEL, top))
    return sheet


def _strip(arm: str) -> Path:
    return STRIPS / f"{re.sub('[^a-z0-9.]+', '_', arm)}.png"
