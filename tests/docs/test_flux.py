"""docs/flux.md keeps its word: its code for diffusers makes a picture from a folder in FLUX's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
from pages import blocks
from PIL import Image
from tiny_folders import save_flux

HERE = {'.to("cuda")': "", "bfloat16": "float32", "height=720, width=720": "height=32, width=32", "steps=50": "steps=2"}
"""What the page says, and what a laptop does."""


def test_the_code_for_diffusers_makes_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_flux(Path("aligned"))
    code = blocks("docs/flux.md", "python")[-1]
    for said, instead in HERE.items():
        assert said in code
        code = code.replace(said, instead)
    found: dict[str, Any] = {}
    exec(code, found)
    assert isinstance(found["pipeline"], diffusers.FluxPipeline)
    assert Image.open("fox.png").size == (32, 32)
