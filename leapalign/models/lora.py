"""Low-rank adapters (arXiv 2106.09685) by peft: the model stays as it is, and small matrices beside it are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

from leapalign.config import ModelConfig
from leapalign.inputs.validation import UserError
from leapalign.storage.modes import save_file
from leapalign.streams import ADAPTER_STREAM, seed_of

ADAPTER = "default"
FILE = "pytorch_lora_weights.safetensors"
_PREFIX = "transformer."
"""Diffusers' pipelines find a transformer's adapter under this name."""


def add_adapter(transformer: Any, config: ModelConfig) -> None:
    """Freezes ``transformer`` and adds matrices of ``config.lora_rank``, in float32, which change nothing at first.

    Their scale is 1. Without ``config.lora_targets`` every linear layer of the blocks gets them, but for modulation.
    Raises UserError where no layer matches.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    if config.lora_targets:
        targets = [name for name in linear if name.endswith(config.lora_targets)]
    else:
        blocks = tuple(f"{name}." for name, child in transformer.named_children() if isinstance(child, nn.ModuleList))
        targets = [name for name in linear if name.startswith(blocks) and not _modulates(name)]
    if not targets:
        raise UserError(
            f"no linear layer of the transformer ends with {' or '.join(config.lora_targets)}; correct "
            f"model.lora_targets, such as to_q"
        )
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(0, ADAPTER_STREAM, config.lora_rank))
        adapter = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=targets)
        inject_adapter_in_model(adapter, transformer, ADAPTER)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _modulates(name: str) -> bool:
    return any(part.startswith("norm") or "mod" in part for part in name.split("."))


def has_adapter(transformer: Any) -> bool:
    return bool(getattr(transformer, "peft_config", None))


def save_adapter(transformer: Any, folder: Path) -> None:
    """Writes what diffusers' ``pipeline.load_lora_weights(folder)`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        _PREFIX + name.replace(f".{ADAPTER}.", "."): parameter.detach().to("cpu").contiguous()
        for name, parameter in transformer.named_parameters()
        if parameter.requires_grad
    }
    save_file(named, folder / FILE, metadata={"format": "pt"})


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """What `save_adapter` wrote, by the names of the transformer's parameters."""
    return {name.replace(".weight", f".{ADAPTER}.weight"): value for name, value in read_matrices(folder).items()}


def read_matrices(folder: Path) -> dict[str, Tensor]:
    """The same as ``<module>.lora_A.weight (rank, in)`` and ``<module>.lora_B.weight (out, rank)``."""
    return {name.removeprefix(_PREFIX): value for name, value in load_file(folder / FILE).items()}
