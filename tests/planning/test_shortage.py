"""Memory that runs out is told as what took it, and which setting to change."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import pytest
import torch
from child_runs import exit_code, started
from small_runs import config_of

from leapalign.config import Config
from leapalign.inputs.validation import UserError
from leapalign.memory.residency import stage
from leapalign.planning.shortage import bytes_by_role
from leapalign.runs.opening import opened_run
from leapalign.trainer import Trainer

MESSAGE = (
    r"memory ran out in the surrogate stage of iteration 1, with .*weights .* GiB.* alive \(.*\); "
    r"set memory\.checkpointing to blocks: .*; then go on with --resume {run}"
)


def test_a_device_out_of_memory_is_explained(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened_run(config_of(parts, tmp_path), resume=False) as run:

        def short() -> dict[str, float]:
            with stage("surrogate"):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        monkeypatch.setattr(run.trainer, "train_one", short)
        with pytest.raises(UserError, match=MESSAGE.format(run=re.escape(str(tmp_path)))):
            run.train()


def test_entries_are_those_of_the_run(parts: Path, tmp_path: Path) -> None:
    trainer = Trainer.from_config(config_of(parts, tmp_path, "optimizer.name=adamw"))
    trainer.train_one()
    trainer.accumulate_gradients()
    used = bytes_by_role(trainer)
    size = sum(4 * parameter.numel() for parameter in trainer.model.transformer.parameters())
    assert used["gradients"] == size
    assert used["optimizer"] == pytest.approx(2 * size, rel=0.01)
    decoder = trainer.model.decoder
    assert used["weights"] == size + (sum(4 * p.numel() for p in decoder.parameters()) if decoder else 0)
    assert used["reward"] == sum(4 * p.numel() for term in trainer.rewards for p in term.reward.parameters())


def starved(config: Config, folder: Path) -> None:
    """Trains with little more address space than what is taken before; for `started`."""
    torch.set_num_threads(1)
    with opened_run(config, resume=False) as run:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**28
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            run.train()
        except UserError as error:
            (folder / "message").write_text(str(error))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of a process's memory")
def test_host_memory_that_really_runs_out_is_explained(parts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = config_of(parts, run, "model.height=512", "model.width=512", "samples.count=1")
    assert exit_code(started(starved, config, tmp_path)) == 0
    message = (tmp_path / "message").read_text()
    assert re.search(r"memory ran out in the \w+ stage of iteration 1, with .*--resume", message)
