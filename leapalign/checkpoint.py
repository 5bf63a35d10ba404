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

from leapalign.optim import Optimizer
from leapalign.validation import UserError, brief

TRANSFORMER = "transformer"
AVERAGE = "transformer_ema"


def step_folder(run: Path, iteration: int) -> Path:
    return run / "checkpoints" / f"step-{iteration}"


def latest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the highest iteration, None where there is none."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdecimal()]
    return max(found, key=lambda path: int(path.name[5:]), default=None)


def save_checkpoint(run: Path, iteration: int, transformer: Any, optimizer: Optimizer) -> Path:
    """Writes ``step-<iteration>`` beside its place and renames it, so that a checkpoint is whole or absent."""
    final = step_folder(run, iteration)
    partial = final.with_name(f"{final.name}.partial")
    for stale in (partial, final):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    transformer.save_pretrained(partial / TRANSFORMER)
    with optimizer.averaged_weights():
        transformer.save_pretrained(partial / AVERAGE)
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
        weights = read_weights(folder / TRANSFORMER)
        average = read_weights(folder / AVERAGE)
        tensors = load_file(folder / "optimizer.safetensors")
        with optimizer.changing_weights():
            transformer.load_state_dict(weights)
        names = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
        optimizer.load(tensors, state["optimizer"], [average[name] for name in names])
        return int(state["iteration"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"checkpoint '{folder}' cannot be resumed ({brief(error)}); delete it to resume from the one before"
        ) from None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in ``folder``."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors in {folder}")
    return {name: value for file in files for name, value in load_file(file).items()}
