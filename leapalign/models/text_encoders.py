"""Text encoders of a model's own pipeline, without the rest of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from leapalign.models.folder import read_index
from leapalign.validation import UserError, brief

TextEncoder = Callable[[Sequence[str]], dict[str, Tensor]]
"""Some parts of the embeddings of prompts, see `leapalign.models.embeddings.PromptEmbeddings`."""


def load_pipeline(kind: Any, folder: str, parts: Sequence[str], dtype: torch.dtype) -> Any:
    """The diffusers pipeline ``kind`` with nothing but ``parts``. Raises UserError where they cannot be read."""
    absent = {name: None for name, found in read_index(folder).items() if isinstance(found, list) and name not in parts}
    try:
        return kind.from_pretrained(folder, torch_dtype=dtype, **absent)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load text encoders from '{folder}' ({brief(error)}); check model.path") from None
