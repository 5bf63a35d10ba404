"""When the watch ends a run, and which rules it refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from command_line import last_json, refused
from small_runs import PROMPTS, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from watched_runs import HELD_OUT, METRICS, train_command, watched

from leapalign.cli import main
from leapalign.runs.checkpoint import latest_checkpoint, step_folder
from leapalign.runs.run import Run
from leapalign.runs.run_folder import read_metrics
from leapalign.watch.base import FILE as BASE_FILE
from leapalign.watch.records import FILE, read_watch
from leapalign.watch.rules import StopRule


@pytest.mark.parametrize(
    ("text", "value", "base", "holds"),
    [
        ("saturation > 0.2", 0.21, 9, True),
        ("saturation > 0.2", 0.2, 9, False),
        ("saturation<-.5e1", -5.1, 9, True),
        ("diversity < 0.5 base", 0.19, 0.4, True),
        ("diversity < 0.5 base", 0.21, 0.4, False),
        ("diversity < 0.5base", 0.19, 0.4, True),
        ("diversity < base", 0.39, 0.4, True),
        ("diversity > 2 base + 0.1", 0.95, 0.4, True),
        ("diversity > 2 base + 0.1", 0.85, 0.4, False),
        ("held_out_reward < base - 0.2", -0.31, -0.1, True),
        ("held_out_reward < base - 0.2", -0.29, -0.1, False),
        ("saturation > 0.2", float("nan"), 9, True),
    ],
)
def test_rules_hold_as_they_read(text: str, value: float, base: float, holds: bool) -> None:
    assert StopRule.parsed(text, METRICS).holds(value, base) is holds


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["watch.stop_when=[saturatoin > 0.2]"],
            "unknown metric 'saturatoin'; there are held_out_reward, saturation, ",
        ),
        (["watch.stop_when=[held_out_clipscore < 0.9 base]"], "unknown metric 'held_out_clipscore'; there are"),
        (["watch.stop_when=[saturation = 0.2]"], "'saturation = 0.2' must read METRIC < NUMBER"),
        (["watch.stop_when=[saturation > base * 2]"], "must read METRIC < NUMBER"),
        (["watch.stop_when=[saturation > 0.2 0.3]"], "must read METRIC < NUMBER"),
        (["watch.stop_when=[drift > 2 base]"], "drift is 0 at the base"),
        (["watch.every=0", "watch.stop_when=[saturation > 0.2]"], "set watch.every"),
        (["watch.every=3"], "checkpoint.every 2 must be a multiple of watch.every 3"),
        (["watch.prompts=null"], "set watch.prompts"),
        (["watch.prompts=none.txt"], "watch.prompts 'none.txt' does not exist"),
        (["watch.seeds=1"], "'watch.seeds' is 1"),
        (["watch.rewards=[{path: x}]"], "a reward of watch.rewards has no name"),
        (["watch.rewards=[{name: pikscore}]"], "did you mean 'pickscore'?"),
        (["watch.rewards=[{name: pickscore, path: REWARD}]"], "trained on and measured as held_out_reward"),
        (["watch.rewrads=[]"], "did you mean 'rewards'?"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], assignments: list[str], message: str
) -> None:
    given = [item.replace("REWARD", str(parts / "reward")) for item in assignments]
    assert message in refused([*train_command(parts, tmp_path / "run"), *given], capsys)
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_trained_on_are_told(parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared = tmp_path / "prompts.txt"
    shared.write_text(f"{PROMPTS[1].replace(' ', '  ')}\n{HELD_OUT[0]}")
    with caplog.at_level(logging.WARNING, "leapalign"):
        Run.from_config(watched(parts, tmp_path / "run", f"watch.prompts={shared}"))
    assert f"1 of watch.prompts are trained on, and so not held out, as '{PROMPTS[1]}'" in caplog.text


@pytest.fixture
def grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A reward that grey images please most, whatever was asked for."""
    lines = "def grey(images, prompts):\n    return -(images - 0.5).square().mean((1, 2, 3))\n"
    (tmp_path / "grey_reward_for_a_test.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    return "reward={name: custom, function: 'grey_reward_for_a_test:grey'}"


def test_a_run_that_collapses_is_stopped_and_goes_on_by_other_rules(
    parts: Path, tmp_path: Path, grey: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rule = tmp_path / "run", "diversity < 0.95 base"
    asked = (
        grey,
        "ema.warmup=true",
        "train.iterations=40",
        "checkpoint.every=20",
        "samples.every=40",
        "watch.stop_when=[sharpness > 9]",
    )
    assert main([*train_command(parts, run, *asked), f"watch.stop_when=[sharpness > 9, {rule}]", "--json"]) == 0
    printed = capsys.readouterr()
    records = read_watch(run)
    last, base = records[-1], records[0]
    step = int(last["iteration"])
    assert 0 < step < 40
    assert last["held_out_reward"] > base["held_out_reward"], "it is reward hacking"
    assert all(record["diversity"] >= 0.95 * base["diversity"] for record in records[:-1])
    assert last["diversity"] < 0.95 * base["diversity"]
    sentence = f"stopped after iteration {step}, as watch.stop_when '{rule}' holds: diversity is"
    values = f"diversity is {last['diversity']:.4g}, and was {base['diversity']:.4g} at the base"
    (line,) = [line for line in printed.err.splitlines() if "stopped after" in line]
    assert sentence in line
    assert values in line
    assert f"--resume {run}" in line
    result = json.loads(printed.out.splitlines()[-1])
    assert (result["stopped_by"], result["iteration"]) == (rule, step)
    assert latest_checkpoint(run) == step_folder(run, step)

    # As long as the rule is the same, it stays stopped, and nothing is measured again.
    before = (run / FILE).read_bytes()
    assert main(["train", "--resume", str(run), "--json"]) == 0
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert json.loads(printed.out.splitlines()[-1])["stopped_by"] == rule
    assert (run / FILE).read_bytes() == before

    further = f"train.iterations={step + 2}"
    assert main(["train", "--resume", str(run), further, "watch.stop_when=[]", "--json"]) == 0
    assert last_json(capsys)["stopped_by"] is None
    assert [record["iteration"] for record in read_watch(run)] == [*range(0, step + 1, 2), step + 2]


def test_a_rule_that_holds_before_training_is_refused(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    arguments = train_command(parts, run, "watch.stop_when=[saturation > 0.0001]")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "watch.stop_when 'saturation > 0.0001' holds: saturation is" in error
    assert f"before any training; correct this rule, then continue with --resume {run}" in error
    assert read_metrics(run) == []
    assert main(["train", "--resume", str(run), "watch.stop_when=[saturation > 0.9999]"]) == 0
    train(watched(parts, whole))
    assert (run / FILE).read_bytes() == (whole / FILE).read_bytes()
    assert (run / BASE_FILE).read_bytes() == (whole / BASE_FILE).read_bytes()
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("watch/drift")] == [0, 2, 4]
