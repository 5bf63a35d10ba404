"""HPSv3's rotary embeddings: in bfloat16 as its own code casts them, and what that does to angles and scores."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hpsv3_model import PROMPTS, Official, load, smooth_images
from safetensors.torch import save_file
from torch import Tensor

from leapalign.rewards.hpsv3_rotary import VisionRotary


def frequencies(theta: float, width: int) -> Tensor:
    """``theta ** (-2 i / width)`` in float64."""
    return theta ** (-torch.arange(0, width, 2).double() / width)


def test_rounded_frequencies_turn_angles_by_half_a_radian() -> None:
    """Of Qwen2-VL-7B's text tower, heads 128 wide and theta 10^6, at a distance of 500 tokens: 0.577 rad."""
    exact = frequencies(1e6, 128)
    assert float(((exact.bfloat16().double() - exact) * 500).abs().max()) == pytest.approx(0.577, abs=5e-4)


def test_angles_of_the_image_tower_are_rounded_after_the_product() -> None:
    """Heads 80 wide, theta 10^4, an edge of 32 patches: 0.095 rad off, where frequencies alone would make it 0.059."""
    exact, places = frequencies(1e4, 40), torch.arange(32)
    rounded = exact.bfloat16()
    product = torch.outer(places.bfloat16(), rounded)
    cosines, sines = VisionRotary(rounded)(torch.empty(0), torch.stack([places, places.flip(0)], dim=1))
    assert torch.equal(cosines, torch.cat([product, product.flip(0)] * 2, dim=1).cos())
    assert torch.equal(sines, torch.cat([product, product.flip(0)] * 2, dim=1).sin())
    error = product.double() - torch.outer(places.double(), exact)
    assert float(error.abs().max()) == pytest.approx(0.0951, abs=1e-4)
    assert float(((rounded.double() - exact) * 32).abs().max()) == pytest.approx(0.0594, abs=1e-4)


@pytest.fixture(scope="module")
def attentive(hpsv3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Official]:
    """A model whose attention picks tokens, as a trained one's does; without, places hardly count."""
    folder = tmp_path_factory.mktemp("attentive")
    shutil.copytree(hpsv3_folder, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    official = Official(folder).eval()
    for name, parameter in official.model.named_parameters():
        if any(part in name for part in ("q_proj", "k_proj", "attn.qkv")):
            parameter.data *= 8
    save_file(official.published(), folder / "HPSv3.safetensors")
    return folder, official


@torch.no_grad()
def score(folder: Path, images: Tensor, **options: str) -> Tensor:
    return load(folder, **options)(images, PROMPTS)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_score_is_the_official_s_of_either_dtype(attentive: tuple[Path, Official], dtype: str) -> None:
    folder, cast = attentive
    official = Official(folder, getattr(torch, dtype)).eval()
    official.load_state_dict(cast.state_dict())
    torch.manual_seed(1)
    images = smooth_images(64, 96)
    expected = official(*load(folder).preprocess(images), PROMPTS)[:, 0]
    torch.testing.assert_close(score(folder, images, rotary_dtype=dtype), expected, rtol=1e-4, atol=1e-5)


def test_the_default_is_the_published_code_s(attentive: tuple[Path, Official]) -> None:
    """On this model exact frequencies move scores by 1 %, more than twenty times what the test above lets pass."""
    torch.manual_seed(1)
    images = smooth_images(64, 96)
    default = score(attentive[0], images)
    assert torch.equal(default, score(attentive[0], images, rotary_dtype="bfloat16"))
    difference = (default - score(attentive[0], images, rotary_dtype="float32")).abs()
    assert float((difference / default.abs()).mean()) == pytest.approx(0.01, abs=0.005)
    assert float(difference.min()) > 20 * (1e-4 * float(default.abs().max()) + 1e-5)
