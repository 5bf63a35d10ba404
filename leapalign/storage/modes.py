"""Files that whoever the umask lets may read: those that libraries write, and copies, too.

safetensors writes a temporary file, which only its owner may read, and gives it the name asked for: its mode stays
0600 under every umask. Diffusers and transformers save through it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes contiguous ``tensors`` and ``metadata`` as safetensors."""
    safetensors.torch.save_file(dict(tensors), path, dict(metadata) if metadata else None)
    _follow_umask(path)


def save_pretrained(part: Any, folder: Path) -> None:
    """Has a network, tokenizer or scheduler of diffusers or transformers write itself to ``folder``."""
    part.save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        _follow_umask(path)


def copy(source: Path, target: Path) -> None:
    """Copies a file, or a folder and all in it, but for its modes; links become what they lead to."""
    if source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            copy(path, target / path.name)
    else:
        shutil.copyfile(source, target)


def _follow_umask(file: Path) -> None:
    mask = os.umask(0o077)  # there is no way to read it but to set it
    os.umask(mask)
    file.chmod(0o666 & ~mask)
