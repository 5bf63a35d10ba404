"""Text encoders of a model's own pipeline, without the rest of it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from leapalign.inputs.networks import read_network, require_whole_files
from leapalign.inputs.prompt_limits import PromptLimit
from leapalign.inputs.tokenizers import read_tokenizer
from leapalign.inputs.validation import UserError
from leapalign.memory.blocks import in_lists
from leapalign.memory.quantization import quantize
from leapalign.models.folder import holds, read_index

TextEncoder = Callable[[Sequence[str]], dict[str, Tensor]]
"""Some parts of the embeddings of prompts, see `leapalign.models.embeddings.PromptEmbeddings`."""
Encoding = Callable[[Any], TextEncoder]
"""Makes a text encoder of a pipeline."""


@dataclass(frozen=True)
class Residence:
    """Where text encoders are, and how."""

    device: torch.device
    dtype: torch.dtype
    """What they compute in."""
    quantization: str | None = None
    """Of their blocks' matrices, one of `leapalign.memory.quantization.KINDS`."""


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


ENCODER_QUANTIZATION = "--quantization"
SAMPLES, SAMPLE_BYTES = 64, 4096
"""Of a large file `fingerprint` reads so many blocks, evenly spaced, of so many bytes."""


def fingerprint(folder: str) -> str | None:
    """sha256 over the configs, tokenizers and (sampled) weights of the text encoders in ``folder``.

    None where they are not all there: left out, deleted after their work, or in the hub's cache.
    """
    index = read_index(folder)
    names = [name for name, found in index.items() if name.startswith(("text_encoder", "tokenizer")) and found[0]]
    parts = [Path(folder) / name for name in sorted(names)]
    if not parts or not all(part.is_dir() for part in parts):
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


def loaded_in_turn(
    kind: Any,
    folder: str,
    encoders: Sequence[tuple[Sequence[str], Encoding]],
    residence: Residence,
) -> Iterator[TextEncoder]:
    """The text encoders of the diffusers pipeline ``kind`` in a folder or hub id, each gone when the next is loaded.

    encoders: of each its parts, such as ``("text_encoder", "tokenizer")``, and what makes it of the pipeline with
    nothing but these. Raises UserError where one is not there, and where one cannot be read; of this, before the first
    is loaded, what can be known without reading weights.
    """
    found: dict[str, Any] = {}
    for name in (name for parts, _ in encoders for name in parts):
        part = _class_of(folder, name)
        if not issubclass(part, PreTrainedModel):
            part = read_tokenizer(folder, f"the {name}", "model.path", name, part)
        found[name] = part
    return (
        make(_placed(load_pipeline(kind, folder, {name: found[name] for name in parts}, residence.dtype), residence))
        for parts, make in encoders
    )


def _placed(pipeline: Any, residence: Residence) -> Any:
    """``pipeline`` with its text encoders where they compute, of so many bits."""
    if residence.quantization is not None:
        for encoder in (part for part in pipeline.components.values() if isinstance(part, PreTrainedModel)):
            inside = partial(in_lists, encoder)
            quantize(encoder, residence.quantization, residence.device, inside, ENCODER_QUANTIZATION)
    return pipeline.to(residence.device)


def load_pipeline(kind: Any, folder: str, parts: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The diffusers pipeline ``kind`` with nothing but ``parts``: tokenizers, and the classes of text encoders.

    Raises UserError where weights cannot be read.
    """
    given = dict.fromkeys(inspect.signature(kind).parameters) | dict(parts)
    for name, part in parts.items():
        if isinstance(part, type):
            given[name] = read_network(part, folder, dtype, f"the {name}", "model.path", name)
    return kind(**given)


def _class_of(folder: str, name: str) -> type[Any]:
    """The class of a text encoder, which is there and whole, or of a tokenizer. Raises UserError where it is not."""
    local = Path(folder) / name
    if not holds(folder, name) or (Path(folder).is_dir() and not local.is_dir()):
        raise UserError(
            f"'{folder}' has no {name}, which prompts are encoded with; set model.path to the complete folder, or "
            "prompts.cache to what leapalign cache made of the prompts with it"
        )
    found = _transformers_class(folder, name, *read_index(folder)[name])
    if issubclass(found, PreTrainedModel) and local.is_dir():
        if not any(local.glob("*.safetensors")):
            raise UserError(f"'{local}' holds no safetensors; finish the download")
        require_whole_files(local)
    return found


def _transformers_class(folder: str, part: str, library: str, name: str) -> type[Any]:
    """The class of a part. Raises UserError where it is none of transformers: code of a folder is never run.

    Of a processor its tokenizer's: there are no images for it, and without torchvision some cannot be loaded.
    """
    if library == "transformers" and str(name).endswith("Processor"):
        return AutoTokenizer
    found = getattr(transformers, str(name), None) if library == "transformers" else None
    if not isinstance(found, type) or str(name).startswith("Auto"):
        raise UserError(
            f"'{folder}' names {library}.{name} for its {part}, which is no model or tokenizer of transformers, and "
            "code of a model folder is never run; check model.path"
        )
    return found
