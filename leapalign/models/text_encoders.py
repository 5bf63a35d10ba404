"""Text encoders of a model's own pipeline, without the rest of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from leapalign.inputs.networks import read_network
from leapalign.inputs.prompt_limits import PromptLimit
from leapalign.inputs.validation import UserError, brief
from leapalign.models.folder import read_index

TextEncoder = Callable[[Sequence[str]], dict[str, Tensor]]
"""Some parts of the embeddings of prompts, see `leapalign.models.embeddings.PromptEmbeddings`."""


@dataclass(frozen=True)
class LimitedEncoder:
    """A `TextEncoder` that cuts prompts, and says where."""

    encode: TextEncoder
    prompt_limit: PromptLimit

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return self.encode(prompts)


def chat_text(tokenizer: Any, enable_thinking: bool) -> Callable[[str], str]:
    """What a language model reads of a prompt: the ``tokenizer``'s chat template around it."""
    return lambda prompt: tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
    )


SAMPLES, SAMPLE_BYTES = 64, 4096
"""Of a large file `fingerprint` reads so many blocks, evenly spaced, of so many bytes."""


def fingerprint(folder: str) -> str | None:
    """sha256 over the configs, tokenizers and (sampled) weights of the text encoders in ``folder``.

    None where they are not all there: deleted after their work, or in the hub's cache.
    """
    index = read_index(folder)
    names = [name for name, found in index.items() if name.startswith(("text_encoder", "tokenizer")) and found[0]]
    parts = [Path(folder) / name for name in sorted(names)]
    if not all(part.is_dir() for part in parts):
        return None
    digest = hashlib.sha256()
    for path in (path for part in parts for path in sorted(part.rglob("*")) if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(size // SAMPLES, SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def load_pipeline(kind: Any, folder: str, parts: Sequence[str], dtype: torch.dtype) -> Any:
    """The diffusers pipeline ``kind`` with nothing but ``parts``. Raises UserError where they cannot be read."""
    index = {name: found for name, found in read_index(folder).items() if isinstance(found, list | tuple)}
    missing = [name for name in parts if not index.get(name, [None])[0]]
    if missing:
        raise UserError(f"'{folder}' has no {missing[0]}, which prompts are encoded with; check model.path")
    given: dict[str, Any] = {name: None for name in index if name not in parts}
    for name in parts:
        part = _transformers_class(folder, name, *index[name])
        if issubclass(part, PreTrainedModel):
            given[name] = read_network(part, folder, dtype, f"the {name}", "model.path", name)
    try:
        return kind.from_pretrained(folder, **given)
    except Exception as error:  # what damaged files make the libraries raise has no common type
        raise UserError(f"cannot load text encoders from '{folder}' ({brief(error)}); check model.path") from None


def _transformers_class(folder: str, part: str, library: str, name: str) -> type[Any]:
    """The class of a part. Raises UserError where it is none of transformers: code of a folder is never run."""
    found = getattr(transformers, str(name), None) if library == "transformers" else None
    if not isinstance(found, type) or str(name).startswith("Auto"):
        raise UserError(
            f"'{folder}' names {library}.{name} for its {part}, which is no model or tokenizer of transformers, and "
            "code of a model folder is never run; check model.path"
        )
    return found
