"""How far two runs are apart, by their checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from leapalign.runs.checkpoint import step_folder

KINDS = ("transformer", "transformer_ema", "optimizer")


def tensors(run: Path, iteration: int, kind: str) -> dict[str, Tensor]:
    """Those of one of the `KINDS`."""
    checkpoint = step_folder(run, iteration)
    files = sorted((checkpoint / kind).glob("*.safetensors")) or [checkpoint / f"{kind}.safetensors"]
    return {name: value for file in files for name, value in load_file(file).items()}


def distance(a: Path, b: Path, iteration: int, kind: str) -> float:
    """The norm of their difference, relative to that of ``b``."""
    found, exact = tensors(a, iteration, kind), tensors(b, iteration, kind)
    assert found.keys() == exact.keys()
    assert all(found[name].shape == exact[name].shape and found[name].dtype == exact[name].dtype for name in exact)
    apart = math.sqrt(sum(float((found[name].double() - exact[name].double()).square().sum()) for name in exact))
    return apart / math.sqrt(sum(float(value.double().square().sum()) for value in exact.values()))


def same_bits(a: Path, b: Path, iteration: int) -> bool:
    """Whether their checkpoints hold the same tensors."""
    pairs = [(tensors(a, iteration, kind), tensors(b, iteration, kind)) for kind in KINDS]
    return all(x.keys() == y.keys() and all(bool((x[name] == y[name]).all()) for name in y) for x, y in pairs)
