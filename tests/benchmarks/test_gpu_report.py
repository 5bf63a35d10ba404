"""The report that waits for a GPU, put together on the CPU from the parts that run there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_blocks, gpu_measures, gpu_report
from leapalign.inputs.validation import UserError
from tests.support.tiers import some_slow

CPU = torch.device("cpu")


def test_a_part_that_fails_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "new" / "report.json"

    def fail() -> None:
        raise ZeroDivisionError("half of\nnothing")

    step = {
        "seconds": {"rollout": 2.0},
        "seconds_computed": {"rollout": {"compute": 1.0, "transfer": 0.5}},
        "peak_bytes": {"rollout": 3 << 30},
        "peak_bytes_reserved": {"rollout": 4 << 30},
        "peak_bytes_simulated": {"rollout": 2 << 30},
        "bytes_reserved_simulated": 5 << 30,
    }
    chosen = {"broken": fail, "no JSON": lambda: CPU, "step": lambda: step, "rates": lambda: {"to_host": 3}}
    report = gpu_report.assembled(chosen, output, {"about": {}})
    assert json.loads(output.read_text()) == report
    assert report["broken"]["failed"] == "ZeroDivisionError: half of nothing"
    assert "in fail" in report["broken"]["traceback"]
    assert report["no JSON"]["failed"].startswith("TypeError")
    assert report["rates"]["result"] == {"to_host": 3}
    assert all(part["seconds"] >= 0 for name, part in report.items() if name != "about")
    page = gpu_report.page(report)
    assert "**Failed.** ZeroDivisionError" in page
    assert "| rollout | 2.00 | 1.00 / 0.50 | 3.0 | 4.0 | 2.0 |" in page
    assert '{"to_host": 3}' in page


def test_what_is_done_outlasts_a_crash(tmp_path: Path) -> None:
    def crash() -> None:
        raise KeyboardInterrupt

    output = tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt):
        gpu_report.assembled({"first": lambda: 1, "second": crash}, output, {"about": {}})
    assert json.loads(output.read_text())["first"]["result"] == 1


def test_no_part_begins_after_the_budget(tmp_path: Path) -> None:
    def never() -> None:
        raise AssertionError

    earlier = {"about": {}, "done": {"result": 1, "seconds": 2.0}}
    chosen = {"done": never, "not done": never}
    report = gpu_report.assembled(chosen, tmp_path / "report.json", earlier, budget=0)
    assert report["done"] == {"result": 1, "seconds": 2.0}
    assert report["not done"]["skipped"] == "the budget of 0 s was spent"
    assert "**Skipped:** the budget of 0 s was spent." in gpu_report.page(report)


def test_parts_are_added_to_a_report_of_the_same_software(tmp_path: Path) -> None:
    output, about = tmp_path / "report.json", {"torch": "2"}
    assert gpu_report.begun(output, about) == {"about": about}
    output.write_text(json.dumps({"about": about, "machine": {"result": 1, "seconds": 0.0}}))
    assert gpu_report.begun(output, about)["machine"]["result"] == 1
    with pytest.raises(UserError, match="of other software or another device"):
        gpu_report.begun(output, {"torch": "3"})
    output.write_text("[]")
    with pytest.raises(UserError, match="is no GPU report"):
        gpu_report.begun(output, about)


@pytest.mark.parametrize("place", ["device", "streamed"])
def test_a_step_on_random_weights_is_measured_beside_its_simulation(place: str) -> None:
    sizes = ("rollout.num_steps=3", "rollout.batch_size=2", "train.batch_size=4", "threshold=2.0")
    asked = (*gpu_report.PLACES[place], *sizes)
    step = gpu_measures.measured_step(gpu_report.load_config(gpu_report.TINY, asked), CPU)
    assert set(step["seconds"]) == {"rollout", "reward", "surrogate", "optimizer"}
    assert all(seconds > 0 for seconds in step["seconds"].values())
    assert step["metrics"]["grad_norm"] > 0
    assert step["peak_bytes"] == step["peak_bytes_reserved"] == {}, "there is no device to measure"
    assert step["seconds_computed"] is None
    assert set(step["peak_bytes_simulated"]) >= {"rollout", "surrogate"}
    assert step["bytes_reserved_simulated"] >= max(step["peak_bytes_simulated"].values())


def test_a_stages_peaks_are_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what tensors take, and of what the allocator holds; both begin anew with each stage."""
    allocated, held = iter([3, 2]), iter([4, 6])
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: next(held))
    seconds, peaks, reserved = Counter(), Counter(), Counter()
    for _ in range(2):
        with gpu_measures.measuring("reward", torch.device("cuda"), seconds, peaks, reserved):
            pass
    assert (peaks["reward"], reserved["reward"]) == (3, 6)


