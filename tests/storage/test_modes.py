"""Whoever the umask lets may read what was written: no file is its owner's alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import make_parts
from watched_runs import watched

from leapalign.cli import main
from leapalign.config import save_config
from leapalign.storage.modes import copy
from leapalign.tiny.critic import Critic

PACKAGE = Path(__file__).parents[2] / "leapalign"
OTHER_WAYS = re.compile(r"torch\.save\(|\.save_pretrained\(|safetensors\.torch\.save|import .*\bsave_file\b|mkstemp")


@pytest.fixture(params=[0o022, 0o027], ids=["022", "027"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check_modes(folder: Path, umask: int) -> set[str]:
    """Of the folder and all in it; returns the names of its files."""
    found = [folder, *folder.rglob("*")]
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in found}
    wrong = {str(path): oct(path.stat().st_mode) for path in found if path.stat().st_mode & 0o777 != expected[path]}
    assert not wrong
    return {path.name for path in found if path.is_file()}


@pytest.mark.posix
def test_of_all_that_a_run_leaves(tmp_path: Path, umask: int) -> None:
    parts = tmp_path / "parts"
    make_parts(parts)
    Critic().save(parts / "critic")
    assert "model.safetensors" in check_modes(parts, umask)
    for path in [parts / "model", *(parts / "model").rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)  # of a base its modes are nobody's wish for copies

    for run, adapter in ((tmp_path / "run", "model.lora_rank=0"), (tmp_path / "adapter_run", "model.lora_rank=2")):
        save_config(watched(parts, run, "train.iterations=1", adapter), tmp_path / "config.yaml")
        assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 0
        for layout in ("diffusers", "comfyui"):
            output = tmp_path / f"{run.name} {layout}"
            assert main(["export", "--run", str(run), "--output", str(output), "--layout", layout]) == 0
            assert "README.md" in check_modes(output, umask)
        files = check_modes(run, umask)
        assert {"optimizer.safetensors", "watch_base.safetensors", "metrics.jsonl", "run.lock"} <= files
    config = str(tmp_path / "run" / "config.yaml")
    assert main(["cache", "--config", config, "--output", str(tmp_path / "cache")]) == 0
    assert "000000-0.safetensors" in check_modes(tmp_path / "cache", umask)


def test_no_other_file_writes_through_the_libraries() -> None:
    sources = [path for path in PACKAGE.rglob("*.py") if path.name != "modes.py"]
    lines = [f"{path.name}: {line}" for path in sources for line in path.read_text(encoding="utf-8").splitlines()]
    assert not [line for line in lines if OTHER_WAYS.search(line) and "from leapalign.storage.modes" not in line]


def test_copies_are_whole_and_no_links(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_bytes(bytes(range(9)))
    (tmp_path / "snapshot" / "part").mkdir(parents=True)
    (tmp_path / "snapshot" / "part" / "file").symlink_to("../../blobs/1")
    copy(tmp_path / "snapshot", tmp_path / "copy")
    assert not (tmp_path / "copy" / "part" / "file").is_symlink()
    assert (tmp_path / "copy" / "part" / "file").read_bytes() == bytes(range(9))
