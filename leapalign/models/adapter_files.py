"""Files of low-rank adapters: in diffusers' layout, as checkpoints have them, and in PEFT's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from leapalign.inputs.hub import unreadable
from leapalign.inputs.networks import require_finite
from leapalign.inputs.validation import UserError, brief, shortened
from leapalign.storage.modes import save_file

FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "transformer."
"""Diffusers' pipelines find a transformer's adapter under this name."""
_PEFT_PREFIX = "base_model.model."
_SETTINGS = "lora_adapter_metadata"
"""Where in a file's header diffusers keeps rank, alpha and targets; without it, alpha is the rank."""
_OTHERWISE = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")
"""Settings of PEFT under which an adapter is more than ``alpha / rank B A`` of one rank and alpha."""
_DOWN, _UP, _ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"


@dataclass(frozen=True)
class Adapter:
    """Adds ``alpha / rank B A`` to the weights of linear layers.

    matrices: ``<module>.lora_A.weight (rank, in)`` and ``<module>.lora_B.weight (out, rank)``.
    """

    rank: int
    alpha: float
    matrices: dict[str, Tensor]

    @property
    def modules(self) -> list[str]:
        """The names of the layers, sorted."""
        return sorted(name.removesuffix(_DOWN) for name in self.matrices if name.endswith(_DOWN))


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Writes what diffusers' ``pipeline.load_lora_weights(folder)`` reads, and scales alike."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": adapter.modules}
    header = {"format": "pt", _SETTINGS: json.dumps({f"{PREFIX}{key}": value for key, value in settings.items()})}
    save_file({f"{PREFIX}{name}": value for name, value in adapter.matrices.items()}, folder / FILE, metadata=header)


def read_adapter(folder: Path) -> Adapter:
    """The adapter in diffusers' layout in ``folder``. Raises UserError where it is none, or more than `Adapter` is."""
    file = folder / FILE
    with safe_open(file, "pt") as opened:
        written = json.loads((opened.metadata() or {}).get(_SETTINGS, "{}"))
    settings = {key.removeprefix(PREFIX): value for key, value in written.items()}
    return _adapter(load_file(file), PREFIX, settings, file)


def published_adapter(path: str) -> Adapter:
    """The adapter in the folder or hub id ``path``, in the layout of diffusers or PEFT.

    Raises UserError, naming ``model.lora_path``, where there is none, or one that is more than `Adapter` is.
    """
    if Path(path).is_file():
        raise UserError(f"'{path}' is a file; set model.lora_path to the folder that it lies in")
    try:
        if (file := _file(path, FILE)) is not None:
            found = read_adapter(file.parent)
        elif (file := _file(path, PEFT_FILE)) is not None and (config := _file(path, PEFT_CONFIG)) is not None:
            found = _adapter(load_file(file), _PEFT_PREFIX, json.loads(config.read_bytes()), file)
        else:
            raise UserError(
                f"'{path}' holds neither {FILE} nor {PEFT_FILE} with {PEFT_CONFIG}; set model.lora_path to a folder or "
                "hub id with an adapter in the layout of diffusers or PEFT"
            )
    except UserError:
        raise
    except Exception as error:  # damaged bytes may raise anything on the way through JSON and safetensors
        raise UserError(f"cannot read the adapter in '{path}' ({brief(error)}); check model.lora_path") from None
    require_finite(found.matrices.items(), f"'{path}'")
    return found


def _file(path: str, name: str) -> Path | None:
    """The file ``name`` of a folder or hub id, None where it has none. Raises UserError as `unreadable` says."""
    if os.path.isdir(path):
        return Path(path) / name if (Path(path) / name).is_file() else None
    try:
        return Path(hf_hub_download(path, name))
    except LocalEntryNotFoundError as error:
        # In the cache may be the other layout: without a network nobody can tell.
        if name == FILE:
            return None
        raise unreadable(error, path, "model.lora_path", f"cannot read the adapter '{path}'") from None
    except EntryNotFoundError:
        return None
    except Exception as error:  # what HTTP and a connection make the client raise has no common type
        raise unreadable(error, path, "model.lora_path", f"cannot read the adapter '{path}'") from None


def _adapter(tensors: Mapping[str, Tensor], prefix: str, settings: Mapping[str, Any], file: Path) -> Adapter:
    """That of ``tensors``, whose names begin with ``prefix``. Raises UserError where it is more than `Adapter` is."""
    named = {name.removeprefix(prefix): value for name, value in tensors.items()}
    alphas = {float(value) for name, value in named.items() if name.endswith(_ALPHA)}
    matrices = {name: value for name, value in named.items() if not name.endswith(_ALPHA)}
    strange = [n for n in tensors if not n.startswith(prefix) or not n.endswith((_DOWN, _UP, _ALPHA))]
    modules = [{name.removesuffix(end) for name in matrices if name.endswith(end)} for end in (_DOWN, _UP)]
    if strange or not matrices or modules[0] != modules[1]:
        what = f"'{shortened(strange[0])}' is none of its names" if strange else "matrices are missing"
        raise UserError(
            f"'{file}' is no adapter in the layout of diffusers or PEFT ({what}); convert it with diffusers"
        )
    beyond = [key for key in _OTHERWISE if settings.get(key)]
    ranks = {value.shape[0] for name, value in matrices.items() if name.endswith(_DOWN)}
    alphas |= {float(settings["lora_alpha"])} if "lora_alpha" in settings else set()
    if beyond or len(ranks) > 1 or len(alphas) > 1:
        what = beyond[0] if beyond else "several ranks" if len(ranks) > 1 else "several alphas"
        raise UserError(f"'{file}' has {what}; only adapters of one rank and alpha can be trained on, choose another")
    rank = ranks.pop()
    return Adapter(rank, alphas.pop() if alphas else float(rank), matrices)
