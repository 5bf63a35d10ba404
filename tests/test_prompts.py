from __future__ import annotations

from pathlib import Path

import pytest

from leapalign.prompts import PromptOrder, read_prompts
from leapalign.validation import UserError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_and_json_lines(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "a.txt", "a cat\n\n  a dog \n")) == ["a cat", "a dog"]
    lines = '{"prompt": "a cat", "tag": 1}\n{"prompt": "a dog"}\n'
    assert read_prompts(write(tmp_path / "a.jsonl", lines)) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.jsonl", "", "holds no prompts"),
        ("a.txt", b"caf\xe9\n", "not UTF-8 at byte 3"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "a.jsonl:2 is not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n', 'a.jsonl:1 has no "prompt"'),
        ("a.jsonl", "[1]\n", 'a.jsonl:1 has no "prompt"'),
        ("a.jsonl", '{"prompt": 3}\n', 'a.jsonl:1 has no "prompt"'),
    ],
)
def test_unusable_files_are_one_sentence(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path / name, content))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"check prompts\.path"):
        read_prompts(tmp_path / "none.txt")


def test_order_visits_every_prompt_once_an_epoch_in_changing_order() -> None:
    order = PromptOrder(7, seed=3)
    epochs = [[order[7 * epoch + i] for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_order_is_a_function_of_seed_and_position() -> None:
    first, second = PromptOrder(5, seed=1), PromptOrder(5, seed=1)
    forwards = [first[i] for i in range(20)]
    backwards = [second[i] for i in reversed(range(20))][::-1]
    assert forwards == backwards
    assert forwards != [PromptOrder(5, seed=2)[i] for i in range(20)]
