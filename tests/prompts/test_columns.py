"""Files in which prompts stand beside other things: tables with a header, and JSON."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path

import pytest
from prompt_files import write

from leapalign.inputs.validation import UserError
from leapalign.prompts import json_files
from leapalign.prompts.columns import prompt_column
from leapalign.prompts.files import iter_prompts, read_prompts
from leapalign.prompts.geneval import read_metadata


@pytest.mark.parametrize(
    ("names", "position"),
    [
        (["id", "prompt", "text"], 1),
        (["Prompt", "Category", "Challenge", "Note"], 0),  # PartiPrompts
        (["Prompts", "Category"], 0),  # DrawBench
        (["jpg_0", "caption", "label_0"], 1),  # Pick-a-Pic
        (["image_name", "prompt", "part_id", "seed"], 1),  # DiffusionDB
        (["id", " TEXT "], 1),
    ],
)
def test_the_column_of_published_files(names: list[str], position: int) -> None:
    assert prompt_column(names, "'a.csv'") == position


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["id", "words"], "'a.csv' has no column 'prompt' among id, words; rename one"),
        ([], "'a.csv' has no column 'prompt' among none; rename one"),
        (["caption", "Text"], "'a.csv' has several columns that could be 'prompt' among caption, Text; rename one"),
        (["prompt", "prompt"], "'a.csv' has several columns that could be 'prompt' among prompt, prompt; rename one"),
    ],
)
def test_a_column_that_is_not_clear_is_one_sentence(names: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        prompt_column(names, "'a.csv'")
    assert str(raised.value) == message


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("TSV", "\t")])
def test_what_the_csv_module_writes_is_read(tmp_path: Path, suffix: str, delimiter: str) -> None:
    prompts = [
        "a cat, sitting",
        'a "big" dog',
        "two\nlines",
        "a tab\there",
        "na\u00efve \u732b",
        "a\u2028b",
        '"quoted"',
    ]
    path = tmp_path / f"a.{suffix}"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["id", "prompt"], *enumerate(prompts), [], ["", " "]])
    assert b"\r\n" in path.read_bytes()
    assert read_prompts(path) == prompts


def test_a_tab_separated_cell_may_begin_with_a_quote(tmp_path: Path) -> None:
    """As line 1562 of PartiPrompts.tsv does."""
    rows = ["Prompt\tCategory", '"G I G G L E" painted\tWriting', 'a "STOP" sign\tWriting', '"a, b"\tArt', '"open\tend']
    assert read_prompts(write(tmp_path / "a.tsv", "\n".join(rows))) == [
        '"G I G G L E" painted',
        'a "STOP" sign',
        "a, b",
        '"open',
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt\na cat, sitting\n", "a.csv:2 has 2 cells under 1 names; put quotes around a cell"),
        ("a.csv", "id,prompt\n1,a\n\n2\n", 'a.csv:4 has no "prompt" text; give it one, or leave it out'),
        ("a.csv", "id,prompt\n1, \n", 'a.csv:2 has no "prompt" text'),
        ("a.csv", 'prompt\n"a\nb"\n"a" cat\n', "a.csv:4 is no row of cells"),
        ("a.csv", 'prompt\na\n"a cat\na dog\n', "a.csv:3 is no row of cells .*; double the quotes within a cell"),
        ("a.tsv", 'prompt\tid\n"a\t1\nb\t2\n', "a.tsv:2 is no row of cells"),
        ("a.csv", 'prompt\n"' + ("a" * 999 + "\n") * 200 + '"', r"a.csv:2 is no row of cells \(field larger than"),
        ("a.csv", "prompt\n" + "a" * 70_000, "a.csv:2 is longer than 65,536 bytes"),
        ("a.csv", b"prompt\ncaf\xe9\n", "not UTF-8 at byte 10; re-encode it"),
        ("a.tsv", "prompt\na cat\n".encode("utf-16"), "not UTF-8 at byte 0; re-encode it"),
        ("a.csv", "a cat\na dog\n", "'.*a.csv' has no column 'prompt' among a cat; rename one"),
        ("a.csv", "prompt\n", "holds no prompts"),
        ("a.csv", "", "holds no prompts"),
        ("a.csv.gz", b"\x1f\x8b\x08\x00", "is compressed, or a spreadsheet; unpack it"),
        ("a.csv", b"PK\x03\x04" + bytes(70_000), "is compressed, or a spreadsheet; .* save it as text or .csv"),
        ("a.json", '["a", 1]', 'a.json, value 2, has no "prompt" text'),
        ("a.json", '["a", {"tag": "b"}]', "a.json, value 2, has no column 'prompt' among tag"),
        ("a.json", "[]", "holds no prompts"),
        ("a.json", '["a",\n "b"', r"'.*a.json' is not valid JSON: .* in line 2; write one array, or one value a line"),
        ("a.json", '["a"]\n["b"]', "'.*a.json' is not valid JSON: Extra data in line 2; write one array"),
        ("a.json", "[" * 50_000, "'.*a.json' is not valid JSON"),
        ("a.json", b'["caf\xe9"]', "not UTF-8 at byte 5; re-encode it"),
        ("a.json", '{\n "prompts": ["a"]\n}', "a.json:1 is not valid JSON: .*; write one array, or one value a line"),
    ],
)
def test_unusable_files_are_one_sentence(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path / name, content))


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_of_texts_or_objects(tmp_path: Path, indent: int | None) -> None:
    """HPDv2's benchmark holds the former, its train.json the latter."""
    texts = ["a cat", "two\nlines", "na\u00efve " * 20_000]
    objects = [{"prompt": "a cat", "human_preference": [1, 0]}, {"image_path": [], "Caption": " a dog"}]
    for bom in ("", "\ufeff \n"):
        assert read_prompts(write(tmp_path / "a.json", bom + json.dumps(texts[:2], indent=indent))) == texts[:2]
        assert read_prompts(write(tmp_path / "a.jsonl", bom + json.dumps(objects, indent=indent))) == ["a cat", "a dog"]
    many = [f"a cat and {number} dogs" for number in range(5000)]
    assert read_prompts(write(tmp_path / "b.json", json.dumps(many, indent=indent))) == many
    with pytest.raises(UserError, match=r"value 3, is longer than 65,536 characters"):
        read_prompts(write(tmp_path / "c.json", json.dumps(texts, indent=indent)))


