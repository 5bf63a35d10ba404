"""The report that waits for a GPU, put together on the CPU from the parts that run there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report
from leapalign.inputs.validation import UserError

CPU = torch.device("cpu")


def test_a_part_that_fails_is_reported_and_the_rest_goes_on() -> None:
    def fail() -> None:
        raise ZeroDivisionError("half of\nnothing")

    step = {
        "seconds": {"rollout": 2.0},
        "seconds_computed": {"rollout": {"compute": 1.0, "transfer": 0.5}},
        "peak_bytes": {"rollout": 3 << 30},
        "peak_bytes_simulated": {"rollout": 2 << 30},
    }
    report = gpu_report.assembled({"broken": fail, "step": lambda: step, "rates": lambda: {"to_host": 3}})
    assert report["broken"]["failed"] == "ZeroDivisionError: half of nothing"
    assert report["rates"]["result"] == {"to_host": 3}
    assert all(part["seconds"] >= 0 for name, part in report.items() if name != "about")
    json.dumps(report)
    page = gpu_report.page(report)
    assert "**Failed.** ZeroDivisionError" in page
    assert "| rollout | 2.00 | 1.00 / 0.50 | 3.0 | 2.0 |" in page
    assert '{"to_host": 3}' in page


@pytest.mark.parametrize("place", ["device", "streamed"])
def test_a_step_on_random_weights_is_measured_beside_its_simulation(place: str) -> None:
    sizes = ("rollout.num_steps=3", "rollout.batch_size=2", "train.batch_size=4", "threshold=2.0")
    asked = (*gpu_report.PLACES[place], *sizes)
    step = gpu_report.measured_step(gpu_report.load_config(gpu_report.TINY, asked), CPU)
    assert set(step["seconds"]) == {"rollout", "reward", "surrogate", "optimizer"}
    assert all(seconds > 0 for seconds in step["seconds"].values())
    assert step["metrics"]["grad_norm"] > 0
    assert step["peak_bytes"] == {}, "there is no device to measure"
    assert step["seconds_computed"] is None
    assert set(step["peak_bytes_simulated"]) >= {"rollout", "surrogate"}


def test_every_part_is_there_and_copies_have_a_rate() -> None:
    chosen = gpu_report.parts(CPU, gpu_report.PROFILE)
    names = {"machine", "tests", "bandwidth", "kernels", "FLUX.1-dev's size, 80gb"}
    assert names | {f"tiny model, {place}" for place in gpu_report.PLACES} == set(chosen)
    assert chosen["machine"]()["devices"]
    assert set(gpu_report.bandwidth(CPU, 1 << 20)) == {"to_device", "to_host"}
    with pytest.raises(RuntimeError, match="exit code 3"):
        gpu_report.command("-c", "raise SystemExit(3)")


def test_a_step_that_would_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="choose a smaller --profile"):
        gpu_report.large_step(gpu_report.load_config(gpu_report.TINY, ("rollout.num_steps=2",)), CPU)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_report", "--output", str(Path("never.json"))])
    assert gpu_report.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "PyTorch finds no GPU" in captured.err
