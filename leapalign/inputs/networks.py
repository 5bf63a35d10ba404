"""Networks of diffusers and transformers from their folders: of the class asked for, whole, finite, and no code run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from safetensors import safe_open
from torch import Tensor

from leapalign.inputs.hub import unreadable
from leapalign.inputs.validation import UserError, brief, first_of


def read_network(kind: Any, path: str, dtype: torch.dtype, what: str, setting: str, part: str = "") -> Any:
    """A network of the class ``kind`` in ``dtype``, from safetensors in a folder or hub id, or in its folder ``part``.

    what: names it in messages. setting: the option that ``path`` comes from. Raises UserError where files are missing,
    damaged, of another class or of other sizes, and where a weight is not a finite number.
    """
    require_class(kind, path, what, setting, part)
    require_whole_files(Path(path) / part)
    # Diffusers before 0.42 knows dtype by no other name. Transformers would not name what does not match.
    own = {"torch_dtype": dtype} if issubclass(kind, ModelMixin) else {"dtype": dtype, "ignore_mismatched_sizes": True}
    options: dict[str, Any] = {**own, "subfolder": part} if part else own
    try:
        network, found = kind.from_pretrained(path, output_loading_info=True, use_safetensors=True, **options)
    except Exception as error:  # what damaged files make the libraries raise has no common type
        raise unreadable(error, path, setting, f"cannot load {what} of '{path}'") from None
    faults = {
        "missing": list(found["missing_keys"]),
        "of another shape": [f"{name} {tuple(there)}" for name, there, *_ in found["mismatched_keys"]],
        # Of a network that is only used, more weights than it needs are no fault.
        "unexpected": list(found["unexpected_keys"]) if part == "transformer" else [],
    }
    named = "; ".join(f"{fault}: {first_of(sorted(names))}" for fault, names in faults.items() if names)
    if named:
        raise UserError(f"the weights of {what} of '{path}' do not fit its config.json ({named}); download both again")
    require_finite(network.state_dict(keep_vars=True).items(), f"{what} of '{path}'")
    return network


def require_class(kind: Any, path: str, what: str, setting: str, part: str) -> None:
    """Raises UserError where the config of diffusers' ``part`` of ``path`` cannot be read or names another class."""
    if not issubclass(kind, ConfigMixin):
        return
    try:
        named = kind.load_config(path, subfolder=part).get("_class_name", kind.__name__)
    except Exception as error:  # as above
        raise unreadable(error, path, setting, f"cannot load {what} of '{path}'") from None
    if named != kind.__name__:
        raise UserError(f"{what} of '{path}' is a {named}, and {kind.__name__} is needed; check {setting}")


def require_whole_files(folder: Path) -> None:
    """Raises UserError where a safetensors file in ``folder`` is cut off, or one that an index names is missing.

    Reads headers alone; of a hub id, nothing.
    """
    try:
        for index in folder.glob("*.safetensors.index.json"):
            for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values())):
                if not (folder / name).is_file():
                    raise UserError(f"'{folder / name}' is missing, which {index.name} names; finish the download")
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt"):
                pass
    except UserError:
        raise
    except Exception as error:  # of JSON, of what is in it, or of safetensors
        raise UserError(f"the weights in '{folder}' are damaged ({brief(error)}); download them again") from None


@torch.no_grad()
def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raises UserError naming the first of the named ``tensors`` that holds NaN or an infinite number.

    Takes as long as reading them from memory: 24 GB in about 3 seconds.
    """
    for name, tensor in tensors:
        # Smallest and largest are NaN where any number is.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise UserError(f"{name} in {where} holds NaN or infinite numbers; download the weights again")
