"""What people look at: tables, pages, pictures, intervals."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from leapalign.evaluation.statistics import mean_interval, share_interval
from leapalign.reports.pages import inline_image, table, text_table, themed_image, write_page
from leapalign.reports.pictures import Curve, before_after_grid, chart, image_grid, smoothed, to_picture


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


def test_smoothing_takes_centred_means_that_shrink_at_the_ends() -> None:
    assert smoothed([0.0, 3.0, 6.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0]
    assert smoothed([1.0, 5.0], 1) == [1.0, 5.0]


@pytest.mark.parametrize("dark", [False, True])
def test_a_chart_is_drawn_on_a_transparent_ground(tmp_path: Path, dark: bool) -> None:
    curves = [Curve("reward", range(20), [i / 3 for i in range(20)]), Curve("held out", [0, 19], [0.0, 6.0], raw=False)]
    chart(curves, tmp_path / "curve.png", dark=dark)
    picture = Image.open(tmp_path / "curve.png")
    assert picture.width > 300
    assert picture.getpixel((2, 2))[3] == 0
    light = max(pixel[:3] for _, pixel in picture.getcolors(2**20) if pixel[3] == 255)
    assert (min(light) > 200) == dark, "the writing is white on dark pages, black on light ones"


def test_pictures_of_a_page_follow_the_readers_screen_or_lie_in_it() -> None:
    shown = themed_image("a.png", "b.png", "what")
    assert 'media="(prefers-color-scheme: dark)" srcset="b.png"' in shown
    assert 'src="a.png" alt="what"' in shown
    inline = inline_image(to_picture(torch.zeros(3, 4, 4), 4), '"', "pixels")
    data = base64.b64decode(inline.split("base64,")[1].split('"')[0])
    assert Image.open(io.BytesIO(data)).size == (4, 4)
    assert 'alt="&quot;"' in inline


def test_a_page_suits_phones_and_dark_screens(tmp_path: Path) -> None:
    write_page(tmp_path / "index.html", "title", [("heading", table(("a",), [["b"]]))])
    text = (tmp_path / "index.html").read_text()
    assert 'name="viewport" content="width=device-width' in text
    assert "color-scheme: light dark" in text
    assert '<div class="scroll"><table>' in text


def test_intervals_by_hand() -> None:
    """Student's t with 2 degrees of freedom: 4.303 * 1 / sqrt(3)."""
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.high - interval.mean == pytest.approx(2.4841, abs=1e-3)
    # Wilson, 5 of 10: centre 0.5, half width 0.2634
    share = share_interval([True] * 5 + [False] * 5)
    assert (share.low, share.high) == (pytest.approx(0.2366, abs=1e-3), pytest.approx(0.7634, abs=1e-3))
    assert share_interval([False] * 10).low == 0
