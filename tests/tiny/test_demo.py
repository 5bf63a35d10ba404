"""The demo end to end, cut short: what it prints and what it leaves behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from PIL import Image
from screens import stderr_on_a_terminal
from signals import signalled_in

from leapalign.cli import main
from leapalign.runs.checkpoint import latest_checkpoint, step_folder
from leapalign.storage.embedded import FOLDER
from leapalign.storage.folder_lock import run_lock
from leapalign.tiny import demo
from leapalign.tiny.world import FAMILIES

CURVES = {
    f"curve_{name}{ground}.png" for name in ("reward", "held_out", "grad_norm", "distances") for ground in ("", "_dark")
}


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
    assert arms | {"train the control", "samples", "train, optimizer", "watch"} <= shown_demo[2]


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
    assert set(result["tidy"]) == {"before", "after"}
    assert all(0 < value < 0.01 for value in result["tidy"].values())
    grid = result["grid"]
    assert set(grid) == {"right_before", "right_after", "of"}
    assert 0 <= grid["right_before"] <= grid["of"] == 24
    for arm in result["detail"].values():
        assert arm["diversity"] > 0
        assert set(arm["tidy"]) == {"mean", "low", "high"}
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
        "watch.jsonl",
        "watch_base.safetensors",
        *CURVES,
        "before_after.png",
        "index.html",
        "result.json",
    }
    page = (run / "index.html").read_text()
    assert all(picture in page for picture in CURVES)
    assert page.count('src="data:image/png;base64,') == 2 * 24
    assert Image.open(run / "before_after.png").width > 600
    for picture in ("samples/step-0.png", "samples/step-2.png"):
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


@pytest.mark.slow
def test_a_demo_that_the_watch_stops_is_told_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a reward that empty pictures please, the held-out one falls."""
    monkeypatch.setattr(demo, "EVALUATION_IMAGES", 24)
    (tmp_path / "pale.py").write_text("def pale(images, prompts): return images.mean((1, 2, 3))")
    reward = f"reward={{name: custom, function: '{tmp_path}/pale.py:pale'}}"
    asked = ["train.iterations=30", "train.batch_size=8", "watch.every=5", "checkpoint.every=5"]
    asked += ["optimizer.warmup_iterations=0"]
    assert main(["demo", "--json", reward, f"output={tmp_path / 'run'}", "optimizer.learning_rate=1e-3", *asked]) == 0
    shown = capsys.readouterr()
    assert "as watch.stop_when" in shown.err
    result = json.loads(shown.out.splitlines()[-1])
    assert result["iterations"] < 30
    assert result["held_out_reward"]["after"] < result["held_out_reward"]["before"]
    assert (tmp_path / "run" / "index.html").exists()


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
