"""Checkpoints are whole, last, and tell when they were damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import FILES, flip
from safetensors.torch import load_file
from small_runs import SHORT, config_of, train, weights

from leapalign.cli import main
from leapalign.inputs.validation import UserError
from leapalign.models.weights import save_weights
from leapalign.planning.ledger import Peak, StorageLedger
from leapalign.runs import checkpoint
from leapalign.runs.checkpoint import AVERAGE, latest_checkpoint, save_checkpoint, step_folder
from leapalign.storage import durable
from leapalign.storage.manifest import damage
from leapalign.trainer import Trainer


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


def test_the_files_of_a_checkpoint_are_these(trained: Path) -> None:
    folder = step_folder(trained, 3)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == list(FILES)
    described = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(described) == list(FILES[1:])


def read(folder: Path) -> dict[str, object]:
    """The bytes of each file; of safetensors, whose metadata come in any order, the tensors."""
    return {
        path.name: {name: (value.dtype, value.tolist()) for name, value in load_file(path).items()}
        if path.suffix == ".safetensors"
        else path.read_bytes()
        for path in folder.iterdir()
    }


HOST = ("memory.optimizer=host",)
STREAMED = (*HOST, "memory.weights=streamed", "memory.checkpointing=blocks")
KINDS = {
    "an average like the weights": ("model.dtype=bfloat16", "ema.dtype=bfloat16"),
    "an average of another dtype": ("model.dtype=bfloat16", "ema.dtype=float32"),
    "an adapter": ("model.lora_rank=2",),
}


@pytest.mark.parametrize(
    ("kind", "place"),
    [*((kind, place) for kind in list(KINDS)[:2] for place in ((), HOST, STREAMED)), ("an adapter", ())],
    ids=str,
)
def test_the_average_is_saved_as_the_model_that_holds_it(
    parts: Path, tmp_path: Path, kind: str, place: tuple[str, ...]
) -> None:
    """Byte for byte, and the model never holds it; what it needs beyond what is there is a copy of another dtype."""
    trainer = train(config_of(parts, tmp_path / "run", *SHORT, "checkpoint.every=3", *KINDS[kind], *place))
    transformer, optimizer = trainer.model.transformer, trainer.optimizer
    with optimizer.averaged_weights():
        save_weights(transformer, tmp_path / "held")
    own, average = weights(trainer), optimizer.average.tensors
    there = [*transformer.state_dict().values(), *average, *optimizer.tensors().values()]
    if optimizer._weights is not None:
        there += [group.master for group in (optimizer._weights._rest, *optimizer._weights._blocks)]
        there += [buffer.memory for buffer in (optimizer._weights._rest.buffer, *optimizer._weights._ring)]
    with StorageLedger() as ledger:
        ledger.exclude(*there)
        save_checkpoint(tmp_path, 4, transformer, optimizer, keep=1)
    saved = [read(tmp_path / "held"), read(step_folder(tmp_path, 4) / AVERAGE)]
    assert saved[0] == saved[1]
    assert torch.equal(weights(trainer), own)
    rounded = sum(p.nbytes for p, mean in zip(optimizer._parameters, average, strict=True) if p.dtype != mean.dtype)
    assert ledger.peak == 0
    assert ledger.host.peaks.get("setup", Peak()).total == rounded


@pytest.mark.parametrize("harm", [truncate, flip, remove])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_its_checkpoint_passed_over(
    run: Path, caplog: pytest.LogCaptureFixture, name: str, harm: Callable[[Path], None]
) -> None:
    assert latest_checkpoint(run) == step_folder(run, 3)
    assert not caplog.messages
    harm(step_folder(run, 3) / name)
    assert latest_checkpoint(run) == step_folder(run, 2)
    (message,) = caplog.messages
    assert f"'{step_folder(run, 3)}' is damaged" in message
    # A manifest that still is JSON makes another file look altered.
    assert name in message or (name == "manifest.json" and harm is flip)


def test_a_run_resumes_before_its_damaged_checkpoints_and_replaces_them(
    parts: Path, run: Path, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(step_folder(run, 3) / "optimizer.safetensors")
    truncate(step_folder(run, 2) / "state.json")
    train(config_of(parts, run, *SHORT), resume=True)
    assert len([message for message in caplog.messages if "is damaged" in message]) == 2
    for number in (1, 2, 3):
        assert damage(step_folder(run, number)) is None
    same = [(step_folder(folder, 3) / "manifest.json").read_bytes() for folder in (run, trained)]
    assert same[0] == same[1]


def test_without_a_whole_checkpoint_nothing_is_resumed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2, 3):
        truncate(step_folder(run, number) / "optimizer.safetensors")
    with pytest.raises(UserError, match=r"all checkpoints of '.*run' are damaged; "):
        latest_checkpoint(run)
    assert main(["train", "--resume", str(run)]) == 2
    assert "are damaged" in capsys.readouterr().err


def test_pictures_need_the_average_alone(run: Path) -> None:
    truncate(step_folder(run, 3) / "optimizer.safetensors")
    assert latest_checkpoint(run, within="transformer_ema") == step_folder(run, 3)
    flip(step_folder(run, 3) / "transformer_ema" / "config.json")
    assert latest_checkpoint(run, within="transformer_ema") == step_folder(run, 2)


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_checkpoints_stay(parts: Path, run: Path, keep: int, left: list[int]) -> None:
    (run / "checkpoints" / "step-7.partial").mkdir()
    train(config_of(parts, run, *SHORT, "train.iterations=4", f"checkpoint.keep={keep}"), resume=True)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{number}" for number in left]


def test_everything_is_on_the_disk_before_it_counts(
    parts: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of calls: each file and folder flushed, renamed, the parent flushed, and only then old ones deleted."""
    calls: list[tuple[str, Any]] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def spy_replace(source: Path, target: Path) -> None:
        calls.append(("replace", Path(target).name))
        replace(source, target)

    config = config_of(parts, run, *SHORT, "train.iterations=4", "checkpoint.keep=1")
    trainer = Trainer.from_config(config)
    checkpoint.load_checkpoint(step_folder(run, 3), trainer.model.transformer, trainer.optimizer)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    checkpoint.save_checkpoint(run, 4, trainer.model.transformer, trainer.optimizer, keep=1)
    final = step_folder(run, 4)
    renamed = calls.index(("replace", "step-4"))
    flushed = {inode for kind, inode in calls[:renamed] if kind == "fsync"}
    assert {path.stat().st_ino for path in (final, *final.rglob("*"))} <= flushed
    assert calls[renamed + 1] == ("fsync", final.parent.stat().st_ino)
    deleted = [number for number, (kind, what) in enumerate(calls) if kind == "replace" and what != "step-4"]
    assert len(deleted) == 3
    assert min(deleted) > renamed + 1


