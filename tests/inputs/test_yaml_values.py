"""YAML as plain data: what is no such thing is one sentence, soon."""

from __future__ import annotations

import time

import pytest

from leapalign.inputs.validation import UserError
from leapalign.inputs.yaml_values import yaml_values

BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))])


def test_plain_data_are_as_written() -> None:
    text = "a: {b: [1, 2.5, x], c: null}\nd: yes\ne: 1e-4\n"
    assert yaml_values(text, "file") == {"a": {"b": [1, 2.5, "x"], "c": None}, "d": True, "e": "1e-4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "an alias; write its value out in line 2"),
        ("<<: &a {b: 1}\nc: *a", "an alias"),
        ("a: 1\nb: 2\na: 3", "a key that is given twice in line 1"),
        ("[" * 5000, "nesting deeper than 16 levels"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: 0x" + "f" * 40, "a number of more than 64 bits"),
        ("a: 2001-99-99", "not valid YAML: month must be in 1..12"),
        ("!!bool x", "not valid YAML"),
        ("!!timestamp x", "not valid YAML"),
        ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ('a: "\\0"', "a NUL character"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ("a: " + "x " * 3000, "a text of more than 4,096 characters"),
        ("# " + "x" * 2**16, "longer than 65,536 characters"),
        ("a: [1", "not valid YAML"),
        ("{[a]: 1}", "unhashable key"),
    ],
)
def test_all_else_is_one_sentence_soon(text: str, message: str) -> None:
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        yaml_values(text, "file")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.process_time() - started < 1
