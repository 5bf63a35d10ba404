"""A few of the cases of ``python benchmarks/fuzz_inputs.py --cases 100000``."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks import fuzz_inputs
from leapalign.config import Config

pytestmark = pytest.mark.posix  # for its signals


@pytest.mark.data
def test_mutated_inputs_are_accepted_and_run_or_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a case asked the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    tally = fuzz_inputs.fuzz(range(400), seed=1, run_every=25)
    assert not tally.failures
    assert {"config accepted", "overrides accepted", "prompts accepted", "run"} <= tally.outcomes.keys()


def test_runs_in_the_callers_folder_are_not_those_of_the_cases() -> None:
    """As the demo leaves one in a clone."""
    Path("runs/tiny/checkpoints").mkdir(parents=True)
    Path("runs/flux1_dev/checkpoints").mkdir(parents=True)
    tally = fuzz_inputs.fuzz(range(20), seed=1, run_every=25)
    assert not tally.failures
    assert tally.outcomes.total() >= 20


def test_the_fuzzer_sees_tracebacks_and_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Config:
        raise KeyError("a bug")

    def hanging(*_: object) -> Config:
        while True:
            pass

    def waiting(*_: object) -> Config:
        while True:
            time.sleep(1)

    monkeypatch.setattr(fuzz_inputs, "CASE_SECONDS", 0.05)
    monkeypatch.setattr(fuzz_inputs, "WAITING", 4)
    for case, seen in ((broken, "KeyError"), (hanging, "longer than"), (waiting, "longer than")):
        monkeypatch.setattr(fuzz_inputs, "CASES", {"config": case})
        (failure,) = fuzz_inputs.fuzz(range(1), seed=0, run_every=1).failures
        assert seen in failure
