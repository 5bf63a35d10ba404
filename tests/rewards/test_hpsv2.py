"""HPSv2 from files in the published layout, against open_clip's network written again and open_clip itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reward_cases import (
    PIL_ROUNDING,
    SIZES,
    PlainClip,
    bytes_tokenizer,
    bytes_tokens,
    from_pictures,
    smooth_images,
    to_pictures,
)
from safetensors.torch import save_file
from torch import Tensor

from leapalign.inputs.validation import UserError
from leapalign.rewards import get_reward, hpsv2
from leapalign.rewards.preprocessing import CLIP_MEAN, CLIP_STD

PROMPTS = ["a red circle", "two squares", "one very " + "long " * 60 + "prompt"]
NAME = "HPS_v2.1_compressed.pt"


@pytest.fixture(scope="module")
def network() -> PlainClip:
    torch.manual_seed(0)
    return PlainClip().eval()


@pytest.fixture(scope="module")
def folder(network: PlainClip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hpsv2")
    torch.save({"state_dict": network.state_dict(), "epoch": 1}, path / NAME)
    bytes_tokenizer(path / "tokenizer")
    return path


def load(folder: Path, file: str = "", **options: Any) -> Any:
    return get_reward("hpsv2", path=str(folder / file), processor=str(folder / "tokenizer"), **options)


def slopes(score: Tensor, images: Tensor) -> Tensor:
    return torch.autograd.grad(score.sum(), images)[0]


def test_score_and_gradient_are_the_plain_network_s(folder: Path, network: PlainClip) -> None:
    reward = load(folder)
    images = smooth_images(28, 28).requires_grad_()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    expected = network((images - mean) / std, bytes_tokens(PROMPTS))
    found = reward(images, PROMPTS)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(slopes(found, images), slopes(expected, images), atol=1e-6, rtol=1e-4)
    assert all(parameter.grad is None for parameter in reward.parameters())
    assert reward.highest == 1


@pytest.mark.parametrize("size", SIZES)
def test_images_are_fitted_as_pil_does(folder: Path, size: tuple[int, int]) -> None:
    """Long side to the model's, black around: up to the roundings of 8-bit pictures."""
    images = smooth_images(*size)
    height, width = (round(28 * length / max(size)) for length in size)
    fitted = []
    for picture in to_pictures(images):
        frame = Image.new("RGB", (28, 28))
        small = picture.resize((width, height), Image.Resampling.BICUBIC)
        frame.paste(small, ((28 - width) // 2, (28 - height) // 2))
        fitted.append(frame)
    expected = from_pictures(fitted, CLIP_MEAN, CLIP_STD)
    assert float((load(folder).preprocess(images) - expected).abs().max()) <= PIL_ROUNDING


def test_overshoot_is_clipped_as_pictures_clip_it_or_stays_as_asked(folder: Path) -> None:
    """A white square on black at twice its size: pictures, which PIL clips after either pass, are 0.057 from clipped
    tensors and 0.146 from the others.

    Of the cubic kernel (a = -1/2) the pixel across an edge has -(1.25^3 - 5 1.25^2 + 8 1.25 - 4) / 2 = -0.0703, so
    float tensors reach 1.0703^2 = 1.1455 at the corners.
    """
    images = torch.zeros(1, 3, 14, 14)
    images[..., 4:10, 4:10] = 1
    (picture,) = to_pictures(images)
    pixels = from_pictures([picture.resize((28, 28), Image.Resampling.BICUBIC)], (0, 0, 0), (1, 1, 1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    default, clipped, kept = (
        load(folder, **options).preprocess(images) * std + mean
        for options in ({}, {"clip_overshoot": True}, {"clip_overshoot": False})
    )
    assert torch.equal(default, clipped)
    assert float(clipped.max()) == pytest.approx(1)
    assert float(kept.max()) == pytest.approx(1.1455, abs=1e-4)
    torch.testing.assert_close(kept.clamp(0, 1), clipped)
    assert float((clipped - pixels).abs().max()) == pytest.approx(0.057, abs=2e-3)
    assert float((kept - pixels).abs().max()) == pytest.approx(0.1455, abs=2e-3)


def test_gradient_reaches_all_of_an_oblong_image(folder: Path) -> None:
    images = smooth_images(60, 30).requires_grad_()
    gradient = slopes(load(folder)(images, PROMPTS), images)
    assert bool((gradient.abs().amax(dim=1) > 0).all())


def test_a_safetensors_copy_is_the_same(folder: Path, network: PlainClip, tmp_path: Path) -> None:
    file = tmp_path / "copy.safetensors"
    save_file(network.state_dict(), file)
    images = smooth_images(28, 28)
    assert torch.equal(load(folder, str(file))(images, PROMPTS), load(folder)(images, PROMPTS))


def test_towers_in_bfloat16_score_nearly_the_same(folder: Path) -> None:
    half = load(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    images = smooth_images(28, 28)
    scores = half(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, load(folder)(images, PROMPTS), rtol=0, atol=3e-2)


def test_prompts_are_cleaned_as_open_clip_does() -> None:
    """Curly quotes made straight, entities undone, and what was decoded wrongly decoded again."""
    assert hpsv2.cleaned(" cat &amp;amp; dog\u2019s ") == "cat & dog's"
    assert hpsv2.cleaned("\u201ca caf\u00c3\u00a9\u201d") == '"a caf\u00e9"'


def without(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without("ln_final.bias", t), r"HPS_v2\.1_compressed\.pt.*missing: ln_final\.bias"),
        (lambda t: without("visual.proj", t), r"missing: visual\.proj"),
        (lambda t: t | {"visual.attn_pool.q": torch.ones(1)}, r"unexpected: visual\.attn_pool\.q"),
        (
            lambda t: t | {"transformer.resblocks.1.attn.in_proj_weight": torch.ones(128, 128)},
            r"of another shape: transformer\.resblocks\.1\.attn\.in_proj_weight \(128, 128\) instead of \(384, 128\)",
        ),
        (lambda t: t | {"text_projection": torch.ones(24, 128)}, r"text_projection \(24, 128\) instead of \(128, 24\)"),
        (lambda t: t | {"visual.proj": torch.ones(100, 24)}, "visual.proj has 100 rows"),
        (lambda t: t | {"token_embedding.weight": torch.ones(99, 128)}, "99 tokens and the tokenizer"),
        (lambda t: {"weights": torch.ones(3)}, r"missing: visual\.proj"),
    ],
)
def test_a_file_of_another_model_is_one_sentence(
    folder: Path, network: PlainClip, tmp_path: Path, change: Any, message: str
) -> None:
    torch.save({"state_dict": change(network.state_dict())}, tmp_path / NAME)
    with pytest.raises(UserError, match=message) as caught:
        load(folder, str(tmp_path))
    assert re.search(r"\.\s|\n", str(caught.value)) is None


def test_missing_tokenizer_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"check reward\.processor"):
        get_reward("hpsv2", path=str(folder), processor=str(tmp_path))


@pytest.fixture(scope="module")
def full_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's own tokenizer, from open_clip's vocabulary."""
    open_clip = pytest.importorskip("open_clip")
    from transformers import CLIPTokenizer

    path = tmp_path_factory.mktemp("tokenizer")
    own = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): index for word, index in own.encoder.items()}
    merges = sorted(own.bpe_ranks, key=own.bpe_ranks.get)
    CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(path / "tokenizer")
    return path


@pytest.mark.open_clip
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_open_clip(full_tokenizer: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    import open_clip

    vision = {"image_size": 28, "layers": 2, "width": 160, "head_width": 80, "patch_size": 7}
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3}
    official = open_clip.CLIP(24, vision, text).eval()
    for parameter in official.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save({"state_dict": official.state_dict()}, tmp_path / NAME)
    reward = get_reward("hpsv2", path=str(tmp_path), processor=str(full_tokenizer / "tokenizer"))
    prompts = ["A Photo of a cat's  hat, 8k &amp; \u201csharp\u201d", "", PROMPTS[2]]
    images = smooth_images(*size).requires_grad_()
    tokens = open_clip.tokenizer.tokenize(prompts)
    # The same pixels for both, so that the gradients can be compared.
    expected = torch.nn.functional.cosine_similarity(
        official.encode_image(reward.preprocess(images)), official.encode_text(tokens)
    )
    found = reward(images, prompts)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(slopes(found, images), slopes(expected, images), atol=1e-6, rtol=1e-4)
    transform = open_clip.image_transform(28, False, CLIP_MEAN, CLIP_STD, resize_mode="longest", fill_color=0)
    pixels = torch.stack([transform(picture) for picture in to_pictures(images.detach())])
    assert float((reward.preprocess(images.detach()) - pixels).abs().max()) <= PIL_ROUNDING
