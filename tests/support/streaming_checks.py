"""What every family whose weights stream is held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from family_checks import SEEDS, write_config
from places import STREAMED
from small_runs import weights, without_time
from tiny_folders import PROMPTS
from torch import nn

from leapalign.config import MemoryConfig, ModelConfig, load_config
from leapalign.memory.checkpointing import prepare_model
from leapalign.models import encode_prompts, load_model
from leapalign.runs.run import Run
from leapalign.runs.run_folder import read_metrics
from leapalign.trainer import Trainer


def check_streaming(folder: Path, model: dict[str, Any]) -> None:
    """Weights streamed through two buffers: the same run to the bit."""
    path, found = write_config(folder, model), []
    for place in ((), (*STREAMED, "memory.stream_buffers=2")):
        output = folder / ("streamed" if place else "resident")
        once = (f"output={output}", "train.iterations=1", "samples.count=1")
        trainer = Trainer.from_config(load_config(path, (*once, *place)))
        Run(trainer).train()
        found.append((weights(trainer), without_time(read_metrics(output))))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def check_blocks_run_in_order(config: ModelConfig) -> None:
    """As they lie in the model's module lists, last first when they are recomputed: what streaming looks ahead by."""
    model, embeddings = load_model(config), encode_prompts(config, PROMPTS)
    prepare_model(model.transformer, None, MemoryConfig(checkpointing="blocks"))
    lists = [child for child in model.transformer.children() if isinstance(child, nn.ModuleList)]
    blocks, ran = [block for members in lists for block in members], list[nn.Module]()
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: ran.append(block))
    model.velocity(model.draw_noise(SEEDS), torch.tensor([0.3, 0.8]), embeddings).sum().backward()
    assert ran == [*blocks, *reversed(blocks)]