def test_lines_may_be_texts(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "a.jsonl", '"a cat"\n{"text": "a dog"}\n')) == ["a cat", "a dog"]


def test_a_huge_array_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.json", '["a", "b"]')
    monkeypatch.setattr(json_files, "LONGEST_ARRAY", 9)
    with pytest.raises(UserError, match=r"a.json' is an array of more than 9 bytes; write one value a line"):
        read_prompts(path)
    monkeypatch.setattr(json_files, "LONGEST_ARRAY", 10)
    assert read_prompts(path) == ["a", "b"]


def test_tables_are_read_row_by_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,prompt\n" + ('1,"a\n' + "b" * 1000 + '"\n') * 2000)
    tracemalloc.start()
    assert sum(1 for _ in iter_prompts(path)) == 2000
    assert tracemalloc.get_traced_memory()[1] < 2**18 < path.stat().st_size / 4
    tracemalloc.stop()


def test_geneval_s_objects_are_known_in_an_array_too(tmp_path: Path) -> None:
    records = [{"tag": "two", "include": [], "prompt": "a cat"}] * 2
    assert read_metadata(write(tmp_path / "a.json", json.dumps(records, indent=1))) == records
    assert read_metadata(write(tmp_path / "b.json", json.dumps(["a tag to include"]))) == []
    assert read_metadata(write(tmp_path / "c.json", json.dumps([*records, {"prompt": "a"}]))) == []
