"""How much of a prompt its readers take in, text encoders and rewards, and a word where they cut one."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from leapalign.inputs.validation import shortened

MOST_COUNTED = 2_000
"""Prompts, the longest ones; a tokenizer takes one to two seconds for them on one core."""
AT_ONCE = 64

_log = logging.getLogger("leapalign")


@dataclass(frozen=True)
class PromptLimit:
    """What a reader offers as ``prompt_limit`` where it cuts prompts."""

    tokens: int
    """The most that it reads of a prompt, special tokens included."""
    lengths: Callable[[Sequence[str]], list[int]]
    """Of each of some prompts in tokens, likewise, before it is cut."""

    @classmethod
    def of(cls, tokenizer: Any, tokens: int, text: Callable[[str], str] = str) -> PromptLimit:
        """For a reader that gives ``tokenizer`` the ``text`` of each prompt."""
        return cls(
            tokens,
            lambda prompts: [len(ids) for ids in tokenizer([text(one) for one in prompts], verbose=False).input_ids],
        )


def warn_of_cut(
    readers: Iterable[tuple[str, object]], prompts: Callable[[], Iterable[str]], what: str = "prompts"
) -> None:
    """Says of each of the named ``readers`` with a ``prompt_limit`` how many of ``prompts()`` it cuts, and names one.

    Of more than `MOST_COUNTED` those with the most characters are counted, and the number is a lower bound.
    """
    limited = [(name, limit) for name, reader in readers if (limit := getattr(reader, "prompt_limit", None))]
    if not limited:
        return
    sizes = np.fromiter(map(len, prompts()), np.int64)
    counted, bound = np.ones(len(sizes), bool), ""
    if len(sizes) > MOST_COUNTED:
        counted[np.argpartition(sizes, -MOST_COUNTED)[:-MOST_COUNTED]], bound = False, "at least "
    for name, limit in limited:
        cut, example = _cut(itertools.compress(prompts(), counted), limit)
        if cut:
            of = f"{bound}{cut:,} of {len(sizes):,} {what}"
            _log.warning("%s cuts %s at %d tokens, as %r", name, of, limit.tokens, example)


def _cut(prompts: Iterator[str], limit: PromptLimit) -> tuple[int, str]:
    """How many of ``prompts`` are longer than ``limit``, and the first of them, shortened."""
    cut, example = 0, ""
    while some := list(itertools.islice(prompts, AT_ONCE)):
        for prompt, length in zip(some, limit.lengths(some), strict=True):
            if length > limit.tokens:
                cut, example = cut + 1, example or shortened(prompt)
    return cut, example
