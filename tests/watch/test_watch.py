"""The watch on reward hacking: what it records, when it stops a run, and what a resumed run needs."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from typing import Any

import child_runs
import pytest
import torch
from checkpoint_damage import flip
from command_line import last_json, refused
from places import BYTES, STREAMED
from small_runs import PROMPTS, config_of, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from watched_runs import HELD_OUT, METRICS, other_reward, watched

from leapalign.cli import main
from leapalign.config import Config, save_config
from leapalign.evaluation.generate import generate
from leapalign.memory import placement
from leapalign.models import encode_prompts, load_model
from leapalign.rewards import get_reward
from leapalign.runs.checkpoint import latest_checkpoint, step_folder
from leapalign.runs.run import Run
from leapalign.runs.run_folder import MetricsLog, read_metrics
from leapalign.watch import image_statistics as statistics
from leapalign.watch.base import FILE as BASE_FILE
from leapalign.watch.metrics import metric_names
from leapalign.watch.records import FILE, read_watch, replace_watch
from leapalign.watch.rules import StopRule
from leapalign.watch.watch import SEED


def command(parts: Path, output: Path, *assignments: str) -> list[str]:
    """The command line that trains it."""
    path = output.with_suffix(".yaml")
    save_config(watched(parts, output, *assignments), path)
    return ["train", "--config", str(path)]


# What is measured.


def test_the_records_are_those_of_the_average_on_held_out_prompts(parts: Path, tmp_path: Path) -> None:
    """Scored and measured anew from the checkpoint, one way at a time."""
    one = f"name: pickscore, path: {parts / 'reward'}"
    both = f"reward=[{{{one}, scale: cosine}}, {{{one}, scale: logit, weight: 0.5}}]"
    config = watched(parts, tmp_path / "run", both, other_reward(parts), "watch.seeds=3")
    train(config)
    records = read_watch(tmp_path / "run")
    assert [record["iteration"] for record in records] == [0, 2, 4]
    assert all(list(record) == ["iteration", *metric_names(config)] for record in records)

    prompts = [prompt for prompt in HELD_OUT for _ in range(3)]
    embeddings = encode_prompts(config.model, prompts)
    path = str(parts / "reward")
    cosine, logit = (get_reward("pickscore", path=path, scale=scale) for scale in ("cosine", "logit"))
    for record, step in zip(records, (None, 2, 4), strict=True):
        model = load_model(config.model)
        if step:
            folder = step_folder(tmp_path / "run", step) / "transformer_ema"
            model.transformer = type(model.transformer).from_pretrained(folder).eval()
        with torch.no_grad():
            images = generate(model, embeddings, range(SEED, SEED + 9), config.rollout.num_steps)
            scores = [reward(images, prompts).mean() for reward in (cosine, logit)]
            other = get_reward("clipscore", path=path)(images, prompts).mean()
        smalls = statistics.small(images).unflatten(0, (3, 3))
        expected = {
            "held_out_reward": scores[0] + 0.5 * scores[1],
            "held_out_reward_pickscore": scores[0],
            "held_out_reward_pickscore_2": scores[1],
            "held_out_clipscore": other,
            "saturation": statistics.saturation(images).mean(),
            "sharpness": statistics.sharpness(images).mean(),
            "edge_density": statistics.edge_density(images).mean(),
            "diversity": statistics.diversity(smalls).mean(),
        }
        assert {name: record[name] for name in expected} == pytest.approx(
            {name: float(value) for name, value in expected.items()}, rel=1e-3, abs=1e-5
        )
    assert records[0]["drift"] == 0
    assert 0 < records[1]["drift"] < records[2]["drift"]


def test_batches_change_only_rounding(parts: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 4):
        config = watched(parts, tmp_path / str(size), f"rollout.batch_size={size}", "train.iterations=2")
        train(config)
        found.append(read_watch(tmp_path / str(size)))
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)


def test_streamed_weights_are_watched_alike_and_watching_changes_nothing(parts: Path, tmp_path: Path) -> None:
    runs = {
        "resident": watched(parts, tmp_path / "resident", BYTES),
        "streamed": watched(parts, tmp_path / "streamed", BYTES, *STREAMED),
        "not watched": config_of(parts, tmp_path / "not watched", BYTES),
    }
    for config in runs.values():
        train(config)
    first, second = (read_watch(tmp_path / name) for name in ("resident", "streamed"))
    assert first == second
    manifests = [(step_folder(tmp_path / name, 4) / "manifest.json").read_bytes() for name in runs]
    assert manifests[0] == manifests[2]
    assert not (tmp_path / "not watched" / FILE).exists()


def test_cached_embeddings_serve_the_watch(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached = (f"prompts.cache={tmp_path / 'cache'}", "train.iterations=2")
    arguments = command(parts, tmp_path / "run", *cached)
    assert main(["cache", *arguments[1:]]) == 0
    capsys.readouterr()
    assert "lacks 3 of 3 prompts" in refused(arguments, capsys)
    assert main(["cache", *arguments[1:], "--prompts", str(parts / "held_out.txt")]) == 0
    assert main(arguments) == 0
    train(watched(parts, tmp_path / "encoded", "train.iterations=2"))
    assert read_watch(tmp_path / "run") == read_watch(tmp_path / "encoded")


def test_measurements_are_shown_and_go_to_tensorboard(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(parts, tmp_path / "run", "train.iterations=2"), "--json"]) == 0
    printed = capsys.readouterr()
    record = read_watch(tmp_path / "run")[1]
    base = read_watch(tmp_path / "run")[0]
    lines = [line for line in printed.err.splitlines() if "watch, iteration 2" in line]
    assert len(lines) == 1
    for name in METRICS:
        assert f"{name} {record[name]:.3g} ({base[name]:.3g})" in lines[0]
    assert json.loads(printed.out.splitlines()[-1])["stopped_by"] is None
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("watch/diversity")] == [0, 2]


def test_rewards_of_the_watch_are_on_the_device_only_while_it_measures(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.from_config(watched(parts, tmp_path, other_reward(parts)))
    moves: list[tuple[Any, torch.device]] = []
    monkeypatch.setattr(placement, "place_reward", lambda reward, device: moves.append((reward, device)))
    assert run.watch is not None
    (reward,) = run.watch.rewards.values()
    assert "held_out_clipscore" in run.watch.look(0, run.trainer.model, run.trainer.rewards)
    meta, host = torch.device("meta"), torch.device("cpu")
    with pytest.raises(ZeroDivisionError), placement.lent_device([reward], meta):
        raise ZeroDivisionError
    assert moves == [(reward, run.trainer.model.device), (reward, host), (reward, meta), (reward, host)]


# When it stops a run.


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
    assert message in refused([*command(parts, tmp_path / "run"), *given], capsys)
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
    asked = (grey, "train.iterations=40", "checkpoint.every=20", "samples.every=40", "watch.stop_when=[sharpness > 9]")
    assert main([*command(parts, run, *asked), f"watch.stop_when=[sharpness > 9, {rule}]", "--json"]) == 0
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
    arguments = command(parts, run, "watch.stop_when=[saturation > 0.0001]")
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


# What it compares with.


def test_a_resumed_run_drops_what_lies_beyond_its_checkpoint_and_measures_it_again(
    parts: Path, run: Path, finished: Path
) -> None:
    for step in (4, 6):
        flip(step_folder(run, step) / "optimizer.safetensors")
    train(watched(parts, run, "train.iterations=6", "checkpoint.keep=9", other_reward(parts)), resume=True)
    assert (run / FILE).read_bytes() == (finished / FILE).read_bytes()
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("watch/drift")] == [0, 2, 4, 6]


def test_records_beyond_the_checkpoint_are_dropped_even_when_nothing_is_watched_any_more(tmp_path: Path) -> None:
    replace_watch(tmp_path, [{"iteration": 0}, {"iteration": 2}, {"iteration": 4}])
    for iteration, left in ((2, [0, 2]), (0, [])):
        with MetricsLog(tmp_path, iteration):
            pass
        assert [record["iteration"] for record in read_watch(tmp_path)] == left


@pytest.mark.posix
def test_killed_around_a_measurement_the_run_is_the_same(parts: Path, tmp_path: Path) -> None:
    """In one, and as the base and each record is written: config, history, metrics and samples are renamed before."""
    faults = ("watch:1", "watch:4", "renamed:5", "rename:6", "renamed:7")

    def config(name: str) -> Config:
        asked = ("train.iterations=2", "train.batch_size=2", "samples.count=1", "watch.every=1", "checkpoint.every=1")
        return watched(parts, tmp_path / name, *asked)

    # All at once: the processors are kept busy.
    first = {fault: child_runs.started(child_runs.train, config(fault), False, fault) for fault in faults}
    whole = child_runs.started(child_runs.train, config("whole"))
    assert [child_runs.exit_code(process) for process in first.values()] == [-signal.SIGKILL] * len(faults)
    again = [child_runs.started(child_runs.train, config(fault), True) for fault in faults]
    assert [child_runs.exit_code(process) for process in (whole, *again)] == [0] * (len(faults) + 1)
    expected = contents(tmp_path / "whole")
    assert [step for step, _ in expected[2]] == [0, 1, 2]
    for fault in faults:
        assert contents(tmp_path / fault) == expected, fault


def contents(run: Path) -> tuple[bytes, bytes, list[tuple[int, float]], list[str]]:
    """What a watched run leaves behind."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("watch/diversity")]
    files = sorted(path.name for path in (*run.glob("*.partial"), *(run / "checkpoints").iterdir()))
    return (run / FILE).read_bytes(), (run / BASE_FILE).read_bytes(), shown, files


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["watch.seeds=3"], "watch.seeds has changed since the base was measured"),
        (["rollout.num_steps=4"], "rollout.num_steps has changed"),
        (["model.guidance=1"], "model.guidance has changed"),
        (["watch.prompts=PROMPTS"], "watch.prompts has changed"),
        (["watch.rewards=[{name: clipscore, path: REWARD}, {name: clipscore, path: REWARD}]",
          "watch.stop_when=[held_out_clipscore_2 < 0]"], "did not measure held_out_clipscore_2 from its start"),
    ],
)  # fmt: skip
def test_other_held_out_images_are_refused(
    parts: Path, run: Path, capsys: pytest.CaptureFixture[str], assignments: list[str], message: str
) -> None:
    before = (run / FILE).read_bytes()
    for word, path in (("PROMPTS", parts / "prompts.txt"), ("REWARD", parts / "reward")):
        assignments = [item.replace(word, str(path)) for item in assignments]
    assert message in refused(["train", "--resume", str(run), *assignments], capsys)
    assert (run / FILE).read_bytes() == before


def test_a_base_that_is_lost_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / BASE_FILE).write_bytes(b"short")
    assert "which the watch compares with; put it back" in refused(["train", "--resume", str(run)], capsys)
    (run / BASE_FILE).unlink()
    assert "which the watch compares with; put it back" in refused(["train", "--resume", str(run)], capsys)
    (run / FILE).unlink()
    assert "was not watched from its start" in refused(["train", "--resume", str(run)], capsys)
    assert main(["train", "--resume", str(run), "watch.every=0"]) == 0