def test_a_full_disk_is_told_before_anything_is_written(
    parts: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = sum(path.stat().st_size for path in step_folder(run, 3).rglob("*") if path.is_file())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed))
    assert main(["train", "--resume", str(run), "train.iterations=4"]) == 2
    error = capsys.readouterr().err
    assert "a checkpoint needs 0.01 GiB, and" in error
    assert "Traceback" not in error
    assert latest_checkpoint(run) == step_folder(run, 3)
    # The estimate is the real size and a margin.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed + (1 << 20)))
    assert main(["train", "--resume", str(run), "train.iterations=4"]) == 0


@pytest.mark.parametrize("call", ["transformer", "save_file", "write_manifest", "sync_tree", "rename"])
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
    parts: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    where, name = (checkpoint, "save_weights") if call == "transformer" else (checkpoint, call)
    monkeypatch.setattr(where, name, full)
    assert main(["train", "--resume", str(run), "train.iterations=4"]) == 2
    error = capsys.readouterr().err
    assert f"cannot write '{step_folder(run, 4)}' (No space left on device)" in error
    assert "Traceback" not in error
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-1", "step-2", "step-3"]
    assert latest_checkpoint(run) == step_folder(run, 3)
    monkeypatch.undo()
    assert main(["train", "--resume", str(run), "train.iterations=4"]) == 0


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    durable.write_text(path, "old")

    def fill_the_disk() -> None:
        with durable.beside(path) as partial:
            partial.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"cannot write '.*file\.txt' \(No space left on device\)"):
        fill_the_disk()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"
