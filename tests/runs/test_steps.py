"""A step of a run can be named; going on from one keeps what came after it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import child_runs
import pytest
from checkpoint_damage import flip
from command_line import refused
from small_runs import SHORT, config_of, without_time

from leapalign.cli import main
from leapalign.inputs.validation import UserError
from leapalign.runs.checkpoint import checkpoints_of, latest_checkpoint, run_weights, step_folder
from leapalign.runs.history import FILE as HISTORY
from leapalign.runs.naming import newest_run, run_and_step
from leapalign.runs.opening import opened_run
from leapalign.runs.run_folder import read_metrics


def test_a_step_is_named_by_its_folder_or_by_number(trained: Path) -> None:
    assert run_and_step(Path("runs/a")) == (Path("runs/a"), None)
    assert run_and_step(Path("runs/a"), 2) == (Path("runs/a"), 2)
    assert run_and_step(Path("runs/a/checkpoints/step-20"), 20) == (Path("runs/a"), 20)
    assert run_and_step(Path("runs/step-20")) == (Path("runs/step-20"), None)
    assert run_weights(trained, "average", 2) == step_folder(trained, 2) / "transformer_ema"
    assert run_weights(trained, "last", 1) == step_folder(trained, 1) / "transformer"


@pytest.mark.parametrize("named", [["--run", "RUN/checkpoints/step-2"], ["--run", "RUN", "--step", "2"]])
@pytest.mark.parametrize("command", ["generate", "evaluate", "export"])
def test_every_command_takes_a_step(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, named: list[str]
) -> None:
    asked: list[object] = []

    def noted(*arguments: object) -> Path:
        asked.append(arguments)
        raise UserError("enough")

    # In this order: the second would otherwise be imported with the first one in place.
    monkeypatch.setattr("leapalign.export.export.run_weights", noted)
    monkeypatch.setattr("leapalign.runs.checkpoint.run_weights", noted)
    output = [] if command == "evaluate" else ["--output", str(tmp_path / "out")]
    weights = ["--weights", "last"]
    assert main([command, *[item.replace("RUN", str(trained)) for item in named], *output, *weights]) == 2
    assert asked == [(trained, "last", 2)]


def test_an_export_is_of_the_step_that_was_named(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "exported"
    assert main(["export", "--run", str(step_folder(trained, 2)), "--output", str(output), "--weights", "last"]) == 0
    assert "| iterations | 2 of" in (output / "README.md").read_text()
    name = "diffusion_pytorch_model.safetensors"
    assert (output / "transformer" / name).read_bytes() == (step_folder(trained, 2) / "transformer" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "RUN", "--step", "7"], "holds no checkpoint of step 7; there are those of 1, 2, 3, name one"),
        (["--run", "RUN/checkpoints/step-7"], "holds no checkpoint of step 7; there are those of 1, 2, 3, name one"),
        (["--run", "RUN/checkpoints/step-2", "--step", "3"], "is step 2, and --step says 3; leave one of them out"),
        (["--run", "RUN", "--step", "2", "--weights", "best"], "--weights best is a step of its own choice"),
        (["--config", "RUN/config.yaml", "--step", "2"], "--step 2 is one of a run; name that with --run"),
    ],
)
def test_steps_that_cannot_be_are_one_sentence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = [item.replace("RUN", str(trained)) for item in arguments]
    assert message in refused(["generate", *given, "--output", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_a_damaged_step_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(step_folder(run, 2) / "optimizer.safetensors")
    error = refused(["train", "--resume", str(step_folder(run, 2)), "train.iterations=4"], capsys)
    assert "step-2' is damaged (optimizer.safetensors was altered); there are those of 1, 2, 3, name another" in error


def test_going_on_from_a_step_keeps_what_came_after_it(
    run: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: (run / name).read_bytes() for name in ("metrics.jsonl", HISTORY)}
    assert main(["train", "--resume", str(step_folder(run, 1)), "optimizer.learning_rate=1e-4"]) == 0
    kept = run / "set-aside-1"
    assert f"going on after iteration 1; what came later, and a copy of all records, is in {kept}" in (
        capsys.readouterr().err
    )
    assert sorted(path.name for path in (kept / "checkpoints").iterdir()) == ["step-2", "step-3"]
    assert sorted(path.name for path in (kept / "samples").iterdir()) == ["step-2.png", "step-3.png"]
    assert {name: (kept / name).read_bytes() for name in before} == before
    for name in ("checkpoints/step-3/manifest.json", "samples/step-3.png"):
        assert (kept / name).read_bytes() == (trained / name).read_bytes()
        assert (run / name).read_bytes() != (trained / name).read_bytes()
    assert [record["learning_rate"] for record in read_metrics(run)] == [1e-3, 1e-4, 1e-4]
    assert sorted(checkpoints_of(run)) == [1, 2, 3]

    # And back again, by the rate of then: the same run, and nothing is lost this time, either.
    assert main(["train", "--resume", str(step_folder(run, 1)), "optimizer.learning_rate=1e-3"]) == 0
    assert (run / "set-aside-2" / "checkpoints" / "step-3").is_dir()
    last = "checkpoints/step-3/manifest.json"
    assert (run / last).read_bytes() == (trained / last).read_bytes()
    assert without_time(read_metrics(run)) == without_time(read_metrics(trained))
    assert (run / HISTORY).read_bytes() == (trained / HISTORY).read_bytes()


def test_the_last_step_is_the_run(run: Path) -> None:
    assert main(["train", "--resume", str(step_folder(run, 3)), "train.iterations=4"]) == 0
    assert not list(run.glob("set-aside-*"))


def from_first(config: object, fault: str) -> None:
    os.environ["LEAPALIGN_FAULT"] = fault
    with opened_run(config, resume=True, step=1) as run:  # type: ignore[arg-type]
        run.train()


@pytest.mark.slow
@pytest.mark.posix
def test_killed_while_it_is_set_aside_nothing_is_lost(parts: Path, trained: Path, tmp_path: Path) -> None:
    """After the last record is copied, the first of two checkpoints has gone, and the first of two grids."""
    runs = {count: Path(shutil.copytree(trained, tmp_path / str(count))) for count in (2, 3, 5)}
    processes = [
        child_runs.started(from_first, config_of(parts, run, *SHORT), f"renamed:{count}") for count, run in runs.items()
    ]
    assert [child_runs.exit_code(process) for process in processes] == [-signal.SIGKILL] * len(runs)
    for count, run in runs.items():
        found = {path.name for path in run.rglob("step-*") if path.is_dir()}
        assert found == {"step-1", "step-2", "step-3"}, count
        assert len(list(run.rglob("step-*.png"))) == 4
        assert read_metrics(run) == read_metrics(trained)
        assert latest_checkpoint(run) is not None


def test_the_newest_run_is_the_one_that_was_active_last(
    run: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    for number, name in enumerate(("a", "c", "group/b")):
        shutil.copytree(trained, runs / name)
        for path in (runs / name).iterdir():
            os.utime(path, (number, number))
    assert newest_run(runs) == runs / "group" / "b"
    os.utime(runs / "c" / "metrics.jsonl", (9, 9))
    (runs / "a" / "page").mkdir()
    assert newest_run(runs) == runs / "c", "what evaluation writes is no activity"
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "latest"]) == 0
    assert "continuing runs/c, the run that was active last" in capsys.readouterr().err
    # Beside where the config would write.
    other = tmp_path / "elsewhere"
    shutil.copytree(trained, other / "mine")
    config = (trained / "config.yaml").read_text().replace(str(trained), str(other / "next"))
    (tmp_path / "config.yaml").write_text(config)
    assert main(["train", "--resume", "latest", "--config", "config.yaml"]) == 0
    assert f"continuing {other / 'mine'}, " in capsys.readouterr().err


def test_a_run_that_is_not_there_is_not_begun(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--resume", str(tmp_path / "tpyo"), "--config", str(trained / "config.yaml")]
    assert "there is no run" in refused(arguments, capsys)
    assert not (tmp_path / "tpyo").exists()


def test_without_runs_latest_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "'runs' holds no run; name one" in refused(["train", "--resume", "latest"], capsys)
