"""What the tests of a reward share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hpsv3_model import Official, build_tokenizer, config_json
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def hpsv3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hpsv3")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config_json(tokenizer)))
    return path


@pytest.fixture(scope="session")
def official_hpsv3(hpsv3_folder: Path) -> Official:
    torch.manual_seed(0)
    model = Official(hpsv3_folder).eval()
    save_file(model.published(), hpsv3_folder / "HPSv3.safetensors")
    return model
