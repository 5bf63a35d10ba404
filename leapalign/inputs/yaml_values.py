"""YAML as plain data: by the safe loader, within bounds, every key once and written out."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from leapalign.inputs.validation import UserError, brief

LONGEST = 2**16
"""Bytes, or characters; PyYAML reads so many in well under a second."""
DEEPEST = 16
"""Levels of nesting; a config has four."""
LONGEST_TEXT = 2**12
"""Characters of one value; no path is longer."""
_LARGEST = 2**63


def yaml_values(text: str, where: str) -> Any:
    """What ``text`` says. ``where`` names it, and begins the sentence of what is raised.

    Raises UserError for what is no YAML, for tags that build objects, and beyond plain data: aliases, which can stand
    for more than memory holds, keys that are given twice, numbers of more than 64 bits, long texts, NUL characters.
    """
    if len(text) > LONGEST:
        raise UserError(f"{where} is longer than {LONGEST:,} characters; shorten it, or check that it is the right one")
    try:
        return yaml.load(text, _PlainLoader)
    except Exception as error:  # a tag before the wrong value makes PyYAML raise anything
        reason = _reason(error) if isinstance(error, yaml.MarkedYAMLError) else brief(error)
        raise UserError(f"{where} is not valid YAML: {reason}; correct it") from None


def _reason(error: yaml.MarkedYAMLError) -> str:
    place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
    return f"{error.problem}{place}"


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with less to load."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise self._refusal("an alias; write its value out", self.peek_event())
        if self._depth == DEEPEST:
            raise self._refusal(f"nesting deeper than {DEEPEST} levels", self.peek_event())
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        values: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        if len(values) < len(node.value):
            raise self._refusal("a key that is given twice", node)
        return values

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number: int = super().construct_yaml_int(node)
        if not -_LARGEST <= number < _LARGEST:
            raise self._refusal("a number of more than 64 bits", node)
        return number

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text: str = super().construct_yaml_str(node)
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise self._refusal("a NUL character or half of a surrogate pair", node)
        if len(text) > LONGEST_TEXT:
            raise self._refusal(f"a text of more than {LONGEST_TEXT:,} characters", node)
        return text

    @staticmethod
    def _refusal(problem: str, place: Any) -> yaml.MarkedYAMLError:
        return yaml.constructor.ConstructorError(problem=problem, problem_mark=place.start_mark)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
_PlainLoader.add_constructor("tag:yaml.org,2002:str", _PlainLoader.construct_yaml_str)
