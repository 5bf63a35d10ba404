"""A model's parts in diffusers layout: a folder of this machine, or a hub id."""

from __future__ import annotations

from typing import Any, Protocol

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from leapalign.inputs.hub import unreadable
from leapalign.inputs.networks import read_network, require_class


class Parts(Protocol):
    """Where a family's model gets its parts from: the folder or hub id ``path``."""

    path: str

    def holds(self, name: str) -> bool:
        """Whether there is a part called ``name``, such as ``vae``."""
        ...

    def part(self, kind: Any, name: str) -> Any:
        """The part called ``name``, of the diffusers class ``kind``. Raises UserError where it cannot be read."""
        ...


class ModelFolder:
    """Parts with their weights, in ``dtype``. Raises UserError where ``path`` is no model in diffusers layout."""

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        self.path, self._dtype = path, dtype

    def holds(self, name: str) -> bool:
        return holds(self.path, name)

    def part(self, kind: Any, name: str) -> Any:
        if issubclass(kind, ModelMixin):
            return read_network(kind, self.path, self._dtype, f"the {name}", "model.path", name)
        require_class(kind, self.path, f"the {name}", "model.path", name)
        try:
            return kind.from_pretrained(self.path, subfolder=name)
        except Exception as error:  # wrong values in a file make it raise anything
            raise unreadable(error, self.path, "model.path", f"cannot load the {name} of '{self.path}'") from None


def linear_widths(path: str) -> dict[str, int]:
    """The output features of each linear module of the transformer in a folder or hub id; no weights are read.

    Raises UserError where its configuration cannot be read.
    """
    named = _without_weights(path).named_modules()
    return {name: module.out_features for name, module in named if isinstance(module, nn.Linear)}


def takes_guidance(path: str) -> bool:
    """Whether the transformer in a folder or hub id was distilled to take a guidance scale as an input.

    No weights are read. Raises UserError where its configuration cannot be read.
    """
    return bool(getattr(_without_weights(path).config, "guidance_embeds", False))


def _without_weights(path: str) -> Any:
    """The transformer in a folder or hub id, on the device meta. Raises UserError for a bad configuration."""
    try:
        kind = getattr(diffusers, read_index(path)["transformer"][1])
        config = kind.load_config(path, subfolder="transformer")
        with torch.device("meta"):
            return kind.from_config(config)
    except Exception as error:  # wrong values in a config make the class raise anything
        raise unreadable(error, path, "model.path", f"cannot read the transformer of '{path}'") from None


def holds(path: str, name: str) -> bool:
    """Whether the model in a folder or hub id names a part ``name``. Raises UserError as `read_index`."""
    entry = read_index(path).get(name)
    return isinstance(entry, list | tuple) and bool(entry[0])


def read_index(path: str) -> dict[str, Any]:
    """The ``model_index.json`` of a folder or hub id: the pipeline's class, and of each part its library and class.

    Raises UserError where there is none.
    """
    try:
        index = dict(DiffusionPipeline.load_config(path))
    except (OSError, ValueError, TypeError) as error:
        otherwise = f"'{path}' is no model in diffusers layout, with a model_index.json"
        raise unreadable(error, path, "model.path", otherwise) from None
    # A part is a folder in this one: no path, which could lead elsewhere.
    return {name: value for name, value in index.items() if name.isidentifier() and _is_entry(value)}


def _is_entry(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and len(value) == 2)
