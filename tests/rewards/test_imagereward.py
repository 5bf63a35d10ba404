"""ImageReward against a BLIP written from the names and shapes in the published file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from imagereward_model import MED_CONFIG, SIDE, WORDS, Original
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer

from leapalign.inputs.validation import UserError
from leapalign.rewards import get_reward

PROMPTS = ["a red circle", "two squares left of a cross", "cross " * 50]


@pytest.fixture(scope="module")
def original() -> Original:
    torch.manual_seed(0)
    return Original().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, original: Original) -> Path:
    path = tmp_path_factory.mktemp("imagereward")
    torch.save(original.state_dict(), path / "ImageReward.pt")
    (path / "med_config.json").write_text(json.dumps(MED_CONFIG))
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(path / "bert")
    return path


def load(folder: Path, **options: str):
    return get_reward("imagereward", **{"path": str(folder), "tokenizer": str(folder / "bert"), **options})


def smooth_images(height: int, width: int) -> Tensor:
    """Images like photographs: little detail at the scale of a pixel."""
    return F.interpolate(torch.rand(3, 3, 6, 6), (height, width), mode="bicubic").clamp(0, 1)


def encode(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask as BERT's tokenizer makes them: [CLS] words [SEP], 35 places."""
    rows = [[*[2, *(WORDS.index(word) for word in prompt.split())][:34], 3] for prompt in prompts]
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
    return ids, (ids != 0).long()


def test_score_and_gradient_are_the_originals(folder: Path, original: Original) -> None:
    reward = load(folder).double()
    images = smooth_images(48, 40).double().requires_grad_()
    scores = reward(images, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    pixels = reward.preprocess(images)
    expected = original.double()(pixels, *encode(PROMPTS))
    (expected_gradient,) = torch.autograd.grad(expected.sum(), images)
    assert float(expected.detach().std()) > 0.05
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-11)
    original.float()


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (30, 50), (16, 16), (35, 32), (32, 39), (16, 20)])
def test_pixels_are_the_packages(folder: Path, size: tuple[int, int]) -> None:
    """Its transform: short side with PIL's bicubic, torchvision's centre crop, CLIP's mean and standard deviation."""
    # Mid-tones: PIL clips overshoot after either pass of the resize, tensors only at its end.
    images = 0.2 + 0.6 * smooth_images(*size)
    scale = SIDE / min(size)
    height, width = int(size[0] * scale), int(size[1] * scale)
    top, left = round((height - SIDE) / 2.0), round((width - SIDE) / 2.0)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for image, pixels in zip(images, load(folder).preprocess(images), strict=True):
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        expected = (np.asarray(picture)[top : top + SIDE, left : left + SIDE] / 255 - mean) / std
        # Rounded to 8 bit on the way in, after either pass of the resize, and once more where weights are fixed-point.
        assert np.abs(pixels.permute(1, 2, 0).numpy() - expected).max() <= 4 * 0.5 / 255 / 0.26


def test_raw_is_the_networks_output(folder: Path) -> None:
    images = smooth_images(32, 32)
    raw, standard = (load(folder, scale=scale)(images, PROMPTS) for scale in ("raw", "standard"))
    torch.testing.assert_close(raw, standard * 1.03334 + 0.16717, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_saturated_pixels_and_no_weight(folder: Path) -> None:
    reward = load(folder)
    images = smooth_images(16, 16)
    images[:, :, :8] = 1
    images[:, :, 8:] = 0
    images.requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert bool((images.grad.abs().amax(dim=1) > 0).all())
    assert not reward.training
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_towers_in_bfloat16_score_nearly_the_same_in_float32(folder: Path) -> None:
    images = smooth_images(32, 32)
    full, half = (load(folder, dtype=dtype)(images, PROMPTS) for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0, atol=0.1)


def test_the_file_itself_will_do(folder: Path) -> None:
    images = smooth_images(32, 32)
    named = load(folder, path=str(folder / "ImageReward.pt"))
    assert torch.equal(named(images, PROMPTS), load(folder)(images, PROMPTS))


@pytest.mark.parametrize(
    ("dropped", "added", "message"),
    [
        ("mlp.layers.7.bias", {}, "missing: mlp.layers.7.bias"),
        ("blip.visual_encoder.pos_embed", {}, "missing: blip.visual_encoder.pos_embed"),
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight", {}, "missing: blip.text_encoder"),
        (None, {"blip.text_encoder.encoder.layer.2.output.dense.bias": (48,)}, "unexpected: blip.text_encoder"),
        (None, {"mlp.layers.0.weight": (1024, 47)}, r"mlp.layers.0.weight \(1024, 47\) instead of \(1024, 48\)"),
    ],
)
def test_other_tensors_are_one_sentence(
    folder: Path, tmp_path: Path, dropped: str, added: dict[str, tuple[int, ...]], message: str
) -> None:
    tensors = torch.load(folder / "ImageReward.pt", weights_only=True)
    tensors.pop(dropped, None)
    torch.save(tensors | {name: torch.zeros(shape) for name, shape in added.items()}, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(MED_CONFIG))
    with pytest.raises(UserError, match=rf"ImageReward\.pt' is not of .*{message}"):
        load(folder, path=str(tmp_path))


def test_truncated_file_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ImageReward.pt").write_bytes((folder / "ImageReward.pt").read_bytes()[:5000])
    (tmp_path / "med_config.json").write_text(json.dumps(MED_CONFIG))
    with pytest.raises(UserError, match=r"cannot read weights from '.*ImageReward\.pt'"):
        load(folder, path=str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read '.*med_config.json'"),
        ("[]", "cannot read '.*med_config.json'"),
        (json.dumps({"vocab_size": 16}), "med_config.json' holds no 'hidden_size'"),
        (json.dumps({**MED_CONFIG, "vocab_size": 8}), "has 13 tokens, more than the 8"),
        (None, "holds no med_config.json"),
    ],
)
def test_other_sizes_are_one_sentence(folder: Path, tmp_path: Path, content: str | None, message: str) -> None:
    (tmp_path / "ImageReward.pt").symlink_to(folder / "ImageReward.pt")
    if content is not None:
        (tmp_path / "med_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load(folder, path=str(tmp_path))


def test_missing_tokenizer_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"check reward\.tokenizer"):
        load(folder, tokenizer=str(tmp_path))
