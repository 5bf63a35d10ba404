"""What people look at: tables, pages, pictures, intervals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from leapalign.evaluation.statistics import mean_interval, share_interval
from leapalign.reports.pages import table, text_table, write_page
from leapalign.reports.pictures import before_after_grid, image_grid, learning_curve, to_picture


def test_prompts_cannot_inject_markup(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    write_page(tmp_path / "index.html", evil, [(evil, table((evil,), [[evil]]))])
    text = (tmp_path / "index.html").read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 5


def test_text_table_aligns() -> None:
    assert text_table(("", "a"), [["long name", "1"], ["b", "22"]]).splitlines() == [
        "            a",
        "-------------",
        "long name   1",
        "b          22",
    ]


def test_grids_hold_every_image() -> None:
    images = torch.rand(7, 3, 8, 8)
    captions = ["a caption of several words that must wrap somewhere"] * 7
    assert image_grid(images, captions, columns=3, side=32).size == (3 * 40 + 8, 3 * (32 + 30 + 8) + 8)
    sheet = before_after_grid(images, images, captions, [(True, False)] * 7)
    assert sheet.getpixel((17, 40)) == (46, 158, 79), "the first frame is green"


def test_small_images_keep_their_pixels() -> None:
    picture = to_picture(torch.tensor([[[0.0, 1.0]]] * 3), side=8)
    assert [picture.getpixel((x, 0)) for x in (0, 3, 4, 7)] == [(0, 0, 0)] * 2 + [(255, 255, 255)] * 2


def test_learning_curve_is_drawn(tmp_path: Path) -> None:
    records = [{"iteration": i, "reward": i / 3, "loss": 1.0, "grad_norm": 2.0} for i in range(3)]
    learning_curve(records, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").width > 300


def test_intervals_by_hand() -> None:
    """Student's t with 2 degrees of freedom: 4.303 * 1 / sqrt(3)."""
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.high - interval.mean == pytest.approx(2.4841, abs=1e-3)
    # Wilson, 5 of 10: centre 0.5, half width 0.2634
    share = share_interval([True] * 5 + [False] * 5)
    assert (share.low, share.high) == (pytest.approx(0.2366, abs=1e-3), pytest.approx(0.7634, abs=1e-3))
    assert share_interval([False] * 10).low == 0
