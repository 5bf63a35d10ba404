"""Puts a model and a reward where the configuration says, before training: the one place that chooses devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from leapalign.config import MemoryConfig
from leapalign.memory.attention import set_attention
from leapalign.memory.blocks import blocks_of
from leapalign.memory.checkpointing import prepare_decoder, prepare_model
from leapalign.memory.host_rewards import HostReward
from leapalign.memory.host_weights import HostWeights
from leapalign.parallel.sharding import shard


class Placeable(Protocol):
    """What of a model has a place."""

    device: torch.device
    """Where it computes."""

    @property
    def transformer(self) -> nn.Module:
        """The network that is trained."""
        ...

    @property
    def decoder(self) -> nn.Module | None:
        """The network that makes images of latents; None where latents are images."""
        ...


def training_device() -> torch.device:
    """The GPU, where PyTorch finds one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place(model: Placeable, config: MemoryConfig, device: torch.device) -> HostWeights | None:
    """Moves ``model`` to ``device``, or the weights that are trained to host memory.

    Of weights on the device each of several processes has a part.

    Returns what keeps the device's copies of host weights, None for weights on the device. Raises UserError for an
    attention backend that does not work here, and for models that cannot recompute blocks.
    """
    set_attention(model.transformer, config.attention, device, next(model.transformer.parameters()).dtype)
    prepare_model(model.transformer, model.decoder, config)
    model.device = device
    if model.decoder is not None:
        _move(model.decoder, device)
    if config.optimizer == "device" and config.weights == "resident":
        shard(model.transformer, blocks_of(model.transformer), device, config.shard == "gradients")
        _move(model.transformer, device)
        return None
    held = HostWeights(model.transformer, device, config.stream_buffers if config.weights == "streamed" else None)
    # Frozen weights stream beside adapters that are trained on the device.
    return held if config.optimizer == "host" else None


def place_for_sampling(model: Placeable, config: MemoryConfig, device: torch.device) -> None:
    """Moves ``model`` to ``device`` to make images without gradients; weights that stream go on streaming.

    Raises UserError for an attention backend that does not work here.
    """
    residence = config if config.weights == "streamed" else replace(config, optimizer="device")
    place(model, replace(residence, checkpointing="none", checkpoint_decoder=False), device)


def place_for_climbing(model: Placeable, rewards: Sequence[object], config: MemoryConfig, device: torch.device) -> None:
    """Moves the decoder of ``model`` and ``rewards`` to ``device``; the transformer's weights are given up.

    Raises UserError for a decoder that cannot recompute.
    """
    # Parameters of bitsandbytes' class cannot be moved there.
    model.transformer.to_empty(device="meta")
    prepare_decoder(model.decoder, config)
    model.device = device
    for reward in rewards:
        place_reward(reward, device)
    if model.decoder is not None:
        _move(model.decoder, device)


def lender(
    reward: object, config: MemoryConfig, device: torch.device
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Moves ``reward`` to ``device``, or its weights to host memory, and returns what has them on ``device`` for a
    block. Raises UserError where host memory cannot be pinned."""
    if config.rewards == "host" and isinstance(reward, nn.Module):
        return HostReward(reward, device).lent
    place_reward(reward, device)
    return contextlib.nullcontext


def place_reward(reward: object, device: torch.device) -> None:
    """Moves a reward to ``device``, where it is a module."""
    if isinstance(reward, nn.Module):
        _move(reward, device)


@contextlib.contextmanager
def lent_device(rewards: Collection[object], device: torch.device) -> Iterator[None]:
    """``rewards`` are on ``device`` within the block, and in host memory after it."""
    try:
        for reward in rewards:
            place_reward(reward, device)
        yield
    finally:
        for reward in rewards:
            place_reward(reward, torch.device("cpu"))


def _move(module: nn.Module, device: torch.device) -> None:
    # Tensors of a simulation cannot be moved, not even to where they are.
    if any(tensor.device != device for tensor in (*module.parameters(), *module.buffers())):
        module.to(device)