def test_a_commands_output_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "report.tests.log"
    with pytest.raises(RuntimeError, match=r"exit code 3, see report.tests.log: .*half"):
        gpu_report.command(log, "-c", "import sys; print('x' * 500 + ' half'); sys.exit(3)")
    assert len(log.read_text()) > 500
    assert gpu_report.command(log, "-c", "print('one'); print('two')") == ["one", "two"]


def test_a_step_that_would_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_measures, "RESERVE", 1 << 60)
    with pytest.raises(UserError, match="choose a smaller --profile"):
        gpu_measures.large_step(gpu_report.load_config(gpu_report.TINY, ("rollout.num_steps=2",)), CPU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "PyTorch finds no GPU"),
        (["--dry-run", "--output", str(gpu_report.RESULTS / "gpu_report.json")], "a dry run has no figures to keep"),
        (["--dry-run", "--parts", "machines"], "there is no part 'machines'; did you mean 'machine'?"),
    ],
)
def test_what_cannot_be_is_said_at_once(arguments: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("sys.argv", ["gpu_report", *arguments])
    assert gpu_report.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert not (gpu_report.RESULTS / "gpu_report.json").exists()


def test_blocks_are_measured_in_three_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each column is what it says."""
    ran, forward = [], gpu_blocks._forward

    def noted(block: torch.nn.Module, *given: object) -> None:
        patched = any("forward" in vars(module) for module in block.modules())
        ran.append("patched" if patched else "compile" if block._compiled_call_impl else "eager")
        forward(block, *given)

    monkeypatch.setattr(gpu_blocks, "_forward", noted)
    (line,) = gpu_blocks.measured_blocks("qwen_image", CPU, dry=True)
    assert line["ops"] == ["adaln_modulate", "gated_residual", "gelu_tanh", "qk_norm_rope"]
    assert list(line["milliseconds"]) == ran == [*gpu_blocks.COLUMNS]
    assert all(value > 0 for passes in line["milliseconds"].values() for value in passes.values())
    page = gpu_report.page({"about": {}, "blocks_qwen_image": {"result": [line], "seconds": 1.0}})
    assert "| block | pass | eager, ms | compile, ms | patched, ms |" in page


BLOCKS = [f"blocks_{name}" for name in gpu_report.MODELS]
OTHERS = ["machine", "tests", "bandwidth", *(f"tiny_{place}" for place in gpu_report.PLACES), "large"]


@pytest.mark.parametrize("blocks", some_slow([BLOCKS, ["blocks_z_image"]], quick=[["blocks_z_image"]]))
def test_a_dry_run_goes_through_every_part(tmp_path: Path, blocks: list[str]) -> None:
    output = tmp_path / "report.json"
    chosen = [] if blocks == BLOCKS else ["--parts", *OTHERS, *blocks, "kernels"]
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--dry-run", "--output", output, *chosen]
    done = subprocess.run(command, cwd=gpu_report.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report.pop("about")["device"] == gpu_report.DRY
    assert list(report) == [*OTHERS, *blocks, "kernels"]
    assert {name: part.get("failed") for name, part in report.items()} == dict.fromkeys(report)
    assert report["machine"]["result"]["devices"] == ["cpu"]
    assert "skipped" in report["tests"]["result"]
    assert report["bandwidth"]["result"].keys() == {"bytes", "to_device", "to_host"}
    for name in OTHERS[3:]:
        assert set(report[name]["result"]["seconds"]) == {"rollout", "reward", "surrogate", "optimizer"}
    for name in blocks:
        assert all(line["ops"] for line in report[name]["result"])
    if blocks == BLOCKS:
        assert len(report["blocks_flux1"]["result"]) == 2
    assert {line["op"] for line in report["kernels"]["result"]} == {"ema_update_"}
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.tests.log", "report.kernels.log"}
    assert "no figure here is a GPU's" in done.stdout
