"""The command line as a user meets it: what works, and what is refused before anything is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import TINY, last_json, refused

from leapalign.cli import main
from leapalign.runs.run_folder import read_metrics

SHORT = ("train.iterations=2", "checkpoint.every=1", "samples.every=2", "samples.count=2")
SMALL = ("rollout.num_steps=3", "train.batch_size=2", "rollout.batch_size=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "--config", TINY, f"output={folder}", *SHORT, *SMALL]) == 0
    return folder


def test_train_then_resume_further(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (run / "checkpoints" / "step-2" / "state.json").exists()
    assert main(["train", "train.iterations=3", "--resume", str(run), "--json"]) == 0
    result = last_json(capsys)
    assert result["iteration"] == 3
    assert result["run"] == str(run)
    assert [record["iteration"] for record in read_metrics(run)] == [1, 2, 3]


def test_generate_writes_one_image_a_prompt(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "images"
    prompts = ["--prompt", "a red circle", "--prompt", "two crosses"]
    assert main(["generate", "--run", str(run), *prompts, "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["00000.png", "00001.png", "grid.png"]


def test_evaluate_puts_the_run_beside_the_base(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo crosses\na square\n")
    assert main(["evaluate", "--run", str(run), "--prompts", str(prompts), "--json"]) == 0
    result = last_json(capsys)
    assert result["images"] == 3
    assert set(result["rewards"]["pickscore"]) == {"base", "run", "difference"}


def test_kernels_hands_over_to_the_kernel_tools(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "list"]) == 0
    assert "leap_distances" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["kernels", "explan"])
    assert stop.value.code == 2
    assert "leapalign kernels" in capsys.readouterr().err


def test_doctor_names_a_backend_and_a_reason_for_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    import leap_kernels

    assert main(["doctor", "--json"]) == 0
    kernels = last_json(capsys)["kernels"]
    assert {item["op"] for item in kernels} >= {
        name for name in leap_kernels.__all__ if name.endswith(("step", "date"))
    }
    assert all(item["reason"] and item["backend"] for item in kernels)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["trian.iterations=3"], "did you mean 'train'?"),
        (["train.iterations=zero"], "'train.iterations' is 'zero'"),
        (["method.name=leapaling"], "did you mean 'leapalign'?"),
        (["method.alhpa=1"], "did you mean 'alpha'?"),
        (["reward.name=pikscore"], "did you mean 'pickscore'?"),
        (["reward.path=nowhere/at/all"], "check reward.path"),
        (["model.path=nowhere/at/all"], "check model.path"),
        (["model.height=30"], "multiples of 16"),
        (["prompts.path=none.txt"], "check prompts.path"),
        (["prompts.path=EMPTY"], "holds no prompts"),
        ([f"prompts.path={'x' * 300}"], "check prompts.path"),
        ([f"reward={{name: aesthetic, path: {'x' * 300}}}"], "check reward.path"),
        (["reward=[{name: pickscore, path: nowhere/at/all}, {name: aesthetic}]"], "'path' is missing"),
        (["train.batch_size=1000000000000"], "less than or equal to 65536"),
        (["method.name=[1]"], "is no name of a method"),
        (["seed=&a 1", "seed=*a"], "not valid YAML"),
        (["output=" + "x" * 300], "File name too long"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    assignments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    assignments = [item.replace("EMPTY", str(tmp_path / "empty.txt")) for item in assignments]
    output = tmp_path / "run"
    assert message in refused(["train", "--config", TINY, f"output={output}", *assignments], capsys)
    assert not output.exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "the memory is full; lower rollout.batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the memory is full"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "the memory is full",
        ),
        (OSError(28, "No space left on device", "somewhere"), "No space left on device: 'somewhere'; check the path"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("leapalign.cli.commands.doctor_command", fail)
    assert message in refused(["doctor"], capsys)


def test_a_bug_is_no_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("leapalign.cli.commands.doctor_command", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])


def test_no_library_speaks_and_no_code_is_fetched(tmp_path: Path) -> None:
    """In a process of its own: warnings come at the first import."""
    code = (
        "import sys; from leapalign.cli import main; code = main(sys.argv[1:]);"
        "assert 'kernels.hf_hub' not in sys.modules and 'kernels' not in sys.modules; sys.exit(code)"
    )
    arguments = ["generate", "--config", TINY, "--prompt", "a red circle", "--output", str(tmp_path), *SMALL]
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert all("image" in line for line in found.stderr.replace("\r", "\n").splitlines() if line), found.stderr


@pytest.mark.skipif(not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="PyTorch does not tell")
@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        pytest.param(
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64", marks=pytest.mark.slow
        ),
    ],
)
def test_commands_choose_growing_segments_where_nobody_chose(own: dict[str, str], found: str) -> None:
    """As PyTorch itself reads it, in a process of its own."""
    code = (
        "import torch; from leapalign.cli import main; main(['configs']); "
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    unset = {key: value for key, value in os.environ.items() if not key.endswith("ALLOC_CONF")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**unset, **own}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == found


def test_train_without_config_names_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config" in refused(["train"], capsys)


def test_missing_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot read config 'none.yaml'" in refused(["train", "--config", "none.yaml"], capsys)


def test_resume_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a run folder" in refused(["train", "--resume", str(tmp_path)], capsys)


def test_a_used_run_folder_is_not_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_metrics(run)
    assert "already holds a run" in refused(["train", "--config", TINY, f"output={run}"], capsys)
    assert read_metrics(run) == before


def test_unknown_options_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["train", "--confg", "x"], ["train", "iterations"], ["trian"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
