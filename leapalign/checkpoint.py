"""Checkpoints: ``step-N/`` with the transformer and its average in diffusers layout, and the optimizer state.

Everything random in a run is a function of seed and iteration, so the iteration number is the RNG state.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from leapalign.models.lora import FILE as ADAPTER_FILE
from leapalign.models.lora import has_adapter, read_adapter, save_adapter
from leapalign.optim import Optimizer
from leapalign.validation import UserError, brief

TRANSFORMER = "transformer"
AVERAGE = "transformer_ema"
WEIGHTS = {"average": AVERAGE, "last": TRANSFORMER}
"""What a checkpoint holds, by the names that the command line has for it."""


def step_folder(run: Path, iteration: int) -> Path:
    return run / "checkpoints" / f"step-{iteration}"


def latest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the highest iteration, None where there is none."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdecimal()]
    return max(found, key=lambda path: int(path.name[5:]), default=None)


def run_weights(run: Path, name: str) -> Path:
    """The folder of the `WEIGHTS` called ``name`` in the latest checkpoint. Raises UserError where there is none."""
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise UserError(f"'{run}' holds no checkpoint yet; let it train longer, or use --config")
    return checkpoint / WEIGHTS[name]


def save_checkpoint(run: Path, iteration: int, transformer: Any, optimizer: Optimizer) -> Path:
    """Writes ``step-<iteration>`` beside its place and renames it, so that a checkpoint is whole or absent."""
    final = step_folder(run, iteration)
    partial = final.with_name(f"{final.name}.partial")
    for stale in (partial, final):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    save_weights(transformer, partial / TRANSFORMER)
    with optimizer.averaged_weights():
        save_weights(transformer, partial / AVERAGE)
    save_file(optimizer.tensors(), partial / "optimizer.safetensors")
    state = {"iteration": iteration, "optimizer": optimizer.scalars()}
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    os.replace(partial, final)
    return final


def load_checkpoint(folder: Path, transformer: Any, optimizer: Optimizer) -> int:
    """Restores weights, average and optimizer from ``folder``; returns the iteration.

    Raises UserError where the files are missing, damaged, or of another model or optimizer.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        average = read_weights(folder / AVERAGE)
        tensors = load_file(folder / "optimizer.safetensors")
        with optimizer.changing_weights():
            load_weights(transformer, folder / TRANSFORMER)
        names = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
        optimizer.load(tensors, state["optimizer"], [average[name] for name in names])
        return int(state["iteration"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"checkpoint '{folder}' cannot be resumed ({brief(error)}); delete it to resume from the one before"
        ) from None


def save_weights(transformer: Any, folder: Path) -> None:
    """What is trained, as diffusers reads it: the transformer, or its adapter."""
    if has_adapter(transformer):
        save_adapter(transformer, folder)
    else:
        transformer.save_pretrained(folder)


def load_weights(transformer: Any, folder: Path) -> None:
    """Sets what is trained to what `save_weights` wrote. Raises RuntimeError for weights of another model."""
    values = read_weights(folder)
    missing, unexpected = transformer.load_state_dict(values, strict=not has_adapter(transformer))
    lost = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad} & set(missing)
    if lost or unexpected:
        raise RuntimeError(
            f"its adapter has {sorted([*unexpected, *lost])[0]}, the model has not, or the other way round"
        )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in ``folder``, by the names of the transformer's parameters."""
    if (folder / ADAPTER_FILE).exists():
        return read_adapter(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors in {folder}")
    return {name: value for file in files for name, value in load_file(file).items()}
