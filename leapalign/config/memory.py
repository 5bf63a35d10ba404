"""The configuration of where tensors live, and of what is recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from leapalign.inputs.bounds import PositiveInt


@dataclass(frozen=True)
class MemoryConfig:
    optimizer: Literal["device", "host"] = "device"
    """Where gradients add up, moments live and the step is taken. On the host, it needs the weights there, too, which
    the device then copies."""
    weights: Literal["resident", "streamed"] = "resident"
    """All weights on the device; or blocks copied from host memory as they are needed (with optimizer: host)."""
    shard: Literal["full", "gradients"] = "full"
    """Of several processes each has a part of weights, gradients, moments and average; or of all but the weights. One
    process has all."""
    stream_buffers: Annotated[int, Field(ge=2, le=1000)] = 3
    """Blocks on the device at a time, for streamed weights."""
    checkpointing: Literal["none", "blocks", "attention"] = "none"
    """What the backward pass recomputes instead of keeping: nothing, blocks, or blocks but for their attention."""
    checkpoint_every: PositiveInt = 1
    """Of the blocks, every so many-th is recomputed."""
    checkpoint_decoder: bool = False
    """Recompute the VAE decoder's blocks, too."""
    rewards: Literal["resident", "host"] = "resident"
    """Weights of the rewards on the device; or in host memory, from where they come while they score."""
    attention: Literal["auto", "native", "flash", "_flash_3", "xformers"] = "auto"
    """Attention kernel, by diffusers' names; auto: the fastest that works here."""
