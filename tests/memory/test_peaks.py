"""Peaks of a GPU's memory in a run's records; PyTorch's counters are stood in for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import config_of

from leapalign.inputs.validation import UserError
from leapalign.memory.peaks import peaks_since_last
from leapalign.planning import shortage
from leapalign.trainer import Trainer

GPU = torch.device("cuda")


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Peaks of what is allocated and reserved, which a reset clears."""
    found = {"allocated": 3 * 2**30, "reserved": 4 * 2**30}
    for name in found:
        monkeypatch.setattr(torch.cuda, f"max_memory_{name}", lambda device, name=name: found[name])
        monkeypatch.setattr(torch.cuda, f"memory_{name}", lambda device, name=name: found[name])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: found.update(dict.fromkeys(found, 0)))
    return found


def test_each_record_has_the_peaks_since_the_one_before(counters: dict[str, int]) -> None:
    assert peaks_since_last(GPU) == {"device_peak_bytes": 3 * 2**30, "device_reserved_bytes": 4 * 2**30}
    counters["allocated"] = 7
    assert peaks_since_last(GPU) == {"device_peak_bytes": 7, "device_reserved_bytes": 0}
    assert peaks_since_last(torch.device("cpu")) == {}


def test_records_of_a_run_hold_them(
    parts: Path, tmp_path: Path, counters: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer.from_config(config_of(parts, tmp_path, "rollout.num_steps=3"))
    records = trainer.run()
    assert "device_peak_bytes" not in next(records)
    monkeypatch.setattr(trainer, "train_one", lambda: {"skipped": 0.0})
    monkeypatch.setattr(trainer.model, "device", GPU)
    assert next(records)["device_reserved_bytes"] == 4 * 2**30


def test_memory_that_runs_out_names_the_allocators_gaps(
    parts: Path, tmp_path: Path, counters: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer.from_config(config_of(parts, tmp_path, "rollout.num_steps=3"))
    monkeypatch.setattr(trainer.model, "device", GPU)
    with pytest.raises(UserError, match=r"gaps 1\.0 GiB.* alive"), shortage.shortage_explained(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
