"""Published reward checkpoints: found, read without running code, and checked key by key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from leapalign.inputs.hub import unreadable
from leapalign.inputs.networks import require_finite
from leapalign.inputs.validation import UserError, brief, first_of


def find_file(path: str, names: tuple[str, ...], setting: str = "reward.path") -> Path:
    """The file that ``path`` means: itself, the first of ``names`` in a folder, or ``names[0]`` of a hub repository.

    setting: the option that ``path`` comes from. Raises UserError where there is no such file.
    """
    local = Path(path)
    if os.path.isfile(local):  # unlike Path's, False for a path that can be none
        return local
    if os.path.isdir(local):
        found = [local / name for name in names if (local / name).is_file()]
        if not found:
            raise UserError(f"folder '{path}' holds no {' or '.join(names)}; put it there or change {setting}")
        return found[0]
    # A version in a hub id, as in "owner/reward-v2.1", is no suffix of a file.
    if local.suffix in {Path(name).suffix for name in names} or len(local.parts) != 2 or local.is_absolute():
        raise UserError(f"there is no file '{path}'; check {setting}")
    return _download(path, names[0], setting)


def _download(repository: str, name: str, setting: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError) as error:
        raise unreadable(error, repository, setting, f"cannot download {name} from '{repository}'") from None


def read_tensors(file: Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in ``file``, on the CPU: safetensors, or PyTorch's format with nothing but tensors allowed.

    key: where a PyTorch file keeps it, if it lies deeper. Raises UserError where the file cannot be read so, and where
    a number in it is not finite.
    """
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes may raise anything on the way through zip and unpickler
        raise UserError(f"cannot read weights from '{file}' ({brief(error)}); download the file again") from None
    if key is not None and isinstance(content, Mapping) and key in content:
        content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        where = f" at key '{key}'" if key else ""
        raise UserError(f"'{file}' holds no state dict{where}, only tensors by name will do; use the published file")
    require_finite(content.items(), f"'{file}'")
    return dict(content)


def check_fit(expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raises UserError naming ``file`` and the first keys that are missing, unexpected or of another shape."""
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    named = [f"{kind}: {first_of(names)}" for kind, names in faults.items() if names]
    if named:
        raise UserError(f"'{file}' is not of this model ({'; '.join(named)}); use the published file")


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Copies ``tensors`` into ``module``, cast to its dtypes. Raises UserError as `check_fit`."""
    check_fit({name: value.shape for name, value in module.state_dict().items()}, tensors, file)
    module.load_state_dict(tensors)
