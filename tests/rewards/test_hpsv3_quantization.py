"""HPSv3 with layers of eight bits: its score and gradient are those of the widened weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from hpsv3_model import PROMPTS, Official, load
from tolerances import unit_roundoff
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.inputs.validation import UserError
from leapalign.memory.host_rewards import HostReward
from leapalign.memory.quantization import BLOCK
from leapalign.reward_gradient import reward_gradient
from leapalign.rewards import simulated_reward

pytestmark = pytest.mark.bitsandbytes


def quantized(reward: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in reward.named_modules() if hasattr(layer, "scale") and hasattr(layer, "code")}


def scored(reward: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    scores = reward(images, PROMPTS)
    scores.sum().backward()
    assert images.grad is not None
    return scores.detach(), images.grad


def test_score_and_gradient_are_those_of_the_widened_weights(hpsv3_folder: Path, official_hpsv3: Official) -> None:
    """Of so small a model one matrix of each of the image's layers has rows of whole blocks."""
    options = {"dtype": "float32", "rotary_dtype": "float32"}
    ours, plain = load(hpsv3_folder, **options, quantization="int8"), load(hpsv3_folder, **options)
    before, found = scored(plain), quantized(ours)
    assert list(found) == [f"model.visual.blocks.{number}.mlp.fc2" for number in range(2)]
    for name, layer in found.items():
        assert torch.equal(layer.code, bitsandbytes.functional.create_linear_map())
        blocks = layer.code[layer.weight.long()].view(-1, BLOCK) * layer.scale.unsqueeze(1)
        plain.get_submodule(name).weight.data = blocks.view(layer.weight.shape)
    # Some 30 operations on sums of at most 1024, one after the other, by the same library.
    bound = 30 * 1024**0.5 * unit_roundoff(torch.float32)
    for one, reference, other in zip(scored(ours), scored(plain), before, strict=True):
        assert (one - reference).norm() < bound * reference.norm() < (other - reference).norm()


def test_lent_from_the_host_it_is_the_same_to_the_bit(hpsv3_folder: Path, official_hpsv3: Official) -> None:
    """Bytes are in host memory between scorings, and on the device their own copies."""
    reward, latents = load(hpsv3_folder, quantization="int8"), torch.rand(2, 3, 64, 64)
    expected = reward_gradient(torch.sigmoid, reward, latents, PROMPTS, chunk=1)
    hosted = HostReward(reward, torch.device("cpu"))
    home = {name: layer.weight.data_ptr() for name, layer in quantized(reward).items()}
    seen = []

    def scored(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.extend(layer.weight.data_ptr() != home[name] for name, layer in quantized(reward).items())
        return reward(images, prompts)

    found = reward_gradient(torch.sigmoid, scored, latents, PROMPTS, chunk=1, lend=hosted.lent)
    assert seen == [True] * 2 * len(home)
    assert torch.equal(found.rewards, expected.rewards)
    assert torch.equal(found.gradient, expected.gradient)
    assert found.gradient.norm() > 0
    assert {layer.weight.dtype for layer in quantized(reward).values()} == {torch.int8}
    assert {name: layer.weight.data_ptr() for name, layer in quantized(reward).items()} == home


def test_a_simulation_counts_the_bytes() -> None:
    """Of 7 billion weights; embeddings and the head stay as they are."""
    with FakeTensorMode():
        plain, ours = (simulated_reward("hpsv3", quantization=kind) for kind in (None, "int8"))
    sizes = [sum(t.nbytes for t in (*one.parameters(), *one.buffers())) for one in (plain, ours)]
    rounded = sum(layer.weight.numel() for layer in quantized(ours).values())
    assert rounded > 7e9
    tables = 256 * 4 * len(quantized(ours))
    assert sizes[0] - sizes[1] == pytest.approx(rounded * (16 - 8.5) / 8 - tables, rel=1e-6)


def test_without_bitsandbytes_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match=r"reward.quantization int8 needs bitsandbytes for cpu"):
        load(Path("nowhere"), quantization="int8")
