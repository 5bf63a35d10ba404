"""Every command that gives prompts to text encoders or rewards says which of them are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import TINY

from leapalign.cli import main

FITS, LONG, LONGER = "a circle and a square", "a red circle and a blue square of a cross", "a " * 20
SMALL = (
    "rollout.num_steps=2",
    "rollout.batch_size=2",
    "train.batch_size=2",
    "train.iterations=1",
    "samples.count=1",
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([FITS, LONG, LONGER]))
    return path


def cuts(number: int, of: str, *readers: str) -> list[str]:
    return [f"{reader} cuts {number} of {of} at 8 tokens, as" for reader in readers]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines without the example."""
    found = [message.partition(" '") for message in caplog.messages if " cuts " in message]
    caplog.clear()
    assert all(example.startswith("a ") for _, _, example in found)
    return [line for line, _, _ in found]


ENCODERS = ("text encoder 1", "text encoder 2")


def test_cache_and_a_run_that_reads_it(tmp_path: Path, prompts: Path, caplog: pytest.LogCaptureFixture) -> None:
    given, cached = ("--config", TINY, *SMALL), f"prompts.cache={tmp_path / 'cache'}"
    assert main(["cache", *given, "--prompts", str(prompts), cached]) == 0
    assert said(caplog) == cuts(2, "3 prompts", *ENCODERS)
    run = (f"prompts.path={prompts}", f"output={tmp_path / 'run'}")
    assert main(["train", *given, *run, cached]) == 0
    assert said(caplog) == cuts(2, "3 prompts", "reward pickscore")


def test_train_and_its_watch(tmp_path: Path, prompts: Path, caplog: pytest.LogCaptureFixture) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(f"a cross\n{LONG} above\n")
    watch = (
        "watch.every=1",
        f"watch.prompts={held_out}",
        "watch.rewards=[{name: clipscore, path: embedded:reward}]",
    )
    run = (f"prompts.path={prompts}", f"output={tmp_path / 'run'}")
    assert main(["train", "--config", TINY, *SMALL, *run, *watch]) == 0
    assert said(caplog) == [
        *cuts(2, "3 prompts", "reward pickscore"),
        *cuts(1, "2 watch.prompts", "reward pickscore", "reward clipscore"),
        *cuts(2, "3 prompts", *ENCODERS),
        *cuts(1, "2 watch.prompts", *ENCODERS),
    ]


def test_evaluate_and_generate(tmp_path: Path, prompts: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = ("--config", TINY, *SMALL)
    assert main(["evaluate", *given, "--prompts", str(prompts)]) == 0
    assert said(caplog) == cuts(2, "3 prompts", "reward pickscore", *ENCODERS)
    output = ("--output", str(tmp_path / "images"))
    negative = ("model.true_cfg_scale=2", f"model.negative_prompt={LONG}")
    assert main(["generate", *given, "--prompt", FITS, *output, *negative]) == 0
    assert said(caplog) == cuts(1, "2 prompts", *ENCODERS)
    assert main(["generate", *given, "--prompt", FITS, *output]) == 0
    assert said(caplog) == []
