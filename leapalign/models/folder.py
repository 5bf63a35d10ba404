"""A model's parts in diffusers layout: a folder of this machine, or a hub id."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, ModelMixin

from leapalign.validation import UserError, brief


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
        self._index = read_index(path)

    def holds(self, name: str) -> bool:
        return bool(self._index.get(name, [None])[0])

    def part(self, kind: Any, name: str) -> Any:
        options = {"torch_dtype": self._dtype} if issubclass(kind, ModelMixin) else {}
        try:
            return kind.from_pretrained(self.path, subfolder=name, **options)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the {name} of '{self.path}' ({brief(error)}); check model.path") from None


def read_index(path: str) -> dict[str, Any]:
    """The ``model_index.json`` of a folder or hub id: the pipeline's class and its parts.

    Raises UserError where there is none.
    """
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{path}' is no model in diffusers layout, with a model_index.json ({brief(error)}); check model.path"
        ) from None
    return index
