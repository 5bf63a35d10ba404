"""Turns outside values into dataclasses; what is wrong with them becomes one sentence with the remedy."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
SHOWN = 3
"""Names that a message gives of many."""


class UserError(ValueError):
    """Something the user can mend. The message is one sentence with the remedy; the command line exits with 2.

    Outside words in it may hold anything: it is kept to one line, without characters that a terminal would obey.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__(
            "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
        )


def shortened(text: str) -> str:
    """``text``, cut where it is longer than 80 characters."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def brief(error: BaseException) -> str:
    """The message of ``error`` in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def first_of(names: Sequence[str]) -> str:
    """The first `SHOWN` of ``names``, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for a near miss, else the list of what is valid."""
    options = sorted(valid)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; valid are: {', '.join(options)}"


def validated(
    cls: type[T], values: Mapping[str, Any], where: str, known_as: Callable[[str], str | None] = lambda _: None
) -> T:
    """The dataclass ``cls`` from ``values``, types and ranges checked; ``where`` names their place.

    known_as: what to write for an unknown key, where that is known. Raises UserError for an unknown key (naming the
    nearest valid one), a missing key, a wrong type or range.
    """
    _refuse_unknown_keys(cls, values, where, known_as)
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(error)}") from None


def _refuse_unknown_keys(
    cls: type[Any], values: Mapping[str, Any], where: str, known_as: Callable[[str], str | None], section: str = ""
) -> None:
    fields = get_type_hints(cls)
    for key, value in values.items():
        if key not in fields:
            known = known_as(str(key))
            advice = f"; {known}" if known else did_you_mean(str(key), fields)
            raise UserError(f"{where}: unknown key '{section}{shortened(str(key))}'{advice}")
        # A section, or one that may be left out.
        inner = next(filter(dataclasses.is_dataclass, (fields[key], *get_args(fields[key]))), None)
        if inner is not None and isinstance(value, Mapping):
            _refuse_unknown_keys(cast(type[Any], inner), value, where, known_as, f"{section}{key}.")


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    # Pydantic names the alternatives of a type, such as dict[str,any], in the place of a key, too.
    key = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
    reason = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in ("missing", "missing_argument"):
        return f"'{key}' is missing; add it"
    if not key:
        return reason
    if first["input"] is None:
        return f"'{key}' is empty, as ~ and null are; give it a value, or leave it out"
    given = f"'{key}' is {shortened(repr(first['input']))}"
    if first["type"] == "tuple_type":
        return f"{given}, and a list is needed; write [{shortened(str(first['input']))}]"
    if first["type"] in ("dataclass_type", "dict_type"):
        return f"{given}, and needs keys of its own; see leapalign config"
    return f"{given}: {reason[0].lower()}{reason[1:]}"
