"""Prompt files, and the order in which a run visits them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from leapalign.validation import UserError


def read_prompts(path: Path) -> list[str]:
    """Prompts of a ``.jsonl`` file (key ``prompt``) or of a text file, one a line; blank lines are skipped.

    Raises UserError for a missing, unreadable or empty file and for a malformed line, naming it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read prompt file '{path}': {error.strerror}; check prompts.path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file '{path}' is not UTF-8 at byte {error.start}; re-encode it") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_prompt_of(line, f"{path}:{number}") for number, line in numbered]
    else:
        prompts = [line for _, line in numbered]
    if not prompts:
        raise UserError(f"prompt file '{path}' holds no prompts; give it at least one line")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON: {error.msg}") from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'{where} has no "prompt" text; each line must read {{"prompt": "..."}}')
    return prompt.strip()


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
