"""Bars: on a terminal, one at a time; none in a log."""

from __future__ import annotations

import io

import pytest
from screens import stderr_on_a_terminal

from leapalign.reports.progress import progress, say


def test_a_log_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with progress("outer", 3, "it") as bar, progress("inner", 2, "step") as inner:
        inner.update()
        bar.update()
        bar.set_description("outer, a stage")
        bar.set_postfix({"reward": 1})
        say("a line")
    assert log.getvalue() == "a line\n"


def test_a_bar_within_another_takes_its_place_and_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr_on_a_terminal(monkeypatch)
    with progress("outer", 3, "it") as bar:
        bar.set_postfix({"reward": 1, "loss": 2, "grad_norm": 3})
        bar.update()
        with progress("inner", 2, "step") as inner:
            inner.update()
            inner.refresh()
            assert terminal.lines() == ["inner:  50%"]
            assert terminal.screen()[0].endswith("step/s]"), "though the outer one was longer"
            bar.set_description("outer, later", refresh=False)
        assert terminal.lines() == ["outer, later:  33%"]
        with progress("second", 2, "step"):
            assert terminal.lines() == ["second:   0%"]
        assert terminal.lines() == ["outer, later:  33%"]
        say("a line above")
        bar.refresh()
        assert terminal.lines() == ["a line above", "outer, later:  33%"]


def test_a_bar_begins_where_a_resumed_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr_on_a_terminal(monkeypatch)
    with progress("train", 4, "it", done=2):
        assert terminal.lines() == ["train:  50%"]


def test_a_bar_that_ends_in_an_error_leaves_room_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr_on_a_terminal(monkeypatch)
    with pytest.raises(ZeroDivisionError), progress("outer", 3, "it"), progress("inner", 3, "it"):
        raise ZeroDivisionError
    with progress("next", 1, "it") as bar:
        bar.update()
        bar.refresh()
        assert terminal.lines()[-1] == "next: 100%"
