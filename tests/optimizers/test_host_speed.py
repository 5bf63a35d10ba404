"""Without the native library host work is slow: that is told before training, or refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import leap_kernels
import pytest
import torch
from leap_kernels import _native

from leapalign import trainer
from leapalign.config import KernelsConfig, MemoryConfig, config_from
from leapalign.inputs.validation import UserError
from leapalign.optimizers.host_speed import require_speed, warn_of_patch
from leapalign.trainer import Trainer


@pytest.fixture
def no_native_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Makes the package look as if it were installed without its library."""
    monkeypatch.delenv("LEAP_KERNELS", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(leap_kernels, "__path__", [str(tmp_path)])
        _native._load.cache_clear()
        yield
    _native._load.cache_clear()


@pytest.mark.native
@pytest.mark.parametrize("optimizer", ["device", "host"])
def test_with_the_library_nothing_is_said(
    optimizer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("LEAP_KERNELS", raising=False)
    require_speed(MemoryConfig(optimizer=optimizer))
    assert not caplog.records


@pytest.mark.usefixtures("no_native_library")
def test_a_slow_average_is_told_in_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "leapalign"):
        require_speed(MemoryConfig())
    (message,) = (record.getMessage() for record in caplog.records if record.name == "leapalign")
    assert "average, in host memory, takes about 14 times as long (the native library was not built" in message
    assert "C++ compiler" in message
    assert "adamw" not in message


@pytest.mark.usefixtures("no_native_library")
def test_a_slow_step_is_refused_before_anything_is_read() -> None:
    config = config_from(
        {"memory": {"optimizer": "host"}, "optimizer": {"name": "adamw_8bit"}, "prompts": {"path": "/nowhere"}}, "test"
    )
    with pytest.raises(UserError, match=r"about 190 times .*was not built.*LEAP_KERNELS=reference"):
        Trainer.unencoded(config)


@pytest.mark.usefixtures("no_native_library")
def test_who_asks_for_the_reference_gets_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("LEAP_KERNELS", "reference")
    with caplog.at_level(logging.WARNING, "leapalign"):
        require_speed(MemoryConfig(optimizer="host"))
    assert "adamw_8bit about 190 times" in caplog.text


@pytest.mark.usefixtures("no_native_library")
@pytest.mark.parametrize("patch", [False, True])
def test_a_patch_to_plain_pytorch_is_told_before_anything_is_read(
    patch: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "training_device", lambda: torch.device("cpu"))
    config = config_from({"kernels": {"patch": patch}, "prompts": {"path": "/nowhere"}}, "test")
    with caplog.at_level(logging.WARNING, "leapalign"), pytest.raises(UserError, match="/nowhere"):
        Trainer.unencoded(config)
    told = [record.getMessage() for record in caplog.records if "kernels.patch" in record.getMessage()]
    assert len(told) == patch
    for message in told:
        assert "plain PyTorch here (the native library was not built" in message
        assert "about 1.3 times as long" in message
        assert "C++ compiler" in message


@pytest.mark.parametrize(("backend", "told"), [("reference", 1), ("triton", 0)])
def test_a_patch_on_a_gpu_without_triton_is_told(
    backend: str, told: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choices = (
        leap_kernels.Explanation("adaln_modulate", "cpu", "native", "it is there"),
        leap_kernels.Explanation("adaln_modulate", "cuda", backend, "so it is"),
    )
    monkeypatch.setattr(leap_kernels, "explain", lambda: choices)
    warn_of_patch(KernelsConfig(patch=True), torch.device("cuda"))
    assert [("so it is" in text, "install triton" in text) for text in caplog.messages] == [(True, True)] * told
