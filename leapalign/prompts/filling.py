"""Fills a prompt cache: the prompts of a file stream through one text encoder after the other."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from leapalign.config import ModelConfig
from leapalign.inputs.prompt_limits import warn_of_cut
from leapalign.models import encoded, negative_prompts, text_dtype, text_encoders
from leapalign.models.embeddings import joined
from leapalign.models.text_encoders import TextEncoder
from leapalign.prompts.cache import PromptCache, hash_of
from leapalign.prompts.files import iter_prompts
from leapalign.reports.progress import progress

SHARD_ROWS = 64
"""Prompts in a shard, and the most whose encoding a kill undoes: 256 MiB of FLUX.1's."""


def fill_cache(
    folder: Path, config: ModelConfig, prompts: Path, device: torch.device, quantization: str | None = None
) -> dict[str, Any]:
    """Encodes on ``device`` the prompts of a file, and the negative one for guidance, that ``folder`` lacks.

    The file is read once for its check and once a text encoder; its hashes are in memory, its prompts are not.
    quantization: as of `text_encoders`. Returns how many prompts were ``encoded`` and ``reused`` (done by every text
    encoder before), the same for each of the ``encoders``, ``seconds``, and the cache's ``bytes``. Raises UserError,
    before any encoding where that is possible, and where another process fills the folder.
    """
    started = time.perf_counter()

    def texts() -> Iterator[str]:
        return itertools.chain(iter_prompts(prompts), negative_prompts(config))

    wanted = {hash_of(text) for text in texts()}
    cache = PromptCache(folder)
    # One that is full needs none, and a new one is not begun without them.
    load = partial(text_encoders, config, device, quantization)
    encoders = None if cache.is_begun() else load()
    dtype = str(text_dtype(config, device)).removeprefix("torch.")
    with cache.being_filled():
        manifest = cache.begin(config, dtype, quantization)
        held = [cache.held(encoder) & wanted for encoder in range(len(manifest.encoders or ()))]
        if not held or any(done != wanted for done in held):
            held = []
            for encode in encoders or load():
                held.append(_fill(cache, len(held), encode, texts, wanted))
                del encode  # or two text encoders would be there at once
            shapes = [cache.row_shapes(number) for number in range(len(held))]
            cache.write_manifest(dataclasses.replace(manifest, encoders=shapes))
    reused = len(set.intersection(*held))
    return {
        "encoded": len(wanted) - reused,
        "reused": reused,
        "encoders": [{"encoded": len(wanted) - len(done), "reused": len(done)} for done in held],
        "seconds": time.perf_counter() - started,
        "bytes": cache.size(),
    }


def _fill(
    cache: PromptCache, number: int, encode: TextEncoder, texts: Callable[[], Iterator[str]], wanted: set[bytes]
) -> set[bytes]:
    """Has the text encoder of that number encode what is missing; returns the hashes of what was not."""
    name = f"text encoder {number + 1}"
    warn_of_cut([(name, encode)], texts)
    held = cache.held(number) & wanted
    missing = _missing(texts(), held)
    with progress(name, len(wanted) - len(held), "prompt") as bar:
        while rows := list(itertools.islice(missing, SHARD_ROWS)):
            cache.add(number, [digest for digest, _ in rows], joined(list(encoded(encode, [text for _, text in rows]))))
            bar.update(len(rows))
    return held


def _missing(texts: Iterator[str], held: set[bytes]) -> Iterator[tuple[bytes, str]]:
    """Each of ``texts`` that is not ``held``, once, with its hash."""
    seen = set(held)
    for text in texts:
        digest = hash_of(text)
        if digest not in seen:
            seen.add(digest)
            yield digest, text
