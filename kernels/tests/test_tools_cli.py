from __future__ import annotations

import json
import os
import subprocess
import sys

import leap_kernels
import pytest
from leap_kernels._catalog import OPS
from leap_kernels.tools import main, report


def printed(capsys, *argv: str) -> list[dict[str, object]]:
    assert main(argv) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_list_names_every_op_with_its_formula_and_kernels(capsys) -> None:
    lines = printed(capsys, "list", "--json")
    assert [line["op"] for line in lines] == [op.name for op in OPS]
    assert all(line["formula"] for line in lines)
    assert main(["list"]) == 0
    table = capsys.readouterr().out
    assert all(op.name in table and op.formula in table for op in OPS)


def test_explain_says_what_the_library_says(capsys) -> None:
    with leap_kernels.use_backend("reference"):
        lines = printed(capsys, "explain", "--json")
        assert [(e.op, e.device, e.backend, e.reason) for e in leap_kernels.explain()] == [
            tuple(x.values()) for x in lines
        ]
        assert {line["backend"] for line in lines if line["device"] == "cpu"} == {"reference"}
        assert main(["explain"]) == 0
    assert "PyTorch" in capsys.readouterr().out


def test_one_op_can_be_named(capsys) -> None:
    for command, lines in (("list", 1), ("explain", 2)):
        assert [line["op"] for line in printed(capsys, command, "euler_step", "--json")] == ["euler_step"] * lines


def test_a_closed_pipe_ends_a_command_quietly(monkeypatch, capsys) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["list"]) == 141
    assert capsys.readouterr().err == ""


def test_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "leap_kernels", "list"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "leap_update" in done.stdout


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["bench", "--op", "no"], ["explain", "no"], ["export"]])
def test_bad_arguments_end_with_code_two(argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_text_table_puts_numbers_to_the_right() -> None:
    assert report.text_table(("name", "n"), [("a", 1), ("bc", 100)]).splitlines() == [
        "name    n",
        "----  ---",
        "a       1",
        "bc    100",
    ]


def test_revision_is_none_where_git_does_not_track_the_file(tmp_path, monkeypatch) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "report.py").touch()
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    report._revision.cache_clear()
    assert report.provenance()["revision"] is None
    report._revision.cache_clear()
