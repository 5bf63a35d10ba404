"""How much of a prompt a family reads."""

from __future__ import annotations

from dataclasses import dataclass

from leapalign.inputs.validation import UserError


@dataclass(frozen=True)
class TextLength:
    """Tokens of a prompt, to the text encoder that reads most; a folder's tokenizer may say less.

    default: as the family's pipeline has it. longest: what that takes.
    """

    default: int
    longest: int

    def of(self, asked: int | None) -> int:
        """What is ``asked`` for, else the default. Raises UserError where it is too long."""
        if asked is not None and asked > self.longest:
            raise UserError(
                f"model.max_sequence_length {asked} is more than the model takes; set it to at most {self.longest}"
            )
        return asked or self.default
