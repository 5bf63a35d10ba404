"""Settings that say where tensors live, and a stack of blocks to place."""

from __future__ import annotations

from torch import nn

BYTES = "optimizer.name=adamw_8bit"
HOST = "memory.optimizer=host"
STREAMED = ("memory.weights=streamed", "memory.checkpointing=blocks", HOST)
PLACES: dict[str, tuple[str, ...]] = {
    "blocks recomputed": ("memory.checkpointing=blocks",),
    "attention kept": ("memory.checkpointing=attention",),
    "every other block": ("memory.checkpointing=blocks", "memory.checkpoint_every=2"),
    "host optimizer": (HOST,),
    "rewards on the host": ("memory.rewards=host",),
    "streamed": STREAMED,
    "streamed through two buffers": (*STREAMED, "memory.stream_buffers=2"),
    "streamed, a sample at a time": (*STREAMED, "train.microbatch=1"),
}


def stack(count: int = 5) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(3, 3) for _ in range(count)])
    model.head = nn.Linear(3, 1)
    return model
