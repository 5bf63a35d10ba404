"""Which column of a table, or key of an object, holds the prompts."""

from __future__ import annotations

from collections.abc import Sequence

from leapalign.inputs.validation import UserError, shortened

COLUMN = "prompt"
OTHERS = ("prompt", "prompts", "caption", "text")
"""What published files call it, capitals or not: PartiPrompts ``Prompt``, DrawBench ``Prompts``, Pick-a-Pic
``caption``."""


def prompt_column(names: Sequence[str], where: str) -> int:
    """The position of `COLUMN`, else of the only one of `OTHERS`, among ``names``.

    Raises UserError, which lists ``names``, where there is none, or a choice.
    """
    found = [position for position, name in enumerate(names) if name == COLUMN]
    found = found or [position for position, name in enumerate(names) if name.strip().lower() in OTHERS]
    if len(found) != 1:
        problem = f"several columns that could be '{COLUMN}'" if found else f"no column '{COLUMN}'"
        raise UserError(f"{where} has {problem} among {shortened(', '.join(names)) or 'none'}; rename one")
    return found[0]
