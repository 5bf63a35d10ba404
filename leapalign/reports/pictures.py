"""Pictures for people: captioned image grids and the learning curve."""

from __future__ import annotations

from collections.abc import Sequence
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
    before: Tensor, after: Tensor, captions: Sequence[str], verdicts: Sequence[tuple[bool, bool]], side: int = 112
) -> Image.Image:
    """Pairs side by side, before left and after right, framed green where the judge agrees and red where not.

    before, after: ``(N, 3, H, W)``; verdicts: ``(before, after)`` per image.
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


def learning_curve(records: Sequence[dict[str, float]], path: Path) -> None:
    """Reward, loss, gradient norm and leap distances over the iterations of ``records``, as a PNG at ``path``."""
    panels = (("reward",), ("loss",), ("grad_norm",), ("d_j", "d_end"))
    shown = [[name for name in names if name in records[0]] for names in panels]
    shown = [names for names in shown if names]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.4 * len(shown), 2.8), layout="constrained")
    steps = [record["iteration"] for record in records]
    for axis, names in zip(axes, shown, strict=True):
        for name in names:
            axis.plot(steps, [record[name] for record in records], label=name, linewidth=1.4)
        axis.set_title(", ".join(names), fontsize=10)
        axis.set_xlabel("iteration", fontsize=9)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
