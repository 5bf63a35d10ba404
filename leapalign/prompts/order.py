"""The order in which a run visits its prompts, and by what their list is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np


class PromptOrder:
    """Which prompt the n-th image of a run gets: every epoch a new shuffle, a function of seed and n alone."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._epoch, self._order = -1, np.arange(0)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self._count)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._count)
        return int(self._order[offset])


def digest_of(prompts: Sequence[str]) -> str:
    """sha256 of a list of prompts, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
