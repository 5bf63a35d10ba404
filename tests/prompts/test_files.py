from __future__ import annotations

import csv
import json
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_files import write

from leapalign.inputs.validation import UserError
from leapalign.prompts import files
from leapalign.prompts.files import LONGEST_PROMPT, iter_prompts, read_prompts
from leapalign.prompts.order import PromptOrder


def test_text_and_json_lines(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "a.txt", "a cat\n\n  a dog \n")) == ["a cat", "a dog"]
    assert read_prompts(write(tmp_path / "b.txt", "\ufeffa cat\r\na\u2028dog\r\na cat")) == [
        "a cat",
        "a\u2028dog",
        "a cat",
    ]
    lines = '{"prompt": "a cat", "tag": 1}\n{"prompt": "a dog"}\n'
    assert read_prompts(write(tmp_path / "a.jsonl", lines)) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.jsonl", "", "holds no prompts"),
        ("a.txt", b"caf\xe9\n", "not UTF-8 at byte 3"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "a.jsonl:2 is not valid JSON"),
        ("a.jsonl", '{"tag": "a"}\n', "a.jsonl:1 has no column 'prompt' among tag; rename one"),
        ("a.jsonl", "{}\n", "a.jsonl:1 has no column 'prompt' among none"),
        ("a.jsonl", "null\n", 'a.jsonl:1 has no "prompt"'),
        ("a.jsonl", '{"prompt": 3}\n', 'a.jsonl:1 has no "prompt"'),
        ("a.jsonl", '{"prompt": " "}\n', 'a.jsonl:1 has no "prompt"'),
        ("a.jsonl", '{"prompt": "a\\u0000b"}\n', "a.jsonl:1 holds a NUL character"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', "a.jsonl:1 holds half of a surrogate pair"),
        ("a.jsonl", '{"prompt": ' + "[" * 50_000, "a.jsonl:1 is not valid JSON"),
        ("a.jsonl", "9" * 5_000, "a.jsonl:1 is not valid JSON"),
        ("a.txt", "a\nb\0c\n", "a.txt:2 holds a NUL character"),
        ("a.txt", "a\n" + "b" * 5_000_000, "a.txt:2 is longer than 65,536 bytes; shorten it"),
    ],
)
def test_unusable_files_are_one_sentence(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path / name, content))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"check prompts\.path"):
        read_prompts(tmp_path / "none.txt")


def test_a_path_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"check prompts\.path"):
        read_prompts(tmp_path / "a\0b.txt")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither a saved dataset nor parquet files"):
        read_prompts(tmp_path)


def test_endless_files_end_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_PROMPTS", 3)
    assert len(read_prompts(write(tmp_path / "a.txt", "a\nb\n\nc\n"))) == 3
    found = iter_prompts(write(tmp_path / "a.txt", "a\nb\nc\nd\n" + "\xff"))
    assert [next(found) for _ in range(3)] == ["a", "b", "c"]
    with pytest.raises(UserError, match="holds more than 3 prompts; split it"):
        next(found)


def test_files_are_read_line_by_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ("a" * 1000 + "\n") * 2000)
    tracemalloc.start()
    assert sum(1 for _ in iter_prompts(path)) == 2000
    assert tracemalloc.get_traced_memory()[1] < 2**18 < path.stat().st_size / 4
    tracemalloc.stop()


@given(content=st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace")))
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "tsv"])
def test_any_bytes_are_prompts_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes
) -> None:
    assert_prompts_or_one_sentence(write(tmp_path_factory.getbasetemp() / f"any.{suffix}", content))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=4
)


@given(value=JSON, ascii_only=st.booleans())
def test_any_json_is_prompts_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, value: Any, ascii_only: bool
) -> None:
    for content in ({"prompt": value}, [value, {"prompt": value}]):
        line = json.dumps(content, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        assert_prompts_or_one_sentence(write(tmp_path_factory.getbasetemp() / "any.jsonl", line))


def assert_prompts_or_one_sentence(path: Path) -> None:
    """Anything but a UserError fails the test."""
    try:
        found = read_prompts(path)
    except UserError:
        return
    assert found
    assert all(prompt.encode() and prompt.strip() == prompt and "\0" not in prompt for prompt in found)


@pytest.fixture
def table() -> Any:
    import pyarrow

    return pyarrow.table({"prompt": [" a cat", "a dog"], "tag": [1, 2]})


@pytest.mark.data
def test_parquet(tmp_path: Path, table: Any) -> None:
    from pyarrow import parquet

    for name in "ba":
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    assert read_prompts(tmp_path / "a.parquet") == ["a cat", "a dog"]
    assert read_prompts(tmp_path) == ["a cat", "a dog"] * 2
    parquet.write_table(table.rename_columns(["caption", "tag"]), tmp_path / "c.parquet")
    assert read_prompts(tmp_path / "c.parquet") == ["a cat", "a dog"]
    for columns, message in (
        ({"tag": ["a"]}, r"has no column 'prompt' among tag; rename one"),
        ({"prompt": ["a", None]}, r'row 2, has no "prompt" text'),
        ({"prompt": [1]}, r'row 1, has no "prompt" text'),
        ({"prompt": ["b" * (LONGEST_PROMPT + 1)]}, r"row 1, is longer than 65,536 characters"),
    ):
        parquet.write_table(type(table).from_pydict(columns), tmp_path / "c.parquet")
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / "c.parquet")


@pytest.mark.data
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_parquet_is_prompts_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, cut: bool
) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path_factory.getbasetemp() / "any.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a cat", "a dog"]}), path)
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place] = byte
    assert_prompts_or_one_sentence(write(path, bytes(content[:place] if cut else content)))


@pytest.mark.data
def test_saved_datasets(tmp_path: Path, table: Any) -> None:
    import datasets

    datasets.disable_progress_bars()
    dataset = datasets.Dataset(table)
    dataset.select([1]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "two")
    dataset.rename_column("prompt", "Prompt").save_to_disk(tmp_path / "three")
    assert read_prompts(tmp_path / "one") == ["a dog"]
    assert read_prompts(tmp_path / "three") == ["a cat", "a dog"]
    assert read_prompts(tmp_path / "two" / "train") == ["a cat", "a dog"]
    with pytest.raises(UserError, match="has the splits train, test; name the folder of one"):
        read_prompts(tmp_path / "two")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"no Arrow")
    with pytest.raises(UserError, match="cannot read dataset"):
        read_prompts(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("[]")
    with pytest.raises(UserError, match="cannot read dataset"):
        read_prompts(tmp_path / "one")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow; install it with pip install 'leapalign\[data\]'"):
        read_prompts(write(tmp_path / "a.parquet", "PAR1"))


@pytest.mark.prompt_files
@pytest.mark.parametrize(("pattern", "count"), [("geneval*.jsonl", 553), ("hpdv2*.txt", 400)])
def test_prompts_of_the_benchmarks(pattern: str, count: int, tmp_path: Path) -> None:
    (path,) = Path(os.environ["LEAPALIGN_PROMPT_FILES"]).glob(pattern)
    prompts = read_prompts(path)
    assert len(prompts) == count
    assert read_prompts(write(tmp_path / "a.json", json.dumps(prompts))) == prompts
    for name, dialect in (("a.csv", "excel"), ("a.tsv", "excel-tab")):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, dialect).writerows([["Prompts", "Category"], *((prompt, "") for prompt in prompts)])
        assert read_prompts(tmp_path / name) == prompts


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
