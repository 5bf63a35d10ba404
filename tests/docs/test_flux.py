"""docs/flux.md keeps its word: its code for diffusers makes a picture from a folder in FLUX's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pages import blocks
from PIL import Image
from tiny_folders import small_vae

from leapalign.tiny.model import build_pooled_encoder, build_token_encoder, build_transformer, save_model

HERE = {'.to("cuda")': "", "bfloat16": "float32", "height=720, width=720": "height=32, width=32", "steps=50": "steps=2"}
"""What the page says, and what a laptop does."""


def test_the_code_for_diffusers_makes_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vae = small_vae()
    torch.manual_seed(0)
    channels = 4 * vae.config.latent_channels
    transformer = type(build_transformer()).from_config({**build_transformer().config, "in_channels": channels})
    save_model(Path("aligned"), transformer, build_pooled_encoder(), build_token_encoder())
    vae.save_pretrained("aligned/vae")
    index = json.loads(Path("aligned/model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderKL"]
    Path("aligned/model_index.json").write_text(json.dumps(index))
    code = blocks("docs/flux.md", "python")[-1]
    for said, instead in HERE.items():
        assert said in code
        code = code.replace(said, instead)
    found: dict[str, Any] = {}
    exec(code, found)
    assert isinstance(found["pipeline"], diffusers.FluxPipeline)
    assert Image.open("fox.png").size == (32, 32)
