from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from leapalign.memory.host_rewards import HostReward
from leapalign.planning.ledger import StorageLedger
from leapalign.reward_gradient import reward_gradient

CPU = torch.device("cpu")


class Linear(nn.Module):
    """A score of images ``(B, 3, 8, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 1)
        self.register_buffer("shift", torch.randn(1))

    def forward(self, images: torch.Tensor, prompts: object) -> torch.Tensor:
        return self.layer(images.flatten(1))[:, 0] + self.shift


def test_gradient_is_the_same_to_the_bit() -> None:
    reward, latents = Linear(), torch.randn(4, 3, 8, 8)
    hosted = copy.deepcopy(reward)
    lend = HostReward(hosted, CPU).lent
    expected = reward_gradient(torch.tanh, reward, latents, ["a"] * 4, chunk=2)
    found = reward_gradient(torch.tanh, hosted, latents, ["a"] * 4, chunk=2, lend=lend)
    for name in ("rewards", "gradient", "images", "clamped"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_weights_are_on_the_device_while_the_reward_scores_and_only_then() -> None:
    size = 4 * 193
    with StorageLedger() as ledger:
        reward = Linear()
        buffers = ledger.live - size
        hosted = HostReward(reward, CPU)
        assert (ledger.live, ledger.host.total) == (buffers, size)
        with hosted.lent():
            assert (ledger.live, ledger.host.total) == (buffers + size, size)
        assert (ledger.live, ledger.host.total) == (buffers, size)


def test_an_error_within_brings_them_home() -> None:
    reward = Linear()
    hosted = HostReward(reward, CPU)
    home = [parameter.data_ptr() for parameter in reward.parameters()]

    def fail(images: torch.Tensor, prompts: object) -> torch.Tensor:
        assert [parameter.data_ptr() for parameter in reward.parameters()] != home
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        reward_gradient(torch.tanh, fail, torch.randn(1, 3, 8, 8), ["a"], lend=hosted.lent)
    assert [parameter.data_ptr() for parameter in reward.parameters()] == home
