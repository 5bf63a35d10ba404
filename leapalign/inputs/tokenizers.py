"""Tokenizers of transformers from their folders: with a vocabulary, and no code run."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from leapalign.inputs.hub import unreadable


def read_tokenizer(path: str, what: str, setting: str, part: str = "", kind: Any = AutoTokenizer) -> Any:
    """A tokenizer of the class ``kind`` from a folder or hub id, or from its folder ``part``.

    what: names it in messages. setting: the option that ``path`` comes from. Raises UserError where files are missing,
    damaged, or need a library that is not there.
    """
    try:
        tokenizer = kind.from_pretrained(path, subfolder=part, trust_remote_code=False)
        # Transformers takes a folder without vocabulary for a tokenizer that knows no words.
        if tokenizer("a").input_ids == tokenizer("b").input_ids:
            raise ValueError("there is no vocabulary in its files")
    except Exception as error:  # what damaged files make the library raise has no common type
        raise unreadable(error, path, setting, f"cannot load {what} of '{path}'") from None
    return tokenizer
