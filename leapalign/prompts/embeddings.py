"""Embeddings of prompts for a run: from a cache on disk, else by the model's text encoders."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leapalign.config import Config, ModelConfig
from leapalign.inputs.validation import UserError, shortened
from leapalign.models import encode_prompts, guided, negative_prompts
from leapalign.models.embeddings import PromptEmbeddings, joined
from leapalign.prompts.cache import REMEDY, PromptCache, hash_of, hashes_in, opened, parts_in


class MissingPrompts(UserError):
    """A cache lacks some of the prompts that are asked for."""


class CachedEmbeddings:
    """Embeddings of ``prompts`` from a cache, indexable by sample; rows are read when they are asked for.

    Raises UserError where the cache is of another model, damaged or unfinished, and MissingPrompts.
    """

    def __init__(self, folder: Path, config: ModelConfig, prompts: Sequence[str]) -> None:
        cache = PromptCache(folder)
        encoders = cache.manifest(config).encoders
        if encoders is None:
            raise UserError(f"the prompt cache '{folder}' is unfinished; {REMEDY} {folder}")
        self._count = len(prompts)
        hashes = [hash_of(prompt) for prompt in prompts]
        self._places = []
        for encoder in range(len(encoders)):
            held = {
                digest: Place(shard, row)
                for shard in cache.shards(encoder)
                for row, digest in enumerate(hashes_in(shard))
            }
            missing = [prompt for prompt, digest in zip(prompts, hashes, strict=True) if digest not in held]
            if missing:
                raise MissingPrompts(
                    f"the prompt cache '{folder}' lacks {len(missing)} of {len(prompts)} prompts, the first being "
                    f"{shortened(missing[0])!r}; {REMEDY} {folder}, or set prompts.cache=null"
                )
            self._places.append([held[digest] for digest in hashes])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, samples: Tensor | slice) -> PromptEmbeddings:
        """In host memory, in the order asked for; shorter texts are padded to the longest."""
        chosen = torch.arange(self._count)[samples].tolist()
        parts: dict[str, Tensor] = {}
        for places in self._places:
            parts |= _read([places[sample] for sample in chosen]).parts
        return PromptEmbeddings(parts)


class Place(NamedTuple):
    """Where a prompt's row lies."""

    shard: Path
    row: int


def _read(places: Sequence[Place]) -> PromptEmbeddings:
    """The rows at ``places``, each shard opened once."""
    rows: dict[Place, PromptEmbeddings] = {}
    for shard, group in itertools.groupby(sorted(set(places)), lambda place: place.shard):
        with opened(shard) as file:
            for place in group:
                row = slice(place.row, place.row + 1)
                found = {name: file.get_slice(name)[row] for name in parts_in(file)}
                rows[place] = PromptEmbeddings(found)
    return joined([rows[place] for place in places])


def embeddings_of(config: Config, prompts: Sequence[str], what: str = "prompts") -> Any:
    """Those of ``prompts`` and of the negative prompt: from ``prompts.cache``, else by the text encoders.

    what: names ``prompts`` where a text encoder cuts some. Raises UserError where there are neither.
    """
    if config.prompts.cache is None:
        return encode_prompts(config.model, prompts, what)
    folder, model = Path(config.prompts.cache), config.model
    return guided(
        model,
        CachedEmbeddings(folder, model, prompts),
        CachedEmbeddings(folder, model, negative_prompts(model)),
    )


def embeddings_to_sample(config: Config, prompts: Sequence[str]) -> Any:
    """`embeddings_of`; where the cache lacks some all are encoded, by text encoders of as many bits as the cache's, if
    the model has them."""
    try:
        return embeddings_of(config, prompts)
    except MissingPrompts as missing:
        try:
            return encode_prompts(config.model, prompts, quantization=_quantization(config))
        except UserError:
            raise missing from None


def _quantization(config: Config) -> str | None:
    """Of the text encoders that filled the cache."""
    assert config.prompts.cache is not None, "prompts are missing from it"
    return PromptCache(Path(config.prompts.cache)).manifest(config.model).quantization
