"""Pictures for people: captioned image grids and the learning curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MARGIN = 8
CAPTION_HEIGHT = 30


def to_picture(image: Tensor, side: int) -> Image.Image:
    """``image (3, H, W)`` in [0, 1] as a picture ``side`` pixels wide; small ones keep their pixels visible."""
    values = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(values)
    height = round(side * picture.height / picture.width)
    enlarging = side > picture.width
    return picture.resize((side, height), Image.Resampling.NEAREST if enlarging else Image.Resampling.LANCZOS)


def image_grid(images: Tensor, captions: Sequence[str], columns: int = 6, side: int = 144) -> Image.Image:
    """``images (N, 3, H, W)`` with a caption under each."""
    font = ImageFont.load_default(11)
    height = round(side * images.shape[-2] / images.shape[-1]) + CAPTION_HEIGHT
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, columns)
        left, top = MARGIN + column * (side + MARGIN), MARGIN + row * (height + MARGIN)
        picture = to_picture(image, side)
        sheet.paste(picture, (left, top))
        draw.multiline_text((left, top + picture.height + 2), _wrapped(caption, side, font), "black", font, spacing=1)
    return sheet


def _wrapped(caption: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """``caption`` broken into at most two lines of ``width`` pixels."""
    lines = [""]
    for word in caption.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = candidate
    return "\n".join(lines[:2])


def before_after_grid(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    captions: Sequence[str],
    verdicts: Sequence[tuple[bool, bool]],
    side: int = 128,
) -> Image.Image:
    """Pairs side by side, before left and after right, framed green where the judge agrees and red where not.

    before, after: N images ``(3, H, W)``; verdicts: ``(before, after)`` per image.
    """
    font = ImageFont.load_default(12)
    columns, frame = 3, 4
    width = 2 * (side + 2 * frame) + 6
    height = side + 2 * frame + 20
    rows = -(-len(before) // columns)
    sheet = Image.new("RGB", (columns * (width + 16) + 16, rows * (height + 10) + 34), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((16, 8), "left: before, right: after; green frame: exactly what the prompt asks for", "black", font)
    for number, caption in enumerate(captions):
        row, column = divmod(number, columns)
        left, top = 16 + column * (width + 16), 34 + row * (height + 10)
        for place, (image, passed) in enumerate(zip((before[number], after[number]), verdicts[number], strict=True)):
            x = left + place * (side + 2 * frame + 6)
            color = "#2e9e4f" if passed else "#d43d3d"
            draw.rectangle((x, top, x + side + 2 * frame - 1, top + side + 2 * frame - 1), color)
            sheet.paste(to_picture(image, side), (x + frame, top + frame))
        draw.text((left, top + side + 2 * frame + 3), caption, "black", font)
    return sheet


@dataclass(frozen=True)
class Curve:
    """A line of a `chart`: ``values[i]`` at ``steps[i]``; raw ones are shown faintly behind their smoothed course."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    raw: bool = True


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Centred means over ``window`` values, fewer at the ends."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def chart(curves: Sequence[Curve], path: Path, axis_label: str = "iteration", dark: bool = False) -> None:
    """Draws ``curves`` as a PNG at ``path``, with a transparent ground for a light page or a ``dark`` one."""
    with plt.style.context("dark_background" if dark else "default"):
        figure, axis = plt.subplots(figsize=(4.6, 2.8), layout="constrained")
        for curve in curves:
            values = smoothed(curve.values, max(1, len(curve.values) // 8)) if curve.raw else curve.values
            marker = None if curve.raw else "o"
            (line,) = axis.plot(curve.steps, values, label=curve.label, linewidth=1.8, marker=marker, markersize=4)
            if curve.raw:
                axis.plot(curve.steps, curve.values, color=line.get_color(), alpha=0.3, linewidth=0.8)
        axis.set_xlabel(axis_label, fontsize=9)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9)
        figure.savefig(path, dpi=150, transparent=True)
        plt.close(figure)
