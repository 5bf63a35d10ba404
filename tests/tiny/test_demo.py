"""The demo end to end, cut short: what it prints and what it leaves behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from screens import stderr_on_a_terminal
from signals import signalled_in

from leapalign.cli import main
from leapalign.runs.checkpoint import latest_checkpoint, step_folder
from leapalign.storage.embedded import FOLDER
from leapalign.storage.folder_lock import run_lock
from leapalign.tiny import demo
from leapalign.tiny.demo_report import sample_grids
from leapalign.tiny.world import FAMILIES


@pytest.fixture(scope="module")
def shown_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object], set[str]]:
    """The run, what ``--json`` printed, and the bars that were seen."""
    output = tmp_path_factory.mktemp("demo") / "run"
    patch = pytest.MonkeyPatch()
    patch.setattr(demo, "EVALUATION_IMAGES", 24)
    terminal = stderr_on_a_terminal(patch)
    lines: list[str] = []
    patch.setattr("builtins.print", lambda *values, **_: lines.append(" ".join(map(str, values))))
    try:
        assert main(["demo", "--json", f"output={output}", "train.iterations=2", "train.batch_size=4"]) == 0
    finally:
        patch.undo()
    return output, json.loads(lines[-1]), terminal.descriptions()


@pytest.fixture(scope="module")
def short_demo(shown_demo: tuple[Path, dict[str, object], set[str]]) -> tuple[Path, dict[str, object]]:
    return shown_demo[:2]


def test_every_long_part_has_its_bar(shown_demo: tuple[Path, dict[str, object], set[str]]) -> None:
    arms = {f"evaluate, {arm}" for arm in ("before", "after", "control")}
    assert arms | {"train the control", "samples", "train, optimizer"} <= shown_demo[2]


def test_a_page_without_sample_grids_leaves_them_out(tmp_path: Path) -> None:
    assert sample_grids(tmp_path, 2.0) == []
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step-2.png").touch()
    ((title, picture),) = sample_grids(tmp_path, 2.0)
    assert (title, "samples/step-2.png" in picture) == ("Samples, last", True)


def test_json_has_the_promised_shape(short_demo: tuple[Path, dict[str, object]]) -> None:
    run, result = short_demo
    for key in ("reward", "held_out_reward", "accuracy"):
        assert set(result[key]) == {"before", "after"}
    assert set(result["control"]) == {"reward", "held_out_reward", "accuracy"}
    assert set(result["accuracy_by_family"]) == set(FAMILIES)
    assert all(set(arms) == {"before", "after", "control"} for arms in result["accuracy_by_family"].values())
    assert result["iterations"] == 2
    assert result["run"] == str(run)
    assert 0 <= result["accuracy"]["before"] <= 1
    assert result["reward"]["before"] != result["reward"]["after"]


def test_run_folder_shows_everything(short_demo: tuple[Path, dict[str, object]]) -> None:
    run, result = short_demo
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.yaml",
        "config_history.jsonl",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "samples",
        "run.lock",
        "run.pid",
        "learning_curve.png",
        "before_after.png",
        "index.html",
        "result.json",
    }
    page = (run / "index.html").read_text()
    for picture in ("before_after.png", "learning_curve.png", "samples/step-0.png", "samples/step-2.png"):
        assert f'src="{picture}"' in page
        assert (run / picture).exists()
    assert json.loads((run / "result.json").read_text()) == result


def test_a_demo_stops_in_good_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(demo, "EVALUATION_IMAGES", 24)
    signalled_in(monkeypatch, 1, signal.SIGINT)
    assert main(["demo", f"output={run}", "train.iterations=3", "train.batch_size=4"]) == 0
    assert f"stopped after iteration 1; continue with leapalign train --resume {run}" in capsys.readouterr().err
    assert latest_checkpoint(run) == step_folder(run, 1)
    assert not (run / "index.html").exists()
    with run_lock(run):  # it is free again
        pass


def test_a_demo_is_the_only_one_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("leapalign.runs.opening.unused_folder", lambda run: run)
    (tmp_path / "run").mkdir()
    with run_lock(tmp_path / "run"):
        assert main(["demo", f"output={tmp_path / 'run'}"]) == 2
    assert "is being trained by process" in capsys.readouterr().err


def test_a_second_demo_leaves_the_first_alone(tmp_path: Path) -> None:
    from leapalign.runs.opening import unused_folder

    assert unused_folder(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert unused_folder(tmp_path / "run") == tmp_path / "run-3"


def test_shipped_weights_are_small_and_safe() -> None:
    weights = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in weights) <= 15e6
    assert {path.suffix for path in weights} <= {".safetensors", ".json", ".txt", ".log", ".jinja"}
