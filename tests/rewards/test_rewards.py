"""CLIPScore, the aesthetic score, a reward of the user's own, and how large each is in a simulation."""

from __future__ import annotations

import logging
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_cases import smooth_images
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPModel

from leapalign.diagnostics.threshold import warn_of_threshold
from leapalign.inputs.validation import UserError
from leapalign.rewards import get_reward, simulated_reward
from leapalign.rewards.aesthetic import PUBLISHED
from leapalign.rewards.preprocessing import cover, normalised
from leapalign.tiny.train_reward import SEEN, build_scorer, save_scorer

PROMPTS = ["a red circle", "two squares", "a cross above a square"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP with its tokenizer and image processor."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    save_scorer(build_scorer(), path)
    return path


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The aesthetic head as published, dropout between its layers, on embeddings 96 wide."""
    torch.manual_seed(1)
    widths = (96, 1024, 128, 64, 16, 1)
    linear = [nn.Linear(*pair) for pair in pairwise(widths)]
    drop = nn.Dropout(0.2)
    module = nn.Module()
    module.layers = nn.Sequential(linear[0], drop, linear[1], drop, linear[2], drop, linear[3], linear[4])
    path = tmp_path_factory.mktemp("head")
    torch.save(module.state_dict(), path / PUBLISHED)
    return path


def slopes(score: Tensor, images: Tensor) -> Tensor:
    return torch.autograd.grad(score.sum(), images)[0]


def same(found: Tensor, expected: Tensor, images: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(slopes(found, images), slopes(expected, images), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("options", "factor"), [({}, 100.0), ({"scale": "cosine"}, 1.0)])
def test_clipscore_is_transformers_own(clip: Path, options: dict[str, Any], factor: float) -> None:
    reward: Any = get_reward("clipscore", path=str(clip), **options)
    images = smooth_images(20, 32).requires_grad_()
    model = CLIPModel.from_pretrained(clip).eval()
    tokens = reward.tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    official = model(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        pixel_values=normalised(cover(images, SEEN)),
    )
    same(reward(images, PROMPTS) / factor, (official.image_embeds * official.text_embeds).sum(-1), images)
    assert reward.highest == factor


def test_aesthetic_is_linear_layers_on_the_unit_embedding(clip: Path, head: Path) -> None:
    reward: Any = get_reward("aesthetic", path=str(head), tower=str(clip))
    images = smooth_images(32, 20).requires_grad_()
    embedding = CLIPModel.from_pretrained(clip).get_image_features(normalised(cover(images, SEEN))).pooler_output
    hidden = embedding / embedding.norm(dim=1, keepdim=True)
    weights = torch.load(head / PUBLISHED)
    for layer in (0, 2, 4, 6, 7):
        hidden = hidden @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
    found = reward(images, PROMPTS)
    assert found.shape == (3,)
    same(found, hidden[:, 0], images)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert torch.equal(found, reward(images, ["other"] * 3))


def test_aesthetic_tower_in_bfloat16(clip: Path, head: Path) -> None:
    full, half = (get_reward("aesthetic", path=str(head), tower=str(clip), dtype=d) for d in ("float32", "bfloat16"))
    images = smooth_images(16, 16)
    assert half(images, PROMPTS).dtype == torch.float32
    torch.testing.assert_close(half(images, PROMPTS), full(images, PROMPTS), rtol=0, atol=1e-2)


def test_aesthetic_files_that_do_not_fit_are_one_sentence(clip: Path, head: Path, tmp_path: Path) -> None:
    weights = torch.load(head / PUBLISHED)
    file = tmp_path / PUBLISHED
    torch.save(weights | {"layers.0.weight": torch.ones(1024, 768)}, file)
    with pytest.raises(UserError, match=r"linearMSE\.pth' .*layers\.0\.weight \(1024, 768\) instead of \(1024, 96\)"):
        get_reward("aesthetic", path=str(file), tower=str(clip))
    torch.save({key: value for key, value in weights.items() if "layers.7" not in key}, file)
    with pytest.raises(UserError, match=r"missing: layers\.7\.weight, layers\.7\.bias"):
        get_reward("aesthetic", path=str(file), tower=str(clip))
    with pytest.raises(UserError, match=r"check reward\.tower"):
        get_reward("aesthetic", path=str(head), tower=str(tmp_path))
    with pytest.raises(UserError, match=r"holds no sac\+logos"):
        get_reward("aesthetic", path=str(clip), tower=str(clip))
    with pytest.raises(UserError, match="'path' is missing; add it"):
        get_reward("aesthetic")


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module on the import path, with a reward in it."""
    name = "own_reward_for_a_test"
    lines = "def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n\nlimit = 1\n"
    (tmp_path / f"{name}.py").write_text(lines)
    (tmp_path / "broken_reward_for_a_test.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_what_an_own_reward_raises_is_told_with_its_place(own_module: str, tmp_path: Path) -> None:
    path = tmp_path / f"{own_module}.py"
    path.write_text(
        path.read_text() + "\n\ndef failing(images, prompts):\n    return images.mean() / len(prompts[9])\n"
    )
    reward = get_reward("custom", function=f"{own_module}:failing")
    with pytest.raises(UserError, match=r"failing' raised IndexError: list index.*own_reward_for_a_test\.py, line 8\)"):
        reward(smooth_images(8, 8), PROMPTS)


def test_custom_is_the_callable(own_module: str) -> None:
    reward = get_reward("custom", function=f"{own_module}:brightness")
    images = smooth_images(8, 8)
    assert torch.equal(reward(images, PROMPTS), images.mean(dim=(1, 2, 3)))


def test_custom_may_be_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a dataclass, which looks for its module by name."""
    lines = ["from __future__ import annotations", "import dataclasses", "", "@dataclasses.dataclass", "class Half:"]
    lines += ["    factor: float = 0.5", "    def __call__(self, images, prompts):"]
    lines += ["        return self.factor * images.mean(dim=(1, 2, 3))", "", "half = Half()"]
    (tmp_path / "own.py").write_text("\n".join(lines))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    images = smooth_images(8, 8)
    expected = images.mean(dim=(1, 2, 3)) / 2
    for function in ("~/own.py:half", f"{tmp_path}/own.py:half"):
        torch.testing.assert_close(get_reward("custom", function=function)(images, PROMPTS), expected)
    with pytest.raises(UserError, match=r"FileNotFoundError: .*none\.py"):
        get_reward("custom", function="~/none.py:half")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("own_reward_for_a_test", "must read package.module:function"),
        ("own_reward_for_a_test:", "must read package.module:function"),
        ("no_such_module_here:f", r"ModuleNotFoundError: No module named 'no_such_module_here'\)"),
        ("own_reward_for_a_test:nothing", "AttributeError: .*has no attribute 'nothing'"),
        ("own_reward_for_a_test:limit", "is a int; name a function"),
        ("math:sqrt", "cannot be called with images and prompts"),
        ("broken_reward_for_a_test:f", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_callable_is_one_sentence(own_module: str, function: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_reward("custom", function=function)


def test_nothing_is_imported_before_it_is_asked_for(own_module: str) -> None:
    with FakeTensorMode():
        simulated_reward("custom", function=f"{own_module}:brightness")
    assert own_module not in sys.modules


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        # Of the published models: HPSv2.1's and PickScore's CLIP ViT-H/14, CLIP ViT-L/14, its image tower and the head.
        ("hpsv2", {}, 986_109_441),
        ("pickscore", {"dtype": "bfloat16"}, 986_109_441),
        ("clipscore", {}, 427_616_513),
        ("aesthetic", {"path": "head.pth"}, 303_966_208 + 787_456 + 131_200 + 8_256 + 1_040 + 17),
        ("custom", {"function": "a.b:c"}, 986_109_441),
        # Qwen2-VL-7B's 8,291,375,616 without the layer that writes text and 406 rows of embeddings, and the head.
        ("hpsv3", {}, 8_291_375_616 - 152_064 * 3584 - 406 * 3584 + 3_687_474),
    ],
)
def test_size_in_a_simulation(name: str, options: dict[str, str], parameters: int) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        reward = simulated_reward(name, **options)
        images = torch.empty(2, 3, 64, 64, requires_grad=True)
    assert sum(parameter.numel() for parameter in reward.parameters()) == parameters
    score = reward(images, ["a"] * 2)
    assert score.shape == (2,)
    assert slopes(score, images).shape == images.shape
    head = {torch.float32} if name == "hpsv3" else set()
    dtype = getattr(torch, options.get("dtype", "bfloat16" if head else "float32"))
    assert {parameter.dtype for parameter in reward.parameters()} == {dtype} | head


def test_size_in_a_simulation_is_the_folder_s(clip: Path) -> None:
    loaded: Any = get_reward("clipscore", path=str(clip))
    with FakeTensorMode():
        found = simulated_reward("clipscore", path=str(clip))
    shapes = [{name: value.shape for name, value in module.named_parameters()} for module in (found, loaded)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("threshold", "mean", "highest", "message"),
    [
        (0.55, 0.3, 1.0, None),
        (0.55, 0.3, None, None),
        (1.0, 0.3, 1.0, None),
        (0.55, 0.87, 1.0, "not above the first batch's mean reward 0.87"),
        (0.5, 0.5, None, "not above the first batch's mean reward 0.5"),
        (22.0, 0.3, 1.0, "above 1, the highest that the reward can give"),
        (22.0, 21.0, None, None),
    ],
)
def test_a_threshold_that_does_not_suit_is_told(
    caplog: pytest.LogCaptureFixture, threshold: float, mean: float, highest: float | None, message: str | None
) -> None:
    with caplog.at_level(logging.WARNING, "leapalign"):
        warn_of_threshold(threshold, mean, highest)
    assert len(caplog.messages) == (message is not None)
    assert message is None or message in caplog.messages[0]
